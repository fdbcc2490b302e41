"""`masked_cross_entropy`: the loss of the masked tokens under the tied vocabulary projection."""

import torch

from fastbert_kernels._checks import check_implementation, check_tensor
from fastbert_kernels.mlm_loss.cpu import cpu
from fastbert_kernels.mlm_loss.reference import reference

_IMPLEMENTATIONS = {"cpu": cpu, "reference": reference}


def masked_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    positions: torch.Tensor,
    labels: torch.Tensor,
    *,
    total: float = 1.0,
    check_labels: bool = False,
    impl: str = "reference",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Softmax cross-entropy of `hidden[positions] @ weight.T + bias` against `labels`, summed and divided by `total`.

    Args:
        hidden: [T, D], fp32, fp16 or bf16.
        weight: [V, D], the word embeddings, as hidden.
        bias: [V], as hidden.
        positions: int64 [M], rows of `hidden`; M = 0 gives a loss of zero and gradients of zero.
        labels: int64 [M] in [0, V).
        total: what the sum is divided by: 1 for the sum, or the count of masked tokens in the whole global batch.
        check_labels: whether to verify the labels first (on a GPU that waits for the device).
        impl: "cpu" or "reference".

    Returns:
        loss: scalar, fp32 (fp64 where hidden is), nats; the only differentiable result.
        token_losses: [M], as loss, nats, not divided.
        token_hits: bool [M], whether the label has the largest logit.

    Raises:
        ValueError: a shape that does not fit, a label outside [0, V) if `check_labels`, an unknown `impl`.
        TypeError: a dtype that does not fit.

    Source: Devlin et al., 2019, section 3.1, task 1.
    """
    name = "masked_cross_entropy"
    check_tensor(name, "hidden", hidden, ("T", "D"), (torch.float32, torch.float16, torch.bfloat16, torch.float64))
    check_tensor(name, "weight", weight, ("V", hidden.shape[1]), hidden.dtype)
    check_tensor(name, "bias", bias, (weight.shape[0],), hidden.dtype)
    check_tensor(name, "positions", positions, ("M",), torch.int64)
    check_tensor(name, "labels", labels, (positions.shape[0],), torch.int64)
    if check_labels and len(labels) and not (0 <= int(labels.min()) and int(labels.max()) < weight.shape[0]):
        raise ValueError(f"{name}: labels span {int(labels.min())} to {int(labels.max())}; must be in [0, V = {weight.shape[0]})")
    check_implementation(name, impl, tuple(_IMPLEMENTATIONS))
    return _IMPLEMENTATIONS[impl](hidden, weight, bias, positions, labels, total)
