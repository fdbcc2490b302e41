"""Hardware counters of our kernels, by Nsight Compute (ncu), if installed and permitted.

They show how busy the instruction slots, the matrix units and the exponential units are, the bytes
through L2 and memory, and what warps wait for. So they explain the duration of a kernel. Clocks are
not locked. The output of ncu is kept in counters-N.csv.
"""

from __future__ import annotations

import csv
import functools
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from benchmarks.gpu.items import Item, Part, program
from benchmarks.harness import children

CASES = {  # the cases, and which of their kernels; Triton names kernels after their functions
    "attention n=512 p=0.1": "_(forward|dkdv|dq)_kernel",
    "attention n=512 p=0": "_(forward|dkdv|dq)_kernel",
    "mlm_loss D=768": "_forward_kernel",
    "norm D=768 p=0.1": "_(forward|backward)_kernel",
}
SECTIONS = (
    "SpeedOfLight",
    "SchedulerStats",
    "WarpStateStats",
    "ComputeWorkloadAnalysis",
    "MemoryWorkloadAnalysis",
    "Occupancy",
    "LaunchStats",
)
# In addition to those of the sections. Metrics that this ncu or GPU does not know are left out,
# because a single one would make the whole run fail.
METRICS = (
    "gpu__time_duration.sum",
    "sm__inst_issued.avg.pct_of_peak_sustained_active",
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
    "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active",
    "sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_active",
    "lts__t_bytes.sum",
    "dram__bytes_read.sum",
    "dram__bytes_write.sum",
)
KNOWN_SECONDS = 20  # time limit for listing the metrics that ncu knows
REFUSED = "ERR_NVGPUCTRPERM"

# What the report shows: a label, and patterns of which the first matching metric is taken.
SHOWN = {
    "us": (r"gpu__time_duration\.sum",),
    "issue slots, %": (
        r"sm__inst_issued\.avg\.pct_of_peak_sustained_active",
        r"smsp__issue_active\.avg\.pct.*",
    ),
    "matrix units, %": (
        r"sm__pipe_tensor_cycles_active\.avg\.pct_of_peak_sustained_active",
        r"sm__inst_executed_pipe_tensor.*\.avg\.pct_of_peak_sustained_active",
    ),
    "exponentials, %": (r"sm__inst_executed_pipe_xu\.avg\.pct_of_peak_sustained_active",),
    "L2 MB": (r"lts__t_bytes\.sum",),
    "memory read MB": (r"dram__bytes_read\.sum",),
    "memory written MB": (r"dram__bytes_write\.sum",),
    "registers": (r"launch__registers_per_thread",),
    "warps, %": (r"sm__warps_active\.avg\.pct_of_peak_sustained_active",),
}
SCALES = {  # factors for nanoseconds and bytes
    "us": 1e-3,
    "L2 MB": 1e-6,
    "memory read MB": 1e-6,
    "memory written MB": 1e-6,
}
STALL = re.compile(
    r"smsp__average_warps_issue_stalled_(\w+)_per_issue_active(?:\.ratio)?"
    r"|smsp__average_warp_latency_issue_stalled_(\w+)\.ratio"
)
SHOWN_STALLS = 4


def items(part: Part) -> list[Item]:
    if part.results.has("note"):
        return []
    if shutil.which("ncu") is None:
        part.results.add("note", why="ncu is not installed: no counters")
        return []
    if part.place.dry:
        part.results.add("note", why="a dry run launches nothing that could be counted")
        return []
    return [
        Item(name, functools.partial(count, part, name, part.out / f"counters-{number}.csv"))
        for number, name in enumerate(CASES)
    ]


def count(part: Part, case: str, raw: Path, seconds: float) -> None:
    if part.results.has("note"):
        return
    command = [
        "ncu",
        *("--csv", "--page", "raw", "--print-units", "base", "--log-file", str(raw)),
        *("--clock-control", "none", "--target-processes", "all", "--profile-from-start", "off"),
        *("--kernel-name", f"regex:^{CASES[case]}$", *known_metrics()),
        *(word for name in SECTIONS for word in ("--section", name)),
        *(sys.executable, "-m", "benchmarks.gpu.launches", case),
    ]
    code = children.run(
        command, part.out / "counters.log", children.environment(), 2.2 * seconds + 5
    )
    written = raw.read_text(encoding="utf-8", errors="replace") if raw.exists() else ""
    if REFUSED in written:
        part.results.add("note", why=f"counters are not permitted here ({REFUSED})")
        return
    kernels = parse(written)
    for kernel, values in kernels:
        part.results.add("counters", case=case, kernel=kernel, **shown(values))
    if not kernels:
        said = [line for line in written.splitlines() if line.startswith("==ERROR==")] or [
            f"exit code {code}"
        ]
        part.results.add("note", item=case, why=f"ncu counted nothing: {said[0][:200]}")


@functools.cache
def known_metrics() -> list[str]:
    """The option that selects METRICS, limited to those that `ncu --query-metrics` lists.

    It is empty if ncu lists none of them.
    """
    try:
        said = subprocess.run(
            ["ncu", "--query-metrics"], capture_output=True, text=True, timeout=KNOWN_SECONDS
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    names = {line.split()[0] for line in said.splitlines() if line.strip()}
    known = [metric for metric in METRICS if metric.partition(".")[0] in names]
    return ["--metrics", ",".join(known)] if known else []


def parse(text: str) -> list[tuple[str, dict[str, float]]]:
    """Kernels in the order of their launches, each with its metrics by name.

    Reads both forms of ncu's CSV: one line per kernel, with a line of units below the names; and
    one line per metric.
    """
    table = [line for line in text.splitlines() if line.startswith('"')]
    kernels: dict[str, tuple[str, dict[str, float]]] = {}
    for row in csv.DictReader(table):
        number, kernel = row.get("ID"), row.get("Kernel Name")
        if not number or not kernel:  # the line of units
            continue
        values = kernels.setdefault(number, (kernel.partition("(")[0], {}))[1]
        pairs = (
            [(row.get("Metric Name"), row.get("Metric Value"))]
            if "Metric Name" in row
            else list(row.items())
        )
        for name, value in pairs:
            if name and (found := to_number(value)) is not None:
                values[name] = found
    return list(kernels.values())


def to_number(text: str | None) -> float | None:
    """The value of a number, with or without thousands separators; None for other text."""
    try:
        return float((text or "").replace(",", ""))
    except ValueError:
        return None


def shown(values: Mapping[str, float]) -> dict[str, float | str]:
    """The metrics of a kernel that the report shows.

    Also the most frequent causes of waiting, in warps per issued instruction.
    """
    found: dict[str, float | str] = {}
    for label, patterns in SHOWN.items():
        match = next(
            (
                value
                for pattern in patterns
                for name, value in values.items()
                if re.fullmatch(pattern, name)
            ),
            None,
        )
        if match is not None:
            found[label] = round(match * SCALES.get(label, 1.0), 3)
    stalls = {m[1] or m[2]: value for name, value in values.items() if (m := STALL.fullmatch(name))}
    most = sorted(stalls, key=lambda name: -stalls[name])[:SHOWN_STALLS]
    return found | {"waits": ", ".join(f"{name} {stalls[name]:.2f}" for name in most)}


if __name__ == "__main__":
    program("counters", items)
