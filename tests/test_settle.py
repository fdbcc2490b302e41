"""The held-out bound, the copies and the shards follow from the hashes of all pieces."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastbert.data import settle as module
from fastbert.data.prepare import prepare
from fastbert.data.settle import _groups
from tests.prepared import small_pieces

__all__ = ["small_pieces"]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.integers(1, 200))
def test_a_shard_ends_with_the_piece_that_fills_it(sizes: list[int], most: int) -> None:
    before, module.SHARD_BYTES = module.SHARD_BYTES, most
    try:
        groups = _groups(np.append(0, np.cumsum(sizes))).tolist()
    finally:
        module.SHARD_BYTES = before
    assert groups[0] == 0 and groups[-1] == len(sizes) and sorted(set(groups)) == groups
    for begin, end in itertools.pairwise(groups):
        assert sum(sizes[begin : end - 1]) < most
        assert sum(sizes[begin:end]) >= most or end == len(sizes)


@pytest.mark.usefixtures("small_pieces")
def test_lines_of_bad_records(tmp_path: Path, english_documents: list[str]) -> None:
    """Pieces are encoded in a mixed order, and count lines from where they begin."""
    lines = [json.dumps({"text": document}) for document in english_documents]
    wanted = list(range(3, len(lines), 20))
    for line in wanted:
        lines[line] = '{"text": 1}'
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    options: dict[str, Any] = {"vocab_size": 300, "progress": False, "bad_records": "skip"}
    report = prepare([tmp_path], tmp_path / "dataset", workers=1, **options)
    listed = report.figures["bad_records_listed"]
    found = [(Path(record["file"]).name, record["line"]) for record in listed]
    assert found == [(f"{n}.jsonl", line + 1) for n in ("a", "b") for line in wanted]
    assert all("is a number, not a string" in record["reason"] for record in listed)
