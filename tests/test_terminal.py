"""Output is free of control characters from names and texts, and works without a stream."""

from __future__ import annotations

import builtins
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from tiny_bert import make_hugging_face_folder

from fastbert.cli import run as command_line
from fastbert.terminal import can_redraw, is_terminal, safe, tell
from fastbert.training.monitor import Monitor
from fastbert.training.train_state import StopCriteria
from tests.ranks import ROOT, environment

TITLE = "\x1b]0;owned\x07"
CLEAR = "\x1b[2J"
EVIL = f"a{TITLE}b{CLEAR}c\x9b31md\u202ee\x7f"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_hugging_face_folder(tmp_path_factory.mktemp("hf"))


def clean(text: str) -> bool:
    return not any(c in text for c in "\x1b\x07\x9b\u202e\x7f\x08\r")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (EVIL, r"a\x1b]0;owned\x07b\x1b[2Jc\x9b31md\u202ee\x7f"),
        ("a\tb\nc", "a\tb\nc"),
        ("über 中文 हिन्दी 🙂 a\u200db\u00a0c", "über 中文 हिन्दी 🙂 a\u200db\u00a0c"),
        ("\udcff", r"\udcff"),
        ("\r\x08\u0085", r"\r\x08\x85"),
    ],
)
def test_control_characters_are_shown_and_not_obeyed(text, shown):
    assert safe(text) == shown
    assert safe("é中", "latin-1") == "é\\u4e2d"


def test_every_line_of_every_command_is_clean(folder, tmp_path, capsys):
    names = [tmp_path / f"{EVIL}.csv", tmp_path / f"{EVIL}.txt", tmp_path / f"{EVIL}.npy"]
    names[0].write_text(f'text,label\n"a",{EVIL}\nb,y\n')
    names[1].write_text("a list\n")
    (tmp_path / f"{EVIL}\nforged.bin").touch()
    model = tmp_path / EVIL
    folder.rename(model)
    try:
        for arguments in (
            ["fill-mask", str(model), f"{EVIL} [MASK]"],
            ["nsp", str(model), EVIL, EVIL],
            ["embed", str(model), str(names[1]), "--out", str(names[2])],
            ["finetune", str(model), "--train", str(names[0]), "--eval", str(names[0])],
            ["evaluate", str(model), "--data", str(tmp_path / (EVIL + "x"))],
            ["report", str(model)],
            ["pretrain", EVIL],
            ["pretrain", "mini", f"data={EVIL}", f"{EVIL}=3"],
            ["plan", "mini", f"data={EVIL}", "--gpu", EVIL],
            ["recipes", EVIL],
            ["prepare", str(tmp_path), "--out", str(tmp_path / "n"), "--tokenizer", EVIL],
            [EVIL],
        ):
            command_line(arguments)
            out, err = capsys.readouterr()
            assert out + err and clean(out + err), (arguments, out, err)
            assert "\nforged" not in out + err
    finally:
        model.rename(folder)


def test_a_run_log_is_clean(tmp_path, capsys, monkeypatch):
    """This is also tested on a terminal with few characters."""
    from fastbert.recipe import load_config

    recipe = load_config("mini", ["data=x", "stop.steps=3"])
    facts = {"peak": None, "vocab_size": 100, "baselines": {"unigram": 4.0}, "recipe": recipe}
    with Monitor(tmp_path, step=0, criteria=StopCriteria(recipe, 1.0), **facts) as to:
        to.say(f"{EVIL} \udcff")
        few = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
        to._console = Console(file=few)
        to.say("run 中文")
        few.flush()
        assert few.buffer.getvalue() == b"run \\u4e2d\\u6587\n"  # type: ignore[attr-defined]
    log = (tmp_path / "log.txt").read_text(encoding="utf-8")
    assert clean(log) and r"\x1b]0;owned" in log and "run 中文" in log
    assert clean(capsys.readouterr().out)


@pytest.mark.parametrize("widgets", [True, False])
def test_a_notebook_draws_bars_where_it_has_widgets(monkeypatch, tmp_path, widgets):
    """Rich knows a notebook by the class of the shell that the kernel puts into builtins."""
    shell = type("ZMQInteractiveShell", (), {})
    monkeypatch.setattr(builtins, "get_ipython", shell, raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "ipywidgets", raising=False)
    if widgets:
        (tmp_path / "ipywidgets.py").touch()
    else:
        monkeypatch.setitem(sys.modules, "ipywidgets", None)
    console = Console(file=io.StringIO())
    assert console.is_jupyter and not is_terminal(console.file)
    assert can_redraw(console) == widgets
    monkeypatch.setattr(builtins, "get_ipython", type("TerminalInteractiveShell", (), {}))
    assert not Console(file=io.StringIO()).is_jupyter
    assert can_redraw(Console(file=io.StringIO(), force_terminal=True))


def test_no_stderr_no_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", None)
    tell("a")
    monkeypatch.undo()
    assert capsys.readouterr() == ("", "")


def command(shell: str, *arguments: str, cwd: Path, **variables: str) -> tuple[int, str, str]:
    done = subprocess.run(
        ["sh", "-c", f'"$@" {shell}', "sh", sys.executable, "-m", "fastbert", *arguments],
        capture_output=True,
        text=True,
        encoding="latin-1",
        cwd=cwd,
        env=environment(**variables),
        timeout=120,
    )
    return done.returncode, done.stdout, done.stderr


def test_a_stream_that_is_closed_is_no_error_and_gets_no_file(tmp_path):
    """Without stderr the next open file would get its number, and would receive warnings."""
    text = "".join(f"A line with the number {i}.\n\n" for i in range(400))
    (tmp_path / "a.txt").write_text(text)
    for i, shell in enumerate(("2>&-", ">&-", "<&- >&- 2>&-")):
        arguments = ("prepare", "a.txt", "--out", f"out{i}", "--vocab-size", "300")
        code, _, err = command(shell, *arguments, "--workers", "1", cwd=tmp_path)
        assert code == 0 and "Traceback" not in err, (shell, err)
        assert (tmp_path / f"out{i}/manifest.json").exists()
    assert command("2>&-", "pretrain", "nothing", cwd=tmp_path)[:2] == (2, "")


@pytest.mark.slow
def test_letters_that_the_terminal_lacks_are_escaped(folder, tmp_path):
    script = "from fastbert.cli import main; main()"
    arguments = ["fill-mask", str(folder), "中文 é [MASK]"]
    for more in ([], ["--json"]):
        done = subprocess.run(
            [sys.executable, "-c", script, *arguments, *more],
            capture_output=True,
            env=environment(
                PYTHONIOENCODING="latin-1", PYTHONUTF8="0", PYTHONPATH=f"{ROOT}:{ROOT}/kernels"
            ),
            cwd=tmp_path,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        if more:
            assert json.loads(done.stdout)["text"] == "中文 é [MASK]"
        else:
            assert done.stdout.startswith("\\u4e2d\\u6587 é [MASK]".encode("latin-1"))
