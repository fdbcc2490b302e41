"""GELU of the first half of each row times its second half, forward and backward, one pass each.

    z = x + bias        a, b = halves of z        Phi(a) and phi(a) as in `gelu/kernel.py`
    y = a Phi(a) b
    da = dy b (Phi(a) + a phi(a))        db = dy a Phi(a)
    dx = (da, db)        dbias = sum over rows of dx

Saved: x and bias, which the rest of the step holds anyway; z is recomputed. A program owns BLOCK_F
columns of both halves and every n-th tile of BLOCK_T rows, as in `gelu/kernel.py`. Without a bias,
nothing is added up.

Source: Shazeer, 2020, equation 6 (GEGLU), with the halves in the order of ModernBERT.
"""

import torch
import triton
import triton.language as tl

from fastbert_kernels._launch import Kernel
from fastbert_kernels._rows import column_programs, normal


@triton.jit
def _load_bias(bias_ptr, column, F):
    """Return the bias of both halves, [1, BLOCK_F]; zeros if there is none."""
    if bias_ptr is None:
        bias_a, bias_b = 0.0, 0.0
    else:
        bias_a = tl.load(bias_ptr + column, mask=column < F, other=0.0).to(tl.float32)
        bias_b = tl.load(bias_ptr + F + column, mask=column < F, other=0.0).to(tl.float32)
    return bias_a, bias_b


@triton.jit(do_not_specialize=["T"])
def _forward_kernel(
    x_ptr, bias_ptr, y_ptr, stride_x, T, F, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr
):
    column = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)[None, :]
    bias_a, bias_b = _load_bias(bias_ptr, column, F)

    for first in range(tl.program_id(1) * BLOCK_T, T, tl.num_programs(1) * BLOCK_T):
        row = (first + tl.arange(0, BLOCK_T)).to(tl.int64)[:, None]
        mask = (row < T) & (column < F)

        x = x_ptr + row * stride_x + column
        a = tl.load(x, mask=mask, other=0.0).to(tl.float32) + bias_a
        b = tl.load(x + F, mask=mask, other=0.0).to(tl.float32) + bias_b
        cdf, _ = normal(a)

        tl.store(y_ptr + row * F + column, a * cdf * b, mask=mask)


_FORWARD = Kernel(_forward_kernel, "geglu_forward", wide=("x_ptr",))


def forward(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    T, F, stride = x.shape[0], x.shape[1] // 2, x.stride(0)
    y = x.new_empty(T, F)
    if T and F:
        kernel = _FORWARD.prepare(x, F, (), F, stride, bias is None)
        kernel(column_programs(kernel.tile, T, F, x.device), (x, bias, y), (stride, T, F))
    return y


@triton.jit(do_not_specialize=["T"])
def _backward_kernel(
    dy_ptr,
    x_ptr,
    bias_ptr,
    dx_ptr,
    shares_ptr,
    stride_x,
    T,
    F,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    column = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)[None, :]
    bias_a, bias_b = _load_bias(bias_ptr, column, F)
    dbias_a = tl.zeros([BLOCK_T, BLOCK_F], tl.float32)
    dbias_b = tl.zeros([BLOCK_T, BLOCK_F], tl.float32)

    for first in range(tl.program_id(1) * BLOCK_T, T, tl.num_programs(1) * BLOCK_T):
        row = (first + tl.arange(0, BLOCK_T)).to(tl.int64)[:, None]
        mask = (row < T) & (column < F)

        dy = tl.load(dy_ptr + row * F + column, mask=mask, other=0.0).to(tl.float32)
        x = x_ptr + row * stride_x + column
        a = tl.load(x, mask=mask, other=0.0).to(tl.float32) + bias_a
        b = tl.load(x + F, mask=mask, other=0.0).to(tl.float32) + bias_b

        cdf, bell = normal(a)
        da = dy * b * (cdf + a * bell * 0.3989422804)  # 1 / sqrt(2 pi)
        db = dy * a * cdf
        if shares_ptr is not None:
            dbias_a += da  # of rows beyond T: nothing, as their dy is zero
            dbias_b += db

        dx = dx_ptr + row * (2 * F) + column
        tl.store(dx, da, mask=mask)
        tl.store(dx + F, db, mask=mask)

    if shares_ptr is not None:
        share = shares_ptr + tl.program_id(1) * (2 * F) + column
        tl.store(share, tl.sum(dbias_a, 0, keep_dims=True), mask=column < F)
        tl.store(share + F, tl.sum(dbias_b, 0, keep_dims=True), mask=column < F)


_BACKWARD = Kernel(_backward_kernel, "geglu_backward", wide=("dy_ptr", "x_ptr"))


def backward(
    dy: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return dx and dbias; without a bias, an empty tensor takes its place."""
    T, F, stride = x.shape[0], x.shape[1] // 2, x.stride(0)
    dx, columns = x.new_empty(T, 2 * F), 0 if bias is None else 2 * F
    if not (T and F):
        return dx, x.new_zeros(columns)
    kernel = _BACKWARD.prepare(x, F, (), F, stride, bias is None)
    programs = column_programs(kernel.tile, T, F, x.device)
    shares = x.new_empty(programs[1], columns, dtype=torch.float32)
    pointers = (dy, x, bias, dx, None if bias is None else shares)
    kernel(programs, pointers, (stride, T, F))
    return dx, shares.sum(0).to(x.dtype)
