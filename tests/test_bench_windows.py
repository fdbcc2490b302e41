"""Windows are compared with the global order on one dataset, and against the noise of seeds."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from benchmarks.quality.bench_windows import (
    WHOLE,
    difference,
    main,
    recipes,
    side_of,
    small_blocks,
    verdict,
)
from fastbert.data import block_writer


@pytest.fixture
def rows() -> list[dict[str, object]]:
    return [
        {"side": side, "loss_mlm": loss, "loss_mask_token": loss + 10 * (side == side_of(2))}
        for side, losses in (
            (WHOLE, (4.0, 5.0, 6.0)),
            (side_of(2), (4.5, 5.5, 8.0)),
            (side_of(9), (4.0, 5.0, 6.0)),
        )
        for loss in losses
    ]


def test_the_difference_and_the_noise_of_seeds(rows):
    # Means 5 and 6; variances 1 and 3.25.
    assert difference(rows, side_of(2), "loss_mlm") == (1.0, pytest.approx(math.sqrt(2.125)))
    lines = verdict(rows).splitlines()
    assert "| 2 windows | MLM loss | +1.0000 | 1.4577 | yes |" in lines[2]
    assert "| +11.0000 | 1.4577 | no |" in lines[3]
    assert "| 9 windows | MLM loss | +0.0000 | 1.0000 | yes |" in lines[4]


@pytest.mark.slow
def test_both_sides_have_the_same_blocks_and_other_windows(tmp_path: Path) -> None:
    text, size = tmp_path / "text.jsonl", block_writer.BLOCK_BYTES
    with open(text, "w") as file:
        for i in range(4000):
            words = " ".join(f"{i * j % 997}" for j in range(1, 30))
            file.write(json.dumps({"text": f"Number {i} is here. {words}. So it ends."}) + "\n")
    dataset = small_blocks(text, tmp_path / "dataset")
    assert block_writer.BLOCK_BYTES == size  # as before
    found = recipes(dataset, [4, 16])
    count = len(dataset.blocks["train"])
    windows = {side: dataset.windows(config.order.window) for side, config in found.items()}
    assert count > 16 and windows[WHOLE] == 1
    assert windows[side_of(4)] == count // (count // 4) >= 4
    assert windows[side_of(16)] == count // (count // 16) >= 16
    assert small_blocks(text, tmp_path / "dataset").sha256 == dataset.sha256


@pytest.mark.parametrize("windows", ["0", "1", "-4"])
def test_less_than_two_windows_are_refused(tmp_path, monkeypatch, capsys, windows: str) -> None:
    out = tmp_path / "out"
    monkeypatch.setattr("sys.argv", ["x", "x.txt", "--out", str(out), "--windows", "4", windows])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2 and not out.exists()
    assert "--windows: give numbers of two or more" in capsys.readouterr().err
