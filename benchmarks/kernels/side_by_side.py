"""Our Triton kernels and those of common packages in the interpreter: bytes moved, and error.

    python -m benchmarks.kernels.side_by_side --out folder

It needs no GPU. Forward and backward passes run in bf16. Kernels are counted by
the sanitizer of `fastbert_kernels.checker`: a byte counts whenever a program requests it, whatever
cache it comes from.
The inputs and outputs of torch's operators around the kernels are counted too, once each. So a peer
that leaves matrix products or dropout to torch is charged for them, as ours is. The minimum is that
of the spec. The error is the largest one of the result and all gradients, as a share of the allowed
one in the tests (twice that of plain torch in bf16, against fp64): with a share above 1, our own
kernels would fail their tests.

Two functions of CUDA's libdevice that the interpreter does not have are replaced by their
definitions. A peer that still does not run is listed with the reason. Times need a GPU:
benchmarks/kernels/bench_kernels.py.
"""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # compiled code cannot be counted

import torch
import triton.language as tl
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.language.extra import libdevice
from triton.runtime.interpreter import GridExecutor

from fastbert_kernels import _library

if __name__ == "__main__":
    # This must come before kernels are imported. Ours become plain functions, because nothing can
    # be counted inside of operators.
    _library.operator = lambda schema, run, fake: run
    libdevice.rsqrt = lambda x: 1.0 / tl.sqrt(x)
    libdevice.log1p = lambda x: tl.log(1.0 + x)

from benchmarks.harness.machine import header
from benchmarks.harness.record import Record, Row
from benchmarks.harness.tables_and_plots import table
from benchmarks.kernels.cases import Case, arguments, call, leaves, truth, upstream_of
from benchmarks.kernels.peers import peers
from fastbert_kernels.checker.sanitizer import sanitize
from fastbert_kernels.mlm_loss import kernel as mlm_loss
from fastbert_kernels.specs import SPECS

CPU = torch.device("cpu")
CASES = (
    Case("norm", "alone D=768", {"T": 96, "D": 768, "bare": 1}),
    Case("norm", "D=768", {"T": 96, "D": 768}, 0.0),
    Case("norm", "D=768", {"T": 96, "D": 768}, 0.1),
    Case("mlm_loss", "M=128 D=128 V=4096", {"T": 160, "M": 128, "D": 128, "V": 4096}),
)
NO_MEMORY = {
    "detach",
    "empty",
    "empty_like",
    "new_empty",
    "empty_strided",
    "_local_scalar_dense",
    "is_pinned",
}


class TorchTraffic(TorchDispatchMode):
    """Bytes of the inputs and outputs of torch's operators, except views, outside of kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self._paused = 0, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not (self._paused or func.is_view or func.overloadpacket.__name__ in NO_MEMORY):
            moved = [
                leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)
            ]
            self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in moved)
        return result

    def product(self, a: Tensor, b: Tensor, out: Tensor, beta: int) -> None:
        """Replaces `_product` of the MLM loss.

        On a GPU, cuBLAS reads 16 bits and writes 32; on a CPU, copies are needed.
        """
        self.bytes += sum(x.numel() * x.element_size() for x in (a, b, out, *[out] * bool(beta)))
        self._paused = True
        torch.addmm(out, a.float(), b.float(), beta=beta, out=out)
        self._paused = False

    @contextlib.contextmanager
    def outside_of_kernels(self) -> Iterator[None]:
        """A context in which the interpreter's own use of torch is not counted."""
        run = GridExecutor.__call__

        def quietly(executor: GridExecutor, *args: Any, **kwargs: Any) -> None:
            self._paused = True
            try:
                run(executor, *args, **kwargs)
            finally:
                self._paused = False

        with (
            mock.patch.object(GridExecutor, "__call__", quietly),
            mock.patch.object(mlm_loss, "_product", self.product),
            self,
        ):
            yield


def measure(case: Case) -> list[Row]:
    """A row for ours and for each peer."""
    given = arguments(case, torch.bfloat16, CPU)
    if case.operation == "mlm_loss":
        with torch.no_grad():
            given["bias"].zero_()  # one of the peers has none
    upstream = upstream_of(call(case, given, "reference"))
    right = truth(case, given, upstream, torch.float64)
    contenders: dict[str, Any] = {
        "triton": (lambda: call(case, given, "triton"), leaves(case, given))
    }
    contenders |= peers(case, given, interpreted=True)
    names = [name for name in SPECS[case.operation].differentiable if given[name] is not None]
    rows = []
    for name, contender in contenders.items():
        row: Row = {"case": str(case), "implementation": name}
        if isinstance(contender, str):
            rows.append(row | {"note": contender})
            continue
        forward, wanted = contender
        try:
            kernels, by_torch, values = count(forward, wanted, upstream)
        except Exception as failure:  # a peer may raise anything; the others are still measured
            rows.append(
                row
                | {
                    "note": f"does not run in the interpreter: {type(failure).__name__}: "
                    f"{str(failure).splitlines()[0][:120]}"
                }
            )
            continue
        least = SPECS[case.operation].least_bytes(case.shape, 2)
        there = [
            0,
            *(
                1 + names.index(n)
                for n, leaf in zip(names, leaves(case, given), strict=True)
                if any(leaf is w for w in wanted)
            ),
        ]
        part = right._replace(
            values=[right.values[i] for i in there], allowed=[right.allowed[i] for i in there]
        )
        rows.append(
            row
            | {
                "kernel_bytes": kernels,
                "torch_bytes": by_torch,
                "least_bytes": least,
                "ratio": (kernels + by_torch) / least,
            }
            | (
                {"error_over_allowed": part.share(values)}
                if case.dropout_p == 0 or name == "triton"
                else {}
            )
        )
    return rows


def count(
    forward: Callable[[], Tensor], wanted: list[Tensor], upstream: Tensor
) -> tuple[int, int, list[Tensor]]:
    """Bytes of kernels and of torch's operators in both passes; the result and its gradients."""
    by_torch = TorchTraffic()
    # Locks between programs look like races to the sanitizer; here programs run one at a time.
    with sanitize(raise_on_fault=False) as report, by_torch.outside_of_kernels():
        result = forward()
        gradients = torch.autograd.grad(result, wanted, upstream.to(result.dtype))
    return (
        sum(launch.loaded + launch.stored for launch in report.launches),
        by_torch.bytes,
        [result.detach(), *gradients],
    )


def page(rows: list[Row]) -> str:
    body = []
    for row in rows:
        if "note" in row:
            body.append([row["case"], row["implementation"], *["-"] * 4, row["note"]])
            continue
        figures = [f"{row[key]:,}" for key in ("kernel_bytes", "torch_bytes", "least_bytes")]
        error = f"{row['error_over_allowed']:.2f}" if "error_over_allowed" in row else "other masks"
        body.append([row["case"], row["implementation"], *figures, f"{row['ratio']:.2f}", error])
    columns = (
        "case",
        "implementation",
        "bytes of kernels",
        "bytes of torch",
        "least",
        "moved over least",
        "error over allowed",
    )
    return "Kernels side by side, without a GPU\n\n" + table(columns, body)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for side_by_side.json and side_by_side.md"
    )
    options = parser.parse_args()
    rows = [row for case in CASES for row in measure(case)]
    text = page(rows)
    print(text)
    ratios = {}
    for row in rows:
        ours = next(r for r in rows if (r["case"], r["implementation"]) == (row["case"], "triton"))
        if "ratio" in row and row is not ours:
            ratios[f"{row['case']}, bytes of {row['implementation']} over ours"] = (
                row["ratio"] / ours["ratio"]
            )
    Record(header(CPU), rows, ratios).write(options.out, "side_by_side", text)


if __name__ == "__main__":
    main()
