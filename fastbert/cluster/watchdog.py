"""Finds a rank that has stopped making progress, and ends the others with its name.

A rank that is suspended, cut off or stuck leaves the others inside a collective that never returns.
There is no exception and nothing in any log, and the machines are idle. So one thread of every rank
writes a heartbeat to the group's store, and a second one checks that the main thread makes
progress. When it has made none for too long, the heartbeats show which rank is to blame. The first
rank to find out publishes this failure in the store, where the others read it. Then the thread ends
the process, since nothing can interrupt the main thread.

Where a collective fails at once, because a peer has died, the heartbeats answer the same question.
The peer that has closed the connection may itself only have failed because of a third one. So an
exception that leaves the context is raised as RankLost where another rank caused it.

Heartbeats and failures are signed. A forged failure is deleted, and no process ends because of it.
A forged heartbeat carries no information: its rank counts as neither alive nor missing. So nothing
that a stranger writes makes a rank be blamed or ends a run. A rank that then waits in vain is ended
by the time-out of the collective, MARGIN_S later.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

import torch.distributed as dist

from fastbert.cluster.group import Group, Unconnected
from fastbert.cluster.rendezvous import Deadline, Interrupted, RankLost, describe, listed
from fastbert.cluster.signed_store import No, SignedStore, printable
from fastbert.errors import InputError

T = TypeVar("T")

HEARTBEAT_S = 1.0  # between two heartbeats; less where the time-out is short
# A heartbeat must have stopped for this long to count, since on a busy machine some come late.
LOOK_S = 3.0
# How long the main thread may take to exit once the failure is known.
GRACE_S = 5.0
# How long the process that holds the store stays, so that the others can read a failure.
READERS_S = 3.0

PACKAGE, RENDEZVOUS = Path(__file__).parents[1], Path(__file__).with_name("rendezvous.py")


class Heartbeat(NamedTuple):
    """What a rank reports about itself.

    Attributes:
        count: heartbeats so far; it stops when the process does.
        ticks: calls of `Watchdog.tick` so far.
        what: the argument of the last call, and what the process waits for besides.
        waiting: the main thread waits for other ranks, as far as its stack shows.
        where: the innermost line of fastbert on that stack.
        left: the rank has finished, and sends no more heartbeats.
    """

    count: int
    ticks: int
    what: str
    waiting: bool
    where: str
    left: bool = False


class Watchdog:
    """Supervises the ranks of a group while this context is entered; with one rank it does nothing.

    Args:
        group: its ranks call `tick` at the same places.
        timeout_s: how long a rank may take from one tick to the next, in seconds.
        waits: returns what the other threads of this process wait for, for messages, or "".

    Raises:
        RankLost: at the end of the context, in place of an exception that another rank's end has
            caused; the message names that rank.
    """

    def __init__(self, group: Group, timeout_s: float, waits: Callable[[], str] = lambda: ""):
        self._group, self._timeout_s, self._waits = group, timeout_s, waits
        self._every_s, self._look_s = min(HEARTBEAT_S, timeout_s / 10), min(LOOK_S, timeout_s / 2)
        self._tick = (0, "the start", time.monotonic())  # ticks, what, when
        self._main = threading.get_ident()
        self._failure: str | None = None  # why all ranks end
        # How many ranks will never read the failure; None until it is known to be in the store.
        self._unaware: int | None = None
        self._receiving = threading.Lock()
        # For how many seconds this process was suspended, and the tick that was then the last.
        self._suspended: tuple[float, Any] = (0.0, None)
        # Set when the main thread no longer waits for other ranks and will exit.
        self._out = threading.Event()
        self._over = threading.Event()
        self._asking = threading.Lock()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Watchdog:
        self._group.tick = self.tick
        if self._group.world > 1:
            store = self._group.prefix.part("watch")
            # Separate connections, since a call that blocks on one blocks all others on it.
            self._heartbeat_store, self._query_store = Deadline(self._timeout_s).run(
                lambda: (store.clone(), store.clone()), self._group.store_name
            )
            self._tick = (0, "the start", time.monotonic())
            self._threads = [
                threading.Thread(target=work, daemon=True, name="fastbert-watch")
                for work in (self._send_heartbeats, self._guard)
            ]
            for thread in self._threads:
                thread.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        lost = None
        if (
            error is not None
            and not isinstance(error, InputError | Interrupted)
            and not self._out.is_set()
        ):
            lost = self._blame(error)
            if lost is None:
                self.report_exit(describe(error))
        self._out.set()
        self._over.set()
        for thread in self._threads:
            thread.join(2 * self._every_s)  # with a limit, since the store may not answer
        if self._threads and error is None:
            last = Heartbeat(-1, self._tick[0], self._tick[1], waiting=True, where="", left=True)
            with suppress(RankLost):
                self._ask(lambda store: store.write(str(self._group.rank), last))
        if lost is not None:
            raise RankLost(lost) from error

    def tick(self, what: str) -> None:
        """Record that the main thread makes progress, now at `what`, such as "step 17".

        It costs nothing.
        """
        self._tick = (self._tick[0] + 1, what, time.monotonic())

    def report_exit(self, reason: str) -> None:
        """Tell the other ranks why this one exits, so that they end at once and quote the reason.

        Call it before any exit that the other ranks do not share.
        """
        if self._group.world > 1:
            self._out.set()
            if self._failure is None:
                self._publish(
                    f"{self._group.name(self._group.rank)} has ended: {reason}", unaware=0
                )
            self._wait_for_readers()

    def _blame(self, error: BaseException) -> str | None:
        """Find the rank that caused `error`.

        It takes a few seconds, within which the other ranks send heartbeats or do not.

        Returns:
            A line that names the missing rank; None where all ranks are there, so that the fault is
            this rank's own.
        """
        if self._group.world == 1 or not isinstance(error, Exception):
            return None
        self._out.set()
        if isinstance(error, RankLost) and not isinstance(error, Unconnected):
            self._publish(str(error), unaware=1)
        elif self._failure is None:
            self._investigate(self._missing, "disappeared", LOOK_S)
        if isinstance(error, Unconnected) and self._failure is None:
            self._publish(str(error), unaware=0)
        self._wait_for_readers()
        return self._reason

    def _send_heartbeats(self) -> None:
        """Thread: report that this process is alive, and check for a failure."""
        count, rank = 0, str(self._group.rank)
        try:
            while not self._over.is_set():
                ticks, what, _ = self._tick
                if found := self._waits():
                    what = f"{what}, waiting for {found}"
                self._heartbeat_store.write(
                    rank, Heartbeat(count, ticks, what, *_position(self._main))
                )
                count += 1
                if self._failure is None:
                    self._check_for_failure()
                self._over.wait(self._every_s)
        except dist.DistError:
            self._failure = self._failure or f"{self._group.store_name} has disappeared"

    def _check_for_failure(self) -> None:
        """Read the failure, if there is one."""
        found = self._heartbeat_store.read("failure")
        if found is No.FORGED:
            # Otherwise all ranks would read it again every second, however large it is.
            self._heartbeat_store.sweep("failure")
        elif found is not No.ABSENT:
            self._receive(self._heartbeat_store, *found)

    def _guard(self) -> None:
        """Thread: end this process when its main thread makes no progress."""
        what = f"not answered for {self._timeout_s:g} s (runtime.timeout_s)"
        while not self._wait_out(self._every_s / 2):
            tick = self._tick
            if self._failure is not None:
                if not self._out.wait(GRACE_S):
                    self._end()
            elif time.monotonic() > tick[2] + self._timeout_s - self._look_s:
                self._investigate(
                    lambda *heartbeats, tick=tick: (
                        self._at_fault(*heartbeats) if self._tick is tick else None
                    ),
                    what,
                    self._look_s,
                )
                if self._failure is not None and self._tick is tick and not self._out.is_set():
                    self._end()

    def _wait_out(self, seconds: float) -> bool:
        """Wait for the main thread to end its work; return whether it has.

        Such a wait takes long only when the process was suspended meanwhile.
        """
        before = time.monotonic()
        out = self._out.wait(seconds)
        if (suspended_s := time.monotonic() - before) > self._timeout_s:
            self._suspended = suspended_s, self._tick
        return out

    @property
    def _reason(self) -> str | None:
        """The failure as this rank reports it.

        A rank that was suspended itself reports that, and not where the others are.
        """
        suspended_s, tick = self._suspended
        if self._failure is not None and tick is self._tick:
            own = self._group.name(self._group.rank)
            return f"{own} was suspended for {suspended_s:.0f} s; the other ranks timed out"
        return self._failure

    def _investigate(
        self, judge: Callable[..., tuple[str, int] | None], what: str, look_s: float
    ) -> None:
        """Read all heartbeats twice, `look_s` apart, and publish the failure that `judge` finds."""
        try:
            before = self._ask(self._look)
            end = time.monotonic() + look_s
            while self._failure is None and time.monotonic() < end:
                time.sleep(self._every_s / 2)
            if (
                self._failure is None
                and (found := judge(before, self._ask(self._look), what)) is not None
            ):
                self._publish(*found)
        except RankLost:
            self._failure = (
                self._failure
                or f"{self._group.store_name} has {what}; this rank is at {self._tick[1]}"
            )

    def _look(self, store: SignedStore) -> list[Heartbeat | No]:
        """Read the last heartbeat of every rank."""
        found = [store.read(str(rank)) for rank in range(self._group.world)]
        return [
            heartbeat if isinstance(heartbeat, No) else Heartbeat(*heartbeat) for heartbeat in found
        ]

    def _missing(
        self, before: Sequence[Heartbeat | No], now: Sequence[Heartbeat | No], what: str
    ) -> tuple[str, int] | None:
        """Ranks whose heartbeat has stopped or never came: a message, and how many they are."""
        stopped = [
            rank
            for rank, heartbeat in enumerate(now)
            if heartbeat == before[rank]
            and heartbeat is not No.FORGED
            and not getattr(heartbeat, "left", False)
        ]
        if not stopped:
            return None
        last = now[stopped[0]]
        has = "has" if len(stopped) == 1 else "have"
        seen = "the start" if isinstance(last, No) else last.what
        return f"{self._names(stopped)} {has} {what}, last seen at {seen}", len(stopped)

    def _at_fault(
        self, before: Sequence[Heartbeat | No], now: Sequence[Heartbeat | No], what: str
    ) -> tuple[str, int] | None:
        """The reason why this rank makes no progress, and how many ranks are missing.

        None where another rank makes progress, so that this rank's turn will come. None also where
        a heartbeat cannot be read, since its rank may make progress.
        """
        if (found := self._missing(before, now, what)) is not None:
            return found
        earlier = [heartbeat for heartbeat in before if not isinstance(heartbeat, No)]
        heartbeats = {
            rank: heartbeat for rank, heartbeat in enumerate(now) if not isinstance(heartbeat, No)
        }
        if len(earlier) < len(before) or len(heartbeats) < len(now):
            return None
        heartbeats = {
            rank: heartbeat for rank, heartbeat in heartbeats.items() if not heartbeat.left
        }
        if any(earlier[rank].ticks != heartbeat.ticks for rank, heartbeat in heartbeats.items()):
            return None
        since = f"for {self._timeout_s:g} s (runtime.timeout_s)"
        # Ranks with fewer ticks hold up the others. Where all have the same number of ticks, the
        # ranks that do not wait for others hold them up.
        ahead = max(heartbeat.ticks for heartbeat in heartbeats.values())
        slow = [rank for rank, heartbeat in heartbeats.items() if heartbeat.ticks < ahead] or [
            rank for rank, heartbeat in heartbeats.items() if not heartbeat.waiting
        ]
        if not slow:
            return (
                f"no rank has made progress {since}: all wait for each other at {self._tick[1]}; "
                "look at the network between them",
                0,
            )
        has, first = "has" if len(slow) == 1 else "have", heartbeats[slow[0]]
        return (
            f"{self._names(slow)} {has} kept the others waiting {since}: "
            f"at {first.what}, in {first.where}",
            0,
        )

    def _names(self, ranks: Sequence[int]) -> str:
        return listed([self._group.name(rank) for rank in ranks])

    def _publish(self, failure: str, unaware: int) -> None:
        """Publish the failure, unless one is there already; then take over that one.

        Args:
            failure: one line.
            unaware: how many ranks will never read it.
        """

        def leave(store: SignedStore) -> None:
            self._receive(store, *store.settle("failure", [failure, unaware]))

        try:
            self._ask(leave)
        except RankLost:
            self._failure = self._failure or failure

    def _receive(self, store: SignedStore, failure: str, unaware: int) -> None:
        """Take over the failure in the store, and record there that this rank has read it."""
        with self._receiving:
            if self._unaware is None:
                store.write(f"heard/{self._group.rank}", None)
            self._failure, self._unaware = failure, unaware

    def _wait_for_readers(self) -> None:
        """In the process that holds the store: give the others time to read the failure."""
        end, not_yet = time.monotonic() + READERS_S, list(range(self._group.world))
        with suppress(RankLost):
            while self._group.holds_store and self._unaware is not None and time.monotonic() < end:
                not_yet = self._ask(
                    lambda store, ranks=not_yet: [
                        rank for rank in ranks if isinstance(store.read(f"heard/{rank}"), No)
                    ]
                )
                if len(not_yet) <= self._unaware:
                    break
                time.sleep(self._every_s / 10)

    def _ask(self, question: Callable[[SignedStore], T]) -> T:
        """Return the store's answer to `question`.

        Raises:
            RankLost: no answer has come within a few seconds.
        """
        with self._asking:
            return Deadline(0.0).run(lambda: question(self._query_store), self._group.store_name)

    def _end(self) -> NoReturn:
        """End the process from a thread, whatever its main thread waits for."""
        self._wait_for_readers()
        os.write(2, f"fastbert: {printable(self._reason or '')}; resume with --resume\n".encode())
        os._exit(1)


def _position(thread: int) -> tuple[bool, str]:
    """Whether a thread waits for other ranks, and the line of fastbert at which it is."""
    innermost = frame = sys._current_frames()[thread]
    files = []
    while frame is not None:
        files.append(Path(frame.f_code.co_filename))
        if files[-1].is_relative_to(PACKAGE):
            break
        frame = frame.f_back
    waiting = files[-1] == RENDEZVOUS or any(
        "distributed" in file.parts or "deepspeed" in file.parts for file in files
    )
    # Outside fastbert altogether, this is the line of the user's own script.
    place = frame or innermost
    return waiting, f"{place.f_code.co_filename}, line {place.f_lineno}"
