"""Each kernel against what people would use instead: a pytest-benchmark suite that walks the operations, forward and backward.

    pytest benchmarks/bench_kernels.py --out runs/kernels [-k "norm or gelu"] [--seconds 120] [--compile one|all|none]

Each case is first compared with the reference in higher precision, result and gradients, by the bound of the tests. Then forward and
backward passes are timed in turns, on the same inputs in one process:

    triton          ours, bf16 (on a CPU `cpu`, fp32, smaller packs)
    eager           the same function as one writes it with torch.nn.functional; attention padded, its scores [B, H, n, n]
    torch.compile   of that; it takes many seconds a case, so only for one of an operation, with dropout, unless `--compile all`
    SDPA, varlen_attn, linear_cross_entropy     torch's own fused operation, where this torch has one
    Liger, CCE, FlashAttention                  what people install

All contenders of a case are timed when its first test runs, one after the other in every round; each test then hands pytest-benchmark the
rounds of its own contender. So the figures are those of rivals that met the same state of the machine. A test is skipped where a
contender is missing, with the reason, and fails where ours is wrong. Next to pytest-benchmark.json the folder gets kernels.json, kernels.md and kernels.png.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from benchmarks import peers, rivals
from benchmarks.cases import (
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
from benchmarks.contenders import that_run
from benchmarks.kernel_report import PASSES
from benchmarks.timing import Contender, Times, differentiated, extra_memory, in_turns

CPU_TOKENS = 512
SIZES = {
    "cuda": (1024, 4096, 16384, 65536),
    "cpu": (128, 512, 2048),
}  # of the pictures: tokens of a pack
TIMING_SHARE = 0.5  # of a case's time; the rest is left to compiling and checking


@dataclass(frozen=True)
class Found:
    """What came of a case: the rounds of each contender, why others are missing, and how far ours is from the truth."""

    times: dict[str, Times]
    notes: dict[str, str]
    error_over_allowed: float
    extra_bytes: dict[str, int | None] = field(default_factory=dict)


class Bench:
    """Measures a case when it is first asked for. The last one is kept.

    Args:
        seconds: what `count` cases may take in all, from the first one on; those that come later are not measured.
        compiled: names of the cases that torch.compile takes part in.
    """

    def __init__(self, device: torch.device, seconds: float, count: int, compiled: set[str]):
        self.device, self.seconds, self.count, self.compiled = device, seconds, count, compiled
        self.ours = "triton" if device.type == "cuda" else "cpu"
        self.element = 2 if device.type == "cuda" else 4
        self._end: float | None = None
        self._found: dict[str, Found] = {}

    def __call__(self, case: Case) -> Found | None:
        """None where no time was left."""
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
        """Those that ran once, forward and backward, and why each of the others did not."""
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
    """A timer for pytest-benchmark that tells how long something took which has been timed already."""

    def __init__(self) -> None:
        self._readings: Iterator[float] = iter(())

    def __call__(self) -> float:
        return next(self._readings)

    def rewind(self, seconds: list[float]) -> None:
        """Let the coming rounds take so long."""
        self._readings = (reading for taken in seconds for reading in (0.0, taken))


clock = Clock()


def cases_for(device: torch.device, tokens: int | None) -> list[Case]:
    """The sizes of training, or packs of `tokens` tokens; and those of the pictures. Nobody trains BERT-large on a CPU."""
    if tokens is not None:
        return [*production(tokens), *sweep((128, 256))]
    gpu = device.type == "cuda"
    return [*production(TOKENS if gpu else CPU_TOKENS, large=gpu), *sweep(SIZES[device.type])]


def to_compile(cases: list[Case], which: str) -> set[str]:
    """The names of the cases to compile too; "one" of an operation is its first with dropout, if it has dropout."""
    one: dict[str, Case] = {}
    for case in sorted(cases, key=lambda case: case.dropout_p == 0):
        one.setdefault(case.operation, case)
    return {str(case) for case in {"one": one.values(), "all": cases, "none": []}[which]}


def contenders_of(case: Case, ours: str, compiled: set[str]) -> list[str]:
    """Everybody who may take part in a case."""
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
