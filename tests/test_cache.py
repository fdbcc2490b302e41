"""Copies are made once per machine, and removed when they are unused and room is needed."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from fastbert import cache
from fastbert.cache import Copy, workspace
from fastbert.errors import InputError
from tests.ranks import environment

# Makes or uses a copy of 1,000 bytes in two parts; says so, and waits for a line between them.
CHILD = """
import sys
from fastbert.cache import Copy
def make(folder):
    (folder / "a").write_bytes(b"x" * 500)
    print("making", flush=True)
    yield 500
    sys.stdin.readline()
    (folder / "b").write_bytes(b"y" * 500)
    yield 500
copy = Copy("kind", sys.argv[1], 1000, make)
for _ in copy: pass
print(sorted(p.name for p in copy.path.iterdir()), flush=True)
sys.stdin.readline()
"""


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv(cache.FOLDER, str(tmp_path))
    monkeypatch.setattr(cache, "_held", {})
    return tmp_path


def child(key: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, key],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
        bufsize=1,
    )


def say(process: subprocess.Popen[str]) -> None:
    process.stdin.write("\n")
    process.stdin.flush()


def test_one_process_makes_a_copy_and_the_others_wait():
    first = child("k")
    assert first.stdout.readline() == "making\n"
    second = child("k")
    say(first)
    assert first.stdout.readline() == "['a', 'b']\n"
    assert second.stdout.readline() == "['a', 'b']\n"
    for process in (first, second):
        process.communicate("\n")
        assert process.returncode == 0


def test_what_a_killed_process_left_is_made_anew(place):
    first = child("k")
    assert first.stdout.readline() == "making\n"
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert (place / "kind/k.partial/a").exists()
    second = child("k")
    assert second.stdout.readline() == "making\n"
    say(second)
    assert second.stdout.readline() == "['a', 'b']\n"
    second.communicate("\n")
    assert sorted(path.name for path in (place / "kind").iterdir()) == ["k", "k.lock"]


def make(key: str, size: int) -> Path:
    def fill(folder: Path):
        (folder / "data").write_bytes(bytes(size))
        yield size

    copy = Copy("kind", key, size, fill)
    assert list(copy)[-1:] in ([(size, size)], [])
    return copy.path


def let_go() -> None:
    """Forget all copies, as a process that ends does."""
    for lock in cache._held.values():
        os.close(lock)
    cache._held.clear()


def test_the_longest_unused_copy_makes_room(monkeypatch):
    monkeypatch.setenv(cache.LIMIT, "0.000003")  # 3,000 bytes
    paths = [make(key, 1000) for key in "abc"]
    for age, path in enumerate(paths):
        os.utime(path, (age, age))
    let_go()
    make("a", 1000)  # which is used again now
    make("d", 1000)
    assert [path.exists() for path in paths] == [True, False, True]


def test_copies_in_use_stay_and_the_limit_is_named(monkeypatch):
    monkeypatch.setenv(cache.LIMIT, "0.000003")
    user = child("k")
    say(user)
    assert user.stdout.readline() == "making\n" and user.stdout.readline() == "['a', 'b']\n"
    mine = make("mine", 1500)
    with pytest.raises(InputError, match=r"no room for 0.00 GB.*set FASTBERT_CACHE_GB"):
        make("more", 1000)
    user.communicate("\n")
    assert make("more", 1000).exists() and mine.exists()
    monkeypatch.setenv(cache.LIMIT, "many")
    with pytest.raises(InputError, match="FASTBERT_CACHE_GB = 'many'; must be a number"):
        make("other", 1)


def test_a_folder_that_cannot_be_made_is_named_with_its_variable(tmp_path, monkeypatch):
    monkeypatch.delenv("NOT_SET", raising=False)
    for text in ("$NOT_SET/x", "/a/${NOT_SET}"):
        monkeypatch.setenv(cache.FOLDER, text)
        with pytest.raises(InputError, match=r"FASTBERT_CACHE = .*NOT_SET\}? is not set"):
            make("k", 1)
    (tmp_path / "file").touch()
    monkeypatch.setenv(cache.FOLDER, str(tmp_path / "file/x"))
    with pytest.raises(InputError, match=r"file/x.*: cannot be made: .*; set FASTBERT_CACHE to"):
        make("k", 1)
    with pytest.raises(InputError, match="cannot be made"), workspace("runs"):
        pass


def test_a_failure_leaves_no_copy(place):
    def fail(folder: Path):
        (folder / "a").write_bytes(b"x")
        yield 1
        raise OSError(5, "the store is gone")

    with pytest.raises(OSError):
        list(Copy("kind", "k", 2, fail))
    assert [path.name for path in (place / "kind").iterdir()] == ["k.lock"]
    assert make("k", 2).exists()


def test_a_workspace_goes_with_its_process(place):
    with workspace("runs") as mine:
        (mine / "file").write_text("x")
        left = place / "runs/0123456789abcdef"
        left.mkdir()
        with workspace("runs") as other:
            assert mine.exists() and other.exists() and not left.exists()
    assert list((place / "runs").iterdir()) == []


def test_machines_that_share_a_disk_have_folders_of_their_own(place, monkeypatch):
    """The locks of a network disk may hold on one machine only."""
    assert cache.cache_folder() == place
    for kind in ("nfs4", "lustre"):
        monkeypatch.setattr(cache, "_kind_of_disk", lambda folder, kind=kind: kind)
        assert cache.cache_folder() == place / socket.gethostname()
    monkeypatch.undo()
    kind = subprocess.check_output(["stat", "-f", "-c", "%T", "/proc"], text=True).strip()
    assert cache._kind_of_disk(Path("/proc/self")) == kind == "proc"
