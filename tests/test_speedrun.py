"""The speed record: its command trains and judges by the rules, and its recipe is valid."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from benchmarks.quality import equal_time
from fastbert.recipe import load_config
from speedrun.__main__ import GOAL, RECORD, SEEDS, main

ROOT = Path(__file__).parents[1]


def test_the_record_is_the_last_of_the_table_and_uses_the_fixed_data():
    config = load_config(RECORD)
    assert (config.data, config.schedule.over) == ("data/wiki", "seconds")
    rows = re.findall(r"^\| \d+ \| ([\d.]+) s \|", (RECORD.parent / "README.md").read_text(), re.M)
    assert rows and float(rows[-1]) == config.stop.seconds
    assert [float(row) for row in rows] == sorted(map(float, rows), reverse=True)


@pytest.mark.slow
def test_a_recipe_that_is_too_short_does_not_pass(tmp_path, small_dataset, monkeypatch, capsys):
    recipe = tmp_path / "short.toml"
    recipe.write_text(
        'data = "elsewhere"\nrun = "elsewhere"\n[model]\npreset = "tiny"\n'
        '[objective]\nsegments = "single"\n[batch]\nsequences = 8\nmax_length = 64\n'
        "[stop]\nsteps = 2\n[evaluate]\nsequences = 8\n"
        # "auto" would measure in each process which precision is faster.
        '[runtime]\nprecision = "fp32"\n'
    )
    monkeypatch.setattr(equal_time, "EVALUATED", 64)
    command = ["speedrun", recipe, "--data", small_dataset.path, "--out", tmp_path / "runs"]
    monkeypatch.setattr("sys.argv", [*map(str, command), "--seeds", "1", "2"])
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    monkeypatch.setenv("PYTHONPATH", path)  # for the processes that train
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr().out
    assert ended.value.code == 1 and "| 1 |" in said and "| 2 |" in said
    mean = float(re.findall(r"([\d.]+) nats on \[MASK\]: not passed", said)[0])
    assert mean > GOAL and SEEDS == [1, 2, 3]
