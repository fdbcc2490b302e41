"""`varlen_attention` on a CPU: batched matrix products of sequences of similar length.

A pack is split into a few groups (see `_groups`). Each is padded to its own longest sequence, so
that hardly anything is computed on padding, and the four products of a group are single calls. With
G a group, everything below is [H * B_G, n, ...], and c = 1 / probability to be kept:

    S = q k' * scale + mask      P = softmax(S)           D = P * keep      O = c D v
    dV = c D' dO                 P * dP = c D * (dO v')   dS = P * dP - P rowsum(P * dP)
    dQ = scale dS k              dK = scale dS' q

Half-precision inputs are promoted group by group: the products are a small part of a step, and
rounding P would cost accuracy. Saved for the backward pass: the padded q, k, v, P and D, so that
the mask is not needed again. The masks are those of `reference.py`.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastbert_kernels._dropout import keep_scale, row_seeds
from fastbert_kernels._dropout_cpu import keep_mask_cpu, stream_keys_cpu
from fastbert_kernels._function import Function, Gradients

# A group ends where a sequence is shorter than this share of its longest one: about seven groups
# for ordinary text.
_SHRINK = 0.85


class _Group(NamedTuple):
    """The rows of q and of k and v for the padded [B_G, n] of a group."""

    query_rows: Tensor  # int64 [B_G * n_q]; padding points at the spare row R
    query_padding: Tensor  # int64 [any]: which of them are padding
    key_rows: Tensor  # int64 [B_G * n_k]; padding points at the spare row T
    mask: Tensor  # [B_G, 1, n_k], 0 or -inf
    sequences: int


def _padded(starts: Tensor, lengths: Tensor, longest: int, spare: int) -> tuple[Tensor, Tensor]:
    columns = torch.arange(longest)
    outside = columns >= lengths[:, None]
    return (starts[:, None] + columns).masked_fill_(outside, spare).flatten(), outside


def _groups(cu_seqlens: Tensor, query_bounds: Tensor, rows: int, total: int) -> list[_Group]:
    starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
    query_starts, query_lengths = query_bounds[:-1].long(), query_bounds.diff().long()
    order = lengths.argsort(descending=True, stable=True)
    order = order[query_lengths[order] > 0]
    groups: list[_Group] = []
    remaining: list[int] = lengths[order].tolist()  # type: ignore[type-arg]
    first = 0
    while first < len(remaining):
        longest = remaining[first]
        last = first + 1
        while last < len(remaining) and remaining[last] >= _SHRINK * longest:
            last += 1
        members = order[first:last]
        key_rows, outside = _padded(starts[members], lengths[members], longest, total)
        most = int(query_lengths[members].max())
        query_rows, query_outside = _padded(
            query_starts[members], query_lengths[members], most, rows
        )
        mask = torch.zeros(outside.shape).masked_fill_(outside, float("-inf"))[:, None]
        groups.append(
            _Group(
                query_rows, query_outside.flatten().nonzero()[:, 0], key_rows, mask, last - first
            )
        )
        first = last
    return groups


def _take(x: Tensor, rows: Tensor, sequences: int, end: int) -> Tensor:
    """Gather rows of [T, H, K] as contiguous [H * B_G, n, K].

    The spare row is read as the row before `end`, the last one of a sequence. It is masked, but
    must be finite, which rows behind the last sequence need not be.
    """
    # Rows first, heads second: selecting from the transposed view would copy all of x for each
    # group.
    taken = x.index_select(0, rows.clamp(max=end - 1)).transpose(0, 1).contiguous()
    taken = taken.to(torch.promote_types(x.dtype, torch.float32))
    return taken.view(x.shape[1] * sequences, -1, x.shape[2])


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
        total = k.shape[0]
        query_bounds = (
            cu_seqlens
            if query_indices is None
            else torch.searchsorted(query_indices, cu_seqlens.to(query_indices.dtype))
        )
        groups = _groups(cu_seqlens, query_bounds, rows, total)
        query_end, end = int(query_bounds[-1]), int(cu_seqlens[-1])
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
        saved: list[Tensor] = []
        for group in groups:
            qg = _take(q, group.query_rows, group.sequences, query_end)
            kg, vg = (_take(x, group.key_rows, group.sequences, end) for x in (k, v))
            scores = torch.baddbmm(
                group.mask.to(qg.dtype).repeat(heads, 1, 1), qg, kg.transpose(1, 2), alpha=scale
            )
            weights = torch.softmax(scores, -1)
            if keys is not None:
                lo, hi = keys
                own = group.query_rows.clamp(max=query_end - 1)
                shape = (heads * group.sequences, qg.shape[1])
                kept = keep_mask_cpu(
                    lo.T[:, own].view(shape), hi.T[:, own].view(shape), kg.shape[1], dropout_p
                )
                dropped = torch.mul(weights, kept, out=scores)
                og = torch.bmm(dropped, vg).mul_(keep_scale(dropout_p))
            else:
                dropped = weights
                og = torch.bmm(weights, vg)
            saved += [qg, kg, vg, weights, dropped]
            out.transpose(0, 1).index_copy_(
                1, group.query_rows, og.view(heads, -1, size).to(out.dtype)
            )
        ctx.save_for_backward(*saved)
        ctx.groups, ctx.dropout_p, ctx.scale, ctx.total, ctx.query_end = (
            groups,
            dropout_p,
            scale,
            total,
            query_end,
        )
        out[query_end:] = 0
        return out[:rows]

    @staticmethod
    @once_differentiable
    @torch.autocast("cpu", enabled=False)  # pyright: ignore[reportUntypedFunctionDecorator]
    def backward(ctx: Any, dout: Tensor) -> Gradients:
        rows, heads, size = dout.shape
        dq = dout.new_zeros(rows + 1, heads, size)
        dk, dv = dout.new_zeros(2, ctx.total + 1, heads, size)
        for index, group in enumerate(ctx.groups):
            qg, kg, vg, weights, dropped = ctx.saved_tensors[5 * index : 5 * index + 5]
            dog = _take(dout, group.query_rows, group.sequences, ctx.query_end)
            # Padding repeats the last row of dout, and would add to dK and dV.
            if group.query_padding.numel():
                dog.view(heads, -1, size).index_fill_(1, group.query_padding, 0)
            if ctx.dropout_p > 0:
                dog *= keep_scale(ctx.dropout_p)
            dvg = torch.bmm(dropped.transpose(1, 2), dog)
            dscores = torch.bmm(dog, vg.transpose(1, 2)).mul_(dropped)
            dscores.addcmul_(weights, dscores.sum(-1, keepdim=True), value=-1)
            dqg = torch.bmm(dscores, kg).mul_(ctx.scale)
            dkg = torch.bmm(dscores.transpose(1, 2), qg).mul_(ctx.scale)
            for whole, rows_of, part in (
                (dq, group.query_rows, dqg),
                (dk, group.key_rows, dkg),
                (dv, group.key_rows, dvg),
            ):
                whole.transpose(0, 1).index_copy_(
                    1, rows_of, part.view(heads, -1, size).to(whole.dtype)
                )
        return dq[:rows], dk[: ctx.total], dv[: ctx.total], None, None, None, None, None, None


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
) -> Tensor:
    """Arguments and result as in `op.py`."""
    return _Attention.apply(
        q, k, v, cu_seqlens, dropout_p, dropout_seeds, dropout_stream, query_indices, scale
    )
