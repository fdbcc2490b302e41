"""Blocks of a dataset in a bucket, fetched when their window is opened, once on each machine.

The copy of the dataset has every shard as a file of the right size, which takes no space where
nothing was fetched. The file `fetched` beside them has a byte for each block: 1 where the block is
there. The process that fetches a block holds a lock on its byte, so the ranks of a machine share
the work.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import time
from dataclasses import dataclass
from pathlib import Path

from fastbert import storage
from fastbert.errors import InputError
from fastbert.storage import Url

FETCHED = "fetched"
# Windows behind the current one that stay, for ranks of the machine that are some steps behind.
BEHIND = 2
WAIT_S = 0.2  # between two looks at a block that another process fetches
_PUNCH_HOLE = 0x01 | 0x02  # FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE
_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long)


@dataclass(frozen=True)
class Piece:
    """A block as bytes of a shard."""

    name: str  # of the shard within the dataset
    offset: int
    size: int


class RemoteBlocks:
    """The blocks of one dataset.

    Args:
        url: of the dataset.
        folder: the copy on this machine.
        pieces: all blocks to train on, in the order of the tables.
        keep: whether blocks stay when they have been used.
    """

    def __init__(self, url: Url, folder: Path, pieces: list[Piece], keep: bool):
        self.url, self.keep, self._folder = url, keep, folder
        self._numbers = {piece: number for number, piece in enumerate(pieces)}
        self._file = os.open(folder / FETCHED, os.O_RDWR | os.O_CLOEXEC)

    def fetch(self, pieces: list[Piece]) -> None:
        """Return when all these blocks are on this machine; they are not verified.

        Raises:
            InputError: the store does not answer, or the disk cannot be written.
        """
        try:
            waiting = pieces
            while waiting := [piece for piece in waiting if not self._fetched(piece)]:
                with storage.waiting_for(self.url / waiting[0].name):
                    time.sleep(WAIT_S)
        except OSError as error:
            where = error.filename or self.url
            raise InputError(f"{where}: {error.strerror or error}") from None

    def drop(self, pieces: list[Piece], again: bool = False) -> None:
        """Free the space of these blocks, unless all are kept.

        Args:
            pieces: the blocks; no process reads them any more.
            again: also where all are kept, since these are to be fetched again.
        """
        if self.keep and not again:
            return
        for piece in pieces:
            os.pwrite(self._file, b"\0", self._numbers[piece])
            file = os.open(self._folder / piece.name, os.O_RDWR | os.O_CLOEXEC)
            try:
                # A disk that cannot free a part of a file keeps it.
                _LIBC.fallocate(file, _PUNCH_HOLE, piece.offset, piece.size)
            finally:
                os.close(file)

    def _fetched(self, piece: Piece) -> bool:
        """Fetch a block unless it is there; False where another process does so just now."""
        number = self._numbers[piece]
        if os.pread(self._file, 1, number) == b"\1":
            return True
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number)
        except BlockingIOError:
            return False
        try:
            if os.pread(self._file, 1, number) == b"\1":
                return True
            end = piece.offset + piece.size
            data = storage.fetch_range(self.url / piece.name, piece.offset, end)
            file = os.open(self._folder / piece.name, os.O_RDWR | os.O_CLOEXEC)
            try:
                os.pwrite(file, data, piece.offset)
            finally:
                os.close(file)
            os.pwrite(self._file, b"\1", number)
            return True
        finally:
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, number)


def make_empty(folder: Path, shards: dict[str, int], blocks: int) -> None:
    """Make the files of a copy that has no block yet.

    Args:
        folder: of the copy.
        shards: bytes of each shard, by name within the dataset.
        blocks: how many there are to train on.
    """
    for name, size in shards.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with open(folder / name, "xb") as file:
            file.truncate(size)
    (folder / FETCHED).write_bytes(bytes(blocks))
