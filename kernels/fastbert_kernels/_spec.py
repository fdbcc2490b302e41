"""What tests and benchmarks need to know about an operation, in one record."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Shape = dict[str, Any]


@dataclass(frozen=True)
class Spec:
    """One operation.

    Attributes:
        function: the public function; called by keyword, with `impl`.
        implementations: the values of `impl` it takes, "reference" among them.
        shapes: sizes that the tests walk, by axis letter: around tiles, one token, uneven, empty.
        inputs: (shape, dtype, dropout_p) to the function's arguments, drawn by `generator(shape)`.
        differentiable: the arguments with a gradient; the (first) result is differentiated.
        least_bytes: (shape, bytes an element) to the fewest bytes that both passes can move.
        flops: shape to the floating-point operations of forward and backward.
        dropout: whether it takes dropout_p.
    """

    function: Callable[..., Any]
    implementations: tuple[str, ...]
    shapes: tuple[Shape, ...]
    inputs: Callable[[Shape, torch.dtype, float], dict[str, Any]]
    differentiable: tuple[str, ...]
    least_bytes: Callable[[Shape, int], int]
    flops: Callable[[Shape], int]
    dropout: bool = True


def generator(shape: Shape) -> torch.Generator:
    """Return a generator seeded by the shape alone, so that a case is the same everywhere."""
    return torch.Generator().manual_seed(
        sum((i + 1) * (v if isinstance(v, int) else sum(v)) for i, v in enumerate(shape.values()))
    )


def normal(draw: torch.Generator, dtype: torch.dtype, *size: int, std: float = 1.0) -> torch.Tensor:
    """Draw in fp32, then round to `dtype`, so that a test may promote the same inputs again."""
    return (torch.randn(size, generator=draw) * std).to(dtype)


def integers(draw: torch.Generator, below: int, *size: int) -> torch.Tensor:
    """int64 in [0, below)."""
    return torch.randint(below, size, generator=draw)


def random_seeds(draw: torch.Generator, size: int) -> torch.Tensor:
    """int64 dropout seeds."""
    return torch.randint(-(2**63), 2**63 - 1, (size,), generator=draw)
