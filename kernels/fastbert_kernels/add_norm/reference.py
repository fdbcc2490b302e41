"""The definition of `add_layer_norm` in the plainest torch."""

import torch
from torch import Tensor

from fastbert_kernels._dropout import row_multiplier


def reference(
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
    """LN(s) and s = residual + dropout(x + bias); arguments and result as in `op.py`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    z = x.to(wide)
    if bias is not None:
        z = z + bias.to(wide)
    if dropout_p > 0:
        assert dropout_seeds is not None  # check_dropout
        z = z * row_multiplier(dropout_seeds, dropout_stream, x.shape[1], dropout_p, wide)
    total = (residual.to(wide) + z).to(x.dtype)
    s = total.to(wide)
    mean = s.mean(-1, keepdim=True)
    rstd = ((s - mean).square().mean(-1, keepdim=True) + eps).rsqrt()
    y = (s - mean) * rstd * norm_weight.to(wide)
    return (y if norm_bias is None else y + norm_bias.to(wide)).to(x.dtype), total
