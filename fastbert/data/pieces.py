"""Encode a piece of the text, and read what was encoded.

piece-KEY.arrays    for each chunk of text, one after another: token ids, tokens of each
                    sentence (uint8), sentences of each document (uint32), hashes of the sentences
                    (uint64) and, for tokenizers other than BERT's, a bit for each token that
                    begins a word
piece-KEY.npz       hashes of the documents, which of them share text with evaluation sets,
                    counts, bad records, and the SHA-256 of the other file; written last
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastbert.data.decontaminate import Shared
from fastbert.data.documents import Chunk, lines_before
from fastbert.data.encode import ChunkEncoder, Documents, EncodedChunk, hash_spans
from fastbert.data.job import Job
from fastbert.data.report import TextStats
from fastbert.data.results import (
    ArrayFile,
    disk_errors,
    publish,
    read_array_file,
    read_arrays,
    write_arrays,
)
from fastbert.data.segments import check_unchanged, read_segment
from fastbert.data.unpack import BadRecord
from fastbert.durable import sha256_of
from fastbert.errors import InputError

LISTED = 1000  # bad records of a piece, and of the report
_QUOTED = 3  # bad records in an error


@dataclass(frozen=True)
class Piece:
    """What is known of an encoded piece without reading its documents."""

    sha256: str  # of the documents' file
    text: TextStats
    tokens: int  # of all documents
    sentences: int  # of all documents
    hashes: np.ndarray  # uint64 [D], of the text of each document
    shared: np.ndarray  # bool [D]: the document shares text with evaluation sets
    lines: list[int]  # line feeds in each segment of the piece, where lines are counted so
    # The first bad records, as BadRecord takes them, with the number of the segment within the
    # piece in front. Lines are counted from there.
    bad: list[tuple[int, list[Any]]]


class PieceEncoder:
    """Encodes pieces, given by their numbers.

    Args:
        job: what to make; the vocabulary must have been trained.
        advance: receives the bytes on disk of what was encoded.
    """

    def __init__(self, job: Job, advance: Callable[[int], None] | None = None):
        self._job, self._advance = job, advance
        self._encode = ChunkEncoder(job.tokenizer, job.text_field)
        self._shared = None
        if job.without:
            found = read_arrays(job.grams_path)
            assert found is not None, f"{job.grams_path}: the evaluation sets are not there"
            self._shared = Shared(found[1]["grams"])

    def __call__(self, number: int) -> int:
        """Publish a piece, and return how many bad records it had.

        Raises:
            InputError: the text cannot be read, has too many bad records, has changed since the
                plan was made, or the disk refused.
        """
        job, path = self._job, self._job.piece_path(number)
        text, lines, bad = TextStats(), list[int](), list[tuple[int, list[Any]]]()
        hashes, shared = [np.zeros(0, np.uint64)], [np.zeros(0, bool)]
        tokens = sentences = 0
        parts = job.plan.piece(number)
        with disk_errors(job.out), publish(path) as new:
            written = ArrayFile(new)
            for i, part in enumerate(parts):
                file = job.plan.files[part.file]
                lines.append(0)
                strict = job.bad_allowed == 0
                for chunk in read_segment(file, part.segment, job.text_field, not strict):
                    lines[-1] += chunk.data.count(b"\n") if file.step else 0
                    encoded = self._encode_chunk(chunk, i, text, bad)
                    documents = encoded.documents
                    written.add(*_arrays(documents))
                    tokens += len(documents.tokens)
                    sentences += len(documents.sentences)
                    hashes.append(encoded.hashes)
                    if self._shared is not None:
                        shared.append(self._shared(documents))
                    if self._advance is not None:
                        self._advance(chunk.read_bytes)
            sha256 = written.close()
            for file in dict.fromkeys(job.plan.files[part.file] for part in parts):
                check_unchanged(file)
        facts = {
            "sha256": sha256,
            "text": text.to_json(),
            "tokens": tokens,
            "sentences": sentences,
            "lines": lines,
            "bad": bad,
        }
        both = np.concatenate(hashes), np.concatenate(shared)
        if self._shared is None:
            both = both[0], np.zeros(len(both[0]), bool)
        with disk_errors(job.out):
            write_arrays(path.with_suffix(".npz"), facts, hashes=both[0], shared=both[1])
        return text.bad_records

    def _encode_chunk(
        self, chunk: Chunk, segment: int, text: TextStats, bad: list[tuple[int, list[Any]]]
    ) -> EncodedChunk:
        """Encode a chunk, and add its counts to `text` and its bad records to `bad`."""
        allowed = self._job.bad_allowed
        skipped = list[BadRecord]()
        encoded = self._encode(chunk, None if allowed == 0 else skipped)
        text.add(encoded)
        text.bad_records += len(skipped)
        if allowed is not None and text.bad_records > allowed:
            before = lines_before(chunk.source.path, chunk.counted_from)
            raise too_many(text.bad_records, allowed, [each.moved(before) for each in skipped])
        bad += [(segment, list(each.args)) for each in skipped[: LISTED - len(bad)]]
        return encoded


def too_many(count: int, allowed: int, records: list[BadRecord]) -> InputError:
    """Return the error for more bad records than are allowed, which quotes some."""
    quoted = "; ".join(map(str, records[:_QUOTED]))
    return InputError(
        f"{count:,} bad records, and --bad-records allows {allowed:,}: {quoted}; "
        "correct them, or allow more"
    )


def read_piece(job: Job, number: int) -> Piece | None:
    """Return what is known of a piece; None where it is missing or damaged."""
    path = job.piece_path(number)
    found = read_arrays(path.with_suffix(".npz"))
    if found is None or not path.exists():
        return None
    facts, arrays = found
    return Piece(
        sha256=facts["sha256"],
        text=TextStats.from_json(facts["text"]),
        tokens=facts["tokens"],
        sentences=facts["sentences"],
        hashes=arrays["hashes"],
        shared=arrays["shared"],
        lines=facts["lines"],
        bad=[(segment, arguments) for segment, arguments in facts["bad"]],
    )


def is_intact(path: Path, sha256: str) -> bool:
    """Whether the documents of a piece are those that were written."""
    try:
        return sha256_of(path) == sha256
    except FileNotFoundError:
        return False


def _arrays(documents: Documents) -> list[np.ndarray]:
    arrays = [
        documents.tokens,
        documents.sentences.astype(np.uint8),
        documents.documents.astype("<u4"),
        # Of all work on a shard, these would take the longest. Here all workers share it.
        hash_spans(documents.tokens, documents.sentences).astype("<u8", copy=False),
    ]
    if documents.begins_word is not None:
        arrays.append(np.packbits(documents.begins_word))
    return arrays


def read_documents_of(path: Path, has_words: bool) -> Iterator[Documents]:
    """Yield the documents of a piece, chunk by chunk.

    Args:
        path: the file.
        has_words: whether it says which tokens begin a word.
    """
    for tokens, sentences, documents, hashes, *bits in read_array_file(path, 4 + has_words):
        begins = np.unpackbits(bits[0], count=len(tokens)).astype(bool) if bits else None
        counts = sentences.astype(np.int64), documents.astype(np.int64)
        yield Documents(tokens, *counts, begins, hashes)
