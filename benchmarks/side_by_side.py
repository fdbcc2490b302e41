"""Our Triton kernels and those that people install, side by side in the interpreter: bytes moved over the least, and error. No GPU is needed.

    python -m benchmarks.side_by_side --out folder

Forward and backward pass in bf16. Kernels are counted by `tests/sanitizer.py`: a byte as often as a program asks for it, from whatever cache
it comes. What torch's operators around them move is counted too, inputs and outputs once each: a peer that leaves products or dropout to
torch pays for them as ours does. The least is that of the spec. The error is the largest of the result and all gradients, as a share of what
the tests allow (twice that of plain torch in bf16, against fp64): above 1 our own kernels would fail.

Two functions of CUDA's libdevice, which the interpreter does not have, are replaced by their definitions. A peer that still does not run is
listed with the reason. Times need a GPU: benchmarks/bench_kernels.py.
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
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # compiled code could not be counted

import torch
import triton.language as tl
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.language.extra import libdevice
from triton.runtime.interpreter import GridExecutor

from fastbert_kernels import _library

if __name__ == "__main__":
    # Before kernels are imported. Ours are functions instead of operators, within which nothing could be counted.
    _library.operator = lambda schema, run, fake: run
    libdevice.rsqrt = lambda x: 1.0 / tl.sqrt(x)
    libdevice.log1p = lambda x: tl.log(1.0 + x)

from benchmarks.cases import Case, arguments, call, leaves, truth, upstream_of
from benchmarks.machine import header
from benchmarks.peers import peers
from benchmarks.record import Record, Row, table
from fastbert_kernels.mlm_loss import kernel as mlm_loss
from fastbert_kernels.specs import SPECS
from tests.sanitizer import sanitize

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
    """Bytes of the inputs and outputs of torch's operators, but for views, outside of kernels."""

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
        """As `_product` of the MLM loss: on a GPU cuBLAS reads 16 bits and writes 32, on a CPU copies are needed."""
        self.bytes += sum(x.numel() * x.element_size() for x in (a, b, out, *[out] * bool(beta)))
        self._paused = True
        torch.addmm(out, a.float(), b.float(), beta=beta, out=out)
        self._paused = False

    @contextlib.contextmanager
    def outside_of_kernels(self) -> Iterator[None]:
        """Inside, what the interpreter itself does with torch is not counted."""
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
        except Exception as failure:  # whatever a peer may raise, the others are measured
            rows.append(
                row
                | {
                    "note": f"does not run in the interpreter: {type(failure).__name__}: {str(failure).splitlines()[0][:120]}"
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
    """Bytes of kernels and of torch's operators in both passes, and the result with its gradients."""
    by_torch = TorchTraffic()
    # Locks between programs look like races to the sanitizer; nothing runs at the same time here.
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
        "error of allowed",
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
