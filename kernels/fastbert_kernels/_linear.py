"""`x W' + b`, by the faster of the two libraries that torch brings for a CPU.

torch gives fp32 products to MKL, which only uses AVX2 on processors that are not Intel's. oneDNN,
which torch uses for convolutions and bf16, uses what the processor has: on an AMD EPYC with AVX-512
it is 5 to 20 % faster for y and dx. Without AVX-512 the two are equally fast, and oneDNN takes
another 0.7 ms for every new number of rows (AMD EPYC with AVX2).

Three products stay with MKL: dW = dy' x, for which oneDNN would copy both factors; sums of more
than `_LONGEST` terms, whose rounding errors would be three times as large; and the logits of the
vocabulary, where even 1.5 times the error shows in the loss. The processor and the sizes decide,
and no measurement does: two runs on one machine must round alike.
"""

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastbert_kernels._function import Function, Gradients

# oneDNN adds up in longer chains: its error against fp64 is 1.4 to 1.7 times MKL's up to this
# length, and 2.1 times at 1,536.
_LONGEST = 1024


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, impl: str = "auto") -> Tensor:
    """`torch.nn.functional.linear`: x [N, D], weight [F, D] and bias [F] to [N, F].

    With "cpu", or "auto" on a CPU, oneDNN computes it where that is faster; see above. Any other
    `impl` is torch's own.
    """
    if (
        (impl == "cpu" or (impl == "auto" and x.is_cpu))
        and x.dtype == torch.float32
        and _onednn_is_faster()
        and not torch.is_autocast_enabled("cpu")
    ):
        return _Linear.apply(x, weight, bias)
    return torch.nn.functional.linear(x, weight, bias)


@functools.cache
def _onednn_is_faster() -> bool:
    """Whether this is an x86 processor with AVX-512 that is not Intel's.

    On Arm and macOS torch has no MKL.
    """
    cpuinfo = Path("/proc/cpuinfo")
    if not torch.backends.mkldnn.is_available() or not cpuinfo.exists():
        return False
    words = set(cpuinfo.read_text().split())
    return bool(words & {"AuthenticAMD", "HygonGenuine"}) and "avx512f" in words


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if x.shape[1] > _LONGEST:
        return torch.nn.functional.linear(x, weight, bias)
    # For rows of a wider matrix, oneDNN has a loop that is a hundred times slower.
    return torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, bias, "none", [], "")


class _Linear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Gradients:
        x, weight = ctx.saved_tensors
        dx = _product(dy, weight.T) if ctx.needs_input_grad[0] else None
        dweight = dy.T @ x if ctx.needs_input_grad[1] else None
        dbias = dy.sum(0) if ctx.needs_input_grad[2] else None
        return dx, dweight, dbias
