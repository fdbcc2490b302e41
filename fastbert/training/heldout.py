"""The held-out loss, as sums that add up over batches and ranks.

The positions that show [MASK] are counted separately. A token that was left unchanged can be
copied, which hides that nothing was learned.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from fastbert.data.packing import PackedBatch
from fastbert.models.heads import Losses

_ROWS = 3  # all masked tokens, those that show [MASK], the pairs
HELDOUT_SUMS = 3 * _ROWS  # loss, correct and count of each


@dataclass(frozen=True)
class HeldOut:
    """Means over all masked tokens and pairs; None where there is nothing to average.

    Attributes:
        loss: nats, loss_mlm + loss_nsp.
        loss_mlm, accuracy_mlm: over all masked tokens, in nats and as a fraction.
        loss_mask_token, accuracy_mask_token: over the positions that show [MASK].
        loss_nsp, accuracy_nsp: over the pairs.
    """

    loss: float
    loss_mlm: float
    accuracy_mlm: float
    loss_mask_token: float | None
    accuracy_mask_token: float | None
    loss_nsp: float | None
    accuracy_nsp: float | None

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss)


@dataclass(frozen=True)
class HeldOutSource:
    """The held-out text of one source of a mixture.

    Attributes:
        name: of the source.
        share: its share in the loss of all sources together; these add up to 1.
        batches: its held-out batches.
    """

    name: str
    share: float
    batches: list[PackedBatch]


def together(found: Sequence[HeldOut], shares: Sequence[float]) -> HeldOut:
    """Return the means over sources, each with its share of the mixture.

    A source that has no value, for example no pairs, is left out of that mean.

    Args:
        found: of each source.
        shares: as in HeldOutSource.
    """
    if len(found) == 1:
        return found[0]
    values = {
        field.name: mean_by_share([getattr(one, field.name) for one in found], shares)
        for field in fields(HeldOut)
    }
    return HeldOut(**values)  # pyright: ignore[reportArgumentType]


def mean_by_share(values: Sequence[float | None], shares: Sequence[float]) -> float | None:
    """Return the mean of the values that are there, weighted by their shares; None without any."""
    given = [(v, share) for v, share in zip(values, shares, strict=True) if v is not None and share]
    total = sum(share for _, share in given)
    return sum(v * share for v, share in given) / total if given else None


def mean_baselines(found: Sequence[dict[str, float]], shares: Sequence[float]) -> dict[str, float]:
    """Return the means of the baselines of sources, by their shares; of those that all have."""
    if len(found) == 1:
        return found[0]
    return {
        name: sum(one[name] * share for one, share in zip(found, shares, strict=True))
        for name in found[0]
        if all(name in one for one in found)
    }


def heldout_sums(losses: Losses, batch: PackedBatch, mask_id: int) -> Tensor:
    """Sum one batch's losses, correct predictions and counts.

    Args:
        losses: of the batch, by token and by pair.
        batch: the pack.
        mask_id: the id of [MASK].

    Returns:
        float64 [HELDOUT_SUMS]: loss, correct and count of all masked tokens, then the same of the
        positions that show [MASK], then of the pairs.
    """
    shown = batch.input_ids[batch.masked_positions] == mask_id
    paired = batch.next_sentence_labels >= 0
    parts = []
    for values, correct, counted in (
        (losses.token_losses, losses.token_correct, torch.ones_like(shown)),
        (losses.token_losses, losses.token_correct, shown),
        (losses.pair_losses, losses.pair_correct, paired),
    ):
        # Not `values[counted]`: the host would have to wait for its size.
        parts += [
            torch.where(counted, values.double(), 0.0).sum(),
            (correct & counted).sum().double(),
            counted.sum().double(),
        ]
    return torch.stack(parts)


def heldout_means(sums: Tensor) -> HeldOut:
    """Turn the sums over all batches and ranks, float64 [HELDOUT_SUMS], into means."""
    rows = sums.view(_ROWS, 3).tolist()
    (mlm, mlm_accuracy), (shown, shown_accuracy), (nsp, nsp_accuracy) = [
        (loss / n, correct / n) if n else (None, None) for loss, correct, n in rows
    ]
    assert mlm is not None and mlm_accuracy is not None, "a held-out set without a masked token"
    return HeldOut(
        loss=mlm + (nsp or 0.0),
        loss_mlm=mlm,
        accuracy_mlm=mlm_accuracy,
        loss_mask_token=shown,
        accuracy_mask_token=shown_accuracy,
        loss_nsp=nsp,
        accuracy_nsp=nsp_accuracy,
    )
