"""`bias_geglu`: the activation of the feed-forward sublayer of ModernBERT."""

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
from fastbert_kernels.geglu.cpu import cpu
from fastbert_kernels.geglu.reference import reference


def bias_geglu(x: Tensor, bias: Tensor | None = None, *, impl: str = "auto") -> Tensor:
    """GELU(a) * b for a, b = halves of the rows of x + bias; GELU is exact, as in `bias_gelu`.

    Under autocast it runs in the autocast dtype, as the matrix product before it. For the backward
    pass, "triton" saves x and bias, and "cpu" saves x + bias.

    Args:
        x: [T, 2 F], fp32, fp16 or bf16: the product with one joint matrix, whose first half is
            activated and whose second half is the gate.
        bias: [2 F], as x, or None.
        impl: "triton" (one pass each way, fp32 inside; rows may be strided), "cpu", "reference", or
            "auto": "triton" on a GPU, "cpu" on a CPU.

    Returns:
        [T, F], as x.

    Raises:
        ValueError: a shape or device that does not fit, an odd number of columns, an unknown
            `impl`; "triton": a last axis of x that is not contiguous.
        TypeError: a dtype that does not fit; "triton": float64.

    Source: Shazeer, 2020, equation 6 (GEGLU); the order of the halves as in ModernBERT (Warner et
    al., 2024), `input, gate = Wi(x).chunk(2, dim=-1)`.
    """
    x, bias = cast_low(x, bias)
    impl = chosen_implementation("bias_geglu", impl, _IMPLEMENTATIONS, x)
    check(x, bias, impl)
    return _IMPLEMENTATIONS[impl](x, bias)


def check(x: Tensor, bias: Tensor | None, impl: str) -> None:
    check_leader("bias_geglu", "x", x, ("T", "2 F"))
    if x.shape[1] % 2:
        raise ValueError(
            f"bias_geglu: x has shape {list(x.shape)}, expected an even number of columns"
        )
    tensors = (("x", x, x.shape, (x.dtype,)), ("bias", bias, (x.shape[1],), (x.dtype,)))
    check_tensors("bias_geglu", x.device, *tensors)
    if impl == "triton":
        check_triton("bias_geglu", *tensors)


def _forward_fake(x: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1] // 2)


def _backward_fake(dy: Tensor, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(0 if bias is None else x.shape[1])


FORWARD = operator(
    "bias_geglu_forward(Tensor x, Tensor? bias) -> Tensor",
    "geglu.kernel.forward",
    _forward_fake,
)
BACKWARD = operator(
    "bias_geglu_backward(Tensor dy, Tensor x, Tensor? bias) -> (Tensor, Tensor)",
    "geglu.kernel.backward",
    _backward_fake,
)


class _BiasGeglu(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, bias)
        return FORWARD(x, bias)

    @staticmethod
    @backward_once
    def backward(ctx: Any, dy: Tensor) -> Gradients:
        x, bias = ctx.saved_tensors
        dx, dbias = BACKWARD(dy.contiguous(), x, bias)
        return dx, None if bias is None else dbias


def _triton(x: Tensor, bias: Tensor | None) -> Tensor:
    return _BiasGeglu.apply(x, bias)


_IMPLEMENTATIONS: Implementations = {"triton": _triton, "cpu": cpu, "reference": reference}
