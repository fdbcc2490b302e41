"""Fine-tuning on csv files: it learns, transformers loads the result, and a wrong file is named with its line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_bert import make_hugging_face_folder
from transformers import AutoTokenizer, BertForSequenceClassification, BertModel

import fastbert
from fastbert.errors import InputError
from fastbert.tasks.finetune import Epoch, finetune, read_csv

SUBJECTS = ["list", "name", "class", "module", "value"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_hugging_face_folder(tmp_path_factory.mktemp("hf"))


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[Path, Path]:
    """Whether a sentence has the word "not"; the evaluation file has other sentences than the training file."""
    folder = tmp_path_factory.mktemp("csv")
    rows = [(f"the {s} is {n}the same as the {t}", "no" if n else "yes") for s in SUBJECTS for t in SUBJECTS for n in ("", "not ")]
    for name, part in (("train", rows[10:]), ("test", rows[:10])):
        (folder / f"{name}.csv").write_text("text,label\n" + "".join(f'"{text}",{label}\n' for text, label in part), encoding="utf-8")
    return folder / "train.csv", folder / "test.csv"


def test_it_learns_and_transformers_agrees(folder, files: tuple[Path, Path], tmp_path):
    seen: list[Epoch] = []
    result = finetune(fastbert.load(folder), *files, tmp_path / "out", epochs=12, lr=3e-3, batch=8, report=seen.append)
    assert result.accuracy == 1.0 and result.majority == 0.5 and result.labels == ["no", "yes"]
    assert seen == result.epochs and len(seen) == 12 and seen[-1].loss < seen[0].loss / 2

    model: Any
    model, report = BertForSequenceClassification.from_pretrained(tmp_path / "out", output_loading_info=True)  # type: ignore[misc]
    assert not any(report.values()), report
    assert model.config.id2label == {0: "no", 1: "yes"} and model.config.label2id == {"no": 0, "yes": 1}
    held_out = read_csv(files[1])
    inputs = AutoTokenizer.from_pretrained(tmp_path / "out")(held_out.first, return_tensors="pt", padding=True)
    with torch.no_grad():
        answers = model.eval()(**inputs).logits.argmax(-1).tolist()
    assert [model.config.id2label[i] for i in answers] == held_out.labels
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]

    # The result is a BERT too: its encoder gives the vectors that transformers gives, and heads that are not there are refused.
    encoder = fastbert.load(tmp_path / "out")
    with torch.no_grad():
        expected = model.bert(**inputs).last_hidden_state[:, 0]
    np.testing.assert_allclose(encoder.encode(held_out.first, "cls"), expected, rtol=0, atol=5e-5)
    assert encoder.heads == set()


def test_same_seed_same_weights(folder, files: tuple[Path, Path], tmp_path):
    results = [finetune(fastbert.load(folder), *files, tmp_path / str(i), epochs=2, seed=seed) for i, seed in enumerate([1, 1, 2])]
    same, again, other = ((tmp_path / str(i) / "model.safetensors").read_bytes() for i in range(3))
    assert same == again != other
    assert results[0].epochs == results[1].epochs


def test_pairs_are_two_segments(folder, tmp_path):
    """Which of the two texts has the word "not"; the words of both together are the same under either label."""
    rows = [(f"{n}{a}", f"{m}{b}", "ab"[bool(m)]) for a in SUBJECTS for b in SUBJECTS for n, m in (("not ", ""), ("", "not "))]
    (tmp_path / "x.csv").write_text("label,text_b,text\n" + "".join(f"{label},{b},{a}\n" for a, b, label in rows))
    found = read_csv(tmp_path / "x.csv")
    assert (found.first[1], found.second[1], found.labels[1]) == ("list", "not list", "b")
    result = finetune(fastbert.load(folder), tmp_path / "x.csv", tmp_path / "x.csv", epochs=10, lr=3e-3, batch=8)
    assert result.accuracy == 1.0 and result.out is None


def test_long_texts_are_cut(folder, tmp_path):
    (tmp_path / "x.csv").write_text("text,label\n" + "list " * 200 + ",a\n" + "name " * 200 + ",b\n")
    assert finetune(fastbert.load(folder), tmp_path / "x.csv", tmp_path / "x.csv", epochs=1, max_length=16).epochs[0].loss > 0


def test_an_encoder_without_a_pooler(folder, files: tuple[Path, Path], tmp_path):
    BertModel.from_pretrained(folder, add_pooling_layer=False).save_pretrained(tmp_path / "encoder")
    (tmp_path / "encoder/vocab.txt").write_bytes((folder / "vocab.txt").read_bytes())
    assert finetune(fastbert.load(tmp_path / "encoder"), *files, epochs=1).accuracy >= 0


def test_csv_with_quotes_newlines_and_a_byte_order_mark(tmp_path):
    (tmp_path / "x.csv").write_text('\ufefftext,label\n"a, ""b""\nsecond line",x\n\nplain,y\n', encoding="utf-8")
    found = read_csv(tmp_path / "x.csv")
    assert found.first == ['a, "b"\nsecond line', "plain"] and found.labels == ["x", "y"] and found.second == []
    assert found.lines == [2, 5]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", r":1: the columns are \[\]; must be text,label"),
        (b"text,label\n", "no examples below the header"),
        (b"sentence,label\na,b\n", r":1: the columns are \['sentence', 'label'\]"),
        (b"text,label\na,x\nb\n", ":3: 1 fewer fields"),
        (b"text,label\na,x\nb, and c,y\n", ":3: 1 more fields.*quotes"),
        (b"text,label\na,x\n ,y\n", ":3: text is empty"),
        (b"text,label\na,x\nb,\n", ":3: label is empty"),
        (b'text,label\n"a,x\n', ":2: not valid csv"),
        (b'text,label\n"a"b,x\n', ":2: not valid csv"),
        (b"text,label\ncaf\xe9,x\n", "not UTF-8"),
        (b"text,label\na\x00,x\ny,z\n", "csv"),
        (b"text,label\na,x\nb,x\n", "every label is 'x'; two or more"),
        (b"text,label\na,x\nb,y\n", "test.csv:2: label '(yes|no)' does not occur in"),
        (b"text,text_b,label\na,a,no\nb,b,yes\n", "only one of this file and .* has the column text_b"),
    ],
)
def test_a_wrong_file_is_named_with_its_line(folder, files: tuple[Path, Path], tmp_path, data, words):
    (tmp_path / "bad.csv").write_bytes(data)
    with pytest.raises(InputError, match=words) as caught:
        finetune(fastbert.load(folder), tmp_path / "bad.csv", files[1], tmp_path / "out")
    assert "\n" not in str(caught.value) and "csv" in str(caught.value)
    assert not (tmp_path / "out").exists()


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.binary(max_size=60) | st.text('text_blabe,"\r\n\x00 é', max_size=60).map(lambda rows: b"text,label\n" + rows.encode()))
def test_rubbish_is_read_or_refused(tmp_path_factory, data):
    file = tmp_path_factory.getbasetemp() / "rubbish.csv"
    file.write_bytes(data)
    try:
        found = read_csv(file)
    except InputError as error:
        assert str(error).startswith(str(file)) and len(str(error).splitlines()) == 1
    else:
        assert len(found.first) == len(found.labels) == len(found.lines) > 0 and all(found.labels)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"epochs": 0}, "--epochs 0"),
        ({"batch": 0}, "--batch 0"),
        ({"lr": -1.0}, r"--lr -1\.0"),
        ({"max_length": 33}, "--max-length 33: must be from 8 to the model's 32"),
        ({"out": "."}, r"--out \.: is there already"),
    ],
)
def test_wrong_settings(folder, files: tuple[Path, Path], changes, words):
    with pytest.raises(InputError, match=words):
        finetune(fastbert.load(folder), *files, **changes)


def test_the_saved_folder_is_plain_json_and_safetensors(folder, files: tuple[Path, Path], tmp_path):
    finetune(fastbert.load(folder), *files, tmp_path / "out", epochs=1)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["architectures"] == ["BertForSequenceClassification"] and config["problem_type"] == "single_label_classification"
