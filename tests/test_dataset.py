"""A dataset reads back as written, over any number of shards; an incomplete one is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastbert.data.dataset import TokenDataset, open_dataset
from fastbert.data.manifest import token_dtype
from fastbert.data.shard_split import ShardSplit
from fastbert.durable import sealed, sha256_of
from fastbert.errors import InputError
from tests.shard_writer import ShardWriter

documents_of_sentences = st.lists(
    st.lists(st.lists(st.integers(0, 999), min_size=1, max_size=5), min_size=1, max_size=4),
    min_size=1,
    max_size=12,
)


@settings(max_examples=60)
@given(
    documents=documents_of_sentences,
    shard_tokens=st.sampled_from([1, 4, 20, 1000]),
    vocab_size=st.sampled_from([1000, 1 << 16, 70_000]),
)
def test_shards_read_as_one(
    tmp_path_factory: pytest.TempPathFactory,
    documents: list[list[list[int]]],
    shard_tokens: int,
    vocab_size: int,
) -> None:
    folder = tmp_path_factory.mktemp("split") / "train"
    writer = ShardWriter(folder, token_dtype(vocab_size), shard_tokens)
    for document in documents:
        tokens = np.array([token for sentence in document for token in sentence])
        writer.add(
            tokens, np.array([len(sentence) for sentence in document]), np.array([len(document)])
        )
    writer.close()
    split = ShardSplit(folder, writer.shards, token_dtype(vocab_size))
    last = sum(len(sentence) for sentence in documents[-1])
    assert (len(writer.shards) > 1) == (split.tokens - last >= shard_tokens)

    sentences = [sentence for document in documents for sentence in document]
    tokens = [token for sentence in sentences for token in sentence]
    assert (split.documents, split.sentences, split.tokens) == (
        len(documents),
        len(sentences),
        len(tokens),
    )
    first_sentence = np.cumsum([0] + [len(document) for document in documents])
    first_token = np.cumsum([0] + [len(sentence) for sentence in sentences])
    order = np.random.default_rng(0).permutation  # indices come in any order, and more than once
    for read, expected in [
        (split.first_sentence, first_sentence),
        (split.first_token, first_token),
    ]:
        indices = order(np.repeat(np.arange(len(expected)), 2))
        assert read(indices).tolist() == expected[indices].tolist()
        assert read(indices).dtype == np.int64
    indices = order(len(sentences))
    spans = split.gather(first_token[indices], np.diff(first_token)[indices])
    assert spans.tolist() == [token for i in indices for token in sentences[i]]
    assert spans.dtype == np.int64
    assert split.gather(np.zeros(0, np.int64), np.zeros(0, np.int64)).tolist() == []
    assert split.gather(first_token[:-1], np.zeros(len(sentences), np.int64)).tolist() == []


def test_bytes_on_disk(tmp_path: Path) -> None:
    """The format is that of the module's docstring, read without the module."""
    writer = ShardWriter(tmp_path / "train", token_dtype(1 << 16), 100)
    writer.add(np.array([65535, 7, 8, 9]), np.array([1, 2, 1]), np.array([2, 1]))
    writer.add(np.array([1, 2]), np.array([2]), np.array([1]))
    writer.close()
    read = {
        kind: (tmp_path / "train" / f"shard-00000.{kind}").read_bytes()
        for kind in ("tokens", "sentences", "documents")
    }
    assert np.frombuffer(read["tokens"], "<u2").tolist() == [65535, 7, 8, 9, 1, 2]
    assert np.frombuffer(read["sentences"], "<i8").tolist() == [0, 1, 3, 4, 6]
    assert np.frombuffer(read["documents"], "<i8").tolist() == [0, 2, 3, 4]
    assert token_dtype((1 << 16) + 1) == np.dtype("<u4")


def test_dataset(old_dataset: TokenDataset) -> None:
    vocabulary = (old_dataset.tokenizer_dir / "vocab.txt").read_text(encoding="utf-8").split("\n")
    special = old_dataset.special
    assert [
        vocabulary[i] for i in (special.pad, special.unk, special.cls, special.sep, special.mask)
    ] == [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
    ]
    assert old_dataset.vocab_size == len(vocabulary) - 1 == 1000
    assert sorted(
        [
            *old_dataset.ordinary_ids,
            special.pad,
            special.unk,
            special.cls,
            special.sep,
            special.mask,
        ]
    ) == list(range(1000))
    assert [vocabulary[i] for i in np.flatnonzero(old_dataset.continues_word)] == [
        token for token in vocabulary if token.startswith("##")
    ]
    assert old_dataset.continues_word.shape == (1000,)
    assert len(old_dataset.sha256) == 64
    for name in ("train", "heldout"):
        split, counts = old_dataset.split(name), old_dataset.manifest["splits"][name]
        assert (split.documents, split.sentences, split.tokens) == (
            counts["documents"],
            counts["sentences"],
            counts["tokens"],
        )
        tokens = split.gather(np.zeros(1, np.int64), np.array([split.tokens]))
        assert tokens.min() >= 0 and tokens.max() < 1000
        assert not np.isin(tokens, [special.pad, special.cls, special.sep, special.mask]).any()
        assert (np.diff(split.first_token(np.arange(split.sentences + 1))) > 0).all()
        assert (np.diff(split.first_sentence(np.arange(split.documents + 1))) > 0).all()


def edit(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Damage the manifest, and update its own SHA-256."""

    def damage(path: Path) -> None:
        manifest = json.loads((path / "manifest.json").read_text())
        del manifest["sha256"]
        change(manifest)
        (path / "manifest.json").write_bytes(sealed(manifest))

    return damage


def forge(
    name: str, change: Callable[[np.ndarray], object], dtype: str = "<i8"
) -> Callable[[Path], None]:
    """Change numbers in a file, and update every SHA-256."""

    def damage(path: Path) -> None:
        numbers = np.fromfile(path / name, dtype)
        change(numbers)
        numbers.tofile(path / name)
        edit(lambda manifest: manifest["files"][name].update(sha256=sha256_of(path / name)))(path)

    return damage


def write(name: str, text: str) -> Callable[[Path], None]:
    """Replace a whole text file in the same way."""

    def damage(path: Path) -> None:
        (path / name).write_text(text, encoding="utf-8")
        edit(
            lambda manifest: manifest["files"][name].update(
                sha256=sha256_of(path / name), size=len(text.encode())
            )
        )(path)

    return damage


def more_tokens(path: Path) -> None:
    """Give the dataset a larger vocabulary than the tokenizer's.

    A model with the tokenizer's vocabulary has embeddings for its own tokens only.
    """
    words = (path / "tokenizer/vocab.txt").read_text(encoding="utf-8")
    write("tokenizer/vocab.txt", words + "".join(f"more{i}\n" for i in range(4000)))(path)
    edit(lambda manifest: manifest.update(vocab_size=5000))(path)
    forge("heldout/shard-00000.tokens", put(3, 4999), "<u2")(path)


def put(place: int, value: int) -> Callable[[np.ndarray], object]:
    return lambda numbers: numbers.__setitem__(place, value)


def cut(name: str) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        (path / name).write_bytes((path / name).read_bytes()[:-2])

    return damage


def flip(name: str, byte: int = 100) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        data = bytearray((path / name).read_bytes())
        data[byte] ^= 1
        (path / name).write_bytes(data)

    return damage


TRAIN = "train/shard-00000."


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (shutil.rmtree, ["no such dataset", "fastbert prepare"]),
        (
            lambda path: (path / "manifest.json").unlink(),
            ["not a complete dataset", "manifest.json"],
        ),
        (lambda path: (path / "manifest.json").write_text('{"format": 1'), ["not the manifest"]),
        (lambda path: (path / "manifest.json").write_bytes(b"\xff\xfe"), ["not the manifest"]),
        (lambda path: (path / "manifest.json").write_text("[]"), ["not the manifest"]),
        (
            edit(lambda manifest: manifest.update(format=1)),
            ["format = 1", "reads formats 2 and 3", "fastbert prepare"],
        ),
        (edit(lambda manifest: manifest.pop("splits")), ["a part is missing", "splits"]),
        (edit(lambda manifest: manifest["special"].update(mask=1000)), ["special ids"]),
        (edit(lambda manifest: manifest.update(vocab_size=True)), ["vocab_size"]),
        (
            edit(lambda manifest: manifest["splits"]["train"].update(tokens=1)),
            ["'train'", "sum of its shards"],
        ),
        (
            edit(lambda manifest: manifest["splits"]["heldout"].update(shards=[], documents=0)),
            ["'heldout'", "above 0"],
        ),
        (
            edit(lambda manifest: manifest["files"].pop("baselines.json")),
            ["list of files", "baselines.json"],
        ),
        (
            edit(lambda manifest: manifest["files"].update({"../x": {"size": 1, "sha256": ""}})),
            ["list of files", "../x"],
        ),
        (
            edit(lambda manifest: manifest["files"]["train/shard-00000.tokens"].update(size=4)),
            ["shard-00000.tokens", "contradicts"],
        ),
        (
            lambda path: (path / "heldout/shard-00000.sentences").unlink(),
            ["shard-00000.sentences", "cannot be read"],
        ),
        (cut("train/shard-00000.tokens"), ["shard-00000.tokens", "cut short"]),
        (cut("tokenizer/vocab.txt"), ["vocab.txt", "cut short"]),
        (
            flip(f"{TRAIN}tokens"),
            ["train/shard-00000.tokens", "SHA-256", "copy it again", "fastbert prepare"],
        ),
        (flip(f"{TRAIN}sentences"), ["train/shard-00000.sentences", "SHA-256"]),
        (flip("heldout/shard-00000.documents"), ["heldout/shard-00000.documents", "SHA-256"]),
        (flip("tokenizer/tokenizer.json"), ["tokenizer/tokenizer.json", "SHA-256"]),
        (flip("baselines.json", 5), ["baselines.json", "SHA-256"]),
        (flip("manifest.json", -5), ["manifest.json", "its own SHA-256"]),
        # A change of a file may come with a matching SHA-256.
        (
            forge(f"{TRAIN}tokens", put(7, 1000), "<u2"),
            ["train/shard-00000.tokens: holds the token id 1,000", "has 1,000 tokens"],
        ),
        (
            forge(f"{TRAIN}tokens", put(-1, 16457), "<u2"),
            ["train/shard-00000.tokens: holds the token id 16,457"],
        ),
        (
            forge("heldout/shard-00000.tokens", put(0, 65535), "<u2"),
            ["heldout/shard-00000.tokens: holds the token id 65,535"],
        ),
        (
            forge(f"{TRAIN}sentences", put(0, 1)),
            ["train/shard-00000.sentences: offset number 0 is 1;"],
        ),
        (forge(f"{TRAIN}sentences", put(5, 0)), ["offset number 5 is 0; they must rise from 0 to"]),
        (forge(f"{TRAIN}sentences", put(5, 1 << 40)), ["offset number 5 is 1,099,511,627,776"]),
        (
            forge(f"{TRAIN}sentences", put(5, -(1 << 63))),
            ["offset number 5 is -9,223,372,036,854,775,808"],
        ),
        (
            forge(f"{TRAIN}sentences", lambda numbers: numbers.__setitem__(-1, numbers[-1] + 1)),
            ["train/shard-00000.sentences: offset number"],
        ),
        (
            forge(f"{TRAIN}sentences", lambda numbers: numbers.__setitem__(-1, numbers[-1] - 1)),
            ["train/shard-00000.sentences: offset number"],
        ),
        (
            forge(f"{TRAIN}sentences", lambda numbers: numbers.__setitem__(5, numbers[4])),
            ["train/shard-00000.sentences: offset number 5"],
        ),
        (
            forge("heldout/shard-00000.documents", put(1, 1 << 40)),
            ["heldout/shard-00000.documents: offset number 1"],
        ),
        (write("tokenizer/vocab.txt", "[PAD]\n"), ["vocab.txt: 1 tokens, the manifest says 1,000"]),
        (
            edit(lambda manifest: manifest["special"].update(mask=3, sep=4)),
            ["tokenizer", "sep=3, mask=4", "sep=4, mask=3"],
        ),
        (more_tokens, ["tokenizer: 1,000 tokens, the manifest says 5,000"]),
        (write("baselines.json", "[1]"), ["baselines.json", '"unigram"', "fastbert prepare"]),
        (write("baselines.json", '{"left_bigram": 1.0}'), ["baselines.json", '"unigram"']),
        (write("baselines.json", '{"unigram": "words"}'), ["baselines.json", '"unigram"']),
        (write("baselines.json", '{"unigram": NaN}'), ["baselines.json", '"unigram"']),
        (write("baselines.json", "not JSON"), ["baselines.json", '"unigram"']),
    ],
)
def test_broken_dataset(
    old_dataset: TokenDataset, tmp_path: Path, damage: Callable[[Path], Any], words: list[str]
) -> None:
    path = tmp_path / "copy"
    shutil.copytree(old_dataset.path, path)
    assert open_dataset(path, verify=True).sha256 == old_dataset.sha256
    damage(path)
    with pytest.raises(InputError) as raised:
        open_dataset(path, verify=True)
    message = str(raised.value)
    assert all(word in message for word in [str(path), *words]) and "\n" not in message, message


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 2000) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)


@settings(max_examples=200)
@given(data=st.data())
def test_rubbish_in_the_manifest(
    old_dataset: TokenDataset, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Any value of the manifest is replaced by another; the dataset opens or says why not."""
    manifest = json.loads((old_dataset.path / "manifest.json").read_text())
    del manifest["sha256"]
    place: Any = manifest
    while True:
        key = (
            data.draw(st.sampled_from(sorted(place)))
            if isinstance(place, dict)
            else data.draw(st.integers(0, len(place) - 1))
        )
        if not place[key] or not isinstance(place[key], (dict, list)) or data.draw(st.booleans()):
            break
        place = place[key]
    place[key] = data.draw(json_values)
    path = tmp_path_factory.mktemp("rubbish")
    for name in ("train", "heldout", "tokenizer", "baselines.json", "report.json", "report.md"):
        (path / name).symlink_to(old_dataset.path / name)
    (path / "manifest.json").write_bytes(sealed(manifest))
    try:
        open_dataset(path).split("train")
    except InputError as error:
        assert str(path) in str(error) and "\n" not in str(error)
