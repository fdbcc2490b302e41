"""Which recipe gives the best model in a given time? Run `fastbert pretrain` for each, in a table.

    python -m benchmarks.quality.sweep RECIPE.toml --out FOLDER --seconds 480 \\
        --try "model.hidden_size=256 optimizer.lr=1e-3" --try "..."

There is one run on each core. `--try` contains the differences from the recipe; "" is the recipe
itself. Vocabularies can be compared through `data`. A larger vocabulary gives fewer tokens, each of
which is harder to predict, so the table also has the loss per word. A finished run is kept in
FOLDER/sweep-runs and is not repeated.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
from pathlib import Path

import numpy as np
import torch

from benchmarks.harness.cores import one_on_each, run_module
from benchmarks.harness.machine import header
from benchmarks.harness.record import Record, Row, once
from benchmarks.harness.tables_and_plots import table
from benchmarks.quality.equal_time import evaluations
from fastbert import load
from fastbert.data.dataset import TokenDataset, open_dataset


def measured(recipe: Path, folder: Path, settings: str, seconds: float) -> Row:
    name = hashlib.sha256(f"{recipe.read_text()} {settings} {seconds}".encode()).hexdigest()[:12]
    row = once(folder / f"{name}.json", lambda: trained(recipe, folder / name, settings, seconds))
    print(
        f"{row['loss_mlm']:.3f}  on [MASK] {row['loss_mask_token']:.3f}  "
        f"{row['tokens'] / 1e6:5.1f} M tokens  {settings}",
        flush=True,
    )
    return row


def trained(recipe: Path, run: Path, settings: str, seconds: float) -> Row:
    """Train for `seconds` with one thread, and evaluate; losses in nats. Deletes `run`."""
    shutil.rmtree(run, ignore_errors=True)
    given = {
        "run": run,
        "stop.seconds": seconds,
        "evaluate.every": 10**9,
        "checkpoint.every": 10**9,
    }
    run_module(
        "fastbert",
        [
            "pretrain",
            recipe,
            *(f"{key}={value}" for key, value in given.items()),
            *settings.split(),
        ],
        settings,
    )
    pretrained = load(run, "cpu")
    assert pretrained.recipe is not None
    last = evaluations(run)[-1]
    shutil.rmtree(run)
    return {
        "settings": settings,
        "parameters": sum(p.numel() for p in pretrained.model.parameters()),
        "steps": last["step"],
        "tokens": last["training_tokens"],
        "tokens_per_word": tokens_per_word(open_dataset(pretrained.recipe.sources[0].path)),
        **{
            key: last[key]
            for key in ("loss_mlm", "loss_mask_token", "accuracy_mlm", "accuracy_nsp")
        },
    }


def tokens_per_word(dataset: TokenDataset) -> float:
    """Tokens per word of the held-out text.

    A word, or a punctuation mark, is a token with the tokens that continue it.
    """
    split = dataset.split("heldout")
    bounds = split.first_token(np.arange(split.sentences + 1))
    tokens = split.gather(bounds[:-1], np.diff(bounds))
    return len(tokens) / int((~dataset.continues_word[tokens]).sum())


def sweep_table(rows: list[Row]) -> str:
    """A table in Markdown, the best recipe first."""
    cells = [
        [
            f"`{row['settings']}`" if row["settings"] else "the recipe",
            f"{row['parameters'] / 1e6:.1f} M",
            f"{row['tokens'] / 1e6:.1f} M",
            f"{row['loss_mlm'] * row['tokens_per_word']:.3f}",
            f"{row['loss_mlm']:.3f}",
            f"{row['loss_mask_token']:.3f}",
            f"{row['accuracy_mlm']:.1%}",
            f"{row['accuracy_nsp']:.1%}",
        ]
        for row in sorted(rows, key=lambda row: row["loss_mlm"] * row["tokens_per_word"])
    ]
    return table(
        [
            "settings",
            "parameters",
            "tokens seen",
            "nats per word",
            "held-out loss",
            "on [MASK]",
            "accuracy",
            "NSP",
        ],
        cells,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--seconds", type=float, default=480.0, help="training time of each run (480)"
    )
    parser.add_argument(
        "--try",
        dest="tries",
        action="append",
        required=True,
        metavar="KEY=VALUE ...",
        help="settings that differ from the recipe; may be repeated",
    )
    given = parser.parse_args()
    if not given.recipe.is_file():
        parser.error(f"{given.recipe}: no such recipe")
    folder = (given.out / "sweep-runs").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    rows = list(
        one_on_each(
            lambda settings: measured(given.recipe, folder, settings, given.seconds), given.tries
        )
    )
    text = f"A sweep: {given.seconds:g} seconds of training, one thread each\n\n{sweep_table(rows)}"
    Record(header(torch.device("cpu")), rows).write(given.out, "sweep", text)
    print(text)


if __name__ == "__main__":
    main()
