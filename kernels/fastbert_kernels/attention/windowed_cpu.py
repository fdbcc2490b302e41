"""`varlen_attention` with a window on a CPU: blocks of queries, each with the keys that it sees.

The tokens of a pack lie in one buffer for each head, whichever sequence they belong to. A block of
at least 64 queries sees its own rows of the buffer and those at most a window away on both sides:

    queries         [N, size, K]     rows  i size ... (i + 1) size
    keys, values    [N, n, K]        rows  i size - reach ... (i + 1) size + reach

Both are views, which overlap for the keys, so nothing is gathered. The mask hides other sequences
and what is outside the window. A key belongs to up to three blocks, so the gradients of keys and
values are sums. The operations are those of `cpu.py`, for some blocks of one head at a time.

A dropout mask may begin at every sixteenth column of a sequence (`_dropout.py`). With dropout, each
sequence therefore starts at a multiple of 16 rows of the buffer.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastbert_kernels._dropout import keep_scale, row_seeds
from fastbert_kernels._dropout_cpu import (
    COLUMNS,
    keep_mask_cpu,
    keys_from_column,
    stream_keys_cpu,
)
from fastbert_kernels._function import Function, Gradients, backward_once
from fastbert_kernels._linear import FEWEST_MULTIPLICATIONS
from fastbert_kernels.attention.products_cpu import (
    SCORES,
    dropped,
    factors,
    gradient_of_scores,
    product,
    wide,
)

_BLOCK = 64  # queries, at least


class _Layout(NamedTuple):
    """Where the tokens of a pack lie in the buffers."""

    size: int  # queries of a block
    reach: int  # keys on each side of a block
    end: int  # of the last sequence, in the pack
    rows: Tensor | slice  # of the tokens before `end` in the buffers of queries
    blocks: int  # N


def _layout(cu_seqlens: Tensor, window: int, aligned: bool) -> tuple[_Layout, Tensor, Tensor]:
    """Return also the mask, fp32 [N, size, n] of 0 or -inf, and the first columns.

    These are int64 [N, size]: the place of a block's first key in the sequence of each query.
    """
    starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
    end = int(cu_seqlens[-1])
    reach = -(-window // COLUMNS) * COLUMNS
    size = max(reach, _BLOCK)
    places, rows = starts, slice(0, end)
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    if aligned:
        room = -(-lengths // COLUMNS) * COLUMNS
        places = room.cumsum(0) - room
        rows = torch.arange(end) + (places - starts)[sequence]
    used = int(rows[-1]) + 1 if isinstance(rows, Tensor) else end
    blocks = -(-used // size)
    # Rows that hold no token see each other, so that no softmax is empty.
    queries = torch.full((blocks * size,), -1)
    queries[rows] = sequence
    keys = torch.nn.functional.pad(queries, (reach, reach), value=-2)
    hidden = queries.view(blocks, size, 1) != _of_blocks(keys, size, reach)[:, None]
    distance = torch.arange(size)[:, None] + reach - torch.arange(size + 2 * reach)
    hidden |= distance.abs() > window
    mask = torch.zeros(hidden.shape).masked_fill_(hidden, float("-inf"))
    first_columns = (torch.arange(blocks) * size - reach)[:, None] - places[queries].view(-1, size)
    return _Layout(size, reach, end, rows, blocks), mask, first_columns


def _of_blocks(x: Tensor, size: int, reach: int) -> Tensor:
    """View a buffer [N size + 2 reach, ...] as the keys of each block, [N, ..., n]."""
    return x.unfold(0, size + 2 * reach, size)


def _spread(x: Tensor, layout: _Layout, reach: int) -> Tensor:
    """Return the buffers [H, N size + 2 reach, ...] with the rows of x [T, H, ...]."""
    shape = layout.blocks * layout.size + 2 * reach, x.shape[1], *x.shape[2:]
    buffer = x.new_zeros(shape).transpose(0, 1).contiguous()
    buffer[:, reach : shape[0] - reach][:, layout.rows] = x[: layout.end].transpose(0, 1)
    return buffer


def _add(whole: Tensor, parts: Tensor, first: int, size: int) -> None:
    """Add [m, n, K] to the rows of `whole` that the keys of the blocks from `first` on have."""
    for column in range(0, parts.shape[1], size):
        part = parts[:, column : column + size]
        rows = whole[first * size + column :][: len(parts) * size]
        rows.view(len(parts), size, -1)[:, : part.shape[1]].add_(part)


class _Windowed(Function):
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
        scale: float,
        window: int,
    ) -> Tensor:
        total, heads, _ = q.shape
        layout, mask, first_columns = _layout(cu_seqlens, window, dropout_p > 0)
        blocks, size, reach = layout.blocks, layout.size, layout.reach
        q = _spread(q, layout, 0).view(heads, blocks, size, -1)
        k, v = _spread(k, layout, reach), _spread(v, layout, reach)
        keys = None
        if dropout_p > 0:
            assert dropout_seeds is not None  # check_dropout
            seeds = row_seeds(dropout_seeds, cu_seqlens, total)
            lo, hi = (
                _spread(x, layout, 0).view(heads, blocks, size)
                for x in stream_keys_cpu(seeds, dropout_stream, heads)
            )
            keys = lo, keys_from_column(lo, hi, first_columns)
        out = torch.empty_like(q)
        saved: list[Tensor | None] = [q, k, v]
        # As many blocks as have about the scores of a group in `cpu.py`.
        count = max(1, SCORES // (size * mask.shape[2]))
        parts = [slice(i, min(i + count, blocks)) for i in range(0, blocks, count)]
        ctx.parts = [(head, part) for head in range(heads) for part in parts]
        mask = mask.to(wide(q[:0]).dtype)
        for head, part in ctx.parts:
            kp = _of_blocks(wide(k[head]), size, reach)[part]
            vp = _of_blocks(v[head], size, reach)[part].transpose(1, 2)
            scores = torch.baddbmm(mask[part], wide(q[head, part]), kp, alpha=scale)
            keep = None
            if keys is not None:
                lo, hi = (x[head, part] for x in keys)
                keep = keep_mask_cpu(lo, hi, scores.shape[2], dropout_p)
            dtype = factors(scores, v, FEWEST_MULTIPLICATIONS)
            weights = torch.softmax(scores, -1).to(dtype)
            out[head, part] = product(dropped(weights, keep), vp, keep_scale(dropout_p), dtype)
            saved += [weights, keep]
        ctx.save_for_backward(*saved)
        ctx.layout, ctx.factor, ctx.scale = layout, keep_scale(dropout_p), scale
        return _collect(out.flatten(1, 2), layout, 0, total)

    @staticmethod
    @backward_once
    @torch.autocast("cpu", enabled=False)  # pyright: ignore[reportUntypedFunctionDecorator]
    def backward(ctx: Any, dout: Tensor) -> Gradients:
        q, k, v, *saved = ctx.saved_tensors  # once, as `torch.utils.checkpoint` demands
        layout, factor = ctx.layout, ctx.factor
        size, reach = layout.size, layout.reach
        dout_of = _spread(dout, layout, 0).view(q.shape)
        dq = torch.empty_like(q)
        # Sums, which are not rounded to 16 bits on the way; rows behind the keys are never read.
        dk, dv = wide(k[:0]).new_zeros(2, len(q), k.shape[1] + size, k.shape[2])
        for index, (head, part) in enumerate(ctx.parts):
            weights, keep = saved[2 * index : 2 * index + 2]
            dtype, scale = weights.dtype, ctx.scale
            kp, vp = (_of_blocks(x[head], size, reach)[part].transpose(1, 2) for x in (k, v))
            qp, dop = q[head, part], dout_of[head, part]
            dvp = product(dropped(weights, keep).transpose(1, 2), dop, factor, dtype)
            _add(dv[head], dvp, part.start, size)
            dscores = gradient_of_scores(dop, vp, weights, keep, factor)
            dq[head, part] = product(dscores, kp, scale, dtype)
            _add(dk[head], product(dscores.transpose(1, 2), qp, scale, dtype), part.start, size)
        gradients = dq.flatten(1, 2), dk, dv
        dq, dk, dv = (
            _collect(x, layout, before, len(dout)).to(dout.dtype)
            for x, before in zip(gradients, (0, reach, reach), strict=True)
        )
        return dq, dk, dv, *(None,) * 6


def _collect(buffer: Tensor, layout: _Layout, reach: int, total: int) -> Tensor:
    """Return [T, H, K] from buffers [H, ...], with zeros behind the last sequence."""
    result = buffer.new_zeros(total, len(buffer), buffer.shape[2])
    result[: layout.end] = buffer[:, reach:][:, layout.rows].transpose(0, 1)
    return result


def windowed(*arguments: Any) -> Tensor:
    """Those of `cpu.py` but for `max_seqlen` and `query_indices`, with an int as window."""
    return _Windowed.apply(*arguments)
