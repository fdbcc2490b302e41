"""A dataset in a bucket that is larger than a window, against the same on a disk."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from fastbert import storage
from fastbert.config import ObjectiveConfig
from fastbert.data import remote_blocks, remote_dataset
from fastbert.data.blocks import BLOCK_BYTES
from fastbert.data.dataset import TokenDataset, open_dataset
from fastbert.data.remote_dataset import dataset_copy, with_remote_blocks
from fastbert.data.window_order import Windows
from fastbert.errors import InputError
from fastbert.planning.reading import reading
from fastbert.storage import Url
from tests.block_dataset import in_blocks

WINDOW = 3 * BLOCK_BYTES  # three blocks, however small


@pytest.fixture(scope="module")
def local(small_dataset, tmp_path_factory) -> TokenDataset:
    return in_blocks(small_dataset, tmp_path_factory.mktemp("remote") / "dataset", 5, parts=2)


@pytest.fixture
def url(local, tmp_path, monkeypatch) -> Url:
    monkeypatch.setenv("FASTBERT_CACHE", str(tmp_path / "cache"))
    at = Url(f"memory://{tmp_path.name}")
    for entry in storage.objects(local.path):
        storage.put(local.path / entry.name, at / entry.name)
    return at


@pytest.fixture
def fetched(monkeypatch) -> Counter:
    """How often each range of an object was asked for."""
    seen, fetch_range = Counter(), storage.fetch_range

    def counted(at: Url, begin: int, end: int) -> bytes:
        if "train-" in at.name:
            seen[str(at), begin] += 1
        return fetch_range(at, begin, end)

    monkeypatch.setattr(storage, "fetch_range", counted)
    return seen


def opened(url: Url) -> TokenDataset:
    for _ in (copy := dataset_copy(url, WINDOW)):
        pass
    dataset = open_dataset(copy.path, verify=False)
    dataset.blocks["train"] = with_remote_blocks(dataset.blocks["train"], url)
    return dataset


def stream_of(dataset: TokenDataset) -> Windows:
    objective = ObjectiveConfig(kind="mlm")
    return Windows(dataset.blocks["train"], objective, 64, 1, WINDOW, str(dataset.path))


def read(stream: Windows, first: int, count: int) -> list[np.ndarray]:
    found = []
    for begin in range(first, first + count, 16):
        spans = stream.draw(np.arange(begin, min(begin + 16, first + count)))
        found += [spans.keys, stream.tokens(spans)]
    return found


def test_blocks_are_fetched_once_and_read_as_from_a_disk(local, url, fetched):
    dataset, blocks = opened(url), len(local.blocks["train"])
    assert sum(fetched.values()) == 0, "nothing to train on is copied before it is needed"
    ours, theirs = stream_of(dataset), stream_of(local)
    read(ours, 0, 1)
    assert sum(fetched.values()) <= 2 * 3, "the first window and the next one"
    count = 2 * len(theirs)  # two epochs
    for found, expected in zip(read(ours, 0, count), read(theirs, 0, count), strict=True):
        np.testing.assert_array_equal(found, expected)
    assert len(fetched) == blocks and set(fetched.values()) == {1}
    assert read(stream_of(opened(url)), 5, 1)[0] == read(theirs, 5, 1)[0]
    assert set(fetched.values()) == {1}, "another process of the machine finds them there"


def test_a_plan_knows_the_number_of_requests(local, url, monkeypatch):
    asked, cat_file = list[str](), MemoryFileSystem.cat_file

    def counted(self: MemoryFileSystem, path: str, *args: object, **more: object) -> bytes:
        asked.append(path)
        return cat_file(self, path, *args, **more)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", counted)
    expected = reading(local, WINDOW)
    stream = stream_of(opened(url))
    stream.blocks_of(0).fetch()
    assert len(asked) == expected.gets
    for i in range(1, stream.windows):
        stream.blocks_of(i).fetch()
    assert sum("train-" in path for path in asked) == expected.gets_per_epoch
    asked.clear()
    for _ in dataset_copy(url, 1 << 50):  # a dataset of one window is copied whole
        pass
    assert len(asked) == reading(local, 1 << 50).gets


def test_what_does_not_fit_the_limit_is_freed_behind(local, url, fetched, monkeypatch):
    monkeypatch.setattr(remote_dataset, "limit", lambda: 0)
    dataset, theirs = opened(url), stream_of(local)
    ours, count = stream_of(dataset), 2 * len(theirs)
    held = []
    for begin in range(0, count, 16):
        spans = ours.draw(np.arange(begin, begin + 16))
        expected = theirs.draw(np.arange(begin, begin + 16))
        np.testing.assert_array_equal(ours.tokens(spans), theirs.tokens(expected))
        held.append((dataset.path / remote_blocks.FETCHED).read_bytes().count(1))
    # Those behind, the ones in use, the next one; and the last window of an epoch may be larger.
    assert max(held) <= (remote_blocks.BEHIND + 3) * 3 + 2 < len(local.blocks["train"])
    blocks = len(local.blocks["train"])
    assert set(fetched.values()) <= {1, 2, 3} and len(fetched) == blocks
    assert sum(fetched.values()) <= 2 * blocks + 5, "once an epoch, and the first of a third one"


def test_a_damaged_copy_is_fetched_again_and_a_damaged_object_is_named(local, url, fetched):
    dataset = opened(url)
    read(stream_of(dataset), 0, 1)
    for shard in dataset.path.glob("part-*/train-*"):
        data = bytearray(shard.read_bytes())
        shard.write_bytes(bytes(len(data)))  # as after a crash of the machine
    read(stream_of(opened(url)), 0, 1)
    assert max(fetched.values()) == 2

    piece = stream_of(dataset).blocks_of(0).pieces()[0]
    data = bytearray(storage.read(url / piece.name))
    data[piece.offset + 9] ^= 1
    storage.write(url / piece.name, bytes(data))
    dataset.blocks["train"].drop(again=True)
    with pytest.raises(InputError, match=f"{piece.name}.*the block at byte {piece.offset:,}"):
        read(stream_of(dataset), 0, 1)


def test_a_store_that_fails_is_one_line(url, monkeypatch):
    stream = stream_of(opened(url))

    def fails(at: Url, begin: int, end: int) -> bytes:
        raise OSError(5, "the store is down", str(at))

    monkeypatch.setattr(storage, "fetch_range", fails)
    with pytest.raises(InputError, match=r"memory://.*/train-\d+: the store is down"):
        read(stream, 0, 1)


def test_a_dataset_of_one_window_is_copied_whole(local, url):
    for _ in (copy := dataset_copy(url, 1 << 40)):
        pass
    assert not (copy.path / remote_blocks.FETCHED).exists()
    for _ in open_dataset(copy.path).verify():
        pass


def test_lengths_that_the_table_does_not_have_are_refused(url):
    blocks = opened(url).blocks["train"]
    with pytest.raises(InputError, match=r"batch.max_length = 100: memory://.*; choose one of"):
        Windows(blocks, ObjectiveConfig(kind="mlm"), 100, 1, WINDOW, "")
