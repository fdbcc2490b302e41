"""Files are replaced atomically, by several writers at once, and keep their permissions."""

from __future__ import annotations

import os
import signal
import stat
import threading
import time
from pathlib import Path

import pytest

from fastbert.checkpoints.hugging_face import new_folder
from fastbert.durable import LEFTOVER_S, parents_of, replacing, write_new, write_whole
from fastbert.errors import InputError
from fastbert.tasks.embed import _writer


def test_two_writers_of_a_file_do_not_meet(tmp_path):
    """The file of the writer that ends last is complete, and neither writer fails."""
    file = tmp_path / "x"
    with replacing(file) as first:
        first.write_text("first, " * 1000)
        with replacing(file) as second:
            second.write_text("second")
        assert file.read_text() == "second"
    assert file.read_text() == "first, " * 1000
    assert os.listdir(tmp_path) == ["x"]


def test_many_writers_at_once(tmp_path):
    file, problems = tmp_path / "x", []

    def write(data: bytes) -> None:
        try:
            for _ in range(20):
                write_whole(file, data)
        except BaseException as error:
            problems.append(error)

    texts = [bytes([65 + i]) * 10_000 for i in range(4)]
    threads = [threading.Thread(target=write, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == [] and file.read_bytes() in texts and os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT])
def test_a_signal_leaves_nothing_unfinished(tmp_path, number):
    for unfinished in (new_folder(tmp_path / "out"), _writer(tmp_path / "out.npy", 4)):
        before = signal.getsignal(number)
        with pytest.raises(SystemExit) as raised, unfinished:
            assert len(os.listdir(tmp_path)) == 1
            os.kill(os.getpid(), number)
        assert raised.value.code == 128 + number
        assert os.listdir(tmp_path) == [] and signal.getsignal(number) is before


def test_an_error_of_a_disk_names_what_the_user_knows(tmp_path):
    file = tmp_path / "x"
    for write in (lambda new: os.write(os.open("/dev/full", os.O_WRONLY), b"a"), os.mkdir):
        with pytest.raises(OSError) as raised, replacing(file) as new:
            write(new)
        assert raised.value.filename == str(file) and raised.value.strerror
    with pytest.raises(OSError) as raised, new_folder(file) as folder:
        (folder / "a/b").mkdir()
    assert raised.value.filename == str(file / "a/b")
    assert os.listdir(tmp_path) == []


def test_a_new_file_that_cannot_be_written_is_not_left(tmp_path):
    write_new(tmp_path / "a", "one")
    with pytest.raises(FileExistsError):
        write_new(tmp_path / "a", "two")
    with pytest.raises(UnicodeEncodeError):  # where a disk is full, OSError
        write_new(tmp_path / "b", "\ud800")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["one"]


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o666, 0o400])
def test_permissions_stay(tmp_path, mode):
    file = tmp_path / "x"
    file.touch()
    file.chmod(mode)
    with replacing(file) as new:
        assert stat.S_IMODE(new.stat().st_mode) == mode  # no other user can read it in the meantime
    assert stat.S_IMODE(file.stat().st_mode) == mode
    write_whole(file, b"again")
    assert stat.S_IMODE(file.stat().st_mode) == mode


def test_a_new_file_has_those_of_the_umask_and_a_link_stays_whole_at_its_target(tmp_path):
    before = os.umask(0o027)
    try:
        write_whole(tmp_path / "x", b"a")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o640
    (tmp_path / "link").symlink_to("x")
    write_whole(tmp_path / "link", b"b")
    assert (tmp_path / "x").read_bytes() == b"a" and not (tmp_path / "link").is_symlink()


def test_two_exports_to_one_folder(tmp_path):
    """The second export finds the first one's complete folder at its end, and reports it."""
    with pytest.raises(InputError, match="is there already"), new_folder(tmp_path / "out") as first:
        (first / "a").touch()
        with new_folder(tmp_path / "out") as second:
            assert first != second and (first / "a").exists()
            (second / "b").touch()
        assert os.listdir(tmp_path / "out") == ["b"]
    assert os.listdir(tmp_path) == ["out"] and os.listdir(tmp_path / "out") == ["b"]


def leave(path: Path, age_s: float) -> None:
    path.mkdir() if path.name.endswith("dir00000") else path.touch()
    os.utime(path, (time.time() - age_s,) * 2)


def test_what_a_killed_writer_left_is_deleted_a_day_later(tmp_path):
    for name, age_s in (
        (".writing-x-0123abcd", 2 * LEFTOVER_S),
        (".writing-x-89abcdef", 60.0),
        (".writing-x-y-0123abcd", 2 * LEFTOVER_S),  # the leftover of a file named x-y
        (".writing-x-dir00000", 2 * LEFTOVER_S),
    ):
        leave(tmp_path / name, age_s)
    write_whole(tmp_path / "x", b"a")
    assert sorted(os.listdir(tmp_path)) == [".writing-x-89abcdef", ".writing-x-y-0123abcd", "x"]


def failing_export(out: Path) -> None:
    with new_folder(out) as folder:
        (folder / "a").touch()
        raise ZeroDivisionError


def failing_parents(out: Path) -> None:
    with parents_of(out):
        raise ZeroDivisionError


@pytest.mark.parametrize("fail", [failing_export, failing_parents])
def test_after_a_failure_no_folder_is_left_that_was_not_there(tmp_path, monkeypatch, fail):
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path)
    for out in ("a/b/c", "there/b/c", "there/c", "c", str(tmp_path / "x/y")):
        with pytest.raises(ZeroDivisionError):
            fail(Path(out))
        assert os.listdir(tmp_path) == ["there"] and os.listdir("there") == []
    with pytest.raises(ZeroDivisionError), parents_of(Path("a/b/c")):
        Path("a/somebody_elses").touch()
        raise ZeroDivisionError
    assert os.listdir("a") == ["somebody_elses"]
