"""Checkpoints and folders with correct hashes and wrong content get one clear line."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from tiny_bert import RECIPE, make_hugging_face_folder

import fastbert
from fastbert.checkpoints import checkpoint
from fastbert.checkpoints.weight_names import shapes
from fastbert.data.dataset import TokenDataset
from fastbert.errors import InputError
from fastbert.recipe import dump_config, parse_config
from fastbert.training.start import Start, open_run
from fastbert.training.train_state import TrainState
from tests import one_process

STEP = 7
PROGRESS = dataclasses.asdict(TrainState(step=STEP, tokens=100, seconds=2.5, heldout_loss=6.5))


class Forger:
    """Write a run with one checkpoint, and open it as `pretrain --resume` does."""

    def __init__(self, run: Path, dataset: TokenDataset):
        self.run, self.dataset = run, dataset
        text = f'run = "{run}"\n' + RECIPE.format(data=dataset.path, kind="mlm+nsp")
        self.config = parse_config(text, "recipe")
        self.metadata: dict[str, Any] = {
            "recipe": dump_config(self.config),
            "dataset_sha256": dataset.sha256,
            "vocab_size": dataset.vocab_size,
            "progress": PROGRESS,
        }
        self.tensors = {
            f"{slot}/{name}": torch.full(shape, 0.01)
            for slot in ("weight", "exp_avg", "exp_avg_sq")
            for name, shape in shapes(self.config.model, dataset.vocab_size).items()
        }

    def write(self) -> None:
        shutil.rmtree(self.run / "checkpoints", ignore_errors=True)
        one_process.save(self.run / "checkpoints", STEP, self.tensors.items(), self.metadata, 3)
        shutil.copytree(self.dataset.tokenizer_dir, self.run / "tokenizer", dirs_exist_ok=True)

    def resume(self) -> Start:
        return open_run(self.config, "recipe", [self.dataset], resume=True)

    def refused(self, words: str) -> None:
        self.write()
        with pytest.raises(InputError, match=words) as error:
            self.resume()
        assert "\n" not in str(error.value) and str(self.run) in str(error.value)


@pytest.fixture
def forger(tmp_path, small_dataset) -> Forger:
    return Forger(tmp_path / "run", small_dataset)


def test_one_that_is_right_is_taken(forger):
    forger.write()
    found = forger.resume().checkpoint
    assert found is not None and found.step == STEP
    assert fastbert.load(forger.run).metadata["step"] == STEP


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("recipe", None, "no recipe"),
        ("recipe", 3, "no recipe"),
        ("recipe", "data = 3", "data = 3; must be a string"),
        ("recipe", "[", "not valid TOML"),
        ("progress", None, "no counters"),
        ("progress", [1], "no counters"),
        ("progress", {}, "no counters"),
        ("progress", {**PROGRESS, "step": "7"}, "progress.step = '7'"),
        ("progress", {**PROGRESS, "step": True}, "progress.step = True"),
        ("progress", {**PROGRESS, "step": -1}, "progress.step = -1"),
        ("progress", {**PROGRESS, "tokens": 1.5}, "progress.tokens = 1.5"),
        ("progress", {**PROGRESS, "tokens": 10**400}, "progress.tokens = 1000"),
        ("progress", {**PROGRESS, "seconds": math.inf}, "progress.seconds = inf"),
        ("progress", {**PROGRESS, "seconds": math.nan}, "progress.seconds = nan"),
        ("progress", {**PROGRESS, "best_loss": "a"}, "progress.best_loss = 'a'"),
        ("progress", {**PROGRESS, "skipped": 8}, "more steps are skipped"),
        ("dataset_sha256", None, "not the dataset"),
    ],
)
def test_metadata_that_is_none(forger, key, value, words):
    forger.metadata[key] = value
    forger.refused(words)
    del forger.metadata[key]
    forger.refused(r"metadata|not the dataset")


def test_a_key_of_a_later_release_is_left_out(forger):
    forger.metadata["progress"] = {**PROGRESS, "a_later_key": [1]}
    forger.write()
    forger.resume()
    assert TrainState.read(forger.metadata["progress"], "x") == TrainState(**PROGRESS)
    assert TrainState.read({"step": 3}, "x") == TrainState(step=3)


@pytest.mark.parametrize("slot", ["weight", "exp_avg", "exp_avg_sq"])
def test_tensors_that_are_missing_or_misshapen(forger, slot):
    name = f"{slot}/layers.1.attention.qkv_bias"
    right = forger.tensors.pop(name)
    forger.refused(f"{name} is missing")
    forger.tensors[name] = right[:-1]
    forger.refused(f"{name} is missing or does not have the shape")
    forger.tensors[name] = right
    forger.tensors[f"{slot}/layers.2.attention.qkv_bias"] = right
    forger.refused(r"layers.2.attention.qkv_bias")
    forger.tensors = {k: v for k, v in forger.tensors.items() if not k.startswith(f"{slot}/")}
    forger.refused(f"{slot}/|only 0 weights")


@pytest.mark.parametrize("content", [b"", b"rubbish", save({"other": torch.zeros(2)})])
def test_a_file_that_is_none_of_ours(forger, content):
    """The file has the hash and the size of the manifest."""
    forger.write()
    (folder,) = (forger.run / "checkpoints").iterdir()
    (file,) = folder.glob("*.safetensors")
    file.write_bytes(content)
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["sha256"]
    entry = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest["files"] = {file.name: entry}
    (folder / "manifest.json").write_bytes(checkpoint.manifest_bytes(manifest))
    for opening in (forger.resume, lambda: fastbert.load(forger.run)):
        with pytest.raises(InputError, match=r"cannot be read as safetensors|only 0 weights"):
            opening()


def test_a_number_of_layers_that_no_file_has_takes_no_memory(forger, tmp_path):
    model = dataclasses.replace(forger.config.model, num_hidden_layers=10**9)
    forger.config = dataclasses.replace(forger.config, model=model)
    forger.metadata["recipe"] = dump_config(forger.config)
    forger.refused("num_hidden_layers = 1,000,000,000, but there are only")
    with pytest.raises(InputError, match="num_hidden_layers = 1,000,000,000"):
        fastbert.load(forger.run)
    folder = make_hugging_face_folder(tmp_path / "hf", forger.dataset.tokenizer_dir)
    edit(folder, num_hidden_layers=10**9)
    with pytest.raises(InputError, match="num_hidden_layers = 1,000,000,000"):
        fastbert.load(folder)


def edit(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_dropout_prob", 5),
        ("hidden_dropout_prob", math.nan),
        ("attention_probs_dropout_prob", 1.0),
        ("attention_probs_dropout_prob", -0.1),
        ("layer_norm_eps", math.nan),
        ("layer_norm_eps", math.inf),
        ("layer_norm_eps", 7.0),
        ("initializer_range", 10**400),
        ("initializer_range", "0.02"),
    ],
)
def test_a_config_with_a_number_out_of_range(small_dataset, tmp_path, key, value):
    folder = make_hugging_face_folder(tmp_path / "hf", small_dataset.tokenizer_dir)
    fastbert.load(folder)
    edit(folder, **{key: value})
    with pytest.raises(InputError, match=rf"config.json: {key} = .*; must be a number, 0 or more"):
        fastbert.load(folder)
