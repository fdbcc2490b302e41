"""A block: whole documents as bytes, with their offsets; a dataset is a list of blocks.

    documents   uint32 [D + 1]             the first sentence of each document, and S
    groups      uint32 [S // 256 + 1]      the first token of every 256th sentence
    sentences   uint16 [S + 1]             the first token of each sentence, minus that of its
                                           group; and the same for the end of the last one
    words       uint8 [ceil(T / 8)]        a bit for each token, the highest of a byte first:
                                           whether a word begins there; not with BERT's tokenizer,
                                           whose tokens say so
    ids         uint16 or uint32 [T]       token ids, as wide as the vocabulary needs

A sentence has at most 254 tokens, so offsets within 256 sentences fit two bytes, and any offset is
found in two look-ups without decoding. Sections begin at multiples of 8 bytes and numbers are
little-endian. In a shard, a block begins at a multiple of ALIGNMENT, so it can be mapped alone.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastbert.data.example_counts import LENGTHS, examples_per_document, room_for

# A block is closed at the first end of a document after this many bytes of token ids.
BLOCK_BYTES = 16 << 20
# The largest page size of the processors in use: blocks are mapped one by one.
ALIGNMENT = 64 << 10
GROUP = 256  # sentences

# An entry of the table of blocks.
BLOCK = np.dtype(
    [
        ("split", "<u4"),  # index in dataset.SPLITS
        ("shard", "<u4"),  # number of the file within the split
        ("offset", "<u8"),  # of the first byte in that file
        ("documents", "<u4"),
        ("sentences", "<u4"),
        ("tokens", "<u4"),
        ("most_sentences", "<u4"),  # of a document
        ("most_tokens", "<u4"),  # of a document
        # Examples where segments = "fill" or "windows": without pairs, and with; for each of
        # LENGTHS. Where segments = "single" the counts above say it.
        ("examples", "<u4", (2, len(LENGTHS))),
        ("sha256", "u1", 32),
    ]
)


@dataclass(frozen=True)
class Layout:
    """Where the sections of a block begin, in bytes from its first one, and its size.

    Each is an int, or int64 [N] for many blocks.
    """

    documents: Any
    groups: Any
    sentences: Any
    words: Any
    ids: Any
    size: Any


def layout(documents: Any, sentences: Any, tokens: Any, width: int, words: bool) -> Layout:
    """Return the layout of a block.

    Args:
        documents, sentences, tokens: counts; int64 arrays give a layout of arrays.
        width: bytes of a token id.
        words: whether the block says where words begin.
    """
    sizes = [
        4 * (documents + 1),
        4 * (sentences // GROUP + 1),
        2 * (sentences + 1),
        -(-tokens // 8) * words,
        width * tokens,
    ]
    a, b, c, d = (-(-size // 8) * 8 for size in sizes[:4])
    ids = a + b + c + d
    return Layout(0, a, a + b, a + b + c, ids, ids + sizes[4])


def encode(
    tokens: np.ndarray,
    sentences: np.ndarray,
    documents: np.ndarray,
    begins_word: np.ndarray | None,
    dtype: np.dtype,
) -> tuple[np.ndarray, np.ndarray]:
    """Return a block, uint8, and its entry of the table, whose split, shard and offset are 0.

    Args:
        tokens: [T], ids of all documents, one after another.
        sentences: int [S], tokens of each sentence; all in [1, 254], sum T.
        documents: int [D], sentences of each document; all at least 1, sum S.
        begins_word: bool [T], or None.
        dtype: of the ids in the block.
    """
    first_sentence = np.concatenate([[0], np.cumsum(documents, dtype=np.int64)])
    first_token = np.concatenate([[0], np.cumsum(sentences, dtype=np.int64)])
    groups = first_token[::GROUP]
    sections = {
        "documents": first_sentence.astype("<u4"),
        "groups": groups.astype("<u4"),
        "sentences": (first_token - np.repeat(groups, GROUP)[: len(first_token)]).astype("<u2"),
        "ids": tokens.astype(dtype, copy=False),
    }
    if begins_word is not None:
        sections["words"] = np.packbits(begins_word)
    counts = len(documents), len(sentences), len(tokens)
    places = layout(*counts, dtype.itemsize, begins_word is not None)
    data = np.zeros(places.size, np.uint8)
    for name, section in sections.items():
        start = getattr(places, name)
        data[start : start + section.nbytes] = section.view(np.uint8)
    entry = np.zeros((), BLOCK)
    entry["documents"], entry["sentences"], entry["tokens"] = counts
    lengths = np.diff(first_token[first_sentence])
    entry["most_sentences"], entry["most_tokens"] = documents.max(), lengths.max()
    entry["examples"] = [
        [
            examples_per_document(documents, lengths, room_for(longest, pairs), pairs).sum()
            for longest in LENGTHS
        ]
        for pairs in (False, True)
    ]
    entry["sha256"] = np.frombuffer(hashlib.sha256(data.data).digest(), np.uint8)
    return data, entry


def problem(data: np.ndarray, entry: np.ndarray, width: int, words: bool, vocab: int) -> str | None:
    """Return what is wrong with the numbers of a block, or None.

    Args:
        data: uint8, the bytes of the block, as many as its layout says.
        entry: of the table.
        width, words: as in `layout`.
        vocab: every token id is below.
    """
    documents, sentences, tokens = (
        int(entry[name]) for name in ("documents", "sentences", "tokens")
    )
    at = layout(documents, sentences, tokens, width, words)
    first_sentence = data[at.documents : at.documents + 4 * (documents + 1)].view("<u4")
    groups = data[at.groups : at.groups + 4 * (sentences // GROUP + 1)].view("<u4")
    within = data[at.sentences : at.sentences + 2 * (sentences + 1)].view("<u2")
    first_token = np.repeat(groups.astype(np.int64), GROUP)[: sentences + 1] + within
    for kind, offsets, total in (
        ("document", first_sentence.astype(np.int64), sentences),
        ("sentence", first_token, tokens),
    ):
        wrong = np.diff(offsets, prepend=-1) <= 0
        wrong[0] |= offsets[0] != 0
        wrong[-1] |= offsets[-1] != total
        if wrong.any():
            place = int(wrong.argmax())
            return (
                f"the offset of {kind} {place:,} is {int(offsets[place]):,}; "
                f"they must rise from 0 to {total:,}"
            )
    largest = int(data[at.ids :].view(f"<u{width}").max())
    if largest >= vocab:
        return f"holds the token id {largest:,}, but the vocabulary has {vocab:,} tokens"
    return None
