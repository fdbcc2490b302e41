"""The sweep trains each set of settings once and ranks them; a run keeps to its own core."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from benchmarks.harness.cores import one_on_each, run_module
from benchmarks.quality.sweep import main

ROOT = Path(__file__).parents[1]


@pytest.fixture
def sweep(monkeypatch, tmp_path):
    """Call the command in this process."""
    monkeypatch.chdir(ROOT)

    def call(*tries: str, recipe: str = "fastbert/recipes/demo.toml") -> None:
        settings = [argument for text in tries for argument in ("--try", text)]
        monkeypatch.setattr(
            "sys.argv", ["sweep", recipe, "--out", str(tmp_path), "--seconds", "1", *settings]
        )
        main()

    return call


@pytest.mark.slow
def test_the_best_comes_first_and_what_is_finished_is_not_made_again(
    small_dataset, tmp_path, sweep, capsys
):
    wide, rate = (
        f"data={small_dataset.path} evaluate.sequences=16 runtime.precision=fp32 {setting}"
        for setting in ("batch.sequences=4", "optimizer.lr=1e-5")
    )
    sweep(wide, rate)
    kept = {
        json.loads(path.read_text())["settings"]: path
        for path in (tmp_path / "sweep-runs").glob("*.json")
    }
    assert set(kept) == {wide, rate} and not [
        path for path in (tmp_path / "sweep-runs").iterdir() if path.is_dir()
    ]
    row = json.loads(kept[rate].read_text())
    assert row["tokens"] > 0 and row["steps"] > 0 and 1 < row["tokens_per_word"] < 3
    kept[rate].write_text(json.dumps(row | {"loss_mlm": 0.125}))
    capsys.readouterr()
    sweep(wide, rate)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| `data=")]
    assert [line.split("`")[1] for line in lines] == [rate, wide] and " 0.125 " in lines[0]


@pytest.mark.parametrize(
    ("recipe", "settings", "message"),
    [
        ("fastbert/recipes/demo.toml", "optimizer.rl=1", "optimizer.rl"),
        ("recipes/none.toml", "", "recipes/none.toml: no such recipe"),
    ],
)
def test_bad_input(recipe, settings, message, tmp_path, sweep, capsys):
    with pytest.raises(SystemExit) as ended:
        sweep(settings, recipe=recipe)
    # The parser has printed its message; another one is printed by Python at the end.
    said = capsys.readouterr().err or str(ended.value)
    assert ended.value.code and message in said.splitlines()[-1] and "Traceback" not in said
    assert not list(tmp_path.rglob("*.json"))


def test_each_job_has_a_core_of_its_own():
    mine = os.sched_getaffinity(0)
    found = list(one_on_each(lambda number: (number, os.sched_getaffinity(0)), range(8), cores=2))
    assert [number for number, _ in found] == list(range(8))
    assert {len(cores) for _, cores in found} == {1}
    assert os.sched_getaffinity(0) == mine


def test_a_module_that_fails_says_what_it_was():
    with pytest.raises(SystemExit, match=r"the third run: .*no_such_verb"):
        run_module("fastbert", ["no_such_verb"], "the third run")
