"""metrics.jsonl has complete lines and exact floats, and loses nothing at a restart."""

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
        # The file is not closed in between.
        assert [r["loss"] for r in read_metrics(tmp_path / "metrics.jsonl")] == values[: step + 1]


def test_a_fresh_start_empties_the_file_and_a_resume_appends(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for fresh, step in [(True, 1), (False, 2), (False, 3)]:
        file = MetricsFile(path, fresh)
        file.write({"step": step})
        file.close()
    assert [r["step"] for r in read_metrics(path)] == [1, 2, 3]
    MetricsFile(path, fresh=True).close()
    assert list(read_metrics(path)) == []


# Nor the first bytes of a pointer of git-annex or Git LFS: such a file is refused as a whole.
WITHOUT_NEWLINE = (
    st.binary(max_size=9000)
    .map(lambda data: data.replace(b"\n", b""))
    .filter(lambda data: not data.startswith((b"/annex/objects/", b"version https://git-lfs")))
)


@given(st.lists(st.integers(0, 10**6), max_size=5), WITHOUT_NEWLINE)
def test_a_torn_last_line_is_dropped(tmp_path_factory, whole, torn):
    path = tmp_path_factory.mktemp("torn") / "metrics.jsonl"
    path.write_bytes(b"".join(json.dumps({"step": n}).encode() + b"\n" for n in whole) + torn)
    file = MetricsFile(path, fresh=False)
    file.write({"step": -1})
    file.close()
    assert [r["step"] for r in read_metrics(path)] == [*whole, -1]


@given(st.lists(st.one_of(
    st.integers(0, 10**6),
    WITHOUT_NEWLINE,
    st.sampled_from([
        b'{"step": 5, "lo{"step": 6}', b"6, 1.5]", b"1.5", b"null", b'"step"', b"[1]", b"{}",
        b'{"step": "7"}', b'{"step": true}', b'{"step": 7, "event": 1}', b"[" * 100_000,
        b'{"step": ' + b"9" * 5000 + b"}", b"\0" * 4096 + b'{"step": 7}', b"\xff", b"",
    ]),
), max_size=12))  # fmt: skip
def test_a_bad_line_is_skipped_and_counted(tmp_path_factory, parts):
    """Lines may be torn where two machines append over a network disk, or contain a hole of zeros.

    Complete lines around them are kept.
    """
    path, bad = tmp_path_factory.mktemp("bad") / "metrics.jsonl", []
    path.write_bytes(
        b"".join(
            (part if isinstance(part, bytes) else json.dumps({"step": part}).encode()) + b"\n"
            for part in parts
        )
    )
    assert list(read_metrics(path, bad)) == [
        {"step": part} for part in parts if isinstance(part, int)
    ]
    assert bad == [number for number, part in enumerate(parts, 1) if isinstance(part, bytes)]


def test_what_is_not_finite_is_json_all_the_same(tmp_path):
    """NaN is not valid JSON, so other programs would refuse the whole line."""
    MetricsFile(tmp_path / "metrics.jsonl", fresh=True).write(
        {"step": 1, "loss": math.nan, "lr": math.inf, "grad_norm": 2.0}
    )
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=pytest.fail) == {
        "step": 1,
        "loss": None,
        "lr": None,
        "grad_norm": 2.0,
    }


def test_a_missing_file_has_nothing(tmp_path):
    assert list(read_metrics(tmp_path / "none.jsonl")) == []


def test_a_file_that_cannot_be_read_is_not_a_missing_one(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "gone").symlink_to(tmp_path / "not mounted" / "metrics.jsonl")
    (tmp_path / "folder").mkdir()
    for name, error in {
        "loop": "Too many levels",
        "gone": "No such file",
        "folder": "Is a directory",
    }.items():
        with pytest.raises(OSError, match=error):
            list(read_metrics(tmp_path / name))


def test_a_full_disk_is_an_oserror_at_once(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    file = MetricsFile(tmp_path / "metrics.jsonl", fresh=False)
    with pytest.raises(OSError, match="No space left") as raised:
        file.write({"step": 1})
    assert raised.value.filename == str(tmp_path / "metrics.jsonl")
