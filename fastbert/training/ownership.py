"""One writer for a run folder: the process that started last.

A rank 0 that was taken for dead (its node cut off, or the process stopped) may come back while another goes on with its run. Each start leaves
a token in the folder; who finds another's there has lost the run, and ends before it writes. A lock would need a file system that has
locks across machines.
"""

from __future__ import annotations

import os
import secrets
import socket
from pathlib import Path

from fastbert.durable import sync

FILE = ".owner"


class TakenOver(Exception):
    """Another process has gone on with this run."""


class Ownership:
    """Of a run folder, by a start whose `token` (letters and digits) lies in it."""

    def __init__(self, run: Path, token: str):
        self.run, self.token = run, token

    @classmethod
    def claim(cls, run: Path) -> Ownership:
        """Take the folder over."""
        token = secrets.token_hex(8)
        new = run / f"{FILE}-{token}"
        new.write_text(f"{token} {socket.gethostname()} {os.getpid()}\n", encoding="utf-8")
        sync(new)
        new.replace(run / FILE)
        return cls(run, token)

    def holds(self) -> bool:
        """Whether nobody has started this run since. A small read, no lock."""
        return self._newest()[:1] == [self.token]

    def check(self) -> None:
        """Raises TakenOver, with the other's machine and process, where somebody has."""
        if not self.holds():
            newest = self._newest()
            where = f"on {newest[1]}, process {newest[2]}" if len(newest) == 3 else "elsewhere"
            raise TakenOver(f"another start of this run ({where}) has taken {self.run} over")

    def _newest(self) -> list[str]:
        try:
            return (self.run / FILE).read_text(encoding="utf-8").split()
        except FileNotFoundError:
            return []
