"""`bias_gelu`: the activation of the feed-forward sublayer and of the MLM head."""

from typing import Any

from torch import Tensor

from fastbert_kernels._autocast import cast_low
from fastbert_kernels._checks import (
    Implementations,
    check_leader,
    check_tensors,
    check_triton,
    chosen_implementation,
)
from fastbert_kernels._function import Function, Gradients, backward_once
from fastbert_kernels._library import operator
from fastbert_kernels.gelu.reference import reference


def bias_gelu(x: Tensor, bias: Tensor | None = None, *, impl: str = "auto") -> Tensor:
    """GELU(x + bias), exact: z Phi(z) = z (1 + erf(z / sqrt(2))) / 2 for z = x + bias.

    Under autocast it runs in the autocast dtype, as the matrix product before it. Saved for the
    backward pass: x and bias.

    Args:
        x: [T, F], fp32, fp16 or bf16.
        bias: [F], as x; None for zeros.
        impl: "triton" (one pass each way, fp32 inside; rows may be strided), "cpu" (the reference,
            which is fast enough), "reference", or "auto": "triton" on a GPU, "cpu" on a CPU.

    Returns:
        [T, F], as x.

    Raises:
        ValueError: a shape or device that does not fit, an unknown `impl`; "triton": a last axis
            of x that is not contiguous.
        TypeError: a dtype that does not fit; "triton": float64.

    Source: Hendrycks and Gimpel, 2016, section 2.
    """
    x, bias = cast_low(x, bias)
    impl = chosen_implementation("bias_gelu", impl, _IMPLEMENTATIONS, x)
    check(x, bias, impl)
    if bias is None and impl == "triton":
        bias = x.new_zeros(x.shape[1])
    return _IMPLEMENTATIONS[impl](x, bias)


def check(x: Tensor, bias: Tensor | None, impl: str) -> None:
    check_leader("bias_gelu", "x", x, ("T", "F"))
    tensors = (("x", x, x.shape, (x.dtype,)), ("bias", bias, (x.shape[1],), (x.dtype,)))
    check_tensors("bias_gelu", x.device, *tensors)
    if impl == "triton":
        check_triton("bias_gelu", *tensors)


def _forward_fake(x: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _backward_fake(dy: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), bias.new_empty(bias.shape)


FORWARD = operator(
    "bias_gelu_forward(Tensor x, Tensor bias) -> Tensor",
    "gelu.kernel.forward",
    _forward_fake,
)
BACKWARD = operator(
    "bias_gelu_backward(Tensor dy, Tensor x, Tensor bias) -> (Tensor, Tensor)",
    "gelu.kernel.backward",
    _backward_fake,
)


class _BiasGelu(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, bias)
        return FORWARD(x, bias)

    @staticmethod
    @backward_once
    def backward(ctx: Any, dy: Tensor) -> Gradients:
        return BACKWARD(dy.contiguous(), *ctx.saved_tensors)


def _triton(x: Tensor, bias: Tensor) -> Tensor:
    return _BiasGelu.apply(x, bias)


_IMPLEMENTATIONS: Implementations = {"triton": _triton, "cpu": reference, "reference": reference}
