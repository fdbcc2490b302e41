"""`varlen_attention` on a CPU: batched matrix products of sequences of similar length.

A pack is split into a few groups (see `_groups`). Each is padded to its own longest sequence, so
that hardly anything is computed on padding, and the four products of a group are single calls. With
G a group, everything below is [H * B_G, n, ...], and c = 1 / probability to be kept:

    S = q k' * scale + mask      P = softmax(S)           D = P * keep      O = c D v
    dV = c D' dO                 P * dP = c D * (dO v')   dS = P * dP - P rowsum(P * dP)
    dQ = scale dS k              dK = scale dS' q

With a window, the queries of a sequence are cut into blocks, and each block with the keys it sees
takes the place of a sequence. A key belongs to up to three blocks, so the gradients of keys are
sums. Without a window, a sequence is one block.

Half-precision inputs are promoted group by group. On a processor with bf16 instructions, inputs in
bf16 are promoted for S and dP alone, whose rounding would show in every result. For the other four
products, where these are large, D and dS are rounded to bf16, which makes them two to four times as
fast. FlashAttention rounds the same factors. Saved for the backward pass: the padded q, k, v, P and
D, so that the mask is not needed again. The masks are those of `reference.py`.

Source of the rounding: Dao et al., 2022, their code.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastbert_kernels._dropout import keep_scale, row_seeds
from fastbert_kernels._dropout_cpu import keep_mask_cpu, stream_keys_cpu
from fastbert_kernels._function import Function, Gradients, backward_once
from fastbert_kernels._processor import has_bf16_instructions

# A group ends where a sequence is shorter than this share of its longest one: about seven groups
# for ordinary text.
_SHRINK = 0.85

# Queries of a block, at least. Smaller blocks have fewer pairs that are masked, but gather a key
# more often.
_BLOCK = 64

# Products of fewer multiplications stay in fp32, since oneDNN takes half a millisecond for each new
# shape.
_FEWEST_MULTIPLICATIONS = 1 << 25


class _Blocks(NamedTuple):
    """Queries that lie together, and the keys that they see; int64 [N] each."""

    query_starts: Tensor  # rows of q
    query_lengths: Tensor
    key_starts: Tensor  # rows of k and v
    key_lengths: Tensor
    first_columns: Tensor  # position of the first key in its sequence, a multiple of 16


class _Group(NamedTuple):
    """The rows of q and of k and v for the padded [B_G, n] of a group."""

    query_rows: Tensor  # int64 [B_G * n_q]; padding points at the spare row R
    query_padding: Tensor  # int64 [any]: which of them are padding
    key_rows: Tensor  # int64 [B_G * n_k]; padding points at the spare row T
    mask: Tensor  # [B_G, 1, n_k], or with a window [B_G, n_q, n_k]; 0 or -inf
    first_columns: Tensor  # int64 [B_G], as in _Blocks
    sequences: int


def _blocks(cu_seqlens: Tensor, query_indices: Tensor | None, window: int | None) -> _Blocks:
    starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
    first, last = torch.zeros_like(lengths), lengths  # of the queries of each block
    first_key, end_key = first, lengths
    if window is not None:
        size = -(-max(window, _BLOCK) // 16) * 16
        counts = -(-lengths // size)
        sequence = torch.repeat_interleave(torch.arange(len(lengths)), counts)
        block = torch.arange(len(sequence)) - (counts.cumsum(0) - counts)[sequence]
        starts, lengths = starts[sequence], lengths[sequence]
        first, last = block * size, torch.minimum((block + 1) * size, lengths)
        first_key = (first - window).clamp_(min=0) // 16 * 16  # where a dropout mask may begin
        end_key = torch.minimum(last + window, lengths)
    first, last = starts + first, starts + last
    if query_indices is not None:
        first, last = (torch.searchsorted(query_indices, x) for x in (first, last))
    return _Blocks(first, last - first, starts + first_key, end_key - first_key, first_key)


def _padded(starts: Tensor, lengths: Tensor, longest: int, spare: int) -> tuple[Tensor, Tensor]:
    columns = torch.arange(longest)
    outside = columns >= lengths[:, None]
    return (starts[:, None] + columns).masked_fill_(outside, spare), outside


def _groups(
    blocks: _Blocks, query_indices: Tensor | None, window: int | None, rows: int, total: int
) -> list[_Group]:
    order = blocks.key_lengths.argsort(descending=True, stable=True)
    order = order[blocks.query_lengths[order] > 0]
    groups: list[_Group] = []
    remaining: list[int] = blocks.key_lengths[order].tolist()  # type: ignore[type-arg]
    first = 0
    while first < len(remaining):
        longest = remaining[first]
        last = first + 1
        while last < len(remaining) and remaining[last] >= _SHRINK * longest:
            last += 1
        query_starts, query_lengths, key_starts, key_lengths, first_columns = (
            of_blocks[order[first:last]] for of_blocks in blocks
        )
        key_rows, outside = _padded(key_starts, key_lengths, longest, total)
        most = int(query_lengths.max())
        query_rows, query_outside = _padded(query_starts, query_lengths, most, rows)
        hidden = outside[:, None]
        if window is not None:
            tokens = query_rows.clamp(max=rows - 1)
            tokens = tokens if query_indices is None else query_indices[tokens]
            tokens = torch.where(query_outside, key_starts[:, None], tokens)  # padding sees a key
            hidden = hidden | ((tokens[:, :, None] - key_rows[:, None]).abs() > window)
        groups.append(
            _Group(
                query_rows.flatten(),
                query_outside.flatten().nonzero()[:, 0],
                key_rows.flatten(),
                torch.zeros(hidden.shape).masked_fill_(hidden, float("-inf")),
                first_columns,
                last - first,
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
    return taken.view(x.shape[1] * sequences, -1, x.shape[2])


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _product(a: Tensor, b: Tensor, factor: float) -> Tensor:
    """factor * a b, for a in fp32 or fp64 and b in any dtype; see the module about rounding."""
    large = a.numel() * b.shape[2] >= _FEWEST_MULTIPLICATIONS
    if large and b.dtype == torch.bfloat16 and has_bf16_instructions():
        a = a.to(b.dtype)
    else:
        b = _wide(b)
    result = a.new_empty(len(a), a.shape[1], b.shape[2])
    return result.baddbmm_(a, b, beta=0, alpha=factor)


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
        window: int | None,
    ) -> Tensor:
        rows, heads, size = q.shape
        total, query_end, end = k.shape[0], int(cu_seqlens[-1]), int(cu_seqlens[-1])
        if query_indices is not None:
            query_end = int(torch.searchsorted(query_indices, end))
        blocks = _blocks(cu_seqlens, query_indices, window)
        groups = _groups(blocks, query_indices, window, rows, total)
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
            qw, kw = _wide(qg), _wide(kg)
            scores = torch.baddbmm(
                group.mask.to(qw.dtype).repeat(heads, 1, 1), qw, kw.transpose(1, 2), alpha=scale
            )
            weights = torch.softmax(scores, -1)
            if keys is not None:
                own = group.query_rows.clamp(max=query_end - 1)
                shape = (heads, group.sequences, qg.shape[1])
                lo, hi = (x.T[:, own].view(shape) for x in keys)
                # The mask begins at the first column: 16 columns have 8 words (`_dropout.py`).
                hi = hi + lo * (group.first_columns // 2).to(torch.int32)[:, None]
                lo, hi = lo.flatten(0, 1), hi.flatten(0, 1)
                kept = keep_mask_cpu(lo, hi, kg.shape[1], dropout_p)
                dropped = torch.mul(weights, kept, out=scores)
            else:
                dropped = weights
            og = _product(dropped, vg, keep_scale(dropout_p))
            saved += [qg, kg, vg, weights, dropped]
            out.transpose(0, 1).index_copy_(
                1, group.query_rows, og.view(heads, -1, size).to(out.dtype)
            )
        ctx.save_for_backward(*saved)
        ctx.groups, ctx.dropout_p, ctx.scale, ctx.total, ctx.query_end, ctx.window = (
            groups,
            dropout_p,
            scale,
            total,
            query_end,
            window,
        )
        out[query_end:] = 0
        return out[:rows]

    @staticmethod
    @backward_once
    @torch.autocast("cpu", enabled=False)  # pyright: ignore[reportUntypedFunctionDecorator]
    def backward(ctx: Any, dout: Tensor) -> Gradients:
        rows, heads, size = dout.shape
        dq = dout.new_zeros(rows + 1, heads, size)
        dtype = dout.dtype
        if ctx.window is not None:  # sums, which are not rounded to 16 bits on the way
            dtype = torch.promote_types(dtype, torch.float32)
        dk, dv = dout.new_zeros(2, ctx.total + 1, heads, size, dtype=dtype)
        saved = ctx.saved_tensors  # once, as `torch.utils.checkpoint` demands
        for index, group in enumerate(ctx.groups):
            qg, kg, vg, weights, dropped = saved[5 * index : 5 * index + 5]
            dog = _take(dout, group.query_rows, group.sequences, ctx.query_end)
            # Padding repeats the last row of dout, and would add to dK and dV.
            if group.query_padding.numel():
                dog.view(heads, -1, size).index_fill_(1, group.query_padding, 0)
            factor = keep_scale(ctx.dropout_p)
            dvg = _product(dropped.transpose(1, 2), dog, factor)
            dscores = _product(_wide(dog), _wide(vg).transpose(1, 2), factor).mul_(dropped)
            dscores.addcmul_(weights, dscores.sum(-1, keepdim=True), value=-1)
            dqg = _product(dscores, kg, ctx.scale)
            dkg = _product(dscores.transpose(1, 2), qg, ctx.scale)
            for whole, rows_of, part in (
                (dq, group.query_rows, dqg),
                (dk, group.key_rows, dkg),
                (dv, group.key_rows, dvg),
            ):
                part = part.view(heads, -1, size).to(whole.dtype)
                if whole is dq or ctx.window is None:
                    whole.transpose(0, 1).index_copy_(1, rows_of, part)
                else:
                    whole.transpose(0, 1).index_add_(1, rows_of, part)
        dk, dv = (x[: ctx.total].to(dout.dtype) for x in (dk, dv))
        return dq[:rows], dk, dv, *(None,) * 7


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
    return _Attention.apply(q, k, v, cu_seqlens, *dropout, query_indices, scale, window)
