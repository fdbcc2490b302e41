"""Time forward and backward passes in turns, on a GPU or a CPU."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

WARM_UP = 2  # uncounted passes, for compilation and the allocator's first blocks
ROUNDS = (5, 100)  # minimum and maximum
FLUSH_BYTES = 256 * 1024**2  # several times the L2 cache of any GPU so far
# About two milliseconds, in which the processor queues the work that is timed.
SLEEP_CYCLES = 4_000_000


class Contender(NamedTuple):
    """One way to compute a result and, from that result, its gradients."""

    forward: Callable[[], Tensor]
    backward: Callable[[Tensor], object]


def differentiated(
    forward: Callable[[], Tensor], leaves: Sequence[Tensor], upstream: Tensor
) -> Contender:
    """Backward by autograd: from `upstream`, which has the shape of the result, to `leaves`."""
    return Contender(forward, lambda result: torch.autograd.grad(result, leaves, upstream))


class Spread(NamedTuple):
    """Median and quartiles, milliseconds."""

    median: float
    low: float
    high: float


class Times(NamedTuple):
    """Milliseconds of each round."""

    forward: list[float]
    backward: list[float]

    def spread(self, which: str) -> Spread:
        """The spread of "forward", "backward" or "both"."""
        low, median, high = statistics.quantiles(self.rounds(which), n=4, method="inclusive")
        return Spread(median, low, high)

    def rounds(self, which: str) -> list[float]:
        """Milliseconds of each round, of "forward", "backward" or "both"."""
        return (
            [f + b for f, b in zip(*self, strict=True)] if which == "both" else getattr(self, which)
        )


def in_turns(
    contenders: dict[str, Contender], device: torch.device, seconds: float
) -> dict[str, Times]:
    """Time all contenders, one after the other in every round.

    This takes about `seconds`, with at least five rounds. On a GPU it is the device time between
    two events, while the processor is ahead, after a write of 256 MB that empties the L2 cache. On
    a CPU it is the wall clock, with caches as the previous contender left them.
    """
    stopwatch = _gpu_stopwatch(device) if device.type == "cuda" else _wall_clock
    for contender in contenders.values():
        for _ in range(WARM_UP):
            contender.backward(contender.forward())
    times = {name: Times([], []) for name in contenders}
    end = time.perf_counter() + seconds
    for count in range(ROUNDS[1]):
        if count >= ROUNDS[0] and time.perf_counter() > end:
            break
        for name, contender in contenders.items():
            result, forward_ms = stopwatch(contender.forward)
            _, backward_ms = stopwatch(functools.partial(contender.backward, result))
            times[name].forward.append(forward_ms())
            times[name].backward.append(backward_ms())
    return times


def extra_memory(contender: Contender, device: torch.device) -> int | None:
    """Peak bytes of a forward and backward pass beyond the inputs, gradients included.

    None on a CPU.
    """
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    contender.backward(contender.forward())
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _wall_clock(run: Callable):
    start = time.perf_counter()
    result = run()
    elapsed = 1e3 * (time.perf_counter() - start)
    return result, lambda: elapsed


def _gpu_stopwatch(device: torch.device):
    flushed = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)

    def stopwatch(run: Callable):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        flushed.zero_()
        torch.cuda._sleep(SLEEP_CYCLES)
        start.record()
        result = run()
        end.record()

        def elapsed() -> float:
            end.synchronize()
            return start.elapsed_time(end)

        return result, elapsed

    return stopwatch
