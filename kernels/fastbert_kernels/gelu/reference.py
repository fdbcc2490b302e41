"""The definition of `bias_gelu` in the plainest torch, fast enough to train with on a CPU."""

import torch


def reference(x, bias):
    """x + bias times the normal distribution function of it; arguments and result as in `op.py`."""
    return torch.nn.functional.gelu(x + bias)
