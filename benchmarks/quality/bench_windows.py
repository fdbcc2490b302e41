"""Does a dataset that is read window by window give as good a model as one shuffled as a whole?

    python -m benchmarks.quality.bench_windows data/wiki.jsonl --out FOLDER [--tokens 2500000]
        [--seeds 1 2 3] [--windows 4 16]

`prepare` makes the dataset as it makes a large one, with every size divided by 1,024: segments of
1 KiB of text, pieces of 16 KiB, blocks of 16 KiB of token ids. The demo's recipe is trained on the
same tokens with one window, which is the global order, and with several. Each run has one thread
and a core of its own. Wrong next sentences come from the window of a pair, so they are part of what
is compared. All are evaluated on the same held-out examples. The dataset and the runs stay in
FOLDER/windows, and a finished run is not repeated.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import torch

from benchmarks.harness.machine import header
from benchmarks.harness.record import Record, Row
from benchmarks.harness.tables_and_plots import table
from benchmarks.quality.equal_time import train_each
from fastbert.config import RunConfig
from fastbert.data import block_writer, blocks, corpus_plan, segments
from fastbert.data.dataset import TokenDataset, open_dataset
from fastbert.data.prepare import prepare
from fastbert.recipe import load_config

SMALLER = 1024  # than the sizes of `prepare`
WHOLE = "1 window"


def small_blocks(text: Path, out: Path) -> TokenDataset:
    """Prepare a text with the vocabulary and held-out share of the demo, in small blocks."""
    if not out.exists():
        with ExitStack() as stack:
            for module, name in (
                (segments, "SEGMENT_BYTES"),
                (corpus_plan, "PIECE_BYTES"),
                (block_writer, "BLOCK_BYTES"),
            ):
                stack.enter_context(patch.object(module, name, getattr(module, name) // SMALLER))
            # With one worker, pieces and blocks are made in this process.
            prepare([text], out, vocab_size=4096, heldout=0.05, workers=1, progress=False)
    return open_dataset(out)


def side_of(windows: int) -> str:
    return f"{windows} windows"


def recipes(dataset: TokenDataset, windows: Sequence[int]) -> dict[str, RunConfig]:
    """The demo's recipe with each order.

    `order.window` counts blocks as if they were full: a window is a fixed number of blocks, however
    small they are.
    """
    count = len(dataset.blocks["train"])
    sizes = {WHOLE: count} | {side_of(n): max(count // n, 1) for n in windows}
    return {
        side: load_config(
            "demo", {"data": str(dataset.path), "order.window": size * blocks.BLOCK_BYTES}
        )
        for side, size in sizes.items()
    }


def compared(
    text: Path, tokens: int, seeds: Sequence[int], windows: Sequence[int], out: Path
) -> list[Row]:
    folder = (out / "windows").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    dataset = small_blocks(text, folder / "dataset")
    sides = recipes(dataset, windows)
    rows = train_each(sides, dict.fromkeys(sides, tokens), seeds, folder / f"{tokens}")
    return [{"windows": dataset.windows(sides[row["side"]].order.window), **row} for row in rows]


def windows_table(rows: list[Row]) -> str:
    """A table in Markdown: a line for each run."""
    return table(
        ["seed", "windows in an epoch", "steps", "tokens seen", "MLM loss", "on [MASK]", "NSP"],
        [
            [
                f"{row['seed']}",
                f"{row['windows']}",
                f"{row['steps']:,}",
                f"{row['tokens'] / 1e6:.2f} M",
                f"{row['loss_mlm']:.3f}",
                f"{row['loss_mask_token']:.3f}",
                f"{row['accuracy_nsp']:.1%}",
            ]
            for row in rows
        ],
    )


def difference(rows: list[Row], side: str, loss: str) -> tuple[float, float]:
    """How much higher a loss is with several windows than with one, and the noise of seeds.

    Args:
        rows: of both sides, at least two seeds each.
        side: with several windows.
        loss: a column.

    Returns:
        The difference of the means in nats, and the standard deviation of the loss over the seeds
        of one side: the root of the mean of both sides' variances.
    """
    whole, parts = ([row[loss] for row in rows if row["side"] == name] for name in (WHOLE, side))
    noise = math.sqrt((statistics.variance(whole) + statistics.variance(parts)) / 2)
    return statistics.mean(parts) - statistics.mean(whole), noise


def verdict(rows: list[Row]) -> str:
    """A table in Markdown of the differences, and whether seeds explain them."""
    lines = list[list[str]]()
    for side in dict.fromkeys(row["side"] for row in rows if row["side"] != WHOLE):
        for name, loss in (("MLM loss", "loss_mlm"), ("on [MASK]", "loss_mask_token")):
            more, noise = difference(rows, side, loss)
            within = "yes" if abs(more) <= noise else "no"
            lines.append([side, name, f"{more:+.4f}", f"{noise:.4f}", within])
    return table(
        ["", "", "more than with 1 window", "standard deviation over seeds", "within it"], lines
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("text", type=Path, help="a text, such as the demo's")
    parser.add_argument("--tokens", type=int, default=2_500_000, help="of each run (2500000)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="two or more")
    parser.add_argument(
        "--windows", type=int, nargs="+", default=[4, 16], help="in an epoch, about (4 16)"
    )
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    if len(set(given.seeds)) < 2:
        parser.error("--seeds: give two or more, so that there is a noise of seeds")
    if min(given.windows) < 2:
        parser.error("--windows: give numbers of two or more; one window is the global order")
    rows = compared(given.text.resolve(), given.tokens, given.seeds, given.windows, given.out)
    text = f"Windows against the global order\n\n{windows_table(rows)}\n\n{verdict(rows)}"
    Record(header(torch.device("cpu")), rows).write(given.out, "windows", text)
    print(text)


if __name__ == "__main__":
    main()
