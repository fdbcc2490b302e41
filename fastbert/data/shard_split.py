"""A split of a dataset of format 2, which this version reads and does not write.

A shard has three files, or four: token ids, offsets of sentences and of documents, and with other
tokenizers than BERT's where words begin. format_2.py has the layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path

import numpy as np

from fastbert.data.blocks import ALIGNMENT
from fastbert.data.manifest import Counts
from fastbert.data.mapped_file import map_ranges
from fastbert.data.split import bits, locate, locate_spans, positions, running_total

OFFSETS = np.dtype("<i8")
_BITS = np.dtype("u1")


class ShardSplit:
    """A split of format 2, memory-mapped; split.py says what its methods return.

    The files of a kind are mapped one behind the other into one array.

    Args:
        folder: holds the shards.
        shards: counts of each shard, in order.
        dtype: of the token ids on disk.
        words: whether the shards say where words begin.
    """

    def __init__(
        self, folder: Path, shards: Sequence[Counts], dtype: np.dtype, words: bool = False
    ):
        documents, sentences, tokens = np.array([astuple(c) for c in shards], np.int64).T
        # Where each shard begins in the global numbering; the last entry is the total.
        self._document_base = running_total(documents)
        self._sentence_base = running_total(sentences)
        self._token_base = running_total(tokens)
        self.documents = int(self._document_base[-1])
        self.sentences = int(self._sentence_base[-1])
        self.tokens = int(self._token_base[-1])
        # Each array, and where the shards begin in it.
        self._documents, self._document_at = _mapped(folder, "documents", OFFSETS, documents + 1)
        self._sentences, self._sentence_at = _mapped(folder, "sentences", OFFSETS, sentences + 1)
        self._tokens, self._token_at = _mapped(folder, "tokens", dtype, tokens)
        if words:
            self._words, self._word_at = _mapped(folder, "words", _BITS, -(-tokens // 8))

    def first_sentence(self, documents: np.ndarray) -> np.ndarray:
        shard, local = locate(documents, self._document_base)
        return self._documents[self._document_at[shard] + local] + self._sentence_base[shard]

    def first_token(self, sentences: np.ndarray) -> np.ndarray:
        shard, local = locate(sentences, self._sentence_base)
        return self._sentences[self._sentence_at[shard] + local] + self._token_base[shard]

    def gather(self, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        shard, local = locate_spans(starts, lengths, self._token_base)
        return self._tokens[positions(self._token_at[shard] + local, lengths)].astype(np.int64)

    def begins_word(self, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        shard, local = locate_spans(starts, lengths, self._token_base)
        return bits(self._words, positions(8 * self._word_at[shard] + local, lengths))


def shard_name(index: int) -> str:
    return f"shard-{index:05d}"


def _mapped(
    folder: Path, kind: str, dtype: np.dtype, lengths: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Map the files of a kind; return their array, and where each of them begins in it."""
    sizes = lengths * dtype.itemsize
    places = running_total(-(-sizes // ALIGNMENT) * ALIGNMENT)
    ranges = [
        (folder / f"{shard_name(i)}.{kind}", 0, size) for i, size in enumerate(sizes.tolist())
    ]
    return map_ranges(ranges, places).view(dtype), places[:-1] // dtype.itemsize
