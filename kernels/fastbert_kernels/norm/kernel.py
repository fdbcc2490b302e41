"""Bias, dropout, residual and LayerNorm, one pass each way.

    z = residual + c (x + bias) * keep        c = 1 / probability to be kept
    mean = sum(z) / D        rstd = 1 / sqrt(sum((z - mean)^2) / D + eps)        h = (z - mean) rstd
    y = h * norm_weight + norm_bias, or h * norm_weight

    g = dy * norm_weight        dz = rstd (g - sum(g) / D - h sum(g h) / D)
    dresidual = dz        dx = c dz * keep
    dnorm_weight, dnorm_bias, dbias = sums over the rows of dy * h, dy, dx

Saved: x, bias, residual, which the rest of the step holds anyway, and mean and rstd of each row; z
and the mask are recomputed. Without dropout, dx and dresidual are the same and written once.

A program owns every n-th tile of BLOCK_T rows. It holds a row as a tuple of chunks of BLOCK_D
columns (`_rows.py`), each a 128-bit load of every thread of one or a few warps. At BERT-base's size
all sums along a row stay within a warp. The program reads bias, norm_weight and norm_bias once, and
adds up its share of their gradients in registers. The shares are written as fp32 [n, 3, D] and
added in one order, so the result is deterministic.

Source: Ba et al., 2016, equation 4.
"""

import torch
import triton
import triton.language as tl

from fastbert_kernels._dropout import keep_scale, threshold
from fastbert_kernels._launch import Kernel
from fastbert_kernels._rows import (
    columns,
    dropout,
    gradient,
    load_vector,
    load_z,
    mask_keys,
    plus,
    row_programs,
    statistics,
    store_share,
    times,
    zeros,
)


@triton.jit(do_not_specialize=["T", "dropout_stream", "threshold"])
def _forward_kernel(
    x_ptr,
    bias_ptr,
    residual_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    dropout_seeds_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    stride_x,
    stride_residual,
    T,
    eps,
    dropout_stream,
    threshold,
    scale,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    bias = load_vector(bias_ptr, D, BLOCK_D)
    norm_weight = load_vector(norm_weight_ptr, D, BLOCK_D)
    norm_bias = load_vector(norm_bias_ptr, D, BLOCK_D)

    for first in range(tl.program_id(0) * BLOCK_T, T, tl.num_programs(0) * BLOCK_T):
        keys = mask_keys(dropout_seeds_ptr, first + tl.arange(0, BLOCK_T), T, dropout_stream)
        row = (first + tl.arange(0, BLOCK_T)).to(tl.int64)[:, None]
        z = load_z(
            x_ptr,
            bias,
            residual_ptr,
            stride_x,
            stride_residual,
            row,
            T,
            keys,
            threshold,
            scale,
            D,
            BLOCK_D,
        )

        mean, rstd = statistics(z, eps, D, BLOCK_D)

        for i in tl.static_range(len(z)):
            column = columns(i, BLOCK_D)
            y = (z[i] - mean) * rstd * norm_weight[i]
            if len(norm_bias) > 0:
                y += norm_bias[i]
            tl.store(y_ptr + row * D + column, y, mask=(row < T) & (column < D))
        tl.store(mean_ptr + row, mean, mask=row < T)
        tl.store(rstd_ptr + row, rstd, mask=row < T)


_FORWARD = Kernel(_forward_kernel, "norm_forward", wide=("x_ptr", "residual_ptr"))


def forward(
    x, bias, residual, norm_weight, norm_bias, dropout_seeds, eps, dropout_p, dropout_stream
):
    """Return y, and mean and rstd, fp32 [T]."""
    T, D = x.shape
    y = x.new_empty(T, D)
    mean, rstd = x.new_empty(T, dtype=torch.float32), x.new_empty(T, dtype=torch.float32)
    if T and D:
        dropout_seeds = dropout_seeds if dropout_p > 0 else None
        strides = x.stride(0), 0 if residual is None else residual.stride(0)
        kernel = _FORWARD.prepare(
            x,
            D,
            (D,),
            strides,
            *(tensor is None for tensor in (bias, residual, norm_bias, dropout_seeds)),
        )
        kernel(
            (row_programs(kernel.tile, T, x.device),),
            (x, bias, residual, norm_weight, norm_bias, dropout_seeds, y, mean, rstd),
            (*strides, T, eps, dropout_stream, threshold(dropout_p), keep_scale(dropout_p)),
        )
    return y, mean, rstd


@triton.jit(do_not_specialize=["T", "dropout_stream", "threshold"])
def _backward_kernel(
    dy_ptr,
    x_ptr,
    bias_ptr,
    residual_ptr,
    norm_weight_ptr,
    dropout_seeds_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,
    dresidual_ptr,
    shares_ptr,
    stride_x,
    stride_residual,
    T,
    dropout_stream,
    threshold,
    scale,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    bias = load_vector(bias_ptr, D, BLOCK_D)
    norm_weight = load_vector(norm_weight_ptr, D, BLOCK_D)
    dnorm_weight, dnorm_bias, dbias = (
        zeros(D, BLOCK_T, BLOCK_D),
        zeros(D, BLOCK_T, BLOCK_D),
        zeros(D, BLOCK_T, BLOCK_D),
    )

    for first in range(tl.program_id(0) * BLOCK_T, T, tl.num_programs(0) * BLOCK_T):
        keys = mask_keys(dropout_seeds_ptr, first + tl.arange(0, BLOCK_T), T, dropout_stream)
        row = (first + tl.arange(0, BLOCK_T)).to(tl.int64)[:, None]
        mean = tl.load(mean_ptr + row, mask=row < T, other=0.0)
        rstd = tl.load(rstd_ptr + row, mask=row < T, other=0.0)
        z = load_z(
            x_ptr,
            bias,
            residual_ptr,
            stride_x,
            stride_residual,
            row,
            T,
            keys,
            threshold,
            scale,
            D,
            BLOCK_D,
        )
        dy = ()
        for i in tl.static_range(len(norm_weight)):
            column = columns(i, BLOCK_D)
            dy += (
                tl.load(dy_ptr + row * D + column, mask=(row < T) & (column < D), other=0.0).to(
                    tl.float32
                ),
            )

        h, dz = gradient(dy, z, norm_weight, mean, rstd, D)

        dx = ()
        for i in tl.static_range(len(dz)):
            column = columns(i, BLOCK_D)
            mask = (row < T) & (column < D)
            dx += (dropout(dz[i], keys, i, threshold, scale, BLOCK_D),)
            tl.store(dx_ptr + row * D + column, dx[i], mask=mask)
            if dresidual_ptr is not None:
                tl.store(dresidual_ptr + row * D + column, dz[i], mask=mask)
        dnorm_weight, dnorm_bias, dbias = (
            plus(dnorm_weight, times(dy, h)),
            plus(dnorm_bias, dy),
            plus(dbias, dx),
        )

    share_ptr = shares_ptr + tl.program_id(0) * 3 * D
    store_share(share_ptr, dnorm_weight, D, BLOCK_D)
    store_share(share_ptr + D, dnorm_bias, D, BLOCK_D)
    store_share(share_ptr + 2 * D, dbias, D, BLOCK_D)


_BACKWARD = Kernel(_backward_kernel, "norm_backward", wide=("x_ptr", "residual_ptr", "dy_ptr"))


def backward(
    dy, x, bias, residual, norm_weight, dropout_seeds, mean, rstd, dropout_p, dropout_stream
):
    """Return dx, dresidual, and dnorm_weight, dnorm_bias and dbias as the rows of [3, D].

    Where dresidual is the same as dx, an empty tensor takes its place.
    """
    T, D = x.shape
    dx = x.new_empty(T, D)
    differ = residual is not None and dropout_p > 0
    dresidual = x.new_empty((T, D) if differ else 0)
    if not (T and D):
        return dx, dresidual, x.new_zeros(3, D)
    dropout_seeds = dropout_seeds if dropout_p > 0 else None
    strides = x.stride(0), 0 if residual is None else residual.stride(0)
    kernel = _BACKWARD.prepare(
        x, D, (D,), strides, bias is None, residual is None, dropout_seeds is None
    )
    programs = row_programs(kernel.tile, T, x.device)
    shares = x.new_empty(programs, 3, D, dtype=torch.float32)
    kernel(
        (programs,),
        (
            dy,
            x,
            bias,
            residual,
            norm_weight,
            dropout_seeds,
            mean,
            rstd,
            dx,
            dresidual if differ else None,
            shares,
        ),
        (*strides, T, dropout_stream, threshold(dropout_p), keep_scale(dropout_p)),
    )
    return dx, dresidual, shares.sum(0).to(x.dtype)
