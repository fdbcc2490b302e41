"""One writer for a run folder: the process that started last.

A rank 0 that was taken for dead (its node cut off, or the process stopped) may come back while another goes on with its run. Each start leaves
a token in the folder; who finds another's there has lost the run, and ends before it writes. A lock would need a file system that has
locks across machines.

The token is the first thing that a run writes, so a folder that has one is a run of ours, however early its process died.
"""

from __future__ import annotations

import os
import re
import secrets
import socket
from pathlib import Path

from fastbert.durable import replacing, sync
from fastbert.presence import is_file, unreadable

FILE = ".owner"
CLAIM = f"{FILE}-"  # begins the name that the token is written under
_CONTENT = re.compile(rb"[0-9a-f]{16} \S* \d+\n")  # token, machine, process


class LostOwnership(Exception):
    """Another process has gone on with this run."""


class RunLock:
    """Of a run folder, by a start whose `token` (letters and digits) lies in it."""

    def __init__(self, run: Path, token: str):
        self.run, self.token = run, token

    @classmethod
    def claim(cls, run: Path) -> RunLock:
        """Take the folder over."""
        token = secrets.token_hex(8)
        with replacing(run / FILE, run / f"{CLAIM}{token}") as new:
            new.write_text(f"{token} {socket.gethostname()} {os.getpid()}\n", encoding="utf-8")
            sync(new)
        return cls(run, token)

    @staticmethod
    def was_claimed(run: Path) -> bool:
        """Whether the folder is a run: some start has left its token there.

        Raises:
            InputError: the file cannot be read.
        """
        if not is_file(run / FILE):
            return False
        try:
            return _CONTENT.fullmatch((run / FILE).read_bytes()) is not None
        except OSError as error:
            raise unreadable(run / FILE, error) from None

    def holds(self) -> bool:
        """Whether nobody has started this run since. A small read, no lock."""
        return self._newest()[:1] == [self.token]

    def check(self) -> None:
        """Raises LostOwnership, with the other's machine and process, where somebody has."""
        if not self.holds():
            newest = self._newest()
            where = f"on {newest[1]}, process {newest[2]}" if len(newest) == 3 else "elsewhere"
            raise LostOwnership(f"another start of this run ({where}) has taken {self.run} over")

    def _newest(self) -> list[str]:
        try:
            return (self.run / FILE).read_text(encoding="utf-8").split()
        except FileNotFoundError:
            return []
