"""Finds documents that are exact copies of an earlier one, by a hash of their text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import replace
from itertools import chain, repeat

import numpy as np

from fastbert.data.documents import Chunk, parse
from fastbert.data.encode import hash_text
from fastbert.data.workers import map_in_order


def find_copies(
    chunks: Iterable[Chunk], text_field: str, skip_bad: bool, workers: int
) -> list[np.ndarray]:
    """Return for each chunk which of its documents are copies of an earlier one, int32.

    Documents without text are not counted as copies. The memory is 8 bytes for each distinct
    document, 16 while it grows, and 4 bytes for each copy.

    Args:
        chunks: of all sources, in order.
        text_field, skip_bad: see documents.py.
        workers: processes that parse and hash; the number does not change the result.
    """
    seen, empty = Seen(), np.uint64(hash_text(""))
    with closing(map_in_order(ChunkHasher, (text_field, skip_bad), chunks, workers)) as hashed:
        return [
            np.flatnonzero(~seen.add(hashes) & (hashes != empty)).astype(np.int32)
            for hashes in hashed
        ]


def without_copies(chunks: Iterable[Chunk], copies: Iterable[np.ndarray]) -> Iterator[Chunk]:
    """Return the chunks of `find_copies`, with the copies marked for `parse` to leave out."""
    # A source that has grown since has more chunks, which `prepare` notices at the end.
    marks = chain(copies, repeat(None))
    return (replace(chunk, copies=mark) for chunk, mark in zip(chunks, marks, strict=False))


class ChunkHasher:
    """Hashes the documents of chunks; see `documents.parse` for the arguments."""

    def __init__(self, text_field: str, skip_bad: bool):
        self._text_field, self._skip_bad = text_field, skip_bad

    def __call__(self, chunk: Chunk) -> np.ndarray:
        """Return the hashes of a chunk's documents, uint64 [N]."""
        texts = parse(chunk, self._text_field, [] if self._skip_bad else None)
        return np.array([hash_text(text) for text in texts], np.uint64)


class Seen:
    """The distinct hashes of a stream, as sorted arrays that are merged when they get many."""

    def __init__(self) -> None:
        self._runs: list[np.ndarray] = []

    def add(self, hashes: np.ndarray) -> np.ndarray:
        """Add hashes, uint64 [N]; return whether each is the first of its kind, bool [N]."""
        first = np.zeros(len(hashes), bool)
        first[np.unique(hashes, return_index=True)[1]] = True
        for run in self._runs:
            at = np.searchsorted(run, hashes).clip(max=len(run) - 1)
            first &= run[at] != hashes
        new = np.sort(hashes[first])
        # Each array is more than twice as long as the next, so there are few of them.
        while self._runs and len(self._runs[-1]) <= 2 * len(new):
            new = np.sort(np.concatenate([self._runs.pop(), new]), kind="stable")
        if len(new):
            self._runs.append(new)
        return first
