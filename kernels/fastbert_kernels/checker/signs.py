"""Inputs that are all negative, or all positive: what a wrong neutral element needs to show.

A masked load with `other=0` under a maximum is right as long as the largest value is positive,
which is nearly always so for normally distributed inputs. Here inputs that have both signs are
moved to one side of zero. That keeps their order and differences, and needs inputs that do not
depend on one another: where the reference does not read one of them (saved statistics, say), it
was made from the others.
"""

# pyright: basic
# The arguments of other people's functions may be anything.

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fastbert_kernels.checker.execute import copy, run, same


def one_sided(inputs: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Twice the inputs, with those that have both signs on one side of zero.

    First all of them are negative; then they are positive and negative in turn, so that products
    of two have either sign.

    Yields:
        Which inputs have which sign, in words, and the inputs.
    """
    both = [name for name, x in inputs.items() if _has_both_signs(x)]
    if not both:
        return
    for first in (-1, 1):
        changed, words = copy(inputs), []
        for number, name in enumerate(both):
            sign = -1 if first < 0 or number % 2 else 1
            changed[name] = _moved(inputs[name], sign)
            words.append(f"{name} is {'positive' if sign > 0 else 'negative'}")
        yield f"where all of {' and of '.join(words)}", changed


def unread(reference: Callable[..., Any], inputs: Mapping[str, Any]) -> list[str]:
    """The floating-point inputs whose NaN changes no output of the reference."""
    found: list[str] = []
    plain = run(reference, inputs, gradients=()).values
    for name, x in inputs.items():
        if isinstance(x, Tensor) and x.is_floating_point() and x.numel():
            poisoned = {**copy(inputs), name: torch.full_like(x, float("nan"))}
            values = run(reference, poisoned, gradients=()).values
            if not any(_reached(value, plain[key]) for key, value in values.items()):
                found.append(name)
    return found


def _reached(value: Tensor, plain: Tensor) -> bool:
    """Whether NaN of an input shows in an output, or has changed it."""
    spread = value.is_floating_point() and bool(value.double().isnan().any())
    return spread or not same(value, plain)


def _has_both_signs(x: Any) -> bool:
    if not (isinstance(x, Tensor) and x.is_floating_point() and x.numel()):
        return False
    x = x.double()  # torch compares no fp8
    return bool(x.isfinite().all() and (x < 0).any() and (x > 0).any())


def _moved(x: Tensor, sign: int) -> Tensor:
    """On one side of zero, as far from it as its values are from one another at most."""
    wide = x.detach().double()
    spread = wide.max() - wide.min()
    moved = wide - wide.min() + spread if sign > 0 else wide - wide.max() - spread
    return moved.to(x.dtype)
