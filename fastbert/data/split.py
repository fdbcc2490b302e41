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
