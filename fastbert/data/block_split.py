"""A split of format 3: blocks mapped one behind the other into one array of bytes.

Whatever number of files and blocks there is, a look-up is the same few operations of numpy: find
the block by a binary search, add where its section begins in the array.
"""

from __future__ import annotations

import numpy as np

from fastbert.data.block_table import Blocks
from fastbert.data.blocks import ALIGNMENT, GROUP
from fastbert.data.mapped_file import map_ranges
from fastbert.data.split import bits, locate, locate_spans, positions, running_total
from fastbert.data.verify import reading_part

_GROUP_BITS = GROUP.bit_length() - 1


class BlockSplit:
    """Blocks, memory-mapped, as a split; split.py says what its methods return.

    Documents are numbered in the order of the blocks. Nothing of them is read or verified here.

    Args:
        blocks: in any order, and of one split or of several.

    Raises:
        InputError: a file is missing, too short or cannot be mapped.
    """

    def __init__(self, blocks: Blocks):
        at = blocks.layout
        aligned = -(-at.size // ALIGNMENT) * ALIGNMENT
        places = running_total(aligned)
        with reading_part(blocks.folder):
            self._bytes = map_ranges(blocks.ranges(), places)
        self._u2, self._u4 = self._bytes.view("<u2"), self._bytes.view("<u4")
        self._tokens = self._bytes.view(f"<u{blocks.width}")
        # Where each block begins in the numbering of the split; the last entry is the total.
        self._document_base = running_total(blocks.entries["documents"])
        self._sentence_base = running_total(blocks.entries["sentences"])
        self._token_base = running_total(blocks.entries["tokens"])
        self.documents = int(self._document_base[-1])
        self.sentences = int(self._sentence_base[-1])
        self.tokens = int(self._token_base[-1])
        # Where the sections of each block begin in an array of their type.
        begin = places[:-1]
        self._document_at = (begin + at.documents) // 4
        self._group_at = (begin + at.groups) // 4
        self._sentence_at = (begin + at.sentences) // 2
        self._word_at = begin + at.words if blocks.words else None
        self._token_at = (begin + at.ids) // blocks.width

    def first_sentence(self, documents: np.ndarray) -> np.ndarray:
        block, local = locate(documents, self._document_base)
        return self._u4[self._document_at[block] + local] + self._sentence_base[block]

    def first_token(self, sentences: np.ndarray) -> np.ndarray:
        block, local = locate(sentences, self._sentence_base)
        group = self._u4[self._group_at[block] + (local >> _GROUP_BITS)]
        return self._u2[self._sentence_at[block] + local] + (group + self._token_base[block])

    def gather(self, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        block, local = locate_spans(starts, lengths, self._token_base)
        return self._tokens[positions(self._token_at[block] + local, lengths)].astype(np.int64)

    def begins_word(self, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        assert self._word_at is not None, "the tokens of this dataset say where words begin"
        block, local = locate_spans(starts, lengths, self._token_base)
        return bits(self._bytes, positions(8 * self._word_at[block] + local, lengths))
