"""How many examples a document gives: the one definition, which examples.py explains.

`prepare` writes the counts of each block into the table of blocks, for the lengths that people
train with. So a run knows the size of an epoch without reading the text.
"""

from __future__ import annotations

import numpy as np

from fastbert.data.split import Split

# Documents counted at a time, so that memory for temporaries does not grow with the split.
DOCUMENTS_AT_ONCE = 1 << 20
# Values of batch.max_length for which the table of blocks holds counts.
LENGTHS = tuple(1 << bits for bits in range(6, 14))  # 64 to 8,192


def room_for(max_length: int, pairs: bool) -> int:
    """Return the tokens of an example that are left besides [CLS] and one or two [SEP]."""
    return max_length - (3 if pairs else 2)


def examples_per_document(
    sentences: np.ndarray, tokens: np.ndarray | None, room: int, pairs: bool
) -> np.ndarray:
    """Return the number of examples of each document, int64 [D].

    Args:
        sentences: int64 [D], sentences of each document; at least 1.
        tokens: int64 [D], tokens of each document; None where segments = "single", which does not
            depend on them.
        room: as `room_for`.
        pairs: whether an example is a pair.
    """
    joins = sentences - 1
    if tokens is None:
        return joins if pairs else sentences
    count = -(-tokens // room)
    # There are no more pairs than joins: a very long sentence adds none, it is cut.
    return np.minimum(count, joins) if pairs else count


def count_examples(split: Split, room: int, pairs: bool, single: bool) -> np.ndarray:
    """Return the number of examples of each document of a split, int64 [documents].

    Args:
        split: of which all offsets are read.
        room, pairs: as in `examples_per_document`.
        single: whether segments = "single".
    """
    counts = np.empty(split.documents, np.int64)
    for start in range(0, split.documents, DOCUMENTS_AT_ONCE):
        documents = np.arange(start, min(start + DOCUMENTS_AT_ONCE, split.documents) + 1)
        first = split.first_sentence(documents)
        tokens = None if single else np.diff(split.first_token(first))
        counts[start : start + len(documents) - 1] = examples_per_document(
            np.diff(first), tokens, room, pairs
        )
    return counts
