"""Write shards of a dataset: whole documents in blocks, each at a multiple of blocks.ALIGNMENT."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fastbert.data.blocks import ALIGNMENT, BLOCK, BLOCK_BYTES, encode
from fastbert.data.encode import Documents


class BlockWriter:
    """Writes one shard, with a block or two in memory.

    Args:
        path: the file; it must not exist.
        split: index in dataset.SPLITS.
        shard: number of the file within the split.
        dtype: of the token ids on disk.
    """

    def __init__(self, path: Path, split: int, shard: int, dtype: np.dtype):
        self._file = open(path, "xb")
        self._split, self._shard, self._dtype = split, shard, dtype
        self._waiting: list[Documents] = []
        self._bytes = 0  # of the token ids that wait
        self._entries: list[np.ndarray] = []

    @property
    def size(self) -> int:
        """Bytes of token ids and offsets that were written."""
        return self._file.tell()

    def add(self, documents: Documents) -> None:
        """Append documents; a block is closed at the first end of a document after BLOCK_BYTES."""
        self._waiting.append(documents)
        self._bytes += len(documents.tokens) * self._dtype.itemsize
        if self._bytes < BLOCK_BYTES:
            return
        whole = Documents.join(self._waiting)
        while self._bytes >= BLOCK_BYTES:
            last = np.searchsorted(whole.ends * self._dtype.itemsize, BLOCK_BYTES)
            first = np.arange(len(whole.documents)) <= last
            self._write(whole.chosen(first))
            whole = whole.chosen(~first)
            self._bytes = len(whole.tokens) * self._dtype.itemsize
        self._waiting = [whole] if len(whole.documents) else []

    def close(self) -> np.ndarray:
        """Finish the file; return the table of its blocks, BLOCK [blocks]."""
        if self._bytes:
            self._write(Documents.join(self._waiting))
        self._file.close()
        return np.array(self._entries, self._entries[0].dtype if self._entries else BLOCK)

    def _write(self, part: Documents) -> None:
        data, entry = encode(
            part.tokens, part.sentences, part.documents, part.begins_word, self._dtype
        )
        self._file.write(b"\0" * (-self._file.tell() % ALIGNMENT))
        entry["split"], entry["shard"] = self._split, self._shard
        entry["offset"] = self._file.tell()
        self._file.write(data.data)
        self._entries.append(entry)
