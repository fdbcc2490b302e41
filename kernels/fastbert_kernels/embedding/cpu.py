"""`embedding_layer_norm` on a CPU: torch's look-ups and LayerNorm with the cheap dropout mask.

The gradients of the tables are sums in the order of the rows (`index_add_`, or one product for the
two token types), so they are deterministic. Only the rows that occur are written; the rest of a
table's gradient is zero. Inputs of 16 bits are summed and normalised in fp32. dnorm_weight and
dnorm_bias are summed here, because torch's LayerNorm adds up one row after the other, and loses a
digit.
"""

from typing import Any

import torch
from torch import Tensor

from fastbert_kernels._dropout import keep_scale
from fastbert_kernels._dropout_cpu import row_keep_mask_cpu
from fastbert_kernels._function import Function, Gradients, backward_once

# A row of so small a table is the sum of many, which a product rounds less.
PRODUCT_ROWS = 16


class _EmbeddingLayerNorm(Function):
    @staticmethod
    def forward(
        ctx: Any,
        input_ids: Tensor,
        position_ids: Tensor | None,
        token_type_ids: Tensor | None,
        word_embeddings: Tensor,
        position_embeddings: Tensor | None,
        token_type_embeddings: Tensor | None,
        norm_weight: Tensor,
        norm_bias: Tensor | None,
        eps: float,
        dropout_p: float,
        dropout_seeds: Tensor | None,
        dropout_stream: int,
    ) -> Tensor:
        z = word_embeddings.index_select(0, input_ids)
        wide = torch.promote_types(z.dtype, torch.float32)
        z = z.to(wide)
        if position_ids is not None and position_embeddings is not None:
            z += position_embeddings.index_select(0, position_ids)
        if token_type_ids is not None and token_type_embeddings is not None:
            z += token_type_embeddings.index_select(0, token_type_ids)
        wide_bias = None if norm_bias is None else norm_bias.to(wide)
        y, mean, rstd = torch.native_layer_norm(
            z, (z.shape[1],), norm_weight.to(wide), wide_bias, eps
        )
        keep = None
        if dropout_p > 0:
            assert dropout_seeds is not None  # check_dropout
            keep = row_keep_mask_cpu(dropout_seeds, dropout_stream, y.shape[1], dropout_p)
            y = torch.mul(y, keep, out=y).mul_(keep_scale(dropout_p))
        y = y.to(word_embeddings.dtype)
        ctx.save_for_backward(
            input_ids, position_ids, token_type_ids, z, mean, rstd, norm_weight, norm_bias, keep
        )
        tables = (word_embeddings, position_embeddings, token_type_embeddings)
        ctx.dropout_p = dropout_p
        ctx.sizes = [None if table is None else len(table) for table in tables]
        return y

    @staticmethod
    @backward_once
    def backward(ctx: Any, dy: Tensor) -> Gradients:
        *rows, z, mean, rstd, norm_weight, norm_bias, keep = ctx.saved_tensors
        dy = dy.to(z.dtype)
        if keep is not None:
            dy = (dy * keep).mul_(keep_scale(ctx.dropout_p))
        dz, _, _ = torch.ops.aten.native_layer_norm_backward(
            dy.contiguous(),
            z,
            (z.shape[1],),
            mean,
            rstd,
            norm_weight.to(z.dtype),
            None if norm_bias is None else norm_bias.to(z.dtype),
            [True, False, False],
        )
        dnorm_weight = (z - mean).mul_(rstd).mul_(dy).sum(0)
        dnorm_bias = None if norm_bias is None else dy.sum(0)
        tables = [
            None if size is None else _scatter(dz, row, size)
            for size, row in zip(ctx.sizes, rows, strict=True)
        ]
        return None, None, None, *tables, dnorm_weight, dnorm_bias, None, None, None, None


def _scatter(dz: Tensor, rows: Tensor, size: int) -> Tensor:
    """Return [size, D]: the sums of the rows of dz that belong to each row of a table."""
    if size > PRODUCT_ROWS:
        return dz.new_zeros(size, dz.shape[1]).index_add_(0, rows, dz)
    return torch.nn.functional.one_hot(rows, size).T.to(dz.dtype) @ dz


def cpu(*arguments: Any) -> Tensor:
    """Arguments and result as in `op.py`."""
    return _EmbeddingLayerNorm.apply(*arguments)
