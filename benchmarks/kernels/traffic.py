"""Bytes that the Triton kernels load and store, counted in the interpreter, against the minimum.

    python -m benchmarks.kernels.traffic         print a table: bytes, FLOP, ratios and limits
    python -m benchmarks.kernels.traffic --json  print the same, one JSON object per line

It needs no GPU. The forward and backward pass of each operation run under the sanitizer of
`fastbert_kernels.checker`, with the tiles of sm_90. A byte counts whenever a program requests it,
whatever cache it comes from; "distinct" counts it once per launch. The traffic of a GPU's memory
lies between the two. The work of torch around the kernels is not counted: sums over the programs'
shares of a gradient, two of the four products of `mlm_loss`, its gather of rows, the sorting of
indices for `embedding`, and tile schedules.

The exit code is 1, with a line for each fault, in these cases:
- norm, add_norm, gelu, geglu, rotary and embedding move more than 1.05 times the least bytes of
  their specs, `mlm_loss` more than 1.10 (its spec includes what its tiles read again), or attention
  more than 1.01 if sequences fit one tile;
- an operation moves fewer bytes, so its spec does not state the minimum;
- attention does not move exactly the bytes that its tiles require, or the products of attention or
  `mlm_loss` do not have the FLOP of whole tiles.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import sys
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any, NamedTuple
from unittest import mock

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import torch

from benchmarks.kernels.cases import TOKENS, VOCABULARY, Case, arguments, call, leaves
from benchmarks.kernels.predicted_traffic import CPU, PREDICTIONS, Work
from fastbert_kernels import _rows
from fastbert_kernels._triton import multiprocessors
from fastbert_kernels.checker.sanitizer import sanitize
from fastbert_kernels.specs import SPECS

# Kernels over rows start as many programs as run concurrently. Each reads the vectors and writes a
# share of their gradients. Four of the 132 multiprocessors on as small a part of the rows keep the
# rows of a program, and so every ratio, in a part of the time.
PART = 33
ROWS = TOKENS // PART
PARTLY = f"1/{PART} of T={TOKENS}"


class Gate(NamedTuple):
    """What is run, and how many times the least bytes it may move.

    If `limit` is None, it must move exactly the predicted bytes.
    """

    case: Case
    dtype: torch.dtype
    limit: float | None

    def __str__(self) -> str:
        return f"{self.case} {str(self.dtype).removeprefix('torch.')}"


def attention(
    label: str,
    lengths: list[int],
    p: float,
    dtype: torch.dtype = torch.bfloat16,
    limit: float | None = None,
    **more: int,
) -> Gate:
    return Gate(
        Case("attention", label, {"lengths": lengths, "H": 2, "K": 64, **more}, p), dtype, limit
    )


GATES = (
    Gate(Case("norm", f"D=768, {PARTLY}", {"T": ROWS, "D": 768}, 0.1), torch.bfloat16, 1.05),
    Gate(Case("add_norm", f"D=768, {PARTLY}", {"T": ROWS, "D": 768}, 0.1), torch.bfloat16, 1.05),
    Gate(Case("gelu", f"F=3072, {PARTLY}", {"T": ROWS, "F": 3072}), torch.bfloat16, 1.05),
    Gate(Case("geglu", f"F=1152, {PARTLY}", {"T": ROWS, "F": 1152}), torch.bfloat16, 1.05),
    Gate(Case("rotary", "H=12 K=64", {"lengths": [90, 10], "H": 12, "K": 64}), torch.bfloat16, 1.0),
    Gate(
        Case(
            "embedding",
            f"D=768, {PARTLY}",
            {"T": ROWS, "V": VOCABULARY // PART, "P": 512 // PART, "D": 768},
            0.1,
        ),
        torch.bfloat16,
        1.05,
    ),
    Gate(
        Case("mlm_loss", "M=256 D=64 V=4096", {"T": 300, "M": 256, "D": 64, "V": 4096}),
        torch.bfloat16,
        1.10,
    ),
    attention("one tile", [128] * 6, 0.1, limit=1.01),
    attention("one tile, cut", [90, 7, 128, 33, 1, 60], 0.1, R=50),
    attention("one tile, mixed", [40, 128, 64, 65, 17, 100, 33, 0], 0.1),
    attention("one tile, padded", [40, 128, 17], 0.1, rest=100),
    attention("general", [512, 300, 40], 0.1),
    attention("general, cut", [300, 129, 7], 0.1, R=70),
    attention("general, padded", [300, 129, 0], 0.1, rest=200),
    attention("general K=48", [200, 33, 1], 0.0, K=48),
    attention("general K=32, cut", [130, 5, 64], 0.1, torch.float32, K=32, R=90),
    attention("one tile, window", [40, 128, 64], 0.1, window=20, R=50),
    attention("window", [1000, 300, 1], 0.1, window=64),
    attention("window, cut", [700, 129, 7], 0.1, window=50, R=90, rest=40),
    attention("window K=32, cut", [300, 5, 64], 0.0, torch.float32, K=32, window=33, R=90),
)


@dataclasses.dataclass
class Count:
    """Bytes and operations of dot products of one kernel, in all its launches."""

    kernel: str
    loaded: int = 0
    stored: int = 0
    distinct: int = 0
    flops: int = 0

    @property
    def bytes(self) -> int:
        return self.loaded + self.stored


@dataclasses.dataclass(frozen=True)
class Result:
    """The result of one gate; `least` and `flops` are the spec's."""

    gate: Gate
    counts: list[Count]
    predicted: dict[str, Work]
    least: int
    flops: int

    @property
    def ratio(self) -> float:
        return sum(count.bytes for count in self.counts) / self.least

    @property
    def flop_ratio(self) -> float:
        return sum(count.flops for count in self.counts) / self.flops


# The measurement.


def measure(gate: Gate) -> Result:
    """Run both passes in the interpreter; raises the faults that the sanitizer finds."""
    case, spec = gate.case, SPECS[gate.case.operation]
    given = arguments(case, gate.dtype, CPU)
    with part_of_the_device(), sanitize() as report:
        result = call(case, given, "triton")
        torch.autograd.grad(result, leaves(case, given), torch.ones_like(result))

    counts: dict[str, Count] = {}
    for launch in report.launches:
        count = counts.setdefault(launch.kernel, Count(launch.kernel))
        count.loaded += launch.loaded
        count.stored += launch.stored
        count.distinct += sum(
            t.distinct_loaded + t.distinct_stored for t in launch.tensors.values()
        )
        count.flops += launch.flops
    predicted = PREDICTIONS[case.operation](given) if case.operation in PREDICTIONS else {}
    return Result(
        gate,
        list(counts.values()),
        predicted,
        spec.least_bytes(case.shape, gate.dtype.itemsize),
        spec.flops(case.shape),
    )


def part_of_the_device() -> ExitStack:
    """A context in which kernels see one in `PART` of the multiprocessors."""
    stack = ExitStack()
    few = multiprocessors(CPU) // PART
    kernels = [
        importlib.import_module(f"fastbert_kernels.{operation}.kernel") for operation in SPECS
    ]
    for module in (_rows, *kernels):
        if hasattr(module, "multiprocessors"):
            stack.enter_context(mock.patch.object(module, "multiprocessors", lambda _: few))
    return stack


# The faults.


def faults(result: Result) -> list[str]:
    lines = []
    gate, ratio = result.gate, result.ratio
    if ratio < 1:
        lines.append(
            f"{gate}: {ratio:.4f} times the least bytes of its spec, which states too many"
        )
    if gate.limit and ratio > gate.limit:
        lines.append(
            f"{gate}: {ratio:.4f} times the least bytes of its spec; must be at most {gate.limit}"
        )
    counts = {count.kernel: count for count in result.counts}
    for kernel, work in result.predicted.items():
        count = counts.get(kernel, Count(kernel))
        if work.bytes not in (None, count.bytes):
            lines.append(
                f"{gate}: {kernel} moves {count.bytes:,} bytes "
                f"({count.bytes / work.bytes:.4f} times); its tiles need {work.bytes:,}"
            )
        if work.flops != count.flops:
            lines.append(
                f"{gate}: {kernel} computes {count.flops:,} FLOP; its tiles have {work.flops:,}"
            )
    if gate.case.operation == "attention":
        unforeseen = [count for count in result.counts if count.kernel not in result.predicted]
        lines += [
            f"{gate}: {count.kernel} moves {count.bytes:,} bytes, which no prediction covers"
            for count in unforeseen
        ]
    return lines


# The command.


def table(results: Iterable[Result]) -> str:
    """The table as text."""
    lines = [
        f"{'':52}{'loaded':>14}{'stored':>14}{'distinct':>14}{'predicted':>14}"
        f"{'FLOP':>16}{'predicted':>16}"
    ]
    for result in results:
        lines.append(str(result.gate))
        for count in result.counts:
            work = result.predicted.get(count.kernel, Work(None, 0))
            expected = "" if work.bytes is None else f"{work.bytes:,}"
            figures = f"{count.loaded:14,}{count.stored:14,}{count.distinct:14,}{expected:>14}"
            lines.append(
                f"    {count.kernel:48}{figures}"
                + (f"{count.flops:16,}{work.flops:16,}" if count.flops else "")
            )
        limit = f", limit {result.gate.limit:.2f}" if result.gate.limit else ""
        total = sum(count.bytes for count in result.counts)
        distinct = sum(count.distinct for count in result.counts)
        line = (
            f"    {total:,} bytes of at least {result.least:,}: {result.ratio:.4f}{limit}; "
            f"distinct {distinct / result.least:.4f}"
        )
        lines += [
            line + (f"; FLOP {result.flop_ratio:.3f} of the spec's" if result.predicted else ""),
            "",
        ]
    return "\n".join(lines)


def record(result: Result) -> dict[str, Any]:
    """The result as JSON."""
    return {
        "operation": result.gate.case.operation,
        "case": str(result.gate),
        "shape": result.gate.case.shape,
        "kernels": [dataclasses.asdict(count) for count in result.counts],
        "predicted": {kernel: work._asdict() for kernel, work in result.predicted.items()},
        "least_bytes": result.least,
        "ratio": result.ratio,
        "limit": result.gate.limit,
        "flop_ratio": result.flop_ratio,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Bytes that the Triton kernels move, against the least; needs no GPU."
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object per line")
    options = parser.parse_args()
    results = [measure(gate) for gate in GATES]
    print(
        "\n".join(json.dumps(record(result)) for result in results)
        if options.json
        else table(results)
    )
    wrong = [line for result in results for line in faults(result)]
    for line in wrong:
        print(f"FAULT {line}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
