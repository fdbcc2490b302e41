"""The kernel benchmarks as far as a CPU can show them.

The dry run does everything that needs no GPU, and the tuner runs on the interpreter.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.kernels.cases import Case, arguments, outcome, production, truth
from benchmarks.kernels.kernel_report import goals, reached
from benchmarks.kernels.tune import BLOCKS, table_text
from fastbert_kernels._tiles import TABLE, chosen_by, tile
from fastbert_kernels.specs import SPECS

ROOT = Path(__file__).parents[1]
TABLES = json.loads(TABLE.read_text(encoding="utf-8"))


def run(
    module: str, *arguments: str | Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    command = [sys.executable, "-m", module, *map(str, arguments)]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, **environment},
        timeout=600,
    )


@pytest.mark.slow
def test_everything_runs_dry_and_is_reported(tmp_path):
    result = run(
        "benchmarks",
        "--out",
        tmp_path / "report",
        "--dry-run",
        "--seconds",
        "600",
        CUDA_VISIBLE_DEVICES="",
    )
    assert result.returncode == 0, result.stdout + result.stderr
    report = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    for part in ("kernels", "compilers"):
        assert f"| {part} | passed |" in report
    assert (
        "| gelu F=3072 | forward |" in report
        and "kernels.png" in report
        and "norm._forward_kernel" in report
    )
    rows = json.loads((tmp_path / "report" / "kernels.json").read_text())["rows"]
    assert {row["implementation"] for row in rows} == {"cpu", "eager"}
    assert all(row["error_over_allowed"] <= 1 for row in rows if row["implementation"] == "cpu")


@pytest.mark.slow
def test_a_folder_that_is_not_empty_is_refused(tmp_path):
    (tmp_path / "report.md").touch()
    result = run("benchmarks", "--out", tmp_path, "--dry-run")
    assert result.returncode == 2 and "is not empty" in result.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_gpu_one_line_says_so():
    result = run("benchmarks.kernels.tune")
    assert result.returncode == 2 and not result.stderr


@pytest.mark.slow
def test_tests_continue_after_one_that_ends_the_process(tmp_path):
    (tmp_path / "test_it.py").write_text(
        "import os\ndef test_a(): pass\ndef test_b(): os._exit(3)\ndef test_c(): assert 0\ndef "
        "test_d(): pass\n"
    )
    results = tmp_path / "results.jsonl"
    options = (
        "-q",
        "-p",
        "benchmarks.harness.pytest_shard",
        "--results",
        results,
        "--rootdir",
        tmp_path,
        tmp_path / "test_it.py",
    )
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    codes = [
        subprocess.run(
            [sys.executable, "-m", "pytest", *map(str, options)],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": path},
        ).returncode
        for _ in range(3)
    ]
    outcomes = [json.loads(line) for line in results.read_text().splitlines()]
    last = {result["test"].partition("::")[2]: result["outcome"] for result in outcomes}
    assert codes == [3, 1, 5]
    assert last == {"test_a": "passed", "test_b": "started", "test_c": "failed", "test_d": "passed"}


@pytest.mark.slow
def test_the_tuner_writes_the_table_with_what_it_found(tmp_path):
    pytest.importorskip("triton")
    path = tmp_path / "tiles.json"
    result = run(
        "benchmarks.kernels.tune",
        "--dry-run",
        "--kernels",
        "gelu_forward",
        "--table",
        path,
        "--seconds",
        "60",
        CUDA_VISIBLE_DEVICES="",
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "gelu_forward 32-bit" in result.stdout and "tried)" in result.stdout
    text = path.read_text(encoding="utf-8")
    written = json.loads(text)
    assert text == table_text(written)
    searched = {"sm_90": {"gelu_forward"}}
    for architecture, kernels in TABLES.items():
        for kernel, rows in kernels.items():
            if kernel not in searched.get(architecture, ()):
                assert written[architecture][kernel] == rows
            for before, after in zip(rows, written[architecture][kernel], strict=True):
                assert before.keys() == after.keys() and (before["bits"], before["size"]) == (
                    after["bits"],
                    after["size"],
                )


def test_the_table_is_as_the_tuner_would_write_it():
    text = TABLE.read_text(encoding="utf-8")
    assert text == table_text(json.loads(text))


def test_the_search_space_names_kernels_and_blocks_that_exist():
    for kernels in TABLES.values():
        for kernel, blocks in BLOCKS.items():
            assert all(blocks.keys() <= row.keys() for row in kernels[kernel])


def test_another_row_can_take_the_place_of_the_tables():
    kernel, size = "gelu_forward", 3072
    usual = tile(kernel, "sm_90", torch.float32, size)
    with chosen_by(lambda name, row: {**row, "num_warps": 32}):
        assert tile(kernel, "sm_90", torch.float32, size) == {**usual, "num_warps": 32}
    assert tile(kernel, "sm_90", torch.float32, size) == usual


def test_a_wrong_result_is_seen():
    device = torch.device("cpu")
    case = Case("norm", "tiny", {"T": 33, "D": 48}, 0.1)
    given = arguments(case, torch.float32, device)
    upstream = torch.randn(33, 48, generator=torch.Generator().manual_seed(0))
    bound = truth(case, given, upstream)
    values = outcome(case, given, "cpu", upstream)
    assert bound.share(values) <= 1
    for index in range(len(values)):
        wrong = [value.clone() for value in values]
        wrong[index].view(-1)[0] *= 1.001
        assert bound.share(wrong) > 1
        wrong[index].view(-1)[0] = float("nan")
        assert bound.share(wrong) > 1


def test_cases_cover_every_operation_and_fit_their_tokens():
    cases = production(4096)
    assert {case.operation for case in cases} == set(SPECS)
    assert len({str(case) for case in cases}) == len(cases)
    for case in cases:
        assert sum(case.shape.get("lengths", [case.shape.get("T", 0)])) <= 4096


def test_goals_are_read_off_the_rows():
    def row(case, which, implementation, ms, **rest):
        defaults = {"rate": 0.0, "share_of_peak": None, "extra_bytes": 10}
        return {
            "case": case,
            "pass": which,
            "implementation": implementation,
            "ms": ms,
            **defaults,
            **rest,
        }

    rows = [
        row("attention n=512 p=0", "forward", "triton", 1.0, rate=330e12),
        row("attention n=512 p=0.1", "forward", "triton", 1.2),
        row("mlm_loss D=768", "both", "triton", 1.0, extra_bytes=1),
        row("mlm_loss D=768", "both", "eager", 1.5),
        row("mlm_loss D=768", "both", "torch.compile", 0.99),
        {
            "case": "mlm_loss D=768",
            "implementation": "linear_cross_entropy",
            "note": "not in this torch",
        },
    ]
    verdicts = {goal[0]: (goal[1], reached(goal)) for goal in goals(rows) if goal[1] is not None}
    assert [(round(value, 2), verdict) for value, verdict in verdicts.values()] == [
        (1.17, "reached"),
        (1.2, "**not reached**"),
        (1.5, "reached"),
        (1.01, "reached"),
        (0.1, "reached"),
    ]
    assert sum(goal[1] is None for goal in goals(rows)) == len(goals(rows)) - 5
