"""Steps, batch sizes and positions of phases, compared with a walk through every single step."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastbert.config import RunConfig
from fastbert.data.batches import Batches
from fastbert.data.dataset import TokenDataset
from fastbert.data.mixture import source_of
from fastbert.data.phases import Position
from fastbert.errors import InputError
from fastbert.recipe import load_config
from tests.tiny_dataset import tiny_dataset


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> list[TokenDataset]:
    folder = tmp_path_factory.mktemp("phases")
    rng = np.random.default_rng(3)
    return [
        tiny_dataset(
            folder / name,
            [rng.integers(1, 12, rng.integers(2, 30)).tolist() for _ in range(size)],
            vocab_size=1 << 15,
        )
        for name, size in (("a", 80), ("b", 50))
    ]


def recipe(datasets: list[TokenDataset], *phases: dict[str, Any], **more: Any) -> RunConfig:
    values = {
        "data": [{"path": str(dataset.path)} for dataset in datasets],
        "objective": {"kind": "mlm"},
        "batch": {"sequences": 12, "max_length": 32, "micro_batch_tokens": 256},
        "stop": {"steps": 400},
        "phase": list(phases),
    }
    return load_config(values, more)


def drawn(batches: Batches, step: int) -> np.ndarray:
    return np.sort(np.concatenate([p.examples.numpy() for p in batches.step(step)]))


# Sizes and borders


def test_borders_in_steps(datasets):
    config = recipe(
        datasets,
        {"steps": 10, "objective": {"mask_rate": 0.3}},
        {"steps": 25, "batch": {"sequences": 20}},
    )
    table = Batches(datasets, config).timetable
    assert [(p.number, p.first, p.end) for p in table.phases] == [
        (1, 0, 10),
        (2, 10, 25),
        (3, 25, None),
    ]
    assert [p.config.objective.mask_rate for p in table.phases] == [0.3, 0.15, 0.15]
    numbers = [table.phase_at(step).number for step in (0, 9, 10, 24, 25, 10**9)]
    assert numbers == [1, 1, 2, 2, 3, 3]
    # What a phase does not set is as in the recipe, not as in the phase before.
    assert [table.at(step).sequences for step in (9, 10, 24, 25)] == [12, 20, 20, 12]


def test_the_batch_grows_in_a_line_over_the_tokens_of_its_warmup(datasets):
    """The mean size of growth in equal stages from 16 to 48 is 32 less half a stage."""
    config = recipe(
        datasets,
        {"steps": 5, "batch": {"sequences": 16}},
        {"batch": {"sequences": 48, "warmup_tokens": 60_000}},
    )
    table = Batches(datasets, config).timetable
    sizes = [table.at(step).sequences for step in range(400)]
    assert sizes[:6] == [16] * 6 and sizes[-1] == 48 and sizes == sorted(sizes)
    kinds = sorted(set(sizes))
    assert kinds == list(range(16, 49, 4))  # multiples of a power of two, 4 = 32 / 8
    growing = [size for size in sizes[5:] if size < 48]
    rate = table._streams.rate(table.eras[0]) / (4096 * 16384)
    assert sum(growing) * rate == pytest.approx(60_000, rel=0.05)
    # Each size gets the same number of tokens, up to a step.
    for size in kinds[:-1]:
        assert abs(growing.count(size) * size * rate - 60_000 / 8) <= 2 * size * rate


def test_ends_in_tokens_are_those_that_the_run_counts(datasets):
    """The tokens of all steps up to the border, counted one by one."""
    config = recipe(
        datasets,
        {"tokens": 40_000, "batch": {"max_length": 16}},
        {"tokens": 100_000, "weights": [0.2, 0.8]},
        {"objective": {"mask_rate": 0.05}},
        **{"stop.steps": None, "stop.tokens": 200_000, "schedule.over": "tokens"},
    )
    batches = Batches(datasets, config)
    ends = [phase.first for phase in batches.timetable.phases[1:]]
    tokens = np.cumsum(
        [sum(p.tokens for p in batches.step(step)) for step in range(ends[-1] + 500)]
    )
    for end, wanted in zip(ends, (40_000, 100_000), strict=True):
        assert tokens[end - 1] == pytest.approx(wanted, rel=0.01)
    planned = batches.timetable.planned_steps()
    assert planned is not None and tokens[planned - 1] == pytest.approx(200_000, rel=0.01)


def test_an_end_before_the_phase_begins_is_an_error(datasets):
    with pytest.raises(InputError, match=r"phase 2: tokens = 100 is reached at step 50"):
        Batches(datasets, recipe(datasets, {"steps": 50}, {"tokens": 100}))


def test_a_phase_too_small_for_the_ranks_is_named(datasets):
    batches = Batches(datasets, recipe(datasets, {"steps": 5, "batch": {"sequences": 2}}))
    batches.check(2)
    with pytest.raises(InputError, match=r"phase 1: batch.sequences = 2 cannot be shared by 3"):
        batches.check(3)


# Positions


def test_each_example_number_is_used_once_across_phases(datasets):
    """Where the length stays the same; mask rate, batch size and weights change."""
    config = recipe(
        datasets,
        {"steps": 7, "objective": {"mask_rate": 0.3}},
        {"steps": 19, "weights": [0.9, 0.1]},
        {"steps": 30, "batch": {"sequences": 40, "warmup_tokens": 3000}},
        {"weights": [0.0, 1.0]},
    )
    batches = Batches(datasets, config)
    numbers = [[], []]
    for step in range(60):
        for source, index in zip(*source_of(drawn(batches, step)), strict=True):
            numbers[source].append(index)
    for source, found in enumerate(numbers):
        n = batches.streams.epoch(source, 32)
        counts = np.bincount(found, minlength=n)
        assert counts.max() - counts.min() <= 1  # whole epochs and a part of the next
        assert batches.timetable.epochs(60)[source] == len(found) / n
    late = np.concatenate([drawn(batches, step) for step in range(31, 60)])
    assert set(source_of(late)[0].tolist()) == {1}


def test_another_length_continues_at_the_same_share_of_the_epoch(datasets):
    config = recipe(datasets, {"steps": 20}, {"batch": {"max_length": 16}})
    batches = Batches(datasets, config)
    before, after = (batches.timetable.epochs(step) for step in (20, 20))
    for source in (0, 1):
        was, now = (batches.streams.epoch(source, length) for length in (32, 16))
        used = batches.timetable._running(batches.timetable.eras[0], 20 * 12)[source]
        assert was < now and 0 <= after[source] - used / was < 1 / now
    assert before == after
    assert max(p.max_seqlen for p in batches.step(19)) > 16
    assert max(p.max_seqlen for p in batches.step(20)) <= 16


@settings(max_examples=5)
@given(data=st.data())
def test_any_step_can_be_drawn_alone(datasets, data):
    """A table of a made-up recipe, and a walk that counts examples from the first step on."""
    ends = sorted(data.draw(st.sets(st.integers(1, 40), min_size=1, max_size=4)))
    phases = [
        {
            "steps": end,
            "weights": data.draw(st.sampled_from([[1, 1], [1, 3]])),
            "batch": {
                "sequences": data.draw(st.sampled_from([4, 8, 24])),
                "max_length": data.draw(st.sampled_from([16, 32])),
            },
        }
        for end in ends
    ]
    table = Batches(datasets, recipe(datasets, *phases)).timetable
    number, era = 0, table.eras[table.at(0).era]
    for step in range(50):
        position = table.position(step)
        if position.era != era:
            number, era = 0, position.era
        assert position.number == number
        phase = next((p for p in phases if step < p["steps"]), None)
        size = phase["batch"]["sequences"] if phase else 12
        assert table.at(step).sequences == size
        number += size


# Branches


def test_a_branch_continues_as_the_run_itself(datasets):
    config = recipe(
        datasets,
        {"steps": 9, "batch": {"max_length": 16}},
        {"tokens": 9000, "weights": [0.3, 0.7]},
        {"batch": {"sequences": 32, "warmup_tokens": 9000}},
    )
    whole = Batches(datasets, config)
    for step in (1, 9, 40):
        origin = Position.load(json.loads(json.dumps(whole.timetable.position(step).dump())))
        branch = Batches(datasets, config, origin)
        assert branch.timetable.first_step == step
        for later in itertools.chain(range(step, step + 5), range(60, 130, 7)):
            if later >= step:
                assert (drawn(branch, later) == drawn(whole, later)).all()
        # And a branch of the branch.
        second = Batches(datasets, config, branch.timetable.position(step + 3))
        assert (drawn(second, step + 4) == drawn(whole, step + 4)).all()
        assert [p.first for p in branch.timetable.phases] == [
            p.first for p in whole.timetable.phases
        ]


def test_a_branch_with_other_settings_continues_each_source(datasets):
    whole = Batches(datasets, recipe(datasets))
    origin = whole.timetable.position(21)
    other = recipe(datasets, {"steps": 40, "weights": [0.2, 0.8]}, {"batch": {"sequences": 5}})
    branch = Batches(datasets, other, origin)
    assert branch.timetable.epochs(21) == whole.timetable.epochs(21)
    before = np.concatenate([drawn(whole, step) for step in range(21)])
    after = np.concatenate([drawn(branch, step) for step in range(21, 45)])
    counts = np.unique(np.concatenate([before, after]), return_counts=True)[1]
    assert counts.max() == 1 or max(branch.timetable.epochs(45)) > 1
    # A source that is added at the end begins at its beginning.
    alone = Batches(datasets[0], replace(recipe(datasets[:1]), weights=None))
    more = Batches(datasets, recipe(datasets), alone.timetable.position(5))
    n = more.streams.epoch(0, 32)
    assert more.timetable.epochs(5) == [5 * 12 / n, 0.0]


def test_a_run_without_phases_is_one_stretch(tmp_path: Path, datasets):
    config = replace(recipe(datasets[:1]), stop=replace(recipe(datasets[:1]).stop, steps=None))
    table = Batches(datasets[0], config).timetable
    assert len(table.stretches) == len(table.phases) == len(table.eras) == 1
    n = Batches(datasets[0], config).examples_per_epoch
    assert table.planned_steps() == -(-n // 12)
