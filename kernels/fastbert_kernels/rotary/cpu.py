"""`rotary_embedding` on a CPU: some tokens at a time, and one tensor for the packed gradient.

    q' = q [cos, cos] + [b, a] [-sin, sin]  for the halves a, b of q, and the same for k
    dq = the rotation of dq' by the opposite angle        dv is copied to its place

Saved: the positions and the table.
"""

from typing import Any

import torch
from torch import Tensor

from fastbert_kernels._function import Function, Gradients, backward_once

_TOKENS = 512  # at once, so that their fp32 copies stay in the cache


def _rotate(pairs: list[tuple[Tensor, Tensor]], ids: Tensor, table: Tensor, sign: int) -> None:
    """Write each first tensor [T, ..., K], rotated forward or backward, to the second."""
    for first in range(0, len(ids), _TOKENS):
        tokens = slice(first, first + _TOKENS)
        cos, sin = table.index_select(0, ids[tokens]).chunk(2, dim=-1)
        factors = torch.cat((cos, cos), -1), torch.cat((-sign * sin, sign * sin), -1)
        for x, out in pairs:
            wide = x[tokens].to(torch.promote_types(x.dtype, torch.float32))
            swapped = wide.roll(x.shape[-1] // 2, -1)
            cos, sin = (
                f.to(wide.dtype).view(-1, *(1,) * (x.dim() - 2), x.shape[-1]) for f in factors
            )
            out[tokens] = (wide * cos).addcmul_(swapped, sin)


class _Rotary(Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, position_ids: Tensor, table: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        qk = qkv.new_empty(qkv[:, :2].shape)
        _rotate([(qkv[:, :2], qk)], position_ids, table, 1)
        ctx.save_for_backward(position_ids, table)
        return qk[:, 0], qk[:, 1], qkv[:, 2]

    @staticmethod
    @backward_once
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> Gradients:
        position_ids, table = ctx.saved_tensors
        dqkv = dq.new_empty(dq.shape[0], 3, *dq.shape[1:])
        _rotate([(dq, dqkv[:, 0]), (dk, dqkv[:, 1])], position_ids, table, -1)
        dqkv[:, 2] = dv
        return dqkv, None, None


def cpu(qkv: Tensor, position_ids: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and result as in `op.py`."""
    return _Rotary.apply(qkv, position_ids, table)
