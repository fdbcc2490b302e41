"""`dropout_add_layer_norm` on a CPU: the masks of `_dropout_cpu.py`, and torch's own LayerNorm.

    z = residual + c (x + bias) * keep        y = LN(z)        c = 1 / probability to be kept
    dz = LN'(dy)        dresidual = dz        dx = c dz * keep        dbias = sum over rows of dx

Saved for the backward pass: z, the mean and rstd of each row, and the mask.
"""

from typing import Any

import torch
from torch import Tensor

from fastbert_kernels._dropout import keep_scale
from fastbert_kernels._dropout_cpu import row_keep_mask_cpu
from fastbert_kernels._function import Function, Gradients, backward_once


class _DropoutAddLayerNorm(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        norm_weight: Tensor,
        norm_bias: Tensor | None,
        eps: float,
        dropout_p: float,
        dropout_seeds: Tensor | None,
        dropout_stream: int,
    ) -> Tensor:
        z = x if bias is None else x + bias
        keep = None
        if dropout_p > 0:
            assert dropout_seeds is not None  # check_dropout
            keep = row_keep_mask_cpu(dropout_seeds, dropout_stream, x.shape[1], dropout_p)
            z = torch.mul(z, keep, out=z if z is not x else None)
            z = (
                z.mul_(keep_scale(dropout_p))
                if residual is None
                else torch.add(residual, z, alpha=keep_scale(dropout_p), out=z)
            )
        elif residual is not None:
            z = z + residual
        y, mean, rstd = torch.native_layer_norm(z, (x.shape[1],), norm_weight, norm_bias, eps)
        ctx.save_for_backward(z, mean, rstd, norm_weight, norm_bias, keep)
        ctx.dropout_p, ctx.has_bias, ctx.has_residual = (
            dropout_p,
            bias is not None,
            residual is not None,
        )
        return y

    @staticmethod
    @backward_once
    def backward(ctx: Any, dy: Tensor) -> Gradients:
        z, mean, rstd, norm_weight, norm_bias, keep = ctx.saved_tensors
        dy = dy.contiguous()
        dz, _, _ = torch.ops.aten.native_layer_norm_backward(
            dy, z, (z.shape[1],), mean, rstd, norm_weight, norm_bias, [True, False, False]
        )
        # torch adds these two up one row after the other, which takes half the time, but has ten
        # times the rounding error at 2,500 rows.
        dnorm_weight = torch.sub(z, mean).mul_(rstd).mul_(dy).sum(0)
        dnorm_bias = None if norm_bias is None else dy.sum(0)
        dx = dz if keep is None else (dz * keep).mul_(keep_scale(ctx.dropout_p))
        dbias = dx.sum(0) if ctx.has_bias else None
        return (
            dx,
            dbias,
            dz if ctx.has_residual else None,
            dnorm_weight,
            dnorm_bias,
            None,
            None,
            None,
            None,
        )


def cpu(*arguments: Any) -> Tensor:
    """Arguments and result as in `op.py`."""
    return _DropoutAddLayerNorm.apply(*arguments)
