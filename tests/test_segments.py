"""The segments of a file hold its documents, each once and in order, wherever the cuts fall."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastbert.data import segments
from fastbert.data.documents import parse, read_documents
from fastbert.data.segments import File, check_unchanged, lay_out, read_segment
from fastbert.data.sources import find_sources
from fastbert.data.unpack import BadRecord
from fastbert.errors import InputError

WIKI = '<doc id="1" title="T">\nT\n\nOne {}.\n\nTwo.\n</doc>\n'


def laid_out(path: Path, text_format: str | None = None) -> File:
    return lay_out(find_sources([path], text_format)[0][0])


def documents_of(file: File) -> list[list[str]]:
    """Return the documents of each segment."""
    return [
        [text for chunk in read_segment(file, number) for text in parse(chunk)]
        for number in range(file.segments)
    ]


pieces = st.sampled_from(
    ["a", "One.", "é", "\n", "\n\n", "\r\n", " \t\n", "\u00a0", "x" * 30, "\f\n", "\x85"]
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(pieces, min_size=1, max_size=60).map("".join), st.integers(1, 40))
@pytest.mark.parametrize("text_format", ["txt", "lines", "jsonl", "wiki"])
def test_every_document_is_in_one_segment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text_format: str, text: str, size: int
) -> None:
    if text_format == "jsonl":
        text = "".join(json.dumps({"text": line}) + "\n" for line in text.split("\n"))
    elif text_format == "wiki":
        text = "".join(WIKI.format(i) for i in range(1 + text.count("\n")))
    data = text.encode()
    if len(data) <= size:
        return
    path = tmp_path / "a.txt"
    path.write_bytes(data)
    known = None if text_format == "wiki" else text_format
    whole = [t.strip() for t in read_documents([path], known) if t.strip()]
    monkeypatch.setattr(segments, "SEGMENT_BYTES", size)
    monkeypatch.setattr(segments, "_MARGIN", 3)
    file = laid_out(path, known)
    old_mac = "\r" in text[:-1] and "\n" not in text
    assert file.segments == (1 if old_mac else -(-len(data) // size))
    found = [t.strip() for part in documents_of(file) for t in part]
    assert [t for t in found if t] == whole


def test_a_cut_is_local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each segment is read alone: its documents begin in it."""
    monkeypatch.setattr(segments, "SEGMENT_BYTES", 1000)
    draw = random.Random(1)
    lines = ["x" * draw.randint(1, 300) for _ in range(200)]
    path = tmp_path / "a.txt"
    path.write_text("\n".join(lines))
    starts, at = list[int](), 0
    for line in lines:
        starts.append(at)
        at += len(line) + 1
    wanted = [
        [line for line, start in zip(lines, starts, strict=True) if start in range(a, a + 1000)]
        for a in range(0, at, 1000)
    ]
    assert documents_of(laid_out(path, "lines")) == wanted[: len(documents_of(laid_out(path)))]


def test_groups_of_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"{i} " + random.Random(i).randbytes(20).hex() for i in range(1000)]
    table = pyarrow.table({"text": texts})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=70)
    monkeypatch.setattr(segments, "SEGMENT_BYTES", 5000)
    file = laid_out(tmp_path / "a.parquet")
    parts = documents_of(file)
    assert 5 < file.segments < 15 and all(parts)
    assert [text for part in parts for text in part] == texts
    assert file.bounds(0)[0] == 0 and file.bounds(file.segments - 1)[1] == file.size
    assert next(read_segment(file, 1)).line == 1 + len(parts[0])
    # One group is not cut, and a damaged file is left to whoever reads it.
    pyarrow.parquet.write_table(table, tmp_path / "b.parquet")
    assert laid_out(tmp_path / "b.parquet").segments == 1
    (tmp_path / "c.parquet").write_bytes(b"PAR1" + bytes(9000))
    with pytest.raises(InputError, match="not a valid Parquet file"):
        documents_of(laid_out(tmp_path / "c.parquet"))


@pytest.mark.parametrize(
    ("name", "data", "text_format"),
    [
        ("a.jsonl", gzip.compress(random.Random(0).randbytes(5000)), None),  # without its suffix
        ("a.txt.gz", gzip.compress(random.Random(0).randbytes(5000)), None),
        ("a.csv", b'text\n"a\nb"\n' * 300, None),
        ("a.txt", b"One.\r\rTwo.\r" * 300, None),  # an old Mac's
        ("a.txt", b"One.\n\nTwo.\n" * 300, "file"),
    ],
)
def test_what_is_not_cut(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    data: bytes,
    text_format: str | None,
) -> None:
    monkeypatch.setattr(segments, "SEGMENT_BYTES", 1000)
    (tmp_path / name).write_bytes(data)
    file = laid_out(tmp_path / name, text_format)
    assert file.segments == 1 and file.bounds(0) == (0, len(data))


def test_errors_come_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "SEGMENT_BYTES", 100)
    for data, words in (
        (b"", "is empty"),
        (b"PK\x03\x04" + bytes(200), "zip archive"),
        (("text " * 100).encode("utf-16"), "UTF-16"),
    ):
        (tmp_path / "a.txt").write_bytes(data)
        with pytest.raises(InputError, match=f"a.txt.*{words}"):
            laid_out(tmp_path / "a.txt")


@pytest.mark.parametrize("bad", [b"rubbish", b'{"text": "\xff"}'])
def test_lines_of_errors_are_those_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: bytes
) -> None:
    monkeypatch.setattr(segments, "SEGMENT_BYTES", 50)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n' * 77 + bad + b'\n{"text": "a"}\n' * 9)
    file = laid_out(path)
    with pytest.raises(BadRecord, match=r"a\.jsonl: line 78"):
        documents_of(file)
    skipped = list[BadRecord]()
    lines = 0
    for number in range(file.segments):
        for chunk in read_segment(file, number, skip_bad=True):
            before = len(skipped)
            parse(chunk, "text", skipped)
            if len(skipped) > before:
                assert lines + skipped[0].line == 78
            lines += chunk.data.count(b"\n")
    assert len(skipped) == 1


def test_a_document_that_is_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "SEGMENT_BYTES", 1000)
    monkeypatch.setattr(segments, "LONGEST_TEXT_BYTES", 2 << 20)
    path = tmp_path / "a.txt"
    path.write_bytes(b"Short.\n\n" + b"A line.\n" * (1 << 19))
    file = laid_out(path)
    for number in (0, 5):
        with pytest.raises(InputError, match=r"longer than 2 MiB; put a blank line"):
            list(read_segment(file, number))
    assert len(list(read_segment(laid_out(path, "lines"), 5))) == 1


def test_a_file_that_changed(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("One.")
    file = laid_out(path)
    check_unchanged(file)
    path.write_text("Two, and more.")
    with pytest.raises(InputError, match="changed while it was read"):
        check_unchanged(file)
    path.unlink()
    with pytest.raises(InputError, match="cannot be read"):
        check_unchanged(file)
