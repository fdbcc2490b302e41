"""Benchmark each kernel against its usual alternatives: a pytest-benchmark suite.

    pytest benchmarks/kernels/bench_kernels.py --out runs/kernels [-k "norm or gelu"] \\
        [--seconds 120] [--compile one|all|none]

It covers every operation, forward and backward. The results and gradients of each case are first
compared with the reference in higher precision, with the error bound of the tests. Then forward
and backward passes are timed in turns, on the same inputs in one process:

    triton          ours in bf16 (on a CPU: `cpu`, in fp32, with smaller packs)
    eager           the same function written with torch.nn.functional; attention is padded, with
                    scores of shape [B, H, n, n]
    torch.compile   the eager function, compiled. Compiling takes many seconds per case, so it is
                    done for one case of an operation, with dropout, unless `--compile all`
    SDPA, varlen_attn, linear_cross_entropy     torch's own fused operation, if this torch has one
    Liger, CCE, FlashAttention                  packages that people install

All contenders of a case are timed when its first test runs, one after the other in every round.
Each test then passes the rounds of its own contender to pytest-benchmark. So all figures of a case
were measured under the same machine conditions. A test is skipped, with the reason, if its
contender is missing; it fails if our result is wrong. The folder gets pytest-benchmark.json,
kernels.json, kernels.md and kernels.png.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from benchmarks.harness.timing import Contender, Times, differentiated, extra_memory, in_turns
from benchmarks.kernels import peers, rivals
from benchmarks.kernels.cases import (
    TOKENS,
    Case,
    arguments,
    call,
    leaves,
    outcome,
    production,
    sweep,
    truth,
    upstream_of,
)
from benchmarks.kernels.contenders import that_run
from benchmarks.kernels.kernel_report import PASSES

CPU_TOKENS = 512
# Tokens of a pack in the figures.
SIZES = {
    "cuda": (1024, 4096, 16384, 65536),
    "cpu": (128, 512, 2048),
}
TIMING_SHARE = 0.5  # share of a case's time for timing; the rest is for compiling and checking


@dataclass(frozen=True)
class Found:
    """The result of a case.

    Args:
        times: rounds of each contender.
        notes: for each missing contender, the reason.
        error_over_allowed: our error as a share of the allowed error.
        extra_bytes: peak memory beyond the inputs, by contender; None on a CPU.
    """

    times: dict[str, Times]
    notes: dict[str, str]
    error_over_allowed: float
    extra_bytes: dict[str, int | None] = field(default_factory=dict)


class Bench:
    """Measures a case when it is first requested, and caches the latest one.

    Args:
        seconds: time for all `count` cases, counted from the first; later cases are not measured.
        compiled: names of the cases that are also measured with torch.compile.
    """

    def __init__(self, device: torch.device, seconds: float, count: int, compiled: set[str]):
        self.device, self.seconds, self.count, self.compiled = device, seconds, count, compiled
        self.ours = "triton" if device.type == "cuda" else "cpu"
        self.element = 2 if device.type == "cuda" else 4
        self._end: float | None = None
        self._found: dict[str, Found] = {}

    def __call__(self, case: Case) -> Found | None:
        """The result of a case; None if the time is used up."""
        self._end = self._end or time.monotonic() + self.seconds
        name = str(case)
        if name not in self._found:
            if time.monotonic() > self._end:
                return None
            self._found = {name: self._measure(case)}
        return self._found[name]

    def _measure(self, case: Case) -> Found:
        given = arguments(
            case, torch.bfloat16 if self.device.type == "cuda" else torch.float32, self.device
        )
        upstream = upstream_of(call(case, given, self.ours))
        error = truth(case, given, upstream).share(outcome(case, given, self.ours, upstream))
        contenders = {
            self.ours: differentiated(
                lambda: call(case, given, self.ours), leaves(case, given), upstream
            )
        }
        others, notes = self._others(case, given)
        contenders |= others
        memory = {
            name: extra_memory(contender, self.device) for name, contender in contenders.items()
        }
        return Found(
            in_turns(contenders, self.device, TIMING_SHARE * self.seconds / self.count),
            notes,
            error,
            memory,
        )

    def _others(
        self, case: Case, given: dict[str, Any]
    ) -> tuple[dict[str, Contender], dict[str, str]]:
        """The contenders that ran once forward and backward, and why the others did not."""
        offered = {**rivals.rivals(case, given), **peers.peers(case, given)}
        eager = offered["eager"]
        if str(case) in self.compiled and not isinstance(eager, str):
            torch.compiler.reset()
            offered["torch.compile"] = (
                torch.compile(eager[0], fullgraph=True, dynamic=False),
                eager[1],
            )
        return that_run(offered)


class Clock:
    """A timer for pytest-benchmark that reports durations which have already been measured."""

    def __init__(self) -> None:
        self._readings: Iterator[float] = iter(())

    def __call__(self) -> float:
        return next(self._readings)

    def rewind(self, seconds: list[float]) -> None:
        """Set the durations of the coming rounds."""
        self._readings = (reading for taken in seconds for reading in (0.0, taken))


clock = Clock()


def cases_for(device: torch.device, tokens: int | None) -> list[Case]:
    """The sizes of training, or packs of `tokens` tokens; then the sizes of the figures.

    BERT-large is left out on a CPU, where nobody trains it.
    """
    if tokens is not None:
        return [*production(tokens), *sweep((128, 256))]
    gpu = device.type == "cuda"
    return [*production(TOKENS if gpu else CPU_TOKENS, large=gpu), *sweep(SIZES[device.type])]


def to_compile(cases: list[Case], which: str) -> set[str]:
    """The names of the cases to compile; "one" takes an operation's first case with dropout.

    If the operation has no dropout, "one" takes its first case.
    """
    one: dict[str, Case] = {}
    for case in sorted(cases, key=lambda case: case.dropout_p == 0):
        one.setdefault(case.operation, case)
    return {str(case) for case in {"one": one.values(), "all": cases, "none": []}[which]}


def contenders_of(case: Case, ours: str, compiled: set[str]) -> list[str]:
    """All contenders that may take part in a case."""
    names = [ours, *rivals.NAMES[case.operation], *peers.NAMES[case.operation]]
    return names + ["torch.compile"] * (str(case) in compiled)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    options = metafunc.config.option
    device = torch.device(options.device)
    cases = cases_for(device, options.tokens)
    compiled = to_compile(cases, options.compile)
    bench = Bench(device, options.seconds, len(cases), compiled)
    tests = [
        (bench, case, name, which)
        for case in cases
        for name in contenders_of(case, bench.ours, compiled)
        for which in PASSES
    ]
    metafunc.parametrize(
        "bench, case, contender, which",
        tests,
        ids=[f"{case}-{name}-{which}" for _, case, name, which in tests],
    )


@pytest.mark.benchmark(timer=clock)
def test_kernel(benchmark, bench: Bench, case: Case, contender: str, which: str) -> None:
    found = bench(case)
    benchmark.group = f"{case}, {which}"
    benchmark.extra_info.update(
        case=case._asdict(), **{"pass": which}, implementation=contender, element=bench.element
    )
    if found is None:
        pytest.skip("no time was left")
    if contender in found.notes:
        pytest.skip(found.notes[contender])
    rounds = [ms / 1e3 for ms in found.times[contender].rounds(which)]
    benchmark.extra_info.update(extra_bytes=found.extra_bytes[contender], rounds=rounds)
    if contender == bench.ours:
        benchmark.extra_info.update(error_over_allowed=found.error_over_allowed)
    clock.rewind(rounds)
    benchmark.pedantic(lambda: None, rounds=len(rounds))
    assert contender != bench.ours or found.error_over_allowed <= 1, (
        "the result or a gradient is wrong"
    )
