"""The state of torchrun's rendezvous, signed: torch unpickles it, so whoever may write it may run code on every node.

The state lists who takes part, and all agents read and write it under one key of the endpoint's store, each write only where nobody else has
written meanwhile. Here each is signed for that key, which contains the run id, together with

- the start: a number that the agent with the store draws. A state of an earlier run with the same id and key is none of this one;
- a count of the writes: an agent refuses a state that is older than one that it has seen.

What does not pass is never unpickled. An agent that has seen a sound state puts it back, also where the key was deleted, and the run goes
on. One that has just come waits a little for the others to do so, then it takes the difference for what it mostly is, that of two keys; it
writes nothing, so a node with the wrong key does not disturb those that train.
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

PATIENCE_S = 10.0  # for the agents that are there already to put a sound state back
BEGIN_S = 2.0  # for the agent that holds the store to begin; only in a store that no agent holds does another one
LOOK_S = 0.2  # between two looks
START = 16  # bytes
COUNT = 8  # bytes


class _Signed(NamedTuple):
    """A state as it stands in the store, and what is in it; `state` is empty where nobody has come yet."""

    raw: bytes
    start: bytes
    count: int
    state: bytes


class SignedState(RendezvousBackend):
    """What torch's handler asks for the state.

    Args:
        name: of the backend.
        ask: makes a call to the store, and returns its answer or raises RendezvousConnectionError.
        run_id: of the rendezvous.
        key: of the run.
        begins: this agent has just made the store, so no state can be in it.
        where: the endpoint, for messages.

    Attributes:
        start: what tells this rendezvous from earlier ones with the same id, as text.

    Raises:
        InputError: there is a state, and it stays one that is not signed with this key.
    """

    def __init__(
        self,
        name: str,
        ask: Callable[[Callable[[Any], Any]], Any],
        run_id: str,
        key: Key,
        begins: bool,
        where: str,
    ):
        self._backend_name, self._ask, self._key, self._where = name, ask, key, where
        self._place = f"torch.rendezvous.{run_id}"  # torch's own name
        self._reported = False
        self._known = self._find(begins)
        self.start = self._known.start.hex()

    @property
    def name(self) -> str:  # torchrun compares it with the one that was asked for
        return self._backend_name

    def get_state(self) -> tuple[bytes, Token] | None:
        """The state and its token, or None where nobody has come yet."""
        self._take(self._look())
        return self._answer()

    def set_state(
        self, state: bytes, token: Token | None = None
    ) -> tuple[bytes, Token, bool] | None:
        """Write a state in place of the one that had this token; returns the one that is there now, and whether it is this one."""
        newest = token == self._known.raw if token is not None else not self._known.state
        new = self._sign(self._known.start, self._known.count + 1, state)
        if newest:
            expected = self._known.raw
            there = self._swap(expected, new.raw)
            self._take(
                None if there == expected else there
            )  # what the store answers, too, where the key is no more
        else:  # somebody has written since
            self._take(self._look())
        answer = self._answer()
        return None if answer is None else (*answer, self._known.raw == new.raw)

    def _answer(self) -> tuple[bytes, Token] | None:
        return (self._known.state, self._known.raw) if self._known.state else None

    def _take(self, there: bytes | None) -> None:
        """Learn what stands in the store; put the newest that is known back where it is something else."""
        found = self._open(there)
        if found is None or found.start != self._known.start or found.count < self._known.count:
            self._report()
            found = self._open(self._swap(there or b"", self._known.raw))
            if found is None or found.start != self._known.start or found.count < self._known.count:
                return  # a stranger was quicker; the next look is soon
        self._known = found

    def _find(self, begins: bool) -> _Signed:
        """The state that is there, or the one with which a rendezvous begins."""
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
                f"fastbert: --rdzv-endpoint {self._where}: somebody without the key of this run has written over the state of the rendezvous; "
                "it was refused and put back, and the run goes on (said once)",
                file=sys.stderr,
                flush=True,
            )

    def _look(self) -> bytes | None:
        return self._ask(lambda store: look(store, self._place))

    def _swap(self, expected: bytes, new: bytes) -> bytes:
        """Write where `expected` stands, nothing being empty; returns what stands there now, or `expected` where nothing does."""
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
