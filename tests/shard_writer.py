"""Write a split of format 2, shard by shard, as `prepare` no longer does; see format_2.py."""

from __future__ import annotations

import hashlib
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from fastbert.data.manifest import Counts
from fastbert.data.shard_split import shard_name

# A new shard begins at the first chunk of text after this many tokens: 512 MiB of uint16.
SHARD_TOKENS = 1 << 28


class ShardWriter:
    """Writes one split, shard by shard, in one pass with constant memory.

    Args:
        folder: created here; it must not exist.
        dtype: of the token ids on disk.
        shard_tokens: a shard that has reached this many tokens is closed.
    """

    def __init__(self, folder: Path, dtype: np.dtype, shard_tokens: int = SHARD_TOKENS):
        folder.mkdir()
        self.folder, self.dtype, self.shard_tokens = folder, dtype, shard_tokens
        self.shards: list[Counts] = []
        self.files: dict[str, dict[str, Any]] = {}  # name within the dataset: {"size", "sha256"}
        self._open: dict[str, _HashedFile] = {}

    def add(
        self,
        tokens: np.ndarray,
        sentences: np.ndarray,
        documents: np.ndarray,
        begins_word: np.ndarray | None = None,
    ) -> None:
        """Append whole documents.

        Args:
            tokens: [T], ids of all documents, one after another.
            sentences: int [S], tokens of each sentence; all at least 1, sum T.
            documents: int [N], sentences of each document; all at least 1, sum S.
            begins_word: bool [T]; None, for every call, where the split does not hold it.
        """
        if len(documents) == 0:
            return
        assert (
            sentences.min() > 0
            and sentences.sum() == len(tokens)
            and documents.min() > 0
            and documents.sum() == len(sentences)
        )
        if not self._open:
            name = str(self.folder / shard_name(len(self.shards)))
            kinds = ("tokens", "sentences", "documents", *(["words"] * (begins_word is not None)))
            self._open = {kind: _HashedFile(f"{name}.{kind}") for kind in kinds}
            self._bits = np.zeros(0, bool)  # of begins_word, those that do not fill a byte yet
            self._open["sentences"].write(np.zeros(1, "<i8"))
            self._open["documents"].write(np.zeros(1, "<i8"))
            self._counts = Counts(0, 0, 0)
        done = self._counts
        self._open["tokens"].write(tokens.astype(self.dtype, copy=False))
        self._open["sentences"].write(
            (np.cumsum(sentences, dtype=np.int64) + done.tokens).astype("<i8", copy=False)
        )
        self._open["documents"].write(
            (np.cumsum(documents, dtype=np.int64) + done.sentences).astype("<i8", copy=False)
        )
        if begins_word is not None:
            bits = np.concatenate([self._bits, begins_word])
            whole = len(bits) // 8 * 8
            self._open["words"].write(np.packbits(bits[:whole]))
            self._bits = bits[whole:]
        self._counts = Counts(
            done.documents + len(documents),
            done.sentences + len(sentences),
            done.tokens + len(tokens),
        )
        if self._counts.tokens >= self.shard_tokens:
            self.close()

    def close(self) -> None:
        """Finish the open shard; its files are on the disk when this returns."""
        if self._open:
            if "words" in self._open:
                self._open["words"].write(np.packbits(self._bits))
            for file in self._open.values():
                self.files[f"{self.folder.name}/{file.path.name}"] = file.close()
            self.shards.append(self._counts)
            self._open = {}

    def summary(self) -> dict[str, Any]:
        """Return the split's entry in the manifest."""
        shards = [asdict(shard) for shard in self.shards]
        return {
            kind: sum(shard[kind] for shard in shards)
            for kind in ("documents", "sentences", "tokens")
        } | {"shards": shards}


class _HashedFile:
    """A file that is being written, with the SHA-256 of the bytes written so far."""

    def __init__(self, path: str):
        self.path = Path(path)
        self.file = open(path, "xb")
        self.digest = hashlib.sha256()

    def write(self, array: np.ndarray) -> None:
        data = np.ascontiguousarray(array).data.cast("B")
        self.digest.update(data)
        self.file.write(data)

    def close(self) -> dict[str, Any]:
        size = self.file.tell()
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        return {"size": size, "sha256": self.digest.hexdigest()}
