"""`masked_cross_entropy`: the loss of the masked tokens under the tied vocabulary projection."""

from typing import Any

import torch
from torch import Tensor

from fastbert_kernels._autocast import cast_low
from fastbert_kernels._checks import (
    INT64,
    Implementations,
    check_leader,
    check_range,
    check_tensors,
    check_triton,
    chosen_implementation,
    values_checked,
)
from fastbert_kernels._function import Function, Gradients, backward_once
from fastbert_kernels._library import operator
from fastbert_kernels._linear import rounds
from fastbert_kernels.mlm_loss.cpu import cpu
from fastbert_kernels.mlm_loss.reference import IGNORED, Result, reference

NAME = "masked_cross_entropy"


def masked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    positions: Tensor | None,
    labels: Tensor,
    *,
    total: float = 1.0,
    operands: torch.dtype | None = None,
    check_values: bool | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax cross-entropy of the logits z = hidden[positions] weight' + bias.

    The loss is the sum of log(sum(exp(z))) - z[label] over the M tokens, divided by `total`. Under
    autocast, hidden is cast to the autocast dtype, as for a matrix product. Only "reference" holds
    the [M, V] logits. "triton" needs 214 MB beside its results at M = 8,192, D = 768, V = 30,522 in
    bf16, mostly a workspace of 2^26 numbers; "cpu" holds 64 MB of logits. For the backward pass,
    "triton" saves the inputs and one fp32 number for each token; "cpu" saves the gradients.

    Args:
        hidden: [T, D], fp32, fp16 or bf16.
        weight: [V, D], the word embeddings, as hidden; or fp32, rounded to the dtype of hidden for
            the products. "triton" then gives their gradient in fp32 without a rounding.
        bias: [V], as hidden, or fp32 likewise; None for zeros.
        positions: int64 [M], rows of `hidden`; M = 0 gives a loss of zero and gradients of zero.
            None: M = T, every row once.
        labels: int64 [M] in [0, V), or -100 for a token that is ignored, as in torch's
            cross_entropy: its loss is zero, it is not counted as correct, and it adds nothing to
            any gradient. So M may be padded.
        total: what the sum is divided by: 1 for the sum, the count of labels that are not -100 for
            torch's mean, or the count of masked tokens in the whole global batch.
        operands: bf16 or None. With bf16, the factors of the three products are rounded to it, and
            so are the products, as in `linear`. hidden and weight are fp32 then; not for "triton".
        check_values: whether to check positions and labels. None: on a CPU; True: also on a GPU,
            which then waits for the device. Unchecked, "triton" reads nothing out of bounds; the
            loss of that token is NaN, and so are the gradients.
        impl: "triton", "cpu", "reference", or "auto": "triton" on a GPU, "cpu" on a CPU.

    Returns:
        loss: scalar, fp32 (fp64 where hidden is), nats; the only differentiable result.
        token_losses: [M], as loss, nats, not divided.
        token_correct: bool [M], whether the label is the arg-max of the logits (the first of
            equals).

    Raises:
        ValueError: a shape or device that does not fit, `total` not above 0, a position outside
            [0, T) or a label that is neither -100 nor in [0, V) where checked, an unknown `impl`;
            "triton": a last axis that is not contiguous.
        TypeError: a dtype that does not fit; "triton": float64.

    Source: Devlin et al., 2019, section 3.1, task 1.
    """
    (hidden,) = cast_low(hidden)
    if weight.dtype != torch.float32:
        (weight,) = cast_low(weight)
    if bias is not None and bias.dtype != torch.float32:
        (bias,) = cast_low(bias)
    impl = chosen_implementation(NAME, impl, _IMPLEMENTATIONS, hidden)
    _check(hidden, weight, bias, positions, labels, total, check_values, impl)
    if operands is not None and impl == "triton":
        raise ValueError(f'{NAME}: operands = {operands} with impl = "triton"; give hidden in bf16')
    if bias is None:
        bias = weight.new_zeros(weight.shape[0])
    if not rounds(NAME, operands, weight, len(labels) * weight.numel()):
        operands = None
    return _IMPLEMENTATIONS[impl](hidden, weight, bias, positions, labels, total, operands)


def _check(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    positions: Tensor | None,
    labels: Tensor,
    total: float,
    check_values: bool | None,
    impl: str,
) -> None:
    check_leader(NAME, "hidden", hidden, ("T", "D"))
    (T, D), floats = hidden.shape, (hidden.dtype, torch.float32)
    check_leader(NAME, "weight", weight, ("V", "D"), floats)
    if positions is not None:
        check_leader(NAME, "positions", positions, ("M",), INT64)
    V, M = weight.shape[0], T if positions is None else positions.shape[0]
    tensors = (
        ("hidden", hidden, (T, D), floats),
        ("weight", weight, (V, D), floats),
        ("bias", bias, (V,), floats),
        ("positions", positions, (M,), INT64),
        ("labels", labels, (M,), INT64),
    )
    check_tensors(NAME, hidden.device, *tensors)
    if T == 0 and M > 0:
        raise ValueError(f"{NAME}: positions has {M} entries, but hidden has no rows")
    if not total > 0:
        raise ValueError(f"{NAME}: total = {total}; must be above 0")
    if values_checked(check_values, labels):
        ignored = f", or {IGNORED} for a token to ignore"
        check_range(NAME, "labels", labels.masked_fill(labels == IGNORED, 0), V, "V", ignored)
        if positions is not None:
            check_range(NAME, "positions", positions, T, "T")
    if impl == "triton":
        check_triton(NAME, *tensors)


def _forward_fake(
    hidden: Tensor, weight: Tensor, bias: Tensor, positions: Tensor | None, labels: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    losses, lse = (hidden.new_empty(labels.shape, dtype=torch.float32) for _ in range(2))
    return losses, hidden.new_empty(labels.shape, dtype=torch.bool), lse


def _backward_fake(
    scale: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, *_: Any
) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in (hidden, weight, bias))


_INPUTS = "Tensor hidden, Tensor weight, Tensor bias, Tensor? positions, Tensor labels"
_FORWARD = operator(
    f"masked_cross_entropy_forward({_INPUTS}) -> (Tensor, Tensor, Tensor)",
    "mlm_loss.kernel.forward",
    _forward_fake,
)
_BACKWARD = operator(
    f"masked_cross_entropy_backward(Tensor scale, {_INPUTS}, Tensor lse) "
    "-> (Tensor, Tensor, Tensor)",
    "mlm_loss.kernel.backward",
    _backward_fake,
)


class _MaskedCrossEntropy(Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor,
        positions: Tensor | None,
        labels: Tensor,
        total: float,
    ) -> Result:
        losses, correct, lse = _FORWARD(hidden, weight, bias, positions, labels)
        ctx.save_for_backward(hidden, weight, bias, positions, labels, lse)
        ctx.total = total
        ctx.mark_non_differentiable(losses, correct)
        return losses.sum() / total, losses, correct

    @staticmethod
    @backward_once
    def backward(ctx: Any, dloss: Tensor, _losses: Tensor, _correct: Tensor) -> Gradients:
        return *_BACKWARD(dloss / ctx.total, *ctx.saved_tensors), None, None, None


def _triton(*arguments: Any) -> Result:
    return _MaskedCrossEntropy.apply(*arguments[:-1])  # has no operands of another dtype


_IMPLEMENTATIONS: Implementations = {"triton": _triton, "cpu": cpu, "reference": reference}
