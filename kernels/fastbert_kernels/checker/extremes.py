"""Inputs that a check seldom has: of one sign, equal, zeros, large ones, NaN and infinity."""

# pyright: basic
# The results of other people's functions may be anything.

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastbert_kernels.checker.against import wrong
from fastbert_kernels.checker.bounds import compare, stand_in
from fastbert_kernels.checker.definition import DTYPES, Check, run_kernel, run_reference
from fastbert_kernels.checker.execute import Outcome, copy, draw, run
from fastbert_kernels.checker.findings import of_output
from fastbert_kernels.checker.report import FAULT, NOTE, Finding, Report, count
from fastbert_kernels.checker.signs import one_sided, unread

# Times; exp() overflows at 88 in fp32, and normally distributed numbers reach 3. Their squares
# overflow in fp16.
LARGER = 100
# Whole numbers up to this one, whose products and sums are exact in fp32.
WHOLE = 3
SPECIAL, LARGE, ZEROS, EQUAL = "NaN and infinity", "large values", "zeros", "equal values"


def add_extremes(checked: Check, report: Report) -> None:
    """Run the first shape with inputs that overflow, vanish or are not finite, one at a time."""
    shape = dict(checked.shapes[0])
    inputs = draw(checked.inputs, DTYPES[checked.dtypes[0]], shape)
    if ignored := unread(checked.reference, inputs):
        names = ", ".join(ignored)
        report.remarks.append(f"NaN, infinity, large values: the reference does not read {names}")
        return
    for dtype in checked.dtypes:
        at: dict[str, Any] = {"shape": shape, "dtype": dtype}
        inputs = draw(checked.inputs, DTYPES[dtype], shape)
        for kind, where, changed in _extremes(inputs):
            if kind != LARGE and dtype != checked.dtypes[0]:
                continue  # only overflows depend on the dtype
            with torch.no_grad():
                ours = run_kernel(checked, changed, dtype)
                plain = run_reference(checked, changed, dtype)
                coarse = [] if kind == SPECIAL else _coarse(checked, changed, dtype)
            if ours.error or plain.error or any(outcome.error for outcome in coarse):
                continue
            for mine, theirs in zip(ours.outputs, plain.outputs, strict=False):
                got, expected = ours.values[mine], plain.values[theirs]
                if got.shape != expected.shape:
                    continue
                if kind == SPECIAL:
                    message = _unlike(got, expected)
                else:
                    message = _lost(got, expected)
                    wide, rounded = (outcome.values[theirs] for outcome in coarse)
                    known = torch.where(expected.double().isfinite(), rounded.double(), torch.nan)
                    result = compare(got, known, wide, stand_in(coarse[0].values))
                    if not message and result.ratio > 1:
                        message = wrong(mine, result, "the bound of bf16", ours, at).message
                if message:
                    finding = of_output(kind, f"{message}, where {where}", ours, mine, at)
                    # Zeros and large values may be out of a kernel's domain. It need not read all
                    # of an input. Formulas also differ in what they make of infinity, as its
                    # difference from itself is NaN.
                    spreads = where.endswith(" nan") and "should not be NaN" in message
                    report.add(replace(finding, severity=FAULT if spreads else NOTE))


def add_equal(checked: Check, report: Report) -> None:
    """Run the first shape with inputs of few distinct values, if an output is no floating point.

    The index of the largest of some values, or whether a value is the largest one, depends on which
    of equal ones is taken. Numbers that are drawn are hardly ever equal.
    """
    shape, dtype = dict(checked.shapes[0]), checked.dtypes[0]
    inputs = draw(checked.inputs, DTYPES[dtype], shape)
    changed = {name: _whole(x) for name, x in copy(inputs).items()}
    with torch.no_grad():
        plain = run_reference(checked, changed, dtype)
        discrete = [n for n in plain.outputs if not plain.values[n].is_floating_point()]
        if plain.error or not discrete or unread(checked.reference, inputs):
            return
        ours = run_kernel(checked, changed, dtype)
    for mine, theirs in zip(ours.outputs, plain.outputs, strict=False):
        got, expected = ours.values[mine], plain.values[theirs]
        if ours.error or theirs not in discrete or got.shape != expected.shape:
            continue
        if different := int((got.double() != expected.double()).sum()):
            message = (
                f"has {count(different, 'element')} that the reference has not, where inputs are "
                f"whole numbers from -{WHOLE} to {WHOLE}, many of them equal"
            )
            at: dict[str, Any] = {"shape": shape, "dtype": dtype}
            # Which of equal values is taken may be left open.
            report.add(replace(of_output(EQUAL, message, ours, mine, at), severity=NOTE))


def _whole(x: Any) -> Any:
    """A floating-point tensor with whole numbers in its place, in about the same order."""
    if not (isinstance(x, Tensor) and x.is_floating_point() and x.numel()):
        return x
    wide = x.double()
    scale = WHOLE / wide.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    return (wide * scale).round().to(x.dtype)


def _extremes(inputs: Mapping[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Kinds of findings, what is special about an input, in words, and all inputs."""
    for name, x in inputs.items():
        if not (isinstance(x, Tensor) and x.numel()):
            continue
        if x.is_floating_point():
            place = tuple(n // 2 for n in x.shape)
            for special in (float("nan"), float("inf"), float("-inf")):
                changed = copy(inputs)
                changed[name][place] = special
                yield SPECIAL, f"{name}{list(place)} is {special}", changed
            large = (x.double() * LARGER).to(x.dtype)  # torch does not multiply fp8
            yield LARGE, f"{name} is {LARGER} times as large", {**copy(inputs), name: large}
        if x.is_floating_point() or x.dtype == torch.bool:
            yield ZEROS, f"{name} is zero", {**copy(inputs), name: torch.zeros_like(x)}


def of_one_sign(
    checked: Check,
    inputs: Mapping[str, Any],
    dtype: str,
    remarks: list[str],
    at: Mapping[str, Any],
) -> Iterator[tuple[str, list[Finding]]]:
    """Wrong results for inputs on one side of zero, and which inputs these are.

    The bound is that of plain torch in bf16, since this is about wrong values and not about
    rounding: sums of one sign have other errors than those of both.
    """
    variants = list(one_sided(inputs))
    ignored = unread(checked.reference, inputs) if variants else []
    if ignored:
        remarks.append(f"inputs of one sign: the reference does not read {', '.join(ignored)}")
        return
    for which, changed in variants:
        ours = run_kernel(checked, changed, dtype)
        wide, coarse = _coarse(checked, changed, dtype)
        if ours.error or wide.error or coarse.error:
            continue
        found: list[Finding] = []
        names = dict(zip(ours.outputs, coarse.outputs, strict=False))
        names |= {n: n for n in ours.values if n not in ours.outputs and n in coarse.values}
        for name, theirs in names.items():
            value, plain = ours.values[name], coarse.values[theirs]
            if value.shape != plain.shape or not value.numel():
                continue
            result = compare(value, plain, wide.values[theirs], stand_in(wide.values))
            if result.ratio > 1:
                found.append(wrong(name, result, "the bound of bf16", ours, at))
        yield which, found


def _coarse(checked: Check, inputs: Mapping[str, Any], dtype: str) -> list[Outcome]:
    """The reference in fp64, and in bf16."""
    return [
        run(checked.reference, inputs, target, DTYPES[dtype], checked.gradients)
        for target in (torch.float64, torch.bfloat16)
    ]


def _lost(ours: Tensor, plain: Tensor) -> str:
    """How many elements are not finite, and are so in the reference; "" if there are none."""
    lost = int((plain.double().isfinite() & ~ours.double().isfinite()).sum())
    return (
        f"has {count(lost, 'element')} that should be finite, as in the reference" if lost else ""
    )


def _unlike(ours: Tensor, plain: Tensor) -> str:
    """How NaN and infinity differ between two results; "" if they are at the same places."""
    if ours.shape != plain.shape or not ours.is_floating_point():
        return ""
    ours, plain = ours.double(), plain.double()  # torch has no isinf of fp8
    lost = int((plain.isnan() & ~ours.isnan()).sum())
    gained = int((ours.isnan() & ~plain.isnan()).sum())
    parts = [f"{count(lost, 'element')} that should be NaN, as in the reference"] if lost else []
    parts += [f"{count(gained, 'element')} that should not be NaN"] if gained else []
    if parts:
        return "has " + " and ".join(parts)
    other = int((ours.isinf() != plain.isinf()).sum())
    return f"has {count(other, 'element')} that should be infinite, or should not" if other else ""
