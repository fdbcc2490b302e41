"""The exported folder loads in transformers, and a wrong one is never left behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_bert import TEXTS, make_hugging_face_folder, make_run
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoTokenizer,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    ModernBertForSequenceClassification,
)

import fastbert
from fastbert.checkpoints.sentence_folder import VectorSettings, write_vector_settings
from fastbert.data.tokenizer import load_tokenizer
from fastbert.errors import InputError
from fastbert.tasks import export as export_file
from fastbert.tasks.export import ExportError, export, model_card
from tests.modern_bert import SMALL
from tests.test_modernbert_folder import make_folder

FILES = [
    "README.md",
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
]


@pytest.fixture(scope="module")
def original(small_dataset, tmp_path_factory) -> Path:
    return make_hugging_face_folder(tmp_path_factory.mktemp("hf"), small_dataset.tokenizer_dir)


@pytest.fixture(scope="module")
def run(small_dataset, original, tmp_path_factory) -> Path:
    folder = make_run(tmp_path_factory.mktemp("run"), original, str(small_dataset.path))
    records = [
        {"event": "evaluate", "step": 5, "loss": 9.5, "loss_mlm": 9.0},
        {"event": "evaluate", "step": 7, "loss": 7.25, "loss_mlm": 6.5, "loss_nsp": None},
        {"event": "evaluate", "step": 9, "loss": 3.0, "loss_mlm": 2.5},  # after the checkpoint
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "deep" / "folder"
    return export(fastbert.load(run), out), out


def test_the_folder_is_whole_and_checked_on_held_out_text(exported):
    result, out = exported
    assert sorted(p.name for p in out.iterdir()) == FILES
    # All files have the same permissions.
    assert len({p.stat().st_mode for p in out.iterdir()}) == 1
    assert list(out.parent.iterdir()) == [out]
    assert result.architecture == "BertForPreTraining" and result.out == str(out)
    # 8 pairs of sentences of about 20 tokens, with 1,000 logits each, are more than the built-in
    # sentences have.
    assert 0 < result.difference < 5e-5 and result.compared > 100_000
    assert 0 < result.hidden_difference < 1e-5


def test_stock_transformers_gives_our_logits_on_padded_text(exported, run):
    _, out = exported
    model, report = AutoModelForPreTraining.from_pretrained(out, output_loading_info=True)
    assert not any(report.values()), report
    inputs = AutoTokenizer.from_pretrained(out)(TEXTS, return_tensors="pt", padding=True)
    with torch.no_grad():
        theirs = model.eval()(**inputs)
    ours = fastbert.load(run)
    for i, states in enumerate(ours.hidden_states(TEXTS)):
        last = torch.from_numpy(states[-1])
        torch.testing.assert_close(
            ours.model.token_logits(last),
            theirs.prediction_logits[i, : len(last)],
            rtol=0,
            atol=1e-4,
        )
        torch.testing.assert_close(
            ours.model.pair_logits(last[:1])[0],
            theirs.seq_relationship_logits[i],
            rtol=0,
            atol=1e-4,
        )


def test_weights_are_those_that_transformers_saved_first(exported, original):
    ours, theirs = (
        load_file(exported[1] / "model.safetensors"),
        load_file(original / "model.safetensors"),
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_config_is_that_of_transformers(exported, original):
    ours, theirs = (
        AutoModelForPreTraining.from_pretrained(path).config.to_dict()
        for path in (exported[1], original)
    )
    for key in (
        "_name_or_path",
        "transformers_version",
        "initializer_range",
    ):  # the run's recipe sets its own initializer_range
        ours[key] = theirs[key]
    assert ours == theirs


def test_the_tokenizer_cuts_at_the_models_positions(exported, small_dataset):
    tokenizer = AutoTokenizer.from_pretrained(exported[1])
    assert len(tokenizer("names " * 99, truncation=True)["input_ids"]) == 32
    assert tokenizer("a", "b")["token_type_ids"] == [0, 0, 0, 1, 1]


def test_sentence_transformers_loads_it(exported, run):
    from sentence_transformers import SentenceTransformer

    theirs = SentenceTransformer(str(exported[1]), device="cpu").encode(TEXTS)
    np.testing.assert_allclose(fastbert.load(run).encode(TEXTS), theirs, rtol=0, atol=2e-5)


def test_exporting_the_export_changes_nothing(exported, tmp_path):
    export(
        fastbert.load(exported[1]),
        tmp_path / "again",
        ["One sentence.", "Another, longer than the first."],
    )
    for name in FILES:
        if name != "README.md":
            assert (tmp_path / "again" / name).read_bytes() == (exported[1] / name).read_bytes(), (
                name
            )


def test_a_run_without_pairs_becomes_a_masked_lm(original, tmp_path):
    # Its dataset is gone: the check reads built-in sentences.
    run = make_run(tmp_path / "run", original, kind="mlm")
    assert export(fastbert.load(run), tmp_path / "out").architecture == "BertForMaskedLM"
    _, report = AutoModelForMaskedLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values()), report
    assert fastbert.load(tmp_path / "out").heads == {"mlm"}


def test_without_heads_nobody_complains(run, tmp_path, caplog):
    """transformers reports the heads as unexpected where the class in use has no place for them."""
    from sentence_transformers import SentenceTransformer

    found = export(fastbert.load(run), tmp_path / "encoder", encoder=True)
    assert (
        found.architecture == "BertModel"
        and 0 < found.hidden_difference < 1e-5
        and found.difference < 1e-5
    )
    caplog.clear()
    model, sentences = (
        AutoModel.from_pretrained(tmp_path / "encoder"),
        SentenceTransformer(str(tmp_path / "encoder"), device="cpu"),
    )
    assert "LOAD REPORT" not in caplog.text and isinstance(model, BertModel)
    np.testing.assert_allclose(
        sentences.encode(TEXTS), fastbert.load(run).encode(TEXTS), rtol=0, atol=1e-5
    )
    assert fastbert.load(tmp_path / "encoder").heads == frozenset()
    AutoModel.from_pretrained(export(fastbert.load(run), tmp_path / "whole").out)
    assert "LOAD REPORT" in caplog.text


@pytest.mark.parametrize(("pool", "normalize"), [("cls", True), ("max", False)])
def test_the_vectors_of_a_sentence_transformers_folder_stay(original, tmp_path, pool, normalize):
    """Without modules.json, SentenceTransformer would take means, without a word."""
    from sentence_transformers import SentenceTransformer

    given = tmp_path / "given"
    shutil.copytree(original, given)
    write_vector_settings(given, VectorSettings(pool, normalize), 32, 20)
    model = fastbert.load(given)
    assert (model.vectors, model.max_length) == (VectorSettings(pool, normalize), 20)
    out = export(model, tmp_path / "out", TEXTS).out
    vectors = model.encode(TEXTS)
    assert not np.allclose(vectors, model.encode(TEXTS, "mean", normalize=False), atol=0.01)
    for folder in (given, out):
        theirs = SentenceTransformer(str(folder), device="cpu")
        np.testing.assert_allclose(theirs.encode(TEXTS), vectors, rtol=0, atol=1e-5)
    (given / "1_Pooling/config.json").write_text('{"pooling_mode": "weightedmean"}')
    with pytest.warns(UserWarning, match="pooling by weightedmean cannot be exported: Sentence"):
        export(fastbert.load(given), tmp_path / "again", TEXTS)


def test_the_side_that_the_tokenizer_cuts_stays(original, tmp_path):
    given = shutil.copytree(original, tmp_path / "given")
    file = given / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "truncation_side": "left"}))
    out = export(fastbert.load(given), tmp_path / "out", TEXTS).out
    assert AutoTokenizer.from_pretrained(out).truncation_side == "left"
    assert fastbert.load(out).vectors.keeps_end and not fastbert.load(original).vectors.keeps_end


def test_an_encoder_needs_a_pooler(original, tmp_path):
    with pytest.raises(InputError, match="trained without pairs, so it has no pooler"):
        export(
            fastbert.load(make_run(tmp_path / "run", original, kind="mlm")),
            tmp_path / "out",
            encoder=True,
        )


@pytest.mark.parametrize("theirs", [BertForSequenceClassification, BertModel])
def test_what_has_no_mlm_head_becomes_an_encoder(original, tmp_path, theirs):
    """It gets none with random weights: a folder whose guesses are noise would look trained."""
    theirs.from_pretrained(original).save_pretrained(tmp_path / "tuned")
    shutil.copy(original / "vocab.txt", tmp_path / "tuned")
    found = export(fastbert.load(tmp_path / "tuned"), tmp_path / "out", encoder=True)
    assert found.architecture == "BertModel"
    names = load_file(tmp_path / "out/model.safetensors").keys()
    assert any(name.endswith("pooler.dense.weight") for name in names)
    assert not any("cls." in name or "classifier" in name for name in names)
    again = fastbert.load(tmp_path / "out")
    assert again.heads == frozenset() and again.pooler
    assert np.array_equal(again.encode(TEXTS), fastbert.load(original).encode(TEXTS))
    with pytest.raises(InputError, match="was not trained on masked tokens"):
        again.fill_mask("A [MASK].")


@pytest.mark.parametrize(
    ("theirs", "name"),
    [
        (BertForSequenceClassification, "classifier.bias, classifier.weight"),
        (BertForTokenClassification, "classifier.bias, classifier.weight"),
        (BertForQuestionAnswering, "qa_outputs.bias, qa_outputs.weight"),
        (ModernBertForSequenceClassification, "classifier.bias, classifier.weight"),
    ],
)
@pytest.mark.parametrize("shards", [None, "5KB"])
def test_a_head_of_another_task_is_not_lost(original, tmp_path, theirs, name, shards):
    """A fine-tuned folder is one of transformers, and has all that an export would write."""
    tuned, given = tmp_path / "tuned", original
    if theirs is ModernBertForSequenceClassification:
        given = make_folder(tmp_path / "given", SMALL, load_tokenizer(original))
    model = theirs.from_pretrained(given)
    model.save_pretrained(tuned, **({"max_shard_size": shards} if shards else {}))
    shutil.copy(original / "vocab.txt", tuned)
    assert (tuned / "model.safetensors").exists() == (shards is None)
    with pytest.raises(InputError, match=f"tuned: the head of a fine-tuned model \\({name}\\) wou"):
        export(fastbert.load(tuned), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_has_no_head_at_all_is_refused(original, tmp_path):
    BertModel.from_pretrained(original, add_pooling_layer=False).save_pretrained(tmp_path / "bare")
    shutil.copy(original / "vocab.txt", tmp_path / "bare")
    with pytest.raises(InputError, match="bare: has no MLM head and no pooler, which AutoModel"):
        export(fastbert.load(tmp_path / "bare"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_card_has_the_figures_of_the_checkpoint(run):
    card = model_card(fastbert.load(run), "BertForPreTraining", "my-bert")
    assert "| steps | 7 |" in card and "| held-out loss | 7.2500 |" in card
    assert "9.5" not in card and "3.0000" not in card and "loss_nsp" not in card
    assert 'from_pretrained("my-bert")' in card and "max_position_embeddings = 32" in card


def test_the_card_says_what_text_it_was(run, original, small_dataset, tmp_path):
    card, training = (
        model_card(fastbert.load(run), "BertForPreTraining", "my-bert"),
        small_dataset.split("train"),
    )
    assert (
        f"| train | {training.documents:,} | {training.sentences:,} | {training.tokens:,} |" in card
    )
    assert f"The dataset `{small_dataset.path}` (manifest SHA-256 `{small_dataset.sha256}`)" in card
    gone = model_card(fastbert.load(make_run(tmp_path, original)), "BertForPreTraining", "my-bert")
    assert (
        "The dataset `nowhere`" in gone and "was not found when" in gone and "| train |" not in gone
    )


def swap_query_and_key(state):
    return {
        name.replace("query", "QUERY").replace("key", "query").replace("QUERY", "key"): tensor
        for name, tensor in state.items()
    }


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        # The attention scores are then the same except for the transposition.
        (swap_query_and_key, None),
        (
            lambda s: {**s, "cls.seq_relationship.bias": s["cls.seq_relationship.bias"] + 1e-3},
            "differ by 0.001",
        ),
        (
            lambda s: {
                **s,
                "bert.embeddings.LayerNorm.bias": s["bert.embeddings.LayerNorm.bias"] * torch.nan,
            },
            "differ by nan",
        ),
        (
            lambda s: {
                **s,
                "bert.encoder.layer.1.output.LayerNorm.bias": s[
                    "bert.encoder.layer.1.output.LayerNorm.bias"
                ]
                + 2e-4,
            },
            "differ by",
        ),
        (
            lambda s: {name: t for name, t in s.items() if "pooler" not in name},
            "missing_keys.*pooler",
        ),
        (lambda s: {**s, "bert.extra": torch.zeros(1)}, "unexpected_keys.*extra"),
    ],
)
def test_a_wrong_folder_is_found_and_not_left_behind(run, tmp_path, monkeypatch, damage, words):
    right = export_file.to_hugging_face
    monkeypatch.setattr(
        export_file, "to_hugging_face", lambda state, model: damage(right(state, model))
    )
    with pytest.raises(ExportError, match=words):
        export(fastbert.load(run), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_another_tokenizer_is_found(run, tmp_path, monkeypatch):
    def write(folder, *arguments, **more):
        export_folder(folder, *arguments, **more)
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(
            json.dumps({**settings, "do_lower_case": False})
        )

    export_folder = export_file.write_folder
    monkeypatch.setattr(export_file, "write_folder", write)
    with pytest.raises(ExportError, match="gives other ids"):
        export(fastbert.load(run), tmp_path / "out", ["A List."])
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_is_taken(run, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/mine").touch()
    (tmp_path / "file").touch()
    model = fastbert.load(run)
    for name in ("folder", "file"):
        with pytest.raises(InputError, match=f"--out .*{name}: is there already"):
            export(model, tmp_path / name)
    assert (tmp_path / "folder/mine").exists()
    (tmp_path / "empty").mkdir()
    export(model, tmp_path / "empty")
    assert fastbert.load(tmp_path / "empty").heads == {"mlm", "nsp"}
