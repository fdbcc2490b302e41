"""What a checkpoint costs the concurrent training: the mini recipe, saved every few steps.

    python -m benchmarks.step.bench_saving data/wiki [--ranks 1] [--saves 4]

A real run through the command line (with more than one rank, started by torchrun). Training stalls
while each rank copies its share, and again when the finished files become a checkpoint; the run
reports this time with each save. In between, a thread writes, flushes and reads back the files,
which takes processor time from training. That cost is the time of the steps during the write,
minus as many times the median of the other steps. The sum of both is compared with five minutes of
training, a typical checkpoint interval for a run of several days.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.harness.children import pretraining
from benchmarks.harness.machine import ROOT
from benchmarks.harness.tables_and_plots import table
from fastbert.training.metrics import read_metrics

EVERY = 12  # steps
INTERVAL_S = 300.0


@dataclass(frozen=True)
class Save:
    """One save; durations in seconds."""

    step: int
    stall: float  # training waited
    steps: int  # computed while the thread wrote
    slower: float  # extra time of these steps


def saves(records: list[dict[str, Any]]) -> tuple[float, list[Save]]:
    """The median step without a concurrent save, and every save except the last.

    No training steps run during the last save.
    """
    begun, found, undisturbed, during = None, [], [], []
    for record in records:
        if "event" not in record:
            (undisturbed if begun is None else during).append(record["seconds"])
            begun = record["step"] if record["step"] % EVERY == 0 else begun
        elif record["event"] == "save":
            found.append((record["step"], record["seconds"], during))
            begun, during = None, []
    usual = median(undisturbed[2:])  # the first two warm up
    return usual, [
        Save(step, stall, len(slow), sum(slow) - usual * len(slow))
        for step, stall, slow in found[:-1]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="a dataset made by fastbert prepare")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--saves", type=int, default=4)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        settings = {
            "data": given.data,
            "run": run,
            "stop.steps": EVERY * (given.saves + 1),
            "checkpoint.every": EVERY,
            "evaluate.sequences": 64,
        }
        python, *command = pretraining(ROOT / "fastbert/recipes/mini.toml", settings)
        torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(given.ranks)]
        command = [python, *(torchrun if given.ranks > 1 else ()), *command]
        subprocess.run(command, check=True, stdout=subprocess.PIPE)
        usual, found = saves(list(read_metrics(run / "metrics.jsonl")))
        size = sum(
            file.stat().st_size for file in sorted((run / "checkpoints").iterdir())[-1].iterdir()
        )
    print(
        f"mini, {given.ranks} rank(s), a checkpoint of {size / 1e6:,.0f} MB; "
        f"a step that no save disturbs takes {usual:.3f} s\n"
    )
    columns = (
        "step", "stall (s)", "steps during the write", "extra time (s)", "share of five minutes"
    )  # fmt: skip
    rows = [
        [
            f"{save.step}",
            f"{save.stall:.3f}",
            f"{save.steps}",
            f"{save.slower:+.3f}",
            f"{(save.stall + max(save.slower, 0.0)) / INTERVAL_S:.2%}",
        ]
        for save in found
    ]
    print(table(columns, rows))


if __name__ == "__main__":
    main()
