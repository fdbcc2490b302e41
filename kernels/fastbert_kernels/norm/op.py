"""`dropout_add_layer_norm`, the end of every sublayer of BERT, and plain `layer_norm`."""

from typing import Any

import torch
from torch import Tensor

from fastbert_kernels._autocast import cast_fp32
from fastbert_kernels._checks import (
    INT64,
    Implementations,
    check_dropout,
    check_leader,
    check_row_width,
    check_tensors,
    check_triton,
    chosen_implementation,
)
from fastbert_kernels._function import Function, Gradients, backward_once
from fastbert_kernels._library import operator
from fastbert_kernels.norm.cpu import cpu
from fastbert_kernels.norm.reference import reference

NAME = "dropout_add_layer_norm"


def dropout_add_layer_norm(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor | None = None,
    *,
    eps: float = 1e-12,
    dropout_p: float = 0.0,
    dropout_seeds: Tensor | None = None,
    dropout_stream: int = 0,
    impl: str = "auto",
) -> Tensor:
    """LayerNorm(residual + dropout(x + bias)) over the last axis, with the biased variance.

    Under autocast it runs in fp32, as torch's layer_norm. For the backward pass, "triton" saves x,
    bias, residual, and the mean and rstd of each row, fp32 [T]; "cpu" saves
    z = residual + dropout(x + bias), mean, rstd and the mask.

    Args:
        x: [T, D], fp32, fp16 or bf16; the product of the sublayer's last matrix, without its bias.
        bias: [D], the bias of that matrix, or None. residual: [T, D] or None. Both as x.
        norm_weight: [D], LayerNorm's gamma, as x.
        norm_bias: [D], LayerNorm's beta, as x; None for a norm without it.
        eps: added to the variance.
        dropout_p: probability to drop an element of x + bias, rounded to a multiple of 2**-16.
        dropout_seeds: int64 [T], one seed for each row, such as `row_seeds(...)` of the seeds of
            sequences, or `torch.randint(2**63 - 1, [T])`; new ones for every step.
        dropout_stream: which operation of the model this is, 0 to 2**31 - 1, so that operations
            with the same seeds draw different masks.
        impl: "triton" (one pass each way, D up to 8,192; rows of x and residual may be strided),
            "cpu", "reference", or "auto": "triton" on a GPU, "cpu" on a CPU.

    Returns:
        [T, D], as x; statistics are fp32.

    Raises:
        ValueError: a shape or device that does not fit, dropout without seeds, an unknown `impl`;
            "triton": D above 8,192, a last axis that is not contiguous.
        TypeError: a dtype that does not fit; "triton": float64.

    Source: Ba et al., 2016, equation 4; post-norm sublayer of Vaswani et al., 2017, section 3.1.
    """
    x, bias, residual, norm_weight, norm_bias = cast_fp32(x, bias, residual, norm_weight, norm_bias)
    impl = chosen_implementation(NAME, impl, _IMPLEMENTATIONS, x)
    check(x, bias, residual, norm_weight, norm_bias, dropout_p, dropout_seeds, impl)
    dropout = dropout_p, dropout_seeds, dropout_stream
    return _IMPLEMENTATIONS[impl](x, bias, residual, norm_weight, norm_bias, eps, *dropout)


def layer_norm(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None = None,
    *,
    eps: float = 1e-12,
    impl: str = "auto",
) -> Tensor:
    """LayerNorm of the rows of x [T, D]: `dropout_add_layer_norm` of x alone."""
    return dropout_add_layer_norm(x, None, None, norm_weight, norm_bias, eps=eps, impl=impl)


def check(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    dropout_p: float,
    dropout_seeds: Tensor | None,
    impl: str,
) -> None:
    check_leader(NAME, "x", x, ("T", "D"))
    (T, D), floats = x.shape, (x.dtype,)
    check_dropout(NAME, dropout_p, dropout_seeds, T)
    tensors = (
        ("x", x, (T, D), floats),
        ("bias", bias, (D,), floats),
        ("residual", residual, (T, D), floats),
        ("norm_weight", norm_weight, (D,), floats),
        ("norm_bias", norm_bias, (D,), floats),
        ("dropout_seeds", dropout_seeds if dropout_p > 0 else None, (T,), INT64),
    )
    check_tensors(NAME, x.device, *tensors)
    if impl == "triton":
        check_triton(NAME, *tensors)
        check_row_width(NAME, "x", D)


def _forward_fake(x: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return x.new_empty(x.shape), *(x.new_empty(x.shape[0], dtype=torch.float32) for _ in range(2))


def _backward_fake(
    dy: Tensor,
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    norm_weight: Tensor,
    dropout_seeds: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    dropout_p: float,
    _: int,
) -> tuple[Tensor, Tensor, Tensor]:
    differ = residual is not None and dropout_p > 0
    return x.new_empty(x.shape), x.new_empty(x.shape if differ else 0), x.new_empty(3, x.shape[1])


FORWARD = operator(
    "dropout_add_layer_norm_forward(Tensor x, Tensor? bias, Tensor? residual, Tensor norm_weight, "
    "Tensor? norm_bias, Tensor? dropout_seeds, float eps, float dropout_p, int dropout_stream) "
    "-> (Tensor, Tensor, Tensor)",
    "norm.kernel.forward",
    _forward_fake,
)
BACKWARD = operator(
    "dropout_add_layer_norm_backward(Tensor dy, Tensor x, Tensor? bias, Tensor? residual, "
    "Tensor norm_weight, Tensor? dropout_seeds, Tensor mean, Tensor rstd, float dropout_p, "
    "int dropout_stream) -> (Tensor, Tensor, Tensor)",
    "norm.kernel.backward",
    _backward_fake,
)


class _DropoutAddLayerNorm(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        norm_weight: Tensor,
        norm_bias: Tensor | None,
        eps: float,
        p: float,
        seeds: Tensor | None,
        stream: int,
    ) -> Tensor:
        y, mean, rstd = FORWARD(x, bias, residual, norm_weight, norm_bias, seeds, eps, p, stream)
        ctx.save_for_backward(x, bias, residual, norm_weight, seeds, mean, rstd)
        ctx.dropout_p, ctx.dropout_stream, ctx.has_norm_bias = p, stream, norm_bias is not None
        return y

    @staticmethod
    @backward_once
    def backward(ctx: Any, dy: Tensor) -> Gradients:
        saved = ctx.saved_tensors
        dx, dresidual, vectors = BACKWARD(
            dy.contiguous(), *saved, ctx.dropout_p, ctx.dropout_stream
        )
        dnorm_weight, dnorm_bias, dbias = vectors.unbind()
        bias, residual = saved[1:3]
        if residual is None:
            dresidual = None
        elif ctx.dropout_p == 0:
            dresidual = dx
        dbias = None if bias is None else dbias
        dnorm_bias = dnorm_bias if ctx.has_norm_bias else None
        return dx, dbias, dresidual, dnorm_weight, dnorm_bias, *(None,) * 4


def _triton(*arguments: Any) -> Tensor:
    return _DropoutAddLayerNorm.apply(*arguments)


_IMPLEMENTATIONS: Implementations = {"triton": _triton, "cpu": cpu, "reference": reference}
