"""Held-out figures, against transformers' own losses on the same examples one at a time."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from tiny_bert import make_hugging_face_folder, make_run
from transformers import BertForPreTraining, BertModel

import fastbert
from fastbert.data.batches import heldout_batches
from fastbert.errors import InputError
from fastbert.tasks.evaluate import evaluate

SEQUENCES = 24


@pytest.fixture(scope="module")
def folder(small_store, tmp_path_factory) -> Path:
    return make_hugging_face_folder(tmp_path_factory.mktemp("hf"), small_store.tokenizer_dir)


@pytest.fixture(scope="module")
def run(small_store, folder, tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("run"), folder, str(small_store.path))


def test_figures_are_those_of_transformers(small_store, folder, run):
    stock = BertForPreTraining.from_pretrained(folder).eval()
    model = fastbert.load(run)
    assert model.recipe is not None
    token_losses, token_hits, shown, pair_losses, pair_hits = [], [], [], [], []
    for batch in heldout_batches(small_store, model.recipe, SEQUENCES):
        for i, (start, end) in enumerate(zip(batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist(), strict=True)):
            ids = batch.input_ids[start:end]
            chosen = (batch.masked_positions >= start) & (batch.masked_positions < end)
            where, labels = batch.masked_positions[chosen] - start, batch.labels[chosen]
            with torch.no_grad():
                found = stock(input_ids=ids[None], token_type_ids=batch.token_type_ids[None, start:end])
            logits, label = found.prediction_logits[0, where], batch.next_sentence_labels[i]
            token_losses += torch.nn.functional.cross_entropy(logits, labels, reduction="none").tolist()
            token_hits += (logits.argmax(-1) == labels).tolist()
            shown += (ids[where] == small_store.special.mask).tolist()
            pair_losses.append(torch.nn.functional.cross_entropy(found.seq_relationship_logits, label[None]).item())
            pair_hits.append(found.seq_relationship_logits.argmax().item() == label.item())

    def mean(values) -> float:
        values = list(values)
        return sum(values) / len(values)

    result = evaluate(model, sequences=SEQUENCES)
    assert result.flat() == {
        "loss": pytest.approx(mean(token_losses) + mean(pair_losses), rel=1e-5),
        "loss_mlm": pytest.approx(mean(token_losses), rel=1e-5),
        "accuracy_mlm": pytest.approx(mean(token_hits)),
        "loss_mask_token": pytest.approx(mean(x for x, s in zip(token_losses, shown, strict=True) if s), rel=1e-5),
        "accuracy_mask_token": pytest.approx(mean(x for x, s in zip(token_hits, shown, strict=True) if s)),
        "loss_nsp": pytest.approx(mean(pair_losses), rel=1e-4),
        "accuracy_nsp": pytest.approx(mean(pair_hits)),
        "perplexity": pytest.approx(math.exp(mean(token_losses)), rel=1e-4),
        "sequences": SEQUENCES,
        "tokens": sum(batch.tokens for batch in heldout_batches(small_store, model.recipe, SEQUENCES)),
        "masked": len(token_losses),
        "yardsticks": small_store.yardsticks,
    }
    assert 0.7 < mean(shown) < 0.9


def test_a_folder_and_another_store_with_the_same_tokenizer(small_store, folder, run):
    of_run, of_folder = (
        evaluate(fastbert.load(run), small_store.path, SEQUENCES),
        evaluate(fastbert.load(folder), small_store.path, SEQUENCES),
    )
    # The folder has no recipe: the default's max_length is cut to the model's 32 positions, which is the run's.
    assert of_folder == of_run


def test_without_pairs_there_are_no_pair_figures(small_store, folder, tmp_path):
    found = evaluate(fastbert.load(make_run(tmp_path, folder, str(small_store.path), kind="mlm")), sequences=SEQUENCES)
    assert found.heldout.loss_nsp is None and found.heldout.accuracy_nsp is None
    assert found.heldout.loss == found.heldout.loss_mlm


def test_an_endless_perplexity_is_no_crash(small_store, run):
    model = fastbert.load(run)
    with torch.no_grad():
        model.model.embeddings.words.mul_(1e4)
    assert evaluate(model, sequences=4).perplexity == math.inf


def test_what_cannot_be_evaluated(small_store, folder, run, tmp_path):
    with pytest.raises(InputError, match="not a run, so it names no store; give one with --data"):
        evaluate(fastbert.load(folder))
    with pytest.raises(InputError, match="gone: no such store"):
        evaluate(fastbert.load(make_run(tmp_path / "run", folder, str(tmp_path / "gone"))))
    BertModel.from_pretrained(folder).save_pretrained(tmp_path / "encoder")
    (tmp_path / "encoder/vocab.txt").write_bytes((folder / "vocab.txt").read_bytes())
    with pytest.raises(InputError, match="no weights of an MLM head"):
        evaluate(fastbert.load(tmp_path / "encoder"), small_store.path)


def test_a_store_of_another_tokenizer(small_store, run, tmp_path):
    other = make_hugging_face_folder(tmp_path / "other")
    with pytest.raises(InputError, match=r"made with another tokenizer \(1,000 tokens\).*\(400\); prepare the text with --tokenizer"):
        evaluate(fastbert.load(other), small_store.path)
    # The same tokens, but capital letters kept: other ids from the same text.
    cased = make_hugging_face_folder(tmp_path / "cased", small_store.tokenizer_dir)
    settings = json.loads((cased / "tokenizer.json").read_text())
    settings["normalizer"]["lowercase"] = False
    (cased / "tokenizer.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match="made with another tokenizer"):
        evaluate(fastbert.load(cased), small_store.path)
