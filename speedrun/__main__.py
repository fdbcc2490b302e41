"""How many seconds on two cores does the encyclopedia need to a loss of 4.0 on [MASK]?

    python -m speedrun [RECIPE.toml] [--data data/wiki] [--out runs/speedrun] [--seeds 1 2 3]

It trains the recipe (default: speedrun/record.toml) once for each seed, and evaluates each model on
the same held-out text. README.md beside this file has the rules and the records. The exit code is
0 if the recipe passes, and 1 if it does not.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.harness.children import pretraining
from benchmarks.harness.machine import header, header_line
from benchmarks.harness.tables_and_plots import table
from benchmarks.quality.equal_time import evaluations, heldout
from fastbert.config import ObjectiveConfig, RunConfig
from fastbert.recipe import load_config

GOAL = 4.0  # nats on [MASK], the mean of the seeds
SEEDS = [1, 2, 3]
# Of the held-out text, whatever a recipe trains on: pairs of sentences, 15 % of the tokens masked.
OBJECTIVE = ObjectiveConfig(segments="single", mask_rate=0.15)
RECORD = Path(__file__).with_name("record.toml")


def trained(recipe: Path, data: Path, seed: int, run: Path) -> tuple[int, float]:
    """Train in a process of its own, and return the steps and the seconds that it took."""
    ended = subprocess.run(pretraining(recipe, {"data": data, "run": run, "seed": seed}))
    if ended.returncode:  # it has printed the reason
        sys.exit(ended.returncode)
    end = evaluations(run)[-1]
    return end["step"], end["training_seconds"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", type=Path, nargs="?", default=RECORD)
    parser.add_argument("--data", type=Path, default=Path("data/wiki"))
    parser.add_argument("--out", type=Path, default=Path("runs/speedrun"))
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    given = parser.parse_args()
    load_config(given.recipe)  # an error now, and not in a process
    print(header_line(header(torch.device("cpu"))), flush=True)
    rows, found, seconds = [], [], []
    for seed in given.seeds:
        run = given.out.resolve() / f"seed-{seed}"
        steps, taken = trained(given.recipe.resolve(), given.data.resolve(), seed, run)
        held = heldout(run, RunConfig(data=str(given.data), objective=OBJECTIVE))
        found.append(held.loss_mask_token)
        seconds.append(taken)
        rows.append(
            [
                f"{seed}",
                f"{taken:.1f} s",
                f"{steps:,}",
                f"{held.loss_mask_token:.3f}",
                f"{held.loss_mlm:.3f}",
                f"{held.accuracy_nsp:.1%}",
            ]
        )
        print(f"seed {seed}: {held.loss_mask_token:.3f} on [MASK]", flush=True)
    print(table(["seed", "time", "steps", "on [MASK]", "MLM loss", "NSP"], rows))
    mean, passed = statistics.mean(found), statistics.mean(found) <= GOAL
    print(
        f"{statistics.mean(seconds):.1f} s, {mean:.3f} nats on [MASK]: "
        f"{'passed' if passed else f'not passed, the goal is {GOAL}'}"
    )
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
