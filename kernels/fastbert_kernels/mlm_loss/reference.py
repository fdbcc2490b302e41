"""The definition of `masked_cross_entropy` in the plainest torch; it holds all M x V logits."""

import torch
from torch import Tensor

from fastbert_kernels._linear import linear

IGNORED = -100  # the label of a token that is ignored, as in torch's cross_entropy

Result = tuple[Tensor, Tensor, Tensor]  # loss, token_losses, token_correct


def reference(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    positions: Tensor | None,
    labels: Tensor,
    total: float,
    operands: torch.dtype | None,
) -> Result:
    """Arguments and result as in `op.py`."""
    rows = hidden if positions is None else hidden[positions]
    weight, bias = weight.to(rows.dtype), bias.to(rows.dtype)
    wide = torch.promote_types(rows.dtype, torch.float32)
    factors = (x.to(wide) for x in (rows, weight, bias))
    logits = linear(*factors, operands=operands, impl="reference")
    losses = torch.nn.functional.cross_entropy(
        logits, labels, reduction="none", ignore_index=IGNORED
    )
    return losses.sum() / total, losses.detach(), logits.detach().argmax(-1) == labels
