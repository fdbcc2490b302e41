"""A model reads no more tokens than it was trained on, however many positions it has."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import fastbert
from fastbert.errors import InputError
from fastbert.recipe import load_config
from fastbert.tasks.export import export
from fastbert.tasks.finetune import LengthWarning, Settings, finetune
from fastbert.tasks.pretrained import TextCutWarning
from fastbert.training.loop import pretrain
from tests.trials import RECIPE

POSITIONS, TRAINED = 64, 24
TEXT = "a name is bound to an object and " * 10


def train(folder: Path, dataset: Path, *overrides: str) -> Path:
    """Train one step with a max_length below the number of positions."""
    folder.mkdir(exist_ok=True)
    (folder / "ds.json").write_text("{}")
    text = RECIPE.format(
        dataset=dataset, run=folder / "run", steps=1, deepspeed=folder / "ds.json", timeout_s=15
    )
    (folder / "recipe.toml").write_text(text)
    settings = (f"batch.max_length={TRAINED}", "evaluate.every=100", *overrides)
    config = load_config(folder / "recipe.toml", settings)
    assert pretrain(config, "recipe.toml", resume="stop.steps=2" in overrides).exit_code == 0
    return folder / "run"


@pytest.fixture(scope="module")
def run(small_dataset, tmp_path_factory) -> Path:
    return train(tmp_path_factory.mktemp("trained") / "first", small_dataset.path)


def test_texts_are_cut_where_the_training_ended(run):
    model = fastbert.load(run)
    assert model.config.max_position_embeddings == POSITIONS and model.max_length == TRAINED
    with pytest.warns(TextCutWarning, match="longer than the 22 tokens"):
        (cut,) = model.hidden_states([TEXT])
    assert cut[-1].shape == (TRAINED, 32)
    with pytest.raises(InputError, match="the model takes 22"):
        model.fill_mask(f"{TEXT} [MASK]")
    with pytest.warns(TextCutWarning, match="21 tokens"):
        model.next_sentence(TEXT, TEXT)


def test_the_run_says_so_at_its_start(run):
    (line,) = [line for line in (run / "log.txt").read_text().splitlines() if "untrained" in line]
    assert f"batch.max_length = {TRAINED}" in line and str(POSITIONS) in line


def test_an_export_says_so_and_is_read_so(run, tmp_path):
    export(fastbert.load(run, "cpu"), tmp_path / "out")
    settings = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert settings["model_max_length"] == TRAINED
    assert fastbert.load(tmp_path / "out").max_length == TRAINED


def test_fine_tuning_beyond_it_is_a_choice_that_is_warned_of(run, tmp_path, recwarn):
    rows = "".join(f"{word} {TEXT},{word}\n" for word in ("good", "bad") for _ in range(4))
    (tmp_path / "a.csv").write_text("text,label\n" + rows)
    files = tmp_path / "a.csv", tmp_path / "a.csv"

    def lengths(max_length: int | None, out: str) -> tuple[list[str], int]:
        recwarn.clear()
        settings = Settings(epochs=1, max_length=max_length)
        finetune(fastbert.load(run), *files, tmp_path / out, settings)
        found = [w for w in recwarn if w.category is LengthWarning]
        assert {w.filename for w in found} <= {__file__}
        said = [str(w.message) for w in found]
        config = json.loads((tmp_path / out / "tokenizer_config.json").read_text())
        return said, config["model_max_length"]

    said, length = lengths(None, "as trained")
    assert length == TRAINED and not any("untrained" in line for line in said)
    said, length = lengths(POSITIONS, "longer")
    assert length == POSITIONS and any("trained on 24 tokens" in line for line in said)


def test_a_run_that_starts_from_a_model_keeps_what_that_was_trained_on(
    run, small_dataset, tmp_path
):
    """This also holds when the run is resumed."""
    longer = train(tmp_path / "longer", small_dataset.path, "batch.max_length=48")
    sizes = ("model.preset=mini", "model.hidden_size=32", "model.num_hidden_layers=1")
    sizes += ("model.num_attention_heads=2", "model.intermediate_size=48")
    again = train(tmp_path / "again", small_dataset.path, f'init="{longer}"', *sizes)
    assert fastbert.load(again).max_length == 48
    shorter = train(tmp_path / "shorter", small_dataset.path, f'init="{run}"', *sizes)
    assert fastbert.load(shorter).max_length == TRAINED
    overrides = (f'init="{longer}"', *sizes, "stop.steps=2")
    assert train(tmp_path / "again", small_dataset.path, *overrides) == again
    resumed = fastbert.load(again)
    assert resumed.metadata["step"] == 2 and resumed.max_length == 48


def test_a_tokenizer_in_another_order_is_refused(run, tmp_path):
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    assert fastbert.load(copy).max_length == TRAINED
    file = copy / "tokenizer/tokenizer.json"
    values = json.loads(file.read_text())
    vocabulary = values["model"]["vocab"]
    a, b = list(vocabulary)[100:102]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    file.write_text(json.dumps(values))
    with pytest.raises(InputError, match=r"not the tokenizer that .* was trained with"):
        fastbert.load(copy)
    file.unlink()  # vocab.txt has the same content as the run's file
    assert fastbert.load(copy).encode(["a list"]).shape == (1, 32)
