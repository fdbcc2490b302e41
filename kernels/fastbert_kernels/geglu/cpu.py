"""`bias_geglu` on a CPU: torch's GELU, with both halves of the gradient written in their place.

    y = GELU(a) b        da = GELU'(a) (dy b)        db = dy GELU(a)

Autograd would fill each half of dx with zeros, and add the halves. Saved: x + bias; GELU(a) is
computed again.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu

from fastbert_kernels._function import Function, Gradients, backward_once


class _BiasGeglu(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        z = x if bias is None else x + bias
        ctx.save_for_backward(z)
        ctx.has_bias = bias is not None
        a, b = z.chunk(2, dim=-1)
        return gelu(a).mul_(b)

    @staticmethod
    @backward_once
    def backward(ctx: Any, dy: Tensor) -> Gradients:
        (z,) = ctx.saved_tensors
        a, b = z.chunk(2, dim=-1)
        dx = z.new_empty(z.shape)
        da, db = dx.chunk(2, dim=-1)
        torch.ops.aten.gelu_backward.grad_input(dy * b, a, grad_input=da)
        torch.mul(dy, gelu(a), out=db)
        return dx, dx.sum(0) if ctx.has_bias else None


def cpu(x: Tensor, bias: Tensor | None) -> Tensor:
    """Arguments and result as in `op.py`."""
    return _BiasGeglu.apply(x, bias)
