"""Lanes: each rank draws its share, and all lanes together are the step."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fastbert.config import BatchConfig, ObjectiveConfig, RunConfig
from fastbert.data import lanes
from fastbert.data.batches import Batches
from fastbert.data.examples import Examples
from fastbert.data.lanes import Facts, from_sum, lanes_for, to_sum
from fastbert.data.packing import PackedBatch
from fastbert.data.prefetch import STEPS_AHEAD, Prefetch
from fastbert.errors import InputError
from tests.ranks import LAUNCHER, environment, free_port
from tests.trials import Trial


@pytest.mark.parametrize(
    "world, sequences, expected",
    [
        (1, 7, 1),
        (64, 64, 1),
        (64, 100, 1),
        (65, 650, 5),
        (128, 256, 2),
        (96, 960, 2),
        (512, 32768, 8),
        (127, 254, 127),
        (128, 300, 1),
    ],
)
def test_lanes_have_at_most_64_ranks_and_equal_sequences(world, sequences, expected):
    assert lanes_for(world, sequences) == expected


def recipe(sequences: int = 64, tokens: int = 256) -> RunConfig:
    return RunConfig(
        data="",
        objective=ObjectiveConfig(segments="single"),
        batch=BatchConfig(sequences=sequences, max_length=64, micro_batch_tokens=tokens),
    )


def examples_of(packs: list[PackedBatch]) -> list[int]:
    return [example for pack in packs for example in pack.examples.tolist()]


@pytest.mark.parametrize("at_once", [1, 2])
@pytest.mark.parametrize("world, most, sequences", [(16, 4, 64), (6, 2, 24), (8, 1, 32)])
def test_lanes_together_are_the_step(small_dataset, monkeypatch, world, most, sequences, at_once):
    monkeypatch.setattr(lanes, "MOST_RANKS", most)
    batches = Batches(small_dataset, recipe(sequences))
    count = lanes_for(world, sequences)
    assert count == world // most
    drawn = list[int]()
    draw = Examples.draw

    def counted(self: Examples, epoch: int, indices: np.ndarray, *more: int):
        drawn.append(len(indices))
        return draw(self, epoch, indices, *more)

    for step in (0, 5):
        whole = batches.step(step)
        monkeypatch.setattr(Examples, "draw", counted)
        drawn.clear()
        spans = [batches.draw(step, lane, count) for lane in range(count)]
        assert drawn == [sequences // count] * count  # what a rank of each lane draws
        monkeypatch.undo()
        monkeypatch.setattr(lanes, "MOST_RANKS", most)
        own = [batches.facts(step, one, most, at_once) for one in spans]
        parts = [to_sum(own[rank // most], rank, world, count) for rank in range(world)]
        facts = from_sum(np.sum(parts, axis=0))
        shares = [
            batches.pack(step, spans[rank // most], facts, rank % most, most, at_once)
            for rank in range(world)
        ]
        assert {len(packs) for packs in shares} == {facts.packs} and facts.packs % at_once == 0
        everything = [pack for packs in shares for pack in packs]
        assert sorted(examples_of(everything)) == sorted(examples_of(whole))
        assert {pack.masked_total for pack in everything} == {whole[0].masked_total}
        assert {pack.pairs_total for pack in everything} == {whole[0].pairs_total}
        assert sum(len(pack.labels) for pack in everything) == whole[0].masked_total
        assert all(len(pack.examples) for pack in everything)
        assert max(pack.tokens for pack in everything) <= max(256 // at_once, 64)


def test_a_lane_of_short_sequences_has_as_many_packs_as_the_others(small_dataset):
    batches = Batches(small_dataset, recipe(32))
    spans = batches.draw(0, 0, 2)
    own = batches.facts(0, spans, 2)
    packs = batches.pack(0, spans, Facts(own.masked, own.pairs, own.packs + 2), 1, 2)
    assert len(packs) == own.packs + 2 and all(len(pack.examples) for pack in packs)


@pytest.fixture
def two_lanes(small_dataset, monkeypatch) -> Batches:
    monkeypatch.setattr(lanes, "MOST_RANKS", 2)
    return Batches(small_dataset, recipe())


def test_prefetch_exchanges_facts_three_steps_ahead(two_lanes):
    """Four ranks of one process; the sums that the run would make are made here."""
    feeds = [Prefetch(two_lanes, 7, rank, 4) for rank in range(4)]
    try:
        for step in range(7, 7 + STEPS_AHEAD):
            total = np.sum([feed.facts(step) for feed in feeds], axis=0)
            for feed in feeds:
                feed.settle(step, total)
        for step in range(7, 15):
            found = [next(feed) for feed in feeds]
            assert [number for number, _, _ in found] == [step] * 4
            everything = [pack for _, packs, _ in found for pack in packs]
            whole = two_lanes.step(step)
            assert sorted(examples_of(everything)) == sorted(examples_of(whole))
            assert {pack.masked_total for pack in everything} == {whole[0].masked_total}
            assert len({len(packs) for _, packs, _ in found}) == 1
            total = np.sum([feed.facts(step + STEPS_AHEAD) for feed in feeds], axis=0)
            for feed in feeds:
                feed.settle(step + STEPS_AHEAD, total)
    finally:
        for feed in feeds:
            feed.close()


def test_damage_is_raised_where_the_facts_are_asked_for(two_lanes, monkeypatch):
    draw = two_lanes.draw

    def damaged(step: int, lane: int = 0, lanes: int = 1):
        if step == 2:
            raise InputError("train-00000: damaged")
        return draw(step, lane, lanes)

    monkeypatch.setattr(two_lanes, "draw", damaged)
    with Prefetch(two_lanes, 0, 0, 4) as feed:
        assert len(feed.facts(0)) == len(feed.facts(1)) == 6
        with pytest.raises(InputError, match="damaged"):
            feed.facts(2)


COUNTED = ("tokens", "masked", "sequences")
ROUNDING = 1e-4  # relative: sums of another order, over 6 steps, as in test_multi_node.py
SCRIPT = """
import sys
from fastbert.data import lanes
lanes.MOST_RANKS = 1
from fastbert.cli import main
sys.exit(main())
"""


@pytest.mark.slow
def test_two_ranks_train_in_two_lanes_as_in_one(small_dataset, tmp_path):
    """Packs differ, so losses are equal to rounding; counts are equal."""
    one, two = (
        Trial(tmp_path / name, small_dataset.path, f"data={small_dataset.path}")
        for name in ("one", "two")
    )
    one.resume(2, "stop.steps=6")
    port = str(free_port())
    places = [(str(rank), "2", str(rank), "2", "127.0.0.1", port) for rank in range(2)]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, *two.command, "stop.steps=6"],
            env=environment(**dict(zip(LAUNCHER, place, strict=True))),
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            cwd=Path(tmp_path),
        )
        for place in places
    ]
    errors = [rank.communicate(timeout=120)[1].decode() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], errors
    assert len(one.steps) == len(two.steps) == 6
    for a, b in zip(one.steps, two.steps, strict=True):
        assert [a[key] for key in COUNTED] == [b[key] for key in COUNTED]
        assert a["loss"] == pytest.approx(b["loss"], rel=ROUNDING)
