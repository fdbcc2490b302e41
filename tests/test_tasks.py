"""Whoever runs the tasks of `prepare`, and however often, the dataset is the same."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from fastbert.data.dataset import open_dataset
from fastbert.data.prepare import prepare, prepare_share
from fastbert.errors import InputError
from tests.prepared import command, files_of, small_pieces
from tests.tiers import slow

__all__ = ["small_pieces"]

OPTIONS: dict[str, Any] = {"vocab_size": 1000, "progress": False}


@pytest.fixture(scope="module")
def text(english_documents: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of 0.4 MB, with copies; in small pieces it has eight."""
    path = tmp_path_factory.mktemp("text") / "a.jsonl"
    lines = [json.dumps({"text": document}) for document in english_documents]
    path.write_text("\n".join([*lines, *lines[:50]]) + "\n")
    return path


@pytest.fixture(scope="module")
def wanted(text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one process makes of it at once."""
    out = tmp_path_factory.mktemp("wanted") / "dataset"
    subprocess.run(command(text, out, workers=1, drop_copies=True, **OPTIONS), check=True)
    return files_of(out)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("shares", [1, 2, 7])
def test_shares_of_tasks(text: Path, wanted: dict[str, bytes], tmp_path: Path, shares: int) -> None:
    """Each share run in any order, until nothing is missing."""
    out, draw = tmp_path / "dataset", random.Random(shares)
    said = list[str]()
    for _ in range(4):
        for share in draw.sample(range(shares), shares):
            said.append(
                prepare_share([text], out, f"{share}/{shares}", drop_copies=True, **OPTIONS)
            )
    assert files_of(out) == wanted
    assert said[-1] == f"{out}: is there; nothing is missing"
    assert f"{out}: ready" in said and any("all 8 pieces are there" in line for line in said)
    if shares > 1:
        assert (
            f"of 8 pieces are missing still; when no task is running, run --task 0/{shares}"
            in (said[0])
        )
    assert [path.name for path in tmp_path.iterdir()] == ["dataset"]


@pytest.mark.usefixtures("small_pieces")
def test_a_plain_call_finishes_what_tasks_began(
    text: Path, wanted: dict[str, bytes], tmp_path: Path
) -> None:
    prepare_share([text], tmp_path / "dataset", "1/3", drop_copies=True, **OPTIONS)
    done = {p.name: p.stat().st_ino for p in (tmp_path / "dataset.work").iterdir()}
    assert sum(name.startswith("piece-") for name in done) == 2 * 3  # 1, 4 and 7 of 8
    prepare([text], tmp_path / "dataset", workers=2, drop_copies=True, **OPTIONS)
    assert files_of(tmp_path / "dataset") == wanted


@pytest.mark.parametrize("task", ["", "3", "3/3", "-1/3", "a/b", "1/0"])
def test_wrong_shares(text: Path, tmp_path: Path, task: str) -> None:
    with pytest.raises(InputError, match=r"must be I/N with I from 0 to N - 1"):
        prepare_share([text], tmp_path / "dataset", task)


def replaced(name: str, changes: dict[str, str]) -> str:
    for before, after in changes.items():
        name = name.replace(before, after)
    return name


@pytest.mark.parametrize(("first", "kills"), [(0, 1), slow(1, 20)])
def test_killed_at_any_moment(
    text: Path, wanted: dict[str, bytes], tmp_path: Path, first: int, kills: int
) -> None:
    """SIGKILL at random moments; the next call makes what is missing, and nothing twice."""
    out, draw = tmp_path / "dataset", random.Random(first)
    line = command(text, out, workers=2, drop_copies=True, **OPTIONS)
    began = time.monotonic()
    subprocess.run(line, check=True)
    whole_s = time.monotonic() - began
    assert files_of(out) == wanted
    for number in range(kills):
        out, work = tmp_path / f"{number}", tmp_path / f"{number}.work"
        line = command(text, out, workers=2, drop_copies=True, **OPTIONS)
        process = subprocess.Popen(line, start_new_session=True, stderr=subprocess.DEVNULL)
        time.sleep(draw.uniform(0.2, 1) * whole_s)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        # The work folder is removed last, when it is empty.
        if (out / "manifest.json").exists() and not any(work.glob("*")):
            assert files_of(out) == wanted
            continue  # it had just finished
        # Results that are complete, with their inodes: one that is made again has another.
        found = [path for path in work.glob("[!.]*-*.*") if path.is_file()]
        done = {path.name: path.stat().st_ino for path in found}
        # Of a result in two files the first one counts when the second one is there.
        second = {".arrays": ".npz", "dropped-": "settled-", ".npy": ".npz"}
        done = {name: i for name, i in done.items() if replaced(name, second) in done}
        watched = subprocess.Popen(line)
        while watched.poll() is None:
            for name, inode in done.items():
                try:
                    assert (work / name).stat().st_ino == inode, name
                except FileNotFoundError:  # everything is removed at the end
                    assert (out / "manifest.json").exists()
            time.sleep(0.01)
        assert watched.returncode == 0 and not work.exists()
        assert files_of(out) == wanted


@pytest.mark.usefixtures("small_pieces")
def test_a_damaged_result_is_made_again(
    text: Path, wanted: dict[str, bytes], tmp_path: Path
) -> None:
    """One bit in any result, also where the size and the time of the file do not tell."""
    prepare_share([text], tmp_path / "dataset", "0/1", drop_copies=True, **OPTIONS)
    prepare_share([text], tmp_path / "dataset", "0/1", drop_copies=True, **OPTIONS)
    work = tmp_path / "dataset.work"
    results = [path for path in sorted(work.rglob("*")) if path.is_file()]
    kinds = {path.name.partition("-")[0] + path.suffix for path in results}
    assert kinds == {
        "vocabulary.json",
        "piece.arrays",
        "piece.npz",
        "settled.npz",
        "dropped.npy",
        "shard.npz",
        "train",
    }
    for path in results:
        if path.name.startswith("dropped"):
            continue  # remade with what is beside it
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 4
        path.write_bytes(data)
    prepare([text], tmp_path / "dataset", workers=1, drop_copies=True, **OPTIONS)
    assert files_of(tmp_path / "dataset") == wanted


@pytest.mark.usefixtures("small_pieces")
def test_a_changed_file_makes_only_its_pieces_again(
    english_documents: list[str], tmp_path: Path, wanted: dict[str, bytes]
) -> None:
    """And so does an option: only what depends on it is made again."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(12):
        some = english_documents[number * 50 : (number + 1) * 50]
        (folder / f"{number}.txt").write_text("\n\n".join(some))
    out, work = tmp_path / "dataset", tmp_path / "dataset.work"
    tokenizer = tmp_path / "vocab.txt"
    tokenizer.write_bytes(wanted["tokenizer/vocab.txt"])
    options: dict[str, Any] = {"tokenizer": tokenizer, "progress": False, "workers": 1}

    def made() -> dict[str, int]:
        prepare_share([folder], out, "0/1", **options)
        return {path.name: path.stat().st_ino for path in work.glob("piece-*.npz")}

    before = made()
    changed = folder / "3.txt"
    changed.write_text(changed.read_text().replace("e", "i"))
    after = made()
    new = after.keys() - before.keys()
    assert 0 < len(new) <= 2 < len(before)
    assert all(after[name] == before[name] for name in before)
    assert made() == after
    options["heldout"] = 0.2  # no piece depends on it
    prepare([folder], out, **options)
    at_once = tmp_path / "at once"
    prepare([folder], at_once, **options)
    assert files_of(out) == files_of(at_once)


@pytest.mark.usefixtures("small_pieces")
def test_two_at_once(text: Path, tmp_path: Path) -> None:
    """The second call finds the first one at work, and says so."""
    out = tmp_path / "dataset"
    first = subprocess.Popen(command(text, out, workers=1, **OPTIONS))
    while not (tmp_path / "dataset.work").is_dir() or not any(
        (tmp_path / "dataset.work").iterdir()
    ):
        time.sleep(0.01)
    with pytest.raises(InputError, match="another process works there"):
        prepare([text], out, workers=1, **OPTIONS)
    assert first.wait() == 0
    open_dataset(out, verify=True)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("suffix", ["jsonl", "txt"])
def test_a_source_beside_the_results(
    english_documents: list[str], tmp_path: Path, suffix: str
) -> None:
    """Results in the folder of the sources are no text."""
    (tmp_path / f"a.{suffix}").write_text(
        "".join(json.dumps({"text": document}) + "\n" for document in english_documents)
    )
    options = {**OPTIONS, "text_format": "jsonl" if suffix == "jsonl" else "lines"}
    prepare_share([tmp_path], tmp_path / "dataset", "0/1", **options)
    report = prepare([tmp_path], tmp_path / "dataset", **options)
    assert report.figures["files"] == 1
