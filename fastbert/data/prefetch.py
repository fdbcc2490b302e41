"""Prepare batches ahead of time in a background thread.

With several lanes (lanes.py) a step is drawn first, and packed when all lanes have said what they
have drawn.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import count

from fastbert.data.batches import Batches
from fastbert.data.examples import Spans
from fastbert.data.lanes import Facts, from_sum, lanes_for, to_sum
from fastbert.data.packing import PackedBatch

STEPS_AHEAD = 3
POLL_S = 0.1  # how often the thread checks for `close` while the queue is full


class Prefetch:
    """Yields (step, this rank's packs, seconds waited for them) without end.

    Close it, or use it in a `with`. There is no state to save: it can start at any step. An
    exception in the thread is raised at the step that it belongs to.

    Args:
        batches: of the run.
        step: the first step.
        rank, world, at_once: as in `Batches.step`.
    """

    def __init__(
        self, batches: Batches, step: int, rank: int = 0, world: int = 1, at_once: int = 1
    ):
        self._ready: queue.Queue[tuple[int, list[PackedBatch] | BaseException]] = queue.Queue(
            STEPS_AHEAD
        )
        self._stop = threading.Event()
        self.lanes = lanes_for(world, batches.config.batch.sequences)
        self._batches, self._rank, self._world, self._at_once = batches, rank, world, at_once
        # Of later steps: what this rank adds to the sum, or why it cannot; and what came of it.
        self._facts: dict[int, list[float] | BaseException] = {}
        self._settled: dict[int, Facts] = {}
        self._news = threading.Condition()
        self._thread = threading.Thread(
            target=self._run if self.lanes == 1 else self._run_lanes,
            args=(step,),
            name="prefetch",
            daemon=True,
        )
        self._thread.start()

    def __iter__(self) -> Iterator[tuple[int, list[PackedBatch], float]]:
        return self

    def __next__(self) -> tuple[int, list[PackedBatch], float]:
        if self._stop.is_set():
            raise StopIteration
        began = time.perf_counter()
        step, packs = self._ready.get()
        if isinstance(packs, BaseException):
            self.close()
            raise packs
        return step, packs, time.perf_counter() - began

    def facts(self, step: int) -> list[float]:
        """Return what this rank adds to the sum over all ranks for a later step.

        It waits until the step is drawn. Without lanes it is nothing.

        Raises:
            InputError: the text of the step is damaged.
        """
        if self.lanes == 1:
            return []
        with self._news:
            self._news.wait_for(lambda: step in self._facts)
            found = self._facts.pop(step)
        if isinstance(found, BaseException):
            raise found
        return found

    def settle(self, step: int, total: Sequence[float]) -> None:
        """Take the sum of the facts of all ranks, after which the step can be packed."""
        if self.lanes > 1:
            with self._news:
                self._settled[step] = from_sum(total)
                self._news.notify_all()

    def close(self) -> None:
        """Stop the thread and wait until it has ended."""
        self._stop.set()
        self._thread.join()

    def __enter__(self) -> Prefetch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, first: int) -> None:
        for step in count(first):
            try:
                packs: list[PackedBatch] | BaseException = self._batches.step(
                    step, self._rank, self._world, self._at_once
                )
            except BaseException as error:
                packs = error
            if not self._put(step, packs):
                return

    def _run_lanes(self, first: int) -> None:
        ranks = self._world // self.lanes
        lane, place = divmod(self._rank, ranks)
        drawn: deque[tuple[int, Spans]] = deque()
        for step in count(first):
            try:
                spans = self._batches.draw(step, lane, self.lanes)
                facts = self._batches.facts(spans, ranks, self._at_once)
                own: list[float] | BaseException = to_sum(
                    facts, self._rank, self._world, self.lanes
                )
                drawn.append((step, spans))
            except BaseException as error:
                own = error
            with self._news:
                self._facts[step] = own
                self._news.notify_all()
            if isinstance(own, BaseException):
                return
            if len(drawn) < STEPS_AHEAD:
                continue
            oldest, spans = drawn.popleft()
            if (total := self._wait(oldest)) is None:
                return
            try:
                packs: list[PackedBatch] | BaseException = self._batches.pack(
                    spans, total, place, ranks, self._at_once
                )
            except BaseException as error:
                packs = error
            if not self._put(oldest, packs):
                return

    def _wait(self, step: int) -> Facts | None:
        """Wait for the facts of a step; None where the run has ended."""
        with self._news:
            while not self._stop.is_set():
                if self._news.wait_for(lambda: step in self._settled, POLL_S):
                    return self._settled.pop(step)
        return None

    def _put(self, step: int, packs: list[PackedBatch] | BaseException) -> bool:
        """Hand over a step; return whether to go on."""
        while not self._stop.is_set():
            try:
                self._ready.put((step, packs), timeout=POLL_S)
                break
            except queue.Full:
                pass
        return not self._stop.is_set() and not isinstance(packs, BaseException)
