"""The table of the blocks of a split: where each is, how much it holds, and its SHA-256.

It is all that is read of a dataset of format 3 before its text is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from fastbert.data.blocks import ALIGNMENT, BLOCK, BLOCK_BYTES, Layout, layout, problem
from fastbert.data.manifest import SPLITS
from fastbert.data.remote_blocks import Piece, RemoteBlocks
from fastbert.data.verify import Claim


@dataclass(frozen=True)
class Blocks:
    """Blocks in an order."""

    folder: Path  # of the dataset
    entries: np.ndarray  # `blocks.BLOCK` [N], N at least 1
    parts: np.ndarray  # int64 [N], the part of the dataset that each block is in
    width: int  # bytes of a token id
    words: bool  # whether blocks say where words begin
    vocab: int  # the size of the vocabulary
    remote: RemoteBlocks | None = None  # fetches blocks that may not be on this machine yet

    def __len__(self) -> int:
        return len(self.entries)

    def take(self, order: np.ndarray) -> Blocks:
        """Return the blocks at these positions, in that order."""
        return replace(self, entries=self.entries[order], parts=self.parts[order])

    @cached_property
    def layout(self) -> Layout:
        """Where the sections of each block begin in it, int64 [N] each."""
        documents, sentences, tokens = (self.entries[name].astype(np.int64) for name in COUNTS)
        return layout(documents, sentences, tokens, self.width, self.words)

    def total(self, name: str) -> int:
        """Return the sum of a column of the table."""
        return int(self.entries[name].sum(dtype=np.int64))

    def windows(self, size: int) -> int:
        """Return how many windows of `size` bytes an epoch has; the last takes the remainder."""
        return windows_of(len(self), size)

    def name(self, block: int) -> str:
        """Return the name of the shard of a block within the dataset."""
        entry = self.entries[block]
        return shard_name(int(self.parts[block]), int(entry["split"]), int(entry["shard"]))

    def ranges(self) -> list[tuple[Path, int, int]]:
        """Return the file, first byte and number of bytes of each block."""
        offsets = self.entries["offset"].tolist()
        sizes = self.layout.size.tolist()
        return [
            (self.folder / self.name(i), offset, size)
            for i, (offset, size) in enumerate(zip(offsets, sizes, strict=True))
        ]

    def fetch(self) -> None:
        """Return when the blocks are on this machine; raises InputError."""
        if self.remote is not None:
            self.remote.fetch(self.pieces())

    def drop(self, again: bool = False) -> None:
        """Free the space of blocks that were fetched; see `RemoteBlocks.drop`."""
        if self.remote is not None:
            self.remote.drop(self.pieces(), again)

    def pieces(self) -> list[Piece]:
        """Return the blocks as bytes of shards."""
        offsets, sizes = self.entries["offset"].tolist(), self.layout.size.tolist()
        return [Piece(self.name(i), offsets[i], sizes[i]) for i in range(len(self))]

    def claims(self) -> list[Claim]:
        """Return what the table claims about the blocks, for verify.py."""
        return [self.claim(i) for i in range(len(self))]

    def claim(self, block: int) -> Claim:
        entry = self.entries[block]
        offset, size = int(entry["offset"]), int(self.layout.size[block])
        return Claim(
            self.name(block),
            size,
            entry["sha256"].tobytes().hex(),
            np.dtype("u1"),
            lambda data: problem(data, entry, self.width, self.words, self.vocab),
            offset=offset,
            piece=size,
            label=f"the block at byte {offset:,}",
        )


def per_window(size: int) -> int:
    """Return the blocks in a window of `size` bytes of ids."""
    return max(1, size // BLOCK_BYTES)


def windows_of(blocks: int, size: int) -> int:
    """Return how many windows of `size` bytes a number of blocks has."""
    return max(1, blocks // per_window(size))


COUNTS = ("documents", "sentences", "tokens")


def shard_name(part: int, split: int, shard: int) -> str:
    """Return the name of a file within a dataset; `split` is an index in SPLITS."""
    return f"part-{part:05d}/{SPLITS[split]}-{shard:05d}"


def table_problem(table: np.ndarray, shards: Sequence[np.ndarray], width: int, words: bool) -> str:
    """Return what is wrong with the table of a part, or "".

    Args:
        table: `blocks.BLOCK` [N].
        shards: for each of SPLITS, int64, the bytes of its files.
        width, words: as in Blocks.
    """
    if (table["split"] >= len(SPLITS)).any() or (np.diff(table["split"].astype(int)) < 0).any():
        return "its blocks are not in the order of splits"
    documents, sentences, tokens = (table[name].astype(np.int64) for name in COUNTS)
    if not ((documents > 0) & (sentences >= documents) & (tokens >= sentences)).all():
        return "a block without documents, or with fewer tokens than sentences"
    sizes = layout(documents, sentences, tokens, width, words).size
    for split, files in enumerate(shards):
        chosen = table["split"] == split
        rows = table[chosen]
        shard, begin = rows["shard"].astype(np.int64), rows["offset"].astype(np.int64)
        end = begin + sizes[chosen]
        first = np.diff(shard, prepend=-1) != 0
        if not np.array_equal(shard[first], np.arange(len(files))):
            return f"the blocks of the split '{SPLITS[split]}' are not in the order of its shards"
        last = np.append(first[1:], True) if len(rows) else first
        after = np.where(first, 0, np.append(0, end[:-1])) if len(rows) else begin
        if (begin % ALIGNMENT != 0).any() or (begin < after).any():
            return f"blocks of the split '{SPLITS[split]}' overlap or are not aligned"
        # Zeros may follow the last block.
        if (files < end[last]).any() or (files >= end[last] + ALIGNMENT).any():
            return f"the shards of the split '{SPLITS[split]}' have other sizes"
    return ""


def read_table(data: bytes) -> np.ndarray:
    """Return the entries of a table; ValueError where its size is not that of whole entries."""
    return np.frombuffer(data, BLOCK)
