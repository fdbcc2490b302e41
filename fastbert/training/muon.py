"""Muon for the matrices of the layers, and AdamW for all other parameters, as one optimizer.

    m = mu m + (1 - mu) g
    u = mu m + (1 - mu) g                    Nesterov's momentum
    x = x - lr wd x - lr 0.2 sqrt(max(rows, columns)) O(u)

O makes all singular values of a matrix about 1 (newton_schulz.py), so a step moves the weights by
the same amount in every direction that the gradients have. The elements of O(u) have a root mean
square of 1 / sqrt(max(rows, columns)), and those of an AdamW step about 0.2: with the factor, both
take the same learning rate and weight decay.

The matrices are those of attention and feed-forward. Query, key and value are orthogonalised one by
one, although they lie in one parameter, and so are ModernBERT's input and gate. Embeddings and
heads map to or from tokens, not between hidden states, and AdamW suits them better.

At ZeRO stages 1 and 2, a rank holds a share of all these parameters as one flat tensor. Momentum is
computed on the share. Then the ranks gather u, and each of them orthogonalises the matrices that
overlap its share.

Sources: Jordan et al., 2024, "Muon: An optimizer for hidden layers in neural networks"; Liu et al.,
2025, "Muon is Scalable for LLM Training", section 2.2, for weight decay and the factor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from fastbert.cluster.group import Group
from fastbert.config import OptimizerConfig
from fastbert.training.newton_schulz import orthogonalise

RMS = 0.2  # of an AdamW step's elements, over the learning rate


def is_hidden(name: str, shape: Sequence[int]) -> bool:
    """Whether Muon updates the parameter of this name."""
    return name.startswith("layers.") and len(shape) == 2


class Matrix(NamedTuple):
    """Where a matrix lies in a flat tensor: the number of its first element, and its shape."""

    start: int
    rows: int
    columns: int


def matrices(name: str, shape: Sequence[int], start: int = 0) -> list[Matrix]:
    """The matrices of a hidden parameter that begins at `start`.

    It is one, or query, key and value, or the input and the gate of a gated feed-forward network.
    """
    parts = 3 if name.endswith("qkv_weight") else 2 if name.endswith("input_gate_weight") else 1
    rows, columns = shape[0] // parts, shape[1]
    return [Matrix(start + i * rows * columns, rows, columns) for i in range(parts)]


class Muon(torch.optim.Optimizer):
    """See above.

    Args:
        hidden: the parameters that `is_hidden`, by name.
        groups: of the other parameters, each with its weight_decay.
        config: the recipe's section.
        dtype: of the products in O.
    """

    def __init__(
        self,
        hidden: Mapping[str, Tensor],
        groups: Sequence[dict[str, Any]],
        config: OptimizerConfig,
        dtype: torch.dtype = torch.float32,
    ):
        own = {"params": list(hidden.values()), "weight_decay": config.weight_decay}
        super().__init__([own, *groups], {"lr": config.lr, "hidden": False})
        self.param_groups[0]["hidden"] = True
        self._config, self._dtype = config, dtype
        self._names = {parameter: name for name, parameter in hidden.items()}
        # The matrices in each tensor that is updated, or at stages 1 and 2 in all ranks' shares.
        self._matrices = {p: matrices(name, p.shape) for p, name in self._names.items()}
        self._group: Group | None = None

    def use_shares(self, starts: Mapping[Tensor, int], group: Group) -> None:
        """Update this rank's share of the hidden parameters, a flat tensor that is in their place.

        Args:
            starts: where each parameter that has elements in the share begins, counted from the
                first element of the share. It is negative if it begins in an earlier rank's share.
            group: the ranks, in the order of their shares.
        """
        (share,) = self.param_groups[0]["params"]
        first = group.rank * share.numel()
        self._matrices = {
            share: [
                matrix
                for parameter, start in starts.items()
                if parameter in self._names
                for matrix in matrices(self._names[parameter], parameter.shape, first + start)
                if -matrix.rows * matrix.columns < matrix.start - first < share.numel()
            ]
        }
        self._group = group

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            update = self._update_hidden if group["hidden"] else self._update_others
            update(group, [p for p in group["params"] if p.grad is not None])

    def _update_hidden(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        # Matrices of the same shape are orthogonalised together.
        alike: dict[tuple[int, int], list[tuple[Tensor, Tensor, int]]] = {}
        for parameter in parameters:
            u = self._nesterov(parameter)
            first, size = 0, parameter.numel()
            if self._group is not None:
                first, u = self._group.rank * size, self._group.all_gather(u.to(self._dtype))
            for start, rows, columns in self._matrices[parameter]:
                end = start + rows * columns
                # The part of the matrix that lies in `parameter`.
                low, high = max(start, first), min(end, first + size)
                part = parameter.view(-1)[low - first : high - first]
                matrix = u[start:end].view(rows, columns)
                alike.setdefault((rows, columns), []).append((matrix, part, low - start))
        keep = 1 - group["lr"] * group["weight_decay"]
        for (rows, columns), found in alike.items():
            done = orthogonalise(torch.stack([matrix for matrix, *_ in found]).to(self._dtype))
            rate = group["lr"] * RMS * math.sqrt(max(rows, columns))
            for o, (_, part, skipped) in zip(done, found, strict=True):
                o = o.flatten()[skipped : skipped + part.numel()]
                part.mul_(keep).add_(o.to(part), alpha=-rate)

    def _nesterov(self, parameter: Tensor) -> Tensor:
        """Update m, and return u, flat."""
        state, g = self.state[parameter], parameter.grad
        assert g is not None
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        m = state["momentum_buffer"].lerp_(g, 1 - self._config.momentum)
        return g.lerp(m, self._config.momentum).flatten()

    def _update_others(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        for p in parameters:
            if not self.state[p]:
                self.state[p] = {
                    "step": torch.zeros((), device=p.device),
                    "exp_avg": torch.zeros_like(p),
                    "exp_avg_sq": torch.zeros_like(p),
                }
        states = [self.state[p] for p in parameters]
        adamw(
            parameters,
            [p.grad for p in parameters if p.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=self._config.betas[0],
            beta2=self._config.betas[1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=self._config.eps,
            maximize=False,
        )
