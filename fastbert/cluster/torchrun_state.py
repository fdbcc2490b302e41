"""The state of torchrun's rendezvous, signed.

torch unpickles the state, so a process that may write it may run code on every node.

The state lists the participants. All agents read and write it under one key of the endpoint's
store, and a write succeeds only where nobody else has written meanwhile. Here each state is signed
for that key, which contains the run id, together with

- the start, a random number drawn by the agent that holds the store. It makes the states of an
  earlier run with the same id and key invalid;
- a count of the writes. An agent refuses a state that is older than one it has seen.

An invalid state is never unpickled. An agent that has seen a valid state puts it back, also where
the key was deleted, and the run continues. An agent that has just come waits a little for the
others to do so. Then it reports the most likely cause, which is that the keys differ. It writes
nothing, so a node with the wrong key does not disturb those that train.
"""

from __future__ import annotations

import secrets
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from torch.distributed.elastic.rendezvous.dynamic_rendezvous import RendezvousBackend, Token

from fastbert.cluster.signature import Key
from fastbert.cluster.signed_store import look
from fastbert.errors import InputError

# How long the agents that are already there may take to put a valid state back.
PATIENCE_S = 10.0
# How long the agent that holds the store may take to write the first state. Another agent writes
# it only in a store that no agent holds.
BEGIN_S = 2.0
LOOK_S = 0.2  # between two reads
START = 16  # bytes of the start
COUNT = 8  # bytes of the count


class _Signed(NamedTuple):
    """A state in the store and its content; `state` is empty before the first node comes."""

    raw: bytes
    start: bytes
    count: int
    state: bytes


class SignedState(RendezvousBackend):
    """The backend through which torch's handler reads and writes the state.

    Args:
        ask: calls the store, and returns its answer or raises RendezvousConnectionError.
        run_id: the id of the rendezvous.
        key: the run's key.
        begins: this agent has just made the store, so no state can be in it.
        where: the endpoint, for messages.

    Attributes:
        start: distinguishes this rendezvous from earlier ones with the same id; hexadecimal.

    Raises:
        InputError: there is a state that is not signed with this key, and nobody replaces it.
    """

    def __init__(
        self,
        ask: Callable[[Callable[[Any], Any]], Any],
        run_id: str,
        key: Key,
        begins: bool,
        where: str,
    ):
        self._ask, self._key, self._where = ask, key, where
        self._place = f"torch.rendezvous.{run_id}"  # torch's own name
        self._reported = False
        self._known = self._find(begins)
        self.start = self._known.start.hex()

    @property
    def name(self) -> str:
        """The backend's name, which torchrun compares with the one that was asked for."""
        return "fastbert"

    def get_state(self) -> tuple[bytes, Token] | None:
        """Return the state and its token, or None where no node has come yet."""
        self._take(self._look())
        return self._answer()

    def set_state(
        self, state: bytes, token: Token | None = None
    ) -> tuple[bytes, Token, bool] | None:
        """Write a state in place of the one that had this token.

        Returns:
            The state that is there now, its token, and whether it is the new one.
        """
        newest = token == self._known.raw if token is not None else not self._known.state
        new = self._sign(self._known.start, self._known.count + 1, state)
        if newest:
            expected = self._known.raw
            there = self._swap(expected, new.raw)
            # Where the key has been deleted, the store answers with `expected` as well.
            self._take(None if there == expected else there)
        else:  # another agent has written since
            self._take(self._look())
        answer = self._answer()
        return None if answer is None else (*answer, self._known.raw == new.raw)

    def _answer(self) -> tuple[bytes, Token] | None:
        return (self._known.state, self._known.raw) if self._known.state else None

    def _take(self, there: bytes | None) -> None:
        """Learn what is in the store; where it is invalid, put the newest known state back."""
        found = self._open(there)
        if found is None or found.start != self._known.start or found.count < self._known.count:
            self._report()
            found = self._open(self._swap(there or b"", self._known.raw))
            if found is None or found.start != self._known.start or found.count < self._known.count:
                return  # a stranger was quicker; the next read comes soon
        self._known = found

    def _find(self, begins: bool) -> _Signed:
        """Return the state that is there, or write the one with which a rendezvous begins."""
        empty = self._sign(secrets.token_bytes(START), 0, b"")
        came = time.monotonic()
        while True:
            there, waited_s = self._look(), time.monotonic() - came
            found = self._open(there)
            if found is None and (begins or (there is None and waited_s > BEGIN_S)):
                found = self._open(self._swap(there or b"", empty.raw))
            if found is not None:
                return found
            if there is not None and waited_s > PATIENCE_S:
                raise InputError(
                    self._key.mismatch(f"--rdzv-endpoint {self._where}: the nodes that are there")
                )
            time.sleep(LOOK_S)

    def _report(self) -> None:
        if not self._reported:
            self._reported = True
            print(
                f"fastbert: --rdzv-endpoint {self._where}: somebody without the key of this run "
                "has written over the state of the rendezvous; "
                "it was refused and put back, and the run continues (reported once)",
                file=sys.stderr,
                flush=True,
            )

    def _look(self) -> bytes | None:
        return self._ask(lambda store: look(store, self._place))

    def _swap(self, expected: bytes, new: bytes) -> bytes:
        """Write `new` where `expected` is in the store; empty bytes mean that nothing is.

        Returns:
            What is there now, or `expected` where nothing is.
        """
        return self._ask(lambda store: store.compare_set(self._place, expected, new))

    def _sign(self, start: bytes, count: int, state: bytes) -> _Signed:
        return _Signed(
            self._key.sign(self._place, start + count.to_bytes(COUNT, "big") + state),
            start,
            count,
            state,
        )

    def _open(self, there: bytes | None) -> _Signed | None:
        content = self._key.verify(self._place, there) if there else None
        if there is None or content is None or len(content) < START + COUNT:
            return None
        return _Signed(
            there,
            content[:START],
            int.from_bytes(content[START : START + COUNT], "big"),
            content[START + COUNT :],
        )
