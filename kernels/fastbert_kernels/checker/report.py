"""What a check found, as text for people and as JSON for programs."""

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

FAULT, NOTE = "fault", "note"
Shape = dict[str, Any]


def count(number: int, noun: str) -> str:
    """A number and its noun, as in "1 element" and "1,200 bytes"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


@dataclass(frozen=True)
class Finding:
    """One thing that a check found.

    Attributes:
        kind: in a few words, such as "out of bounds"; docs/checker.md lists the kinds.
        message: what happens.
        severity: "fault", or "note" for what may be meant.
        kernel: name of the kernel; "" where it is unknown.
        line: file and line of the kernel.
        program: index of the program in the grid.
        tensor: argument of the kernel, or output or gradient of the function.
        offsets: of the elements, from the first of the tensor.
        shape: at which it was found.
        dtype: of the inputs.
        smallest: the smallest shape found that still shows it.
        repeats: how many more times it was seen.
    """

    kind: str
    message: str
    severity: str = FAULT
    kernel: str = ""
    line: str = ""
    program: tuple[int, ...] = ()
    tensor: str = ""
    offsets: tuple[int, ...] = ()
    shape: Shape = field(default_factory=dict[str, Any])
    dtype: str = ""
    smallest: Shape | None = None
    repeats: int = 0

    @property
    def key(self) -> tuple[str, ...]:
        """What makes two findings the same fault, at whatever shape and dtype."""
        return self.kind, self.kernel, self.line, self.tensor, self.severity

    def __str__(self) -> str:
        parts = [self.line or "-", self.kernel]
        where = ": ".join(part for part in parts if part)
        if self.program:
            where += f", program {self.program}"
        lines = [f"{self.severity}: {self.kind}: {where}"]
        what = self.message
        if self.tensor and self.offsets:
            shown = ", ".join(map(str, self.offsets[:4]))
            shown += f", ... {self.offsets[-1]}" if len(self.offsets) > 4 else ""
            what = f"{self.tensor}[{shown}]: {what}"
        elif self.tensor:
            what = f"{self.tensor} {what}"
        again = f" ({count(self.repeats, 'time')} more)" if self.repeats else ""
        lines.append(f"    {what}{again}")
        if self.dtype:
            at = f"    at {show(self.shape)}, {self.dtype}"
            if self.smallest is not None and self.smallest != self.shape:
                at += f"; smallest: {show(self.smallest)}"
            lines.append(at)
        return "\n".join(lines)


@dataclass(frozen=True)
class Moved:
    """Bytes and operations of one launch.

    Attributes:
        loaded: bytes that active lanes load, whatever cache they come from.
        stored: bytes that active lanes store.
        distinct: bytes of the elements that are loaded, plus those that are stored, each once.
        flops: operations of dot products.
    """

    kernel: str
    grid: tuple[int, ...]
    loaded: int
    stored: int
    distinct: int
    flops: int


@dataclass(frozen=True)
class Case:
    """One shape and dtype.

    Attributes:
        errors: by output and gradient, the largest error in units of the bound (`bounds.py`).
        launches: of forward and backward.
        least_bytes: the ideal that the check states; None without one.
        flops: the same for operations.
        seconds: how long the case took.
    """

    shape: Shape
    dtype: str
    errors: dict[str, float]
    launches: tuple[Moved, ...]
    least_bytes: int | None
    flops: int | None
    seconds: float

    def __str__(self) -> str:
        errors = ", ".join(f"{name} {ratio:.2f}" for name, ratio in self.errors.items())
        moved = sum(launch.loaded + launch.stored for launch in self.launches)
        text = f"{show(self.shape)}, {self.dtype}: error over bound: {errors or 'not compared'}"
        text += f"; {launches(len(self.launches))}, {count(moved, 'byte')}"
        if self.least_bytes:
            text += f", {moved / self.least_bytes:.2f} times the least"
        done = sum(launch.flops for launch in self.launches)
        if self.flops:
            text += f"; {done:,} operations of dots, {done / self.flops:.2f} times the least"
        elif done:
            text += f"; {done:,} operations of dots"
        return text


@dataclass
class Report:
    """The result of `check`."""

    name: str
    findings: list[Finding] = field(default_factory=list[Finding])
    cases: list[Case] = field(default_factory=list[Case])
    remarks: list[str] = field(default_factory=list[str])  # what was not checked, and why
    compiled: list[str] = field(default_factory=list[str])  # registers and such, a line a kernel

    @property
    def faults(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.severity == FAULT]

    @property
    def notes(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.severity == NOTE]

    def add(self, finding: Finding) -> bool:
        """Add a finding unless it is there; whether it was new."""
        if any(known.key == finding.key for known in self.findings):
            return False
        self.findings.append(finding)
        return True

    def __str__(self) -> str:
        lines = [*map(str, self.faults), *map(str, self.notes)]
        lines += [f"not checked: {remark}" for remark in self.remarks]
        lines += ["", *map(str, self.cases), *self.compiled, ""]
        lines.append(
            f"{self.name}: {count(len(self.faults), 'fault')}, {count(len(self.notes), 'note')}, "
            f"{count(len(self.cases), 'case')}"
        )
        return "\n".join(lines)

    def json(self) -> str:
        """One JSON object with all of it."""
        return json.dumps(
            {
                "name": self.name,
                "faults": len(self.faults),
                "findings": [dataclasses.asdict(finding) for finding in self.findings],
                "cases": [dataclasses.asdict(case) for case in self.cases],
                "not_checked": self.remarks,
                "compiled": self.compiled,
            },
            indent=1,
        )


def launches(number: int) -> str:
    """A number of launches."""
    return f"{number:,} launch{'' if number == 1 else 'es'}"


def show(shape: Shape) -> str:
    return ", ".join(f"{name}={value}" for name, value in shape.items()) or "no sizes"
