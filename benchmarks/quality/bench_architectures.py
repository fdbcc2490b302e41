"""BERT against ModernBERT of the demo's size, in the same time of a processor, on the demo's text.

    python -m benchmarks.quality.bench_architectures data/wiki --out FOLDER [--minutes 4]
        [--seeds 1 2 3] [--texts data/labelled]

Both have two layers of 128 and as many parameters in them, the same tokens, objective (masked
tokens in parts of documents of up to 128 tokens), batch, Muon and schedule. Each keeps what is its
own: BERT its learned positions with `initial_attention = "adjacent"`, as in the demo's recipe;
ModernBERT its rotary ones. A run has one thread and the given minutes of a core (equal_time.py).
The jobs run on all cores. The runs stay in FOLDER/architectures, and a finished one is not
repeated.

With `--texts`, every pre-trained model is then fine-tuned on 2,000 examples of each of the two
tasks of bench_downstream.py. The dataset must not contain their test texts; data/labelled-8192
does not (`fastbert prepare data/labelled/pretrain.jsonl --vocab-size 8192 --heldout 0.05 --out
data/labelled-8192`). Learning rates, epochs, steps and the held-out part are those of that
benchmark. Both sides try the same learning rates, on the model of the first seed and all training
examples, and are judged by the held-out part. The seed of a model also selects its examples and
the order, and initializes the new layer.
"""

from __future__ import annotations

import argparse
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.machine import header
from benchmarks.harness.record import Record, Row, once
from benchmarks.harness.tables_and_plots import table
from benchmarks.quality.bench_downstream import (
    FULL,
    TASKS,
    Extent,
    Job,
    check_texts,
    describe_task,
    results,
    search,
    workers,
)
from benchmarks.quality.equal_time import speeds, train_each
from fastbert.config import RunConfig
from fastbert.recipe import load_config
from fastbert.tasks.finetune import spread

RECIPE: dict[str, Any] = {
    "objective": {"kind": "mlm", "segments": "windows", "mask_rate": 0.25},
    "batch": {"sequences": 20, "max_length": 128},
    "optimizer": {"name": "muon", "lr": 2e-3, "betas": [0.9, 0.98]},
    "schedule": {"over": "tokens", "warmup": 0.05, "decay": "wsd", "cooldown": 0.4},
    "stop": {"tokens": 1_000_000},
    "evaluate": {"every": 500, "sequences": 512},
}
SIZES = {
    "num_hidden_layers": 2,
    "hidden_size": 128,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
MODELS: dict[str, dict[str, Any]] = {
    "BERT": {
        "type": "bert",
        "intermediate_size": 512,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initial_attention": "adjacent",
    },
    # Three matrices of 344 take the place of two of 512.
    "ModernBERT": {"type": "modernbert", "intermediate_size": 344},
}
EXAMPLES = 2000  # of fine-tuning


def recipes(data: Path) -> dict[str, RunConfig]:
    return {
        side: load_config({"data": str(data), "model": SIZES | own, **RECIPE})
        for side, own in MODELS.items()
    }


def compared(data: Path, minutes: float, seeds: list[int], out: Path) -> list[Row]:
    folder = (out / "architectures").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    sides = recipes(data)
    speed = once(folder / "speeds.json", lambda: speeds(data, sides))
    tokens = {side: int(speed[side] * 60 * minutes) for side in sides}
    rows = train_each(sides, tokens, seeds, folder)
    return [{"part": "pre-training", "minutes": minutes, **row} for row in rows]


def fine_tuned(texts: Path, seeds: list[int], out: Path, extent: Extent = FULL) -> list[Row]:
    """The tasks, the trials of the search, and one trial for each task and pre-trained model.

    Of `extent` only the learning rates and the steps count.
    """
    runs, kept = (out / "architectures").resolve(), out / "architectures-trials"
    kept.mkdir(exist_ok=True)
    first = {side: runs / f"{side}-{seeds[0]}" for side in MODELS}
    with workers() as pool:
        tried, best = search(texts, first, replace(extent, examples=(None,)), kept, pool)
        jobs = [
            Job(
                texts,
                runs / f"{side}-{seed}",
                task,
                side,
                EXAMPLES,
                seed,
                best[task, side],
                extent.steps,
            )
            for task, seed, side in itertools.product(TASKS, seeds, MODELS)
        ]
        measured = results(jobs, kept, pool)
    return [*(describe_task(texts, task) for task in TASKS), *tried, *measured]


def architectures_table(rows: list[Row]) -> str:
    """A table in Markdown: a line for each pre-training run."""
    return table(
        ["seed", "model", "minutes of a core", "steps", "tokens seen", "MLM loss", "on [MASK]"],
        [
            [
                f"{row['seed']}",
                row["side"],
                f"{row['minutes']:g}",
                f"{row['steps']:,}",
                f"{row['tokens'] / 1e6:.1f} M",
                f"{row['loss_mlm']:.3f}",
                f"{row['loss_mask_token']:.3f}",
            ]
            for row in rows
            if row["part"] == "pre-training"
        ],
    )


def tasks_table(rows: list[Row]) -> str:
    """A table in Markdown: accuracy on the test, a line for each task and architecture."""
    measured = [row for row in rows if row["part"] == "trial" and row["examples"] == EXAMPLES]
    seeds = list(dict.fromkeys(row["seed"] for row in measured))
    lines = []
    for task, side in itertools.product([row for row in rows if row["part"] == "task"], MODELS):
        trials = [row for row in measured if (row["task"], row["side"]) == (task["task"], side)]
        scores = [row["test_accuracy"] for row in trials]
        mean = spread(scores)
        lines.append(
            [
                TASKS[task["task"]],
                f"{task['majority']:.1%}",
                side,
                f"{trials[0]['lr']:g}",
                *(f"{score:.1%}" for score in scores),
                f"{mean.mean:.1%} ± {mean.std:.1%}",
            ]
        )
    columns = ("task", "most frequent label", "model", "learning rate")
    return table([*columns, *(f"seed {seed}" for seed in seeds), "mean"], lines)


def report(rows: list[Row]) -> str:
    """The table of the pre-training runs, and that of the tasks where rows has trials."""
    tables = architectures_table(rows)
    if any(row["part"] == "trial" for row in rows):
        tables += f"\n\nAccuracy on the test after fine-tuning:\n\n{tasks_table(rows)}"
    return tables


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="a dataset, such as the demo's")
    parser.add_argument("--minutes", type=float, default=4.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--texts",
        type=Path,
        help="also fine-tune on these tasks, the folder of examples/labelled_texts.py",
    )
    given = parser.parse_args()
    if given.texts:
        check_texts(parser, given.texts)
    rows = compared(given.data.resolve(), given.minutes, given.seeds, given.out)
    if given.texts:
        rows += fine_tuned(given.texts, given.seeds, given.out)
    text = f"BERT against ModernBERT of the demo's size\n\n{report(rows)}"
    name = "architectures_tasks" if given.texts else "architectures"
    Record(header(torch.device("cpu")), rows).write(given.out, name, text)
    print(text)


if __name__ == "__main__":
    main()
