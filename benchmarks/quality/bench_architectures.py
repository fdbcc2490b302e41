"""BERT against ModernBERT of the demo's size, in the same time of a processor, on the demo's text.

    python -m benchmarks.quality.bench_architectures data/wiki --out FOLDER [--minutes 4]
        [--seeds 1 2 3]

Both have two layers of 128 and as many parameters in them, the same tokens, objective (masked
tokens in parts of documents of up to 128 tokens), batch, Muon and schedule. Each keeps what is its
own: BERT its learned positions with `initial_attention = "adjacent"`, as in the demo's recipe;
ModernBERT its rotary ones. A run has one thread and the given minutes of a core (equal_time.py).
The jobs run on all cores. The runs stay in FOLDER/architectures, for `fastbert finetune`, and a
finished one is not repeated.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.cores import one_on_each
from benchmarks.harness.machine import header
from benchmarks.harness.record import Record, Row, once
from benchmarks.harness.tables_and_plots import table
from benchmarks.quality.equal_time import speeds, trained
from fastbert.config import RunConfig
from fastbert.recipe import dump_config, load_config

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


def recipes(data: Path) -> dict[str, RunConfig]:
    return {
        side: load_config({"data": str(data), "model": SIZES | own, **RECIPE})
        for side, own in MODELS.items()
    }


def compared(data: Path, minutes: float, seeds: list[int], out: Path) -> list[Row]:
    folder = (out / "architectures").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    sides = recipes(data)
    for side, config in sides.items():
        (folder / f"{side}.toml").write_text(dump_config(config), encoding="utf-8")
    speed = once(folder / "speeds.json", lambda: speeds(data, sides))

    def run(job: tuple[int, str]) -> Row:
        seed, side = job
        name, tokens = f"{side}-{seed}", int(speed[side] * 60 * minutes)
        row = once(
            folder / f"{name}.json",
            lambda: trained(
                side, folder / f"{side}.toml", sides[side], seed, tokens, folder / name
            ),
        )
        print(f"seed {seed}, {side}: {row['loss_mlm']:.3f}", flush=True)
        return {"minutes": minutes, **row}

    return list(one_on_each(run, [(seed, side) for seed in seeds for side in sides]))


def architectures_table(rows: list[Row]) -> str:
    """A table in Markdown: a line for each run."""
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
        ],
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="a dataset, such as the demo's")
    parser.add_argument("--minutes", type=float, default=4.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    rows = compared(given.data.resolve(), given.minutes, given.seeds, given.out)
    text = f"BERT against ModernBERT of the demo's size\n\n{architectures_table(rows)}"
    Record(header(torch.device("cpu")), rows).write(given.out, "architectures", text)
    print(text)


if __name__ == "__main__":
    main()
