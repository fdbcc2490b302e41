"""How long `prepare` takes on a text, and how large the dataset becomes: measured on a sample.

The sample is spread over the user's own text and encoded here with the user's own options. The rate
is that of its second half: the first words of any text are new, and take longer. Times are CPU
times, so other programs on the machine hardly change them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastbert.data.encode import ChunkEncoder
from fastbert.data.job import Job, Vocabulary
from fastbert.data.prepare import Options, job_of, processes
from fastbert.data.unpack import BadRecord
from fastbert.data.vocabulary_task import read_sample, train_on_sample

SAMPLE_BYTES = 16 << 20  # on disk
TRAINED_BYTES = 4 << 20


@dataclass(frozen=True)
class Preparation:
    """An estimate.

    Attributes:
        size: bytes of the text on disk.
        files, pieces: into how many parts it is divided; a piece is encoded by one process.
        sample: bytes on disk that were encoded to measure.
        bytes_per_s: bytes on disk that a core encodes in a second.
        workers: processes at the same time.
        vocabulary_s: training the vocabulary; 0 where it is given.
        encoding_s: with these workers, if each has a core for itself.
        dataset: bytes of its token ids and offsets.
    """

    size: int
    files: int
    pieces: int
    sample: int
    bytes_per_s: float
    workers: int
    vocabulary_s: float
    encoding_s: float
    dataset: float


def estimate(sources: Sequence[str | Path], out: str | Path, **options: Any) -> Preparation:
    """Measure a sample of the text; nothing is written.

    Args:
        sources, out, options: as `prepare` takes them.

    Raises:
        InputError: as `prepare`, as far as it shows in the sample.
    """
    chosen = Options(**options)
    job = job_of(sources, Path(out), chosen)
    tokenizer, vocabulary_s = _tokenizer(job)
    sampled = _encode(job, tokenizer)
    # A byte of a compressed file is more text than one of another file.
    sizes = dict.fromkeys(sampled, 0)
    for file in job.plan.files:
        if file.source.compression in sizes:
            sizes[file.source.compression] += file.size
    seconds = dataset = 0.0
    for kind, chunks in sampled.items():
        read, cpu, _ = chunks[len(chunks) // 2 :].sum(0)
        seconds += sizes[kind] * cpu / read
        read, _, made = chunks.sum(0)
        dataset += sizes[kind] * made / read
    size, pieces = job.plan.size, job.plan.pieces
    workers, measured = processes(chosen, size, pieces), sum(sizes.values())
    rate = measured / max(seconds, 1e-6)
    return Preparation(
        size=size,
        files=len(job.plan.files),
        pieces=pieces,
        sample=int(sum(chunks[:, 0].sum() for chunks in sampled.values())),
        bytes_per_s=rate,
        workers=workers,
        vocabulary_s=vocabulary_s,
        encoding_s=size / rate / workers,
        dataset=dataset * size / measured,
    )


def _encode(job: Job, tokenizer: str) -> dict[str, np.ndarray]:
    """Encode the sample.

    Returns:
        For each compression of its files, float64 [chunks, 3]: bytes read from the disk, seconds of
        CPU time, and bytes in the dataset.
    """
    encode, skipped = ChunkEncoder(tokenizer, job.text_field), list[BadRecord]()
    found = dict[str, list[tuple[float, float, float]]]()
    began = time.process_time()
    for chunk in read_sample(job, job.plan.sample(SAMPLE_BYTES)):
        part = encode(chunk, skipped if job.bad_allowed != 0 else None).documents
        made = part.tokens.nbytes + 2 * len(part.sentences) + 4 * len(part.documents)
        ended = time.process_time()
        found.setdefault(chunk.source.compression, []).append(
            (chunk.read_bytes, ended - began, made)
        )
        began = ended
    return {kind: np.array(chunks) for kind, chunks in found.items()}


def _tokenizer(job: Job) -> tuple[str, float]:
    """Return a tokenizer, and how long training the vocabulary takes: in proportion to its text."""
    if not isinstance(job.tokenizer_or_vocabulary, Vocabulary):
        return job.tokenizer, 0.0
    whole, part = job.plan.sample(), job.plan.sample(TRAINED_BYTES)
    began = time.process_time()
    trained = train_on_sample(job, part)
    seconds = time.process_time() - began
    return trained, seconds * sum(n for _, n in whole) / sum(n for _, n in part)


def describe(p: Preparation) -> list[tuple[str, str]]:
    """Return the rows of the printed table: name and value."""
    files = f"{p.files:,} file{'s' * (p.files > 1)}"
    rows = [("text", f"{_size(p.size)} in {files}, in {p.pieces:,} pieces")]
    if p.vocabulary_s:
        rows.append(("vocabulary", f"{_duration(p.vocabulary_s)}, by one process"))
    return [
        *rows,
        (
            "encoding",
            f"{_duration(p.encoding_s)} by {p.workers:,} worker{'s' * (p.workers > 1)}: "
            f"{p.bytes_per_s / 1e6:,.1f} MB/s of a core, measured on {_size(p.sample)}",
        ),
        ("dataset", f"{_size(p.dataset)}, and as much in OUT.work while it is made"),
    ]


def _size(size: float) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


def _duration(seconds: float) -> str:
    for unit, length in (("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:,.0f} seconds"
