"""Small pieces, so that a little text has many tasks; and how datasets are compared."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from fastbert.data import corpus_plan, segments

# Run in a new process before `prepare`.
SMALL_PIECES = (
    "from fastbert.data import corpus_plan, segments; "
    "corpus_plan.PIECE_BYTES = 1 << 16; segments.SEGMENT_BYTES = 1 << 14; "
)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut text into segments of 16 KiB and pieces of 64 KiB."""
    monkeypatch.setattr(corpus_plan, "PIECE_BYTES", 1 << 16)
    monkeypatch.setattr(segments, "SEGMENT_BYTES", 1 << 14)


def files_of(dataset: Path) -> dict[str, bytes]:
    """Return the content of every file of a dataset."""
    return {
        str(path.relative_to(dataset)): path.read_bytes()
        for path in sorted(dataset.rglob("*"))
        if path.is_file()
    }


def command(text: Path, out: Path, **options: Any) -> list[str]:
    """Return a command line that prepares a text in small pieces."""
    code = SMALL_PIECES + (
        "from fastbert.data.prepare import prepare; "
        f"prepare([{str(text)!r}], {str(out)!r}, **{options!r})"
    )
    return [sys.executable, "-c", code]
