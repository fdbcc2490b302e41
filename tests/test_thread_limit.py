"""A limit of threads is found before a library aborts by it, or waits for ever."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import threading
from collections.abc import Iterator

import psutil
import pyarrow
import pyarrow.parquet
import pytest

import fastbert
from fastbert.cli import run as run_inside
from fastbert.errors import InputError
from fastbert.machine import startable_threads
from fastbert.recipe import load_config
from fastbert.training.loop import pretrain


@contextlib.contextmanager
def few_threads(stacks: int) -> Iterator[None]:
    """Leave address space for a number of stacks; this limits the threads of root, too."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    size = threading.stack_size(32 << 20)
    try:
        used = psutil.Process().memory_info().vms
        resource.setrlimit(resource.RLIMIT_AS, (used + stacks * (33 << 20), hard))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        threading.stack_size(size)


def test_threads_that_can_be_started_are_counted():
    before = threading.active_count()
    assert startable_threads(30) == 30
    with few_threads(5):
        assert startable_threads(30) in range(1, 30)
        assert startable_threads(30) in range(1, 30)  # those of before are gone
    assert threading.active_count() == before


def test_prepare_and_a_model_that_lack_threads_are_one_line(tmp_path):
    """`embed`, `finetune` and the other tasks load a model first."""
    (tmp_path / "text.txt").write_text("One.\n\nTwo.\n")
    with few_threads(5):
        with pytest.raises(InputError, match=r"only . more threads .* and prepare needs"):
            fastbert.prepare(tmp_path / "text.txt", out=tmp_path / "new", workers=2)
        with pytest.raises(InputError, match=r"only . more threads .* and a model needs"):
            fastbert.load(tmp_path)
    assert os.listdir(tmp_path) == ["text.txt"]


def test_finetune_takes_no_lack_of_threads_for_a_damaged_file(tmp_path, capsys):
    table = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b"], "label": ["x", "y"]}), table)
    command = ["finetune", str(tmp_path), "--train", str(table), "--eval", str(table)]
    with few_threads(5):
        assert run_inside(command) == 2
    message = capsys.readouterr().err
    assert re.fullmatch(r"fastbert: only . more threads .* and finetune needs .*\n", message)


def test_a_run_that_lacks_threads_is_one_line(tmp_path):
    recipe = load_config("mini", {"data": tmp_path, "run": tmp_path / "run"})
    with few_threads(5), pytest.raises(InputError, match="more threads can be started here"):
        pretrain(recipe, "mini", resume=False)
    assert not (tmp_path / "run").exists()
