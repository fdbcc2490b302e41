"""A split of a dataset of format 2, which this version reads and does not write.

A shard has three files, or four: token ids, offsets of sentences and of documents, and with other
tokenizers than BERT's where words begin. format_2.py has the layout.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from fastbert.data.manifest import Counts
from fastbert.data.mapped_file import map_file
from fastbert.data.split import positions, running_total

OFFSETS = np.dtype("<i8")


class ShardSplit:
    """A split of format 2, memory-mapped; split.py says what its methods return.

    Args:
        folder: holds the shards.
        shards: counts of each shard, in order.
        dtype: of the token ids on disk.
        words: whether the shards say where words begin.
    """

    def __init__(
        self, folder: Path, shards: Sequence[Counts], dtype: np.dtype, words: bool = False
    ):
        names = [folder / shard_name(i) for i in range(len(shards))]
        sizes = list(zip(names, shards, strict=True))
        self._tokens = [map_file(f"{name}.tokens", dtype, c.tokens) for name, c in sizes]
        self._sentences = [
            map_file(f"{name}.sentences", OFFSETS, c.sentences + 1) for name, c in sizes
        ]
        self._documents = [
            map_file(f"{name}.documents", OFFSETS, c.documents + 1) for name, c in sizes
        ]
        self._words = [
            map_file(f"{name}.words", np.dtype("u1"), -(-c.tokens // 8))
            for name, c in sizes
            if words
        ]
        # Where each shard begins in the global numbering; the last entry is the total.
        self._document_base = running_total([c.documents for c in shards])
        self._sentence_base = running_total([c.sentences for c in shards])
        self._token_base = running_total([c.tokens for c in shards])
        self.documents = int(self._document_base[-1])
        self.sentences = int(self._sentence_base[-1])
        self.tokens = int(self._token_base[-1])

    def first_sentence(self, documents: np.ndarray) -> np.ndarray:
        return _look_up(self._documents, self._document_base, self._sentence_base, documents)

    def first_token(self, sentences: np.ndarray) -> np.ndarray:
        return _look_up(self._sentences, self._sentence_base, self._token_base, sentences)

    def gather(self, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        tokens = self._positions(starts, lengths)
        if len(self._tokens) == 1:
            return self._tokens[0][tokens].astype(np.int64)
        shards = np.searchsorted(self._token_base, tokens, "right") - 1
        result = np.empty(len(tokens), np.int64)
        for shard, chosen in _by_shard(shards):
            result[chosen] = self._tokens[shard][tokens[chosen] - self._token_base[shard]]
        return result

    def begins_word(self, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        tokens = self._positions(starts, lengths)
        shards = np.searchsorted(self._token_base, tokens, "right") - 1
        result = np.empty(len(tokens), bool)
        for shard, chosen in _by_shard(shards):
            at = tokens[chosen] - self._token_base[shard]
            result[chosen] = self._words[shard][at >> 3] >> (7 - (at & 7)).astype(np.uint8) & 1
        return result

    def _positions(self, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        found = positions(starts, lengths)
        assert found.size == 0 or (found.min() >= 0 and found.max() < self.tokens)
        return found


def shard_name(index: int) -> str:
    return f"shard-{index:05d}"


def _by_shard(shards: np.ndarray) -> Iterator[tuple[int, tuple[np.ndarray, ...]]]:
    """Yield each shard that occurs in an array of any shape, and the indices where it does.

    A sort takes the same time for any number of shards, where a comparison for each would not.
    """
    flat = shards.ravel()
    order = np.argsort(flat, kind="stable")
    bounds = np.flatnonzero(np.diff(flat[order])) + 1
    for places in np.split(order, bounds) if len(order) else ():
        yield int(flat[places[0]]), np.unravel_index(places, shards.shape)


def _look_up(
    offsets: list[np.ndarray], base: np.ndarray, target_base: np.ndarray, indices: np.ndarray
) -> np.ndarray:
    """Return global offsets for global indices, from the offsets within the shards.

    The index one past the end gives the end of the last shard.
    """
    indices = np.asarray(indices, np.int64)
    assert indices.size == 0 or (indices.min() >= 0 and indices.max() <= base[-1])
    if len(offsets) == 1:
        return offsets[0][indices].astype(np.int64)
    result = np.empty_like(indices)
    shards = np.minimum(np.searchsorted(base, indices, "right") - 1, len(offsets) - 1)
    for shard, chosen in _by_shard(shards):
        result[chosen] = offsets[shard][indices[chosen] - base[shard]] + target_base[shard]
    return result
