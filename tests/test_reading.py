"""What a plan says of reading is what a run reads, counted in bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fastbert.config import BatchConfig, ObjectiveConfig, OrderConfig, RunConfig
from fastbert.data.batches import Batches
from fastbert.data.blocks import BLOCK_BYTES
from fastbert.data.dataset import TokenDataset
from fastbert.data.verify import Claim
from fastbert.data.window_order import Windows
from fastbert.planning.plan import Hardware, describe, plan
from fastbert.planning.reading import reading, sample
from tests.block_dataset import in_blocks


@pytest.fixture(scope="module")
def dataset(small_dataset, tmp_path_factory) -> TokenDataset:
    return in_blocks(small_dataset, tmp_path_factory.mktemp("reading") / "dataset", 5, 7)


def recipe(dataset: TokenDataset, blocks: int, length: int = 64, sequences: int = 64) -> RunConfig:
    return RunConfig(
        data=str(dataset.path),
        objective=ObjectiveConfig(kind="mlm"),
        batch=BatchConfig(sequences=sequences, max_length=length),
        order=OrderConfig(window=blocks * BLOCK_BYTES),
    )


def size_of(folder: Path) -> int:
    return sum(
        file.stat().st_size
        for file in folder.rglob("*")
        if file.is_file() and file.name[0] != "." and file.name != "manifest.json"
    )


@pytest.mark.parametrize("blocks", [4, 10_000])
def test_bytes_before_the_first_step_are_those_that_are_read(dataset, monkeypatch, blocks):
    config, seen = recipe(dataset, blocks, sequences=4), list[int]()
    expected = reading(dataset, config.order.window)
    problem = Claim.problem

    def counted(claim: Claim, *args: object) -> str | None:
        seen.append(claim.size)
        return problem(claim, *args)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(Claim, "problem", counted)
    for _ in dataset.verify(config.order.window):
        pass
    batches = Batches(dataset, config)
    # What is opened ahead of the second window is not read before the first step.
    monkeypatch.setattr("fastbert.data.window_order._Ahead", lambda *_: None)
    batches.draw(0)
    if blocks == 10_000:
        assert expected.windows == 1 and sum(seen) == expected.first == expected.total
        assert expected.cache == expected.window
    else:
        stream = batches.streams.source(0, config.batch.max_length)
        assert isinstance(stream, Windows)
        windows = [int(stream.blocks_of(i).layout.size.sum()) for i in range(stream.windows)]
        text = sum(windows)
        assert sum(seen) - windows[0] == expected.first - expected.window
        assert abs(expected.window - text * 4 / len(dataset.blocks["train"])) < 1
        assert expected.windows == len(windows) > 5 and expected.cache == 2 * expected.window
    # Shards have zeros between blocks, which nobody reads.
    assert expected.first <= expected.total < size_of(dataset.path)


def test_format_2_is_verified_and_shuffled_as_a_whole(small_dataset):
    found = reading(small_dataset, BLOCK_BYTES)
    assert found.first == found.total == size_of(small_dataset.path) and found.windows == 1


@pytest.mark.parametrize("length", [64, 100])
def test_a_sample_has_the_size_of_the_epoch_and_like_lengths(dataset, length):
    config, whole = recipe(dataset, 4, length), recipe(dataset, 10_000, length)
    total, lengths = sample(dataset, config, config.seed)
    expected, drawn = sample(dataset, whole, whole.seed)
    assert total == expected == Batches(dataset, config).examples_per_epoch
    packs = Batches(dataset, whole).step(0)
    assert drawn.sum() == sum(pack.tokens for pack in packs)
    error = np.hypot(lengths.std(), drawn.std()) / np.sqrt(len(drawn))
    assert len(lengths) == 64 and abs(lengths.mean() - drawn.mean()) < 4 * error


def test_the_table_says_it(dataset):
    rows = dict(describe(plan(recipe(dataset, 4), "x", Hardware("h100"), stage=0)))
    windows = dataset.windows(4 * BLOCK_BYTES)
    assert f"{windows} an epoch" in rows["data"] and "before the first step" in rows["data"]
    rows = dict(describe(plan(recipe(dataset, 10_000), "x", Hardware("h100"), stage=0)))
    assert "shuffled as a whole" in rows["data"]
