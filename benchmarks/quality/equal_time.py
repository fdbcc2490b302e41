"""Trains recipes for the same time of a processor core, whatever else the machine does.

The speed of each side is measured beforehand, in turns, in seconds of the processor. Each run has
one thread, and ends after the tokens that its model sees in the given time. So other work on the
machine, which slows a run down, does not decide.
"""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from benchmarks.harness.cores import one_on_each, run_module
from benchmarks.harness.record import Row, once
from fastbert import load
from fastbert.config import RunConfig
from fastbert.data.batches import heldout_batches
from fastbert.data.dataset import open_dataset
from fastbert.heap import keep_heap
from fastbert.machine import probe_bf16
from fastbert.models.heads import losses
from fastbert.planning.step_speed import measure_speed
from fastbert.recipe import dump_config
from fastbert.training.heldout import HeldOut, heldout_means, heldout_sums
from fastbert.training.metrics import read_metrics

ROUNDS = 5
EVALUATED = 4096  # held-out examples


def speeds(data: Path, sides: Mapping[str, RunConfig]) -> Row:
    """Tokens of each side's model per second of the processor, the median of ROUNDS in turns."""
    torch.set_num_threads(1)
    keep_heap()  # as in the runs, like the operands below
    dataset, cpu = open_dataset(data), torch.device("cpu")
    operands = torch.bfloat16 if probe_bf16().pays else None
    found = [
        {
            side: measure_speed(config, dataset, cpu, operands, time.process_time).tokens_per_s
            for side, config in sides.items()
        }
        for _ in range(ROUNDS)
    ]
    return {side: statistics.median(row[side] for row in found) for side in sides}


def trained(side: str, recipe: Path, judge: RunConfig, seed: int, tokens: int, run: Path) -> Row:
    """Train on a number of tokens with one thread, and evaluate.

    Args:
        side: its name, for the row.
        recipe: its file.
        judge: its dataset is trained on, and its held-out examples are evaluated.
        seed: of the run.
        tokens: after which the run ends.
        run: the run folder; a finished one is not trained again.

    Returns:
        Losses in nats.
    """
    data = Path(judge.sources[0].path)
    settings = {
        "data": data,
        "run": run,
        "seed": seed,
        "stop.tokens": tokens,
        "stop.seconds": 1e6,  # the tokens decide
        "schedule.over": "tokens",
        "checkpoint.every": 10**9,
    }
    if not (run / "done").exists():
        shutil.rmtree(run, ignore_errors=True)
        overrides = (f"{key}={value}" for key, value in settings.items())
        run_module("fastbert", ["pretrain", recipe, *overrides], side)
        (run / "done").touch()
    last = evaluations(run)[-1]
    found = heldout(run, judge)
    return {
        "data": data.name,
        "side": side,
        "seed": seed,
        "steps": last["step"],
        "tokens": last["training_tokens"],
        "loss_mlm": found.loss_mlm,
        "loss_mask_token": found.loss_mask_token,
        "accuracy_nsp": found.accuracy_nsp,
    }


def train_each(
    sides: Mapping[str, RunConfig],
    tokens: Mapping[str, int],
    seeds: Sequence[int],
    folder: Path,
    judge: RunConfig | None = None,
) -> list[Row]:
    """Train each side with each seed, one on each core; a finished run is not repeated.

    Args:
        sides: the recipes by name.
        tokens: of a run of each side.
        seeds: of the runs.
        folder: for the recipes, the runs (SIDE-SEED) and their rows.
        judge: as in `trained`; by default the recipe of the side.

    Returns:
        The rows of `trained`, by seed and side.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for side, config in sides.items():
        (folder / f"{side}.toml").write_text(dump_config(config), encoding="utf-8")

    def run(job: tuple[int, str]) -> Row:
        seed, side = job
        recipe, made = folder / f"{side}.toml", folder / f"{side}-{seed}"
        row = once(
            folder / f"{side}-{seed}.json",
            lambda: trained(side, recipe, judge or sides[side], seed, tokens[side], made),
        )
        print(f"seed {seed}, {side}: {row['loss_mlm']:.3f}", flush=True)
        return row

    return list(one_on_each(run, [(seed, side) for seed in seeds for side in sides]))


def evaluations(run: Path) -> list[Row]:
    """The evaluations of a run, as its metrics.jsonl has them."""
    records = read_metrics(run / "metrics.jsonl")
    return [record for record in records if record.get("event") == "evaluate"]


@torch.no_grad()
def heldout(run: Path, config: RunConfig) -> HeldOut:
    """Evaluate a run on the held-out examples of a recipe's dataset and objective."""
    dataset, model = open_dataset(config.sources[0].path), load(run, "cpu").model.eval()
    batches = heldout_batches(dataset, config, EVALUATED)
    mask = dataset.special.mask
    return heldout_means(
        torch.stack([heldout_sums(losses(model(batch)), batch, mask) for batch in batches]).sum(0)
    )
