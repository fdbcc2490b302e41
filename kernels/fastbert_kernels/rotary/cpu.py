"""`rotary_embedding` on a CPU: rotations in place, and one tensor for the packed gradient.

    q' = (a cos - b sin, b cos + a sin) for the halves a, b of q, and the same for k
    dq = the rotation of dq' by the opposite angle        dv is copied to its place

Saved: the positions and the table.
"""

from typing import Any

import torch
from torch import Tensor

from fastbert_kernels._function import Function, Gradients, backward_once


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
    """Write x [T, H, K], rotated by angles [T, 1, K / 2], to `out`."""
    a, b = x.to(cos.dtype).chunk(2, dim=-1)
    first, second = out.chunk(2, dim=-1)
    first.copy_((a * cos).addcmul_(b, sin, value=-1))
    second.copy_((b * cos).addcmul_(a, sin))


def _angles(position_ids: Tensor, table: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    wide = torch.promote_types(dtype, torch.float32)
    return table.index_select(0, position_ids).to(wide)[:, None].chunk(2, dim=-1)


class _Rotary(Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, position_ids: Tensor, table: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        cos, sin = _angles(position_ids, table, qkv.dtype)
        q, k = (qkv.new_empty(qkv[:, 0].shape) for _ in range(2))
        _rotate(qkv[:, 0], cos, sin, q)
        _rotate(qkv[:, 1], cos, sin, k)
        ctx.save_for_backward(position_ids, table)
        return q, k, qkv[:, 2]

    @staticmethod
    @backward_once
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> Gradients:
        position_ids, table = ctx.saved_tensors
        cos, sin = _angles(position_ids, table, dq.dtype)
        dqkv = dq.new_empty(dq.shape[0], 3, *dq.shape[1:])
        _rotate(dq, cos, -sin, dqkv[:, 0])
        _rotate(dk, cos, -sin, dqkv[:, 1])
        dqkv[:, 2] = dv
        return dqkv, None, None


def cpu(qkv: Tensor, position_ids: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and result as in `op.py`."""
    return _Rotary.apply(qkv, position_ids, table)
