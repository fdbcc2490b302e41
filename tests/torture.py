"""Repeat the trials of the tests hundreds of times: `python -m tests.torture`.

It prints a line for each run that has ended, and the counts at the end.

    python -m tests.torture
        200 kills, 500 flipped bits of checkpoints and 500 of datasets, every crash point, and 12
        lost nodes
    python -m tests.torture --kills 1000 --flips 0 --dataset-flips 0 --crashes 0 --nodes 0 --seed 7
    python -m tests.torture --record docs/reliability.md
        writes the results and the commit to their place in the page

The seed makes the choices: which rank, which bit, after how many steps. The exact time at which a
signal arrives depends on the machine. So a failed run stays in --folder, and its message has a seed
of its own. The exit code is 1 if any loss differs or any run did not resume.
"""

from __future__ import annotations

import argparse
import functools
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from pydoc_data.topics import topics

from benchmarks.harness.tables_and_plots import filled, table
from fastbert.checkpoints.failpoint import POINTS
from tests.namespaces import Node, Nodes, Process, why_not
from tests.ranks import ROOT, environment
from tests.trials import (
    BESIDE_A_DAMAGED_ONE,
    ON_EVERY_RANK,
    Laboratory,
    Tally,
    Trial,
    crashes,
    dataset_flips,
    flips,
    kills,
    lines_so_far,
    wait_for,
)

NODE_TIMEOUT_S = 8  # runtime.timeout_s: the time until a cut-off node is noticed
# torchrun's own time-outs, in seconds.
QUICK = "last_call_timeout=1,keep_alive_interval=1,keep_alive_max_attempt=3,read_timeout=5"
ROUNDING = 1e-4  # relative, of losses: with a node less the sums have another order
PATIENCE_S = 300.0


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.torture",
        description="Disturb runs, and compare every loss with undisturbed ones.",
    )
    for name, default, what in (
        ("kills", 200, "kill -9 of one rank or of all, at random moments"),
        ("flips", 500, "one bit of the newest checkpoint, at random places"),
        ("dataset-flips", 500, "one bit of the dataset, at random places"),
        ("crashes", 1, "rounds of kill -9 at every point of a save"),
        ("nodes", 12, "one of two nodes cut off or killed, at random moments"),
        ("seed", 1, "of all random choices"),
        ("width", 2, "runs at a time"),
    ):
        parser.add_argument(
            f"--{name}", type=int, default=default, metavar="N", help=f"{what} (default {default})"
        )
    parser.add_argument("--folder", type=Path, help="where to work; by default a temporary folder")
    parser.add_argument("--record", type=Path, help="a page to write the result into")
    options = parser.parse_args()

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    folder = Path(tempfile.mkdtemp(prefix="torture-", dir=options.folder))
    print(f"in {folder}", flush=True)
    began = time.monotonic()
    lab = Laboratory(
        folder,
        make_dataset(folder),
        options.width,
        lambda line: print(f"{time.monotonic() - began:6.0f} s  {line}", flush=True),
    )
    found = {
        "kill -9": kills(lab, options.kills, options.seed),
        "flipped bits": flips(lab, options.flips, options.seed),
    }
    found["flipped bits of a dataset"] = dataset_flips(lab, options.dataset_flips, options.seed)
    found["crash points"] = Tally()
    for _ in range(options.crashes):
        for rank, points in enumerate(
            ([p for p in POINTS if p not in BESIDE_A_DAMAGED_ONE], ON_EVERY_RANK)
        ):
            found["crash points"] += crashes(lab, points, rank, 2, 1)
    if (reason := why_not()) is None or not options.nodes:
        found["lost nodes"] = lost_nodes(lab, options.nodes, options.seed)
    else:
        print(f"no lost nodes: {reason}")
    total = functools.reduce(Tally.__add__, found.values())
    minutes = (time.monotonic() - began) / 60
    print(f"torture, seed {options.seed}, {minutes:.0f} minutes: {total}", flush=True)
    if options.record:
        record(options.record, found, total, options.seed, minutes)
    return 0 if total.passed else 1


def make_dataset(folder: Path) -> Path:
    """Make a dataset of the Python language reference, which every Python has."""
    from fastbert.data.prepare import prepare

    paragraphs = [
        " ".join(paragraph.split())
        for name in sorted(topics)
        for paragraph in topics[name].split("\n\n")
        if paragraph.strip()
    ]
    documents = ["\n".join(paragraphs[i : i + 4]) for i in range(0, len(paragraphs), 4)]
    text = folder / "english.txt"
    text.write_text("\n\n".join(documents), encoding="utf-8")
    prepare([text], folder / "dataset", vocab_size=1000, workers=1, heldout=0.05, progress=False)
    return folder / "dataset"


# Two nodes, of which one is lost


def lost_nodes(lab: Laboratory, count: int, seed: int) -> Tally:
    """Cut off or kill one of two nodes; the other one resumes, with the same losses to rounding.

    The lost node may come back.
    """
    return lab.series(
        "lost nodes", [functools.partial(_lost, lab, f"{seed}/{i}") for i in range(count)]
    )


def _lost(lab: Laboratory, seed: str) -> Tally:
    generator, trial, undisturbed = (
        random.Random(seed),
        lab.trial(f"runtime.timeout_s={NODE_TIMEOUT_S}"),
        lab.undisturbed(1, 0),
    )
    lost, lines = generator.choice((1, 1, 0)), generator.randrange(lab.steps - 2)
    # If node 0 is only cut off, both nodes continue, one of them in vain.
    cut = lost == 1 and generator.random() < 0.5
    comes_back = cut and generator.random() < 0.5
    with Nodes(2) as nodes:
        started = [_torchrun(trial, nodes[i], "node0") for i in (0, 1)]
        wait_for(lambda: lines_so_far(trial) > lines, PATIENCE_S)
        time.sleep(0.1 * generator.random())
        if cut:
            nodes.cut(lost)
        else:
            nodes[lost].kill()
        if comes_back:
            time.sleep(20 * generator.random())
            nodes.reconnect(lost)
        code = started[1 - lost].wait(PATIENCE_S)
        if lost == 0 and code:  # the rendezvous is gone
            code = _torchrun(trial, nodes[1], "node1").wait(PATIENCE_S)
    fate = "cut off" if cut else "killed"
    where = f"seed {seed}, {trial.folder}, node {lost} {fate} after {lines} lines"
    assert code == 0, f"{where}: exit code {code}: {(trial.folder / 'said').read_text()[-2000:]}"
    tally = trial.compare(undisturbed, ROUNDING)
    tally.tried, tally.survived = 1, 0 if tally.problems else 1
    tally.problems = [f"{where}: {problem}" for problem in tally.problems]
    return tally


def _torchrun(trial: Trial, node: Node, endpoint: str) -> Process:
    meet = (
        "--nnodes 1:2 --max-restarts 100 --rdzv-backend fastbert "
        f"--rdzv-endpoint {endpoint}:29500 --rdzv-conf {QUICK}"
    )
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        *meet.split(),
        "--nproc-per-node",
        "1",
        "-m",
        "fastbert",
        *trial.command,
    ]
    with open(trial.folder / "said", "ab") as said:
        return node.popen(
            command, env=environment(), cwd=ROOT, stdin=subprocess.DEVNULL, stdout=said, stderr=said
        )


# The record


def record(page: Path, found: dict[str, Tally], total: Tally, seed: int, minutes: float) -> None:
    """Put the result where the page has a place for it."""
    counts = {
        name: (tally.tried, tally.survived, tally.compared, tally.equal)
        for name, tally in {**found, "all": total}.items()
    }
    rows = [[name, *(f"{count:,}" for count in of)] for name, of in counts.items()]
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    )
    result = (
        f"`python -m tests.torture`, commit {git.stdout.strip() or 'unknown'}, {date.today()}, "
        f"seed {seed}: {minutes:.0f} minutes on "
        f"{os.cpu_count()} cores, {platform.system()}.\n\n"
        f"{table(['', 'tried', 'survived', 'losses compared', 'losses equal'], rows)}"
    )
    page.write_text(filled(page.read_text(encoding="utf-8"), {"torture": result}), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
