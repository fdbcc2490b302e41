"""A part of a store in which every value is signed.

The processes of a run exchange values there. Any process that reaches a store may read, write and
delete in it. A value that was not signed with the run's key for its own place is never parsed. It
is FORGED, and callers treat it as absent or as uninformative. Values are JSON. Control characters
in text are escaped when it is read, since most of it ends up on a terminal.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from enum import Enum
from typing import Any

import torch.distributed as dist

from fastbert.cluster.signature import Key

# What the store answers where there is no value. It is random, so that nobody can write it.
_NOTHING = secrets.token_hex(16)


class No(Enum):
    """Why there is no value."""

    ABSENT = "nobody has written one"
    FORGED = "it was written by somebody without the run's key, or for another place"


class SignedStore:
    """JSON values under keys, each signed for its key and for the place of this part.

    Args:
        store: the part itself.
        key: the run's key.
        place: the full path of the part, which goes into signatures; no two parts share one.

    Attributes:
        raw: the part without signatures, as torch needs it.
    """

    def __init__(self, store: dist.Store, key: Key, place: str):
        # Any, since torch's type hints know neither bytes as values nor `clone`.
        self.raw: Any = store
        self._key, self._place = key, place

    def part(self, name: str) -> SignedStore:
        """Return the part under `name/`."""
        return SignedStore(dist.PrefixStore(name, self.raw), self._key, f"{self._place}/{name}")

    def clone(self) -> SignedStore:
        """Return the same part over a separate connection."""
        return SignedStore(self.raw.clone(), self._key, self._place)

    def write(self, key: str, value: Any) -> None:
        self.raw.set(key, self._sign(key, value))

    def read(self, key: str) -> Any:
        """Return the value, or a `No`.

        It takes one request and never blocks. A store's own `get` blocks on a key that was just
        deleted.
        """
        return self._open(key, look(self.raw, key))

    def read_all(self, keys: Sequence[str]) -> list[Any] | None:
        """Return all the values, or None where one of them is missing."""
        # One request; most reads end here.
        if not self.raw.check(list(keys)):
            return None
        found = [self.read(key) for key in keys]
        return None if any(isinstance(value, No) for value in found) else found

    def settle(self, key: str, value: Any) -> Any:
        """Write `value` unless there is a valid value already; return the one that is there now.

        A forged value is replaced.
        """
        mine = self._sign(key, value)
        there = self.raw.compare_set(key, "", mine)
        while (found := self._open(key, there)) is No.FORGED:
            there = self.raw.compare_set(key, there, mine)
        return found

    def sweep(self, key: str) -> None:
        """Delete a forged value; a value written since then stays."""
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
    """Return the bytes under a key, or None.

    It takes one request. `check` and `get` would take two, and `get` may block.
    """
    there = store.compare_set(key, _NOTHING, _NOTHING)
    return None if there == _NOTHING.encode() else there


def printable(text: str) -> str:
    """Escape the text's control characters, so that it takes one line and is safe on a terminal."""
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
