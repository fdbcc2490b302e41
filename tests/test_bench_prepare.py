"""The benchmark's text is always the same, and datasets are compared before a number is said."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.data.bench_prepare import same, write_text
from fastbert.data.dataset import TokenDataset
from tests.ranks import ROOT


def test_the_text(english_jsonl: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_text(english_jsonl, tmp_path / name, 300_000)
    data = (tmp_path / "a").read_bytes()
    assert data == (tmp_path / "b").read_bytes() and 300_000 <= len(data) < 320_000
    words = [word for line in data.splitlines() for word in json.loads(line)["text"].split()]
    known = set(english_jsonl.read_text(encoding="utf-8").split())
    new = [word for word in words if word not in known]
    assert len(set(new)) > 1000 and len(new) > 2 * len(set(new))


def test_folders_are_compared(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name / "c").mkdir(parents=True)
        (tmp_path / name / "c" / "d").write_text("one")
    assert same(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b" / "c" / "d").write_text("two")
    assert not same(tmp_path / "a", tmp_path / "b")


@pytest.mark.slow
def test_a_small_run(small_dataset: TokenDataset, english_jsonl: Path, tmp_path: Path) -> None:
    arguments = [english_jsonl, small_dataset.path, "--out", tmp_path, "--mb", "1", "--rounds", "1"]
    command = [sys.executable, "-m", "benchmarks.data.bench_prepare", *map(str, arguments)]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    found = json.loads((tmp_path / "prepare.json").read_text())
    assert found["mb"] >= 1 and 0 < found["without_baselines_2"] < found["seconds_2"]
    assert [path.name for path in tmp_path.iterdir()] == ["prepare.json"]
