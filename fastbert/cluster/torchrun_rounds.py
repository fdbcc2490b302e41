"""The values that torchrun's agents exchange in a round of the rendezvous, signed.

A round begins when the nodes have met, and ends when one is lost or a new one comes. During it,
agents publish where the workers' store will be (MASTER_ADDR, MASTER_PORT), how many workers each
has (torchelastic/role_info/N, JSON) and which ranks these get (torchelastic/assigned_ranks/N,
JSON). A barrier counts the agents whose workers have finished. torch unpickles none of this. But
the names are predictable: a stranger who could write there now would send the workers of a later
round to a store of his own.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from fastbert.cluster.signature import Key
from fastbert.cluster.signed_store import look

LOOK_S = 0.05  # between two looks


class SignedRounds(dist.Store):
    """The part of a store's interface that torch's agent uses; unsigned values count as absent.

    Args:
        store: the endpoint's store.
        key: the run's key.
        start: identifies this rendezvous, so that values signed in an earlier one do not count.
    """

    timeout: Any  # torch's property, which its type hints leave out

    def __init__(self, store: Any, key: Key, start: str):
        super().__init__()
        self._store, self._key, self._start = store, key, start
        self.set_timeout(store.timeout)

    def set(self, key: str, value: bytes | str) -> None:
        self._store.set(key, self._sign(key, value))

    def get(self, key: str) -> bytes:
        return self.multi_get([key])[0]

    def multi_set(self, keys: Sequence[str], values: Sequence[bytes | str]) -> None:
        for key, value in zip(keys, values, strict=True):
            self.set(key, value)

    def multi_get(self, keys: Sequence[str]) -> list[bytes]:
        return self._come(keys, self.timeout)

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        self._come(keys, timeout or self.timeout)

    def check(self, keys: Sequence[str]) -> bool:
        return None not in [self._open(key, look(self._store, key)) for key in keys]

    def add(self, key: str, amount: int) -> int:
        """Add to a counter atomically, as a store's own `add`, which cannot sign."""
        while True:
            there = look(self._store, key)
            total = int((self._open(key, there) or b"0").split()[0]) + amount
            # Random, so that no two agents write the same value.
            new = self._sign(key, f"{total} {secrets.token_hex(8)}")
            if self._store.compare_set(key, there or b"", new) == new:
                return total

    def has_extended_api(self) -> bool:
        return True  # that is, multi_get and multi_set

    def _come(self, keys: Sequence[str], timeout: timedelta) -> list[bytes]:
        """Return the values, as soon as all of them are there."""
        end = time.monotonic() + timeout.total_seconds()
        while True:
            found = [self._open(key, look(self._store, key)) for key in keys]
            there = [value for value in found if value is not None]
            if len(there) == len(keys):
                return there
            if time.monotonic() > end:
                missing = [key for key, value in zip(keys, found, strict=True) if value is None]
                raise dist.DistStoreError(
                    f"after {timeout.total_seconds():g} s no node with the run's key has written "
                    f"{', '.join(missing)}"
                )
            time.sleep(LOOK_S)

    def _open(self, key: str, there: bytes | None) -> bytes | None:
        return self._key.verify(f"{self._start}/{key}", there) if there else None

    def _sign(self, key: str, value: bytes | str) -> bytes:
        return self._key.sign(
            f"{self._start}/{key}", value if isinstance(value, bytes) else value.encode()
        )
