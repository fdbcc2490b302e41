"""The benchmark of `fastbert init`: a side trains, and what is finished is not made again."""

from __future__ import annotations

import json

import pytest

from benchmarks.quality import equal_time
from benchmarks.quality.bench_init import DEMO, INIT, main
from fastbert.recipe import load_config


@pytest.mark.slow
def test_a_side_trains_for_its_processor_time(small_dataset, tmp_path, monkeypatch, capsys):
    """The other one is there, as after an interrupted call."""
    monkeypatch.setattr(equal_time, "ROUNDS", 1)
    monkeypatch.setattr(equal_time, "EVALUATED", 64)
    folder = tmp_path / f"init-runs/{small_dataset.path.name}-0.03"
    folder.mkdir(parents=True)
    kept = {
        "data": small_dataset.path.name,
        "side": DEMO,
        "seed": 1,
        "steps": 9,
        "tokens": 9000,
        "loss_mlm": 2.5,
        "loss_mask_token": 0.125,
        "accuracy_nsp": 0.5,
    }
    (folder / f"{DEMO}-1.json").write_text(json.dumps(kept))
    command = ["bench_init", small_dataset.path, "--minutes", "0.03", "--out", tmp_path]
    monkeypatch.setattr("sys.argv", list(map(str, command)))
    main()
    seconds = load_config(folder / "recipe.toml").stop.seconds
    assert seconds == pytest.approx(1.62)
    speeds = json.loads((folder / "speeds.json").read_text())
    assert set(speeds) == {INIT, DEMO} and all(speed > 0 for speed in speeds.values())
    made, there = json.loads((tmp_path / "init.json").read_text())["rows"]
    # A run ends with the first step that reaches its tokens.
    assert made["side"] == INIT and 0 <= made["tokens"] - int(speeds[INIT] * seconds) < 6000
    assert there == {"minutes": 0.03, **kept} and "| 0.125 |" in capsys.readouterr().out
