"""Which files of a folder are read, also through links, and which are left out."""

from __future__ import annotations

import os
import re
from inspect import get_annotations
from pathlib import Path

import fsspec
import pytest

from fastbert import cli
from fastbert.data.documents import READERS, read_documents
from fastbert.data.prepare import prepare
from fastbert.data.sources import FORMATS, TABLES, WORK, find_sources
from fastbert.errors import InputError


def test_every_format_has_a_reader_and_is_in_the_help() -> None:
    """A format is a line in FORMATS and a reader; nothing is read as another format unasked."""
    assert FORMATS.keys() - READERS.keys() == set(), "add them to READERS in data/documents.py"
    assert set(TABLES) <= FORMATS.keys()
    for command in (cli.prepare, cli.embed):
        (option,) = get_annotations(command, eval_str=True)["text_format"].__metadata__
        missing = [name for name in FORMATS if not re.search(rf"\b{name}\b", option.help)]
        assert not missing, f"cli.py: the help of {command.__name__} --format lacks {missing}"


def tree(top: Path, names: str) -> None:
    for name in names.split():
        path = top / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"Text of {name}.\n")


def found(top: Path, *named: Path) -> tuple[list[str], dict[str, str]]:
    """Return the files in order, and the reasons for left-out names."""
    sources, left_out = find_sources(named or [top])
    return (
        [str(source.path.relative_to(top)) for source in sources],
        {str(item.path.relative_to(top)): item.reason for item in left_out},
    )


def test_a_folder_behind_a_link_is_read_once(tmp_path: Path) -> None:
    tree(tmp_path, "disk/big/1.txt disk/big/sub/2.txt sym/own/3.txt sym/zoo/4.txt")
    top = tmp_path / "sym"
    (top / "a-link").symlink_to("../disk/big")
    (top / "again").symlink_to(tmp_path / "disk" / "big")
    (top / "deeper").symlink_to("../disk/big/sub")
    (top / "inside").symlink_to("zoo")  # read as zoo, in its place
    (top / "loop").symlink_to(".")
    (tmp_path / "disk" / "big" / "back").symlink_to(top)
    files = ["own/3.txt", "zoo/4.txt", "a-link/1.txt", "a-link/sub/2.txt"]
    assert found(top) == (files, {})
    assert found(tmp_path, top, tmp_path / "disk") == ([f"sym/{name}" for name in files], {})


def test_a_link_to_a_folder_above_is_left_out(tmp_path: Path) -> None:
    tree(
        tmp_path,
        "home/secret.txt home/texts/1.txt home/texts/in/2.txt disk/other.txt disk/big/3.txt",
    )
    top = tmp_path / "home" / "texts"
    (top / "up").symlink_to("..")
    (top / "in" / "root").symlink_to("/")
    (top / "here").symlink_to(".")
    (top / "far").symlink_to("../../disk/big")
    (tmp_path / "disk" / "big" / "up").symlink_to("..")
    above = "a link to a folder above"
    assert found(top) == (
        ["1.txt", "in/2.txt", "far/3.txt"],
        {"up": above, "in/root": above, "far/up": above},
    )


def test_what_is_no_file_is_left_out(tmp_path: Path) -> None:
    """Reading a pipe would block, and /dev/urandom has no end."""
    tree(tmp_path, "a.txt z/b.txt")
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "random.txt").symlink_to("/dev/urandom")
    (tmp_path / "gone.txt").symlink_to("nowhere")
    (tmp_path / "through.txt").symlink_to("a.txt/b")
    (tmp_path / "self.txt").symlink_to("self.txt")
    (tmp_path / "folder").symlink_to("/nowhere/at/all")
    assert found(tmp_path) == (
        ["a.txt", "z/b.txt"],
        {
            "folder": "a link to nothing",
            "gone.txt": "a link to nothing",
            "pipe.txt": "not a regular file",
            "random.txt": "not a regular file",
            "self.txt": "a link to nothing",
            "through.txt": "a link to nothing",
        },
    )
    for name, words in [
        ("gone.txt", "a link to nowhere, which is not there"),
        ("self.txt", "cannot be read"),
        ("pipe.txt", "not a regular file"),
        ("random.txt", "not a regular file"),
    ]:
        with pytest.raises(InputError, match=rf"{name}: {words}"):
            find_sources([tmp_path / name])


def test_datasets_are_not_read_as_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A second dataset next to the texts has the tokens of the first."""
    texts = tmp_path / "texts"
    tree(texts, "a.txt b.txt manifest.json with/manifest.json with/c.txt")
    options = {"vocab_size": 100, "workers": 1, "progress": False}
    prepare([texts], texts / "s1", **options)
    capsys.readouterr()
    prepare([texts], texts / "s2", **options)
    assert f"left out (a dataset of fastbert): 1: {texts / 's1'}" in capsys.readouterr().err
    for name in ("train", "heldout"):
        tokens = [(texts / s / "part-00000" / f"{name}-00000").read_bytes() for s in ("s1", "s2")]
        assert tokens[0] == tokens[1]
    assert found(texts)[0] == ["a.txt", "b.txt", "with/c.txt"]


SPARK = (
    "a.txt _notes.txt _column=1/c.txt _SUCCESS _temporary/0/a.txt _delta_log/0.txt sub/_tmp/b.txt"
)


@pytest.mark.parametrize("text_format", [None, "txt"])
@pytest.mark.parametrize("where", ["disk", "bucket"])
def test_what_spark_leaves_beside_the_data_is_no_text(
    tmp_path: Path, text_format: str | None, where: str
) -> None:
    """Unfinished tasks have copies of the data in _temporary; _SUCCESS is empty."""
    tree(tmp_path, SPARK + " part-00000")
    top: Path | str = tmp_path
    if where == "bucket":
        fs, top = fsspec.filesystem("memory"), f"memory://{tmp_path.name}-{text_format}"
        fs.put(str(tmp_path), top, recursive=True)
    sources, left_out = find_sources([top], text_format)
    begin = len(str(top)) + 1
    assert {str(source.path)[begin:] for source in sources} == {
        *("a.txt", "_notes.txt", "_column=1/c.txt"),
        *(["part-00000"] if text_format else []),
    }
    reasons = {item.reason for item in left_out if "_" in str(item.path)[begin:]}
    assert reasons == {WORK}
    named, _ = find_sources([tmp_path / "_temporary"])
    assert [source.path.name for source in named] == ["a.txt"]


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 12345\n"
ANNEX = "/annex/objects/MD5E-s12345--4d7a21.txt\n"


@pytest.mark.parametrize(
    "name", ["a.txt", "a.jsonl", "a.csv", "a.tsv", "a.json", "a.parquet", "a.arrow", "a.txt.gz"]
)
@pytest.mark.parametrize(
    ("pointer", "words"),
    [
        (POINTER, "a pointer of Git LFS in place of the file; fetch the file with git lfs pull"),
        (ANNEX, "a pointer of git-annex in place of the file; fetch .* git annex get"),
    ],
    ids=["lfs", "annex"],
)
def test_a_pointer_to_a_file_that_was_not_fetched(
    tmp_path: Path, name: str, pointer: str, words: str
) -> None:
    """As text a pointer would be read without a word; other formats would look damaged."""
    (tmp_path / name).write_text(pointer)
    with pytest.raises(InputError, match=rf"{name}: cannot be read: {words}"):
        list(read_documents([tmp_path / name]))


def test_a_folder_of_json_files_alone(tmp_path: Path) -> None:
    """As Spark writes them: an object per line, and nothing that says so."""
    (tmp_path / "part-0.json").write_text('{"text": "One."}\n{"text": "Two."}\n')
    (tmp_path / "_SUCCESS").touch()
    with pytest.raises(InputError, match=r"its \.json files are read with --format json"):
        find_sources([tmp_path])
    assert list(read_documents([tmp_path], "json")) == ["One.", "Two."]
