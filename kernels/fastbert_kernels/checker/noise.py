"""Torch in which the result of every operator moves by one rounding, up or down: `Noise`.

The reference in fp64 inside of it shows what the roundings of all its steps can do to each element
of a result, wherever terms cancel.

Source: Parker, Monte Carlo Arithmetic, 1997.
"""

# pyright: basic
# Operators of torch have no types.

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from fastbert_kernels.checker.serial import FUSED


class Noise(TorchDispatchMode):
    """Operators inside the block have relative errors of `eps`.

    Args:
        eps: of a dtype.
        seed: of the signs.
    """

    def __init__(self, eps: float, seed: int):
        super().__init__()
        self.eps, self.generator = eps, torch.Generator().manual_seed(seed)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in FUSED:
            with self:
                result = FUSED[func](*args, **(kwargs or {}))
            if result is not NotImplemented:
                return result
        result = func(*args, **(kwargs or {}))
        if any(returned.alias_info for returned in func._schema.returns):
            return result  # a view, or a tensor that was changed in place
        return tree_map(self._moved, result)

    def _moved(self, x: Any) -> Any:
        if not (isinstance(x, Tensor) and x.is_floating_point()):
            return x
        signs = torch.randint(0, 2, x.shape, generator=self.generator) * 2 - 1
        return x * (1 + signs * self.eps)
