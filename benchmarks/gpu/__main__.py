"""All measurements that need a GPU, in one command and ten minutes: `make gpu OUT=folder`.

    python -m benchmarks.gpu --out folder [--seconds 600] [--parts smoke step ...] [--dry-run]

It needs the repository, torch 2.11 or newer, Triton 3.6 or newer, numpy, and pytest for the tests;
no network. Each part runs in its own process with a time limit. It writes each result to
results.jsonl as soon as it is measured, so a crash, a hang or a kill loses only one measurement.
The parts in order:

    environment   10 s   device, driver, versions, rates; meanwhile all cores compile all kernels
    smoke         40 s   each operation and whole steps of a model against the reference; the run
                         ends here if one is wrong
    attention     90 s   128 to 4,096 tokens with and without dropout: present and proposed tiles,
                         torch's SDPA and varlen attention
    operations    80 s   MLM loss, norm, GELU, embedding: present and proposed tiles, eager torch,
                         Liger, CCE
    counters      60 s   hardware counters, read by ncu if it is installed and permitted
    step          80 s   a training step of BERT-base: wall, GPU and CPU time; against torch's own
                         modules on padded batches
    tests        120 s   the tests of the kernels, in several processes
    curves        45 s   training in bf16 on the kernels and on the reference
    compiled      30 s   torch.compile compared with our kernels
    tuning        35 s   a search for better tiles near the best ones
    pictures       5 s   figures, if matplotlib is installed

Time that a part does not use goes to the later ones. The folder gets results.jsonl, report.md and a
log for each part. The report is rewritten after each part, and at any time by
`python -m benchmarks.gpu.report FOLDER`. `--dry-run` runs on a CPU, with a driver that compiles
every kernel and launches none; everything except the results is real. The exit code is 0 on
success, 1 if something is wrong, failed or hung, and 2 without a GPU.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from benchmarks.gpu import kernel_tests
from benchmarks.gpu.items import BROKEN, DONE, WRONG
from benchmarks.gpu.report import CLOCKS, write
from benchmarks.gpu.results import Results, is_wrong, read
from benchmarks.harness import children

SECONDS = 600
RESERVE_S = 8  # for killing hung processes, and for the report
GATE = "smoke"
CUT_OFF, LEFT_OUT = "stopped at its limit", "left out"
SAMPLED = "timestamp,clocks.sm,power.draw,temperature.gpu,utilization.gpu"


class Part(NamedTuple):
    """A part of the run.

    Args:
        name: its module in `benchmarks.gpu`.
        weight: its share of the time: the seconds that it should get of SECONDS.
        least_s: the minimum that it gets, at the expense of later parts.
    """

    name: str
    weight: float
    least_s: float = 0.0


PARTS = (
    Part("environment", 10, 40),  # the disk cache is cold, and kernels must be compiled
    Part(GATE, 40, 100),  # the other results are only valid if it passes
    Part("attention", 90),
    Part("operations", 80),
    Part("counters", 60),
    Part("step", 80),
    Part("tests", 120),
    Part("curves", 45),
    Part("compiled", 30),
    Part("tuning", 35),
    Part("pictures", 5, 10),
)


class Session:
    """One run, with its results in one folder."""

    def __init__(self, out: Path, dry: bool):
        self.out, self.dry = out, dry
        self.results = Results(out, "session", dry)
        self.interrupted = False

    def interrupt(self, *_) -> None:
        """Signal handler of SIGINT and SIGTERM: kill everything on the GPU; a report is written."""
        self.interrupted = True
        children.stop_all()
        raise SystemExit(130)

    def run(self, parts: Sequence[Part], end: float) -> bool:
        """Run all parts until `end` of time.monotonic(), or up to the gate if it finds an error.

        Returns whether everything succeeded.
        """
        well = True
        for index, part in enumerate(parts):
            left = max(0.0, end - time.monotonic())
            share = left * part.weight / sum(other.weight for other in parts[index:])
            outcome = self.run_part(part, min(left, max(share, part.least_s)))
            well &= outcome in ("passed", LEFT_OUT) or (outcome == CUT_OFF and part.name == "tests")
            if part.name == GATE and (wrong(self.out, GATE) or outcome.startswith("crashed")):
                self.results.add(
                    "stopped",
                    why=f"{GATE} found something wrong, so the other results would be meaningless",
                )
                return False
            write(self.out)
        return well and not wrong(self.out)

    def run_part(self, part: Part, limit: float) -> str:
        """Run one part to its end or its limit; write its outcome and return it."""
        start = time.monotonic()
        print(f"\n==> {part.name} (at most {limit:.0f} s)", flush=True)
        if part.name == "tests" and (why := kernel_tests.missing()):
            self.results.add("note", item=part.name, why=why)
            outcome = LEFT_OUT
        else:
            commands = self.commands(part, time.time() + max(0.9 * limit - 2, 0.0))
            with ThreadPoolExecutor(len(commands) + 1) as pool:
                if part.name == "environment":
                    pool.submit(self.warm_up, limit)
                outcomes = list(
                    pool.map(
                        lambda command: self.to_the_end(part, command, start + limit), commands
                    )
                )
            outcome = next((outcome for outcome in outcomes if outcome != "passed"), "passed")
        counted = kernel_tests.counts(self.out) if part.name == "tests" else {}
        seconds = time.monotonic() - start
        Results(self.out, part.name, self.dry).add(
            "part", outcome=outcome, seconds=round(seconds, 1), limit=round(limit, 1), **counted
        )
        print(f"==> {part.name}: {outcome}, {seconds:.0f} s", flush=True)
        return outcome

    def commands(self, part: Part, until: float) -> list[list[str]]:
        """The commands of a part, which run concurrently."""
        folder, dry = ["--out", str(self.out)], ["--dry-run"] * self.dry
        if part.name == "tests":
            return kernel_tests.commands(self.out, self.dry)
        if part.name == "pictures":
            return [children.module("gpu.pictures", str(self.out))]
        return [children.module(f"gpu.{part.name}", *folder, "--until", f"{until:.0f}", *dry)]

    def warm_up(self, limit: float) -> None:
        """Compile kernels in advance. This is optional; it only saves time."""
        command = children.module("gpu.warm_up", "--out", str(self.out), *["--dry-run"] * self.dry)
        code = children.run(command, self.out / "warm_up.log", children.environment(), limit)
        if code != 0:
            why = (
                "was stopped at the limit of the part; what was compiled by then is kept"
                if code is None
                else f"ended with {code}"
            )
            Results(self.out, "environment", self.dry).add("warm-up", why=why)

    def to_the_end(self, part: Part, command: list[str], end: float) -> str:
        """Run a command and return its outcome.

        If it crashes, start it again, as long as there is progress; it resumes after the item that
        crashed it.
        """
        log, results = self.out / f"{part.name}.log", Results(self.out, part.name, self.dry)
        finished, good = (
            (kernel_tests.FINISHED, kernel_tests.GOOD)
            if part.name == "tests"
            else ((DONE, WRONG), (DONE,))
        )
        crashed, before = False, -1
        while True:
            code = children.run(command, log, children.environment(), end - time.monotonic())
            if code is None or self.interrupted:
                self.close_items(
                    results, "cut off", "not finished when the time of the part was up"
                )
                return CUT_OFF
            if code in finished:
                return (
                    "crashed once or more"
                    if crashed
                    else "passed"
                    if code in good
                    else "wrong or failed"
                )
            if code != BROKEN:
                said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
                why = f"the process ended here, with {code}" + "".join(
                    f"; the last line of {log.name}: {line[:200]}" for line in said
                )
                self.close_items(results, "crashed", why)
            progress = self.progress(part, command)
            if progress == before:
                return f"crashed ({code})"
            crashed, before = True, progress

    def progress(self, part: Part, command: list[str]) -> int:
        """The number of tests or items of a command that have begun."""
        if part.name == "tests":
            return kernel_tests.begun(command)
        return sum(line["part"] == part.name and line["what"] == "begin" for line in read(self.out))

    def close_items(self, results: Results, what: str, why: str) -> None:
        """Record a reason for the items that began and did not end."""
        mine = [line for line in read(self.out) if line["part"] == results.part and "item" in line]
        ended = {line["item"] for line in mine if line["what"] != "begin"}
        for line in mine:
            if line["item"] not in ended:
                results.add(what, item=line["item"], why=why)


def wrong(out: Path, part: str | None = None) -> bool:
    """Whether a result of a part, or of any part, is wrong or failed."""
    return any(is_wrong(line) for line in read(out) if part in (None, line["part"]))


def sample_clocks(out: Path) -> subprocess.Popen | None:
    """Sample the clocks every second during the run, to see whether the GPU kept its speed."""
    if not shutil.which("nvidia-smi"):
        return None
    command = ["nvidia-smi", f"--query-gpu={SAMPLED}", "--format=csv,noheader,nounits", "-l", "1"]
    with (out / CLOCKS).open("wb") as file:
        return children.start(
            command, children.environment(), stdout=file, stderr=subprocess.DEVNULL
        )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for the results; new or empty"
    )
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help=f"time limit of the whole run ({SECONDS})"
    )
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=[part.name for part in PARTS],
        metavar="PART",
        help="run only these parts",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="on a CPU: compile every kernel, launch none"
    )
    options = parser.parse_args()
    end = time.monotonic() + options.seconds - RESERVE_S
    out: Path = options.out.resolve()
    if out.exists() and any(out.iterdir()):
        print(
            f"gpu: --out {options.out} is not empty; choose a new folder, "
            "because a report covers one run"
        )
        return 2
    if not options.dry_run:
        import torch

        if not torch.cuda.is_available():
            print("gpu: no GPU that torch can use; --dry-run runs all parts without one")
            return 2
    out.mkdir(parents=True, exist_ok=True)
    session = Session(out, options.dry_run)
    session.results.add("run", seconds=options.seconds, command=" ".join(sys.argv[1:]))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, session.interrupt)
    clocks = sample_clocks(out)
    well = False
    try:
        well = session.run(
            [part for part in PARTS if part.name in (options.parts or part.name)], end
        )
    finally:
        if clocks:
            children.stop(clocks)
        page = write(out)
    print(f"\n{page.read_text(encoding='utf-8')}\n{page}")
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
