"""Vectors of texts: the pools against transformers, order, packs, and the file that the verb writes."""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from tiny_bert import TEXTS, make_hugging_face_folder
from transformers import AutoTokenizer, BertModel

import fastbert
from fastbert.data import documents, unpack
from fastbert.errors import InputError
from fastbert.tasks import pretrained
from fastbert.tasks.embed import check_out, embed, source_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_hugging_face_folder(tmp_path_factory.mktemp("hf"))


@pytest.fixture(scope="module")
def model(folder):
    return fastbert.load(folder)


@pytest.mark.parametrize("layer", [0, 1, -1])
@pytest.mark.parametrize("pool", ["mean", "max", "cls"])
def test_pools_are_those_of_the_padded_hidden_states_of_transformers(folder, model, pool, layer):
    inputs = AutoTokenizer.from_pretrained(folder)(TEXTS, return_tensors="pt", padding=True)
    with torch.no_grad():
        hidden = (
            BertModel.from_pretrained(folder)
            .eval()(**inputs, output_hidden_states=True)
            .hidden_states[layer]
        )
    real = inputs["attention_mask"][..., None].bool()
    expected = {
        "mean": (hidden * real).sum(1) / real.sum(1),
        "max": hidden.masked_fill(~real, -torch.inf).amax(1),
        "cls": hidden[:, 0],
    }[pool]
    found = model.encode(TEXTS, pool, layer)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)


def test_sentence_transformers_means_the_same(folder, model):
    from sentence_transformers import SentenceTransformer

    np.testing.assert_allclose(
        model.encode(TEXTS),
        SentenceTransformer(str(folder), device="cpu").encode(TEXTS),
        rtol=0,
        atol=2e-5,
    )


def test_neither_company_nor_packs_change_a_vector(model, monkeypatch):
    alone = np.concatenate([model.encode([text]) for text in TEXTS])
    np.testing.assert_allclose(model.encode(TEXTS), alone, rtol=0, atol=2e-5)
    monkeypatch.setattr(pretrained, "PACK_TOKENS", 30)  # several packs, of one or two texts
    np.testing.assert_allclose(model.encode(TEXTS), alone, rtol=0, atol=2e-5)
    states = model.hidden_states(TEXTS)
    np.testing.assert_allclose([state[-1].mean(0) for state in states], alone, rtol=0, atol=2e-5)


def test_no_texts_give_no_rows(model):
    assert model.encode([]).shape == (0, 32)
    assert model.hidden_states([]) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((["a"], "average"), "pool = 'average'; must be one of mean, max, cls"),
        ((["a"], "mean", 3), "layer = 3; the model has 0 .* to 2"),
        ((["a"], "mean", -4), "layer = -4"),
        ((["a"], "mean", []), r"layer = \[\]"),
        (("a text",), "a list of texts is expected.*'a text'"),
    ],
)
def test_wrong_arguments(model, arguments, words):
    with pytest.raises(InputError, match=words):
        model.encode(*arguments)


def test_the_mean_of_layers_and_vectors_of_length_one(model):
    layers = [model.encode(TEXTS, "mean", layer) for layer in (1, -1)]
    both = model.encode(TEXTS, "mean", (1, -1))
    np.testing.assert_allclose(both, np.mean(layers, 0), rtol=0, atol=1e-5)
    unit = model.encode(TEXTS, "mean", (1, -1), normalize=True)
    np.testing.assert_allclose(
        unit, both / np.linalg.norm(both, axis=1, keepdims=True), rtol=0, atol=1e-6
    )


LINES = ["first line", "", "third\u2028still third", 'a, "quoted" one', "last"]


def write_source(file: Path) -> Path:
    """The same texts in every format that is read; csv, tsv and Parquet with a column that is not for us."""
    name = file.name.removesuffix(".gz")
    if name.endswith(".txt"):
        data = "\ufeff" + "\n".join(LINES) + "\n"
    elif name.endswith(".jsonl"):
        data = "".join(json.dumps({"id": 1, "text": text}) + "\n" for text in LINES)
    elif name.endswith(".tsv"):
        data = "id\ttext\n" + "".join(f"{i}\t{text}\n" for i, text in enumerate(LINES))
    elif name.endswith(".csv"):
        out = io.StringIO()
        csv.writer(out).writerows([["id", "text"], *([i, text] for i, text in enumerate(LINES))])
        data = out.getvalue()
    else:
        pyarrow.parquet.write_table(pyarrow.table({"id": range(len(LINES)), "text": LINES}), file)
        return file
    file.write_bytes(gzip.compress(data.encode()) if file.suffix == ".gz" else data.encode())
    return file


def read_result(file: Path) -> tuple[list[str] | None, np.ndarray]:
    if file.suffix == ".npy":
        return None, np.load(file, allow_pickle=False)
    if file.suffix == ".jsonl":
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n")[:-1]]
    else:
        rows = pyarrow.parquet.read_table(file).to_pylist()
    return [row["text"] for row in rows], np.array([row["vector"] for row in rows], np.float32)


@pytest.mark.parametrize("out", ["x.npy", "x.jsonl", "x.parquet"])
@pytest.mark.parametrize("name", ["t.txt", "t.jsonl", "t.csv", "t.parquet", "t.txt.gz", "t.tsv.gz"])
def test_every_format_to_every_format(model, tmp_path, monkeypatch, name, out):
    monkeypatch.setattr(documents, "CHUNK_BYTES", 16)  # several chunks
    monkeypatch.setattr(unpack, "PIECE_BYTES", 16)
    source = source_of(write_source(tmp_path / name))
    rows, size = embed(model, source, "text", check_out(tmp_path / out), "max", [1], False)
    texts, vectors = read_result(tmp_path / out)
    assert (rows, size) == vectors.shape == (5, 32) and vectors.dtype == np.float32
    assert texts in (None, LINES)
    np.testing.assert_allclose(vectors, model.encode(LINES, "max", 1), rtol=0, atol=1e-5)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([name, out])


def test_nothing_half_written(model, tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "CHUNK_BYTES", 16)
    monkeypatch.setattr(unpack, "PIECE_BYTES", 16)
    (tmp_path / "t.jsonl").write_text('{"text": "a text of some length"}\n' * 3 + '{"txt": "b"}\n')
    (tmp_path / "x.npy").write_text("older")
    with pytest.raises(
        InputError, match=r"t\.jsonl: line 4: no field 'text'; choose with --text-field among: txt"
    ):
        embed(
            model, source_of(tmp_path / "t.jsonl"), "text", tmp_path / "x.npy", "mean", [-1], False
        )
    with pytest.raises(InputError, match="layer = 9"):
        embed(
            model,
            source_of(tmp_path / "t.jsonl"),
            "text",
            tmp_path / "x.npy",
            "mean",
            [-1, 9],
            False,
        )
    assert (tmp_path / "x.npy").read_text() == "older" and len(list(tmp_path.iterdir())) == 2


def test_wrong_files(tmp_path):
    (tmp_path / "a.doc").touch()
    for name, words in [
        ("a.doc", "suffix does not tell the format"),
        ("gone.txt", "no such file"),
        (".", "a folder"),
    ]:
        with pytest.raises(InputError, match=words):
            source_of(tmp_path / name)
    (tmp_path / "folder.npy").mkdir()
    for name, words in [
        ("x.txt", "must end in .npy, .jsonl, .parquet"),
        ("no/x.npy", "no does not exist"),
        ("folder.npy", "is a folder"),
    ]:
        with pytest.raises(InputError, match=words):
            check_out(tmp_path / name)
