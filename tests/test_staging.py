"""A folder appears completely or not at all, also beside other writers.

Leftovers do not stay for ever.
"""

from __future__ import annotations

import fcntl
import os
import signal
from pathlib import Path

import pytest

from fastbert.data import staging as module
from fastbert.data.staging import staging
from fastbert.errors import InputError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(KeyError), staging(tmp_path / "out") as folder:
        (folder / "a").touch()
        raise KeyError
    assert names(tmp_path) == []
    with staging(tmp_path / "new" / "out") as folder:
        (folder / "a").touch()
        assert names(tmp_path / "new") == [folder.name]
    assert names(tmp_path / "new") == ["out"] and names(tmp_path / "new" / "out") == ["a"]


@pytest.mark.parametrize("fails", [True, False])
def test_two_with_the_same_process_id(tmp_path: Path, fails: bool) -> None:
    """This happens in two containers that share a disk; one fails, or ends first."""
    with staging(tmp_path / "out") as first:
        (first / "a").touch()
        if fails:
            with pytest.raises(KeyError), staging(tmp_path / "out"):
                raise KeyError
        else:
            with staging(tmp_path / "out"):
                pass
            (tmp_path / "out").rmdir()
        assert names(first) == ["a"]
    assert names(tmp_path / "out") == ["a"] and names(tmp_path) == ["out"]


def test_another_one_was_first(tmp_path: Path) -> None:
    with (
        pytest.raises(InputError, match="out: cannot be written"),
        staging(tmp_path / "out") as folder,
    ):
        (folder / "a").touch()
        with staging(tmp_path / "out") as other:
            (other / "b").touch()
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["b"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT])
def test_signals(tmp_path: Path, number: signal.Signals) -> None:
    """A signal ends it and leaves nothing; under nohup it is ignored."""
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as raised, staging(tmp_path / "out"):
        os.kill(os.getpid(), number)
    assert raised.value.code == 128 + number
    assert names(tmp_path) == [] and signal.getsignal(number) is before
    signal.signal(number, signal.SIG_IGN)
    try:
        with staging(tmp_path / "out"):
            os.kill(os.getpid(), number)
    finally:
        signal.signal(number, before)
    assert names(tmp_path) == ["out"]


def test_abandoned_folders_are_removed(tmp_path: Path) -> None:
    def make(name: str, age_s: float) -> Path:
        folder = tmp_path / name
        (folder / "train").mkdir(parents=True)
        old = folder.stat().st_mtime - age_s
        for path in (folder / "train", folder):
            os.utime(path, (old, old))
        return folder

    old, young = 2 * module.ABANDONED_S, module.ABANDONED_S / 2
    make(".out.0123456789abcdef.partial", old)
    kept = [
        make(".out.0123456789abcde0.partial", young),
        make(".out.0123456789abcde1.partial", old),  # a process holds it
        make(".other.0123456789abcdef.partial", old),
        make(".out.download.partial", old),
    ]
    written = make(".out.0123456789abcde2.partial", old)  # a file in it is young
    (written / "train" / "tokens").touch()
    os.utime(written / "train", (1, 1))
    holder = os.open(kept[1], os.O_RDONLY)
    fcntl.flock(holder, fcntl.LOCK_EX)
    try:
        with staging(tmp_path / "out"):
            pass
    finally:
        os.close(holder)
    assert names(tmp_path) == sorted([*(path.name for path in [*kept, written]), "out"])
