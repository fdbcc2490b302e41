"""What people do with a ModernBERT: fine-tune it, train it further, evaluate it."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import fastbert
from fastbert.cli import run as run_inside
from fastbert.data.tokenizer import load_tokenizer
from fastbert.errors import InputError
from fastbert.recipe import load_config
from fastbert.tasks.evaluate import evaluate
from fastbert.tasks.finetune import LengthWarning, Settings, Spread, finetune
from fastbert.training.loop import pretrain
from tests.modern_bert import CONFIGS, SMALL
from tests.test_finetune import files
from tests.test_initial import RECIPE, ROOT
from tests.test_modernbert_folder import make_folder
from tests.tiny_bert import TEXTS

__all__ = ["files"]  # a fixture


@pytest.fixture(scope="module")
def folder(tmp_path_factory, small_dataset) -> Path:
    tokenizer = load_tokenizer(small_dataset.tokenizer_dir)
    return make_folder(tmp_path_factory.mktemp("hf") / "model", SMALL, tokenizer)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_fine_tuning_learns_and_transformers_agrees(files, tmp_path, small_dataset, pooling):
    tokenizer = load_tokenizer(small_dataset.tokenizer_dir)
    config = dataclasses.replace(CONFIGS["biases"], classifier_pooling=pooling)
    folder = make_folder(tmp_path / "model", config, tokenizer)
    settings = Settings(epochs=12, lr=3e-3, batch=8, layer_decay=0.9)
    result = finetune(fastbert.load(folder), *files, tmp_path / "out", settings)
    assert result.scores["accuracy"] == Spread(1.0, 0.0)
    model, report = transformers.ModernBertForSequenceClassification.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(report.values()), report
    assert model.config.classifier_pooling == pooling
    classify = transformers.pipeline("text-classification", str(tmp_path / "out"))
    text, expected = "the name is not the same as the list", "no"
    assert classify(text)[0]["label"] == expected
    # The result is a ModernBERT again, without an MLM head.
    again = fastbert.load(tmp_path / "out")
    assert again.heads == frozenset()
    stock = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        states = model.model(**stock(text, return_tensors="pt")).last_hidden_state[0]
    np.testing.assert_allclose(again.hidden_states([text])[0][-1], states, rtol=1e-4, atol=1e-4)


def test_fine_tuning_names_the_class_of_transformers(files, tmp_path, folder, capsys):
    data = ["--train", str(files[0]), "--eval", str(files[1])]
    out = tmp_path / "out"
    assert run_inside(["finetune", str(folder), *data, "--epochs", "1", "--out", str(out)]) == 0
    (name,) = json.loads((out / "config.json").read_text())["architectures"]
    assert name == "ModernBertForSequenceClassification"
    assert f"out: {name}, confusion.png" in capsys.readouterr().out.replace("\n", "")


def test_a_longer_context_than_trained_is_warned_about(files, tmp_path, folder):
    """As for BERT: the tokenizer of the folder names the longest text that it is for."""
    short = shutil.copytree(folder, tmp_path / "short")
    file = short / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": 32}))
    model = fastbert.load(short)
    assert model.max_length == 32 and model.config.max_position_embeddings == 96
    with pytest.warns(LengthWarning, match="trained on 32 tokens at most"):
        finetune(model, *files, None, Settings(epochs=1, max_length=64))
    with pytest.raises(InputError, match="the model's 96 positions"):
        finetune(model, *files, None, Settings(epochs=1, max_length=97))
    with pytest.warns(UserWarning, match="longer than the 30 tokens"):
        model.encode("word " * 50)


@pytest.fixture
def recipe(tmp_path, small_dataset, folder) -> Path:
    path = tmp_path / "recipe.toml"
    deepspeed = ROOT / "fastbert/recipes/ds_config.json"
    text = RECIPE.format(
        dataset=small_dataset.path, run=tmp_path / "run", init=folder, deepspeed=deepspeed
    )
    path.write_text(text + '[model]\ntype = "modernbert"\n', encoding="utf-8")
    return path


def train(recipe: Path, *overrides: str) -> int:
    return pretrain(load_config(recipe, overrides), str(recipe), False).exit_code


def test_training_begins_with_its_weights_and_its_sizes(recipe, folder, tmp_path, small_dataset):
    """The learning rate is so small that a step changes nothing."""
    assert train(recipe) == 0
    before, after = fastbert.load(folder), fastbert.load(tmp_path / "run")
    assert after.config == before.config
    assert (before.max_length, after.max_length) == (96, 96)
    np.testing.assert_allclose(after.encode(TEXTS), before.encode(TEXTS), rtol=0, atol=1e-5)
    found, expected = evaluate(after), evaluate(before, small_dataset.path, sequences=8)
    assert found.pairs is None and expected.pairs is None
    with pytest.raises(InputError, match="not trained on next sentences"):
        after.next_sentence("a", "b")


def test_positions_may_change_and_sizes_may_not(recipe, folder, tmp_path):
    longer = ("model.max_position_embeddings=200", "model.global_rope_theta=1e6")
    assert train(recipe, *longer) == 0
    after = fastbert.load(tmp_path / "run").config
    assert (after.max_position_embeddings, after.global_rope_theta) == (200, 1e6)
    assert after.local_attention == SMALL.local_attention
    for override, words in (
        ("model.local_attention=32", "model.local_attention = 32, but init"),
        ("model.norm_bias=true", "model.norm_bias = True, but init"),
        ("model.type=bert", 'model.type = "bert", but init .* has "modernbert"; set model.type'),
        ("objective.kind=mlm+nsp", "no token types to tell the sentences of a pair apart"),
    ):
        with pytest.raises(InputError, match=words):
            train(recipe, override, f"run={tmp_path / 'other'}")


def test_fewer_positions_than_it_was_trained_on(recipe, tmp_path):
    """Its checkpoints can be loaded, and are resumed from."""
    shorter = ("model.max_position_embeddings=32", "batch.max_length=32")
    assert train(recipe, *shorter) == 0
    assert fastbert.load(tmp_path / "run").max_length == 32
    again = load_config(recipe, (*shorter, "stop.steps=2"))
    assert pretrain(again, str(recipe), True).exit_code == 0


def test_added_tokens_without_embeddings_are_one_clear_line(recipe, folder, tmp_path):
    """As after `tokenizer.add_tokens` in transformers, without `resize_token_embeddings`."""
    more = shutil.copytree(folder, tmp_path / "more")
    tokenizer = transformers.AutoTokenizer.from_pretrained(more)
    tokenizer.add_tokens(["a new word"])
    tokenizer.save_pretrained(more)
    words = rf"{len(tokenizer):,} tokens for {len(tokenizer) - 1:,} embeddings; .*resize"
    with pytest.raises(InputError, match=words):
        train(recipe, f"init={more}")
    with pytest.raises(InputError, match=words):
        fastbert.load(more)


def test_a_decoder_of_its_own_is_trained_further(recipe, tmp_path, small_dataset):
    tokenizer = load_tokenizer(small_dataset.tokenizer_dir)
    untied = make_folder(tmp_path / "untied", CONFIGS["untied"], tokenizer)
    assert train(recipe, f"init={untied}") == 0
    before, after = fastbert.load(untied), fastbert.load(tmp_path / "run")
    name = "mlm_head.decoder"
    torch.testing.assert_close(after.model.state_dict()[name], before.model.state_dict()[name])
