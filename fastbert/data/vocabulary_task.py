"""Train the vocabulary of a job on the segments that its plan chose; nothing else is read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial

from fastbert.data.byte_level import train_byte_level
from fastbert.data.corpus_plan import VOCABULARY_BYTES, Part
from fastbert.data.documents import Chunk, parse
from fastbert.data.job import Job, Vocabulary
from fastbert.data.results import disk_errors, write_json
from fastbert.data.segments import check_unchanged, read_segment
from fastbert.data.unpack import BadRecord
from fastbert.data.vocabulary import BPE, train_tokenizer
from fastbert.data.workers import apply_in_child

Sample = list[tuple[Part, int]]  # segments, and how many bytes to read of each

# With less text than this the vocabulary is trained in this process, in about a second.
TRAINED_HERE_BYTES = 1 << 19


def train_vocabulary(job: Job) -> None:
    """Train and publish the vocabulary.

    Raises:
        InputError: the text cannot be read, has no character, or the disk refused.
    """
    sample = job.plan.sample()
    if sum(limit for _, limit in sample) < TRAINED_HERE_BYTES:
        trained = train_on_sample(job, sample)
    else:  # so that Ctrl-C ends it at once
        trained = apply_in_child(partial, (train_on_sample, job), sample)
    with disk_errors(job.out):
        write_json(job.vocabulary_path, {"tokenizer": trained})


def train_on_sample(job: Job, sample: Sample) -> str:
    """Train the vocabulary of a job on a sample; return it as `Tokenizer.to_str` does."""
    options = job.tokenizer_or_vocabulary
    assert isinstance(options, Vocabulary)
    chunks = spread(read_sample(job, sample))
    skipped = None if job.bad_allowed == 0 else list[BadRecord]()
    texts = (text for chunk in chunks for text in parse(chunk, job.text_field, skipped))
    if options.algorithm == BPE:
        return train_byte_level(texts, options.size).to_str()
    trained = train_tokenizer(texts, options.size, options.lowercase, options.keep_accents)
    return trained.to_str()


def read_sample(job: Job, sample: Sample) -> Iterator[Chunk]:
    """Yield the text of a sample as `Plan.sample` returns it."""
    for part, limit in sample:
        file, read = job.plan.files[part.file], 0
        for chunk in read_segment(file, part.segment, job.text_field, job.bad_allowed != 0):
            yield chunk
            read += chunk.read_bytes
            if read >= limit:
                break
        check_unchanged(file)


def spread(chunks: Iterable[Chunk], most: int = VOCABULARY_BYTES) -> list[Chunk]:
    """Return chunks spread evenly over the text, at most `most` bytes in all.

    These are all chunks, or every second, every fourth, and so on.
    """
    kept: list[Chunk] = []
    stride, size = 1, 0
    for i, chunk in enumerate(chunks):
        if i % stride == 0:
            kept.append(chunk)
            size += len(chunk.data)
        while size > most and len(kept) > 1:
            kept, stride = kept[::2], 2 * stride
            size = sum(len(chunk.data) for chunk in kept)
    return kept
