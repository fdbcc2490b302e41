"""`add_layer_norm` on a CPU: the masks of `_dropout_cpu.py`, and torch's own LayerNorm.

    s = residual + c (x + bias) * keep        y = LN(s)        c = 1 / probability to be kept
    ds' = LN'(dy) + ds        dresidual = ds'        dx = c ds' * keep
    dbias = sum over rows of dx

Saved for the backward pass: s, the mean and rstd of each row, and the mask.
"""

from typing import Any

import torch
from torch import Tensor

from fastbert_kernels._dropout import keep_scale
from fastbert_kernels._dropout_cpu import row_keep_mask_cpu
from fastbert_kernels._function import Function, Gradients, backward_once


class _AddLayerNorm(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        residual: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor | None,
        eps: float,
        dropout_p: float,
        dropout_seeds: Tensor | None,
        dropout_stream: int,
    ) -> tuple[Tensor, Tensor]:
        z, keep = x if bias is None else x + bias, None
        if dropout_p > 0:
            assert dropout_seeds is not None  # check_dropout
            keep = row_keep_mask_cpu(dropout_seeds, dropout_stream, x.shape[1], dropout_p)
            z = z * keep
        s = torch.add(residual, z, alpha=keep_scale(dropout_p))
        y, mean, rstd = torch.native_layer_norm(s, (s.shape[1],), norm_weight, norm_bias, eps)
        ctx.save_for_backward(s, mean, rstd, norm_weight, norm_bias, keep)
        ctx.dropout_p, ctx.has_bias = dropout_p, bias is not None
        return y, s

    @staticmethod
    @backward_once
    def backward(ctx: Any, dy: Tensor, dsum: Tensor) -> Gradients:
        s, mean, rstd, norm_weight, norm_bias, keep = ctx.saved_tensors
        dy = dy.contiguous()
        dz, _, _ = torch.ops.aten.native_layer_norm_backward(
            dy, s, (s.shape[1],), mean, rstd, norm_weight, norm_bias, [True, False, False]
        )
        # torch adds these two up one row after the other, as in `norm/cpu.py`.
        dnorm_weight = torch.sub(s, mean).mul_(rstd).mul_(dy).sum(0)
        dnorm_bias = None if norm_bias is None else dy.sum(0)
        ds = dz.add_(dsum)
        dx = ds if keep is None else (ds * keep).mul_(keep_scale(ctx.dropout_p))
        dbias = dx.sum(0) if ctx.has_bias else None
        return dx, dbias, ds, dnorm_weight, dnorm_bias, *(None,) * 4


def cpu(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Arguments and result as in `op.py`."""
    return _AddLayerNorm.apply(*arguments)
