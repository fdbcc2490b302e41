"""The definition of `bias_gelu` in the plainest torch, fast enough to train with on a CPU."""

import torch
from torch import Tensor


def reference(x: Tensor, bias: Tensor) -> Tensor:
    """x + bias times the normal distribution function of it; arguments and result as in `op.py`."""
    return torch.nn.functional.gelu(x + bias)
