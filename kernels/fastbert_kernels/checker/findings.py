"""Findings of one run: the faults of its launches, and what its outputs show."""

# pyright: basic
# The results of other people's functions may be anything.

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fastbert_kernels.checker.execute import Outcome
from fastbert_kernels.checker.report import NOTE, Finding


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


def in_order(finding: Finding) -> Finding:
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


def of_output(
    kind: str, message: str, outcome: Outcome, name: str, at: Mapping[str, Any]
) -> Finding:
    """A finding of an output or gradient; it names the kernel and the line that stored it."""
    kernel, line = outcome.writers.get(name, ("", ""))
    names = {launch.kernel for launch in outcome.record.launches} if outcome.record else set()
    if not kernel and len(names) == 1 and outcome.record:  # torch has written what the kernel made
        kernel, line = outcome.record.last_writer()
    return Finding(kind, message, kernel=kernel, line=line, tensor=name, **at)
