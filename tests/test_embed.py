"""Vectors of texts: the pools against transformers, order, packs, and the file that the verb writes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_bert import TEXTS, make_hugging_face_folder
from transformers import AutoTokenizer, BertModel

import fastbert
from fastbert.errors import InputError
from fastbert.tasks import pretrained
from fastbert.tasks.embed import check_out, read_lines, write_vectors


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
        hidden = BertModel.from_pretrained(folder).eval()(**inputs, output_hidden_states=True).hidden_states[layer]
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

    np.testing.assert_allclose(model.encode(TEXTS), SentenceTransformer(str(folder), device="cpu").encode(TEXTS), rtol=0, atol=2e-5)


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
        (("a text",), "a list of texts is expected.*'a text'"),
    ],
)
def test_wrong_arguments(model, arguments, words):
    with pytest.raises(InputError, match=words):
        model.encode(*arguments)


def test_one_row_a_line(model, tmp_path):
    (tmp_path / "x.txt").write_bytes("\ufefffirst line\r\n\r\nthird\u2028still third\nlast".encode())
    lines = read_lines(tmp_path / "x.txt")
    assert lines == ["first line", "", "third\u2028still third", "last"]
    vectors = model.encode(lines, "max", 1)
    write_vectors(check_out(tmp_path / "x.npy"), vectors)
    assert vectors.shape == (4, 32) and np.array_equal(np.load(tmp_path / "x.npy", allow_pickle=False), vectors)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.npy", "x.txt"]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.binary(max_size=40) | st.text(max_size=20).map(str.encode))
def test_rubbish_is_read_or_refused(tmp_path_factory, data):
    file = tmp_path_factory.getbasetemp() / "rubbish.txt"
    file.write_bytes(data)
    try:
        lines = read_lines(file)
    except InputError as error:
        assert str(error).startswith(str(file))
    else:
        assert len(lines) == data.count(b"\n") + (not data.endswith(b"\n"))


def test_wrong_files(tmp_path):
    (tmp_path / "empty").touch()
    (tmp_path / "latin").write_bytes("fine\ncafé\n".encode("latin-1"))
    for name, words in [("empty", "empty"), ("latin", "latin:2: not UTF-8"), ("gone", "No such file"), (".", "cannot be read")]:
        with pytest.raises(InputError, match=words):
            read_lines(tmp_path / name)
    (tmp_path / "folder.npy").mkdir()
    for name, words in [("x.txt", "must end in .npy"), ("no/x.npy", "no does not exist"), ("folder.npy", "is a folder")]:
        with pytest.raises(InputError, match=words):
            check_out(tmp_path / name)
