""" "Not there" is only what the system states explicitly."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import fastbert
from fastbert.data.dataset import open_dataset
from fastbert.errors import InputError
from fastbert.presence import is_file, is_folder, names_in, status
from fastbert.tasks.embed import check_out


def test_an_honest_answer(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/b").touch()
    (tmp_path / "folder/a").touch()
    (tmp_path / "link").symlink_to("folder")
    os.mkfifo(tmp_path / "pipe")
    assert is_file(tmp_path / "file") and not is_folder(tmp_path / "file")
    assert is_folder(tmp_path / "link") and names_in(tmp_path / "link") == ["a", "b"]
    assert status(tmp_path / "pipe") is not None and not is_file(tmp_path / "pipe")
    for absent in ("none", "none/none", "file/none"):
        assert status(tmp_path / absent) is None and names_in(tmp_path / absent) == []


@pytest.mark.parametrize("inside", ["", "/checkpoints", "/a/b"])
@pytest.mark.parametrize(
    "make, words",
    [
        (
            lambda path: path.symlink_to("/not/mounted"),
            ["a link to /not/mounted, which is not there", "mount its disk"],
        ),
        (lambda path: path.symlink_to(path.name), ["Too many levels of symbolic links"]),
    ],
)
def test_what_cannot_be_said_is_an_error(tmp_path, make, words, inside):
    """This includes paths below it. test_run_folder.py covers rights, which do not stop root."""
    make(tmp_path / "here")
    for look in (status, is_file, is_folder, names_in):
        with pytest.raises(InputError) as error:
            look(tmp_path / f"here{inside}")
        assert "\n" not in str(error.value) and str(tmp_path / "here") in str(error.value)
        assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize("name", ["a\0b", "x" * 300, "a\ud800"])
def test_names_that_cannot_be_are_one_line(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("A text.")
    for use in (
        lambda: fastbert.load(name),
        lambda: fastbert.prepare(name, "out"),
        lambda: fastbert.prepare("a.txt", name),
        lambda: fastbert.prepare("a.txt", "out", tokenizer=name),
        lambda: fastbert.pretrain("mini", {"data": name}),
        lambda: open_dataset(name),
    ):
        with pytest.raises(InputError, match="no file can have this name"):
            use()
    assert os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("name", ["a\0b", "x" * 300])
def test_names_that_cannot_be(tmp_path, name):
    with pytest.raises(InputError):
        status(tmp_path / name)


@pytest.mark.parametrize("url", ["s3://bucket/x", "hf://datasets/x", "gs://b", "https://a.b/c.txt"])
def test_a_url_is_no_local_path(tmp_path, monkeypatch, url):
    """Where objects are not supported: Path drops a slash, and a folder "s3:" would be made."""
    monkeypatch.chdir(tmp_path)
    words = f"{url.partition('/')[0]}/.*: files are read and written on local disks only"
    (tmp_path / "a.txt").write_text("A text.")
    for use in (
        lambda: fastbert.prepare("a.txt", "out", tokenizer=url),
        lambda: check_out(f"{url}/x.npy"),
        lambda: status(Path(url)),
    ):
        with pytest.raises(InputError, match=words):
            use()
    assert os.listdir(tmp_path) == ["a.txt"]
    (tmp_path / "s3:").mkdir()
    assert is_folder(Path("s3:/")) and not is_file(Path("s3:"))


def test_a_file_in_the_place_of_a_folder_has_no_list(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(InputError, match="checkpoints: cannot be read: Not a directory"):
        names_in(tmp_path / "checkpoints")
