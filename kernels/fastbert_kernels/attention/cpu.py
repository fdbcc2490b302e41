"""`varlen_attention` on a CPU: batched matrix products of sequences of similar length.

A pack is split into groups (see `_groups`). Each is padded to its own longest sequence, so that
hardly anything is computed on padding, and each product of a group is a single call. A group has so
few scores that they stay in the cache between two operations. With G a group, everything below is
[H * B_G, n, ...], and c = 1 / probability to be kept:

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

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastbert_kernels._dropout import keep_scale, row_seeds
from fastbert_kernels._dropout_cpu import keep_mask_cpu, stream_keys_cpu
from fastbert_kernels._function import Function, Gradients, backward_once
from fastbert_kernels.attention.products_cpu import (
    SCORES,
    dropped,
    factors,
    gradient_of_scores,
    product,
    wide,
)
from fastbert_kernels.attention.windowed_cpu import windowed

# A group ends where a sequence is shorter than this share of its longest one: about seven groups
# for ordinary text.
_SHRINK = 0.85

# Products of fewer multiplications stay in fp32, since oneDNN takes half a millisecond for each new
# shape.
_FEWEST_MULTIPLICATIONS = 1 << 25


class _Group(NamedTuple):
    """The rows of q and of k and v for the padded [B_G, n] of a group."""

    # A slice, or int64 [B_G * n]; padding points at the spare row R of q, or T of k and v.
    query_rows: Tensor | slice
    query_padding: Tensor  # int64 [any]: which of them are padding
    key_rows: Tensor | slice
    mask: Tensor | None  # [B_G, 1, n_k], 0 or -inf; None without padding
    sequences: int


def _padded(starts: Tensor, lengths: Tensor, spare: int) -> tuple[Tensor | slice, Tensor]:
    """Return the rows of a group, and which of them are padding, [B_G, n]."""
    columns = torch.arange(int(lengths.max()))
    outside = columns >= lengths[:, None]
    if len(starts) == 1:
        return slice(int(starts), int(starts + lengths)), outside
    return (starts[:, None] + columns).masked_fill_(outside, spare).flatten(), outside


def _groups(
    cu_seqlens: Tensor, query_indices: Tensor | None, rows: int, total: int, heads: int
) -> list[_Group]:
    bounds = cu_seqlens.long()
    query_bounds = bounds if query_indices is None else torch.searchsorted(query_indices, bounds)
    lengths, query_lengths = bounds.diff(), query_bounds.diff()
    order = lengths.argsort(descending=True, stable=True)
    order = order[query_lengths[order] > 0]
    groups: list[_Group] = []
    remaining: list[int] = lengths[order].tolist()  # type: ignore[type-arg]
    first = 0
    while first < len(remaining):
        longest = remaining[first]
        last, most = first + 1, SCORES // (heads * longest**2)
        while last < min(first + most, len(remaining)) and remaining[last] >= _SHRINK * longest:
            last += 1
        own = order[first:last]
        key_rows, outside = _padded(bounds[own], lengths[own], total)
        query_rows, query_outside = _padded(query_bounds[own], query_lengths[own], rows)
        mask = None
        if outside.any():
            mask = torch.zeros(len(own), 1, longest).masked_fill_(outside[:, None], float("-inf"))
        query_padding = query_outside.flatten().nonzero()[:, 0]
        groups.append(_Group(query_rows, query_padding, key_rows, mask, last - first))
        first = last
    return groups


def _take(x: Tensor, rows: Tensor | slice, sequences: int, end: int) -> Tensor:
    """Gather rows of [T, H, K] as contiguous [H * B_G, n, K].

    The spare row is read as the row before `end`, the last one of a sequence. It is masked, but
    must be finite, which rows behind the last sequence need not be.
    """
    # Rows first, heads second: selecting from the transposed view would copy all of x for each
    # group.
    taken = x[rows] if isinstance(rows, slice) else x.index_select(0, rows.clamp(max=end - 1))
    return taken.transpose(0, 1).contiguous().view(x.shape[1] * sequences, -1, x.shape[2])


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
        groups = _groups(cu_seqlens, query_indices, rows, total, heads)
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
        for group in groups:
            qg = _take(q, group.query_rows, group.sequences, query_end)
            kg, vg = (_take(x, group.key_rows, group.sequences, end) for x in (k, v))
            qw, kw, keep = wide(qg), wide(kg), None
            if group.mask is None:
                scores = product(qw, kw.transpose(1, 2), scale, qw.dtype)
            else:
                scores = group.mask.to(qw.dtype).repeat(heads, qg.shape[1], 1)
                scores.baddbmm_(qw, kw.transpose(1, 2), alpha=scale)
            if keys is not None:
                lo, hi = (
                    _take(x[..., None], group.query_rows, group.sequences, query_end) for x in keys
                )
                keep = keep_mask_cpu(lo[..., 0], hi[..., 0], kg.shape[1], dropout_p)
            dtype = factors(scores, vg, _FEWEST_MULTIPLICATIONS)
            weights = torch.softmax(scores, -1).to(dtype)
            saved += [qg, kg, vg, weights, keep]
            og = product(dropped(weights, keep), vg, keep_scale(dropout_p), dtype)
            _give(out, group.query_rows, og)
        ctx.save_for_backward(*saved)
        ctx.groups, ctx.dropout_p, ctx.scale = groups, dropout_p, scale
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
            dog = _take(dout, group.query_rows, group.sequences, ctx.query_end)
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
