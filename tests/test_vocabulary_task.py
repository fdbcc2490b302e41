"""The vocabulary is trained on what the plan chose, and nothing else is read."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from fastbert.data import corpus_plan, vocabulary_task
from fastbert.data.corpus_plan import Plan
from fastbert.data.documents import Chunk
from fastbert.data.job import Job, Vocabulary
from fastbert.data.segments import lay_out
from fastbert.data.sources import Source, find_sources
from fastbert.data.vocabulary import train_tokenizer
from fastbert.data.vocabulary_task import train_vocabulary
from tests.prepared import small_pieces

__all__ = ["small_pieces"]


def test_sample_for_the_vocabulary() -> None:
    for count, kept in [
        (10, range(10)),
        (11, range(0, 11, 2)),
        (100, range(0, 100, 16)),
        (1, range(1)),
    ]:
        chunks = [Chunk(Source(Path("x"), "txt", ""), b"0123456789", i, 0, 0) for i in range(count)]
        assert [chunk.line for chunk in vocabulary_task.spread(chunks, 100)] == list(kept)
    large = Chunk(Source(Path("x"), "txt", ""), b"0" * 1000, 1, 0, 0)
    assert vocabulary_task.spread([large], 100) == [large]


def job_of(folder: Path, out: Path) -> Job:
    sources, _ = find_sources([folder])
    out.with_name(f"{out.name}.work").mkdir()
    plan = Plan([lay_out(source) for source in sources], 1 << 16)
    return Job(out, plan, "text", Vocabulary("wordpiece", 400, True, False), 0.01)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("here", [True, False])
def test_it_equals_training_on_all_documents(
    english_documents: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, here: bool
) -> None:
    """In this process, and in one of its own."""
    monkeypatch.setattr(vocabulary_task, "TRAINED_HERE_BYTES", 1 << 30 if here else 0)
    (tmp_path / "text").mkdir()
    lines = [json.dumps({"text": document}) + "\n" for document in english_documents]
    (tmp_path / "text/a.jsonl").write_text("".join(lines[:300]))
    (tmp_path / "text/b.jsonl.gz").write_bytes(gzip.compress("".join(lines[300:]).encode()))
    job = job_of(tmp_path / "text", tmp_path / "out")
    assert not job.has_vocabulary
    train_vocabulary(job)
    assert job.has_vocabulary
    wanted = train_tokenizer(english_documents, 400)
    assert Tokenizer.from_str(job.tokenizer).get_vocab() == wanted.get_vocab()


@pytest.mark.usefixtures("small_pieces")
def test_only_the_sample_is_read(
    english_documents: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A broken record outside the sample is not noticed: no second pass over the text."""
    monkeypatch.setattr(corpus_plan.Plan.sample, "__defaults__", (1 << 16,))
    monkeypatch.setattr(corpus_plan, "SEGMENT_BYTES", 1 << 14)
    (tmp_path / "text").mkdir()
    path = tmp_path / "text/a.jsonl"
    lines = [json.dumps({"text": document}) for document in english_documents]
    path.write_text("\n".join(lines))
    job = job_of(tmp_path / "text", tmp_path / "out")
    read = [part.segment for part, _ in job.plan.sample()]
    assert 1 < len(read) <= 4 and 1 not in read
    data = bytearray(path.read_bytes())
    data[(1 << 14) + 9000] = 0xFF  # in the segment that is not read
    path.write_bytes(data)
    train_vocabulary(job_of(tmp_path / "text", tmp_path / "other"))
