"""All benchmarks that need no GPU, in one command and a given time: `make bench`.

    python -m benchmarks --out folder [--dataset data/wiki] [--seconds 900] [--record] \\
        [--dry-run]

Those on a GPU are in `benchmarks.gpu`. This program needs the packages of the extra `test` and a
dataset made by `fastbert prepare`; no network. The parts run in order of importance, each in its
own process with its share of the remaining time, so a crash or a hang does not affect the others:

    step            benchmarks.step.bench_step: a training step against transformers
    parts           benchmarks.step.bench_parts: time of our step by part, against its FLOPs
    kernels         benchmarks/kernels/bench_kernels.py: correctness, and speed against alternatives
    data            benchmarks.data.bench_data: prepare and the loader
    startup         benchmarks.step.bench_startup: --help, import, the first step
    plan            benchmarks.planning.bench_plan --quick: `fastbert plan` against counted tensors
    launch          benchmarks.step.bench_launch: CPU time of launching the Triton kernels
    side_by_side    benchmarks.kernels.side_by_side: our GPU kernels and others', interpreted
    traffic         benchmarks.kernels.traffic: bytes moved over the minimum, counted
    compilers       benchmarks.compiled.ahead_of_time --on-record: registers, spills and loads
                    from the record; a test compiles again

The folder gets report.md (rewritten after each part), a log for each part, and the files that the
parts write. `--record` copies these to benchmarks/results/ for this kind of machine. `--dry-run`
runs one kernel at a tiny size. The exit code is 0 on success, 1 if a part failed or ran out of
time, 2 without a dataset.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.harness import children
from benchmarks.harness.children import ROOT, module
from benchmarks.harness.machine import folder_name
from benchmarks.harness.tables_and_plots import table

RESERVE_S = 8  # for killing hung processes, and for the report
START_S = 12  # start-up time of a process that imports torch
SHOWN_LINES = 60


class Part(NamedTuple):
    """A part of the run: `weight` is its share of the time; `{seconds}` in `command` is filled."""

    name: str
    weight: float
    command: list[str]


class Outcome(NamedTuple):
    part: Part
    verdict: str  # "passed", "failed (exit code 1)", "stopped after 60 s"
    seconds: float


def suite(name: str, *arguments: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        f"benchmarks/{name}.py",
        *arguments,
    ]


def all_parts(out: Path, dataset: Path) -> list[Part]:
    folder, seconds = ["--out", str(out)], ["--seconds", "{seconds}"]
    return [
        Part("step", 250, module("step.bench_step", str(dataset), *folder, *seconds)),
        Part("parts", 90, module("step.bench_parts", str(dataset), *folder, *seconds)),
        Part("kernels", 160, suite("kernels/bench_kernels", *folder, *seconds)),
        Part(
            "data",
            230,
            module("data.bench_data", str(dataset.with_suffix(".jsonl")), str(dataset), *folder),
        ),
        Part("startup", 115, module("step.bench_startup", str(dataset), *folder)),
        Part("plan", 25, module("planning.bench_plan", *folder, "--quick")),
        Part("launch", 30, module("step.bench_launch", *folder, *seconds)),
        Part("side_by_side", 30, module("kernels.side_by_side", *folder)),
        Part("traffic", 45, module("kernels.traffic")),
        Part("compilers", 5, module("compiled.ahead_of_time", "--on-record")),
    ]


def dry_parts(out: Path) -> list[Part]:
    tiny = ["--device", "cpu", "--tokens", "64", "--compile", "none", "-k", "gelu"]
    return [
        Part(
            "kernels",
            20,
            suite("kernels/bench_kernels", "--out", str(out), "--seconds", "{seconds}", *tiny),
        ),
        Part("compilers", 10, module("compiled.ahead_of_time", "--on-record")),
    ]


def interrupted(*_) -> None:
    """Signal handler of SIGINT and SIGTERM."""
    children.stop_all()
    raise SystemExit(130)


def run(part: Part, out: Path, limit: float) -> Outcome:
    start = time.monotonic()
    seconds = f"{max(5.0, 0.9 * limit - START_S):.0f}"
    command = [word.replace("{seconds}", seconds) for word in part.command]
    print(f"\n==> {part.name} (at most {limit:.0f} s)", flush=True)
    code = children.run(command, out / f"{part.name}.log", children.environment(), limit)
    verdict = (
        f"stopped after {limit:.0f} s"
        if code is None
        else f"failed (exit code {code})"
        if code
        else "passed"
    )
    return Outcome(part, verdict, time.monotonic() - start)


def report(out: Path, outcomes: list[Outcome], waiting: list[Part]) -> str:
    rows = [
        [
            o.part.name,
            o.verdict if o.verdict == "passed" else f"**{o.verdict}**",
            f"{o.seconds:.0f}",
        ]
        for o in outcomes
    ]
    rows += [[part.name, "not yet run", ""] for part in waiting]
    lines = ["# Benchmarks", "", table(("part", "outcome", "seconds"), rows)]
    for outcome in outcomes:
        part, log = outcome.part, out / f"{outcome.part.name}.log"
        written = out / f"{part.name}.md"
        if written.exists():
            lines += ["", written.read_text(encoding="utf-8").replace("# ", "## ", 1)]
        else:
            lines += [
                "",
                f"## {part.name}",
                "",
                "```",
                *log.read_text(encoding="utf-8").splitlines()[-SHOWN_LINES:],
                "```",
            ]
    return "\n".join([*lines, ""])


def record(out: Path) -> Path:
    """Copy the files that the parts wrote to the results of this kind of machine.

    pytest-benchmark's own file is left out, because it contains every round and is too large.
    """
    target = ROOT / "benchmarks/results" / folder_name(torch.device("cpu"))
    target.mkdir(parents=True, exist_ok=True)
    for path in out.iterdir():
        if path.suffix in (".json", ".md", ".png") and path.name not in (
            "report.md",
            "pytest-benchmark.json",
        ):
            shutil.copy(path, target / path.name)
    for name in ("traffic", "compilers"):
        if (out / f"{name}.log").exists():
            shutil.copy(out / f"{name}.log", target / f"{name}.txt")
    return target


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for the report; new or empty"
    )
    parser.add_argument(
        "--dataset",
        type=Path,
        default=Path("data/wiki"),
        help="a dataset made by `fastbert prepare` (data/wiki)",
    )
    parser.add_argument(
        "--seconds", type=float, default=900, help="time limit of the whole run (900)"
    )
    parser.add_argument(
        "--record", action="store_true", help="copy the results to benchmarks/results/"
    )
    parser.add_argument("--dry-run", action="store_true", help="one kernel at a tiny size")
    options = parser.parse_args()
    end = time.monotonic() + options.seconds - RESERVE_S
    out: Path = options.out.resolve()
    if out.exists() and any(out.iterdir()):
        print(
            f"benchmarks: --out {options.out} is not empty; choose a new folder, "
            "because a report covers one run"
        )
        return 2
    if not options.dry_run and not (options.dataset / "manifest.json").exists():
        print(
            f"benchmarks: --dataset {options.dataset}: no such dataset; "
            "run make data/wiki/manifest.json to make one"
        )
        return 2
    out.mkdir(parents=True, exist_ok=True)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupted)
    outcomes: list[Outcome] = []
    waiting = dry_parts(out) if options.dry_run else all_parts(out, options.dataset)
    while waiting:
        left = max(0.0, end - time.monotonic())
        outcome = run(
            waiting[0], out, left * waiting[0].weight / sum(part.weight for part in waiting)
        )
        outcomes.append(outcome)
        print(f"==> {outcome.part.name}: {outcome.verdict}, {outcome.seconds:.0f} s", flush=True)
        waiting = waiting[1:]
        (out / "report.md").write_text(report(out, outcomes, waiting), encoding="utf-8")
    print("\n" + (out / "report.md").read_text(encoding="utf-8"))
    if options.record:
        print(f"recorded in {record(out).relative_to(ROOT)}")
    return 0 if all(outcome.verdict == "passed" for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
