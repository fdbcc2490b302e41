"""The speed record: its command trains and judges by the rules, and its recipe is valid."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fastbert.recipe import load_config
from speedrun.__main__ import GOAL, RECORD, SEEDS

ROOT = Path(__file__).parents[1]


def test_the_record_is_the_last_of_the_table_and_uses_the_fixed_data():
    config = load_config(RECORD)
    assert (config.data, config.schedule.over) == ("data/wiki", "seconds")
    rows = re.findall(r"^\| \d+ \| ([\d.]+) s \|", (RECORD.parent / "README.md").read_text(), re.M)
    assert rows and float(rows[-1]) == config.stop.seconds
    assert [float(row) for row in rows] == sorted(map(float, rows), reverse=True)


@pytest.mark.slow
def test_a_recipe_that_is_too_short_does_not_pass(tmp_path, small_dataset):
    recipe = tmp_path / "short.toml"
    recipe.write_text(
        'data = "elsewhere"\nrun = "elsewhere"\n[model]\npreset = "tiny"\n'
        '[objective]\nsegments = "single"\n[batch]\nsequences = 8\nmax_length = 64\n'
        "[stop]\nsteps = 2\n[evaluate]\nsequences = 8\n"
    )
    command = [sys.executable, "-m", "speedrun", str(recipe), "--data", str(small_dataset.path)]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "runs"), "--seeds", "1", "2"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1, done.stderr
    assert "| 1 |" in done.stdout and "| 2 |" in done.stdout
    mean = float(re.findall(r"([\d.]+) nats on \[MASK\]: not passed", done.stdout)[0])
    assert mean > GOAL and SEEDS == [1, 2, 3]
