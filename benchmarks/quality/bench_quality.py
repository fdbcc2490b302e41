"""Time to quality: `fastbert pretrain` against transformers' Trainer, with equal time and cores.

    python -m benchmarks.quality.bench_quality data/wiki --out FOLDER [--seconds 180] \\
        [--seeds 1 2 3] [--precision bf16] [--quick]

Both sides have the same dataset (so the same text, tokenizer and split), model sizes and heap
setting. Both train in fp32, or with --precision bf16 both in bf16, ours as in training and the
Trainer under autocast. Each run has one thread on a core of its own. Two runs execute at a time, so
that other load on the machine affects both. Ours is the demo's recipe (docs/demo.md) with another
time limit; `trainer_rival.py` describes how the Trainer is set up. The batch and learning rate of
the Trainer are the best of GRID by the held-out loss after a third of the time, with a seed that is
not measured later. Its defaults also run once. A third side is the Trainer with our recipe and
exactly our initial weights; there the only remaining difference is the speed of a step.

Held-out loss and NSP accuracy come from the same examples with the same frozen masks. Before
anything is timed, both sides must measure the same values for the same weights. Time begins with
the first step. The Trainer's evaluations are not counted. Ours are counted, except the last one,
because `stop.seconds` includes them.

How much sooner ours reaches a Trainer's final MLM loss is reported in two ways, by seed. One is
the time on the curve of our run of the same length, interpolated linearly between two evaluations.
The other is the shortest of our runs with 1/2, 1/3, 1/5 ... of the time whose final loss is at or
below the Trainer's. The second is the time that one would really save, because the learning rate
of the full-length run is still high when its curve passes that loss.

With the defaults it takes about half an hour on two cores. A finished run is kept in
FOLDER/quality-runs and is not repeated, so an interrupted call resumes when it is started again.
Remove that folder after a change to the code.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness.cores import one_on_each, run_module
from benchmarks.harness.machine import ROOT, header
from benchmarks.harness.record import Record, Row
from benchmarks.harness.tables_and_plots import colour, figure_of, save, table
from benchmarks.quality.equal_time import evaluations
from benchmarks.quality.trainer_rival import (
    PRECISIONS,
    build_model,
    common,
    evaluate,
    heldout,
)
from fastbert.config import BertConfig
from fastbert.data.dataset import TokenDataset, open_dataset
from fastbert.models.bert import BertForPreTraining
from fastbert.models.heads import losses
from fastbert.recipe import load_config
from fastbert.training.heldout import heldout_means, heldout_sums
from fastbert.training.metrics import read_metrics
from fastbert.training.picture import INK, MUTED

RECIPE = ROOT / "fastbert/recipes/demo.toml"
OURS, TRAINER, SAME = "fastbert", "Trainer", "Trainer, our recipe"
POINTS, QUICK_POINTS = 12, 2  # evaluations per run
SHORTER = (2, 3, 5, 8, 12, 20)  # our shorter runs have the time divided by these
DEFAULTS = (8, 5e-5)  # batch and learning rate of TrainingArguments
GRID = [DEFAULTS, (8, 5e-4), (8, 1e-3), (32, 5e-5), (32, 5e-4), (32, 1e-3)]
SEARCH_SEED, SEARCH_SHARE = 0, 3
FIGURES = ("sooner_on_the_curve", "sooner_by_a_shorter_run")
COLORS = (colour(OURS), colour("transformers"), "#7c3aed", MUTED)


@dataclass(frozen=True)
class Run:
    """One training.

    Args:
        side: OURS, TRAINER or SAME.
        seconds: time limit of the training.
        seed: seed of the training.
        batch: batch of the Trainer; None if it has our recipe.
        lr: learning rate of the Trainer; None if it has our recipe.
    """

    side: str
    seconds: float
    seed: int
    batch: int | None = None
    lr: float | None = None

    @property
    def name(self) -> str:
        settings = f"-batch{self.batch}-lr{self.lr:g}" if self.batch else ""
        side = self.side.lower().replace(", ", "-").replace(" ", "-")
        return f"{side}-{self.seconds:g}s{settings}-seed{self.seed}"


def ours(seconds: float, seed: int) -> Run:
    return Run(OURS, seconds, seed)


Curve = list[dict[str, Any]]  # evaluations, as metrics.jsonl has them


class Bench:
    """Runs trainings, two at a time, and keeps their curves.

    Args:
        dataset: the training data.
        folder: keeps the curves, one file for each finished run.
        precision: "fp32" or "bf16", of both sides.
        points: evaluations of the Trainer per run.
    """

    def __init__(
        self, dataset: TokenDataset, folder: Path, precision: str = "fp32", points: int = POINTS
    ):
        self.dataset, self.folder = dataset, folder
        self.precision, self.points = precision, points
        folder.mkdir(parents=True, exist_ok=True)

    def curve(self, run: Run) -> Curve:
        return list(read_metrics(self._file(run)))

    def make(self, runs: Sequence[Run], every: int = 10**9) -> None:
        """Make the runs that do not exist yet, each on a core of its own.

        Ours evaluates every `every` steps and at its end.
        """
        for run in one_on_each(lambda run: self._make(run, every), runs, cores=2):
            row = summary(run, self.curve(run))
            print(
                f"{run.name:40} MLM {row['loss_mlm']:.3f}  NSP {row['accuracy_nsp']:.1%}  "
                f"{row['tokens_per_s']:,.0f} tokens/s",
                flush=True,
            )

    def _file(self, run: Run) -> Path:
        return self.folder / f"{run.name}.jsonl"

    def _make(self, run: Run, every: int) -> Run:
        if not self._file(run).exists():
            with tempfile.TemporaryDirectory() as folder:
                where = [RECIPE, self.dataset.path, folder]
                if run.side == OURS:
                    values = {
                        "data": where[1],
                        "run": where[2],
                        "seed": run.seed,
                        "stop.seconds": run.seconds,
                    }
                    values |= {"evaluate.every": every, "checkpoint.every": 10**9}
                    settings = [f"{key}={value}" for key, value in values.items()]
                    settings += common(self.precision)
                    run_module("fastbert", ["pretrain", RECIPE, *settings], run.name)
                else:
                    values = {"seconds": run.seconds, "points": self.points, "seed": run.seed}
                    values["precision"] = self.precision
                    values |= {"batch": run.batch, "lr": run.lr} if run.batch else {}
                    settings = [f"--{key}={value}" for key, value in values.items()]
                    run_module("benchmarks.quality.trainer_rival", [*where, *settings], run.name)
                found = evaluations(Path(folder))
            if run.side == OURS:  # the last evaluation runs after the time limit
                found[-1]["training_seconds"] = run.seconds
            partial = self._file(run).with_suffix(".partial")
            partial.write_text(
                "".join(json.dumps(record) + "\n" for record in found), encoding="utf-8"
            )
            partial.replace(self._file(run))
        return run


def check_that_both_measure_the_same(dataset: TokenDataset) -> None:
    """Raise SystemExit if the two sides evaluate the same weights differently."""
    config = load_config(RECIPE, [f"data={dataset.path}", *common("fp32")])
    torch.manual_seed(0)
    assert isinstance(config.model, BertConfig)
    mine = BertForPreTraining(config.model, dataset.vocab_size).eval()
    theirs = build_model(config, dataset.vocab_size, mine)
    batches = heldout(dataset, config)
    with torch.no_grad():
        a = heldout_means(
            torch.stack(
                [
                    heldout_sums(losses(mine(batch)), batch, dataset.special.mask)
                    for batch in batches
                ]
            ).sum(0)
        )
    b = evaluate(theirs, batches, dataset.special.mask)
    same_size = sum(p.numel() for p in mine.parameters()) == sum(
        p.numel() for p in theirs.parameters()
    )
    if not same_size or abs(a.loss_mlm - b.loss_mlm) > 1e-4 or a.accuracy_nsp != b.accuracy_nsp:
        raise SystemExit(
            f"bench_quality: the two sides evaluate the same weights differently: {a} against {b}"
        )


def summary(run: Run, curve: Curve) -> Row:
    """The final results of a run; losses in nats."""
    last = curve[-1]
    return {
        "side": run.side,
        "seed": run.seed,
        "budget_s": run.seconds,
        "batch": run.batch,
        "lr": run.lr,
        **{
            key: last[key]
            for key in ("loss_mlm", "loss_mask_token", "accuracy_mlm", "accuracy_nsp")
        },
        "steps": last["step"],
        "tokens": last["training_tokens"],
        "tokens_per_s": last["training_tokens"] / last["training_seconds"],
    }


def first_reached(curve: Curve, loss: float) -> float | None:
    """Seconds until the held-out MLM loss is at or below `loss`; None if it never is.

    The loss is interpolated linearly between two evaluations.
    """
    before = None
    for point in curve:
        if point["loss_mlm"] <= loss:
            if before is None:
                return point["training_seconds"]
            share = (before["loss_mlm"] - loss) / (before["loss_mlm"] - point["loss_mlm"])
            return before["training_seconds"] + share * (
                point["training_seconds"] - before["training_seconds"]
            )
        before = point
    return None


def sooner(bench: Bench, rival: Run, shorter: Sequence[int]) -> Row:
    """How many times sooner ours reaches a Trainer's final loss.

    One figure is from our loss curve, one from the shortest run that ends at that loss; 0 if it
    is never reached.
    """
    goal = bench.curve(rival)[-1]["loss_mlm"]
    reached = first_reached(bench.curve(ours(rival.seconds, rival.seed)), goal)
    enough = [
        part
        for part in (1, *shorter)
        if bench.curve(ours(rival.seconds / part, rival.seed))[-1]["loss_mlm"] <= goal
    ]
    return {
        "against": rival.side,
        "seed": rival.seed,
        "goal_loss_mlm": goal,
        "sooner_on_the_curve": rival.seconds / reached if reached else 0.0,
        "sooner_by_a_shorter_run": float(max(enough, default=0)),
    }


def draw(bench: Bench, sides: dict[str, list[Run]], brief: Sequence[Run], path: Path) -> None:
    """Plot all sides over time: a thin line per seed, and their mean.

    Dots are the ends of our shorter runs.
    """
    figure, axes_of = figure_of(1, 2)
    panels = axes_of[0]
    measures = (
        ("loss_mlm", 1, "held-out MLM loss, nats per token"),
        ("accuracy_nsp", 100, "held-out NSP accuracy, %"),
    )
    for axes, (key, scale, label) in zip(panels, measures, strict=True):
        for (name, runs), color in zip(sides.items(), COLORS, strict=True):
            curves = [bench.curve(run) for run in runs]
            lines = [
                ([p["training_seconds"] for p in curve], [scale * p[key] for p in curve])
                for curve in curves
            ]
            for x, y in lines:
                axes.plot(x, y, color=color, linewidth=0.7, alpha=0.6)
            common = np.linspace(max(x[0] for x, _ in lines), min(x[-1] for x, _ in lines), 200)
            axes.plot(
                common,
                np.mean([np.interp(common, x, y) for x, y in lines], 0),
                color=color,
                linewidth=2.2,
                label=name,
            )
        ends = [bench.curve(run)[-1] for run in brief]
        dots = {
            "marker": "o",
            "s": 14,
            "facecolor": "white",
            "edgecolor": COLORS[0],
            "linewidth": 1.0,
            "zorder": 3,
        }
        axes.scatter(
            [p["training_seconds"] for p in ends],
            [scale * p[key] for p in ends],
            label="ends of fastbert's shorter runs",
            **dots,
        )
        axes.set_ylabel(label, color=MUTED)
        axes.set_xlabel("seconds of training", color=MUTED)
        axes.set_xlim(left=0)
    panels[1].set_ylim(bottom=45)  # chance is 50
    unigram = bench.dataset.baselines["unigram"]
    panels[0].axhline(unigram, color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)), zorder=0)
    panels[0].annotate(
        f"word frequencies {unigram:.2f}",
        (1, unigram),
        xycoords=("axes fraction", "data"),
        xytext=(0, 3),
        textcoords="offset points",
        ha="right",
        color=MUTED,
        fontsize=8,
    )
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        loc="outside upper center",
        ncols=3,
        frameon=False,
        labelcolor=INK,
        fontsize=9,
    )
    save(figure, path)


def sooner_table(figures: Sequence[Row]) -> str:
    """Markdown table: how many times sooner ours reaches the final loss of each other side."""

    def times(values: Sequence[float]) -> list[str]:
        low, middle, high = (
            f"{value:.1f}x" if value else "never"
            for value in (min(values), statistics.median(values), max(values))
        )
        return [f"**{middle}**", f"{low} to {high}"]

    compared = []
    for side in (TRAINER, SAME):
        of = [figure for figure in figures if figure.get("against") == side]
        goal = statistics.median(figure["goal_loss_mlm"] for figure in of)
        compared.append(
            [
                side,
                f"{goal:.3f}",
                *(cell for key in FIGURES for cell in times([figure[key] for figure in of])),
            ]
        )
    columns = [
        "against",
        "its final loss, nats",
        "times sooner, on our loss curve",
        "range",
        "times sooner, by complete shorter runs",
        "range",
    ]
    return table(columns, compared)


def report(
    bench: Bench,
    sides: dict[str, list[Run]],
    brief: Sequence[Run],
    search: Sequence[Run],
    figures: Sequence[Row],
    seconds: float,
) -> str:
    """The report in Markdown, starting with its title."""

    def line(run: Run) -> list[str]:
        row = summary(run, bench.curve(run))
        found = [
            f"{row['loss_mlm']:.3f}",
            f"{row['loss_mask_token']:.3f}",
            f"{row['accuracy_nsp']:.1%}",
        ]
        return [*found, f"{row['tokens'] / 1e6:.2f} M", f"{row['tokens_per_s']:,.0f}"]

    columns = ["MLM loss", "on [MASK]", "NSP accuracy", "tokens seen", "tokens/s"]
    ended = [[str(run.seed), name, *line(run)] for name, runs in sides.items() for run in runs]
    shorter = [
        [f"{run.seconds:g} s", str(run.seed), *line(run)]
        for run in sorted(brief, key=lambda run: -run.seconds)
    ]
    tried = [[str(run.batch), f"{run.lr:g}", *line(run)] for run in search]
    how = (
        f"{seconds:g} seconds of training in {bench.precision}, one thread per run on a core of "
        "its own; losses on held-out text, in nats"
    )
    return "\n\n".join(
        [
            "Time to quality: fastbert against transformers' Trainer",
            f"{how}; word frequencies alone give {bench.dataset.baselines['unigram']:.2f}.",
            "How many times sooner fastbert reaches the final MLM loss of the other side, "
            "medians and ranges over seeds:",
            sooner_table(figures),
            table(["seed", "side", *columns], ended),
            "![all sides over the seconds](quality.png)",
            "Our runs with less time:",
            table(["time", "seed", *columns], shorter),
            f"Batch and learning rate of the Trainer, tried for {search[0].seconds:g} seconds:",
            table(["batch", "learning rate", *columns], tried),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dataset", type=Path, help="a folder made by `fastbert prepare`")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--seconds", type=float, default=180.0, help="training time of each run (180)"
    )
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        default=[1, 2, 3],
        help=f"seeds of the measured runs (1 2 3); not {SEARCH_SEED}, the search's seed",
    )
    parser.add_argument(
        "--precision", choices=PRECISIONS, default="fp32", help="of both sides (fp32)"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="two seconds, one seed, no search, to check that it works",
    )
    given = parser.parse_args()
    seconds, seeds, grid, shorter, points = (
        (2.0, [1], GRID[:1], SHORTER[:1], QUICK_POINTS)
        if given.quick
        else (given.seconds, given.seeds, GRID, SHORTER, POINTS)
    )
    if SEARCH_SEED in seeds:
        parser.error(f"--seeds {SEARCH_SEED}: the search uses this seed; choose others")

    dataset = open_dataset(given.dataset.resolve())
    check_that_both_measure_the_same(dataset)
    runs = given.out / "quality-runs" / dataset.sha256[:8] / given.precision
    bench = Bench(dataset, runs, given.precision, points)
    search = [Run(TRAINER, seconds / SEARCH_SHARE, SEARCH_SEED, *settings) for settings in grid]
    brief = [ours(seconds / part, seed) for seed in seeds for part in shorter]
    bench.make([*search, *brief])
    best = min(search, key=lambda run: bench.curve(run)[-1]["loss_mlm"])
    print(f"the Trainer will use batch {best.batch}, learning rate {best.lr:g}", flush=True)
    pace = bench.curve(brief[0])[-1]
    every = max(1, round(pace["step"] / pace["training_seconds"] * seconds / points))
    sides = {
        OURS: [ours(seconds, seed) for seed in seeds],
        TRAINER: [Run(TRAINER, seconds, seed, best.batch, best.lr) for seed in seeds],
        SAME: [Run(SAME, seconds, seed) for seed in seeds],
        "Trainer, defaults": [Run(TRAINER, seconds, seeds[0], *DEFAULTS)],
    }
    full = list(dict.fromkeys(run for runs in sides.values() for run in runs))
    # Sorted by seed, so that ours and the Trainer's run at the same time.
    bench.make(sorted(full, key=lambda run: run.seed), every)

    figures = [sooner(bench, run, shorter) for side in (TRAINER, SAME) for run in sides[side]]
    text = report(bench, sides, brief, search, figures, seconds)
    draw(bench, sides, brief, given.out / "quality.png")
    # Only the figure from the curve is a ratio to watch: the other one moves in large steps.
    ratios = {
        FIGURES[0]: statistics.median(f[FIGURES[0]] for f in figures if f["against"] == TRAINER)
    }
    rows = [summary(run, bench.curve(run)) for run in (*full, *brief, *search)]
    Record(header(torch.device("cpu")), [*rows, *figures], ratios).write(given.out, "quality", text)
    print(text)


if __name__ == "__main__":
    main()
