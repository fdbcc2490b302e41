"""Runs that begin at a checkpoint of another run: what they continue, change and refuse."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

import fastbert
from fastbert import storage
from fastbert.data.batches import Batches
from fastbert.data.mixture import source_of
from fastbert.data.phases import Position
from fastbert.recipe import load_config
from fastbert.storage import Url
from fastbert.tasks.export import model_card
from fastbert.tasks.load import load
from tests.mixed_runs import PHASES, newest, records, refusal, train, write


@pytest.fixture
def recipe(two_sources, tmp_path) -> Path:
    return write(tmp_path, two_sources)


def test_a_branch_with_the_same_recipe_is_the_run_itself(two_sources, tmp_path):
    """Its steps have the same losses as those of the run that went on, to the last digit."""
    recipe = write(tmp_path, two_sources, PHASES)
    train(recipe)
    for step in (4, 8):
        folder = tmp_path / f"branch-{step}"
        train(recipe, f"run={folder}", branch_from=f"{tmp_path / 'run'}@{step}")
        own = records(folder, None, "evaluate")
        whole = [r for r in records(tmp_path / "run", None, "evaluate") if r["step"] > step]
        assert own == whole
        (begun,) = records(folder, "branch")
        assert begun["step"] == step and begun["checkpoint"].endswith(f"step-{step:08d}")
        text = (folder / "config.toml").read_text()
        assert load_config(folder / "config.toml").branch_from == f"{tmp_path / 'run'}@{step}", text


@pytest.mark.slow
def test_a_cooldown_branch_is_resumed_and_branched_again(two_sources, tmp_path):
    """A branch with other weights, its own schedule and one more source."""
    recipe = write(tmp_path, two_sources)
    train(recipe)
    parent = tmp_path / "run"
    cooldown = [
        "weights=[0.1, 0.9]",
        'schedule={decay = "linear", warmup = 0.0}',
        "objective.mask_rate=0.05",
        "batch.max_length=64",
        "stop.steps=16",
    ]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(recipe, *cooldown, f"run={whole}", branch_from=f"{parent}@8")
    train(recipe, *cooldown[:-1], "stop.steps=10", "schedule.decay=constant", f"run={cut}",
          branch_from=f"{parent}@8")  # fmt: skip
    train(cut / "config.toml", "stop.steps=16", 'schedule.decay="linear"', resume=True)
    found = [r["step"] for r in records(whole, None)]
    assert found == list(range(9, 17))
    examples = [(r["tokens"], r["masked"]) for r in records(whole, None)]
    again = newest(records(cut, None))
    assert [(r["tokens"], r["masked"]) for r in again.values()] == examples
    # A branch of the branch continues where that one stood.
    second = tmp_path / "second"
    train(recipe, *cooldown, f"run={second}", branch_from=f"{whole}@12")
    assert records(second, None) == [r for r in records(whole, None) if r["step"] > 12]
    card = model_card(load(whole, "cpu"), "BertForPreTraining", "cooled")
    assert f'branch_from = "{parent}@8"' in card


def test_a_branch_uses_no_example_that_its_run_has_used(two_sources, tmp_path):
    """With the same length, each source goes on where the other run stood, whatever the weights."""
    recipe = write(tmp_path, two_sources)
    train(recipe, "stop.steps=8")
    train(recipe, "weights=[0.1, 0.9]", f"run={tmp_path / 'other'}",
          branch_from=f"{tmp_path / 'run'}@8")  # fmt: skip
    saved = json.loads((tmp_path / "other/checkpoints/step-00000012/manifest.json").read_text())
    origin = Position.load(saved["metadata"]["origin"])
    before = Batches(two_sources, load_config(recipe))
    after = Batches(two_sources, load_config(recipe, ["weights=[0.1, 0.9]"]), origin)
    drawn = [
        {tuple(map(int, pair)) for p in batches.step(step) for pair in zip(
            *source_of(p.examples.numpy()), strict=True)}
        for batches, step in [*((before, i) for i in range(8)), *((after, i) for i in range(8, 12))]
    ]  # fmt: skip
    assert len(set().union(*drawn)) == 12 * 8
    for source, dataset_used in enumerate(after.timetable.epochs(12)):
        count = sum(s == source for s, _ in set().union(*drawn))
        assert dataset_used == count / after.streams.epoch(source, 32)


def test_a_source_may_be_added_by_a_branch(two_sources, tmp_path):
    recipe = write(tmp_path, two_sources)
    a, both = f'data="{two_sources[0].path}"', load_config(recipe).shown_data
    text = recipe.read_text().replace("weights = [0.7, 0.3]\n", "")
    recipe.write_text(text)
    train(recipe, a, "stop.steps=8")
    assert "data has 2 sources" in refusal(recipe, "stop.steps=9", resume=True)
    train(recipe, f"run={tmp_path / 'more'}", branch_from=f"{tmp_path / 'run'}@8")
    (last, *_) = reversed(records(tmp_path / "more", "evaluate"))
    assert list(last["sources"]) == ["a", "b"] and both.count(",") == 1
    swapped = f'data=[{{path = "{two_sources[1].path}"}}, {{path = "{two_sources[0].path}"}}]'
    assert "data = " in refusal(
        recipe, swapped, f"run={tmp_path / 'x'}", branch_from=f"{tmp_path / 'run'}@8"
    )


def test_what_a_branch_is_refused(recipe, two_sources, tmp_path):
    train(recipe, "stop.steps=8")
    run, new = tmp_path / "run", f"run={tmp_path / 'new'}"
    for branch_from, message in [
        ("nothing", "must be RUN@STEP"),
        (f"{run}@", "must be RUN@STEP"),
        (f"{tmp_path / 'gone'}@4", "is no folder; name that of a run"),
        (f"{tmp_path}@4", "has no checkpoints"),
        (f"{run}@5", "has no checkpoint of step 5; it has 4, 8"),
    ]:
        assert message in refusal(recipe, new, branch_from=branch_from)
    at = f"{run}@8"
    for override, message in [
        ("model.hidden_size=64", "model.hidden_size = 64, but branch_from"),
        ("seed=2", "seed = 2, but the checkpoint"),
        ("optimizer.name=lamb", "optimizer.name = 'lamb', but the checkpoint"),
        ("objective.segments=single", "objective.segments = 'single'"),
    ]:
        assert message in refusal(recipe, new, override, branch_from=at)
    one = f'data=[{{path = "{two_sources[0].path}"}}]'
    message = "data has 1 of the 2 sources that"
    assert message in refusal(recipe, new, one, "weights=[1]", branch_from=at)
    for phases in ("phase=[]", "phase=[{steps = 4}, {steps = 8}]"):
        for limit in ("stop.steps=8", "stop.steps=4", "stop.tokens=100"):
            message = f"{limit.replace('=', ' = ')} is reached there already, so no step is left"
            assert message in refusal(recipe, new, phases, limit, branch_from=at)
    # The folder of the branch must be new.
    assert "holds a run with checkpoints" in refusal(recipe, branch_from=at)


def test_a_branch_from_python(two_sources, tmp_path):
    recipe = write(tmp_path, two_sources)
    train(recipe, "stop.steps=8")
    result = fastbert.pretrain(
        recipe, run=str(tmp_path / "py"), branch_from=f"{tmp_path / 'run'}@4", stop={"steps": 6}
    )
    assert result.exit_code == 0 and result.metrics["train"]["step"] == 6
    assert math.isfinite(result.metrics["heldout"]["loss"])


def test_branches_from_and_into_a_bucket(two_sources, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTBERT_CACHE", str(tmp_path / "cache"))
    recipe = write(tmp_path, two_sources)
    train(recipe)
    whole = [r for r in records(tmp_path / "run", None) if r["step"] > 8]
    url = Url(f"memory://{tmp_path}/branch")
    train(recipe, f"run={url}", "stop.steps=10", branch_from=f"{tmp_path / 'run'}@8")
    (tmp_path / "run/checkpoints").rename(tmp_path / "gone")
    train(recipe, f"run={url}", branch_from=f"{tmp_path / 'run'}@8", resume=True)
    (tmp_path / "seen").mkdir()
    (tmp_path / "seen/metrics.jsonl").write_bytes(storage.read(url / "metrics.jsonl"))
    assert records(tmp_path / "seen", None) == whole
    # And from the bucket to the disk.
    train(recipe, f"run={tmp_path / 'back'}", branch_from=f"{url}@10")
    assert records(tmp_path / "back", None) == whole[2:]
    new = f"run={tmp_path / 'new'}"
    assert "has no checkpoint of step 9" in refusal(recipe, new, branch_from=f"{url}@9")
    assert "has no checkpoints" in refusal(recipe, new, branch_from=f"{url}x@9")
