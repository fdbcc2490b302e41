"""Does the recipe of `fastbert init` beat demo.toml with another stop time, in the same time?

    python -m benchmarks.quality.bench_init DATASET ... --minutes 5 20 --seeds 1 2 --out FOLDER

The rival is what people do by hand: the demo's recipe, whose time alone is changed. Each side has
one thread. It trains for the tokens that its model would see in the seconds of the recipe that
`init` wrote, on a core of its own (equal_time.py). Both are evaluated on the same held-out
examples, with the masks of the demo's objective. A finished run is kept in FOLDER/init-runs and is
not repeated.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benchmarks.harness.cores import run_module
from benchmarks.harness.machine import header
from benchmarks.harness.record import Record, Row, once
from benchmarks.harness.tables_and_plots import table
from benchmarks.quality.equal_time import speeds, train_each
from fastbert.config import RunConfig
from fastbert.recipe import load_config

INIT, DEMO = "fastbert init", "demo.toml, by hand"


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


def compared(data: Path, minutes: float, seeds: list[int], out: Path) -> list[Row]:
    folder = (out / "init-runs" / f"{data.name}-{minutes:g}").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    sides = recipes(data, minutes, folder)
    speed = once(folder / "speeds.json", lambda: speeds(data, sides))
    seconds = sides[INIT].stop.seconds
    assert seconds is not None
    tokens = {side: int(speed[side] * seconds) for side in sides}
    rows = train_each(sides, tokens, seeds, folder, judge=load_config("demo", {"data": data}))
    return [{"minutes": minutes, **row} for row in rows]


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
