"""What a run reads of its dataset: before the first step, at a time, and by how many requests."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fastbert.config import RunConfig
from fastbert.data.block_split import BlockSplit
from fastbert.data.block_table import per_window
from fastbert.data.dataset import TokenDataset
from fastbert.data.examples import Examples
from fastbert.data.remote_dataset import files_of
from fastbert.data.window_order import count_by_block
from fastbert.storage import RANGE_BYTES

SAMPLE = 16  # blocks from which the lengths of examples are drawn


@dataclass(frozen=True)
class Reading:
    """Bytes of a dataset.

    Attributes:
        total: the whole dataset.
        first: read by each machine before the first step, to verify it. A dataset that fits one
            window is verified as a whole.
        windows: of an epoch; 1 where all examples are shuffled together.
        window: the text of a window.
        cache: page cache that a machine needs so that nothing is read twice in an epoch: all text
            where examples come from all over it, else the window in use and the next one.
        gets: requests for bytes that each machine sends before the first step, where the dataset is
            in a bucket.
        gets_per_epoch: those for the text of an epoch, one for each block. A machine sends them
            once if FASTBERT_CACHE_GB has room for all text, else in every epoch. 0 where the whole
            dataset was copied before the first step.
    """

    total: int
    first: int
    windows: int
    window: int
    cache: int
    gets: int
    gets_per_epoch: int


def reading(dataset: TokenDataset, size: int) -> Reading:
    """Return what a run with windows of `size` bytes reads."""
    files = sum(entry["size"] for entry in dataset.manifest["files"].values())
    windows = dataset.windows(size)
    gets = {
        name: -(-length // RANGE_BYTES) for name, (length, _) in files_of(dataset.manifest).items()
    }
    if not dataset.blocks:
        return Reading(files, files, 1, files, files, 1 + sum(gets.values()), 0)
    # The manifest, and the tables, which tell how many windows there are.
    before = 1 + len(dataset.manifest["parts"])
    train, heldout = (int(dataset.blocks[name].layout.size.sum()) for name in ("train", "heldout"))
    total = files + train + heldout
    if windows == 1:
        return Reading(total, total, 1, train, train, before + sum(gets.values()), 0)
    blocks = len(dataset.blocks["train"])
    window = train * per_window(size) // blocks
    before += sum(count for name, count in gets.items() if "/train-" not in name)
    return Reading(
        total,
        files + heldout + window,
        windows,
        window,
        2 * window,
        before + per_window(size),
        blocks,
    )


def sample(dataset: TokenDataset, config: RunConfig, seed: int) -> tuple[int, np.ndarray]:
    """Return the examples of an epoch, and the lengths of those of a step, int64 [sequences].

    Lengths are those of the first step; where the dataset has windows they are drawn from blocks
    that are spread over it. Nothing is verified.

    Raises:
        InputError: as Examples.
    """
    numbers = np.arange(config.batch.sequences)
    objective, length = config.objective, config.batch.max_length
    split, total = None, None
    if dataset.windows(config.order.window) > 1:
        blocks = dataset.blocks["train"]
        total = int(count_by_block(blocks, objective, length).sum())
        split = BlockSplit(blocks.take(np.linspace(0, len(blocks) - 1, SAMPLE).astype(int)))
    examples = Examples(split or dataset.split("train"), objective, length, seed, str(dataset.path))
    return total or len(examples), examples.draw(0, numbers % len(examples)).lengths
