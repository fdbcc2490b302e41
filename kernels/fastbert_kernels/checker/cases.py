"""`check`: run a kernel at every shape and dtype, and compare it with its reference.

Each case runs the kernel three times, with other orders of the programs and other values in the
lanes that a mask turns off. If all three give the same bits, and no access is at fault, then
neither order nor undefined values matter there. Otherwise further runs tell which of them it was.
"""

# pyright: basic
# The results of other people's functions may be anything.

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from fastbert_kernels.checker.execute import Outcome, by_a_rounding, copy, draw, run, same
from fastbert_kernels.checker.noise import Noise
from fastbert_kernels.checker.report import FAULT, NOTE, Case, Finding, Moved, Report, Shape, count
from fastbert_kernels.checker.serial import Serial
from fastbert_kernels.checker.shrink import shrink
from fastbert_kernels.checker.signs import one_sided, unread

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FIRST: dict[str, Any] = {"order": "ascending", "undefined": "nan"}
OTHERS: tuple[dict[str, Any], ...] = (
    {"order": "reversed", "undefined": "largest"},
    {"order": 1, "undefined": "smallest"},
)

LARGER = 100  # times; exp() overflows at 88 in fp32, and normally distributed numbers reach 3
UNWRITTEN, ORDER = "not fully written", "order of programs"
# What needs which runs, beside the first.
ACCESSES = ("out of bounds", "race", "uninitialised read", "assertion", "deadlock", "exception")
UNSTABLE = ("run to run", "masked-off value", ORDER)
COMPARED = ("wrong result", "wrong form", "changed input", ORDER)


@dataclass(frozen=True)
class Check:
    """A kernel and what it should compute.

    Attributes:
        kernel: launches the kernels; takes the inputs by name, and returns a tensor or several (a
            tuple, list or dict). If autograd can differentiate it, gradients are compared, too.
        reference: the same in plain torch, in the dtype of its inputs.
        inputs: called with a dtype and a shape, `inputs(torch.float32, rows=3)`; returns a dict of
            arguments. torch's generator is seeded before.
        shapes: by name of a size; a few around the tiles of the kernel.
        dtypes: of "fp32", "bf16", "fp16".
        gradients: inputs whose gradients are compared; None for all floating-point ones.
        large: shapes whose offsets may exceed 32 bits; nothing of that size is allocated.
        least_bytes: called with bytes of an element and a shape; the least that can be moved.
        flops: called with a shape; the least operations of matrix products.
        name: in the report.
    """

    kernel: Callable[..., Any]
    reference: Callable[..., Any]
    inputs: Callable[..., Mapping[str, Any]]
    shapes: Sequence[Mapping[str, Any]]
    dtypes: Sequence[str] = ("fp32", "bf16")
    gradients: Sequence[str] | None = None
    large: Sequence[Mapping[str, Any]] = ()
    least_bytes: Callable[..., int] | None = None
    flops: Callable[..., int] | None = None
    name: str = ""


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
    _valid(checked, name)
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
        inputs = draw(checked.inputs, DTYPES[checked.dtypes[0]], dict(checked.shapes[0]))
        if ignored := unread(checked.reference, inputs):
            report.remarks.append(
                f"NaN, infinity, large values: the reference does not read {', '.join(ignored)}"
            )
        else:
            _special_values(checked, report)
            _large_values(checked, report)
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


def _valid(checked: Check, name: str) -> None:
    """Raise ValueError if the check itself is wrong."""
    for what in ("kernel", "reference", "inputs"):
        function = getattr(checked, what)
        if type(function).__module__.startswith("triton."):
            raise ValueError(
                f"{name}: {what} is a @triton.jit function; give the function that launches it"
            )
        if not callable(function):
            raise ValueError(f"{name}: {what} = {function!r}; expected a function")
    for what in ("shapes", "large", "dtypes", "gradients"):
        value = getattr(checked, what)
        if isinstance(value, str) or not isinstance(value, (Iterable, type(None))):
            raise ValueError(f"{name}: {what} = {value!r}; expected a list")
    for what in ("shapes", "large"):
        for shape in getattr(checked, what):
            if not isinstance(shape, Mapping):
                raise ValueError(
                    f"{name}: {shape!r} in {what}; expected a dict of sizes, such as {{'rows': 3}}"
                )
    for what in ("shapes", "dtypes"):
        if not getattr(checked, what):
            raise ValueError(f"{name}: {what} is empty; give one at least")
    for dtype in checked.dtypes:
        if dtype not in DTYPES:
            raise ValueError(f"{name}: dtype = {dtype!r}; known are {', '.join(DTYPES)}")
    inputs = draw(checked.inputs, DTYPES[checked.dtypes[0]], checked.shapes[0])
    for gradient in checked.gradients or ():
        value = inputs.get(gradient)
        if not (isinstance(value, Tensor) and value.is_floating_point()):
            floats = [
                n for n, x in inputs.items() if isinstance(x, Tensor) and x.is_floating_point()
            ]
            raise ValueError(
                f"{name}: gradients has {gradient!r}, which is no floating-point input; "
                f"there are {', '.join(floats) or 'none'}"
            )


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
    first = _kernel(checked, inputs, dtype, FIRST)
    findings = faults_of(first, at)
    errors: dict[str, float] = {}
    spreads: dict[str, float] = {}
    remarks: list[str] = []
    judge: Any = None
    if first.error is None:
        if kind in ("", *UNSTABLE, *ACCESSES):
            others = [_kernel(checked, inputs, dtype, options) for options in OTHERS]
            for other in others:
                known = {f.key for f in findings}
                findings += [_in_order(f) for f in faults_of(other, at) if f.key not in known]
            if kind not in ACCESSES:
                unstable = _differing(first, others)
                findings += _why_unstable(checked, inputs, dtype, first, unstable, spreads, at)
        findings += [
            _of_output(
                UNWRITTEN, f"has {count(n, 'element')} that nobody has written", first, name, at
            )
            for name, n in first.missing.items()
            if n
        ]
        if kind in ("", *COMPARED):
            exact = _reference(checked, inputs, dtype, exact=True)
            plain = _reference(checked, inputs, dtype)
            for outcome in (exact, plain):
                if outcome.error:
                    what, line = outcome.error
                    place = f" ({line})" if line else ""
                    raise ValueError(f"the reference fails at {shape}, {dtype}: {what}{place}")
            leaking = {f.tensor for f in findings if f.kind in ("masked-off value", UNWRITTEN)}
            samples = functools.cache(lambda: _samples(checked, shape, dtype))
            judge = functools.partial(
                _against,
                plain=plain,
                exact=exact,
                left_out=leaking,
                samples=samples,
                at=at,
            )
            wrong, errors, bounds = judge(first)
            findings = [
                _judge_order(f, spreads[f.tensor], bounds.get(f.tensor, 0.0))
                if f.kind == ORDER
                else f
                for f in findings
            ]
            findings += wrong
            findings += _changed_inputs(first, plain, at)
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
            for which, wrong in _one_sided(checked, inputs, dtype, remarks, at):
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


def _kernel(
    checked: Check,
    inputs: Mapping[str, Any],
    dtype: str,
    options: Mapping[str, Any],
    contiguous: bool = True,
) -> Outcome:
    gradients, rounding = checked.gradients, DTYPES[dtype]
    return run(checked.kernel, inputs, None, rounding, gradients, contiguous, sanitizing=options)


def _variants(
    checked: Check, inputs: Mapping[str, Any], dtype: str, first: Outcome
) -> Iterator[tuple[str, Outcome]]:
    """Runs in which a right kernel keeps the bound, too, and what is special about each."""
    for number in range(1, first.record.configurations if first.record else 1):
        which = f"in configuration {number} of @triton.autotune, counted from 0"
        yield which, _kernel(checked, inputs, dtype, {**FIRST, "configuration": number})
    if len(first.values) > len(first.outputs):
        which = "where the gradient that comes in is not contiguous"
        yield which, _kernel(checked, inputs, dtype, FIRST, contiguous=False)


def _new(wrong: list[Finding], known: list[Finding], which: str) -> list[Finding]:
    """Findings of a run that are not known from others, with what is special about it."""
    keys = {f.key for f in known}
    return [replace(f, message=f"{f.message}, {which}") for f in wrong if f.key not in keys]


def _one_sided(
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
        ours = _kernel(checked, changed, dtype, FIRST)
        wide, coarse = (
            run(checked.reference, changed, target, DTYPES[dtype], checked.gradients)
            for target in (torch.float64, torch.bfloat16)
        )
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
                found.append(_wrong(name, result, "the bound of bf16", ours, at))
        yield which, found


def _reference(
    checked: Check, inputs: Mapping[str, Any], dtype: str, exact: bool = False
) -> Outcome:
    """The reference in the dtype itself, or in fp64 where it is exact."""
    wide = torch.float64 if exact else None
    return run(checked.reference, inputs, wide, DTYPES[dtype], checked.gradients)


def faults_of(outcome: Outcome, at: Mapping[str, Any]) -> list[Finding]:
    """The faults of the launches, and the exception that ended the run."""
    found = [
        Finding(
            fault.kind,
            fault.what,
            kernel=fault.kernel,
            line=fault.line,
            program=fault.program,
            tensor=fault.argument,
            offsets=tuple(fault.offsets),
            repeats=fault.repeats,
            **at,
        )
        for fault in (outcome.record.faults if outcome.record else [])
    ]
    if outcome.error and not any(f.kind == "deadlock" for f in found):
        message, line = outcome.error
        launches = outcome.record.launches if outcome.record else []
        found.append(
            Finding(
                "exception",
                message,
                kernel=launches[-1].kernel if launches else "",
                line=line,
                **at,
            )
        )
    return found


def _in_order(finding: Finding) -> Finding:
    """A fault of a run in another order, where the programs in their order ended well.

    A program that waits there waits for one with a lower number.
    """
    if finding.kind != "deadlock":
        return finding
    message = (
        "waits for programs with lower numbers; a GPU starts those first, but does not promise it, "
        "and other orders were not checked"
    )
    return replace(finding, message=message, severity=NOTE)


def _differing(first: Outcome, others: Sequence[Outcome]) -> list[str]:
    return [
        name
        for name, value in first.values.items()
        if any(
            other.error is None and not same(value, other.values.get(name, value))
            for other in others
        )
    ]


def _why_unstable(
    checked: Check,
    inputs: Mapping[str, Any],
    dtype: str,
    first: Outcome,
    names: Sequence[str],
    spreads: dict[str, float],
    at: Mapping[str, Any],
) -> list[Finding]:
    """Say why results differ between the three runs: run to run, undefined values or order."""
    if not names:
        return []
    again = _kernel(checked, inputs, dtype, FIRST)
    changing = _differing(first, [again])
    found = [
        _of_output("run to run", "differs between two equal runs", first, name, at)
        for name in changing
    ]
    rest = [name for name in names if name not in changing]
    lines = sorted(first.record.undefined) if first.record else []
    for name in rest:
        guilty = [
            line
            for line in lines
            if _differing(
                first,
                [
                    _kernel(checked, inputs, dtype, {**FIRST, "undefined": value, "only": line})
                    for value in ("largest", "smallest")
                ],
            ).count(name)
        ]
        if guilty:
            finding = _of_output(
                "masked-off value",
                "depends on what a masked-off lane loads; give the load an other=",
                first,
                name,
                at,
            )
            found += [replace(finding, line=line) for line in guilty]
            continue
        shuffled = [_kernel(checked, inputs, dtype, {**FIRST, "order": o}) for o in ("reversed", 1)]
        if name in _differing(first, shuffled):
            found.append(_of_output(ORDER, "", first, name, at))
            spreads[name] = _order(first, shuffled, name)
    return found


def _order(first: Outcome, others: Sequence[Outcome], name: str) -> float:
    """By how much results differ between orders of the programs."""
    value = first.values[name].double()
    differences = [(o.values[name].double() - value).abs() for o in others if not o.error]
    return max((float(d[d.isfinite()].max()) for d in differences if d.isfinite().any()), default=0)


def _judge_order(finding: Finding, spread: float, allowed: float) -> Finding:
    """Results that depend on the order of the programs: a note as long as they keep the bound."""
    message = f"depends on the order of the programs, by {spread:.3g}; the bound is {allowed:.3g}"
    return replace(finding, message=message, severity=NOTE if spread <= allowed else FAULT)


def _of_output(
    kind: str, message: str, outcome: Outcome, name: str, at: Mapping[str, Any]
) -> Finding:
    kernel, line = outcome.writers.get(name, ("", ""))
    names = {launch.kernel for launch in outcome.record.launches} if outcome.record else set()
    if not kernel and len(names) == 1 and outcome.record:  # torch has written what the kernel made
        kernel, line = outcome.record.last_writer()
    return Finding(kind, message, kernel=kernel, line=line, tensor=name, **at)


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


def _samples(checked: Check, shape: Shape, dtype: str) -> Samples:
    own, samples = draw(checked.inputs, DTYPES[dtype], shape), Samples([], [], [], [])
    for number in range(DRAWS + 1):
        inputs = draw(checked.inputs, DTYPES[dtype], shape, number)
        exact = _reference(checked, inputs, dtype, exact=True)
        plain = _reference(checked, inputs, dtype)
        moved = _reference(checked, by_a_rounding(inputs), dtype, exact=True)
        with Serial():
            serial = _reference(checked, inputs, dtype)
        if not (exact.error or plain.error or serial.error or moved.error):
            samples.plain.append((exact, plain))
            samples.serial.append((exact, serial))
            samples.moved.append((exact, moved))
        changed = by_a_rounding(own, DTYPES[dtype], number)
        with Noise(torch.finfo(DTYPES[dtype]).eps, number):
            sensitive = _reference(checked, changed, dtype, exact=True)
        if not sensitive.error:
            samples.sensitive.append(sensitive)
    return samples


def _against(
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
            found.append(_of_output("wrong form", message, ours, name, at))
            continue
        if value.dtype != expected.dtype:
            message = f"is {_short(value.dtype)}, the reference {_short(expected.dtype)}"
            found.append(replace(_of_output("wrong form", message, ours, name, at), severity=NOTE))
        if not value.numel() or name in left_out:
            continue
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
            found.append(_wrong(name, result, whose, ours, at))
    missing = [n for n in plain.values if n not in plain.outputs and n not in ours.values]
    if missing and len(ours.values) > len(ours.outputs):
        message = f"no gradient for {', '.join(missing)}, which the reference has"
        found.append(Finding("wrong form", message, **at))
    return found, errors, bounds


def _wrong(
    name: str, result: Comparison, whose: str, ours: Outcome, at: Mapping[str, Any]
) -> Finding:
    times = "above" if math.isinf(result.ratio) else f"{result.ratio:.3g} times"
    message = (
        f"is {times} {whose}: at {list(result.index)} it is "
        f"{result.got:.6g}, expected {result.expected:.6g} within {result.allowed:.3g}"
    )
    return _of_output("wrong result", message, ours, name, at)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _changed_inputs(ours: Outcome, plain: Outcome, at: Mapping[str, Any]) -> list[Finding]:
    return [
        replace(_of_output("changed input", "is changed", ours, name, at), severity=NOTE)
        for name in ours.changed
        if name not in plain.changed
    ]


def _special_values(checked: Check, report: Report) -> None:
    """NaN and infinity at one place of each input: where do they come out?"""
    dtype = checked.dtypes[0]
    shape = dict(checked.shapes[0])
    at: dict[str, Any] = {"shape": shape, "dtype": dtype}
    inputs = draw(checked.inputs, DTYPES[dtype], shape)
    for name, value in inputs.items():
        if not (isinstance(value, Tensor) and value.is_floating_point() and value.numel()):
            continue
        for special in (float("nan"), float("inf"), float("-inf")):
            changed = copy(inputs)
            place = tuple(n // 2 for n in value.shape)
            changed[name][place] = special
            with torch.no_grad():
                ours = _kernel(checked, changed, dtype, FIRST)
                plain = _reference(checked, changed, dtype)
            if ours.error or plain.error:
                continue
            for mine, theirs in zip(ours.outputs, plain.outputs, strict=False):
                message = _unlike(ours.values[mine], plain.values[theirs])
                if message:
                    what = f"with {special} at {name}{list(place)}: {message}"
                    finding = _of_output("NaN and infinity", what, ours, mine, at)
                    # A kernel need not read all of an input. Formulas also differ in what they make
                    # of infinity, as its difference from itself is NaN.
                    spreads = special != special and _gained(
                        ours.values[mine], plain.values[theirs]
                    )
                    report.add(replace(finding, severity=FAULT if spreads else NOTE))


def _large_values(checked: Check, report: Report) -> None:
    """Each input LARGER times as large: results that overflow, and do not in the reference."""
    dtype = checked.dtypes[0]
    shape = dict(checked.shapes[0])
    at: dict[str, Any] = {"shape": shape, "dtype": dtype}
    inputs = draw(checked.inputs, DTYPES[dtype], shape)
    for name, value in inputs.items():
        if not (isinstance(value, Tensor) and value.is_floating_point() and value.numel()):
            continue
        changed = {**copy(inputs), name: value * LARGER}
        with torch.no_grad():
            ours = _kernel(checked, changed, dtype, FIRST)
            plain = _reference(checked, changed, dtype)
        if ours.error or plain.error:
            continue
        for mine, theirs in zip(ours.outputs, plain.outputs, strict=False):
            got, expected = ours.values[mine], plain.values[theirs]
            if got.shape != expected.shape or not got.is_floating_point():
                continue
            lost = int((expected.double().isfinite() & ~got.double().isfinite()).sum())
            if lost:
                what = (
                    f"has {count(lost, 'element')} that should be finite, as in the reference, "
                    f"where {name} is {LARGER} times as large"
                )
                finding = _of_output("large values", what, ours, mine, at)
                report.add(replace(finding, severity=NOTE))  # it may be out of the kernel's domain


def _gained(ours: Tensor, plain: Tensor) -> int:
    """How many elements are NaN, and are not in the reference."""
    return int((ours.isnan() & ~plain.isnan()).sum())


def _unlike(ours: Tensor, plain: Tensor) -> str:
    """How NaN and infinity differ between two results; "" if they are at the same places."""
    if ours.shape != plain.shape or not ours.is_floating_point():
        return ""
    ours, plain = ours.double(), plain.double()  # torch has no isinf of fp8
    lost = int((plain.isnan() & ~ours.isnan()).sum())
    gained = _gained(ours, plain)
    parts = [f"{count(lost, 'element')} should be NaN, as in the reference"] if lost else []
    parts += [f"{count(gained, 'element')} should not be NaN"] if gained else []
    if parts:
        return " and ".join(parts)
    other = int((ours.isinf() != plain.isinf()).sum())
    return f"{count(other, 'element')} should be infinite, or should not" if other else ""
