"""What `prepare --estimate` says of a text is what `prepare` makes of it."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from fastbert.data.prepare import prepare
from fastbert.errors import InputError
from fastbert.planning import preparing
from fastbert.planning.preparing import describe, estimate
from tests.prepared import small_pieces

__all__ = ["small_pieces"]


@pytest.fixture
def text(english_documents: list[str], tmp_path: Path) -> Path:
    folder = tmp_path / "text"
    folder.mkdir()
    lines = [json.dumps({"text": document}) for document in english_documents]
    (folder / "a.jsonl").write_text("\n".join(lines[:300]))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress("\n".join(lines[300:]).encode()))
    return folder


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("most", [1 << 30, 1 << 17])
def test_an_estimate(text: Path, tmp_path: Path, monkeypatch, most: int) -> None:
    monkeypatch.setattr(preparing, "SAMPLE_BYTES", most)
    out = tmp_path / "dataset"
    found = estimate([text], out, vocab_size=1000, workers=2)
    assert list(tmp_path.iterdir()) == [text], "nothing is written"
    size = sum(path.stat().st_size for path in text.iterdir())
    assert found.size == size and found.files == 2 and found.workers == 2
    # A segment that lies within one document has no text of its own.
    assert found.sample > 0.9 * size if most == 1 << 30 else 0 < found.sample < 0.7 * size
    assert found.encoding_s == pytest.approx(size / found.bytes_per_s / 2)
    assert found.vocabulary_s > 0
    prepare([text], out, vocab_size=1000, workers=1, progress=False)
    shards = [*out.glob("part-*/train-*"), *out.glob("part-*/heldout-*0")]
    made = sum(path.stat().st_size for path in shards)
    assert found.dataset == pytest.approx(made, rel=0.1 if most == 1 << 30 else 0.3)
    rows = dict(describe(found))
    assert "2 files" in rows["text"] and "2 workers" in rows["encoding"]
    given = estimate([text], tmp_path / "other", tokenizer=out / "tokenizer")
    assert given.vocabulary_s == 0 and "vocabulary" not in dict(describe(given))
    with pytest.raises(InputError, match="exists already"):
        estimate([text], out)
