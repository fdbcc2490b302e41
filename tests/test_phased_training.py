"""Mixtures and phases in real runs: what is trained on, resumed, refused and reported."""

from __future__ import annotations

import signal
from pathlib import Path

import numpy as np
import pytest

from fastbert.config import RunConfig
from fastbert.data.batches import Batches
from fastbert.data.dataset import TokenDataset
from fastbert.recipe import load_config
from fastbert.tasks.evaluate import evaluate
from fastbert.tasks.export import model_card
from fastbert.tasks.load import load
from fastbert.tasks.run_report import report
from tests.mixed_runs import PHASES, newest, records, refusal, train, write
from tests.ranks import Ranks


@pytest.fixture
def recipe(two_sources, tmp_path) -> Path:
    return write(tmp_path, two_sources)


# A mixture


def test_losses_are_reported_by_source_and_together(recipe, two_sources):
    train(recipe)
    run = recipe.parent / "run"
    evaluations = records(run, "evaluate")
    assert [record["step"] for record in evaluations] == [4, 8, 12]
    shares = Batches(two_sources, load_config(recipe)).timetable.eras[0].quotas
    for record in evaluations:
        assert list(record["sources"]) == ["a", "b"]
        for key in ("loss", "loss_mlm", "loss_nsp", "accuracy_mlm", "loss_mask_token"):
            each = [one[key] for one in record["sources"].values()]
            assert record[key] == pytest.approx(np.average(each, weights=shares), rel=1e-12)
    # The losses of a source are those that a run on it alone would report for the same weights.
    model = load(run, "cpu")
    for name, dataset in zip("ab", two_sources, strict=True):
        found = evaluate(model, dataset.path).flat()
        assert found["loss"] == pytest.approx(evaluations[-1]["sources"][name]["loss"], rel=1e-5)
    # Evaluated without --data: every source with its name, and together.
    found = evaluate(model)
    flat = found.flat()
    for key in ("loss", "loss_mlm", "loss_nsp", "accuracy_mlm", "loss_mask_token"):
        assert flat[key] == pytest.approx(evaluations[-1][key], rel=1e-5)
    assert list(flat["sources"]) == ["a", "b"] and flat["sequences"] == 2 * 16
    assert flat["sources"]["b"] == evaluate(model, two_sources[1].path).flat()
    losses = [one.by_corruption["[MASK]"].left_bigram for one in found.sources.values()]
    assert found.by_corruption["[MASK]"].left_bigram == pytest.approx(
        np.average(losses, weights=shares)
    )
    unigram = [dataset.baselines["unigram"] for dataset in two_sources]
    assert flat["baselines"]["unigram"] == pytest.approx(np.average(unigram, weights=shares))
    log = (run / "log.txt").read_text()
    assert "MLM loss by source: a " in log
    page = report(run).read_text()
    assert "mean over the sources of the mixture" in page and ">source b</" in page
    card = model_card(model, "BertForPreTraining", "mixed")
    assert all(dataset.sha256 in card for dataset in two_sources)


def test_baselines_are_means_by_the_same_shares(recipe, two_sources):
    """The log compares the loss with the word frequencies of both sources."""
    train(recipe, "stop.steps=1")
    shares = Batches(two_sources, load_config(recipe)).timetable.eras[0].quotas
    unigram = np.average([dataset.baselines["unigram"] for dataset in two_sources], weights=shares)
    log = (recipe.parent / "run/log.txt").read_text()
    assert f"word frequencies ({unigram:.2f})" in log


@pytest.mark.slow
def test_a_resumed_mixture_is_the_same_to_the_last_digit(recipe, tmp_path):
    train(recipe)
    train(recipe, f"run={tmp_path / 'cut'}", "stop.steps=5")
    train(recipe, f"run={tmp_path / 'cut'}", resume=True)
    whole, cut = (records(tmp_path / name, None) for name in ("run", "cut"))
    assert list(newest(cut).values()) == whole


def test_one_dataset_in_a_list_is_that_dataset(recipe, two_sources, tmp_path):
    plain = f'data="{two_sources[0].path}"'
    text = recipe.read_text().replace("weights = [0.7, 0.3]\n", "")
    (tmp_path / "one").mkdir()
    single = tmp_path / "one/recipe.toml"
    single.write_text(text)
    train(single, plain, "stop.steps=3")
    listed = f'data=[{{path = "{two_sources[0].path}"}}]'
    train(single, listed, "stop.steps=3", f"run={tmp_path / 'listed'}")
    assert records(tmp_path / "run", None) == records(tmp_path / "listed", None)


def test_what_a_resumed_mixture_may_not_change(recipe, two_sources, tmp_path):
    train(recipe, "stop.steps=4")
    a, b = (str(dataset.path) for dataset in two_sources)
    assert "weights = (0.5, 0.5), but the checkpoint" in refusal(
        recipe, "weights=[0.5, 0.5]", resume=True
    )
    train(recipe, "weights=[14, 6]", "stop.steps=6", resume=True)  # the same shares
    swapped = f'data=[{{path = "{b}"}}, {{path = "{a}"}}]'
    assert "data 1 = " in (message := refusal(recipe, swapped, resume=True))
    assert "not the dataset that" in message


def test_sources_with_different_tokenizers_are_refused(recipe, two_sources, small_dataset):
    other = f'data=[{{path = "{two_sources[0].path}"}}, {{path = "{small_dataset.path}"}}]'
    message = refusal(recipe, other)
    assert str(two_sources[0].path) in message and str(small_dataset.path) in message
    assert "were made with different tokenizers" in message and "--tokenizer" in message


# Phases


def expected(
    config: RunConfig, two_sources: list[TokenDataset], steps: int
) -> list[dict[str, int]]:
    batches = Batches(two_sources, config)
    return [
        {
            "sequences": sum(p.sequences for p in packs),
            "tokens": sum(p.tokens for p in packs),
            "masked": sum(len(p.labels) for p in packs),
        }
        for packs in (batches.step(step) for step in range(steps))
    ]


def test_phases_change_the_run_and_are_reported(two_sources, tmp_path):
    recipe = write(tmp_path, two_sources, PHASES)
    train(recipe)
    run = tmp_path / "run"
    steps = records(run, None)
    wanted = expected(load_config(recipe), two_sources, 12)
    assert [{key: step[key] for key in wanted[0]} for step in steps] == wanted
    # By hand: 30 % of the tokens of phase 1, 15 % in phase 2, 5 % in phase 3.
    for record, rate in zip(steps, [0.3] * 4 + [0.15] * 4 + [0.05] * 4, strict=True):
        ordinary = record["tokens"] - 3 * record["sequences"]
        assert abs(record["masked"] - rate * ordinary) <= record["sequences"] / 2 + 1
    sizes = [record["sequences"] for record in steps]
    assert sizes[:4] == [8] * 4 and sizes[4:8] == sorted(sizes[4:8]) and sizes[8:] == [8] * 4
    assert sizes[4] == 8 and sizes[7] == 16
    lengths = [record["tokens"] / record["sequences"] for record in steps]
    assert max(lengths[:4]) <= 32 < min(lengths[4:])
    # The rate is constant but in the last phase, where it falls to zero in a line.
    rates = [record["lr"] for record in steps]
    assert rates == pytest.approx([3e-3] * 8 + [3e-3 * (1 - i / 4) for i in range(4)], rel=1e-12)
    phases = records(run, "phase")
    assert [(p["step"], p["phase"], p["end_step"]) for p in phases] == [
        (0, 1, 4), (4, 2, 8), (8, 3, 12),
    ]  # fmt: skip
    assert "phase 3, from step 8 to 12: mask rate 0.05" in (run / "log.txt").read_text()
    model = load(run, "cpu")
    assert model.max_length == 64
    assert load(run / "checkpoints/step-00000004", "cpu").max_length == 32
    assert evaluate(model, two_sources[0].path, 8).sequences == 8


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_a_run_killed_at_the_border_of_a_phase_continues_to_the_last_digit(
    two_sources, tmp_path, world
):
    """SIGKILL while the checkpoint at the border is written, and once more after it."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
        recipe = write(folder, two_sources, PHASES)
        (folder / "ds_config.json").write_text('{"zero_optimization": {"stage": 0}}')
    command = ["pretrain", str(recipe), f"runtime.deepspeed={killed / 'ds_config.json'}"]
    for point in ("tensors-half", "saved@1"):
        with Ranks(
            [*command, "--resume"],
            tmp_path / point.replace("@", "-"),
            world,
            None,
            FASTBERT_FAILPOINT=f"{point}=kill",
        ) as ranks:
            assert -signal.SIGKILL in ranks.wait()
    with Ranks([*command, "--resume"], tmp_path / "end", world, None) as ranks:
        assert ranks.wait() == [0] * world, ranks.errors
    undisturbed = ["pretrain", str(whole / "recipe.toml"), *command[2:]]
    with Ranks(undisturbed, tmp_path / "undisturbed", world, None) as ranks:
        assert ranks.wait() == [0] * world, ranks.errors
    expected, found = (newest(records(f / "run", None, "evaluate")) for f in (whole, killed))
    assert found == expected and len(found) == 12 + 3
    resumed = [r["step"] for r in records(killed / "run", "resume")]
    assert resumed and resumed[0] == 4
