"""`varlen_attention` on a CPU: products of batches of similar length.

`groups_cpu.py` splits a pack into groups. Each product of a group is a single call, and a group has
so few scores that they stay in the cache between two operations. With G a group, everything below
is [H * B_G, n, ...], and c = 1 / probability to be kept:

    S = q k' * scale + mask      P = softmax(S)           D = P * keep      O = c D v
    dV = c D' dO                 dP = c keep * (dO v')    dS = P * dP - P rowsum(P * dP)
    dQ = scale dS k              dK = scale dS' q

`windowed_cpu.py` does the same with a window. Half-precision inputs are promoted group by group. On
a processor with bf16 instructions, inputs in bf16 are promoted for S alone, whose rounding would
make every result up to four times less exact. For the other five products, where these are large,
P and dS are rounded to bf16, which makes them two to four times as fast; FlashAttention rounds the
same factors. So is dP; all the same, the gradients are about as exact as those of torch's attention
for a CPU. Saved for the backward pass: the padded q, k, v, P and keep, so that the mask is not
needed again. The masks are those of `reference.py`.

Source of the rounding: Dao et al., 2022, their code.
"""

from typing import Any

import torch
from torch import Tensor

from fastbert_kernels._dropout import keep_scale, row_seeds
from fastbert_kernels._dropout_cpu import keep_mask_cpu, keys_from_column, stream_keys_cpu
from fastbert_kernels._function import Function, Gradients, backward_once
from fastbert_kernels._linear import FEWEST_MULTIPLICATIONS
from fastbert_kernels._processor import has_bf16_instructions
from fastbert_kernels.attention.groups_cpu import BIN, groups
from fastbert_kernels.attention.products_cpu import (
    dropped,
    factors,
    gradient_of_scores,
    product,
    wide,
)
from fastbert_kernels.attention.windowed_cpu import windowed

# Without such bins, products of fewer multiplications stay in fp32, since oneDNN takes half a
# millisecond for each new shape.
_FEWEST_IN_GROUPS = 1 << 25


def _bin_size(dtype: torch.dtype) -> int:
    """The tokens of a bin of several sequences; 0 where each sequence has its own."""
    return BIN if dtype == torch.bfloat16 and has_bf16_instructions() else 0


def _take(x: Tensor, rows: Tensor | slice, bins: int, end: int) -> Tensor:
    """Gather rows of [T, H, K] as contiguous [H * B_G, n, K].

    The spare row is read as the row before `end`, the last one of a sequence. It is masked, but
    must be finite, which rows behind the last sequence need not be.
    """
    # Rows first, heads second: selecting from the transposed view would copy all of x for each
    # group.
    taken = x[rows] if isinstance(rows, slice) else x.index_select(0, rows.clamp(max=end - 1))
    return taken.transpose(0, 1).contiguous().view(x.shape[1] * bins, -1, x.shape[2])


def _give(whole: Tensor, rows: Tensor | slice, part: Tensor) -> None:
    """Write [H * B_G, n, K] to rows of [T + 1, H, K]."""
    part = part.view(whole.shape[1], -1, whole.shape[2])
    if isinstance(rows, slice):
        whole[rows] = part.transpose(0, 1)
    else:
        whole.transpose(0, 1).index_copy_(1, rows, part.to(whole.dtype))


class _Attention(Function):
    @staticmethod
    # The inputs are cast already.
    @torch.autocast("cpu", enabled=False)  # pyright: ignore[reportUntypedFunctionDecorator]
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens: Tensor,
        dropout_p: float,
        dropout_seeds: Tensor | None,
        dropout_stream: int,
        query_indices: Tensor | None,
        scale: float,
    ) -> Tensor:
        rows, heads, size = q.shape
        total, query_end, end = k.shape[0], int(cu_seqlens[-1]), int(cu_seqlens[-1])
        if query_indices is not None:
            query_end = int(torch.searchsorted(query_indices, end))
        bin_size = _bin_size(q.dtype)
        split = groups(cu_seqlens, query_indices, rows, total, heads, bin_size, dropout_p > 0)
        keys = None
        if dropout_p > 0:
            assert dropout_seeds is not None  # check_dropout
            token_seeds = row_seeds(dropout_seeds, cu_seqlens, total)
            keys = stream_keys_cpu(
                token_seeds if query_indices is None else token_seeds[query_indices],
                dropout_stream,
                heads,
            )
        out = q.new_empty(rows + 1, heads, size)  # one spare row takes what padding writes
        saved: list[Tensor | None] = []
        for group in split:
            qg = _take(q, group.query_rows, group.bins, query_end)
            kg, vg = (_take(x, group.key_rows, group.bins, end) for x in (k, v))
            qw, kw, keep = wide(qg), wide(kg), None
            if group.mask is None:
                scores = product(qw, kw.transpose(1, 2), scale, qw.dtype)
            else:
                mask = group.mask.to(qw.dtype).expand(-1, qg.shape[1], -1)
                scores = mask.repeat(heads, 1, 1)
                scores.baddbmm_(qw, kw.transpose(1, 2), alpha=scale)
            if keys is not None:
                lo, hi = (
                    _take(x[..., None], group.query_rows, group.bins, query_end) for x in keys
                )
                lo, hi = lo[..., 0], hi[..., 0]
                if group.first_columns is not None:
                    first = group.first_columns.view(group.bins, -1).repeat(heads, 1)
                    hi = keys_from_column(lo, hi, first)
                keep = keep_mask_cpu(lo, hi, kg.shape[1], dropout_p)
            fewest = FEWEST_MULTIPLICATIONS if group.several else _FEWEST_IN_GROUPS
            dtype = factors(scores, vg, fewest)
            weights = torch.softmax(scores, -1).to(dtype)
            saved += [qg, kg, vg, weights, keep]
            og = product(dropped(weights, keep), vg, keep_scale(dropout_p), dtype)
            _give(out, group.query_rows, og)
        ctx.save_for_backward(*saved)
        ctx.groups, ctx.dropout_p, ctx.scale = split, dropout_p, scale
        ctx.total, ctx.query_end = total, query_end
        out[query_end:] = 0
        return out[:rows]

    @staticmethod
    @backward_once
    @torch.autocast("cpu", enabled=False)  # pyright: ignore[reportUntypedFunctionDecorator]
    def backward(ctx: Any, dout: Tensor) -> Gradients:
        rows, heads, size = dout.shape
        dq = dout.new_zeros(rows + 1, heads, size)
        dk, dv = dout.new_zeros(2, ctx.total + 1, heads, size)
        factor, scale = keep_scale(ctx.dropout_p), ctx.scale
        saved = ctx.saved_tensors  # once, as `torch.utils.checkpoint` demands
        for index, group in enumerate(ctx.groups):
            qg, kg, vg, weights, keep = saved[5 * index : 5 * index + 5]
            dtype = weights.dtype
            dog = _take(dout, group.query_rows, group.bins, ctx.query_end)
            # Padding repeats the last row of dout, and would add to dK and dV.
            if group.query_padding.numel():
                dog.view(heads, -1, size).index_fill_(1, group.query_padding, 0)
            dvg = product(dropped(weights, keep).transpose(1, 2), dog, factor, dtype)
            _give(dv, group.key_rows, dvg)
            dscores = gradient_of_scores(dog, vg, weights, keep, factor)
            _give(dq, group.query_rows, product(dscores, kg, scale, dtype))
            _give(dk, group.key_rows, product(dscores.transpose(1, 2), qg, scale, dtype))
        return dq[:rows], dk[: ctx.total], dv[: ctx.total], *(None,) * 6


def cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float,
    dropout_seeds: Tensor | None,
    dropout_stream: int,
    query_indices: Tensor | None,
    scale: float,
    window: int | None,
) -> Tensor:
    """Arguments and result as in `op.py`."""
    dropout = dropout_p, dropout_seeds, dropout_stream
    if window is None or window >= max_seqlen - 1:
        return _Attention.apply(q, k, v, cu_seqlens, *dropout, query_indices, scale)
    if query_indices is None:
        return windowed(q, k, v, cu_seqlens, *dropout, scale, window)
    # Few models end with a local layer, so its blocks are computed for all queries.
    every = q.new_zeros(k.shape).index_copy(0, query_indices, q)
    out = windowed(every, k, v, cu_seqlens, *dropout, scale, window)
    return out.index_select(0, query_indices)
