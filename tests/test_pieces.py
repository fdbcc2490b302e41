"""A piece holds the documents of its segments; what is known of it needs no documents."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fastbert.data.corpus_plan import Plan
from fastbert.data.dataset import TokenDataset
from fastbert.data.documents import read_documents
from fastbert.data.encode import ChunkEncoder, hash_spans, hash_text
from fastbert.data.job import Job
from fastbert.data.pieces import PieceEncoder, is_intact, read_documents_of, read_piece
from fastbert.data.segments import lay_out
from fastbert.data.sources import find_sources
from fastbert.errors import InputError
from tests.prepared import small_pieces

__all__ = ["small_pieces"]


@pytest.fixture
def job(
    small_dataset: TokenDataset, english_jsonl: Path, tmp_path: Path, small_pieces: None
) -> Job:
    tokenizer = (small_dataset.tokenizer_dir / "tokenizer.json").read_text(encoding="utf-8")
    sources, _ = find_sources([english_jsonl])
    (tmp_path / "dataset.work").mkdir()
    plan = Plan([lay_out(source) for source in sources], 1 << 16)
    return Job(tmp_path / "dataset", plan, "text", tokenizer, 0.01)


def test_pieces_hold_all_documents(job: Job, english_jsonl: Path) -> None:
    encode, encoder = PieceEncoder(job), ChunkEncoder(job.tokenizer, "text")
    hashes = list[int]()
    for number in range(job.plan.pieces):
        assert encode(number) == 0
        piece = read_piece(job, number)
        assert piece is not None and not piece.shared.any()
        assert is_intact(job.piece_path(number), piece.sha256)
        parts = list(read_documents_of(job.piece_path(number), has_words=False))
        assert sum(len(part.tokens) for part in parts) == piece.tokens
        assert sum(len(part.sentences) for part in parts) == piece.sentences
        assert sum(len(part.documents) for part in parts) == len(piece.hashes)
        hashes += piece.hashes.tolist()
        for part in parts:
            assert part.sentences.sum() == len(part.tokens)
            assert part.documents.sum() == len(part.sentences)
            one_by_one = np.split(part.tokens, np.cumsum(part.sentences)[:-1])
            alone = [hash_spans(tokens, np.array([len(tokens)]))[0] for tokens in one_by_one]
            assert part.sentence_hashes is not None and part.sentence_hashes.tolist() == alone
            kept = np.arange(len(part.documents)) % 3 > 0
            chosen = part.chosen(kept)
            assert chosen.sentence_hashes is not None
            assert np.array_equal(
                chosen.sentence_hashes, hash_spans(chosen.tokens, chosen.sentences)
            )
    texts = [text for text in read_documents([english_jsonl]) if text.strip()]
    assert sorted(hashes) == sorted(map(hash_text, texts))
    # A document's ids do not depend on the piece that it is in.
    first = next(read_documents_of(job.piece_path(0), has_words=False))
    number = [hash_text(text) for text in texts].index(int(_first_hash(job)))
    alone = encoder.encode([texts[number]]).documents.tokens
    assert first.tokens[: len(alone)].tolist() == alone.tolist()


def _first_hash(job: Job) -> np.uint64:
    piece = read_piece(job, 0)
    assert piece is not None
    return piece.hashes[0]


def test_a_text_that_changed_is_no_piece(job: Job, tmp_path: Path) -> None:
    path = tmp_path / "b.jsonl"
    path.write_text(json.dumps({"text": "One."}) + "\n")
    plan = Plan([lay_out(find_sources([path])[0][0])])
    changed = Job(job.out, plan, "text", job.tokenizer, 0.01)
    path.write_text(json.dumps({"text": "Another."}) + "\n")
    with pytest.raises(InputError, match="changed while it was read"):
        PieceEncoder(changed)(0)
    assert list(changed.work.iterdir()) == []
