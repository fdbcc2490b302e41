"""The short form of the data benchmark on real text.

Both sides agree, a disagreement is noticed, and what the benchmark writes can be read.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.data.bench_data import check_same_ids, job, repeat
from benchmarks.harness.record import read_record
from fastbert.data.dataset import TokenDataset, open_dataset
from fastbert.data.documents import read_documents

pytest.importorskip("datasets", reason="the rival: pip install fastbert-pretrain[test]")
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def both(
    english_jsonl: Path, small_dataset: TokenDataset, tmp_path_factory: pytest.TempPathFactory
) -> tuple[TokenDataset, Path]:
    """A dataset, and the rival's result for the same 40 documents."""
    folder = tmp_path_factory.mktemp("both")
    text = repeat(english_jsonl, folder / "text.jsonl", 1, 40)
    for side in ("fastbert", "datasets"):
        found = job(side, text, small_dataset.tokenizer_dir, folder / side, 1, 1)
        assert found["seconds"] > 0
    return open_dataset(folder / "fastbert"), folder / "datasets"


@pytest.mark.slow
def test_both_sides_have_the_same_ids(both: tuple[TokenDataset, Path]) -> None:
    assert check_same_ids(*both) == 40


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_other_ids_are_noticed(both: tuple[TokenDataset, Path], split: str, tmp_path: Path) -> None:
    dataset = Path(shutil.copytree(both[0].path, tmp_path / "dataset"))
    tokens = dataset / "part-00000" / f"{split}-00000"
    data = bytearray(tokens.read_bytes())
    data[-2] ^= 1  # the last token of the last document
    tokens.write_bytes(data)
    with pytest.raises(SystemExit, match="has different ids"):
        check_same_ids(open_dataset(dataset, verify=False), both[1])


def test_a_repeated_text_has_other_documents(english_jsonl: Path, tmp_path: Path) -> None:
    documents = list(read_documents([repeat(english_jsonl, tmp_path / "text.jsonl", 3, 20)]))
    assert (
        len(documents) == len(set(documents)) == 60
        and documents[:20] == list(read_documents([english_jsonl]))[:20]
    )


@pytest.mark.slow
def test_short_form(english_jsonl: Path, small_dataset: TokenDataset, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "benchmarks.data.bench_data",
        english_jsonl,
        small_dataset.path,
        "--out",
        tmp_path,
        "--quick",
    ]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
        "OMP_NUM_THREADS": "1",
    }
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    record = read_record(tmp_path / "data.json")
    assert {row["part"] for row in record.rows} == {"prepare", "vocabulary", "loader", "memory"}
    assert all(ratio > 0 for ratio in record.ratios.values()) and len(record.ratios) == 3
    prepared = [row for row in record.rows if row["part"] == "prepare"]
    assert all(
        row["seconds"] < row["with_baselines_s"]
        for row in prepared
        if row["side"].startswith("fastbert")
    )
    report = (tmp_path / "data.md").read_text(encoding="utf-8")
    assert report.startswith("# Data") and all(row["side"] in report for row in prepared)
    assert (tmp_path / "data.png").stat().st_size > 10_000
