"""Notices a rank that stops answering, and ends this one with its name.

A rank that is stopped, cut off or stuck leaves the others inside a collective that never returns: no exception, nothing in any log, idle
machines. So a thread of every rank writes a beat to the group's store, and another one looks whether the main thread still goes on. When
it has not for too long, the beats show who is missing. The first rank to find out leaves its failure in the store, where the others read it,
and the process is ended from the thread, since nothing wakes the main one.

Where a collective fails at once, because a peer has died, the beats answer the same question: the peer that has closed the connection may
only be another one that failed, next in a row. So an exception that leaves the context comes out as RankLost where another rank is its cause.

Heartbeats and failures are signed. A failure that is not is swept away, and nobody ends because of it. A forged beat tells nothing: its rank is
neither alive nor missing, so that no rank is blamed, and no run ended, by what a stranger writes; who really waits in vain then ends by the
time-out of the collective, MARGIN_S later.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, NoReturn, TypeVar

import torch.distributed as dist

from fastbert.cluster.group import Group, Unconnected
from fastbert.cluster.rendezvous import Deadline, Interrupted, RankLost, describe, listed
from fastbert.cluster.signed_store import No, SignedStore, printable
from fastbert.errors import InputError

T = TypeVar("T")

BEAT_S = 1.0  # between two beats; less where the time-out is short
LOOK_S = 3.0  # for how long a beat must stand still to count: on a busy machine a few come late
GRACE_S = 5.0  # for the main thread to come out by itself, once it is known why all end
HEARD_S = (
    3.0  # for the others to read a failure, before the store ends with the process that holds it
)

PACKAGE, RENDEZVOUS = Path(__file__).parents[1], Path(__file__).with_name("rendezvous.py")


class Heartbeat(NamedTuple):
    """What a rank says of itself; `count` stands still when its process does."""

    count: int
    ticks: int
    what: str  # where it was when it ticked last
    waiting: bool  # for other ranks, as far as the stack of its main thread shows
    where: str  # that stack's innermost line of fastbert
    left: bool = False  # it is through, and beats no more


class Watchdog:
    """Watches over the ranks of a group while this context is entered; with one rank it does nothing.

    Args:
        group: its ranks call `tick` at the same places.
        timeout_s: how long a rank may take from one tick to the next, in seconds.

    Raises:
        RankLost: at the end of the context, in place of an exception inside it that came of another rank's end; it names that rank.
    """

    def __init__(self, group: Group, timeout_s: float):
        self._group, self._timeout_s = group, timeout_s
        self._every_s, self._look_s = min(BEAT_S, timeout_s / 10), min(LOOK_S, timeout_s / 2)
        self._tick = (0, "the start", time.monotonic())  # ticks, what, when
        self._main = threading.get_ident()
        self._failure: str | None = None  # why all ranks end
        self._unaware: int | None = (
            None  # how many will never hear it; None until it is known to be in the store
        )
        self._hearing = threading.Lock()
        self._stopped: tuple[float, Any] = (
            0.0,
            None,
        )  # for how long this process did not run, and the tick that was the last one then
        self._out = (
            threading.Event()
        )  # the main thread is out of what it was waiting for, and ends by itself
        self._over = threading.Event()
        self._asking = threading.Lock()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Watchdog:
        self._group.tick = self.tick
        if self._group.world > 1:
            store = self._group.prefix.part("watch")
            # Connections of their own: a call that waits on one keeps all others on it waiting.
            self._beats, self._questions = Deadline(self._timeout_s).run(
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

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
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
            thread.join(2 * self._every_s)  # not for ever: the store may not answer it
        if self._threads and error is None:
            last = Heartbeat(-1, self._tick[0], self._tick[1], waiting=True, where="", left=True)
            with suppress(RankLost):
                self._ask(lambda store: store.write(str(self._group.rank), last))
        if lost is not None:
            raise RankLost(lost) from error

    def tick(self, what: str) -> None:
        """The main thread goes on, now at `what`, such as "step 17". Costs nothing."""
        self._tick = (self._tick[0] + 1, what, time.monotonic())

    def report_exit(self, reason: str) -> None:
        """Before any exit that the other ranks do not share: tell them why, so that they end at once and quote it."""
        if self._group.world > 1:
            self._out.set()
            if self._failure is None:
                self._publish(
                    f"{self._group.name(self._group.rank)} has ended: {reason}", unaware=0
                )
            self._wait_for_readers()

    def _blame(self, error: BaseException) -> str | None:
        """A line that names the rank which is gone; None where all are there, so that the fault is this rank's own.

        Takes a few seconds, within which the other ranks stand still or beat.
        """
        if self._group.world == 1 or not isinstance(error, Exception):
            return None
        self._out.set()
        if isinstance(error, RankLost) and not isinstance(error, Unconnected):
            self._publish(str(error), unaware=1)
        elif self._failure is None:
            self._find_out(self._missing, "disappeared", LOOK_S)
        if isinstance(error, Unconnected) and self._failure is None:
            self._publish(str(error), unaware=0)
        self._wait_for_readers()
        return self._reason

    def _send_heartbeats(self) -> None:
        """Thread: say that this process is alive, and listen for a failure."""
        count, rank = 0, str(self._group.rank)
        try:
            while not self._over.is_set():
                ticks, what, _ = self._tick
                self._beats.write(rank, Heartbeat(count, ticks, what, *_position(self._main)))
                count += 1
                if self._failure is None:
                    self._listen()
                self._over.wait(self._every_s)
        except dist.DistError:
            self._failure = self._failure or f"{self._group.store_name} has disappeared"

    def _listen(self) -> None:
        """Hear the failure, if there is one."""
        found = self._beats.read("failure")
        if found is No.FORGED:
            self._beats.sweep(
                "failure"
            )  # or all ranks would read it again every second, however large it is
        elif found is not No.ABSENT:
            self._receive(self._beats, *found)

    def _guard(self) -> None:
        """Thread: end this process when its main thread does not go on."""
        what = f"not answered for {self._timeout_s:g} s (runtime.timeout_s)"
        while not self._rest(self._every_s / 2):
            tick = self._tick
            if self._failure is not None:
                if not self._out.wait(GRACE_S):
                    self._end()
            elif time.monotonic() > tick[2] + self._timeout_s - self._look_s:
                self._find_out(
                    lambda *beats, tick=tick: self._blamed(*beats) if self._tick is tick else None,
                    what,
                    self._look_s,
                )
                if self._failure is not None and self._tick is tick and not self._out.is_set():
                    self._end()

    def _rest(self, seconds: float) -> bool:
        """Wait for the main thread to be out; is it? Such a wait is long only when the process was stopped meanwhile."""
        before = time.monotonic()
        out = self._out.wait(seconds)
        if (stopped_s := time.monotonic() - before) > self._timeout_s:
            self._stopped = stopped_s, self._tick
        return out

    @property
    def _reason(self) -> str | None:
        """The failure in this rank's eyes: who was stopped himself need not wonder where the others are."""
        stopped_s, tick = self._stopped
        if self._failure is not None and tick is self._tick:
            return f"{self._group.name(self._group.rank)} was stopped for {stopped_s:.0f} s, and the others have not waited"
        return self._failure

    def _find_out(
        self, judge: Callable[..., tuple[str, int] | None], what: str, look_s: float
    ) -> None:
        """Look at all beats, and again after `look_s`; pronounce what `judge` makes of them, if anything."""
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
        found = [store.read(str(rank)) for rank in range(self._group.world)]
        return [beat if isinstance(beat, No) else Heartbeat(*beat) for beat in found]

    def _missing(
        self, before: Sequence[Heartbeat | No], now: Sequence[Heartbeat | No], what: str
    ) -> tuple[str, int] | None:
        """Ranks whose beat stands still, or was never there: what is to be said of them, and how many they are."""
        still = [
            rank
            for rank, beat in enumerate(now)
            if beat == before[rank] and beat is not No.FORGED and not getattr(beat, "left", False)
        ]
        if not still:
            return None
        last = now[still[0]]
        has = "has" if len(still) == 1 else "have"
        return (
            f"{self._names(still)} {has} {what}, last seen at {'the start' if isinstance(last, No) else last.what}",
            len(still),
        )

    def _blamed(
        self, before: Sequence[Heartbeat | No], now: Sequence[Heartbeat | No], what: str
    ) -> tuple[str, int] | None:
        """What keeps this rank from going on; None where another one goes on, since then its turn will come, or may do so unseen."""
        if (found := self._missing(before, now, what)) is not None:
            return found
        earlier = [beat for beat in before if not isinstance(beat, No)]
        beats = {rank: beat for rank, beat in enumerate(now) if not isinstance(beat, No)}
        if len(earlier) < len(before) or len(beats) < len(now):
            return None
        beats = {rank: beat for rank, beat in beats.items() if not beat.left}
        if any(earlier[rank].ticks != beat.ticks for rank, beat in beats.items()):
            return None
        since = f"for {self._timeout_s:g} s (runtime.timeout_s)"
        ahead = max(beat.ticks for beat in beats.values())
        slow = [rank for rank, beat in beats.items() if beat.ticks < ahead] or [
            rank for rank, beat in beats.items() if not beat.waiting
        ]
        if not slow:
            return (
                f"no rank has gone on {since}: all wait for each other at {self._tick[1]}; look at the network between them",
                0,
            )
        has, first = "has" if len(slow) == 1 else "have", beats[slow[0]]
        return (
            f"{self._names(slow)} {has} kept the others waiting {since}: at {first.what}, in {first.where}",
            0,
        )

    def _names(self, ranks: Sequence[int]) -> str:
        return listed([self._group.name(rank) for rank in ranks])

    def _publish(self, failure: str, unaware: int) -> None:
        """Leave the failure for the others, all but `unaware` of them; or take over the one that is there."""

        def leave(store: SignedStore) -> None:
            self._receive(store, *store.settle("failure", [failure, unaware]))

        try:
            self._ask(leave)
        except RankLost:
            self._failure = self._failure or failure

    def _receive(self, store: SignedStore, failure: str, unaware: int) -> None:
        """Take over the failure that is in the store, and note there that this rank knows it."""
        with self._hearing:
            if self._unaware is None:
                store.write(f"heard/{self._group.rank}", None)
            self._failure, self._unaware = failure, unaware

    def _wait_for_readers(self) -> None:
        """The process that holds the store gives the others time to hear the failure."""
        end, not_yet = time.monotonic() + HEARD_S, list(range(self._group.world))
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
        """The store's answer; RankLost where none comes within a few seconds."""
        with self._asking:
            return Deadline(0.0).run(lambda: question(self._questions), self._group.store_name)

    def _end(self) -> NoReturn:
        """End the process from a thread, whatever its main thread waits for."""
        self._wait_for_readers()
        os.write(2, f"fastbert: {printable(self._reason or '')}; resume with --resume\n".encode())
        os._exit(1)


def _position(thread: int) -> tuple[bool, str]:
    """Does a thread wait for other ranks, and at which line of fastbert is it?"""
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
    place = frame or innermost  # outside fastbert altogether: what a user's own script does
    return waiting, f"{place.f_code.co_filename}, line {place.f_lineno}"
