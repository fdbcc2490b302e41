"""Progress: bars on a terminal, lines elsewhere, and nothing without a reader."""

from __future__ import annotations

import io
import re
import sys
import time

import pytest

from fastbert import progress as module
from fastbert.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def work(show: bool) -> None:
    with Progress("prepare", show) as progress:
        with progress.count("reading", 100, done=25) as advance:
            for _ in range(3):
                time.sleep(0.03)
                advance(25)
        with progress.wait("training"):
            time.sleep(0.2)


def test_lines(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LINE_EVERY_S", 0.01)
    work(True)
    lines = capsys.readouterr().err.splitlines()
    assert {"prepare: reading, 25 %, 0 s", "prepare: training, 0 s"} <= set(lines)
    work(False)
    assert capsys.readouterr().err == ""


def test_items_are_followed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LINE_EVERY_S", 0.01)
    with Progress("evaluate") as progress:
        followed = []
        for item in progress.follow("abcd", "held-out text"):
            followed.append(item)
            time.sleep(0.03)
    assert followed == list("abcd")
    lines = capsys.readouterr().err.splitlines()
    assert {f"evaluate: held-out text, {share} %, 0 s" for share in (25, 50, 75)} <= set(lines)


def test_a_short_run_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    work(True)
    assert capsys.readouterr().err == ""


def test_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    """Work of unknown length shows the time, and no bytes."""
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    work(True)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", sys.stderr.getvalue())
    lines = [line for line in re.split(r"[\r\n]+", shown) if line.strip()]
    reading, training = (
        [line for line in lines if name in line] for name in ("reading", "training")
    )
    assert "100/100 bytes" in reading[-1]
    assert training and not any("bytes" in line or "?" in line for line in training)
    assert re.search(r"\d:\d\d:\d\d", training[-1])


@pytest.mark.parametrize("stream", [None, "closed"])
def test_nobody_reads(monkeypatch: pytest.MonkeyPatch, stream: str | None) -> None:
    """This happens with `2>&-`."""
    monkeypatch.setattr(module, "LINE_EVERY_S", 0.01)
    output = io.StringIO()
    output.close()
    monkeypatch.setattr(sys, "stderr", output if stream else None)
    work(True)
