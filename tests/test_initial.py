"""`init = "folder"`: pre-training that starts from an existing model."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_bert import TEXTS, make_hugging_face_folder
from transformers import BertConfig, BertModel

import fastbert
from fastbert.data.tokenizer import load_tokenizer, save_tokenizer
from fastbert.errors import InputError
from fastbert.recipe import load_config
from fastbert.training.loop import pretrain

ROOT = Path(__file__).parents[1]
RECIPE = """
data = "{dataset}"
run = "{run}"
init = "{init}"
[batch]
sequences = 8
max_length = 32
micro_batch_tokens = 200
[optimizer]
lr = 1e-12
weight_decay = 0
[schedule]
warmup = 0
decay = "constant"
[stop]
steps = 1
[evaluate]
every = 4
sequences = 8
[runtime]
precision = "fp32"
deepspeed = "{deepspeed}"
"""


@pytest.fixture(scope="module")
def original(small_dataset, tmp_path_factory) -> Path:
    return make_hugging_face_folder(tmp_path_factory.mktemp("hf"), small_dataset.tokenizer_dir)


@pytest.fixture
def folder(original, tmp_path) -> Path:
    """A copy of the model folder that a test may change."""
    return shutil.copytree(original, tmp_path / "hf")


@pytest.fixture
def recipe(tmp_path, small_dataset, folder) -> Path:
    path = tmp_path / "recipe.toml"
    deepspeed = ROOT / "fastbert/recipes/ds_config.json"
    path.write_text(
        RECIPE.format(
            dataset=small_dataset.path, run=tmp_path / "run", init=folder, deepspeed=deepspeed
        ),
        encoding="utf-8",
    )
    return path


def train(recipe: Path, *overrides: str, resume: bool = False) -> int:
    return pretrain(load_config(recipe, overrides), str(recipe), resume).exit_code


def refusal(recipe: Path, *overrides: str) -> str:
    with pytest.raises(InputError) as error:
        train(recipe, *overrides)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_training_begins_with_its_weights_and_its_sizes(recipe, folder, tmp_path):
    """The learning rate is so small that a step changes nothing."""
    assert train(recipe) == 0
    before, after = fastbert.load(folder), fastbert.load(tmp_path / "run")
    assert after.config.hidden_size == 32 and after.config.max_position_embeddings == 32
    for name, tensor in before.model.state_dict().items():
        torch.testing.assert_close(
            after.model.state_dict()[name], tensor, rtol=0, atol=1e-6, msg=name
        )
    np.testing.assert_allclose(after.encode(TEXTS), before.encode(TEXTS), rtol=0, atol=1e-5)


def test_it_resumes_when_the_folder_is_gone(recipe, folder, tmp_path):
    assert train(recipe) == 0
    shutil.rmtree(folder)
    assert train(recipe, "stop.steps=2", resume=True) == 0
    assert fastbert.load(tmp_path / "run").metadata["step"] == 2
    assert "no such folder" in refusal(recipe, f"run={tmp_path / 'other'}")


def test_a_run_of_ours_is_a_start_too(recipe, tmp_path):
    assert train(recipe) == 0
    assert train(recipe, f"init={tmp_path / 'run'}", f"run={tmp_path / 'second'}") == 0
    first, second = (fastbert.load(tmp_path / name).encode(TEXTS) for name in ("run", "second"))
    np.testing.assert_allclose(second, first, rtol=0, atol=1e-5)


def test_heads_that_are_missing_begin_anew(recipe, folder, original, tmp_path):
    """The folder is an encoder without heads, padded to a size that suits the processor."""
    encoder = BertModel.from_pretrained(original, add_pooling_layer=False)
    encoder.resize_token_embeddings(1024)
    encoder.save_pretrained(folder)
    assert train(recipe) == 0
    before, after = fastbert.load(folder), fastbert.load(tmp_path / "run")
    assert after.model.vocab_size == 1000 and after.heads == {"mlm", "nsp"}
    np.testing.assert_allclose(after.encode(TEXTS), before.encode(TEXTS), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (
            "model.num_hidden_layers=4",
            ["recipe.toml: model.num_hidden_layers = 4", "init = ", "has 2", "leave it out"],
        ),
        ("model.preset=mini", ["model.hidden_size = 256", "has 32"]),
        # Values that equal BERT's defaults are given too.
        ("model.preset=base", ["model.hidden_size = 768", "has 32"]),
        ("model.hidden_size=768", ["model.hidden_size = 768", "has 32"]),
        ("model.max_position_embeddings=512", ["model.max_position_embeddings = 512", "has 32"]),
        ("model.num_hidden_layers=12", ["model.num_hidden_layers = 12", "has 2"]),
        ("model.initial_attention=adjacent", ["model.initial_attention", "choose one"]),
        ("batch.max_length=128", ["batch.max_length = 128", "max_position_embeddings = 32"]),
        ("init=nowhere", ["nowhere: no such folder"]),
    ],
)
def test_what_contradicts_it_is_one_line(recipe, override, words):
    message = refusal(
        recipe, override, *(["batch.micro_batch_tokens=512"] if "max_length" in override else [])
    )
    assert all(word in message for word in words), message


def test_other_tokens_are_refused(recipe, folder, tmp_path):
    words = list(load_tokenizer(folder).get_vocab())
    (tmp_path / "vocab.txt").write_text(
        "\n".join(["[PAD]", *(w for w in words if w != "[PAD]")]) + "\n", encoding="utf-8"
    )
    (folder / "tokenizer.json").unlink()
    save_tokenizer(load_tokenizer(tmp_path / "vocab.txt"), folder)
    message = refusal(recipe)
    assert "tokens that are not those of" in message and f"--tokenizer {folder}" in message


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "name",
    [
        "bert.embeddings.word_embeddings.weight",
        "bert.encoder.layer.1.attention.self.key.weight",  # one of three that are one of ours
        "bert.encoder.layer.0.output.LayerNorm.bias",
        "cls.predictions.bias",
        "cls.seq_relationship.weight",
    ],
)
def test_weights_that_are_not_finite_are_refused(recipe, folder, tmp_path, name, bad):
    """One such number is enough: every step from these weights would be skipped.

    The message names the weight as the folder does.
    """
    weights = load_file(folder / "model.safetensors")
    weights[name].view(-1)[7 % weights[name].numel()] = bad
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    message = refusal(recipe)
    assert f"{folder / 'model.safetensors'}: {name} holds numbers that are not finite" in message
    assert not (tmp_path / "run").exists()


def test_numbers_beyond_single_precision_are_not_finite(recipe, folder):
    weights = load_file(folder / "model.safetensors")
    name = "bert.pooler.dense.bias"
    weights[name] = weights[name].double() + 1e300
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert f"{name} holds numbers that are not finite" in refusal(recipe)


def test_a_decoder_of_its_own_is_refused(recipe, folder):
    from transformers import BertForPreTraining

    model = BertForPreTraining.from_pretrained(
        folder, config=BertConfig.from_pretrained(folder, tie_word_embeddings=False)
    )
    torch.nn.init.normal_(model.cls.predictions.decoder.weight)
    model.save_pretrained(folder)
    assert "decoder is not tied" in refusal(recipe)
