"""All benchmarks in one command and in a given time: `make bench` on a CPU, `make gpu OUT=folder` on a GPU.

    python -m benchmarks.run --out folder [--on cpu|gpu] [--store data/wiki] [--seconds 480] [--dry-run]

Needs the repository, torch, Triton, pytest and pytest-benchmark, on a CPU all that `pip install .[test]` brings; no network. Parts in order
of worth, each in processes of its own with its share of the time that is left, so that neither a crash nor a kernel that hangs keeps the
others from running. On a GPU:

    environment     device, driver, versions, commit
    tests           all kernel tests on the device, side by side in several processes
    gpu-tests       tests marked gpu, by themselves
    kernels         benchmarks/bench_kernels.py: right, and how fast against what people would use; the goals
    training        benchmarks.bench_training: curves and tokens/s in bf16
    plan            benchmarks.bench_plan: `fastbert plan` against what torch reports
    tuning          benchmarks.tune --check: are the tiles still good here; says so, and fails nothing
    traffic         benchmarks.traffic: bytes moved over the least possible, counted in the interpreter
    compilers       benchmarks.ahead_of_time: registers, spills, loads; fails nothing, as another Triton may have other figures

On a CPU, with a store that `fastbert prepare` made:

    step            benchmarks.bench_step: a training step against transformers
    parts           benchmarks.bench_parts: where our step's time goes, against its floating-point operations
    kernels         as above, ours for CPUs
    data            benchmarks.bench_data: prepare and the loader
    startup         benchmarks.bench_startup: --help, import, the first step
    plan            benchmarks.bench_plan --quick: `fastbert plan` against counted tensors
    launch          benchmarks.bench_launch: CPU time of launching the Triton kernels, nothing launched
    side_by_side    benchmarks.side_by_side: our kernels for GPUs and other people's, in the interpreter
    traffic         as above
    compilers       benchmarks.ahead_of_time --on-record: as above, without compiling again, which a test does

The folder gets report.md, rewritten after each part, a log for each part, and what the parts write; `--record` copies that to
benchmarks/results/ for this kind of machine. `--dry-run`: tiny sizes on a CPU, a few tests. Exit code 0 if all is well, 1 if a part failed or
ran out of time, 2 without a GPU or without a store.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks import pytest_shard
from benchmarks.machine import folder_name

ROOT = Path(__file__).parents[1]
RESERVE_S = 8  # for killing what hangs, and for the report
START_S = 12  # of a process that imports torch and meets the device for the first time
PROCESSES = 8  # of the tests; each waits for the compiler most of the time
SHOWN_FAILURES, SHOWN_LINES = 30, 60
PYTEST_PASSED, PYTEST_FAILED, PYTEST_NOTHING_TO_DO = 0, 1, 5  # its exit codes when it came to its end


class Part(NamedTuple):
    """`weight` is its share of the time; `commands` run side by side and get `{seconds}` filled in."""

    name: str
    weight: float
    commands: list[list[str]]
    may_fail: bool = False
    results: str = ""  # folder of what the tests gave, if it is a part of tests


class Outcome(NamedTuple):
    part: Part
    verdict: str  # "passed", "failed (exit code 1)", "stopped after 60 s"
    seconds: float

    @property
    def good(self) -> bool:
        return self.verdict == "passed" or self.part.may_fail


def module(name: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", f"benchmarks.{name}", *arguments]


def suite(name: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"benchmarks/{name}.py", *arguments]


def tests(name: str, weight: float, out: Path, processes: int, *arguments: str) -> Part:
    """A part that runs pytest in several processes, each on its share of the tests."""
    options = ["-q", "--tb=short", "-p", "no:cacheprovider", "-p", "benchmarks.pytest_shard", "-o", "faulthandler_timeout=90"]
    results = f"{name}-results"
    (out / results).mkdir()
    shards = [["--shard", f"{i}/{processes}", "--results", str(out / results / f"{i}.jsonl")] for i in range(processes)]
    return Part(name, weight, [[sys.executable, "-m", "pytest", *options, *shard, *arguments] for shard in shards], results=results)


def parts_on_a_gpu(out: Path) -> list[Part]:
    """In order. The tests: files on kernels, but not that of these benchmarks, which is for CPUs; and what is marked gpu."""
    folder, seconds = ["--out", str(out)], ["--seconds", "{seconds}"]
    kernels = [*sorted(ROOT.glob("tests/test_*kernel*.py")), *ROOT.glob("tests/test_operators.py")]
    kernels.remove(ROOT / "tests/test_bench_kernels.py")
    marked = [path for path in sorted(ROOT.glob("tests/test_*.py")) if "pytest.mark.gpu" in path.read_text(encoding="utf-8")]
    processes = max(1, min(PROCESSES, (os.cpu_count() or 2) // 2))
    return [
        Part("environment", 15, [module("machine")]),
        tests("tests", 150, out, processes, "-m", "not gpu", *map(str, kernels)),
        *([tests("gpu-tests", 25, out, 1, "-m", "gpu", *map(str, marked))] if marked else []),
        Part("kernels", 130, [suite("bench_kernels", *folder, *seconds)]),
        Part("training", 80, [module("bench_training", *folder, *seconds)]),
        Part("plan", 30, [module("bench_plan", *folder)]),
        Part("tuning", 60, [module("tune", "--check", *seconds)], may_fail=True),
        Part("traffic", 30, [module("traffic")]),
        Part("compilers", 30, [module("ahead_of_time")], may_fail=True),
    ]


def parts_on_a_cpu(out: Path, store: Path) -> list[Part]:
    folder, seconds = ["--out", str(out)], ["--seconds", "{seconds}"]
    return [
        Part("step", 250, [module("bench_step", str(store), *folder, *seconds)]),
        Part("parts", 90, [module("bench_parts", str(store), *folder, *seconds)]),
        Part("kernels", 160, [suite("bench_kernels", *folder, *seconds)]),
        Part("data", 230, [module("bench_data", str(store.with_suffix(".jsonl")), str(store), *folder)]),
        Part("startup", 115, [module("bench_startup", str(store), *folder)]),
        Part("plan", 25, [module("bench_plan", *folder, "--quick")]),
        Part("launch", 30, [module("bench_launch", *folder, *seconds)]),
        Part("side_by_side", 30, [module("side_by_side", *folder)]),
        Part("traffic", 45, [module("traffic")]),
        Part("compilers", 5, [module("ahead_of_time", "--on-record")]),
    ]


def dry_parts(out: Path) -> list[Part]:
    """A little of everything, at tiny sizes on a CPU."""
    folder, seconds = ["--out", str(out)], ["--seconds", "{seconds}"]
    tiny = ["--device", "cpu", "--tokens", "64", "--compile", "none", "-k", "gelu"]
    return [
        tests("tests", 30, out, 2, "-k", "gelu and fp32", "tests/test_kernels.py"),
        Part("kernels", 20, [suite("bench_kernels", *folder, *seconds, *tiny)]),
        Part("training", 30, [module("bench_training", *folder, *seconds, "--dry-run")]),
        Part("tuning", 30, [module("tune", "--check", *seconds, "--dry-run", "--kernels", "gelu_forward")], may_fail=True),
    ]


# ------------------------------------------------------------------------------------------------------------- running


running: set[int] = set()  # process groups


def stop(*_) -> None:
    """For SIGINT and SIGTERM: leave nothing behind on the GPU."""
    for group in list(running):
        kill(group)
    raise SystemExit(130)


def kill(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def child(command: list[str], log: Path, environment: dict[str, str], end: float) -> int | None:
    """Exit code of a command whose output goes to a log and to the terminal; None if it had to be killed at `end` of time.monotonic()."""
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **output)
    running.add(process.pid)
    copying = threading.Thread(target=copy, args=(process.stdout, log), daemon=True)
    copying.start()
    try:
        code = process.wait(max(0.0, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        code = None
    kill(process.pid)  # and what it started, compilers for one
    running.remove(process.pid)
    process.wait()
    copying.join(timeout=5)
    return code


def copy(lines: Iterable[str], log: Path) -> None:
    with log.open("a", encoding="utf-8") as file:
        for line in lines:
            file.write(line)
            file.flush()
            print(line, end="", flush=True)


def run_to_the_end(command: list[str], log: Path, environment: dict[str, str], end: float) -> int | None:
    """Exit code of a command. Tests that broke off go on behind the one that broke them, as long as there is progress."""
    results = Path(command[command.index("--results") + 1]) if "--results" in command else None
    broken, finished = 0, -1
    while True:
        code = child(command, log, environment, end)
        if results is None or code is None:
            return code
        before, finished = finished, len(pytest_shard.read(results))
        if code in (PYTEST_PASSED, PYTEST_FAILED, PYTEST_NOTHING_TO_DO) or finished == before:
            return broken or (0 if code == PYTEST_NOTHING_TO_DO else code)
        broken = code


def run(part: Part, out: Path, limit: float) -> Outcome:
    start = time.monotonic()
    # A pytest around us would make that of a part believe that it is a worker, and pytest-benchmark measures nothing there.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET" and not name.startswith("PYTEST_")}
    environment |= {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]), "PYTHONUNBUFFERED": "1"}
    environment.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")  # dry run: some virtual CPUs claim an AMX whose use kills the process
    seconds = f"{max(5.0, 0.9 * limit - START_S):.0f}"
    commands = [[word.replace("{seconds}", seconds) for word in command] for command in part.commands]
    print(f"\n==> {part.name} ({limit:.0f} s at the most)", flush=True)
    with ThreadPoolExecutor(len(commands)) as pool:
        codes = list(pool.map(lambda command: run_to_the_end(command, out / f"{part.name}.log", environment, start + limit), commands))
    took = time.monotonic() - start
    if None in codes:
        return Outcome(part, f"stopped after {limit:.0f} s", took)
    if part.results and not test_results(out, part):
        return Outcome(part, "failed (no tests)", took)
    bad = [code for code in codes if code]
    return Outcome(part, f"failed (exit code {bad[0]})" if bad else "passed", took)


# ------------------------------------------------------------------------------------------------------------- report


def test_results(out: Path, part: Part) -> list[dict]:
    return [result for path in sorted((out / part.results).glob("*.jsonl")) for result in pytest_shard.read(path).values()]


def report(out: Path, outcomes: list[Outcome], waiting: list[Part]) -> str:
    lines = ["# Benchmarks", "", "| part | outcome | seconds |", "|---|---|---|"]
    lines += [f"| {o.part.name} | {o.verdict if o.verdict == 'passed' else f'**{o.verdict}**'} | {o.seconds:.0f} |" for o in outcomes]
    lines += [f"| {part.name} | not yet run | |" for part in waiting]
    for outcome in outcomes:
        part, log = outcome.part, out / f"{outcome.part.name}.log"
        written = out / f"{part.name}.md"
        if part.results:
            lines += ["", f"## {part.name}", "", *summary_of_tests(test_results(out, part))]
        elif written.exists():
            lines += ["", written.read_text(encoding="utf-8").replace("# ", "## ", 1)]
        else:
            lines += ["", f"## {part.name}", "", "```", *log.read_text(encoding="utf-8").splitlines()[-SHOWN_LINES:], "```"]
    return "\n".join([*lines, ""])


def summary_of_tests(results: list[dict]) -> list[str]:
    counts = {word: sum(result["outcome"] == word for result in results) for word in ("passed", "failed", "skipped", "started")}
    lines = [", ".join(f"{count} {word}" for word, count in counts.items()) + " but not finished.", ""]
    bad = [result for result in results if result["outcome"] in ("failed", "started")]
    lines += [f"- `{result['test']}`: {' '.join(result['message'].splitlines()[-1:])[:300]}" for result in bad[:SHOWN_FAILURES]]
    return lines + ([f"- and {len(bad) - SHOWN_FAILURES} more, in the log"] if len(bad) > SHOWN_FAILURES else [])


def record(out: Path, device: torch.device) -> Path:
    """Copy what the parts wrote to the results of such machines; pytest-benchmark's own file, with every round, is too large for that."""
    target = ROOT / "benchmarks/results" / folder_name(device)
    target.mkdir(parents=True, exist_ok=True)
    for path in out.iterdir():
        if path.suffix in (".json", ".md", ".png") and path.name not in ("report.md", "pytest-benchmark.json"):
            shutil.copy(path, target / path.name)
    for name in ("traffic", "compilers"):
        if (out / f"{name}.log").exists():
            shutil.copy(out / f"{name}.log", target / f"{name}.txt")
    return target


def main() -> int:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the report; new or empty")
    parser.add_argument("--on", choices=["gpu", "cpu"], default="gpu" if gpu else "cpu", help="by default the GPU where there is one")
    parser.add_argument(
        "--store", type=Path, default=Path("data/wiki"), help="made by `fastbert prepare`; for the parts on a CPU (data/wiki)"
    )
    parser.add_argument("--seconds", type=float, help="when it must have ended (480; on a CPU 900)")
    parser.add_argument("--record", action="store_true", help="copy the results to benchmarks/results/")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on a CPU")
    options = parser.parse_args()
    end = time.monotonic() + (options.seconds or {"gpu": 480, "cpu": 900}[options.on]) - RESERVE_S
    out: Path = options.out.resolve()
    if out.exists() and any(out.iterdir()):
        print(f"run: --out {options.out} is not empty; name a new folder, so that a report is of one run")
        return 2
    if options.on == "cpu" and not options.dry_run and not (options.store / "manifest.json").exists():
        print(f"run: --store {options.store}: no such store; make data/wiki/manifest.json makes one")
        return 2
    if options.on == "gpu" and not gpu and not options.dry_run:
        print("run: no GPU that torch can use; --on cpu is for a CPU, --dry-run shows the way of working on a GPU without one")
        return 2
    out.mkdir(parents=True, exist_ok=True)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    outcomes: list[Outcome] = []
    on_a_cpu = options.on == "cpu"
    waiting = dry_parts(out) if options.dry_run else parts_on_a_cpu(out, options.store) if on_a_cpu else parts_on_a_gpu(out)
    while waiting:
        left = max(0.0, end - time.monotonic())
        outcome = run(waiting[0], out, left * waiting[0].weight / sum(part.weight for part in waiting))
        outcomes.append(outcome)
        print(f"==> {outcome.part.name}: {outcome.verdict}, {outcome.seconds:.0f} s", flush=True)
        waiting = waiting[1:]
        (out / "report.md").write_text(report(out, outcomes, waiting), encoding="utf-8")
    print("\n" + (out / "report.md").read_text(encoding="utf-8"))
    if options.record:
        print(f"recorded in {record(out, torch.device('cpu' if on_a_cpu else 'cuda')).relative_to(ROOT)}")
    return 0 if all(outcome.good for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
