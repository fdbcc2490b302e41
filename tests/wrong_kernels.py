"""Kernels that are wrong in one way each, for tests/test_checker_finds.py.

`WRONG` has each as a Check, and the kind of finding that must name it. FAULT is a constant of the
kernels, so each value of it is a kernel of its own.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from fastbert_kernels.checker.cases import Check


class Wrong(NamedTuple):
    """A check that must fail.

    Attributes:
        kind: of the finding.
        check: what is checked.
        kernel: the kernel that the finding names.
        tensor: the tensor that it names; "" for any.
    """

    kind: str
    check: Check
    kernel: str
    tensor: str = ""


WRONG: dict[str, Wrong] = {}


def normal(*names: str) -> Any:
    """Inputs of one shape [n], or [rows, columns], for each name."""

    def inputs(dtype, **shape):
        return {name: torch.randn(*shape.values()).to(dtype) for name in names}

    return inputs


def add(name: str, kind: str, kernel: Any, run: Any, tensor: str = "", **check: Any) -> None:
    given = {
        "inputs": normal("x"),
        "shapes": [{"n": 40}],
        "dtypes": ["fp32"],
        "name": name,
        **check,
    }
    WRONG[name] = Wrong(kind, Check(kernel=run, **given), kernel.__name__, tensor)


# ---- one element after the other


@triton.jit
def double_kernel(x_ptr, y_ptr, n, step, FAULT: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * step + tl.arange(0, BLOCK)
    reads, writes = i < n, i < n
    if FAULT == "read past the end":
        reads = i < n + 1
    if FAULT == "write past the end":
        writes = i < n + BLOCK
    if FAULT == "mask too small":
        writes = i < n - 1
    shift = 0
    if FAULT == "read before the start":
        shift = -1
    factor = 2.0
    if FAULT == "wrong constant":
        factor = 2.0001
    if FAULT == "wrong assumption":
        tl.assume(n > 1000)
    if FAULT == "failing assertion":
        tl.device_assert(n > 1000, "n is small")
    if FAULT == "wrong multiple":
        n = tl.multiple_of(n, 16)
    if FAULT == "condition on a block":
        while i < 0:
            factor = 2.0
    x = tl.load(x_ptr + i + shift, mask=reads, other=0.0)
    y = x * factor
    if FAULT == "loses NaN":
        y = tl.maximum(y, -3e38)
    if FAULT == "spreads NaN":
        y += tl.load(x_ptr + n - 1 - i, mask=reads, other=0.0) * 0.0
    if FAULT == "one lane after the other":
        tl.store(y_ptr + i // 2, y, mask=writes)
    tl.store(y_ptr + i, y, mask=writes)


def doubled(fault, programs=3, step=16):
    def run(x):
        y = torch.empty_like(x)
        double_kernel[(programs,)](x, y, x.numel(), step, FAULT=fault, BLOCK=16)
        return y

    return run


for fault, kind, tensor in (
    ("read past the end", "out of bounds", "x_ptr"),
    ("read before the start", "out of bounds", "x_ptr"),
    ("write past the end", "out of bounds", "y_ptr"),
    ("mask too small", "not fully written", "result"),
    ("wrong constant", "wrong result", "result"),
    ("wrong assumption", "assertion", ""),
    ("failing assertion", "assertion", ""),
    ("wrong multiple", "assertion", ""),
    ("condition on a block", "exception", ""),
    ("loses NaN", "NaN and infinity", "result"),
    ("spreads NaN", "NaN and infinity", "result"),
    ("one lane after the other", "race", "y_ptr"),
):
    add(fault, kind, double_kernel, doubled(fault), tensor, reference=lambda x: 2 * x)
add(
    "too few programs",
    "not fully written",
    double_kernel,
    doubled("", programs=2),
    "result",
    reference=lambda x: 2 * x,
)
add(
    "programs overlap",
    "race",
    double_kernel,
    doubled("", programs=4, step=13),
    "y_ptr",
    reference=lambda x: 2 * x,
)


def in_another_dtype(x):
    y = torch.empty(x.shape, dtype=torch.float16)
    double_kernel[(3,)](x, y, x.numel(), 16, FAULT="", BLOCK=16)
    return y


add(
    "result in another dtype",
    "wrong form",
    double_kernel,
    in_another_dtype,
    "result",
    reference=lambda x: 2 * x,
)


def with_noise(x):
    y = torch.rand(1).expand(x.shape).contiguous()
    double_kernel[(1,)](x, y, x.numel(), 16, FAULT="", BLOCK=16)
    return y


add(
    "other numbers at each run",
    "run to run",
    double_kernel,
    with_noise,
    "result",
    reference=lambda x: 2 * x,
)


def in_place(x):
    double_kernel[(3,)](x, x, x.numel(), 16, FAULT="", BLOCK=16)
    return x + 0


add(
    "overwrites its input",
    "changed input",
    double_kernel,
    in_place,
    "x",
    reference=lambda x: 2 * x,
)


@triton.jit
def rows_kernel(x_ptr, y_ptr, stride, rows, FAULT: tl.constexpr, N: tl.constexpr):
    row = tl.program_id(0)
    column = tl.arange(0, N)
    if FAULT == "leaves the view":
        x = tl.load(x_ptr + row * N + column)
    elif FAULT == "rows swapped":
        x = tl.load(x_ptr + (rows - 1 - row) * stride + column)
    elif FAULT == "index from data":
        x = tl.load(x_ptr + tl.load(x_ptr + row * stride).to(tl.int32) * 1000 + column)
    else:
        x = tl.load(x_ptr + row * stride + column)
    tl.store(y_ptr + row * N + column, x)


def copied(fault):
    def run(x):
        y = torch.empty(x.shape, dtype=x.dtype)
        rows_kernel[(len(x),)](x, y, x.stride(0), len(x), FAULT=fault, N=x.shape[1])
        return y

    return run


def half_of_rows(dtype, rows, columns):
    return {"x": torch.randn(rows, 2 * columns).to(dtype)[:, :columns]}


for fault, kind in (
    ("leaves the view", "out of bounds"),
    ("rows swapped", "wrong result"),
    ("index from data", "out of bounds"),
):
    add(
        fault,
        kind,
        rows_kernel,
        copied(fault),
        reference=lambda x: x.clone(),
        inputs=half_of_rows,
        shapes=[{"rows": 3, "columns": 16}],
    )


def leaves_out_a_gradient():
    class Copy(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, y):
            return copied("")(x) + y

        @staticmethod
        def backward(ctx, dz):
            return dz, None

    return Copy.apply


add(
    "gradient left out",
    "wrong form",
    rows_kernel,
    leaves_out_a_gradient(),
    reference=lambda x, y: x + y,
    inputs=normal("x", "y"),
    shapes=[{"rows": 3, "columns": 16}],
)
WRONG["gradient left out"] = WRONG["gradient left out"]._replace(kernel="")

add(
    "result of another shape",
    "wrong form",
    rows_kernel,
    lambda x: copied("")(x)[1:],
    reference=lambda x: x.clone(),
    inputs=half_of_rows,
    shapes=[{"rows": 3, "columns": 16}],
)

# ---- softmax of rows


@triton.jit
def softmax_kernel(x_ptr, y_ptr, N, FAULT: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    if FAULT == "no other":
        x = tl.load(x_ptr + row * N + column, mask=column < N).to(tl.float32)
    elif FAULT == "other is zero":
        x = tl.load(x_ptr + row * N + column, mask=column < N, other=0.0).to(tl.float32)
    else:
        x = tl.load(x_ptr + row * N + column, mask=column < N, other=-float("inf")).to(tl.float32)
    if FAULT != "no maximum":
        x = x - tl.max(x, 0)
    e = tl.exp(x)
    total = tl.sum(e, 0)
    if FAULT == "sum of 16 bits":
        total = tl.sum(e.to(tl.bfloat16), 0).to(tl.float32)
    if FAULT == "rounded too early":
        e = e.to(tl.bfloat16).to(tl.float32)
    tl.store(y_ptr + row * N + column, e / total, mask=column < N)


@triton.jit
def softmax_backward_kernel(dy_ptr, y_ptr, dx_ptr, N, FAULT: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    dy = tl.load(dy_ptr + row * N + column, mask=column < N, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + row * N + column, mask=column < N, other=0.0).to(tl.float32)
    total = tl.sum(dy * y, 0)
    if FAULT == "gradient without its sum":
        total = 0.0
    if FAULT == "gradient by another row":
        dy = tl.load(dy_ptr + column, mask=column < N, other=0.0).to(tl.float32)
    mask = column < N
    if FAULT == "gradient not fully written":
        mask = column < N - 1
    tl.store(dx_ptr + row * N + column, y * (dy - total), mask=mask)


def softmax(fault):
    class Softmax(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            y = torch.empty_like(x)
            softmax_kernel[(len(x),)](x, y, x.shape[1], FAULT=fault, BLOCK=64)
            ctx.save_for_backward(y)
            return y

        @staticmethod
        def backward(ctx, dy):
            (y,) = ctx.saved_tensors
            dx = torch.empty_like(y)
            grid = (len(y),)
            softmax_backward_kernel[grid](dy, y, dx, y.shape[1], FAULT=fault, BLOCK=64)
            return dx

    return Softmax.apply


def steep(dtype, rows, columns):
    return {"x": (torch.randn(rows, columns) * 60).to(dtype)}


for fault, kind, kernel, more in (
    ("no other", "masked-off value", softmax_kernel, {}),
    ("other is zero", "wrong result", softmax_kernel, {}),
    ("no maximum", "wrong result", softmax_kernel, {"inputs": steep}),
    ("sum of 16 bits", "lint sixteen-bit-difference", softmax_kernel, {"dtypes": ["bf16"]}),
    ("rounded too early", "wrong result", softmax_kernel, {}),
    ("gradient without its sum", "wrong result", softmax_backward_kernel, {}),
    ("gradient by another row", "wrong result", softmax_backward_kernel, {}),
    ("gradient not fully written", "not fully written", softmax_backward_kernel, {}),
):
    add(
        fault,
        kind,
        kernel,
        softmax(fault),
        reference=lambda x: torch.softmax(x, -1),
        **{"inputs": normal("x"), "shapes": [{"rows": 3, "columns": 50}], **more},
    )

# ---- sums over programs


@triton.jit
def total_kernel(x_ptr, y_ptr, lock_ptr, n, FAULT: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.sum(tl.load(x_ptr + i, mask=i < n, other=0.0).to(tl.float32), 0)
    if FAULT == "load, add, store":
        tl.store(y_ptr, tl.load(y_ptr) + total)
    elif FAULT == "all store":
        tl.store(y_ptr, total)
    elif FAULT == "first one clears":
        if tl.program_id(0) == 0:
            tl.store(y_ptr, 0.0)
        tl.atomic_add(y_ptr, total)
    elif FAULT == "counts, but does not wait":
        tl.store(lock_ptr + 1 + tl.program_id(0), total)
        if tl.program_id(0) == tl.num_programs(0) - 1:
            part = tl.arange(0, 4)
            parts = tl.load(lock_ptr + 1 + part, mask=part < tl.num_programs(0), other=0.0)
            tl.store(y_ptr, tl.sum(parts, 0))
    elif FAULT == "unlocks too early":
        while tl.atomic_cas(lock_ptr, 0, 1) == 1:
            pass
        before = tl.load(y_ptr)
        tl.atomic_xchg(lock_ptr, 0)
        tl.store(y_ptr, before + total)
    elif FAULT == "waits for the last program":
        if tl.program_id(0) == tl.num_programs(0) - 1:
            tl.atomic_xchg(lock_ptr, 1)
        while tl.atomic_cas(lock_ptr, 1, 1) == 0:
            pass
        tl.atomic_add(y_ptr, total)
    else:
        tl.atomic_add(y_ptr, total)


def total(fault, written=True):
    def run(x):
        y, lock = torch.zeros(1) if written else torch.empty(1), torch.zeros(8)
        if "waits" in fault or "unlocks" in fault:
            lock = lock.int()
        total_kernel[(triton.cdiv(x.numel(), 16),)](x, y, lock, x.numel(), FAULT=fault, BLOCK=16)
        return y

    return run


def wide_range(dtype, n):
    x = torch.zeros(n)
    x[0], x[16], x[32], x[48] = 1e9, 40, -1e9, 40
    return {"x": x.to(dtype)}


for fault, kind, tensor in (
    ("load, add, store", "race", "y_ptr"),
    ("all store", "race", "y_ptr"),
    ("first one clears", "race", "y_ptr"),
    ("counts, but does not wait", "race", "lock_ptr"),
    ("unlocks too early", "race", "y_ptr"),
    ("waits for the last program", "deadlock", "lock_ptr"),
):
    add(fault, kind, total_kernel, total(fault), tensor, reference=lambda x: x.sum().reshape(1))
add(
    "adds to what nobody has written",
    "uninitialised read",
    total_kernel,
    total("", written=False),
    "y_ptr",
    reference=lambda x: x.sum().reshape(1),
)
add(
    "sum that depends on the order",
    "order of programs",
    total_kernel,
    total(""),
    "result",
    reference=lambda x: x.sum().reshape(1),
    inputs=wide_range,
    shapes=[{"n": 64}],
)


@triton.jit
def shift_kernel(x_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i + 1, mask=i + 1 < n, other=0.0)
    tl.store(x_ptr + i, x, mask=i < n)


def shifted(x):
    y = x.clone()
    shift_kernel[(3,)](y, y.numel(), BLOCK=16)
    return y


add(
    "reads what another program writes",
    "race",
    shift_kernel,
    shifted,
    "x_ptr",
    reference=lambda x: torch.cat([x[1:], x[:1] * 0]),
)

# ---- matrix products


@triton.jit
def product_kernel(a_ptr, b_ptr, bias_ptr, c_ptr, K, N, FAULT: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    last = K
    if FAULT == "tail left out":
        last = K // BLOCK * BLOCK
    for first in range(0, last, BLOCK):
        inner = first + tl.arange(0, BLOCK)
        below = K
        if FAULT == "tail of the next row":
            below = K + BLOCK
        a = tl.load(a_ptr + row * K + inner[None, :], mask=inner[None, :] < below, other=0.0)
        b_mask = (inner[:, None] < K) & (column < N)
        b = tl.load(b_ptr + inner[:, None].to(tl.int64) * N + column, mask=b_mask, other=0.0)
        if FAULT == "transposed":
            b = tl.trans(b)
        if FAULT == "sum in 16 bits":
            acc = (acc + tl.dot(a, b)).to(tl.bfloat16).to(tl.float32)
        elif FAULT == "two dots":
            acc = tl.dot(a, b, acc)
            acc = tl.dot(a, b * 0.0, acc)
        else:
            acc = tl.dot(a, b, acc)
    if FAULT == "bias by row":
        acc += tl.load(bias_ptr + row % N).to(tl.float32)
    else:
        acc += tl.load(bias_ptr + column, mask=column < N, other=0.0).to(tl.float32)
    tl.store(c_ptr + row * N + column, acc.to(c_ptr.dtype.element_ty), mask=column < N)


def product(fault):
    def run(a, b, bias):
        c = torch.empty(len(a), b.shape[1], dtype=a.dtype)
        product_kernel[(len(a) // 16,)](
            a, b, bias, c, a.shape[1], b.shape[1], FAULT=fault, BLOCK=16
        )
        return c

    return run


def matrices(dtype, M, K, N):
    sizes = {"a": (M, K), "b": (K, N), "bias": (N,)}
    return {name: torch.randn(size).to(dtype) for name, size in sizes.items()}


for fault, kind, dtype in (
    ("tail left out", "wrong result", "fp32"),
    ("tail of the next row", "out of bounds", "fp32"),
    ("transposed", "wrong result", "fp32"),
    ("sum in 16 bits", "lint sixteen-bit-accumulation", "bf16"),
    ("two dots", "lint two-dots-one-accumulator", "fp32"),
    ("bias by row", "wrong result", "fp32"),
):
    add(
        fault,
        kind,
        product_kernel,
        product(fault),
        reference=lambda a, b, bias: a @ b + bias,
        inputs=matrices,
        shapes=[{"M": 32, "K": 40, "N": 13}],
        dtypes=[dtype],
    )

# ---- LayerNorm


@triton.jit
def norm_kernel(x_ptr, y_ptr, share_ptr, T, N, FAULT: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    for row in range(tl.program_id(0), T, tl.num_programs(0)):
        place = tl.cast(row, tl.int64) * N + column
        x = tl.load(x_ptr + place, mask=column < N, other=0.0).to(tl.float32)
        count = N
        if FAULT == "mean over the block":
            count = BLOCK
        mean = tl.sum(x, 0) / count
        centered = tl.where(column < N, x - mean, 0.0)
        if FAULT == "variance of masked lanes":
            centered = x - mean
        variance = tl.sum(centered * centered, 0) / N
        if FAULT == "difference of squares":
            variance = tl.sum(x * x, 0) / N - mean * mean
        eps = 1e-5
        if FAULT == "no eps":
            eps = 0.0
        y = centered * tl.rsqrt(variance + eps)
        tl.store(y_ptr + place, y, mask=column < N)
        if FAULT == "sum in memory of 16 bits":
            before = tl.load(share_ptr + column, mask=column < N, other=0.0)
            tl.store(share_ptr + column, before + y, mask=column < N)


def normed(fault):
    def run(x):
        y, share = torch.empty_like(x), x.new_zeros(x.shape[1])
        norm_kernel[(1,)](x, y, share, *x.shape, FAULT=fault, BLOCK=64)
        return (y, share) if fault == "sum in memory of 16 bits" else y

    return run


def far_from_zero(dtype, rows, columns):
    return {"x": (torch.randn(rows, columns) + 3000).to(dtype)}


def constant_row(dtype, rows, columns):
    x = torch.randn(rows, columns)
    x[0] = 2.5
    return {"x": x.to(dtype)}


def layer_norm(x):
    return torch.nn.functional.layer_norm(x, x.shape[1:])


for fault, kind, more in (
    ("mean over the block", "wrong result", {}),
    ("variance of masked lanes", "wrong result", {}),
    ("difference of squares", "wrong result", {"inputs": far_from_zero}),
    ("no eps", "wrong result", {"inputs": constant_row}),
    (
        "sum in memory of 16 bits",
        "lint sixteen-bit-accumulation",
        {"dtypes": ["bf16"], "reference": lambda x: (layer_norm(x), layer_norm(x).sum(0))},
    ),
):
    add(
        fault,
        kind,
        norm_kernel,
        normed(fault),
        **{
            "reference": layer_norm,
            "inputs": normal("x"),
            "shapes": [{"rows": 5, "columns": 50}],
            **more,
        },
    )

# ---- large sizes


@triton.jit
def far_kernel(x_ptr, y_ptr, stride, n, FAULT: tl.constexpr, BLOCK: tl.constexpr):
    if FAULT == "offset of 32 bits":
        row, column = tl.program_id(0), tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row * stride + column)
        tl.store(y_ptr + row.to(tl.int64) * stride + column, x)
    else:
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        tl.store(y_ptr + i, tl.load(x_ptr + i, mask=i < n, other=0.0), mask=i < n)


def far(fault):
    def run(x):
        y = torch.empty_like(x)
        far_kernel[(x.numel() // 16,)](x, y, 16, x.numel(), FAULT=fault, BLOCK=16)
        return y

    return run


for fault in ("offset of 32 bits", "index of 32 bits"):
    add(
        fault,
        "32-bit overflow",
        far_kernel,
        far(fault),
        reference=lambda x: x.clone(),
        shapes=[{"n": 32}],
        large=[{"n": 2**31 + 64}],
    )


@torch.library.custom_op("wrong_kernels::far", mutates_args=())
def registered(x: torch.Tensor) -> torch.Tensor:
    return far("index of 32 bits")(x)


registered.register_fake(torch.empty_like)
add(
    "index of 32 bits in a registered operator",
    "32-bit overflow",
    far_kernel,
    registered,
    reference=lambda x: x.clone(),
    shapes=[{"n": 32}],
    large=[{"n": 2**31 + 64}],
)

# ---- what shows in one of several runs only


@triton.autotune([triton.Config({"BLOCK": 16}), triton.Config({"BLOCK": 32})], key=["n"])
@triton.jit
def tuned_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n, other=0.0)
    tl.store(y_ptr + i, x * BLOCK / 16, mask=i < n)


def tuned(x):
    y = torch.empty_like(x)
    tuned_kernel[lambda meta: (triton.cdiv(x.numel(), meta["BLOCK"]),)](x, y, x.numel())
    return y


add("second configuration", "wrong result", tuned_kernel.fn, tuned, "result", reference=torch.clone)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return doubled("")(x)

    @staticmethod
    def backward(ctx, dy):
        return doubled("")(dy)  # whatever its strides are


add(
    "gradient taken for contiguous",
    "out of bounds",
    double_kernel,
    Doubled.apply,
    "x_ptr",
    reference=lambda x: 2 * x,
)


@triton.jit
def exp_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n, other=0.0)
    tl.store(y_ptr + i, tl.where(x < -12, 0.0, tl.exp(x)), mask=i < n)


def exponential(x):
    y = torch.empty_like(x)
    exp_kernel[(triton.cdiv(x.numel(), 64),)](x, y, x.numel(), BLOCK=64)
    return y


add(
    "small elements",
    "wrong result",
    exp_kernel,
    exponential,
    "result",
    reference=torch.exp,
    inputs=lambda dtype, n: {"x": torch.linspace(-20, 10, n).to(dtype)},
    shapes=[{"n": 300}],
)


@triton.jit
def flag_kernel(flag_ptr, y_ptr):
    if tl.program_id(0) == 0:
        while tl.load(flag_ptr, volatile=True) == 0:
            pass
        tl.store(y_ptr, 1.0)
    else:
        tl.store(flag_ptr, 1)


def flagged(x):
    y = torch.empty(1)
    flag_kernel[(2,)](torch.zeros(1, dtype=torch.int32), y)
    return y


add(
    "waits for a store",
    "deadlock",
    flag_kernel,
    flagged,
    "flag_ptr",
    reference=lambda x: x,
    shapes=[{"n": 1}],
)


@triton.jit
def argmax_kernel(x_ptr, y_ptr, N, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * N + column, mask=column < N, other=-1.0)
    tl.store(y_ptr + row, tl.argmax(tl.where(column > 0, x, -1.0), 0))


def argmax(x):
    y = torch.empty(len(x), dtype=torch.int64)
    argmax_kernel[(len(x),)](x, y, x.shape[1], BLOCK=16)
    return y


add(
    "index among equals",
    "wrong result",
    argmax_kernel,
    argmax,
    "result",
    reference=lambda x: x.argmax(-1),
    inputs=lambda dtype, rows, columns: {"x": torch.randint(0, 3, (rows, columns)).to(dtype)},
    shapes=[{"rows": 90, "columns": 9}],
)

# ---- what inputs of the usual kind do not show


@triton.jit
def blocked_argmax_kernel(x_ptr, y_ptr, N, FAULT: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    largest, index = float("-inf"), 0
    for first in range(0, N, BLOCK):
        column = first + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row * N + column, mask=column < N, other=float("-inf"))
        of_block, place = tl.max(x, 0), first + tl.argmax(x, 0)
        later = of_block >= largest if FAULT else of_block > largest
        largest, index = tl.where(later, of_block, largest), tl.where(later, place, index)
    tl.store(y_ptr + row, index)


def blocked_argmax(fault: bool) -> Any:
    def run(x):
        y = torch.empty(len(x), dtype=torch.int64)
        blocked_argmax_kernel[(len(x),)](x, y, x.shape[1], fault, BLOCK=8)
        return y

    return run


add(
    "last of equals",
    "equal values",
    blocked_argmax_kernel,
    blocked_argmax(True),
    "result",
    reference=lambda x: x.argmax(-1),
    shapes=[{"rows": 4, "columns": 50}],
)


@triton.jit
def largest_kernel(x_ptr, y_ptr, N, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * N + column, mask=column < N, other=0.0)
    tl.store(y_ptr + row, tl.max(x, 0))


def largest(x):
    y = x.new_empty(len(x))
    largest_kernel[(len(x),)](x, y, x.shape[1], BLOCK=64)
    return y


add(
    "maximum with zeros",
    "wrong result",
    largest_kernel,
    largest,
    "result",
    reference=lambda x: x.amax(-1),
    shapes=[{"rows": 5, "columns": 50}],
)
add(
    "no maximum, usual inputs",
    "large values",
    softmax_kernel,
    softmax("no maximum"),
    "result",
    reference=lambda x: torch.softmax(x, -1),
    shapes=[{"rows": 3, "columns": 50}],
    dtypes=["fp16"],
    gradients=[],
)

# ---- what has gone wrong in the field


@triton.jit
def parts_kernel(a_ptr, b_ptr, bias_ptr, y_ptr, K, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(a_ptr + row * K + k, mask=k < K, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + row * K + k, mask=k < K, other=0.0).to(tl.float32)
    tl.atomic_add(y_ptr + row, tl.sum(a * b, 0) + tl.load(bias_ptr + row).to(tl.float32))


def by_parts(a, b, bias):
    (rows, K), y = a.shape, torch.zeros(len(a))
    parts_kernel[(rows, triton.cdiv(K, 32))](a, b, bias, y, K, BLOCK=32)
    return y


add(  # apple/ml-cross-entropy #52
    "bias in each part of a sum",
    "wrong result",
    parts_kernel,
    by_parts,
    "result",
    reference=lambda a, b, bias: (a * b).sum(-1) + bias,
    inputs=lambda dtype, rows, K: (
        normal("a", "b")(dtype, r=rows, k=K) | normal("bias")(dtype, r=rows)
    ),
    shapes=[{"rows": 3, "K": 50}],
)


@triton.jit
def atomic_rows_kernel(x_ptr, y_ptr, N, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * N + column, mask=column < N)
    tl.atomic_add(y_ptr + column, x, mask=column < N)


def atomic_rows(x, deterministic=True):  # which nobody reads: Dao-AILab/flash-attention #746
    y = x.new_zeros(x.shape[1])
    atomic_rows_kernel[(len(x),)](x, y, x.shape[1], BLOCK=32)
    return y


add(
    "promise of an order that is not kept",
    "order of programs",
    atomic_rows_kernel,
    atomic_rows,
    "result",
    reference=lambda x: x.sum(0),
    shapes=[{"rows": 20, "columns": 20}],
)
add(
    "atomic additions in 16 bits",
    "lint sixteen-bit-accumulation",
    atomic_rows_kernel,
    atomic_rows,
    reference=lambda x: x.sum(0),
    shapes=[{"rows": 9, "columns": 20}],
    dtypes=["bf16"],
)


@triton.jit
def in_turn_kernel(x_ptr, y_ptr, turn_ptr, n, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    i = program * BLOCK + tl.arange(0, BLOCK)
    total = tl.sum(tl.load(x_ptr + i, mask=i < n, other=0.0).to(tl.float32), 0)
    while tl.atomic_add(turn_ptr, 0, sem="relaxed") != program:
        pass
    tl.store(y_ptr, tl.load(y_ptr) + total)
    tl.atomic_add(turn_ptr, 1, sem="relaxed")


def in_turn(x):
    y, turn = torch.zeros(1), torch.zeros(1, dtype=torch.int32)
    in_turn_kernel[(triton.cdiv(x.numel(), 16),)](x, y, turn, x.numel(), BLOCK=16)
    return y


add(  # the kind that Dao-AILab/flash-attention #2244 supposes
    "turns that order nothing",
    "race",
    in_turn_kernel,
    in_turn,
    "y_ptr",
    reference=lambda x: x.sum().reshape(1),
)


def chunks(x, w, rows=8):
    """Logits by chunks of rows; their squares' gradient is summed in the dtype of w."""

    class Chunked(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, w):
            zero, dw = w.new_zeros(len(w)), torch.zeros_like(w)
            total = torch.zeros(())
            for part in x.split(rows):
                logits = w.new_empty(len(part), len(w))
                for first in range(0, len(part), 16):
                    block = part[first : first + 16]
                    padded = torch.cat([block, block.new_zeros(16 - len(block), x.shape[1])])
                    out = w.new_empty(16, len(w))
                    product_kernel[(1,)](
                        *(padded, w.t().contiguous(), zero, out, x.shape[1], len(w)),
                        FAULT="",
                        BLOCK=16,
                    )
                    logits[first : first + 16] = out[: len(block)]
                total += (logits.float() ** 2).sum() / 2
                dw += logits.t() @ part
            ctx.save_for_backward(dw)
            return total

        @staticmethod
        def backward(ctx, dy):
            return None, ctx.saved_tensors[0] * dy.to(w.dtype)

    return Chunked.apply(x, w)


def squares(x, w):
    logits = x @ w.t()
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return (wide**2).sum() / 2


add(  # linkedin/Liger-Kernel #512
    "gradient summed in 16 bits by torch",
    "wrong result",
    product_kernel,
    chunks,
    "dw",
    reference=squares,
    inputs=lambda dtype, T, K, N: {
        "x": (1 + torch.randn(T, K)).to(dtype),
        "w": torch.rand(N, K).to(dtype),
    },
    shapes=[{"T": 512, "K": 16, "N": 16}],
    dtypes=["bf16"],
    gradients=["w"],
)


@torch.library.triton_op("wrong_kernels::far_by_triton_op", mutates_args=())
def by_triton_op(x: torch.Tensor) -> torch.Tensor:
    y = torch.empty_like(x)
    kernel = torch.library.wrap_triton(far_kernel)
    kernel[(x.numel() // 16,)](x, y, 16, x.numel(), FAULT="index of 32 bits", BLOCK=16)
    return y


@triton.jit
def far_backward_kernel(dy_ptr, dx_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(dx_ptr + i, tl.load(dy_ptr + i, mask=i < n, other=0.0), mask=i < n)


@torch.library.triton_op("wrong_kernels::far_backward_by_triton_op", mutates_args=())
def backward_by_triton_op(dy: torch.Tensor) -> torch.Tensor:
    dx = torch.empty_like(dy)
    torch.library.wrap_triton(far_backward_kernel)[(dy.numel() // 16,)](
        dy.contiguous(), dx, dy.numel(), BLOCK=16
    )
    return dx


by_triton_op.register_autograd(
    lambda ctx, dy: backward_by_triton_op(dy.contiguous()),
    setup_context=lambda ctx, inputs, output: None,
)
for name, kernel in (
    ("index of 32 bits in a triton_op", far_kernel),
    ("index of 32 bits in the backward pass of a dict", far_backward_kernel),
):
    add(
        name,
        "32-bit overflow",
        kernel,
        lambda x: {"y": by_triton_op(x)},
        reference=lambda x: x.clone(),
        shapes=[{"n": 32}],
        large=[{"n": 2**31 + 64}],
    )

# ---- what Triton's own interpreter, or numbers of the usual kind, do not show


@triton.jit
def decay(before, x):
    return before * 0.5 + x


@triton.jit
def decay_kernel(x_ptr, y_ptr, N: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    tl.store(y_ptr + place, tl.associative_scan(tl.load(x_ptr + place), 0, decay))


def decayed(x):
    y = torch.empty_like(x)
    decay_kernel[(len(x),)](x, y, N=x.shape[1])
    return y


def decayed_in_order(x):
    y = [x[:, 0]]
    for t in range(1, x.shape[1]):
        y.append(y[-1] * 0.5 + x[:, t])
    return torch.stack(y, 1)


add(
    "scan by a function that is not associative",
    "wrong result",
    decay_kernel,
    decayed,
    "result",
    reference=decayed_in_order,
    shapes=[{"rows": 2, "N": 16}],
)


@triton.jit
def later(a, b):
    return tl.where(b != 0, b, a)


@triton.jit
def last_kernel(x_ptr, y_ptr, N: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    x = tl.load(x_ptr + row * N + tl.arange(0, N))
    tl.store(y_ptr + row, tl.reduce(x, 0, later))


def last(x):
    y = x.new_empty(len(x))
    last_kernel[(len(x),)](x, y, N=x.shape[1])
    return y


add(
    "reduction by a function that is not commutative",
    "wrong result",
    last_kernel,
    last,
    "result",
    reference=lambda x: torch.stack([row[row != 0][-1] for row in x]),
    inputs=lambda dtype, rows, N: {
        "x": torch.randint(1, 9, (rows, N)) * (torch.arange(N) % 3 == 1)
    },
    shapes=[{"rows": 3, "N": 16}],
)


@triton.jit
def length_kernel(x_ptr, y_ptr, N: tl.constexpr, SIXTEEN: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    x = tl.load(x_ptr + place)
    square = x * x if SIXTEEN else x.to(tl.float32) * x.to(tl.float32)
    total = tl.sum(square.to(tl.float32), 0)
    tl.store(y_ptr + place, x.to(tl.float32) * tl.rsqrt(total + SIXTEEN * 1e-12))


def of_length_one(sixteen):
    def run(x):
        y = torch.empty_like(x)
        length_kernel[(len(x),)](x, y, N=x.shape[1], SIXTEEN=sixteen)
        return y

    return run


add(
    "nothing added to a sum that may be zero",
    "zeros",
    length_kernel,
    of_length_one(False),
    "result",
    reference=lambda x: torch.nn.functional.normalize(x, dim=-1),
    shapes=[{"rows": 3, "N": 16}],
)
add(
    "squares in 16 bits, in the second dtype",
    "large values",
    length_kernel,
    of_length_one(True),
    "result",
    reference=lambda x: torch.nn.functional.normalize(x, dim=-1),
    inputs=lambda dtype, rows, N: {"x": (4 * torch.randn(rows, N)).to(dtype)},
    shapes=[{"rows": 3, "N": 16}],
    dtypes=["fp32", "fp16"],
)


@triton.jit
def masked_softmax_kernel(x_ptr, keep_ptr, y_ptr, N: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    x = tl.where(tl.load(keep_ptr + place), tl.load(x_ptr + place), -float("inf"))
    e = tl.exp(x - tl.max(x, 0))
    tl.store(y_ptr + place, e / tl.sum(e, 0))


def masked_softmax(x, keep):
    y = torch.empty_like(x)
    masked_softmax_kernel[(len(x),)](x, keep, y, N=x.shape[1])
    return y


add(
    "row of which nothing is kept",
    "zeros",
    masked_softmax_kernel,
    masked_softmax,
    "result",
    reference=lambda x, keep: torch.where(keep, x, -1e30).softmax(-1) * keep,
    inputs=lambda dtype, rows, N: {
        "x": torch.randn(rows, N).to(dtype),
        "keep": torch.rand(rows, N) > 0.5,
    },
    shapes=[{"rows": 3, "N": 16}],
)


@triton.jit
def narrow_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i, mask=i < n).to(tl.float32) * 3, mask=i < n)


def narrowed(x):
    y = torch.empty_like(x)
    narrow_kernel[(triton.cdiv(x.numel(), 16),)](x, y, x.numel(), BLOCK=16)
    return y


add(
    "fp64 computed in fp32",
    "wrong result",
    narrow_kernel,
    narrowed,
    "result",
    reference=lambda x: x * 3,
    inputs=lambda dtype, n: {"x": torch.randn(n, dtype=torch.float64)},
)


@triton.jit
def flag_bytes_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    positive = tl.load(x_ptr + i, mask=i < n, other=0.0) > 0
    bytes_ptr = y_ptr.to(tl.pointer_type(tl.int8))
    tl.store(bytes_ptr + i, positive.to(tl.int8) * 2, mask=i < n)


def flag_bytes(x):
    y = torch.empty(x.shape, dtype=torch.bool)
    flag_bytes_kernel[(triton.cdiv(x.numel(), 16),)](x, y, x.numel(), BLOCK=16)
    return y


add(
    "bool of two",
    "wrong result",
    flag_bytes_kernel,
    flag_bytes,
    "result",
    reference=lambda x: x > 0,
)


@triton.jit
def rows_along_y_kernel(x_ptr, y_ptr, N: tl.constexpr):
    place = tl.program_id(1).to(tl.int64) * N + tl.arange(0, N)
    tl.store(y_ptr + place, tl.load(x_ptr + place))


def rows_along_y(x):
    y = torch.empty_like(x)
    rows_along_y_kernel[(1, len(x))](x, y, N=x.shape[1])
    return y


add(
    "a grid for few rows",
    "grid",
    rows_along_y_kernel,
    rows_along_y,
    reference=torch.clone,
    shapes=[{"rows": 3, "N": 16}],
    large=[{"rows": 2**16, "N": 16}],
)
