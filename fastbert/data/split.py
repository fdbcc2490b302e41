"""A split of a dataset, as everything that trains or evaluates sees it: three long arrays.

Sentences follow one another in one array of tokens, and documents in one array of sentences. How
these lie on the disk is the matter of the two classes that have these methods: `BlockSplit` (format
3) and `ShardSplit` (format 2).
"""

from __future__ import annotations

from typing import Protocol

import numpy as np


class Split(Protocol):
    """The documents, sentences and tokens of a split. All indices and results are int64."""

    documents: int
    sentences: int
    tokens: int

    def first_sentence(self, documents: np.ndarray) -> np.ndarray:
        """Return the index of each document's first sentence.

        Index `self.documents` gives `self.sentences`.
        """
        ...

    def first_token(self, sentences: np.ndarray) -> np.ndarray:
        """Return the offset of each sentence's first token.

        Index `self.sentences` gives `self.tokens`.
        """
        ...

    def gather(self, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Return the token ids of many spans, one span after another.

        Args:
            starts: int64 [N], token offsets; a span lies within one document.
            lengths: int64 [N], tokens.

        Returns:
            int64 [sum(lengths)].
        """
        ...

    def begins_word(self, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Return whether the tokens of `gather(starts, lengths)` begin a word, bool [T]."""
        ...


def positions(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return the offsets of the tokens of many spans, one span after another, int64 [T]."""
    starts, lengths = np.asarray(starts, np.int64), np.asarray(lengths, np.int64)
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    # Position p of the result belongs to span s and holds token
    # starts[s] + (p - first position of s).
    return np.arange(total) + np.repeat(starts - (ends - lengths), lengths)


def running_total(counts: np.ndarray | list[int]) -> np.ndarray:
    """Return where each part begins; the last entry is the total."""
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


def locate(indices: np.ndarray, base: np.ndarray) -> tuple[np.ndarray | int, np.ndarray]:
    """Return the block or shard of each index, and the index within it; of a single one just 0.

    The index one past the end is that of the last block. `base` says where each begins, and ends
    with the total.
    """
    indices = np.asarray(indices, np.int64)
    assert indices.size == 0 or (indices.min() >= 0 and indices.max() <= base[-1])
    if len(base) == 2:
        return 0, indices
    block = np.minimum(np.searchsorted(base, indices, "right") - 1, len(base) - 2)
    return block, indices - base[block]


def locate_spans(
    starts: np.ndarray, lengths: np.ndarray, base: np.ndarray
) -> tuple[np.ndarray | int, np.ndarray]:
    """Return the block of each span, which lies within it, and its first token there."""
    block, local = locate(starts, base)
    assert np.all(base[block] + local + lengths <= base[block + 1])
    return block, local


def bits(data: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Return bits of an array of bytes, of which the highest of a byte is the first, as bool."""
    return (data[places >> 3] >> (7 - (places & 7)).astype(np.uint8) & 1).astype(bool)
