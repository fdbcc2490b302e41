"""metrics.jsonl: every line whole, floats to the last digit, nothing lost over a break."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastbert.training.metrics import MetricsFile, read_metrics


def test_floats_round_trip(tmp_path):
    values = [0.1 + 0.2, 1e-300, math.pi, 7.0, 5e-324]
    file = MetricsFile(tmp_path / "metrics.jsonl", fresh=True)
    for step, value in enumerate(values):
        file.write({"step": step, "loss": value})
        assert [r["loss"] for r in read_metrics(tmp_path / "metrics.jsonl")] == values[: step + 1]  # without a close


def test_a_fresh_start_begins_anew_and_a_resume_goes_on(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for fresh, step in [(True, 1), (False, 2), (False, 3)]:
        file = MetricsFile(path, fresh)
        file.write({"step": step})
        file.close()
    assert [r["step"] for r in read_metrics(path)] == [1, 2, 3]
    MetricsFile(path, fresh=True).close()
    assert list(read_metrics(path)) == []


@given(st.lists(st.integers(0, 10**6), max_size=5), st.text(st.characters(exclude_characters="\n"), max_size=9000))
def test_a_torn_last_line_is_dropped(tmp_path_factory, whole, torn):
    path = tmp_path_factory.mktemp("torn") / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": n}) + "\n" for n in whole) + torn, encoding="utf-8", newline="\n")
    file = MetricsFile(path, fresh=False)
    file.write({"step": -1})
    file.close()
    assert [r["step"] for r in read_metrics(path)] == [*whole, -1]


def test_a_missing_file_has_nothing(tmp_path):
    assert list(read_metrics(tmp_path / "none.jsonl")) == []


def test_a_full_disk_is_an_oserror_at_once(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    file = MetricsFile(tmp_path / "metrics.jsonl", fresh=False)
    with pytest.raises(OSError, match="No space left"):
        file.write({"step": 1})
