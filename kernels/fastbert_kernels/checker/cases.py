"""`check`: run a kernel at every shape and dtype, and compare it with its reference.

Each case runs the kernel three times, with other orders of the programs and other values in the
lanes that a mask turns off. If all three give the same bits, and no access is at fault, then
neither order nor undefined values matter there. Otherwise further runs tell which of them it was.
"""

# pyright: basic
# The results of other people's functions may be anything.

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastbert_kernels.checker.against import against, changed_inputs, draw_samples
from fastbert_kernels.checker.definition import (
    DTYPES,
    FIRST,
    Check,
    run_kernel,
    run_reference,
    validate,
)
from fastbert_kernels.checker.execute import Outcome, draw
from fastbert_kernels.checker.extremes import add_equal, add_extremes, of_one_sign
from fastbert_kernels.checker.findings import faults_of, in_order, of_output
from fastbert_kernels.checker.report import FAULT, Case, Finding, Moved, Report, Shape, count
from fastbert_kernels.checker.shrink import shrink
from fastbert_kernels.checker.stability import ORDER, differing, judge_order, why_unstable

__all__ = ["DTYPES", "Check", "Examined", "carry_out", "check", "examine"]

OTHERS: tuple[dict[str, Any], ...] = (
    {"order": "reversed", "undefined": "largest"},
    {"order": 1, "undefined": "smallest"},
)
UNWRITTEN = "not fully written"
# What needs which runs, beside the first.
ACCESSES = (
    *("out of bounds", "race", "uninitialised read", "assertion", "deadlock", "exception"),
    "grid",
)
UNSTABLE = ("run to run", "masked-off value", ORDER)
COMPARED = ("wrong result", "wrong form", "changed input", ORDER)


def check(
    kernel: Callable[..., Any],
    reference: Callable[..., Any],
    inputs: Callable[..., Mapping[str, Any]],
    shapes: Sequence[Mapping[str, Any]],
    **more: Any,
) -> Report:
    """Check a kernel; the arguments are those of `Check`.

    Returns:
        The report; `report.faults` is empty if nothing is wrong, and `print(report)` shows it.

    Raises:
        RuntimeError: Triton was imported without TRITON_INTERPRET=1.
        ValueError: no shape, or an unknown dtype.
    """
    return carry_out(Check(kernel, reference, inputs, shapes, **more))


def carry_out(checked: Check) -> Report:
    """The report of a Check."""
    name = checked.name or getattr(checked.kernel, "__name__", "kernel")
    validate(checked, name)
    report = Report(name)
    functions: list[Any] = []
    types: dict[tuple[str, str], set[str]] = {}
    for dtype in checked.dtypes:
        for shape in checked.shapes:
            case = examine(checked, dict(shape), dtype)
            for finding in case.findings:
                if not any(known.key == finding.key for known in report.findings):
                    report.add(shrink(finding, functools.partial(_again, checked, finding)))
            report.cases.append(case.row)
            report.remarks += [r for r in case.remarks if r not in report.remarks]
            functions += [f for f in case.functions if f not in functions]
            for key, type_ in case.types.items():
                types.setdefault(key, set()).add(type_)
    if report.faults:
        report.remarks.append(
            "NaN and infinity: there are other faults, which they would only repeat"
        )
    else:
        add_extremes(checked, report)
        add_equal(checked, report)
    if checked.large:
        from fastbert_kernels.checker.overflow import overflows

        for shape in checked.large:
            for finding in overflows(checked, dict(shape), report.remarks):
                report.add(finding)
    if functions:
        from fastbert_kernels.checker.lint import lint_functions

        for finding in lint_functions(functions, types):
            report.add(finding)
    return report


def _again(checked: Check, finding: Finding, shape: Shape) -> list[Finding]:
    return examine(checked, shape, finding.dtype, finding.kind).findings


@dataclass
class Examined:
    """What one case showed."""

    findings: list[Finding]
    row: Case
    remarks: list[str]
    functions: list[Any]
    types: dict[tuple[str, str], str]


def examine(checked: Check, shape: Shape, dtype: str, kind: str = "") -> Examined:
    """Run one case; every finding of it, without the smallest shape.

    With a kind, only what can show findings of that kind.
    """
    start = time.perf_counter()
    at: dict[str, Any] = {"shape": shape, "dtype": dtype}
    inputs = draw(checked.inputs, DTYPES[dtype], shape)
    first = run_kernel(checked, inputs, dtype, FIRST)
    findings = faults_of(first, at)
    errors: dict[str, float] = {}
    spreads: dict[str, float] = {}
    remarks: list[str] = []
    judge: Any = None
    if first.error is None:
        if kind in ("", *UNSTABLE, *ACCESSES):
            others = [run_kernel(checked, inputs, dtype, options) for options in OTHERS]
            for other in others:
                known = {f.key for f in findings}
                findings += [in_order(f) for f in faults_of(other, at) if f.key not in known]
            if kind not in ACCESSES:
                unstable = differing(first, others)
                findings += why_unstable(checked, inputs, dtype, first, unstable, spreads, at)
        findings += [
            of_output(
                UNWRITTEN, f"has {count(n, 'element')} that nobody has written", first, name, at
            )
            for name, n in first.missing.items()
            if n
        ]
        if kind in ("", *COMPARED):
            exact = run_reference(checked, inputs, dtype, exact=True)
            plain = run_reference(checked, inputs, dtype)
            for outcome in (exact, plain):
                if outcome.error:
                    what, line = outcome.error
                    place = f" ({line})" if line else ""
                    raise ValueError(f"the reference fails at {shape}, {dtype}: {what}{place}")
            leaking = {f.tensor for f in findings if f.kind in ("masked-off value", UNWRITTEN)}
            samples = functools.cache(lambda: draw_samples(checked, shape, dtype))
            judge = functools.partial(
                against,
                plain=plain,
                exact=exact,
                left_out=leaking,
                samples=samples,
                at=at,
            )
            wrong, errors, bounds = judge(first)
            findings = [
                judge_order(f, spreads[f.tensor], bounds.get(f.tensor, 0.0))
                if f.kind == ORDER
                else f
                for f in findings
            ]
            findings += wrong
            findings += changed_inputs(first, plain, at)
            grads = set(plain.values) - set(plain.outputs)
            if grads and len(first.values) == len(first.outputs):
                remarks.append("gradients: no output of the kernel requires one")
        if kind in ("", *ACCESSES, *COMPARED):
            for which, variant in _variants(checked, inputs, dtype, first):
                wrong = faults_of(variant, at)
                if judge is not None and variant.error is None:
                    wrong += judge(variant)[0]
                findings += _new(wrong, findings, which)
        faulty = any(finding.severity == FAULT for finding in findings)
        if kind in ("", "wrong result") and dtype == checked.dtypes[0] and not faulty:
            for which, wrong in of_one_sign(checked, inputs, dtype, remarks, at):
                findings += _new(wrong, findings, which)
    launches = first.record.launches if first.record else []
    if not launches and first.error is None:
        remarks.append("the accesses of kernels: none was launched")
    itemsize = DTYPES[dtype].itemsize
    row = Case(
        shape,
        dtype,
        errors,
        tuple(
            Moved(
                launch.kernel,
                launch.grid,
                launch.loaded,
                launch.stored,
                sum(t.distinct_loaded + t.distinct_stored for t in launch.tensors.values()),
                launch.flops,
            )
            for launch in launches
        ),
        _ideal("least_bytes", checked.least_bytes, shape, itemsize),
        _ideal("flops", checked.flops, shape),
        time.perf_counter() - start,
    )
    functions = list(first.record.functions) if first.record else []
    types = dict(first.record.dtypes) if first.record else {}
    return Examined(findings, row, remarks, functions, types)


def _ideal(name: str, function: Callable[..., int] | None, shape: Shape, *more: int) -> int | None:
    """What `least_bytes` or `flops` of a check says of a shape."""
    try:
        return function(*more, **shape) if function else None
    except Exception as error:
        what = f"{type(error).__name__}: {error}"
        raise ValueError(f"{name} fails at {shape}: {what}") from error


def _variants(
    checked: Check, inputs: Mapping[str, Any], dtype: str, first: Outcome
) -> Iterator[tuple[str, Outcome]]:
    """Runs in which a right kernel keeps the bound, too, and what is special about each."""
    for number in range(1, first.record.configurations if first.record else 1):
        which = f"in configuration {number} of @triton.autotune, counted from 0"
        yield which, run_kernel(checked, inputs, dtype, {**FIRST, "configuration": number})
    if len(first.values) > len(first.outputs):
        which = "where the gradient that comes in is not contiguous"
        yield which, run_kernel(checked, inputs, dtype, FIRST, contiguous=False)


def _new(wrong: list[Finding], known: list[Finding], which: str) -> list[Finding]:
    """Findings of a run that are not known from others, with what is special about it."""
    keys = {f.key for f in known}
    return [replace(f, message=f"{f.message}, {which}") for f in wrong if f.key not in keys]
