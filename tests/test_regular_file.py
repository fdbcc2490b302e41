"""Settings are read from regular files of a bounded size: no pipe is waited for, no device read."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_bert import make_hugging_face_folder, make_run

from fastbert.checkpoints import hugging_face
from fastbert.checkpoints.model_folder import open_model
from fastbert.checkpoints.ownership import RunLock
from fastbert.data.dataset import open_dataset
from fastbert.data.tokenizer import load_tokenizer
from fastbert.errors import InputError
from fastbert.recipe import load_config
from fastbert.regular_file import LARGEST, read_bytes, read_text
from fastbert.tasks.run_report import report


def large(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(LARGEST + 1)  # without a byte on the disk


NONE = {
    "not a regular file": os.mkfifo,
    "not a regular": lambda path: path.symlink_to("/dev/zero"),
    "larger than 256 MiB": large,
    "Is a directory": os.mkdir,
    "No such file": lambda path: None,
}


@pytest.mark.parametrize("words", NONE)
def test_what_is_no_small_regular_file(tmp_path, words):
    NONE[words](tmp_path / "x")
    for read in (read_bytes, read_text):
        with pytest.raises(OSError, match=words) as error:
            read(tmp_path / "x")
        assert error.value.filename == str(tmp_path / "x")


def test_a_name_that_cannot_be():
    for name in ("a\0b", "a\ud800"):
        with pytest.raises(OSError, match=r"null byte|can't encode"):
            read_bytes(name)


def test_text_as_editors_write_it(tmp_path):
    (tmp_path / "x").write_bytes("\ufeffa\r\nb\rc\u0085d\u2028e\ufefff\n".encode())
    assert read_text(tmp_path / "x") == "a\nb\nc\u0085d\u2028e\ufefff\n"
    (tmp_path / "x").write_bytes(b"caf\xe9")
    with pytest.raises(UnicodeDecodeError):
        read_text(tmp_path / "x")
    assert read_text(tmp_path / "x", errors="replace") == "caf\ufffd"


@pytest.fixture(scope="module")
def folder(small_dataset, tmp_path_factory) -> Path:
    """A folder with hf, a Hugging Face model, and run, a run of it."""
    folder = tmp_path_factory.mktemp("models")
    hf = make_hugging_face_folder(folder / "hf", small_dataset.tokenizer_dir)
    make_run(folder / "run", hf, str(small_dataset.path))
    return folder


def settings_of_deepspeed(path: Path) -> None:
    from fastbert.training.ds_config import read_ds_config

    read_ds_config(load_config({"data": "x"}, {"runtime.deepspeed": path}), "recipe")


# Each file, from the folder with hf and run, and what reads it.
READERS: dict[str, Callable[[Path], object]] = {
    "recipe.toml": load_config,
    "ds_config.json": settings_of_deepspeed,
    "vocab.txt": load_tokenizer,
    "tokenizer.json": load_tokenizer,
    "data/manifest.json": lambda path: open_dataset(path.parent),
    "run/.owner": lambda path: RunLock(path.parent, "x").holds(),
    "run/config.toml": lambda path: report(path.parent),
    "run/metrics.jsonl": lambda path: report(path.parent),
    "hf/model.safetensors.index.json": lambda path: open_model(path.parent),
    "hf/shard.safetensors": lambda path: open_model(path.parent),
}


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
@pytest.mark.parametrize("name", READERS)
def test_every_reader_of_settings(folder, tmp_path, name, make):
    """The message names the file, and nobody waits for a pipe."""
    for model in ("hf", "run"):
        (tmp_path / model).mkdir()
        for file in (folder / model).iterdir():
            (tmp_path / model / file.name).symlink_to(file)
    (tmp_path / "data").mkdir()
    if name.startswith("hf/"):
        (tmp_path / "hf" / hugging_face.WEIGHTS).unlink()
        index = {"weight_map": {"a": "shard.safetensors"}}
        (tmp_path / "hf" / hugging_face.INDEX).write_text(json.dumps(index))
    path = tmp_path / name
    path.unlink(missing_ok=True)
    make(path)
    with pytest.raises((InputError, OSError)) as error:
        READERS[name](path)
    assert str(path.parent) in str(error.value)
