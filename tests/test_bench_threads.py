"""The benchmark of threads beside busy processes, on real processes."""

from __future__ import annotations

import argparse

import pytest

from benchmarks.harness.record import Record, read_record
from benchmarks.step import bench_threads
from benchmarks.step.bench_threads import WAYS, WORKS, rows_of, threads_table


@pytest.mark.slow
@pytest.mark.parametrize("way", [way for way in WAYS if way != "OpenMP, default"])
def test_each_way_is_timed_alone_and_beside_others(small_dataset, monkeypatch, tmp_path, way):
    """OpenMP's default may take minutes beside others."""
    monkeypatch.setattr(bench_threads, "WAYS", {way: WAYS[way]})
    given = argparse.Namespace(data=small_dataset.path, recipe="demo", precision="fp32", steps=2)
    Record({}, list(rows_of(given))).write(tmp_path, "threads", "A title")
    rows = read_record(tmp_path / "threads.json").rows
    assert [(row["work"], row["way"]) for row in rows] == [(work, way) for work in WORKS]
    for row in rows:
        assert 0 < row["alone_ms"] <= row["alone_p90_ms"]
        assert 0 < row["beside_ms"] <= row["beside_p90_ms"]
    assert threads_table(rows).count(f"| {way} |") == len(WORKS)
