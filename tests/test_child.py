"""fastbert never imports a `random.py`, `json.py` or `numpy.py` of the folder it is started in."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fastbert import child
from tests.ranks import ROOT, environment

OTHERS = (
    "numpy",
    "torch",
    "tokenizers",
    "pyarrow",
    "rich",
    "typer",
    "psutil",
    "deepspeed",
    "triton",
    "matplotlib",
    "fastbert",
    "kernels",
)
# What Python itself imports for -m before fastbert depends on its version, but never includes these
# modules.
LATER = (
    "random",
    "json",
    "numpy",
    "struct",
    "torch",
    "queue",
    "subprocess",
    "socket",
    "csv",
    "multiprocessing",
    "typer",
    "rich",
)


@pytest.fixture
def hostile(tmp_path) -> Path:
    """A folder with a module for every name that a program may import.

    Each module writes its name to the file `ran` beside the folder.
    """
    folder = tmp_path / "hostile"
    folder.mkdir()
    for name in {*sys.stdlib_module_names, *OTHERS}:
        (folder / f"{name}.py").write_text(
            f"open({str(tmp_path / 'ran')!r}, 'a').write({name + ' '!r})\n"
        )
    return folder


@pytest.fixture
def script(tmp_path) -> Path:
    """The script that pip installs as `fastbert`."""
    (tmp_path / "bin").mkdir()
    script = tmp_path / "bin/fastbert"
    script.write_text(
        "import sys\nfrom fastbert.cli import main\n"
        "if __name__ == '__main__':\n    sys.exit(main())\n"
    )
    return script


def run(folder: Path, *command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )


def check(done: subprocess.CompletedProcess[str], hostile: Path) -> None:
    ran = hostile.parent / "ran"
    assert not ran.exists(), f"ran: {ran.read_text()}\n{done.stderr}"
    assert done.returncode == 0, done.stderr


def test_the_folder_is_hostile(hostile):
    """Otherwise the tests below would show nothing."""
    assert run(hostile, "-c", "import random, json, numpy").returncode == 0
    assert {"random", "json", "numpy"} <= set((hostile.parent / "ran").read_text().split())


@pytest.mark.parametrize("workers", ["1", "2"])
def test_prepare(hostile, script, english_jsonl, workers):
    done = run(
        hostile,
        script,
        "prepare",
        english_jsonl,
        "--out",
        hostile.parent / "dataset",
        "--vocab-size",
        "500",
        "--workers",
        workers,
    )
    check(done, hostile)


@pytest.mark.slow
def test_doctor(hostile, script):
    check(run(hostile, script, "doctor"), hostile)


@pytest.mark.slow
def test_pretrain_in_bf16(hostile, script, small_dataset):
    settings = [
        f"data={small_dataset.path}",
        "run=run",
        "runtime.precision=bf16",
        f"runtime.deepspeed={ROOT / 'fastbert/recipes/ds_config.json'}",
        "stop.steps=1",
    ]
    done = run(hostile, script, "pretrain", ROOT / "fastbert/recipes/demo.toml", *settings)
    if (
        done.returncode == 2 and "bf16" in done.stderr
    ):  # the probe found a processor without bf16, and nothing ran
        done.returncode = 0
    check(done, hostile)


def test_as_a_module(tmp_path, english_jsonl):
    """`python -m fastbert`, as torchrun and deepspeed start it.

    Python puts the current folder first on the search path, and fastbert removes it.
    """
    for name in LATER:
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('{name} of the current folder')\n")
    done = run(
        tmp_path,
        "-m",
        "fastbert",
        "prepare",
        english_jsonl,
        "--out",
        "dataset",
        "--vocab-size",
        "500",
        "--workers",
        "2",
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_child_imports_what_this_process_imports(hostile, monkeypatch):
    """This also holds where an empty entry of the search path means the current folder.

    Notebooks and a stray colon in PYTHONPATH add such an entry.
    """
    extra = hostile.parent / "extra folder 'quoted'"
    extra.mkdir()
    (extra / "only_here.py").write_text("found = True\n")
    monkeypatch.setattr(sys, "path", ["", *sys.path, str(extra), ""])
    code = (
        "import json, random, numpy, only_here, fastbert; "
        "print(json.dumps([sys.path, sys.argv[1:]]))"
    )
    done = subprocess.run(
        child.command(code, "a", "b c"), cwd=hostile, capture_output=True, text=True
    )
    check(done, hostile)
    path, arguments = json.loads(done.stdout)
    assert path == [*filter(None, sys.path), str(ROOT)] and arguments == ["a", "b c"]


def test_a_child_finds_fastbert_where_this_process_found_it(tmp_path, monkeypatch):
    """It is found only through the empty entry, in a clone that is not installed."""
    monkeypatch.setattr(
        sys, "path", ["", *(entry for entry in sys.path if Path(entry).resolve() != ROOT)]
    )
    done = subprocess.run(
        child.command("import fastbert; print(fastbert.__file__)"),
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == str(ROOT / "fastbert/__init__.py")
