"""Vectors of texts: pools against transformers, order, packs, and the file that the verb writes."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_bert import TEXTS, make_hugging_face_folder
from transformers import AutoTokenizer, BertModel

import fastbert
from fastbert.data import documents, unpack
from fastbert.errors import InputError
from fastbert.tasks import pretrained
from fastbert.tasks.embed import check_out, embed, source_of
from fastbert.tasks.pretrained import first_tokens
from tests.ranks import environment


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
        ((["a", None],), "text 1 is None; a text must be a string"),
        ((["a", "b", 3.5],), "text 2 is 3.5"),
        ((["a", b"b"],), "text 1 is b'b'"),
        ((["a", ["b"]],), r"text 1 is \['b'\]"),
        ((["\ud800"],), "text 0 .* half a character"),
        ((None,), "texts = None, of type NoneType; must be a list of strings"),
        ((7,), "texts = 7"),
        # These would give vectors of names, or vectors in an order that nobody knows.
        (({"train": ["a"], "test": ["b"]},), "texts = .* of type dict; must be a list of strings"),
        (({"a", "b"},), "of type set"),
        ((pandas.DataFrame({"text": ["a", "b", "c"]}),), "of type DataFrame"),
        ((np.array([["a", "b"]]),), "of type ndarray"),
        ((np.array("a"),), "of type ndarray"),
        ((["a"], "mean", "last"), "layer = 'last'; must be a whole number, or a list of them"),
        ((["a"], "mean", [1.0]), r"layer = \[1.0\]; must be a whole number"),
        ((["a"], "mean", True), "layer = True; must be a whole number"),
    ],
)
def test_wrong_arguments(model, arguments, words):
    with pytest.raises(InputError, match=words):
        model.encode(*arguments)
    if len(arguments) == 1:
        with pytest.raises(InputError, match=words):
            model.hidden_states(*arguments)


def test_columns_of_tables_and_numbers_of_numpy(model):
    expected = model.encode(["one", "two"], layer=[0, 1])
    column = pandas.Series(["zero", "one", "two"])[1:]  # whose index begins at 1
    for texts in (column, column.to_numpy(), np.array(["one", "two"]), iter(["one", "two"])):
        assert np.array_equal(model.encode(texts, layer=np.arange(2)), expected)
    assert np.array_equal(model.encode("one", layer=np.int64(1)), model.encode("one", layer=1))
    assert model.fill_mask("a [MASK]", k=np.int64(2)) == model.fill_mask("a [MASK]", k=2)
    for k in (2.0, "2", None):
        with pytest.raises(InputError, match=f"k = {k!r}; must be a number from 1 to"):
            model.fill_mask("a [MASK]", k=k)


def test_other_methods_take_strings_alone(model):
    for call in (
        lambda: model.fill_mask(None),
        lambda: model.fill_mask(["a [MASK]"]),
        lambda: model.next_sentence("a", None),
        lambda: model.next_sentence(1, "b"),
        lambda: model.fill_mask("\udfff [MASK]"),
    ):
        with pytest.raises(InputError, match=r" is .*(must be a string|half a character)"):
            call()


def test_one_text_gives_one_vector(model):
    expected = model.encode(TEXTS)
    np.testing.assert_allclose(model.encode(TEXTS[0]), expected[0], rtol=0, atol=2e-5)
    assert model.encode("a", normalize=True).shape == (32,)
    np.testing.assert_allclose(model.encode(iter(TEXTS)), expected, rtol=0, atol=2e-5)
    np.testing.assert_allclose(model.encode(np.array(TEXTS)), expected, rtol=0, atol=2e-5)


def test_a_model_is_shown_in_one_line(model, folder):
    assert repr(model) == f"<{folder}: 2 layers, hidden size 32, 400 tokens>"


def sentence_model(folder: Path, out: Path, modules: list, length: int | None = None) -> Path:
    """A folder that sentence-transformers itself has saved."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Transformer

    first = Transformer(str(folder), **({"max_seq_length": length} if length else {}))
    SentenceTransformer(modules=[first, *modules], device="cpu").save(str(out))
    return out


@pytest.mark.filterwarnings("ignore::fastbert.tasks.pretrained.TextCutWarning")
@pytest.mark.parametrize(
    ("pool", "normalize", "length"),
    [("cls", True, 16), ("max", False, None), ("mean", True, 9)],
)
def test_vectors_are_those_of_the_sentence_transformers_folder(
    folder, tmp_path, pool, normalize, length
):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling

    modules = [Pooling(32, pool), *([Normalize()] if normalize else [])]
    out = sentence_model(folder, tmp_path / "st", modules, length)
    expected = SentenceTransformer(str(out), device="cpu").encode(TEXTS)
    model = fastbert.load(out)
    np.testing.assert_allclose(model.encode(TEXTS), expected, rtol=0, atol=2e-5)
    assert model.max_length == (length or 32)
    # The files of older releases: a switch for each way of pooling, and the length in another file.
    older = {f"pooling_mode_{name}": False for name in ("cls_token", "mean_tokens", "max_tokens")}
    older[f"pooling_mode_{pool}_{'token' if pool == 'cls' else 'tokens'}"] = True
    (out / "1_Pooling/config.json").write_text(json.dumps(older))
    settings = json.loads((out / "tokenizer_config.json").read_text())
    (out / "tokenizer_config.json").write_text(json.dumps({**settings, "model_max_length": 1e30}))
    (out / "sentence_bert_config.json").write_text(
        json.dumps({"max_seq_length": length or 32, "do_lower_case": True})
    )
    np.testing.assert_allclose(fastbert.load(out).encode(TEXTS), expected, rtol=0, atol=2e-5)


def test_a_sentence_transformers_folder_that_asks_for_more_is_refused(folder, tmp_path):
    """The folder still opens for other verbs, and for a pooling that is chosen explicitly."""
    from sentence_transformers.sentence_transformer.modules import Dense, Pooling

    cases = [
        ([Pooling(32, "mean"), Dense(32, 8)], {}, "Transformer, Pooling, Dense"),
        ([Pooling(32, ("cls", "mean"))], {}, "pooling by cls, mean"),
        ([Pooling(32, "mean_sqrt_len_tokens")], {}, "pooling by mean_sqrt_len_tokens"),
        (
            [Pooling(32, "mean")],
            {"default_prompt_name": "query", "prompts": {"query": "query: "}},
            "the prompt 'query: ' before each text",
        ),
        ([Pooling(32, "mean")], {"truncate_dim": 8}, "truncate_dim = 8, the first values of each"),
    ]
    out = tmp_path
    for number, (modules, more, words) in enumerate(cases):
        out = sentence_model(folder, tmp_path / str(number), modules)
        if more:
            (out / "config_sentence_transformers.json").write_text(json.dumps(more))
        model = fastbert.load(out)
        with pytest.raises(InputError, match=words):
            model.encode(TEXTS)
        assert model.encode(TEXTS, "mean").shape == (len(TEXTS), 32)
    for rubbish in ("3", "[3]", "[", '[{"type": "a.Transformer"}]'):
        (out / "modules.json").write_text(rubbish)
        with pytest.raises(InputError, match=r"modules.json: no list of modules"):
            fastbert.load(out)


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
    """Write the same texts in every supported format.

    csv, tsv and Parquet have a further column that embed must ignore.
    """
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


def test_no_file_but_an_earlier_result_is_replaced(model, folder, tmp_path):
    texts = tmp_path / "x.jsonl"
    texts.write_text('{"text": "a"}\n')
    (tmp_path / "link.jsonl").symlink_to("x.jsonl")
    (tmp_path / "hard.jsonl").hardlink_to(texts)
    (tmp_path / "device.npy").symlink_to("/dev/null")
    os.mkfifo(tmp_path / "pipe.npy")
    (tmp_path / "folder.npy").mkdir()
    before = sorted(os.listdir(tmp_path))
    for name, words in (
        ("x.jsonl", "is the file of the texts"),
        ("link.jsonl", "is the file of the texts"),
        ("hard.jsonl", "is the file of the texts"),
        ("../" + tmp_path.name + "/x.jsonl", "is the file of the texts"),
        ("device.npy", "is no file"),
        ("pipe.npy", "is no file"),
        ("folder.npy", "is a folder"),
    ):
        with pytest.raises(InputError, match=f"--out .*{name}: {words}"):
            check_out(tmp_path / name, source_of(texts))
    with pytest.raises(InputError, match="lies in the folder of the model"):
        embed(model, source_of(texts), "text", check_out(folder / "x.npy"), None, [-1], None)
    assert sorted(os.listdir(tmp_path)) == before and texts.read_text() == '{"text": "a"}\n'
    for _ in range(2):
        embed(model, source_of(texts), "text", check_out(tmp_path / "y.npy"), None, [-1], None)
    assert np.load(tmp_path / "y.npy").shape == (1, 32)


@pytest.mark.parametrize("name", ["x.npy", "x.jsonl", "x.parquet"])
def test_only_vectors_are_replaced(model, tmp_path, name):
    source, out = source_of(write_source(tmp_path / "t.txt")), tmp_path / name
    out.touch()
    for _ in range(2):
        embed(model, source, "text", check_out(out, source), None, [-1], None)
    others = {b"mine", b'{"text": "a"}\n', b'{"text": "a, \\"vector\\": [", "label": 1}\n', b"PAR1"}
    with io.BytesIO() as file:
        np.save(file, np.arange(9))
        others.add(file.getvalue())
    with io.BytesIO() as file:
        pyarrow.parquet.write_table(pyarrow.table({"text": ["a"], "label": ["b"]}), file)
        others.add(file.getvalue())
    for content in others:
        out.write_bytes(content)
        with pytest.raises(InputError, match=f"--out .*{name}: exists, and holds no vectors of"):
            check_out(out, source)
        assert out.read_bytes() == content


@pytest.mark.parametrize("out", ["x.npy", "x.jsonl", "x.parquet"])
@pytest.mark.parametrize("name", ["t.txt", "t.jsonl", "t.csv", "t.parquet", "t.txt.gz", "t.tsv.gz"])
def test_every_format_to_every_format(model, tmp_path, monkeypatch, name, out):
    monkeypatch.setattr(documents, "CHUNK_BYTES", 16)  # several chunks
    monkeypatch.setattr(unpack, "PIECE_BYTES", 16)
    source = source_of(write_source(tmp_path / name))
    done: list[int] = []
    rows, size = embed(
        model, source, "text", check_out(tmp_path / out), "max", [1], False, advance=done.append
    )
    assert sum(done) == source.path.stat().st_size
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


PARTS = ["a list ", "name", "!", "漢", "字", "é", "e\u0301", "\t", "\ufe00", "-", "ß"]


@given(
    st.lists(st.sampled_from(PARTS)),
    st.integers(1, 12),
)
def test_the_start_of_a_text_has_the_first_tokens_of_all_of_it(model, parts, most):
    """This holds wherever the text is cut before tokenization."""
    text = "".join(parts) * 3
    whole = model.tokenizer.encode(text, add_special_tokens=False).ids
    (found,) = first_tokens(model.tokenizer, [text], most)
    assert found[:most] == whole[:most]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrained, "CHARACTERS", 1)
        (found,) = first_tokens(model.tokenizer, [text], most)
    assert found[:most] == whole[:most]


LONG = """
import resource, sys, warnings
resource.setrlimit(resource.RLIMIT_DATA, (3 << 29, 3 << 29))  # 5 MB as tokens took 2 GB
import fastbert
warnings.simplefilter("ignore")
model = fastbert.load(sys.argv[1], "cpu")
texts = ["a list of names, " * 300_000, "漢字" * 2_500_000, "a-b" * 1_500_000]
assert model.encode(texts).shape == (3, 32)
model.next_sentence(texts[0], texts[1])
"""


@pytest.mark.slow
def test_a_line_of_five_megabytes_takes_little_memory(folder):
    done = subprocess.run(
        [sys.executable, "-c", LONG, str(folder)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
