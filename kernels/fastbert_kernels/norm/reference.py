"""The definition of `dropout_add_layer_norm` in the plainest torch."""

import torch
from torch import Tensor

from fastbert_kernels._dropout import row_multiplier


def reference(
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
    """LN(residual + dropout(x + bias)); arguments and result as in `op.py`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    z = x.to(wide)
    if bias is not None:
        z = z + bias.to(wide)
    if dropout_p > 0:
        assert dropout_seeds is not None  # check_dropout
        z = z * row_multiplier(dropout_seeds, dropout_stream, x.shape[1], dropout_p, wide)
    if residual is not None:
        z = z + residual.to(wide)
    mean = z.mean(-1, keepdim=True)
    rstd = ((z - mean).square().mean(-1, keepdim=True) + eps).rsqrt()
    y = (z - mean) * rstd * norm_weight.to(wide)
    return (y if norm_bias is None else y + norm_bias.to(wide)).to(x.dtype)
