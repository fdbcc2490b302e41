"""The benchmark of `fastbert init`: both sides train, and what is finished is not made again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fastbert.recipe import load_config

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_both_sides_train_for_the_same_processor_time(small_dataset, tmp_path):
    command = [sys.executable, "-m", "benchmarks.quality.bench_init", str(small_dataset.path)]
    command += ["--minutes", "0.05", "--out", str(tmp_path)]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    (folder,) = (tmp_path / "init-runs").iterdir()
    seconds = load_config(folder / "recipe.toml").stop.seconds
    assert seconds == pytest.approx(2.7)
    speeds = json.loads((folder / "speeds.json").read_text())
    rows = {row["side"]: row for row in json.loads((tmp_path / "init.json").read_text())["rows"]}
    assert set(rows) == set(speeds)
    for side, row in rows.items():
        # A run ends with the first step that reaches its tokens.
        assert 0 <= row["tokens"] - int(speeds[side] * seconds) < 6000
    kept = folder / "demo-1.json"
    kept.write_text(json.dumps(json.loads(kept.read_text()) | {"loss_mask_token": 0.125}))
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert "| 0.125 |" in again.stdout
