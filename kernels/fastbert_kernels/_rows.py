"""What kernels over rows share: LayerNorm's statistics and gradient, and GELU's functions.

A program of LayerNorm holds a row as a tuple of fp32 chunks [BLOCK_T, BLOCK_D], the last one padded
with zeros. D = 768 is three chunks of 256 columns with no lane idle, where a power of two would
waste a quarter of them.
"""

import torch
import triton
import triton.language as tl

from fastbert_kernels._triton import keep_mask, multiprocessors, stream_keys


def row_programs(tile: dict[str, int], rows: int, device: torch.device) -> int:
    """Return how many programs to launch for a number of rows.

    That is as many as run side by side, since more would only add shares of the gradients, but at
    most one for each tile of rows.
    """
    return min(tile["programs"] * multiprocessors(device), -(-rows // tile["BLOCK_T"]))


def column_programs(tile: dict[str, int], T: int, F: int, device: torch.device) -> tuple[int, int]:
    """Return the blocks of columns, and the shares of the rows.

    There are as many programs as run side by side; more would only add shares.
    """
    blocks = -(-F // tile["BLOCK_F"])
    shares = -(-tile["programs"] * multiprocessors(device) // blocks)
    return blocks, min(shares, -(-T // tile["BLOCK_T"]))


@triton.jit
def columns(i, BLOCK_D: tl.constexpr):
    """Return the columns of chunk i, [1, BLOCK_D]."""
    return i * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]


@triton.jit
def load_vector(ptr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Load a [D] tensor as chunks [1, BLOCK_D].

    Without a tensor, the result is an empty tuple, as the compiler takes no None inside a tuple.
    """
    chunks = ()
    if ptr is not None:
        for i in tl.static_range(triton.cdiv(D, BLOCK_D)):
            column = columns(i, BLOCK_D)
            chunks += (tl.load(ptr + column, mask=column < D, other=0.0).to(tl.float32),)
    return chunks


@triton.jit
def zeros(D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr):
    chunks = ()
    for _ in tl.static_range(triton.cdiv(D, BLOCK_D)):
        chunks += (tl.zeros([BLOCK_T, BLOCK_D], tl.float32),)
    return chunks


@triton.jit
def plus(total, chunks):
    more = ()
    for i in tl.static_range(len(total)):
        more += (total[i] + chunks[i],)
    return more


@triton.jit
def times(one, other):
    product = ()
    for i in tl.static_range(len(one)):
        product += (one[i] * other[i],)
    return product


@triton.jit
def row_sum(chunks):
    """Return the sum over all columns, [BLOCK_T, 1]."""
    total = chunks[0]
    for i in tl.static_range(1, len(chunks)):
        total += chunks[i]
    return tl.sum(total, 1, keep_dims=True)


@triton.jit
def mask_keys(dropout_seeds_ptr, row, T, dropout_stream):
    """Return the two mask keys of each row, [BLOCK_T]; an empty tuple without dropout."""
    if dropout_seeds_ptr is None:
        return ()
    else:
        return stream_keys(
            tl.load(dropout_seeds_ptr + row, mask=row < T, other=0).to(tl.uint64, bitcast=True),
            dropout_stream,
            0,
        )


@triton.jit
def dropout(x, keys, i, threshold, scale, BLOCK_D: tl.constexpr):
    """Drop elements of chunk i by the keys of `mask_keys`; without dropout, return x itself."""
    if len(keys) == 0:
        return x
    else:
        return tl.where(
            keep_mask(keys[0], keys[1], i * BLOCK_D, BLOCK_D, threshold), x * scale, 0.0
        )


@triton.jit
def load_z(
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
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Return residual + dropout(x + bias)."""
    z = ()
    for i in tl.static_range(triton.cdiv(D, BLOCK_D)):
        column = columns(i, BLOCK_D)
        mask = (row < T) & (column < D)
        chunk = tl.load(x_ptr + row * stride_x + column, mask=mask, other=0.0).to(tl.float32)
        if len(bias) > 0:
            chunk += bias[i]
        chunk = dropout(chunk, keys, i, threshold, scale, BLOCK_D)
        if residual_ptr is not None:
            chunk += tl.load(
                residual_ptr + row * stride_residual + column, mask=mask, other=0.0
            ).to(tl.float32)
        z += (chunk,)
    return z


@triton.jit
def statistics(z, eps, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Return mean and rstd of each row, [BLOCK_T, 1]."""
    mean = row_sum(z) / D
    squares = ()
    for i in tl.static_range(len(z)):
        centred = z[i] - mean
        if (i + 1) * BLOCK_D > D:  # the padding must not count: 0 - mean is not 0
            centred = tl.where(columns(i, BLOCK_D) < D, centred, 0.0)
        squares += (centred * centred,)
    return mean, tl.rsqrt(row_sum(squares) / D + eps)


@triton.jit
def gradient(dy, z, norm_weight, mean, rstd, D: tl.constexpr):
    """Return h and dz for z, with h = (z - mean) rstd and y = h * norm_weight + norm_bias.

    The padding of dy is zero, so the padding of h does no harm.
    """
    h = ()
    for i in tl.static_range(len(z)):
        h += ((z[i] - mean) * rstd,)
    g = times(dy, norm_weight)
    mean_g = row_sum(g) / D
    mean_gh = row_sum(times(g, h)) / D
    dz = ()
    for i in tl.static_range(len(z)):
        dz += (rstd * (g[i] - mean_g - h[i] * mean_gh),)
    return h, dz


@triton.jit
def store_share(ptr, chunks, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Store the sums over the rows to a [D] tensor."""
    for i in tl.static_range(len(chunks)):
        column = columns(i, BLOCK_D)
        tl.store(ptr + column, tl.sum(chunks[i], 0, keep_dims=True), mask=column < D)


@triton.jit
def normal(z):
    """Return Phi(z), and exp(-z^2 / 2) = sqrt(2 pi) phi(z)."""
    bell = tl.exp(-0.5 * z * z)
    t = 1.0 / (1.0 + 0.23164189 * tl.abs(z))  # 0.3275911 / sqrt(2)
    tail = (
        t
        * (
            0.127414796
            + t * (-0.142248368 + t * (0.7107068705 + t * (-0.7265760135 + t * 0.5307027145)))
        )
        * bell
    )
    return tl.where(z > 0, 1.0 - tail, tail), bell
