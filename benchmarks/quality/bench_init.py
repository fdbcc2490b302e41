"""Does the recipe of `fastbert init` beat demo.toml with another stop time, in the same time?

    python -m benchmarks.quality.bench_init DATASET ... --minutes 5 20 --seeds 1 2 --out FOLDER

The rival is what people do by hand: the demo's recipe, whose time alone is changed. Each side has
one thread. It trains for the tokens that its model would see in the seconds of the recipe that
`init` wrote, on a core of its own: the speeds are measured beforehand, in turns, in seconds of the
processor. So other work on the machine, which slows a run down, does not decide. Both are evaluated
on the same held-out examples, with the masks of the demo's objective. A finished run is kept in
FOLDER/init-runs and is not repeated.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import time
from pathlib import Path

import torch

from benchmarks.harness.cores import run_module
from benchmarks.harness.machine import header
from benchmarks.harness.record import Record, Row, once
from benchmarks.harness.tables_and_plots import table
from fastbert import load
from fastbert.config import RunConfig, load_config
from fastbert.data.batches import heldout_batches
from fastbert.data.dataset import open_dataset
from fastbert.machine import probe_bf16
from fastbert.models.heads import losses
from fastbert.planning.step_speed import measure_speed
from fastbert.training.heldout import HeldOut, heldout_means, heldout_sums
from fastbert.training.metrics import read_metrics

INIT, DEMO = "fastbert init", "demo.toml, by hand"
ROUNDS = 5
EVALUATED = 4096  # held-out examples


def recipes(data: Path, minutes: float, folder: Path) -> dict[str, RunConfig]:
    """The recipes of both sides, with the same seconds."""
    written = folder / "recipe.toml"
    if not written.exists():
        run_module(
            "fastbert", ["init", data, "--minutes", minutes, "--out", written], f"init {data}"
        )
    ours = load_config(written)
    return {
        INIT: ours,
        DEMO: load_config("demo", {"data": data, "stop.seconds": ours.stop.seconds}),
    }


def speeds(data: Path, sides: dict[str, RunConfig]) -> Row:
    """Tokens of each side's model per second of the processor, the median of ROUNDS in turns."""
    torch.set_num_threads(1)
    dataset, cpu = open_dataset(data), torch.device("cpu")
    operands = torch.bfloat16 if probe_bf16().pays else None  # as in the runs
    found = [
        {
            side: measure_speed(config, dataset, cpu, operands, time.process_time).tokens_per_s
            for side, config in sides.items()
        }
        for _ in range(ROUNDS)
    ]
    return {side: statistics.median(row[side] for row in found) for side in sides}


def trained(side: str, recipe: Path | str, data: Path, seed: int, tokens: int, run: Path) -> Row:
    """Train on a number of tokens with one thread, and evaluate; losses in nats. Deletes `run`."""
    shutil.rmtree(run, ignore_errors=True)
    settings = {
        "data": data,
        "run": run,
        "seed": seed,
        "stop.tokens": tokens,
        "stop.seconds": 1e6,  # the tokens decide
        "schedule.over": "tokens",
        "checkpoint.every": 10**9,
    }
    run_module("fastbert", ["pretrain", recipe, *(f"{k}={v}" for k, v in settings.items())], side)
    last = [
        record
        for record in read_metrics(run / "metrics.jsonl")
        if record.get("event") == "evaluate"
    ][-1]
    found = heldout(run, load_config("demo", {"data": data}))
    shutil.rmtree(run)
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


@torch.no_grad()
def heldout(run: Path, config: RunConfig) -> HeldOut:
    """Evaluate a run on the held-out examples of a recipe's dataset and objective."""
    dataset, model = open_dataset(config.data), load(run, "cpu").model.eval()
    batches = heldout_batches(dataset, config, EVALUATED)
    mask = dataset.special.mask
    return heldout_means(
        torch.stack([heldout_sums(losses(model(batch)), batch, mask) for batch in batches]).sum(0)
    )


def compared(data: Path, minutes: float, seeds: list[int], out: Path) -> list[Row]:
    folder = (out / "init-runs" / f"{data.name}-{minutes:g}").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    sides = recipes(data, minutes, folder)
    speed = once(folder / "speeds.json", lambda: speeds(data, sides))
    seconds = sides[INIT].stop.seconds
    assert seconds is not None
    rows = []
    for seed in seeds:
        for side, recipe in ((INIT, folder / "recipe.toml"), (DEMO, "demo")):
            name = f"{'init' if side == INIT else 'demo'}-{seed}"
            tokens = int(speed[side] * seconds)
            row = once(
                folder / f"{name}.json",
                lambda side=side, recipe=recipe, seed=seed, tokens=tokens, name=name: trained(
                    side, recipe, data, seed, tokens, folder / name
                ),
            )
            rows.append({"minutes": minutes, **row})
            print(
                f"{data.name}, {minutes:g} minutes, seed {seed}, {side}: "
                f"{row['loss_mask_token']:.3f} on [MASK]",
                flush=True,
            )
    return rows


def comparison_table(rows: list[Row]) -> str:
    """A table in Markdown: a line for each run."""
    cells = [
        [
            row["data"],
            f"{row['minutes']:g}",
            f"{row['seed']}",
            row["side"],
            f"{row['tokens'] / 1e6:.1f} M",
            f"{row['loss_mask_token']:.3f}",
            f"{row['loss_mlm']:.3f}",
            "" if row["accuracy_nsp"] is None else f"{row['accuracy_nsp']:.1%}",
        ]
        for row in rows
    ]
    return table(
        ["text", "minutes", "seed", "recipe", "tokens seen", "on [MASK]", "MLM loss", "NSP"], cells
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, nargs="+", help="datasets")
    parser.add_argument("--minutes", type=float, nargs="+", default=[5.0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    jobs = [(data.resolve(), minutes) for data in given.data for minutes in given.minutes]
    rows = [row for job in jobs for row in compared(*job, given.seeds, given.out)]
    text = f"`fastbert init` against the demo's recipe\n\n{comparison_table(rows)}"
    Record(header(torch.device("cpu")), rows).write(given.out, "init", text)
    print(text)


if __name__ == "__main__":
    main()
