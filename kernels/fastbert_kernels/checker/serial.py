"""Torch with every sum taken one term after the other, in fp32: `Serial`.

Torch adds in pairs or in many lanes, so its errors grow slowly with the number of terms. A kernel
that adds row after row to an accumulator in fp32 is right, too, and its errors are larger. The
reference that runs inside this mode shows how large.

Source: Higham, Accuracy and Stability of Numerical Algorithms, 2002, section 4.2.
"""

# pyright: basic
# Operators of torch have no types.

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch._decomp import get_decompositions
from torch.utils._python_dispatch import TorchDispatchMode

MOST_STEPS = 4_096  # of one sum; where there are more terms, groups of them are added first
aten = torch.ops.aten
# What torch computes by one operator, with sums inside.
FUSED = get_decompositions(
    [
        *(aten.native_layer_norm, aten.native_layer_norm_backward, aten._softmax),
        *(aten._softmax_backward_data, aten._log_softmax, aten._log_softmax_backward_data),
        *(aten.native_group_norm, aten.native_group_norm_backward, aten.logsumexp),
    ]
)


class Serial(TorchDispatchMode):
    """Sums, means, variances and matrix products inside the block add term after term."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in OWN:
            return OWN[func](*args, **kwargs)
        if func in FUSED:
            with self:
                result = FUSED[func](*args, **kwargs)
            if result is not NotImplemented:
                return result
        return func(*args, **kwargs)


def _added(terms: Tensor) -> Tensor:
    """The sum over the first axis."""
    if len(terms) > MOST_STEPS:
        group = -(-len(terms) // MOST_STEPS)
        rest = terms.new_zeros(-len(terms) % group, *terms.shape[1:])
        terms = torch.cat([terms, rest]).unflatten(0, (-1, group)).sum(1)
    total = torch.zeros_like(terms[0]) if len(terms) else terms.new_zeros(terms.shape[1:])
    for term in terms:
        total = total + term
    return total


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _sum(
    x: Tensor, dim: list[int] | None = None, keepdim: bool = False, *, dtype: Any = None
) -> Tensor:
    if not x.is_floating_point():
        return torch.sum(x, dim, keepdim, dtype=dtype)
    dims = sorted({d % x.ndim for d in dim}) if dim and x.ndim else list(range(x.ndim))
    kept = [1 if d in dims else n for d, n in enumerate(x.shape)]
    terms = _wide(x).movedim(dims, list(range(len(dims)))) if dims else _wide(x)
    count = math.prod(x.shape[d] for d in dims)
    rest = [n for d, n in enumerate(x.shape) if d not in dims]
    total = _added(terms.reshape(count, *rest))
    return (total.reshape(kept) if keepdim else total).to(dtype or x.dtype)


def _mean(
    x: Tensor, dim: list[int] | None = None, keepdim: bool = False, *, dtype: Any = None
) -> Tensor:
    total = _sum(_wide(x), dim, keepdim)
    return (total * (total.numel() / max(x.numel(), 1))).to(dtype or x.dtype)


def _variance(
    x: Tensor, dim: list[int] | None = None, *, correction: Any = 1, keepdim: bool = False
) -> Tensor:
    centered = _wide(x) - _mean(_wide(x), dim, True)
    total = _sum(centered * centered, dim, keepdim)
    count = x.numel() // max(total.numel(), 1)
    return (total / max(count - (1 if correction is None else correction), 0)).to(x.dtype)


def _variance_and_mean(
    x: Tensor, dim: list[int] | None = None, *, correction: Any = 1, keepdim: bool = False
) -> tuple[Tensor, Tensor]:
    return _variance(x, dim, correction=correction, keepdim=keepdim), _mean(x, dim, keepdim)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """A matrix product, or several; the sum goes over the last axis of `a`."""
    if not a.is_floating_point():
        return torch.matmul(a, b)
    total = a.new_zeros(*a.shape[:-1], b.shape[-1], dtype=_wide(a).dtype)
    for k in range(a.shape[-1]):
        total = total + _wide(a[..., k : k + 1]) * _wide(b[..., k : k + 1, :])
    return total.to(a.dtype)


def _product_and_bias(
    bias: Tensor, a: Tensor, b: Tensor, *, beta: Any = 1, alpha: Any = 1
) -> Tensor:
    return (_wide(bias) * beta + _product(_wide(a), _wide(b)) * alpha).to(bias.dtype)


OWN: dict[Any, Any] = {
    aten.sum.default: _sum,
    aten.sum.dim_IntList: _sum,
    aten.mean.default: _mean,
    aten.mean.dim: _mean,
    aten.var.correction: _variance,
    aten.var_mean.correction: _variance_and_mean,
    aten.mm.default: _product,
    aten.bmm.default: _product,
    aten.addmm.default: _product_and_bias,
    aten.baddbmm.default: _product_and_bias,
}
