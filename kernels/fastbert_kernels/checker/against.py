"""Compare what a kernel returns with the reference: outputs, gradients and changed inputs."""

# pyright: basic
# The results of other people's functions may be anything.

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastbert_kernels.checker.bounds import (
    DRAWS,
    FEW,
    Comparison,
    compare,
    compare_small,
    relative_error,
    stand_in,
)
from fastbert_kernels.checker.definition import DTYPES, Check, run_reference
from fastbert_kernels.checker.execute import Outcome, by_a_rounding, coarsest, draw
from fastbert_kernels.checker.findings import of_output
from fastbert_kernels.checker.noise import Noise
from fastbert_kernels.checker.report import NOTE, Finding, Shape, count
from fastbert_kernels.checker.serial import Serial


@dataclass(frozen=True)
class Samples:
    """Results of the reference for several draws of the inputs, each with the exact ones.

    Attributes:
        plain: of plain torch.
        serial: of plain torch, with sums taken one term after the other.
        moved: exact ones, of inputs that have each moved by one rounding; of the check's own draw
            first.
        sensitive: of the check's own draw, in fp64 with a rounding of the dtype at every step.
    """

    plain: list[tuple[Outcome, Outcome]]
    serial: list[tuple[Outcome, Outcome]]
    moved: list[tuple[Outcome, Outcome]]
    sensitive: list[Outcome]

    def typical_error(self, name: str, few: bool) -> float:
        """The largest relative error of an output; of all draws where it has few elements.

        An index of a largest element may be any other one after a rounding, so integers do not
        follow the inputs that have moved.
        """
        moved = [(x, y) for x, y in self.moved if x.values[name].is_floating_point()]
        pairs = self.plain + self.serial + moved if few else self.serial[:1] + moved[:1]
        errors = [relative_error(y.values[name], x.values[name]) for x, y in pairs]
        return max(errors, default=0.0)

    def of(self, name: str) -> list[tuple[Tensor, Tensor]]:
        return [(x.values[name], y.values[name]) for x, y in self.plain + self.serial + self.moved]


def draw_samples(checked: Check, shape: Shape, dtype: str) -> Samples:
    own, samples = draw(checked.inputs, DTYPES[dtype], shape), Samples([], [], [], [])
    rounding = coarsest(own, DTYPES[dtype])
    for number in range(DRAWS + 1):
        inputs = draw(checked.inputs, DTYPES[dtype], shape, number)
        exact = run_reference(checked, inputs, dtype, exact=True)
        plain = run_reference(checked, inputs, dtype)
        moved = run_reference(checked, by_a_rounding(inputs), dtype, exact=True)
        with Serial():
            serial = run_reference(checked, inputs, dtype)
        if not (exact.error or plain.error or serial.error or moved.error):
            samples.plain.append((exact, plain))
            samples.serial.append((exact, serial))
            samples.moved.append((exact, moved))
        changed = by_a_rounding(own, rounding, number)
        with Noise(torch.finfo(rounding).eps, number):
            sensitive = run_reference(checked, changed, dtype, exact=True)
        if not sensitive.error:
            samples.sensitive.append(sensitive)
    return samples


def against(
    ours: Outcome,
    plain: Outcome,
    exact: Outcome,
    left_out: set[str],
    samples: Callable[[], Samples],
    at: Mapping[str, Any],
) -> tuple[list[Finding], dict[str, float], dict[str, float]]:
    """Compare every output and gradient with the reference.

    Returns:
        Findings; by output and gradient, the error over the bound; and the bound.
    """
    found: list[Finding] = []
    errors: dict[str, float] = {}
    bounds: dict[str, float] = {}
    if len(ours.outputs) != len(plain.outputs):
        has = count(len(ours.outputs), "output")
        message = f"{has}, where the reference has {len(plain.outputs)}"
        return [Finding("wrong form", message, **at)], errors, bounds
    names = dict(zip(ours.outputs, plain.outputs, strict=True))
    names |= {n: n for n in ours.values if n not in ours.outputs}
    stand = stand_in(exact.values)
    for name, theirs in names.items():
        value = ours.values[name]
        if theirs not in plain.values:
            continue
        expected = plain.values[theirs]
        if value.shape != expected.shape:
            message = f"has shape {list(value.shape)}, the reference {list(expected.shape)}"
            found.append(of_output("wrong form", message, ours, name, at))
            continue
        if value.dtype != expected.dtype:
            message = f"is {_short(value.dtype)}, the reference {_short(expected.dtype)}"
            found.append(replace(of_output("wrong form", message, ours, name, at), severity=NOTE))
        if not value.numel() or name in left_out:
            continue
        if value.dtype == torch.bool and (strange := int((value.view(torch.uint8) > 1).sum())):
            message = f"has {count(strange, 'element')} whose byte is neither 0 nor 1"
            found.append(of_output("wrong result", message, ours, name, at))
        result = compare(value, expected, exact.values[theirs], stand)
        if result.ratio > 1:
            typical = samples().typical_error(theirs, value.numel() < FEW)
            result = compare(value, expected, exact.values[theirs], stand, typical)
        errors[name], bounds[name] = result.ratio, result.allowed
        whose = "the bound"
        if result.ratio <= 1:
            whose = "the bound of elements of its size"
            one = [(exact.values[theirs], expected)]
            small = compare_small(value, expected, exact.values[theirs], one)
            if small.ratio > 1:
                more = one + samples().of(theirs)
                moved = [outcome.values[theirs] for outcome in samples().sensitive]
                result = compare_small(value, expected, exact.values[theirs], more, moved)
        if result.ratio > 1:
            found.append(wrong(name, result, whose, ours, at))
    missing = [n for n in plain.values if n not in plain.outputs and n not in ours.values]
    if missing and len(ours.values) > len(ours.outputs):
        message = f"no gradient for {', '.join(missing)}, which the reference has"
        found.append(Finding("wrong form", message, **at))
    return found, errors, bounds


def wrong(
    name: str, result: Comparison, whose: str, ours: Outcome, at: Mapping[str, Any]
) -> Finding:
    times = "above" if math.isinf(result.ratio) else f"{result.ratio:.3g} times"
    message = (
        f"is {times} {whose}: at {list(result.index)} it is "
        f"{result.got:.6g}, expected {result.expected:.6g} within {result.allowed:.3g}"
    )
    return of_output("wrong result", message, ours, name, at)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def changed_inputs(ours: Outcome, plain: Outcome, at: Mapping[str, Any]) -> list[Finding]:
    return [
        replace(of_output("changed input", "is changed", ours, name, at), severity=NOTE)
        for name in ours.changed
        if name not in plain.changed
    ]
