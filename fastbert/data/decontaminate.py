"""Find documents that share text with evaluation sets: 13 token ids in a row that occur in both.

A model that has seen a question in training answers it from memory. So documents with such a run
can be left out. Runs are compared by 64-bit hashes of their ids, so case and spaces count as much
as they do for the tokenizer.

Source: Brown et al., 2020, "Language Models are Few-Shot Learners", appendix C (13-grams).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from fastbert.data.copies import distinct
from fastbert.data.documents import parse, read_chunks
from fastbert.data.encode import ChunkEncoder, Documents, mix
from fastbert.data.rows import as_text, read_values
from fastbert.data.sources import TABLES, Source
from fastbert.errors import InputError

GRAM = 13
# A run of fewer different ids is a line of dots or dashes, which occurs anywhere.
LEAST_DIFFERENT = 4
_BITS = 1 << 24  # of the table in front of the search: 16 MiB, one byte each
_TEXTS = 1 << 10  # encoded at a time
# Odd, so that it has an inverse modulo 2**64.
_BASE = np.uint64(0x9E3779B97F4A7C15)


def read_texts(sources: Sequence[Source]) -> Iterator[str]:
    """Yield the texts of evaluation sets: documents, and of tables the values of every column.

    Raises:
        InputError: a file that cannot be read, or has a bad record: its text would stay unknown,
            and its copies in the documents too.
    """
    for source in sources:
        if source.format in TABLES:
            unit = "row" if source.format in ("parquet", "arrow") else "line"
            for number, row in read_values(source, None):
                if isinstance(row, str):
                    raise InputError(f"{source.path}: {unit} {number}: {row}")
                yield from _strings_in(row)
        else:
            for chunk in read_chunks([source]):
                yield from parse(chunk)


def _strings_in(value: Any) -> Iterator[str]:
    """Yield the texts in a value, such as the choices of a question, which are a list."""
    if isinstance(value, (list, dict)):
        for item in value if isinstance(value, list) else value.values():
            yield from _strings_in(item)
    else:
        yield as_text(value)


def grams_of(texts: Iterable[str], encoder: ChunkEncoder) -> np.ndarray:
    """Return the hashes of all runs of GRAM ids in texts, uint64, ascending and distinct."""
    found, waiting = [np.zeros(0, np.uint64)], list[str]()

    def add() -> None:
        documents = encoder.encode(waiting).documents
        hashes, at = _grams(documents)
        runs = np.sort(documents.tokens[at[:, None] + np.arange(GRAM)], axis=1)
        different = 1 + np.count_nonzero(runs[:, 1:] != runs[:, :-1], axis=1)
        found.append(hashes[different >= LEAST_DIFFERENT])
        waiting.clear()

    for text in texts:
        waiting.append(text)
        if len(waiting) == _TEXTS:
            add()
    add()
    return distinct(np.concatenate(found))


class Shared:
    """Says which documents share a run of ids with evaluation sets.

    Args:
        grams: from `grams_of`.
    """

    def __init__(self, grams: np.ndarray):
        self._grams = grams
        self._table = np.zeros(_BITS, bool)
        self._table[_slots(grams)] = True

    def __call__(self, documents: Documents) -> np.ndarray:
        """Return for each document whether it shares a run, bool [D]."""
        shared = np.zeros(len(documents.documents), bool)
        if len(self._grams):
            hashes, at = _grams(documents)
            near = np.flatnonzero(self._table[_slots(hashes)])
            hashes, at = hashes[near], at[near]
            place = np.searchsorted(self._grams, hashes).clip(max=len(self._grams) - 1)
            at = at[self._grams[place] == hashes]
            shared[np.searchsorted(documents.ends, at, "right")] = True
        return shared


def _slots(hashes: np.ndarray) -> np.ndarray:
    return (hashes & np.uint64(_BITS - 1)).astype(np.int64)


def _grams(documents: Documents) -> tuple[np.ndarray, np.ndarray]:
    """Return the hash of each run of GRAM ids that lies in one document, and where it begins."""
    count = len(documents.tokens) - GRAM + 1
    if count <= 0:
        return np.zeros(0, np.uint64), np.zeros(0, np.int64)
    # The sum of mixed id times a power of the base, over the run, as a difference of running sums;
    # divided by the power of the first place, so that it does not depend on the place.
    powers, inverses = _powers((len(documents.tokens) >> 16).bit_length())
    mixed = mix(documents.tokens.astype(np.uint64) + np.uint64(1))
    running = np.append(np.uint64(0), np.cumsum(mixed * powers[: len(mixed)]))
    hashes = mix((running[GRAM:] - running[:-GRAM]) * inverses[:count])
    inside = np.ones(count, bool)
    # A run that begins in the last GRAM - 1 tokens of a document goes beyond it.
    ends = documents.ends
    beyond = (ends[:, None] - np.arange(1, GRAM)).ravel()
    inside[beyond[(beyond >= 0) & (beyond < count)]] = False
    at = np.flatnonzero(inside)
    return hashes[at], at


@lru_cache(maxsize=4)
def _powers(doublings: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the powers of the base and of its inverse, for 65,536 places doubled so often."""
    inverse = np.uint64(pow(int(_BASE), -1, 1 << 64))
    result = list[np.ndarray]()
    for base in (_BASE, inverse):
        powers = np.full(1 << (16 + doublings), base, np.uint64)
        powers[0] = 1
        result.append(np.cumprod(powers))
    return result[0], result[1]
