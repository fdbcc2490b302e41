"""The start-up benchmark on real processes.

Phases appear in order, a failed run gives no figure, and the report names every row.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from benchmarks.step.bench_startup import (
    COMMANDS,
    PHASES,
    first_step,
    report,
    time_commands,
    trainer_first_step,
    whole,
)
from fastbert.data.dataset import TokenDataset

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def paths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "kernels")]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def check_order(marks: dict[str, float]) -> None:
    assert set(marks) == set(PHASES) and all(seconds > 0 for seconds in marks.values())
    assert marks["setup"] <= marks["engine"] <= marks["step"]


@pytest.mark.slow
def test_first_step_of_a_run(small_dataset: TokenDataset, tmp_path: Path) -> None:
    check_order(first_step(small_dataset.path, tmp_path))
    assert (tmp_path / "run/metrics.jsonl").read_text(encoding="utf-8").startswith('{"step": 1, ')


@pytest.mark.slow
def test_first_step_of_the_trainer(small_dataset: TokenDataset, tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="the rival: pip install fastbert-pretrain[test]")
    check_order(trainer_first_step(small_dataset.path, tmp_path))


@pytest.mark.slow
def test_a_run_that_fails_is_no_figure(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="ended with code 2"):
        first_step(tmp_path / "no dataset", tmp_path)


def test_commands_and_report() -> None:
    light = {
        name: COMMANDS[name] for name in ("python -c pass", "fastbert --help", "import fastbert")
    }
    rows, seconds = time_commands(light, 2)
    assert [row["name"] for row in rows] == list(light) and all(
        len(values) == 2 for values in seconds.values()
    )
    assert min(seconds["python -c pass"]) < min(seconds["fastbert --help"])
    phases = {f"{phase}_s": 1.0 for phase in PHASES}
    text = report(
        [
            *rows,
            {
                "part": "first step",
                "name": "fastbert pretrain",
                "low_s": 0.5,
                "high_s": 2.0,
                **phases,
            },
        ]
    )
    assert (
        text.startswith("Start-up\n")
        and all(f"`{name}`" in text for name in light)
        and "fastbert pretrain" in text
    )


@pytest.mark.parametrize(
    "name", [name for name in COMMANDS if "torch" not in name and "transformers" not in name]
)
def test_every_command_runs(name: str) -> None:
    assert whole(COMMANDS[name]) > 0
