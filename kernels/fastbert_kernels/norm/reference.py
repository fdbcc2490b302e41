"""The definition of `dropout_add_layer_norm` in the plainest torch."""

import torch

from fastbert_kernels._dropout import row_multiplier


def reference(x, bias, residual, weight, shift, eps, dropout_p, keys, site):
    """LN(residual + dropout(x + bias)); arguments and result as in `op.py`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    z = x.to(wide)
    if bias is not None:
        z = z + bias.to(wide)
    if dropout_p > 0:
        z = z * row_multiplier(keys, site, x.shape[1], dropout_p, wide)
    if residual is not None:
        z = z + residual.to(wide)
    mean = z.mean(-1, keepdim=True)
    rstd = ((z - mean).square().mean(-1, keepdim=True) + eps).rsqrt()
    return ((z - mean) * rstd * weight.to(wide) + shift.to(wide)).to(x.dtype)
