"""Datasets are verified before they are read.

The tests cover what is checked, what a note lets a start skip, and the messages of training and
evaluation.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastbert.data import verify
from fastbert.data.dataset import open_dataset
from fastbert.data.verify import ids_below, offsets_to
from fastbert.durable import sealed, sha256_of
from fastbert.errors import InputError
from tests.ranks import Ranks
from tests.tiers import slow
from tests.trials import Laboratory, flip, wait_for

TOKENS, SENTENCES = "train/shard-00000.tokens", "train/shard-00000.sentences"


@pytest.fixture
def copy(old_dataset, tmp_path) -> Path:
    """A copy without the notes that other tests left."""
    return shutil.copytree(
        old_dataset.path, tmp_path / "copy", ignore=shutil.ignore_patterns(".verified-*")
    )


@pytest.fixture(scope="module")
def lab(tmp_path_factory, old_dataset) -> Laboratory:
    return Laboratory(tmp_path_factory.mktemp("verify"), old_dataset.path)


def forge(path: Path, name: str, change: Callable[[bytes], bytes]) -> None:
    """Change a file, and update every SHA-256."""
    (path / name).write_bytes(change((path / name).read_bytes()))
    manifest = json.loads((path / "manifest.json").read_bytes())
    del manifest["sha256"]
    manifest["files"][name] = {
        "size": (path / name).stat().st_size,
        "sha256": sha256_of(path / name),
    }
    (path / "manifest.json").write_bytes(sealed(manifest))


def numbers(kind: str, place: int, value: int) -> Callable[[bytes], bytes]:
    def change(data: bytes) -> bytes:
        array = np.frombuffer(data, kind).copy()
        array[place] = value
        return array.tobytes()

    return change


# What is checked


@given(
    offsets=st.lists(st.integers(1, 9), min_size=1, max_size=30).map(
        lambda steps: [0, *np.cumsum(steps).tolist()]
    ),
    place=st.integers(0, 30),
    value=st.integers(-(2**63), 2**63 - 1) | st.integers(-2, 300),
    piece=st.integers(1, 7),
)
def test_offsets_are_taken_or_not_as_by_their_definition(offsets, place, value, piece):
    total = offsets[-1]
    offsets[place % len(offsets)] = value
    valid = (
        offsets[0] == 0
        and offsets[-1] == total
        and all(a < b for a, b in itertools.pairwise(offsets))
    )
    look, array = offsets_to(total, len(offsets)), np.array(offsets, "<i8")
    found = [look(array[i : i + piece]) for i in range(0, len(array), piece)]
    assert (found == [None] * len(found)) == valid


@pytest.mark.parametrize("kind", ["<u2", "<u4"])
def test_ids_end_below_the_vocabulary(kind):
    assert ids_below(1000)(np.array([0, 999], kind)) is None
    assert (
        ids_below(1000)(np.array([1000, 0], kind))
        == "holds the token id 1,000, but the vocabulary has 1,000 tokens"
    )


def test_damage_is_found_in_any_piece_of_a_file(copy, monkeypatch):
    """There are far more pieces than threads, and the last number of a file is tested too."""
    monkeypatch.setattr(verify, "PIECE", 64)
    assert [done == total for done, total in open_dataset(copy, verify=False).verify()][-1]
    count = (copy / TOKENS).stat().st_size // 2
    for place in (0, 31, 32, count // 2, count - 1):
        shutil.copy(copy / TOKENS, copy / "whole")
        forge(copy, TOKENS, numbers("<u2", place, 1000))
        with pytest.raises(InputError, match=f"{TOKENS}: holds the token id 1,000"):
            open_dataset(copy)
        (copy / "whole").replace(copy / TOKENS)
        forge(copy, TOKENS, bytes)
    open_dataset(copy)


@pytest.mark.parametrize("step", [17, slow(1)])  # 17 has no factor in common with 8
def test_every_bit_of_a_manifest(copy, step):
    missed = []
    for bit in range(0, 8 * (copy / "manifest.json").stat().st_size, step):
        flip(copy / "manifest.json", bit)
        try:
            open_dataset(copy, verify=False)
            missed.append(bit)
        except InputError as error:
            assert str(copy / "manifest.json") in str(error)
        flip(copy / "manifest.json", bit)
    assert missed == []
    open_dataset(copy)


def test_a_file_that_cannot_be_read(copy):
    (copy / TOKENS).rename(copy / "elsewhere")
    with pytest.raises(InputError, match=f"{TOKENS}: part of the dataset, but cannot be read"):
        open_dataset(copy)


# What a note spares


def pieces(path: Path) -> int:
    """Return how many pieces a verification reports; 0 where it reads nothing."""
    return len(list(open_dataset(path, verify=False).verify()))


@pytest.fixture
def settled(monkeypatch) -> None:
    """Date the files back, as if they had been written long ago."""
    monkeypatch.setattr(verify, "SETTLED_S", -1e9)


def notes(path: Path) -> list[str]:
    return [file.name for file in path.iterdir() if file.name.startswith(".")]


def test_what_was_verified_is_not_read_again(copy, settled):
    assert pieces(copy) > 0
    assert pieces(copy) == 0 and notes(copy) == [f".verified-{os.geteuid()}"]


def test_a_dataset_that_was_just_written_is_read_again(copy):
    """An immediate change would not show in the times of its files."""
    assert pieces(copy) > 0
    assert pieces(copy) > 0 and notes(copy) == []


@pytest.mark.parametrize("name", [TOKENS, SENTENCES, "tokenizer/vocab.txt", "report.md"])
def test_who_writes_to_a_file_ends_the_note(copy, settled, name):
    """A single changed bit is enough, with size and time as before."""
    pieces(copy)
    before = (copy / name).stat()
    wait_for(
        lambda: (
            [flip(copy / name, 80), flip(copy / name, 80)]
            and (copy / name).stat().st_ctime_ns != before.st_ctime_ns
        )
    )
    flip(copy / name, 80)
    os.utime(copy / name, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(InputError, match=f"{name}: its SHA-256 differs"):
        open_dataset(copy)


def test_a_note_serves_a_day_and_its_owner_and_one_manifest(copy, settled, monkeypatch):
    pieces(copy)
    (note,) = (copy / name for name in notes(copy))
    assert pieces(copy) == 0
    os.utime(note, (time.time() - verify.VERIFIED_FOR_S - 1,) * 2)
    assert pieces(copy) > 0 and pieces(copy) == 0
    os.utime(note, (time.time() + 1000,) * 2)
    assert pieces(copy) > 0 and pieces(copy) == 0
    note.write_text(note.read_text().replace('"manifest": "', '"manifest": "0'))
    assert pieces(copy) > 0 and pieces(copy) == 0
    shutil.copytree(copy, copy.parent / "again")
    assert pieces(copy.parent / "again") > 0
    other = os.geteuid() + 1  # the note belongs to another user
    monkeypatch.setattr(os, "geteuid", lambda: other)
    note.rename(note.with_name(f".verified-{other}"))
    assert pieces(copy) > 0


def test_where_no_note_can_be_left(copy, settled):
    (copy / f".verified-{os.geteuid()}").mkdir()
    assert pieces(copy) > 0 and pieces(copy) > 0
    assert notes(copy) == [f".verified-{os.geteuid()}"]


def test_damage_leaves_no_note(copy, settled):
    flip(copy / TOKENS, 80)
    for _ in range(2):
        with pytest.raises(InputError, match="SHA-256"):
            open_dataset(copy)
    assert notes(copy) == []


# Messages of training and evaluation


def a_bit(path: Path) -> None:
    flip(path / TOKENS, 80)


def an_id(path: Path) -> None:
    forge(path, TOKENS, numbers("<u2", -1, 16457))


def an_offset(path: Path) -> None:
    forge(path, SENTENCES, numbers("<i8", 7, 1))


def a_baseline(path: Path) -> None:
    forge(path, "baselines.json", lambda data: data.replace(b"unigram", b"unicorn"))


@pytest.mark.parametrize(
    "world, damage, words",
    [
        (1, a_bit, f"{TOKENS}: its SHA-256"),
        (1, an_id, f"{TOKENS}: holds the token id 16,457"),
        (1, an_offset, SENTENCES),
        (1, a_baseline, "baselines"),
        slow(2, a_bit, f"{TOKENS}: its SHA-256"),
    ],
)
def test_a_damaged_dataset_is_refused_at_the_start(lab, copy, world, damage, words):
    """All ranks refuse it with the same message, which one process prints.

    The run folder is not created, and evaluation gives no result.
    """
    damage(copy)
    trial = lab.trial(f"data={copy}")
    of = lab.undisturbed(1, 0).run
    for command in (
        [*trial.command],
        ["evaluate", str(of), "--data", str(copy), "--sequences", "8"],
    ):
        with Ranks(command, trial.folder / command[0], world) as ranks:
            assert ranks.wait() == [2] * world, ranks.errors
            (line,) = ranks.errors.splitlines()
        assert words in line and "fastbert prepare" in line
        assert not trial.run.exists()


def test_a_run_is_refused_too_when_it_resumes(lab, copy):
    trial = lab.trial(f"data={copy}").copy_of(lab.undisturbed(1, 0))
    before = (trial.run / "metrics.jsonl").read_bytes()
    a_bit(copy)
    with trial.start() as ranks:
        assert ranks.wait() == [2] and TOKENS in ranks.errors
    assert (trial.run / "metrics.jsonl").read_bytes() == before
    a_bit(copy)
    trial.resume()


@pytest.mark.slow
def test_a_large_dataset_takes_longer_than_ranks_wait_for_each_other(lab, copy):
    """A sparse dataset of 10 TB: the ranks report progress and stay together.

    A signal to any of them stops all.
    """
    manifest = json.loads((copy / "manifest.json").read_bytes())
    del manifest["sha256"]
    size = 10**13
    os.truncate(copy / TOKENS, size)
    manifest["files"][TOKENS]["size"] = size
    for counts in (manifest["splits"]["train"], *manifest["splits"]["train"]["shards"]):
        counts["tokens"] = size // 2
    (copy / "manifest.json").write_bytes(sealed(manifest))
    forge(copy, SENTENCES, numbers("<i8", -1, size // 2))
    timeout_s = 2
    trial = lab.trial(f"data={copy}", f"runtime.timeout_s={timeout_s}")
    with trial.start(2) as ranks:
        wait_for(lambda: "verifying" in ranks[0].err.read_text() or ranks.codes != [None, None])
        time.sleep(2 * timeout_s)
        assert ranks.codes == [None, None], ranks.errors
        ranks[1].signal(signal.SIGTERM)
        assert ranks.wait() == [75, 75], ranks.errors
    assert (
        f"verifying {copy}: 0% of 10,000." in ranks[0].err.read_text()
        and "verifying" not in ranks[1].err.read_text()
    )
    assert not trial.run.exists()
