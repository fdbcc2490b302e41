"""Kernels with the faults that the ahead-of-time gate must find.

`python -m tests.planted_kernels` prints what the gate reports for them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from benchmarks.compiled.ahead_of_time import compile_all, faults
from benchmarks.compiled.signatures import AotSignature


@triton.jit
def spilling(x_ptr, y_ptr, BLOCK: tl.constexpr):
    """Spill: the row is needed twice, and 16,384 elements are 512 registers per lane of one warp.

    A lane has 255 registers.
    """
    column = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + column)
    tl.store(y_ptr + column, x * tl.sum(x))


@triton.jit
def narrow(
    ids_ptr, table_ptr, x_ptr, y_ptr, table_stride, shift, T, D: tl.constexpr, BLOCK_T: tl.constexpr
):
    """Read rows of a table by index, which is correct, and x from a column that may be odd."""
    column = tl.arange(0, D)[None, :]
    for first in range(0, T, BLOCK_T):
        row = first + tl.arange(0, BLOCK_T)[:, None]
        ids = tl.load(ids_ptr + row)
        table = tl.load(table_ptr + ids * table_stride + column)
        x = tl.load(x_ptr + row * D + shift + column)
        tl.store(y_ptr + row * D + column, table + x)


SPILLING = AotSignature(
    spilling,
    "",
    16384,
    torch.float32,
    {"x_ptr": "*fp32", "y_ptr": "*fp32", "BLOCK": 16384},
    wide=("x_ptr",),
)
POINTERS = {"ids_ptr": "*i64", "table_ptr": "*bf16", "x_ptr": "*bf16", "y_ptr": "*bf16"}
NUMBERS = {"table_stride": "i64", "shift": "i32", "T": "i32", "D": 256, "BLOCK_T": 16}
NARROW = AotSignature(
    narrow,
    "",
    256,
    torch.bfloat16,
    POINTERS | NUMBERS,
    aligned=("table_stride",),
    wide=("table_ptr", "x_ptr"),
)
UNREAD = NARROW._replace(wide=("y_ptr",))
MISNAMED = NARROW._replace(arguments=NARROW.arguments | {"stride": "i32"})


def main() -> None:
    planted = {"spilling": SPILLING, "narrow": NARROW, "unread": UNREAD, "misnamed": MISNAMED}
    options = {"spilling": {"num_warps": 1}}
    found = compile_all(
        (name, signature, "sm_90", options.get(name, {"num_warps": 4}))
        for name, signature in planted.items()
    )
    print("\n".join(faults(found)))


if __name__ == "__main__":
    main()
