"""Bias, dropout, residual stream and LayerNorm (pre-norm), one pass each way.

    s = residual + c (x + bias) * keep, rounded to its dtype        c = 1 / probability to be kept
    mean, rstd, h of s as in `norm/kernel.py`        y = h * norm_weight + norm_bias

    dz from dy as in `norm/kernel.py`        ds' = dz + ds, both gradients of s together
    dresidual = ds'        dx = c ds' * keep
    dnorm_weight, dnorm_bias, dbias = sums over the rows of dy * h, dy, dx

Saved: s, which the rest of the step holds anyway, and mean and rstd of each row. So the backward
pass reads one tensor where `norm/kernel.py` reads x and residual, and only dropout is recomputed.
y is the norm of the rounded sum, so h of the backward pass is that of the forward pass. Without
dropout, dx and dresidual are the same and written once.

Rows, tiles and shares are those of `norm/kernel.py`.

Source: Xiong et al., 2020 (pre-LN Transformer), section 3.1; Ba et al., 2016, equation 4.
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
    sum_ptr,
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
        s = ()
        for i in tl.static_range(len(z)):
            column = columns(i, BLOCK_D)
            rounded = z[i].to(sum_ptr.dtype.element_ty)
            tl.store(sum_ptr + row * D + column, rounded, mask=(row < T) & (column < D))
            s += (rounded.to(tl.float32),)

        mean, rstd = statistics(s, eps, D, BLOCK_D)

        for i in tl.static_range(len(s)):
            column = columns(i, BLOCK_D)
            y = (s[i] - mean) * rstd * norm_weight[i]
            if len(norm_bias) > 0:
                y += norm_bias[i]
            tl.store(y_ptr + row * D + column, y, mask=(row < T) & (column < D))
        tl.store(mean_ptr + row, mean, mask=row < T)
        tl.store(rstd_ptr + row, rstd, mask=row < T)


_FORWARD = Kernel(_forward_kernel, "add_norm_forward", wide=("x_ptr", "residual_ptr"))


def forward(
    x, bias, residual, norm_weight, norm_bias, dropout_seeds, eps, dropout_p, dropout_stream
):
    """Return y, the sum, and mean and rstd, fp32 [T]."""
    T, D = x.shape
    y, total = x.new_empty(T, D), x.new_empty(T, D)
    mean, rstd = x.new_empty(T, dtype=torch.float32), x.new_empty(T, dtype=torch.float32)
    if T and D:
        dropout_seeds = dropout_seeds if dropout_p > 0 else None
        strides = x.stride(0), residual.stride(0)
        kernel = _FORWARD.prepare(
            x, D, (D,), strides, *(tensor is None for tensor in (bias, norm_bias, dropout_seeds))
        )
        kernel(
            (row_programs(kernel.tile, T, x.device),),
            (x, bias, residual, norm_weight, norm_bias, dropout_seeds, y, total, mean, rstd),
            (*strides, T, eps, dropout_stream, threshold(dropout_p), keep_scale(dropout_p)),
        )
    return y, total, mean, rstd


@triton.jit
def _load(ptr, row, T, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Load rows of a contiguous [T, D] tensor as chunks."""
    chunks = ()
    for i in tl.static_range(triton.cdiv(D, BLOCK_D)):
        column = columns(i, BLOCK_D)
        mask = (row < T) & (column < D)
        chunks += (tl.load(ptr + row * D + column, mask=mask, other=0.0).to(tl.float32),)
    return chunks


@triton.jit(do_not_specialize=["T", "dropout_stream", "threshold"])
def _backward_kernel(
    dy_ptr,
    dsum_ptr,
    sum_ptr,
    norm_weight_ptr,
    dropout_seeds_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,
    dresidual_ptr,
    shares_ptr,
    T,
    dropout_stream,
    threshold,
    scale,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
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
        s, dy = _load(sum_ptr, row, T, D, BLOCK_D), _load(dy_ptr, row, T, D, BLOCK_D)

        h, dz = gradient(dy, s, norm_weight, mean, rstd, D)
        ds = plus(dz, _load(dsum_ptr, row, T, D, BLOCK_D))

        dx = ()
        for i in tl.static_range(len(ds)):
            column = columns(i, BLOCK_D)
            mask = (row < T) & (column < D)
            dx += (dropout(ds[i], keys, i, threshold, scale, BLOCK_D),)
            tl.store(dx_ptr + row * D + column, dx[i], mask=mask)
            if dresidual_ptr is not None:
                tl.store(dresidual_ptr + row * D + column, ds[i], mask=mask)
        dnorm_weight, dnorm_bias, dbias = (
            plus(dnorm_weight, times(dy, h)),
            plus(dnorm_bias, dy),
            plus(dbias, dx),
        )

    share_ptr = shares_ptr + tl.program_id(0) * 3 * D
    store_share(share_ptr, dnorm_weight, D, BLOCK_D)
    store_share(share_ptr + D, dnorm_bias, D, BLOCK_D)
    store_share(share_ptr + 2 * D, dbias, D, BLOCK_D)


_BACKWARD = Kernel(_backward_kernel, "add_norm_backward", wide=("dy_ptr", "dsum_ptr", "sum_ptr"))


def backward(dy, dsum, total, norm_weight, dropout_seeds, mean, rstd, dropout_p, dropout_stream):
    """Return dx, dresidual, and dnorm_weight, dnorm_bias and dbias as the rows of [3, D].

    Where dresidual is the same as dx, an empty tensor takes its place.
    """
    T, D = total.shape
    dx = total.new_empty(T, D)
    differ = dropout_p > 0
    dresidual = total.new_empty((T, D) if differ else 0)
    if not (T and D):
        return dx, dresidual, total.new_zeros(3, D)
    dropout_seeds = dropout_seeds if differ else None
    kernel = _BACKWARD.prepare(total, D, (D,), dropout_seeds is None)
    programs = row_programs(kernel.tile, T, total.device)
    shares = total.new_empty(programs, 3, D, dtype=torch.float32)
    read = (dy, dsum, total, norm_weight, dropout_seeds, mean, rstd)
    kernel(
        (programs,),
        (*read, dx, dresidual if differ else None, shares),
        (T, dropout_stream, threshold(dropout_p), keep_scale(dropout_p)),
    )
    return dx, dresidual, shares.sum(0).to(total.dtype)
