"""The definition of `bias_gelu` in the plainest torch, fast enough to train with on a CPU."""

import torch
from torch import Tensor


def reference(x: Tensor, bias: Tensor | None) -> Tensor:
    """x + bias times the normal distribution function of it; arguments and result as in `op.py`."""
    z = x if bias is None else x + bias
    return torch.nn.functional.gelu(z)
