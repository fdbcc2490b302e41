"""The definition of `varlen_attention` in the plainest torch: one sequence after the other."""

import torch
from torch import Tensor

from fastbert_kernels._dropout import keep_mask, keep_scale, row_seeds, stream_keys


def reference(
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
    """dropout(softmax(q k' * scale)) v within each sequence, and zeros behind the last one.

    Arguments and result are as in `op.py`.
    """
    heads = q.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    keys = None
    if dropout_p > 0:
        assert dropout_seeds is not None  # check_dropout
        rows = row_seeds(dropout_seeds, cu_seqlens, k.shape[0])
        keys = stream_keys(
            rows if query_indices is None else rows[query_indices], dropout_stream, heads
        )
    bounds: list[int] = cu_seqlens.tolist()  # type: ignore[type-arg]
    query_bounds: list[int] = bounds
    if query_indices is not None:
        found = torch.searchsorted(query_indices, cu_seqlens.to(query_indices.dtype))
        query_bounds = found.tolist()  # type: ignore[type-arg]
    tokens = torch.arange(k.shape[0], device=k.device)
    outputs: list[Tensor] = []
    for start, end, first, last in zip(
        bounds[:-1], bounds[1:], query_bounds[:-1], query_bounds[1:], strict=True
    ):
        scores = torch.einsum("ihk,jhk->hij", q[first:last].to(wide), k[start:end].to(wide)) * scale
        if window is not None:
            asked = tokens[first:last] if query_indices is None else query_indices[first:last]
            distance = (asked[:, None] - tokens[start:end]).abs()
            scores = scores.masked_fill(distance > window, float("-inf"))
        weights = scores.softmax(-1)
        if keys is not None:
            lo, hi = keys
            kept = keep_mask(lo[first:last].T, hi[first:last].T, end - start, dropout_p)
            weights = weights * kept * keep_scale(dropout_p)
        outputs.append(torch.einsum("hij,jhk->ihk", weights, v[start:end].to(wide)))
    # So that each has a gradient, if only of zeros, where there is no sequence.
    nothing = [x[:0].to(wide) for x in (q, k, v)]
    rest = torch.zeros_like(q[query_bounds[-1] :], dtype=wide)
    return torch.cat([*nothing, *outputs, rest]).to(q.dtype)
