"""Why results differ between runs: equal runs, undefined values or the order of the programs."""

# pyright: basic
# The results of other people's functions may be anything.

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from fastbert_kernels.checker.definition import FIRST, Check, run_kernel
from fastbert_kernels.checker.execute import Outcome, same
from fastbert_kernels.checker.findings import of_output
from fastbert_kernels.checker.report import FAULT, NOTE, Finding

ORDER = "order of programs"


def differing(first: Outcome, others: Sequence[Outcome]) -> list[str]:
    """The outputs and gradients that are not the same in all runs."""
    return [
        name
        for name, value in first.values.items()
        if any(
            other.error is None and not same(value, other.values.get(name, value))
            for other in others
        )
    ]


def why_unstable(
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
    again = run_kernel(checked, inputs, dtype, FIRST)
    changing = differing(first, [again])
    found = [
        of_output("run to run", "differs between two equal runs", first, name, at)
        for name in changing
    ]
    rest = [name for name in names if name not in changing]
    lines = sorted(first.record.undefined) if first.record else []
    for name in rest:
        guilty = [
            line
            for line in lines
            if differing(
                first,
                [
                    run_kernel(checked, inputs, dtype, {**FIRST, "undefined": value, "only": line})
                    for value in ("largest", "smallest")
                ],
            ).count(name)
        ]
        if guilty:
            finding = of_output(
                "masked-off value",
                "depends on what a masked-off lane loads; give the load an other=",
                first,
                name,
                at,
            )
            found += [replace(finding, line=line) for line in guilty]
            continue
        shuffled = [
            run_kernel(checked, inputs, dtype, {**FIRST, "order": o}) for o in ("reversed", 1)
        ]
        if name in differing(first, shuffled):
            found.append(of_output(ORDER, "", first, name, at))
            spreads[name] = _order(first, shuffled, name)
    return found


def _order(first: Outcome, others: Sequence[Outcome], name: str) -> float:
    """By how much results differ between orders of the programs."""
    value = first.values[name].double()
    differences = [(o.values[name].double() - value).abs() for o in others if not o.error]
    return max((float(d[d.isfinite()].max()) for d in differences if d.isfinite().any()), default=0)


def judge_order(finding: Finding, spread: float, allowed: float) -> Finding:
    """Results that depend on the order of the programs: a note as long as they keep the bound."""
    message = f"depends on the order of the programs, by {spread:.3g}; the bound is {allowed:.3g}"
    return replace(finding, message=message, severity=NOTE if spread <= allowed else FAULT)
