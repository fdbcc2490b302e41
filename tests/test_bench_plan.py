"""The plan agrees with counted tensors, with bytes sent and with published runs (docs/plan.md)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.planning import bench_plan
from benchmarks.planning.bench_plan import QUICK, memory_row, recorded_communication
from benchmarks.planning.published_runs import FUSED, UNFUSED, published_row
from benchmarks.step.communication import VARIANTS
from fastbert.planning.memory import Sharding
from fastbert.planning.plan import communication_per_step
from tests.tiers import slow


@pytest.mark.parametrize(
    "case",
    [case if case.sizes.preset == "tiny" else slow(case, id=case.name) for case in QUICK],
    ids=lambda case: case.name,
)
def test_memory_is_within_a_tenth_of_counted_tensors(case):
    row = memory_row(case, torch.device("cpu"))
    for part in ("weights", "master weights", "moments"):
        assert row[f"{part}_predicted_mb"] == pytest.approx(row[f"{part}_measured_mb"], rel=0.01)
    assert abs(row["activations_difference"]) < 0.02
    assert abs(row["all_difference"]) < 0.1
    assert row["all_measured_mb"] > sum(
        row[f"{part}_measured_mb"] for part in ("weights", "moments")
    )


@pytest.mark.parametrize(
    "row", recorded_communication(), ids=lambda row: "-".join(str(value) for value in row.values())
)
def test_communication_is_what_deepspeed_was_seen_to_ask_for(row):
    P, N = 1000, row["ranks"]
    _, zero = VARIANTS[row["variant"]]
    sharding = Sharding(row["stage"], N, zero)
    sent, least = communication_per_step(P, sharding, row["micro_batches"], 4)
    one_pass = P * 4 * (N - 1) / N
    assert sent / one_pass == pytest.approx(row["asked"], rel=0.03)
    assert least / one_pass == pytest.approx(
        (2, 2, row["micro_batches"] + 1, 3 * row["micro_batches"])[row["stage"]]
    )


def test_the_record_has_every_stage():
    assert {row["stage"] for row in recorded_communication()} == {0, 1, 2, 3} and len(
        recorded_communication()
    ) == 28


@pytest.mark.parametrize(
    "run", FUSED, ids=lambda run: f"{run.what}, {run.gpus} x {run.gpu}, {run.lengths}"
)
def test_published_runs_of_fused_programs(run):
    assert abs(published_row(run)["difference"]) < 0.2


@pytest.mark.parametrize(
    "run", UNFUSED, ids=lambda run: f"{run.what}, {run.gpus} x {run.gpu}, {run.lengths}"
)
def test_programs_that_do_not_fuse_take_longer_than_planned(run):
    assert -0.5 < published_row(run)["difference"] < -0.2


@pytest.mark.slow
def test_what_it_writes(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench_plan, "QUICK", QUICK[:1])
    page = tmp_path / "page.md"
    names = ("machine", "summary", "memory", "communication", "fused", "unfused")
    page.write_text(
        "".join(f"{name}:\n<!-- {name} -->\nold\n<!-- end of {name} -->\n" for name in names)
    )
    monkeypatch.setattr(
        "sys.argv", ["bench_plan", "--quick", "--out", str(tmp_path), "--docs", str(page)]
    )
    assert bench_plan.main() == 0
    record = json.loads((tmp_path / "plan.json").read_text())
    assert {row["table"] for row in record["rows"]} == set(names) - {"machine", "summary"}
    assert all(0 < ratio <= 1 for ratio in record["ratios"].values())
    assert (
        "old" not in page.read_text()
        and "| MPT-125M" in page.read_text()
        and "| MPT-125M" in capsys.readouterr().out
    )


def test_the_page_promises_what_is_tested():
    page = (Path(__file__).parents[1] / "docs/plan.md").read_text(encoding="utf-8")
    for run in [*FUSED, *UNFUSED]:
        assert run.source in page
