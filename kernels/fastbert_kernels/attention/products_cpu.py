"""The operations between q, k, v and the output that `cpu.py` and `windowed_cpu.py` share.

Shapes are those of batched products: scores [N, n_q, n_k], the others [N, n, K].
"""

import torch
from torch import Tensor

from fastbert_kernels._processor import has_bf16_instructions

# At once, 8 MB in fp32: they stay in the cache from one operation to the next, which makes all but
# the products two to four times as fast.
SCORES = 1 << 21


def wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def factors(scores: Tensor, v: Tensor, fewest: int) -> torch.dtype:
    """The dtype of all products but S, which have this many multiplications at least."""
    large = scores.numel() * v.shape[2] >= fewest
    rounds = large and v.dtype == torch.bfloat16 and has_bf16_instructions()
    return v.dtype if rounds else scores.dtype


def product(a: Tensor, b: Tensor, factor: float, dtype: torch.dtype) -> Tensor:
    """factor * a b, with all three in `dtype`."""
    result = a.new_empty(len(a), a.shape[1], b.shape[2], dtype=dtype)
    return result.baddbmm_(a.to(dtype), b.to(dtype), beta=0, alpha=factor)


def dropped(weights: Tensor, keep: Tensor | None) -> Tensor:
    """D, from P and a mask as of `keep_mask_cpu`; without the factor c."""
    return weights if keep is None else weights * keep


def gradient_of_scores(
    dout: Tensor, v: Tensor, weights: Tensor, keep: Tensor | None, factor: float
) -> Tensor:
    """Return dS for dO and v [N, n, K], in the dtype of P."""
    dweights = product(dout, v.transpose(1, 2), factor, weights.dtype)
    if keep is not None:
        dweights.mul_(keep)
    return torch.ops.aten._softmax_backward_data(dweights, weights, -1, weights.dtype)
