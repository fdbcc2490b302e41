"""A dataset made with a tokenizer that is not BERT's, and what a model does with it."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import AddedToken

import fastbert
from fastbert.config import ObjectiveConfig, RunConfig
from fastbert.data.batches import Batches
from fastbert.data.byte_level import train_byte_level
from fastbert.data.dataset import TokenDataset, open_dataset
from fastbert.data.masking import Masking
from fastbert.data.prepare import prepare
from fastbert.data.shard_split import ShardSplit
from fastbert.data.split import Split
from fastbert.data.token_roles import roles_of
from fastbert.data.tokenizer import load_tokenizer, save_tokenizer, special_ids
from fastbert.errors import InputError
from fastbert.tasks.pretrained import TextCutWarning
from tests.scripts import ARTICLES
from tests.shard_writer import ShardWriter
from tests.tiny_bert import make_hugging_face_folder, make_run
from tests.tokenizer_kinds import make_folder

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported


@pytest.fixture(scope="module")
def documents(english_documents: list[str]) -> list[str]:
    """English prose, other scripts, white space of every kind, and nothing."""
    odd = ["  Two  spaces\n\n\tand a tab.\n", "No end", " \n ", "一二三。四五六。", "a\u00a0b c"]
    return [*english_documents[:60], *ARTICLES.values(), *odd]


@pytest.fixture(scope="module")
def source(documents: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return path


@pytest.fixture(scope="module", params=["modernbert", "gpt2", "xlm_roberta", "unknown_pattern"])
def made(
    request: pytest.FixtureRequest, source: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, TokenDataset]:
    """The folder of a tokenizer, and a dataset of the documents."""
    place = tmp_path_factory.mktemp(request.param)
    folder = make_folder(request.param, place / "tokenizer")
    prepare([source], place / "data", tokenizer=folder, heldout=0.2, workers=1, progress=False)
    return folder, open_dataset(place / "data", verify=True)


def documents_of(split: Split) -> list[list[int]]:
    bounds = split.first_token(split.first_sentence(np.arange(split.documents + 1)))
    tokens = split.gather(np.zeros(1, np.int64), np.array([split.tokens])).tolist()
    return [tokens[a:b] for a, b in itertools.pairwise(bounds)]


def test_documents_have_the_ids_of_transformers(
    made: tuple[Path, TokenDataset], documents: list[str]
) -> None:
    """White space inside a document is kept, that around it is not."""
    from transformers import AutoTokenizer

    folder, dataset = made
    theirs = AutoTokenizer.from_pretrained(folder)
    found = documents_of(dataset.split("train")) + documents_of(dataset.split("heldout"))
    texts = [text.strip() for text in documents if text.strip()]
    wanted = [theirs(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert sorted(found) == sorted(wanted)


def test_words_are_those_of_the_pre_tokenizer(
    made: tuple[Path, TokenDataset], documents: list[str]
) -> None:
    """A word begins where the library's number of the word changes."""
    folder, dataset = made
    tokenizer, wanted = load_tokenizer(folder), list[list[bool]]()
    for text in documents:
        words = tokenizer.encode(text.strip(), add_special_tokens=False).word_ids
        wanted.append([i == 0 or word != words[i - 1] for i, word in enumerate(words)])
    found = list[list[bool]]()
    for split in map(dataset.split, ("train", "heldout")):
        bounds = split.first_token(split.first_sentence(np.arange(split.documents + 1)))
        for start, length in zip(bounds[:-1], np.diff(bounds), strict=True):
            found.append(split.begins_word(start[None], length[None]).tolist())
    assert sorted(found) == sorted(filter(None, wanted))


def test_shards_hold_any_number_of_bits(tmp_path: Path) -> None:
    """Chunks and shards end inside bytes."""
    draw = np.random.default_rng(1)
    writer = ShardWriter(tmp_path / "split", np.dtype("<u2"), shard_tokens=21)
    bits = []
    for length in (1, 7, 8, 9, 3, 30, 2, 64, 5):
        bits.append(draw.random(length) < 0.5)
        writer.add(np.arange(length), np.array([length]), np.array([1]), bits[-1])
    writer.close()
    split = ShardSplit(tmp_path / "split", writer.shards, np.dtype("<u2"), words=True)
    assert len(writer.shards) > 2
    whole = np.concatenate(bits)
    documents = np.array([len(part) for part in bits])
    found = split.begins_word(np.cumsum(documents) - documents, documents)
    np.testing.assert_array_equal(found, whole)
    starts, lengths = np.array([100, 3, 3, 50]), np.array([9, 0, 5, 1])
    wanted = [whole[a : a + n] for a, n in zip(starts, lengths, strict=True)]
    np.testing.assert_array_equal(split.begins_word(starts, lengths), np.concatenate(wanted))


def test_whole_words_are_masked_together(made: tuple[Path, TokenDataset]) -> None:
    dataset = made[1]
    objective = ObjectiveConfig(kind="mlm", whole_word=True)
    masking, split = Masking(dataset, objective), dataset.split("train")
    bounds = split.first_token(np.arange(split.sentences + 1))
    starts, lengths = bounds[:-1], np.diff(bounds)
    tokens, begins = split.gather(starts, lengths), split.begins_word(starts, lengths)
    keys = np.random.default_rng(0).integers(0, 2**63, len(lengths))
    _, chosen = masking(tokens, lengths, keys, begins)
    begins[starts] = True
    word = np.cumsum(begins) - 1
    size, hit = np.bincount(word), np.bincount(word[chosen], minlength=word[-1] + 1)
    broken = np.flatnonzero((hit > 0) & (hit < size))
    # Of each example only the last selected word may be cut to fit the count.
    sentence = np.searchsorted(bounds, np.flatnonzero(begins), "right") - 1
    assert np.bincount(sentence[broken]).max() == 1 and (hit[size > 1] > 1).any()


def test_batches_use_the_special_tokens(made: tuple[Path, TokenDataset]) -> None:
    dataset, special = made[1], made[1].special
    objective = ObjectiveConfig(kind="mlm", whole_word=True, segments="windows")
    config = RunConfig(data=str(dataset.path), objective=objective)
    for batch in Batches(dataset, config).step(0):
        first, last = batch.cu_seqlens[:-1].long(), batch.cu_seqlens[1:].long() - 1
        assert (batch.input_ids[first] == special.cls).all()
        assert (batch.input_ids[last] == special.sep).all()
        assert (batch.input_ids[batch.masked_positions] == special.mask).float().mean() > 0.7
    assert not np.isin(dataset.ordinary_ids, special.all).any()


def test_the_report_and_the_manifest_name_the_tokenizer(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for kind, said, problem in (
        ("modernbert", "byte-level BPE", ""),
        ("unknown_pattern", "byte-level BPE", "no words are looked up"),
        ("xlm_roberta", "Unigram", ""),
    ):
        folder = make_folder(kind, tmp_path / kind)
        out = tmp_path / f"{kind}-data"
        report = prepare([source], out, tokenizer=folder, workers=1, progress=False)
        assert open_dataset(out).manifest["tokenizer"] == report.figures["tokenizer"] == said
        assert f"| tokenizer | {said} |" in (out / "part-00000/report.md").read_text()
        output = capsys.readouterr().err
        assert (problem in output) and output.count("looked up") == (problem != "")
        assert sorted(os.listdir(out / "tokenizer")) == ["tokenizer.json", "tokenizer_config.json"]


def test_the_same_bytes_whatever_the_workers(source: Path, tmp_path: Path) -> None:
    made = []
    for workers in (1, 3):
        out = tmp_path / str(workers)
        prepare([source], out, vocab_size=700, algorithm="bpe", workers=workers, progress=False)
        files = (path for path in out.rglob("*") if path.is_file())
        made.append(sorted((path.relative_to(out), path.read_bytes()) for path in files))
    assert made[0] == made[1]
    assert any(name.name == "train-00000" for name, _ in made[0])


def test_a_changed_bit_is_found(made: tuple[Path, TokenDataset], tmp_path: Path) -> None:
    copy = shutil.copytree(made[1].path, tmp_path / "copy")
    for note in copy.glob(".verified-*"):
        note.unlink()
    file = copy / "part-00000/train-00000"
    data = bytearray(file.read_bytes())
    entry = made[1].blocks["train"].layout
    data[int(entry.words[0]) + 5] ^= 16
    file.write_bytes(data)
    with pytest.raises(InputError, match=r"train-00000.*SHA-256"):
        open_dataset(copy)
    file.write_bytes(data[:-1])
    with pytest.raises(InputError, match=r"train-00000.*SHA-256"):
        open_dataset(copy)


# Byte-level BPE that is trained


def test_training_is_deterministic(source: Path) -> None:
    """In new processes, because hash maps are seeded once per process; with many equal counts."""
    code = (
        "import sys, hashlib; from fastbert.data.documents import read_documents; "
        "from fastbert.data.byte_level import train_byte_level; "
        "texts = [*read_documents(sys.argv[1:]), *(f'x{i % 97}y{i % 89}' for i in range(9000))]; "
        "made = train_byte_level(texts, 2000).to_str(); "
        "print(hashlib.sha256(made.encode()).hexdigest())"
    )
    found = set()
    for threads in ("1", "2", "3"):
        environment = {**os.environ, "RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": threads}
        result = subprocess.run(
            [sys.executable, "-c", code, source],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        found.add(result.stdout)
    assert len(found) == 1


@pytest.mark.parametrize(("asked", "size"), [(500, 512), (512, 512), (100_000, None)])
def test_the_vocabulary_is_a_multiple_of_64(
    documents: list[str], asked: int, size: int | None
) -> None:
    tokenizer = train_byte_level(documents, asked)
    found = tokenizer.get_vocab_size()
    ids, merges = tokenizer.get_vocab(), json.loads(tokenizer.to_str())["model"]["merges"]
    assert found % 64 == 0 and sorted(ids.values()) == list(range(found))
    assert size in (None, found)
    unused = [token for token in ids if token.startswith("[unused")]
    assert len(unused) < 64 and (size is None) == (len(unused) > 0)
    # Each token is made of one pair, which the order of merges relies on.
    assert len(merges) == len({a + b for a, b in merges}) == found - 256 - 5 - len(unused)
    assert [tokenizer.id_to_token(i) for i in range(5)] == [
        *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    ]


def test_every_text_is_kept(documents: list[str], tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = train_byte_level(documents[:30], 400)
    save_tokenizer(tokenizer, tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in [*documents, "[MASK] [unused0] x" * 3, "A" * 300]:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
        if "[MASK]" not in text:
            assert theirs(text, add_special_tokens=False)["input_ids"] == ids
            assert theirs.decode(ids) == text
    assert len(theirs) == tokenizer.get_vocab_size()
    inputs = theirs("of [MASK].")["input_ids"]
    assert inputs.count(theirs.mask_token_id) == 1
    # The mask takes the space before it, as " word" does.
    assert inputs[:-3] == theirs("of")["input_ids"][:-1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"algorithm": "unigram"}, ["--algorithm unigram", "wordpiece or bpe"]),
        ({"algorithm": "bpe", "lowercase": False}, ["--cased", "leave it out"]),
        ({"algorithm": "bpe", "keep_accents": True}, ["--keep-accents", "leave it out"]),
        ({"algorithm": "bpe", "vocab_size": 300}, ["--vocab-size 300", "from 320"]),
    ],
)
def test_wrong_options(
    source: Path, tmp_path: Path, options: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(InputError) as raised:
        prepare([source], tmp_path / "out", progress=False, **options)
    assert all(word in str(raised.value) for word in words)
    assert not (tmp_path / "out").exists()


# What a model does with it


@pytest.fixture(scope="module", params=["modernbert", "gpt2", "gemma", "nmt_unigram"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder with random weights and a tokenizer of this kind."""
    place = tmp_path_factory.mktemp(request.param)
    tokenizer = make_folder(request.param, place / "tokenizer")
    return make_hugging_face_folder(place / "hf", tokenizer)


def test_fill_mask_is_that_of_transformers(model: Path) -> None:
    from transformers import AutoTokenizer, BertForPreTraining

    loaded = fastbert.load(model)
    theirs = AutoTokenizer.from_pretrained(model)
    assert loaded.mask_token == theirs.mask_token
    stock = BertForPreTraining.from_pretrained(model).eval()
    for text in ("All {} are free, and {}.", "{} beings", "born free and  {} , in"):
        text = text.replace("{}", theirs.mask_token)
        inputs = theirs(text, return_tensors="pt")
        with torch.no_grad():
            logits = stock(**inputs).prediction_logits
        best = logits[inputs["input_ids"] == theirs.mask_token_id].softmax(-1).topk(3)
        found = loaded.fill_mask(text, 3)
        assert [[token for token, _ in row] for row in found] == [
            [theirs.decode([i]) for i in row] for row in best.indices.tolist()
        ]
        np.testing.assert_allclose([[p for _, p in row] for row in found], best.values, rtol=1e-4)
    with pytest.raises(InputError, match=r"no .* to fill"):
        loaded.fill_mask("no word is hidden")


def test_vectors_are_those_of_transformers(model: Path) -> None:
    """Also of long texts, of which only the beginning is tokenized."""
    from transformers import AutoTokenizer, BertModel

    texts = [*ARTICLES.values(), " ".join(ARTICLES.values()) * 30, "x" * 30_000, ""]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TextCutWarning)
        ours = fastbert.load(model).encode(texts, pool="cls")
    theirs, stock = AutoTokenizer.from_pretrained(model), BertModel.from_pretrained(model).eval()
    for text, vector in zip(texts, ours, strict=True):
        inputs = theirs(text, return_tensors="pt", truncation=True, max_length=32)
        with torch.no_grad():
            wanted = stock(**inputs).last_hidden_state[0, 0]
        np.testing.assert_allclose(vector, wanted, rtol=1e-3, atol=1e-4)


def test_export_gives_the_same_tokenizer(model: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from fastbert.tasks.export import export

    run = make_run(tmp_path / "run", model, kind="mlm")
    loaded = fastbert.load(run)
    export(loaded, tmp_path / "out", list(ARTICLES.values()))
    theirs, again = (AutoTokenizer.from_pretrained(p) for p in (model, tmp_path / "out"))
    for text in ARTICLES.values():
        assert again(text)["input_ids"] == theirs(text)["input_ids"]
    card = (tmp_path / "out/README.md").read_text()
    assert "The tokenizer is " in card and "WordPiece" not in card
    assert again.model_max_length == 32 and again.mask_token == theirs.mask_token


def test_another_tokenizer_beside_a_checkpoint_is_refused(tmp_path: Path) -> None:
    """A different order of merges gives other ids, although all tokens are the same."""
    from fastbert.checkpoints.model_folder import tokenizer_sha256

    folder = make_folder("modernbert", tmp_path / "a")
    before = load_tokenizer(folder)
    settings = json.loads((folder / "tokenizer.json").read_text())
    merges = settings["model"]["merges"]
    merges[0], merges[1] = merges[1], merges[0]
    (folder / "tokenizer.json").write_text(json.dumps(settings))
    after = load_tokenizer(folder)
    assert before.get_vocab() == after.get_vocab()
    assert tokenizer_sha256(before) != tokenizer_sha256(after)


def test_added_tokens_of_a_model_stay_whole_in_a_dataset(source: Path, tmp_path: Path) -> None:
    folder = make_folder("roberta", tmp_path / "t", [AddedToken("human beings", special=False)])
    prepare([source], tmp_path / "data", tokenizer=folder, workers=1, progress=False)
    tokenizer = load_tokenizer(tmp_path / "data/tokenizer")
    added = tokenizer.get_vocab()["human beings"]
    dataset = open_dataset(tmp_path / "data")
    found = [documents_of(dataset.split(name)) for name in ("train", "heldout")]
    assert sum(ids.count(added) for split in found for ids in split) == 1
    roles = roles_of(tokenizer)
    assert roles is not None and "human beings" not in roles.extra_special
    assert special_ids(tokenizer, "") == dataset.special
