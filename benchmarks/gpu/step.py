"""A training step of BERT-base in bf16: wall, GPU and CPU time, and which of them limits it.

A step is forward, backward, clipping and AdamW. The times are:

    gpu       the GPU's own time: events around a step that was queued during a pause, so that the
              processor is always ahead
    submit    time to queue a step while the GPU is idle; cpu is its CPU time, over all threads
    wall      consecutive steps, each on a new batch from the processor's memory: pageable, or
              pinned and copied asynchronously

A step is bound by the processor if submit exceeds gpu. Then tokens per second are measured on
sequences of mixed lengths, in turns with the same model built of torch.nn on padded batches. Only
real tokens count, not padding.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu.items import Item, Part, program
from benchmarks.gpu.measure import DTYPE, name_of
from benchmarks.gpu.predicted import predicted_ms
from benchmarks.gpu.smoke import base
from benchmarks.step.made_up_training import Sizes, Trainer, made_up_batch, ours, padded
from benchmarks.step.padded_bert import pad
from fastbert.data.packing import PackedBatch
from fastbert.planning.flops import training_flops

TOKENS, DRY_TOKENS = (16384, 4096), (256,)
LENGTH = 128
MIXED = (128, 512)  # lengths of the longest sequence
PADDED = "torch.nn, padded, SDPA"
BATCHES = 4  # different batches, used in turn
WARM_UP = 3  # steps
STEPS, DRY_STEPS = 10, 1  # steps that are timed together
ROUNDS = (3, 30)  # minimum and maximum
# The highest clock of an H100, so that a pause is at least as long as requested.
CYCLES_PER_MS = 1_980_000


def items(part: Part) -> list[Item]:
    where = part.place
    trainer = functools.cache(
        lambda: ours(base(where.dry), where.vocabulary, "triton", where.device, DTYPE)
    )
    rival = functools.cache(lambda: padded(base(where.dry), where.vocabulary, where.device, DTYPE))
    sizes = DRY_TOKENS if where.dry else TOKENS
    return [
        *(
            Item(f"T={tokens} n={LENGTH}", functools.partial(take_apart, part, trainer, tokens))
            for tokens in sizes
        ),
        *(
            Item(
                f"T={sizes[0]} up to {n}",
                functools.partial(against, part, trainer, rival, sizes[0], n),
            )
            for n in MIXED
        ),
    ]


def take_apart(part: Part, trainer: Callable[[], Trainer], tokens: int, seconds: float) -> None:
    """Measure the times of a step on sequences of one length."""
    where, model = part.place, trainer()
    sizes, lengths = Sizes("base", where.vocabulary, tokens, LENGTH), [LENGTH] * (tokens // LENGTH)
    hosts = [made_up_batch(sizes, seed, torch.device("cpu"), lengths) for seed in range(BATCHES)]
    pinned = (
        [moved(batch, torch.Tensor.pin_memory) for batch in hosts]
        if where.device.type == "cuda"
        else hosts
    )
    resident = hosts[0].to(where.device)
    warm_up(part, model, resident)
    where.wait()
    share = seconds / 4
    submit, cpu = submission(part, lambda: model.step(resident), share)
    write = functools.partial(
        write_time, part, hosts[0], f"step T={tokens} n={LENGTH}", {"T": tokens, "longest": LENGTH}
    )
    write("submit", submit)
    write("cpu", cpu)
    gpu = device_times(part, lambda: model.step(resident), statistics.median(submit), share)
    write("gpu", gpu)
    for name, batches, wait in (("pageable", hosts, True), ("pinned", pinned, False)):
        write(f"wall, {name}", stretches(part, model, batches, wait, share))
    ratio = statistics.median(submit) / statistics.median(gpu)
    verdict = "dry" if where.dry else "bound by the processor" if ratio > 1 else "bound by the GPU"
    part.results.add(
        "bound", case=f"step T={tokens} n={LENGTH}", submit_over_gpu=ratio, verdict=verdict
    )


def warm_up(part: Part, model: Trainer, batch: Any) -> None:
    for _ in range(1 if part.place.dry else WARM_UP):
        model.step(batch)


def moved(batch: PackedBatch, move: Callable[[torch.Tensor], torch.Tensor]) -> PackedBatch:
    """The same batch with each of its tensors moved."""
    values = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    return dataclasses.replace(
        batch, **{name: move(value) for name, value in values.items() if torch.is_tensor(value)}
    )


def submission(
    part: Part, step: Callable[[], Any], seconds: float
) -> tuple[list[float], list[float]]:
    """Wall-clock milliseconds to queue a step on an idle device, and its CPU milliseconds.

    The CPU time is that of all threads.
    """
    walls, processes = [], []
    for _ in rounds(seconds):
        part.place.wait()
        wall, process = time.perf_counter(), time.process_time()
        step()
        walls.append(1e3 * (time.perf_counter() - wall))
        processes.append(1e3 * (time.process_time() - process))
    part.place.wait()
    return walls, processes


def device_times(
    part: Part, step: Callable[[], Any], pause_ms: float, seconds: float
) -> list[float]:
    """Milliseconds between two events around a step; on a CPU the wall clock.

    The whole step is queued before the device reaches the first event.
    """
    if part.place.device.type != "cuda":
        return submission(part, step, seconds)[0]
    found = []
    for _ in rounds(seconds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(int(1.5 * pause_ms * CYCLES_PER_MS))
        start.record()
        step()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end))
    return found


def stretches(
    part: Part, model: Trainer, batches: list[PackedBatch], wait: bool, seconds: float
) -> list[float]:
    """Milliseconds per step, over groups of several steps without a pause."""
    where, found = part.place, []
    steps = DRY_STEPS if where.dry else STEPS
    to_device = functools.partial(torch.Tensor.to, device=where.device, non_blocking=not wait)
    for _ in rounds(seconds):
        where.wait()
        start = time.perf_counter()
        for number in range(steps):
            model.step(moved(batches[number % len(batches)], to_device))
        where.wait()
        found.append(1e3 * (time.perf_counter() - start) / steps)
    return found


def rounds(seconds: float):
    """Iterate as often as fits into the seconds, within ROUNDS."""
    end = time.perf_counter() + seconds
    for number in range(ROUNDS[1]):
        if number >= ROUNDS[0] and time.perf_counter() > end:
            return
        yield number


def against(
    part: Part,
    trainer: Callable[[], Trainer],
    rival: Callable[[], Trainer],
    tokens: int,
    longest: int,
    seconds: float,
) -> None:
    """Time ours and the model of torch.nn in turns, and wait for each step."""
    where = part.place
    batch = made_up_batch(Sizes("base", where.vocabulary, tokens, longest), 0, where.device)
    padding = pad(batch)
    contenders = {"triton": (trainer(), batch), PADDED: (rival(), padding)}
    for model, examples in contenders.values():
        warm_up(part, model, examples)
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in rounds(0.8 * seconds):
        for name, (model, examples) in contenders.items():
            where.wait()
            start = time.perf_counter()
            model.step(examples)
            where.wait()
            times[name].append(1e3 * (time.perf_counter() - start))
    shape = {
        "T": batch.tokens,
        "longest": longest,
        "fill": batch.tokens / padding.input_ids.numel(),
    }
    for name, found in times.items():
        write_time(
            part,
            batch,
            f"step T={tokens} up to {longest}",
            shape,
            "wall",
            found,
            implementation=name,
        )


def write_time(
    part: Part,
    batch: PackedBatch,
    case: str,
    shape: dict[str, Any],
    which: str,
    times: list[float],
    implementation: str = "triton",
) -> None:
    low, ms, high = statistics.quantiles(times, n=4, method="inclusive")
    flops = training_flops(
        base(part.place.dry),
        part.place.vocabulary,
        batch.cu_seqlens.diff().tolist(),
        len(batch.labels),
        batch.sequences,
    )
    part.results.add(
        "step",
        case=case,
        shape=shape,
        dtype="bf16",
        **{"pass": which, "implementation": implementation},
        ms=ms,
        low_ms=low,
        high_ms=high,
        rounds=len(times),
        rate=1e3 * flops / ms,
        unit="FLOP/s",
        tokens_per_s=1e3 * batch.tokens / ms,
        predicted_ms=predicted_ms(name_of(part.place), case, which)
        if implementation == "triton"
        else None,
    )


if __name__ == "__main__":
    program("step", items)
