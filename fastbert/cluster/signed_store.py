"""A part of a store in which every value is signed: what the processes of a run say to each other, apart from what strangers write there.

Whoever reaches a store may read, write and delete in it. A value that was not signed with the run's key for the very place where it stands
is never parsed: it is FORGED, which callers take for a value that is not there, or that tells them nothing. Values are JSON; text in them is
given back with its control characters escaped, since most of it ends on a terminal.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from enum import Enum
from typing import Any

import torch.distributed as dist

from fastbert.cluster.signature import Key

_NOTHING = secrets.token_hex(
    16
)  # what the store answers where there is no value; drawn, so that nobody can write it


class No(Enum):
    """Why there is no value."""

    ABSENT = "nobody has written one"
    FORGED = "it was written by somebody without the run's key, or for another place"


class SignedStore:
    """JSON values under keys, each signed for its key and the place of the part.

    Args:
        store: the part itself.
        key: of the run.
        place: of the part, for signatures: from the top, so that no two parts have the same one.

    Attributes:
        raw: the part without signatures, as torch needs it.
    """

    def __init__(self, store: dist.Store, key: Key, place: str):
        self.raw: Any = store  # torch's type hints know neither of bytes as values nor of `clone`
        self._key, self._place = key, place

    def part(self, name: str) -> SignedStore:
        """What is under `name/`."""
        return SignedStore(dist.PrefixStore(name, self.raw), self._key, f"{self._place}/{name}")

    def clone(self) -> SignedStore:
        """The same part over a connection of its own."""
        return SignedStore(self.raw.clone(), self._key, self._place)

    def write(self, key: str, value: Any) -> None:
        self.raw.set(key, self._sign(key, value))

    def read(self, key: str) -> Any:
        """The value, or a `No`. Never waits, as a store's own `get` does for a key that was just deleted, and takes one question."""
        return self._open(key, look(self.raw, key))

    def read_all(self, keys: Sequence[str]) -> list[Any] | None:
        """All the values, or None where one of them is missing."""
        if not self.raw.check(list(keys)):  # one question; most looks end here
            return None
        found = [self.read(key) for key in keys]
        return None if any(isinstance(value, No) for value in found) else found

    def settle(self, key: str, value: Any) -> Any:
        """Write unless there is a value already; returns the one that is there now. What is forged counts for nothing, and is replaced."""
        mine = self._sign(key, value)
        there = self.raw.compare_set(key, "", mine)
        while (found := self._open(key, there)) is No.FORGED:
            there = self.raw.compare_set(key, there, mine)
        return found

    def sweep(self, key: str) -> None:
        """Empty a place where something forged stands; a value that was written meanwhile stays."""
        there = look(self.raw, key)
        if self._open(key, there) is No.FORGED:
            self.raw.compare_set(key, there, "")

    def _sign(self, key: str, value: Any) -> bytes:
        return self._key.sign(f"{self._place}/{key}", json.dumps(value).encode())

    def _open(self, key: str, there: bytes | None) -> Any:
        if not there:
            return No.ABSENT
        text = self._key.verify(f"{self._place}/{key}", there)
        return No.FORGED if text is None else _printable(json.loads(text))


def look(store: Any, key: str) -> bytes | None:
    """What stands under a key, or None. One question, where `check` and `get` are two and `get` may wait."""
    there = store.compare_set(key, _NOTHING, _NOTHING)
    return None if there == _NOTHING.encode() else there


def printable(text: str) -> str:
    """The text with its control characters escaped, so that it takes one line and no terminal obeys it."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _printable(value: Any) -> Any:
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, list):
        return [_printable(item) for item in value]
    return (
        {_printable(key): _printable(item) for key, item in value.items()}
        if isinstance(value, dict)
        else value
    )
