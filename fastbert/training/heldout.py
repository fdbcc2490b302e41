"""The held-out loss, as sums that add up over batches and ranks.

The positions that show [MASK] are counted apart: a token that was left in place can be copied, which hides that nothing was learned.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastbert.data.batches import PackedBatch
from fastbert.models.bert import Losses


@dataclass(frozen=True)
class HeldOut:
    """Means over all masked tokens and pairs: losses in nats, accuracies as shares; None for what there is nothing of."""

    loss: float  # MLM + NSP
    loss_mlm: float
    accuracy_mlm: float
    loss_mask_token: float | None  # on the positions that show [MASK]
    accuracy_mask_token: float | None
    loss_nsp: float | None
    accuracy_nsp: float | None

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss)


def heldout_sums(losses: Losses, batch: PackedBatch, mask_id: int) -> Tensor:
    """float64 [9] of one batch: loss, hits and count of all masked tokens, of those that show [MASK], and of the pairs."""
    shown = batch.input_ids[batch.masked_positions] == mask_id
    paired = batch.next_sentence_labels >= 0
    parts = []
    for values, hits, counted in (
        (losses.token_losses, losses.token_correct, torch.ones_like(shown)),
        (losses.token_losses, losses.token_correct, shown),
        (losses.pair_losses, losses.pair_correct, paired),
    ):
        # Not `values[counted]`, whose size the host would wait for.
        parts += [
            torch.where(counted, values.double(), 0.0).sum(),
            (hits & counted).sum().double(),
            counted.sum().double(),
        ]
    return torch.stack(parts)


def heldout_means(sums: Tensor) -> HeldOut:
    """From the sums over everything."""
    rows = sums.view(3, 3).tolist()
    (mlm, mlm_hits), (shown, shown_hits), (nsp, nsp_hits) = [
        (loss / n, hits / n) if n else (None, None) for loss, hits, n in rows
    ]
    assert mlm is not None and mlm_hits is not None, "a held-out set without a masked token"
    return HeldOut(mlm + (nsp or 0.0), mlm, mlm_hits, shown, shown_hits, nsp, nsp_hits)
