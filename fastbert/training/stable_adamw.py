"""StableAdamW: AdamW with smaller steps for a parameter whose gradients outgrow their average.

With m and v as in Adam, both corrected for their start at 0, each parameter x has

    RMS = sqrt(mean(g^2 / max(v, eps^2)))
    x = x - lr / max(1, RMS) (wd x + m / (sqrt(v) + eps))

The RMS is 1 where gradients are as large as they were on average, and grows where v has not yet
followed them. It takes the place of clipping: no norm over all gradients is needed.

At ZeRO stages 1 and 2 a rank holds a share of all parameters as one flat tensor for each group. It
sums g^2 / max(v, eps^2) over the part of each parameter that it has, and the ranks add these sums.

Source: Wortsman et al., 2023, "Stable and low-precision training for large-scale vision-language
models", algorithm 2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastbert.cluster.group import Group


class Piece(NamedTuple):
    """The part of a parameter that lies in a tensor that is updated: its elements [low, high)."""

    number: int  # of the parameter
    low: int
    high: int


class _Moments(NamedTuple):
    """What the update of a tensor needs, piece by piece; flat views."""

    pieces: list[Piece]
    x: list[Tensor]
    g: list[Tensor]
    m: list[Tensor]
    root: list[Tensor]  # sqrt of the corrected v, a new tensor
    step: float


class StableAdamW(torch.optim.Optimizer):
    """See above.

    Args:
        groups: of parameters, each with its weight_decay.
        lr: learning rate.
        betas: decay rates of m and v.
        eps: added to the denominator; its square is the least v in the RMS.
    """

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        lr: float,
        betas: tuple[float, float],
        eps: float,
    ):
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps})
        self._parameters = [list(group["params"]) for group in self.param_groups]
        every = [p for parameters in self._parameters for p in parameters]
        self._numbers = {p: number for number, p in enumerate(every)}
        self._sizes = [float(max(p.numel(), 1)) for p in every]
        self._pieces = {p: [Piece(number, 0, p.numel())] for number, p in enumerate(every)}
        self._group: Group | None = None

    def use_shares(self, starts: Mapping[Tensor, int], group: Group) -> None:
        """Update this rank's share of each group, a flat tensor that is in its parameters' place.

        Args:
            starts: where each parameter that has elements in the share of its group begins, counted
                from the first element of the share. It is negative if it begins in an earlier
                rank's share.
            group: the ranks, in the order of their shares.
        """
        self._pieces = {}
        for own, parameters in zip(self.param_groups, self._parameters, strict=True):
            (share,) = own["params"]
            self._pieces[share] = [
                Piece(
                    self._numbers[p],
                    max(starts[p], 0),
                    min(starts[p] + p.numel(), share.numel()),
                )
                for p in parameters
                if p in starts
            ]
        self._group = group

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is None
        found = [
            (group, self._update_moments(group, p))
            for group in self.param_groups
            for p in group["params"]
            if p.grad is not None
        ]
        if found:
            rates = self._rates(found)
            for group, moments in found:
                _apply(group, moments, rates)

    def _update_moments(self, group: dict[str, Any], p: Tensor) -> _Moments:
        (beta1, beta2), state, gradient = group["betas"], self.state[p], p.grad
        assert gradient is not None
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        state["step"] += 1
        step = float(state["step"])
        state["exp_avg"].lerp_(gradient, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        root = (state["exp_avg_sq"] / (1 - beta2**step)).sqrt_()
        pieces = self._pieces[p]

        def parts(tensor: Tensor) -> list[Tensor]:
            flat = tensor.view(-1)
            return [flat[low:high] for _, low, high in pieces]

        return _Moments(
            pieces, parts(p), parts(gradient), parts(state["exp_avg"]), parts(root), step
        )

    def _rates(self, found: Sequence[tuple[dict[str, Any], _Moments]]) -> list[float]:
        """1 / max(1, RMS) of each parameter, by its number. It waits for the device once."""
        numbers = [piece.number for _, moments in found for piece in moments.pieces]
        norms: list[Tensor] = []
        for group, moments in found:
            if moments.pieces:
                ratios = torch._foreach_clamp_min(moments.root, group["eps"])
                ratios = torch._foreach_div(moments.g, ratios)
                norms += torch._foreach_norm(ratios)
        totals = torch.zeros(len(self._sizes), dtype=torch.float64)
        if norms:
            squares = torch.stack(norms).double().square().cpu()
            totals.index_add_(0, torch.tensor(numbers), squares)
        if self._group is not None:
            totals = self._group.sum(totals.to(self._group.device))
        rms = (totals.cpu() / torch.tensor(self._sizes, dtype=torch.float64)).sqrt()
        return (1 / rms.clamp_(min=1)).tolist()


def _apply(group: dict[str, Any], moments: _Moments, rates: Sequence[float]) -> None:
    if not moments.pieces:
        return
    steps = [group["lr"] * rates[piece.number] for piece in moments.pieces]
    if group["weight_decay"]:
        torch._foreach_mul_(moments.x, [1 - step * group["weight_decay"] for step in steps])
    torch._foreach_add_(moments.root, group["eps"])
    correction = 1 - group["betas"][0] ** moments.step
    torch._foreach_addcdiv_(
        moments.x, moments.m, moments.root, [-step / correction for step in steps]
    )
