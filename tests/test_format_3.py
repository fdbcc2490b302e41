"""A dataset in blocks opens and verifies, reads as the same text in format 2, or is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastbert.config import ObjectiveConfig
from fastbert.data.block_table import COUNTS
from fastbert.data.blocks import BLOCK, BLOCK_BYTES, layout
from fastbert.data.dataset import TokenDataset, open_dataset
from fastbert.data.split import Split
from fastbert.data.window_order import Windows, open_stream
from fastbert.durable import sealed, sha256_of
from fastbert.errors import InputError
from tests.block_dataset import in_blocks

TABLE, SHARD = "part-00001/blocks", "part-00000/train-00001"


@pytest.fixture(scope="module")
def original(small_dataset, tmp_path_factory) -> TokenDataset:
    """The small dataset in some 60 blocks, 5 in a shard, and in two parts."""
    return in_blocks(small_dataset, tmp_path_factory.mktemp("blocks") / "dataset", 12, 5, 2)


@pytest.fixture
def copy(original, tmp_path) -> Path:
    return shutil.copytree(original.path, tmp_path / "copy")


def everything(split: Split) -> list[list[int]]:
    return [
        split.first_sentence(np.arange(split.documents + 1)).tolist(),
        split.first_token(np.arange(split.sentences + 1)).tolist(),
        split.gather(
            *(lambda f: (f[:-1], np.diff(f)))(
                split.first_token(split.first_sentence(np.arange(split.documents + 1)))
            )
        ).tolist(),
    ]


def test_it_reads_as_the_same_text(small_dataset, original):
    for name in ("train", "heldout"):
        assert everything(original.split(name)) == everything(small_dataset.split(name))
    assert len(original.blocks["train"]) > 20
    assert original.baselines == small_dataset.baselines
    assert original.special == small_dataset.special
    assert [report.is_file() for report in original.reports] == [True, True]


def test_two_files_are_opened_however_many_shards_there_are(small_dataset, tmp_path):
    """The manifest and the table; and the shards of a window when it is opened."""
    path = in_blocks(small_dataset, tmp_path / "dataset", 3, 1).path
    opened, watching = list[str](), [True]

    def hook(event: str, args: tuple[object, ...]) -> None:
        if event == "open" and watching and str(args[0]).startswith(str(path)):
            opened.append(Path(str(args[0])).relative_to(path).as_posix())

    sys.addaudithook(hook)  # it stays, and sees nothing when `watching` is empty
    dataset = open_dataset(path, verify=False)
    assert len(dataset.blocks["train"]) == len(list(path.glob("part-00000/train-*"))) > 100
    stream = open_stream(dataset, ObjectiveConfig(kind="mlm"), 64, 1, 8 * BLOCK_BYTES)
    assert sorted(opened) == ["manifest.json", "part-00000/blocks"]
    assert isinstance(stream, Windows)
    stream.draw(np.arange(4))
    if stream._ahead:
        stream._ahead.result()
    watching.clear()
    shards = {name for name in opened if "train-" in name}
    assert len(shards) == 16


def test_all_bytes_are_verified(copy):
    done = list(open_dataset(copy, verify=False).verify())
    manifest = json.loads((copy / "manifest.json").read_text())
    table = np.concatenate([np.fromfile(copy / f"part-0000{i}/blocks", BLOCK) for i in (0, 1)])
    # A block has its ids and bits of its offsets, and the other files have the manifest's sizes.
    files = sum(entry["size"] for entry in manifest["files"].values())
    assert done[-1][0] == done[-1][1] > files + 2 * int(table["tokens"].sum())


def edit(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        manifest = json.loads((path / "manifest.json").read_text())
        del manifest["sha256"]
        change(manifest)
        (path / "manifest.json").write_bytes(sealed(manifest))

    return damage


def flip(name: str, byte: int) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        data = bytearray((path / name).read_bytes())
        data[byte] ^= 1
        (path / name).write_bytes(data)

    return damage


def table(change: Callable[[np.ndarray], object]) -> Callable[[Path], None]:
    """Change a table, and update its SHA-256."""

    def damage(path: Path) -> None:
        entries = np.fromfile(path / TABLE, BLOCK)
        change(entries)
        entries.tofile(path / TABLE)
        edit(lambda manifest: manifest["files"][TABLE].update(sha256=sha256_of(path / TABLE)))(path)

    return damage


def put(column: str, place: int, value: int) -> Callable[[Path], None]:
    return table(lambda entries: entries[column].__setitem__(place, value))


def forge(section: str, place: int, value: int) -> Callable[[Path], None]:
    """Change a number of the second block of a part, and update every SHA-256."""

    def damage(path: Path) -> None:
        entries = np.fromfile(path / TABLE, BLOCK)
        entry = entries[1]
        documents, sentences, tokens = (int(entry[name]) for name in COUNTS)
        at = layout(documents, sentences, tokens, 2, False)
        shard = path / "part-00001/train-00000"
        data = bytearray(shard.read_bytes())
        block = np.frombuffer(data, np.uint8)[entry["offset"] :][: at.size]
        kind = {"documents": "<u4", "groups": "<u4", "sentences": "<u2", "ids": "<u2"}[section]
        size = np.dtype(kind).itemsize
        start = getattr(at, section) + place * size
        block[start : start + size] = np.array([value], kind).view("u1")
        digest = hashlib.sha256(block.tobytes()).digest()
        shard.write_bytes(data)
        table(lambda all: all["sha256"].__setitem__(1, np.frombuffer(digest, np.uint8)))(path)

    return damage


def first_split(manifest: dict[str, Any]) -> dict[str, Any]:
    return manifest["parts"][0]["splits"]["train"]


@pytest.mark.parametrize(
    "damage, words",
    [
        (edit(lambda m: m.update(format=4)), ["format = 4", "formats 2 and 3"]),
        (edit(lambda m: m.pop("parts")), ["a part is missing"]),
        (edit(lambda m: m["baselines"].pop("unigram")), ["baselines"]),
        (edit(lambda m: m["baselines"].update(unigram="2")), ["baselines"]),
        (edit(lambda m: first_split(m).update(tokens=1)), ["part-00000/blocks", "says 1"]),
        (edit(lambda m: first_split(m).update(tokens=-1)), ["'train'", "whole numbers"]),
        (edit(lambda m: first_split(m)["shards"].pop()), ["part-00000/blocks", "its shards"]),
        (edit(lambda m: first_split(m)["shards"].__setitem__(0, 5)), ["other sizes"]),
        (edit(lambda m: m["files"].pop(TABLE)), ["list of files", TABLE]),
        (edit(lambda m: m.update(parts=[])), ["'train' has no text"]),
        (lambda p: (p / TABLE).unlink(), [TABLE, "cannot be read"]),
        (lambda p: (p / SHARD).unlink(), [SHARD, "cannot be read"]),
        (flip(TABLE, 50), [TABLE, "SHA-256"]),
        (flip(SHARD, 0), [f"{SHARD}: the block at byte 0: its SHA-256"]),
        (flip(SHARD, 65_600), [f"{SHARD}: the block at byte 65,536: its SHA-256"]),
        (flip("part-00001/heldout-00000", 9), ["heldout-00000: the block at byte 0"]),
        (flip("part-00001/report.md", 9), ["part-00001/report.md: its SHA-256"]),
        (flip("tokenizer/vocab.txt", 9), ["vocab.txt: its SHA-256"]),
        (table(lambda t: t.__setitem__(slice(None), t[::-1].copy())), [TABLE, "order of splits"]),
        (put("shard", 0, 1), [TABLE, "order of its shards"]),
        (put("shard", -1, 9), [TABLE, "order of its shards"]),
        (put("offset", 1, 0), [TABLE, "overlap"]),
        (put("offset", 1, 1), [TABLE, "not aligned"]),
        (put("offset", 4, 1 << 40), [TABLE, "other sizes"]),
        (put("documents", 1, 0), [TABLE, "documents"]),
        (table(lambda t: t["documents"].__iadd__(1 << 20)), [TABLE, "documents in the split"]),
        (
            forge("ids", 5, 1000),
            ["the block at byte 65,536: holds the token id 1,000"],
        ),
        (forge("documents", 3, 1), ["the block at byte 65,536: the offset of document 3 is 1;"]),
        (forge("documents", 0, 1), ["the offset of document 0 is 1; they must rise from 0"]),
        (forge("sentences", 7, 0), ["the offset of sentence 7 is 0;"]),
        (forge("groups", 0, 1 << 31), ["the offset of sentence", "they must rise from 0 to"]),
    ],
)
def test_damage_is_named(copy, damage, words):
    damage(copy)
    with pytest.raises(InputError) as raised:
        open_dataset(copy)
    message = str(raised.value)
    assert all(word in message for word in [str(copy), *words]) and "\n" not in message, message
