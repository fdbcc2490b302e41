"""A run folder has one writer: the process that started last.

A rank 0 that was taken for dead, because its node was cut off or the process was suspended, may
come back while another process continues its run. So each start writes a fencing token into the
folder. A process that finds another token there has lost the run, and ends before it writes. A
file lock would need a file system with locks across machines.

The token is the first thing that a run writes. So a folder with a token is a run of ours, however
early its process died.
"""

from __future__ import annotations

import os
import re
import secrets
import socket
from pathlib import Path

from fastbert.durable import replacing, sync
from fastbert.presence import is_file, unreadable
from fastbert.regular_file import read_bytes, read_text

FILE = ".owner"
CLAIM = f"{FILE}-"  # prefix of the temporary name under which the token is written
_CONTENT = re.compile(rb"[0-9a-f]{16} \S* \d+\n")  # token, machine, process


class LostOwnership(Exception):
    """Another process has taken over this run, or its folder is gone."""


class RunLock:
    """The ownership of a run folder by one start of the run.

    Args:
        run: the run folder.
        token: of this start, letters and digits.
    """

    def __init__(self, run: Path, token: str):
        self.run, self.token = run, token

    @classmethod
    def claim(cls, run: Path) -> RunLock:
        """Take over the folder: write a new token into it.

        Raises:
            OSError: the token cannot be written.
        """
        token = secrets.token_hex(8)
        with replacing(run / FILE, run / f"{CLAIM}{token}") as new:
            new.write_text(f"{token} {socket.gethostname()} {os.getpid()}\n", encoding="utf-8")
            sync(new)
        return cls(run, token)

    @staticmethod
    def was_claimed(run: Path) -> bool:
        """Whether the folder is a run, that is, some start has written its token there.

        Raises:
            InputError: the file cannot be read.
        """
        if not is_file(run / FILE):
            return False
        try:
            return _CONTENT.fullmatch(read_bytes(run / FILE)) is not None
        except OSError as error:
            raise unreadable(run / FILE, error) from None

    def holds(self) -> bool:
        """Whether no other start has taken over this run. It reads one small file."""
        return self._newest()[:1] == [self.token]

    def check(self) -> None:
        """Check that this start still owns the run.

        Raises:
            LostOwnership: it does not; the message has the other's machine and process.
        """
        if not self.holds():
            newest = self._newest()
            if not newest:
                raise LostOwnership(
                    f"{self.run / FILE} is gone: the folder was deleted or moved, or its disk is "
                    "not mounted any more"
                )
            where = f"on {newest[1]}, process {newest[2]}" if len(newest) == 3 else "elsewhere"
            raise LostOwnership(f"another start of this run ({where}) has taken {self.run} over")

    def _newest(self) -> list[str]:
        try:
            return read_text(self.run / FILE).split()
        except FileNotFoundError:
            return []
