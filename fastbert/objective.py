"""Loss = MLM + NSP: the mean over the masked tokens of the global batch plus the mean over its pairs, from one forward pass."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Losses:
    """What one packed batch adds to the step: summed over the step's batches, `mlm` and `nsp` are the means of the whole."""

    mlm: Tensor  # scalar, fp32, nats, with gradient
    nsp: Tensor  # scalar, fp32, nats, with gradient; 0 where the objective has no pairs
    token_losses: Tensor  # fp32 [M], nats, detached
    token_hits: Tensor  # bool [M]
    pair_losses: Tensor  # fp32 [B], nats, detached; 0 where an example has no pair
    pair_hits: Tensor  # bool [B]

    @property
    def loss(self) -> Tensor:
        return self.mlm + self.nsp


def losses(outputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]) -> Losses:
    """Name what `BertForPreTraining.forward` returns."""
    return Losses(*outputs)
