"""Prepare batches ahead of time in a background thread."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from itertools import count

from fastbert.data.batches import Batches
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
        self._thread = threading.Thread(
            target=self._run,
            args=(batches, step, rank, world, at_once),
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

    def close(self) -> None:
        """Stop the thread and wait until it has ended."""
        self._stop.set()
        self._thread.join()

    def __enter__(self) -> Prefetch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, batches: Batches, first: int, rank: int, world: int, at_once: int) -> None:
        for step in count(first):
            try:
                packs: list[PackedBatch] | BaseException = batches.step(step, rank, world, at_once)
            except BaseException as error:
                packs = error
            while not self._stop.is_set():
                try:
                    self._ready.put((step, packs), timeout=POLL_S)
                    break
                except queue.Full:
                    pass
            if self._stop.is_set() or isinstance(packs, BaseException):
                return
