"""Bias, dropout, residual and LayerNorm, one pass each way.

    z = residual + c (x + bias) * keep        c = 1 / probability to be kept
    mean = sum(z) / D        rstd = 1 / sqrt(sum((z - mean)^2) / D + eps)        h = (z - mean) rstd
    y = h * weight + shift

    g = dy * weight        dz = rstd (g - sum(g) / D - h sum(g h) / D)        dresidual = dz        dx = c dz * keep
    dweight, dshift, dbias = sums over the rows of dy * h, dy, dx

Saved: x, bias, residual, which the rest of the step holds anyway, and mean and rstd of each row; z and the mask are made anew.
Without dropout dx and dresidual are the same and written once.

A program owns every n-th tile of BLOCK_T rows, whole: it holds a row as chunks of BLOCK_D columns, one warp's worth of 128-bit
loads, so that D = 768 wastes no lane (a power of two would waste a quarter) and sums stay within a warp. It reads bias, weight and
shift once, and adds up its share of their gradients in registers, written as fp32 [n, 3, D] and added in one order.

Source: Ba et al., 2016, equation 4.
"""

import torch
import triton
import triton.language as tl

from fastbert_kernels._dropout import keep_scale, threshold
from fastbert_kernels._tiles import tile
from fastbert_kernels._triton import FUSE, Production, architecture, keep_mask, multiprocessors, site_keys

# Programs that a multiprocessor of sm_90 has the registers for, at D up to 1,024.
_RESIDENT = 3
_RESIDENT_BACKWARD = 2


@triton.jit
def _columns(i, BLOCK_D: tl.constexpr):
    return i * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]


@triton.jit
def _vector(ptr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """A [D] tensor as a tuple of chunks, fp32 [1, BLOCK_D], zero beyond D; of None if there is no such tensor."""
    chunks = ()
    for i in tl.static_range(tl.cdiv(D, BLOCK_D)):
        if ptr is None:
            chunks = chunks + (None,)
        else:
            column = _columns(i, BLOCK_D)
            chunks = chunks + (tl.load(ptr + column, mask=column < D, other=0.0).to(tl.float32),)
    return chunks


@triton.jit
def _zeros(D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr):
    chunks = ()
    for _ in tl.static_range(tl.cdiv(D, BLOCK_D)):
        chunks = chunks + (tl.zeros([BLOCK_T, BLOCK_D], tl.float32),)
    return chunks


@triton.jit
def _mask_keys(keys_ptr, row, T, site):
    """The two mask keys of each row; of row 0 beyond T, and without dropout None."""
    if keys_ptr is None:
        return None, None
    else:
        return site_keys(tl.load(keys_ptr + row, mask=row < T, other=0).to(tl.uint64, bitcast=True), site, 0)


@triton.jit
def _keep(lo, hi, i, BLOCK_D: tl.constexpr, threshold):
    if lo is None:
        return None
    else:
        return keep_mask(lo, hi, i * BLOCK_D, BLOCK_D, threshold)


@triton.jit
def _sum(x_ptr, bias, residual_ptr, keep, scale, x_offset, residual_offset, mask):
    """A chunk of z = residual + dropout(x + bias), fp32 [BLOCK_T, BLOCK_D]; zero where masked off."""
    z = tl.load(x_ptr + x_offset, mask=mask, other=0.0).to(tl.float32)
    if bias is not None:
        z += bias
    if keep is not None:
        z = tl.where(keep, z * scale, 0.0)
    if residual_ptr is not None:
        z += tl.load(residual_ptr + residual_offset, mask=mask, other=0.0).to(tl.float32)
    return z


@triton.jit(do_not_specialize=["T", "site", "threshold"])
def _forward_kernel(
    x_ptr,
    bias_ptr,
    residual_ptr,
    weight_ptr,
    shift_ptr,
    keys_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    stride_x,
    stride_residual,
    T,
    eps,
    site,
    threshold,
    scale,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    CHUNKS: tl.constexpr = tl.cdiv(D, BLOCK_D)
    bias, weight, shift = _vector(bias_ptr, D, BLOCK_D), _vector(weight_ptr, D, BLOCK_D), _vector(shift_ptr, D, BLOCK_D)

    for first in range(tl.program_id(0) * BLOCK_T, T, tl.num_programs(0) * BLOCK_T):
        row = (first + tl.arange(0, BLOCK_T)).to(tl.int64)[:, None]
        lo, hi = _mask_keys(keys_ptr, first + tl.arange(0, BLOCK_T), T, site)

        z = ()
        total = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
        for i in tl.static_range(CHUNKS):
            column = _columns(i, BLOCK_D)
            keep = _keep(lo, hi, i, BLOCK_D, threshold)
            offsets = row * stride_x + column, row * stride_residual + column
            chunk = _sum(x_ptr, bias[i], residual_ptr, keep, scale, offsets[0], offsets[1], (row < T) & (column < D))
            z = z + (chunk,)
            total += chunk
        mean = tl.sum(total, 1, keep_dims=True) / D

        total = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
        for i in tl.static_range(CHUNKS):
            centred = z[i] - mean
            if (i + 1) * BLOCK_D > D:
                centred = tl.where(_columns(i, BLOCK_D) < D, centred, 0.0)
            total += centred * centred
        rstd = tl.rsqrt(tl.sum(total, 1, keep_dims=True) / D + eps)

        for i in tl.static_range(CHUNKS):
            column = _columns(i, BLOCK_D)
            y = (z[i] - mean) * rstd * weight[i] + shift[i]
            tl.store(y_ptr + row * D + column, y, mask=(row < T) & (column < D))
        tl.store(mean_ptr + row, mean, mask=row < T)
        tl.store(rstd_ptr + row, rstd, mask=row < T)


@triton.jit(do_not_specialize=["T", "site", "threshold"])
def _backward_kernel(
    dy_ptr,
    x_ptr,
    bias_ptr,
    residual_ptr,
    weight_ptr,
    keys_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,
    dresidual_ptr,
    partials_ptr,
    stride_x,
    stride_residual,
    T,
    site,
    threshold,
    scale,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    CHUNKS: tl.constexpr = tl.cdiv(D, BLOCK_D)
    bias, weight = _vector(bias_ptr, D, BLOCK_D), _vector(weight_ptr, D, BLOCK_D)
    dweight, dshift, dbias = _zeros(D, BLOCK_T, BLOCK_D), _zeros(D, BLOCK_T, BLOCK_D), _zeros(D, BLOCK_T, BLOCK_D)

    for first in range(tl.program_id(0) * BLOCK_T, T, tl.num_programs(0) * BLOCK_T):
        row = (first + tl.arange(0, BLOCK_T)).to(tl.int64)[:, None]
        lo, hi = _mask_keys(keys_ptr, first + tl.arange(0, BLOCK_T), T, site)
        mean = tl.load(mean_ptr + row, mask=row < T, other=0.0)
        rstd = tl.load(rstd_ptr + row, mask=row < T, other=0.0)

        h, g = (), ()
        more_dweight, more_dshift = (), ()
        total_g = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
        total_gh = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
        for i in tl.static_range(CHUNKS):
            column = _columns(i, BLOCK_D)
            mask = (row < T) & (column < D)
            dy = tl.load(dy_ptr + row * D + column, mask=mask, other=0.0).to(tl.float32)
            keep = _keep(lo, hi, i, BLOCK_D, threshold)
            z = _sum(x_ptr, bias[i], residual_ptr, keep, scale, row * stride_x + column, row * stride_residual + column, mask)
            h = h + ((z - mean) * rstd,)
            g = g + (dy * weight[i],)
            total_g += g[i]
            total_gh += g[i] * h[i]
            more_dweight = more_dweight + (dweight[i] + dy * h[i],)
            more_dshift = more_dshift + (dshift[i] + dy,)
        dweight, dshift = more_dweight, more_dshift
        mean_g = tl.sum(total_g, 1, keep_dims=True) / D
        mean_gh = tl.sum(total_gh, 1, keep_dims=True) / D

        more_dbias = ()
        for i in tl.static_range(CHUNKS):
            column = _columns(i, BLOCK_D)
            mask = (row < T) & (column < D)
            dx = rstd * (g[i] - mean_g - h[i] * mean_gh)
            if dresidual_ptr is not None:
                tl.store(dresidual_ptr + row * D + column, dx, mask=mask)
            keep = _keep(lo, hi, i, BLOCK_D, threshold)
            if keep is not None:
                dx = tl.where(keep, dx * scale, 0.0)
            tl.store(dx_ptr + row * D + column, dx, mask=mask)
            more_dbias = more_dbias + (dbias[i] + dx,)
        dbias = more_dbias

    for i in tl.static_range(CHUNKS):
        column = _columns(i, BLOCK_D)
        share_ptr = partials_ptr + tl.program_id(0) * 3 * D + column
        tl.store(share_ptr, tl.sum(dweight[i], 0, keep_dims=True), mask=column < D)
        tl.store(share_ptr + D, tl.sum(dshift[i], 0, keep_dims=True), mask=column < D)
        tl.store(share_ptr + 2 * D, tl.sum(dbias[i], 0, keep_dims=True), mask=column < D)


def production() -> list[Production]:
    found = []
    for dtype, tensor in ((torch.bfloat16, "*bf16"), (torch.float32, "*fp32")):
        sizes = {"stride_x": "i32", "stride_residual": "i32", "T": "i32", "site":"i32", "threshold":"i32", "scale": "fp32", "eps": "fp32"}
        forward = dict.fromkeys(("x_ptr", "bias_ptr", "residual_ptr", "weight_ptr", "shift_ptr", "y_ptr"), tensor) | {"keys_ptr": "*i64", "mean_ptr": "*fp32", "rstd_ptr":"*fp32"} | sizes
        backward = dict.fromkeys(("dy_ptr", "x_ptr", "bias_ptr", "residual_ptr", "weight_ptr", "dx_ptr", "dresidual_ptr"), tensor) | {"keys_ptr": "*i64", "mean_ptr": "*fp32", "rstd_ptr":"*fp32", "partials_ptr": "*fp32"} | sizes
        for size in (768, 1024):
            aligned = ("stride_x", "stride_residual")
            found.append(Production(_forward_kernel, "norm_forward", size, dtype, forward | {"D": size}, aligned, ("x_ptr",)))
            found.append(Production(_backward_kernel, "norm_backward", size, dtype, backward | {"D": size}, aligned, ("x_ptr",)))
    return found
