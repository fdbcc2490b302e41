"""Mixtures, phases and branches in real runs: what is trained on, resumed, refused and reported."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastbert
from fastbert.config import RunConfig
from fastbert.data.batches import Batches
from fastbert.data.dataset import TokenDataset, open_dataset
from fastbert.data.mixture import source_of
from fastbert.data.prepare import prepare
from fastbert.errors import InputError
from fastbert.recipe import load_config
from fastbert.tasks.evaluate import evaluate
from fastbert.tasks.export import model_card
from fastbert.tasks.load import load
from fastbert.tasks.run_report import report
from fastbert.training.loop import pretrain
from fastbert.training.metrics import read_metrics
from tests.ranks import Ranks
from tests.trials import CLOCK

ROOT = Path(__file__).parents[1]

RECIPE = """
data = [{{path = "{a}"}}, {{path = "{b}"}}]
weights = [0.7, 0.3]
run = "{run}"
[model]
num_hidden_layers = 1
hidden_size = 32
num_attention_heads = 2
intermediate_size = 48
max_position_embeddings = 64
[batch]
sequences = 8
max_length = 32
micro_batch_tokens = 200
[optimizer]
lr = 3e-3
[schedule]
warmup = 0
decay = "constant"
[stop]
steps = 12
[evaluate]
every = 4
sequences = 16
[checkpoint]
every = 4
keep = 9
[runtime]
precision = "fp32"
deepspeed = "{deepspeed}"
"""

PHASES = """
[[phase]]
steps = 4
objective.mask_rate = 0.3

[[phase]]
steps = 8
weights = [0.2, 0.8]
batch.sequences = 16
batch.max_length = 64
batch.warmup_tokens = 1000

[[phase]]
steps = 12
weights = [0.2, 0.8]
objective.mask_rate = 0.05
batch.max_length = 64
schedule.decay = "linear"
"""


@pytest.fixture(scope="module")
def sources(english_documents, tmp_path_factory) -> list[TokenDataset]:
    """Two datasets of one tokenizer: the first third of the text, and the rest."""
    folder = tmp_path_factory.mktemp("sources")
    cut, made = len(english_documents) // 3, list[TokenDataset]()
    for name, documents in (("a", english_documents[:cut]), ("b", english_documents[cut:])):
        text = folder / f"{name}.jsonl"
        text.write_text("".join(json.dumps({"text": one}) + "\n" for one in documents))
        options: dict[str, Any] = (
            {"tokenizer": made[0].tokenizer_dir} if made else {"vocab_size": 800}
        )
        prepare([text], folder / name, workers=1, heldout=0.1, progress=False, **options)
        made.append(open_dataset(folder / name))
    return made


@pytest.fixture
def recipe(sources, tmp_path) -> Path:
    return write(tmp_path, sources)


def write(folder: Path, sources: list[TokenDataset], phases: str = "") -> Path:
    path = folder / "recipe.toml"
    text = RECIPE.format(
        a=sources[0].path,
        b=sources[1].path,
        run=folder / "run",
        deepspeed=ROOT / "fastbert/recipes/ds_config.json",
    )
    path.write_text(text + phases, encoding="utf-8")
    return path


def train(recipe: Path, *overrides: str, resume: bool = False, branch_from: str | None = None):
    config = load_config(recipe, overrides, branch_from)
    assert pretrain(config, str(recipe), resume).exit_code == 0


def records(run: Path, *events: str | None) -> list[dict[str, Any]]:
    """Return lines of metrics.jsonl without timings: steps (None), or events of these kinds."""
    found = (r for r in read_metrics(run / "metrics.jsonl") if r.get("event") in events)
    return [{k: v for k, v in r.items() if k not in CLOCK} for r in found]


def newest(found: list[dict[str, Any]]) -> dict[tuple[Any, int], dict[str, Any]]:
    """Keep one record of each step and kind; a step that was done again must be the same."""
    kept: dict[tuple[Any, int], dict[str, Any]] = {}
    for record in found:
        key = record.get("event"), record["step"]
        assert kept.setdefault(key, record) == record
    return kept


def refusal(recipe: Path, *overrides: str, **options: Any) -> str:
    before = sorted(recipe.parent.rglob("*"))
    with pytest.raises(InputError) as error:
        pretrain(
            load_config(recipe, overrides, options.pop("branch_from", None)),
            str(recipe),
            options.pop("resume", False),
        )
    assert sorted(recipe.parent.rglob("*")) == before and "\n" not in str(error.value)
    return str(error.value)


# A mixture


def test_losses_are_reported_by_source_and_together(recipe, sources):
    train(recipe)
    run = recipe.parent / "run"
    evaluations = records(run, "evaluate")
    assert [record["step"] for record in evaluations] == [4, 8, 12]
    shares = Batches(sources, load_config(recipe)).timetable.eras[0].quotas
    for record in evaluations:
        assert list(record["sources"]) == ["a", "b"]
        for key in ("loss", "loss_mlm", "loss_nsp", "accuracy_mlm", "loss_mask_token"):
            each = [one[key] for one in record["sources"].values()]
            assert record[key] == pytest.approx(np.average(each, weights=shares), rel=1e-12)
    # The losses of a source are those that a run on it alone would report for the same weights.
    model = load(run, "cpu")
    for name, dataset in zip("ab", sources, strict=True):
        found = evaluate(model, dataset.path).flat()
        assert found["loss"] == pytest.approx(evaluations[-1]["sources"][name]["loss"], rel=1e-5)
    with pytest.raises(InputError, match="trained on a mixture; choose the source"):
        evaluate(model)
    log = (run / "log.txt").read_text()
    assert "MLM loss by source: a " in log
    page = report(run).read_text()
    assert "the first source of the mixture" in page and ">b</" in page
    card = model_card(model, "BertForPreTraining", "mixed")
    assert all(dataset.sha256 in card for dataset in sources)


def test_baselines_are_means_by_the_same_shares(recipe, sources):
    """The log compares the loss with the word frequencies of both sources."""
    train(recipe, "stop.steps=1")
    shares = Batches(sources, load_config(recipe)).timetable.eras[0].quotas
    unigram = np.average([dataset.baselines["unigram"] for dataset in sources], weights=shares)
    log = (recipe.parent / "run/log.txt").read_text()
    assert f"word frequencies ({unigram:.2f})" in log


def test_a_resumed_mixture_is_the_same_to_the_last_digit(recipe, tmp_path):
    train(recipe)
    train(recipe, f"run={tmp_path / 'cut'}", "stop.steps=5")
    train(recipe, f"run={tmp_path / 'cut'}", resume=True)
    whole, cut = (records(tmp_path / name, None) for name in ("run", "cut"))
    assert list(newest(cut).values()) == whole


def test_one_dataset_in_a_list_is_that_dataset(recipe, sources, tmp_path):
    plain = f'data="{sources[0].path}"'
    text = recipe.read_text().replace("weights = [0.7, 0.3]\n", "")
    (tmp_path / "one").mkdir()
    single = tmp_path / "one/recipe.toml"
    single.write_text(text)
    train(single, plain, "stop.steps=3")
    listed = f'data=[{{path = "{sources[0].path}"}}]'
    train(single, listed, "stop.steps=3", f"run={tmp_path / 'listed'}")
    assert records(tmp_path / "run", None) == records(tmp_path / "listed", None)


def test_what_a_resumed_mixture_may_not_change(recipe, sources, tmp_path):
    train(recipe, "stop.steps=4")
    a, b = (str(dataset.path) for dataset in sources)
    assert "weights = (0.5, 0.5), but the checkpoint" in refusal(
        recipe, "weights=[0.5, 0.5]", resume=True
    )
    swapped = f'data=[{{path = "{b}"}}, {{path = "{a}"}}]'
    assert "data 1 = " in (message := refusal(recipe, swapped, resume=True))
    assert "not the dataset that" in message


def test_sources_with_different_tokenizers_are_refused(recipe, sources, small_dataset):
    other = f'data=[{{path = "{sources[0].path}"}}, {{path = "{small_dataset.path}"}}]'
    message = refusal(recipe, other)
    assert str(sources[0].path) in message and str(small_dataset.path) in message
    assert "were made with different tokenizers" in message and "--tokenizer" in message


# Phases


def expected(config: RunConfig, sources: list[TokenDataset], steps: int) -> list[dict[str, int]]:
    batches = Batches(sources, config)
    return [
        {
            "sequences": sum(p.sequences for p in packs),
            "tokens": sum(p.tokens for p in packs),
            "masked": sum(len(p.labels) for p in packs),
        }
        for packs in (batches.step(step) for step in range(steps))
    ]


def test_phases_change_the_run_and_are_reported(sources, tmp_path):
    recipe = write(tmp_path, sources, PHASES)
    train(recipe)
    run = tmp_path / "run"
    steps = records(run, None)
    wanted = expected(load_config(recipe), sources, 12)
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
    assert evaluate(model, sources[0].path, 8).sequences == 8


@pytest.mark.parametrize("world", [1, 2])
def test_a_run_killed_at_the_border_of_a_phase_continues_to_the_last_digit(
    sources, tmp_path, world
):
    """SIGKILL while the checkpoint at the border is written, and once more after it."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
        recipe = write(folder, sources, PHASES)
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


# Branches


def test_a_branch_with_the_same_recipe_is_the_run_itself(sources, tmp_path):
    """Its steps have the same losses as those of the run that went on, to the last digit."""
    recipe = write(tmp_path, sources, PHASES)
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


def test_a_cooldown_branch_is_resumed_and_branched_again(sources, tmp_path):
    """A branch with other weights, its own schedule and one more source."""
    recipe = write(tmp_path, sources)
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


def test_a_branch_uses_no_example_that_its_run_has_used(sources, tmp_path):
    """With the same length, each source goes on where the other run stood, whatever the weights."""
    recipe = write(tmp_path, sources)
    train(recipe, "stop.steps=8")
    train(recipe, "weights=[0.1, 0.9]", f"run={tmp_path / 'other'}",
          branch_from=f"{tmp_path / 'run'}@8")  # fmt: skip
    saved = json.loads((tmp_path / "other/checkpoints/step-00000012/manifest.json").read_text())
    from fastbert.data.phases import Position

    origin = Position.load(saved["metadata"]["origin"])
    before = Batches(sources, load_config(recipe))
    after = Batches(sources, load_config(recipe, ["weights=[0.1, 0.9]"]), origin)
    drawn = [
        {tuple(map(int, pair)) for p in batches.step(step) for pair in zip(
            *source_of(p.examples.numpy()), strict=True)}
        for batches, step in [*((before, i) for i in range(8)), *((after, i) for i in range(8, 12))]
    ]  # fmt: skip
    assert len(set().union(*drawn)) == 12 * 8
    for source, dataset_used in enumerate(after.timetable.epochs(12)):
        count = sum(s == source for s, _ in set().union(*drawn))
        assert dataset_used == count / after.streams.epoch(source, 32)


def test_a_source_may_be_added_by_a_branch(sources, tmp_path):
    recipe = write(tmp_path, sources)
    a, both = f'data="{sources[0].path}"', load_config(recipe).shown_data
    text = recipe.read_text().replace("weights = [0.7, 0.3]\n", "")
    recipe.write_text(text)
    train(recipe, a, "stop.steps=8")
    assert "data has 2 sources" in refusal(recipe, "stop.steps=9", resume=True)
    train(recipe, f"run={tmp_path / 'more'}", branch_from=f"{tmp_path / 'run'}@8")
    (last, *_) = reversed(records(tmp_path / "more", "evaluate"))
    assert list(last["sources"]) == ["a", "b"] and both.count(",") == 1
    swapped = f'data=[{{path = "{sources[1].path}"}}, {{path = "{sources[0].path}"}}]'
    assert "data = " in refusal(
        recipe, swapped, f"run={tmp_path / 'x'}", branch_from=f"{tmp_path / 'run'}@8"
    )


def test_what_a_branch_is_refused(recipe, sources, tmp_path):
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
    # The folder of the branch must be new.
    assert "holds a run with checkpoints" in refusal(recipe, branch_from=at)


def test_a_branch_from_python(sources, tmp_path):
    recipe = write(tmp_path, sources)
    train(recipe, "stop.steps=8")
    result = fastbert.pretrain(
        recipe, run=str(tmp_path / "py"), branch_from=f"{tmp_path / 'run'}@4", stop={"steps": 6}
    )
    assert result.exit_code == 0 and result.metrics["train"]["step"] == 6
    assert math.isfinite(result.metrics["heldout"]["loss"])
