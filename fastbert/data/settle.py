"""What is decided once all pieces are encoded: held-out documents, copies, and shards.

Only the hashes and counts of the pieces are read, 8 bytes a document.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastbert.data.copies import Seen, distinct
from fastbert.data.job import Job
from fastbert.data.manifest import token_dtype
from fastbert.data.pieces import LISTED, Piece, read_piece, too_many
from fastbert.data.report import DuplicateEstimator, TextStats
from fastbert.data.results import disk_errors, publish, read_arrays, write_arrays
from fastbert.data.unpack import BadRecord
from fastbert.errors import InputError

# The text of at most this many bytes on disk (some ten thousand documents) is held out: more does
# not improve the evaluation. With fewer held-out documents than LEAST_HELDOUT it is worthless.
HELDOUT_BYTES = 64 << 20
LEAST_HELDOUT = 16
# A shard is closed at the end of the first piece after this many bytes of token ids.
SHARD_BYTES = 512 << 20


@dataclass(frozen=True)
class Settled:
    """What was decided."""

    heldout_below: int  # documents with a hash below this one are held out
    groups: np.ndarray  # int64: shard k is made of the pieces from groups[k] to groups[k + 1]
    first_document: np.ndarray  # int64: the number of each piece's first document, and of all
    bits: int  # see DuplicateEstimator, for sentences
    text: TextStats  # the counts of all pieces
    copies: int  # how many documents are left out as copies
    evaluated: int  # how many because they share text with evaluation sets
    # The share of copies among documents that stay, and whether it is from a sample.
    duplicates: tuple[float, bool]
    bad: list[dict[str, Any]]  # the first bad records


def read_settled(job: Job) -> Settled | None:
    """Return what was decided before; None where nothing was."""
    found = read_arrays(job.settled_path)
    if found is None:
        return None
    facts, arrays = found
    share, sampled = facts["duplicates"]
    text = TextStats.from_json(facts["text"])
    found = {**facts, **arrays, "text": text, "duplicates": (share, sampled)}
    return Settled(**found)


def settle(job: Job, sources: Sequence[str | Path]) -> Settled:
    """Decide, and publish the result.

    Args:
        job: what to make; all its pieces are there.
        sources: for the error.

    Raises:
        InputError: more bad records than allowed, or not enough documents (NothingToAdd).
        MissingPiece: a piece is damaged.
    """
    text, seen, estimator = TextStats(), Seen(), DuplicateEstimator()
    smallest, largest = np.zeros(0, np.uint64), 0
    counts, ids, dropped = [0], [0], [np.zeros(0, bool)]
    copies = evaluated = sentences = 0
    width = _width(job)
    for piece in _pieces(job):
        text += piece.text
        hashes, leave_out = piece.hashes, piece.shared
        evaluated += int(leave_out.sum())
        if job.drop_copies:
            first = np.zeros(len(hashes), bool)
            first[~leave_out] = seen.add(hashes[~leave_out])
            copies += int((~first & ~leave_out).sum())
            leave_out = ~first
        if job.drop_copies or job.without:
            dropped.append(leave_out)
        kept = hashes[~leave_out]
        estimator.add(kept)
        smallest = distinct(np.concatenate([smallest, kept]))[: 4 * LEAST_HELDOUT]
        largest = max(largest, int(kept.max(initial=0)))
        counts.append(len(hashes))
        ids.append(piece.tokens * width)
        sentences += piece.sentences
    bad = _bad_records(job) if text.bad_records else []
    if bad and job.bad_allowed == 0:  # pieces of an earlier call, which allowed some
        raise bad[0]
    if job.bad_allowed is not None and text.bad_records > job.bad_allowed:
        raise too_many(text.bad_records, job.bad_allowed, bad)
    below = _heldout_bound(job, smallest, largest, sources)
    facts = {
        "heldout_below": below,
        "bits": DuplicateEstimator.bits_for(sentences),
        "text": text.to_json(),
        "copies": copies,
        "evaluated": evaluated,
        "duplicates": [estimator.duplicates(), estimator.sampled],
        "bad": [_as_dict(record) for record in bad],
    }
    arrays = {"groups": _groups(np.cumsum(ids)), "first_document": np.cumsum(counts)}
    with disk_errors(job.out):
        if len(dropped) > 1:
            with publish(job.dropped_path) as new, open(new, "wb") as file:
                np.save(file, np.concatenate(dropped), allow_pickle=False)
        write_arrays(job.settled_path, facts, **arrays)
    settled = read_settled(job)
    assert settled is not None
    return settled


class MissingPiece(Exception):
    """A piece is missing or damaged, and has to be made again."""


class NothingToAdd(InputError):
    """The text has nothing that could become a part of the dataset."""


def _pieces(job: Job) -> Iterator[Piece]:
    for number in range(job.plan.pieces):
        piece = read_piece(job, number)
        if piece is None:
            job.piece_path(number).with_suffix(".npz").unlink(missing_ok=True)
            raise MissingPiece
        yield piece


def _width(job: Job) -> int:
    from tokenizers import Tokenizer

    return token_dtype(Tokenizer.from_str(job.tokenizer).get_vocab_size()).itemsize


def _groups(ends: np.ndarray) -> np.ndarray:
    """Return where shards begin, by the running sum of the bytes of the pieces' token ids."""
    groups, begin = [0], 0
    for number in range(1, len(ends)):
        if ends[number] - begin >= SHARD_BYTES or number == len(ends) - 1:
            groups.append(number)
            begin = int(ends[number])
    return np.array(groups, np.int64)


def _heldout_bound(
    job: Job, smallest: np.ndarray, largest: int, sources: Sequence[str | Path]
) -> int:
    """Return the bound of the hashes of held-out documents.

    It is the given share where that gives both splits enough documents; little text needs another
    one. Of an added part it is at most that of the parts before: then no held-out document of it
    has a copy in their training text.

    Args:
        job: what to make.
        smallest: uint64, ascending: the smallest distinct hashes of documents that stay.
        largest: the largest of these hashes.
        sources: for the error.
    """
    share = min(job.heldout, HELDOUT_BYTES / max(job.plan.size, 1))
    below = int(share * 2**64)
    distinct = len(smallest)  # capped; larger numbers make no difference
    names = ", ".join(map(str, sources))
    kept = " is left by --without" if job.without else ""
    if job.base is not None:
        if not distinct:
            raise NothingToAdd(f"{names}: no document with text{kept}; there is nothing to add")
        return min(below, job.base.heldout_below)
    if distinct < 2:
        found = "one distinct document" if distinct else "no document with text"
        raise InputError(
            f"{names}: {found}{kept}; "
            "a dataset needs at least two, one to train on and one to hold out"
            + (
                "; put a blank line between documents, or use --format lines"
                if job.blank_lines and not job.without
                else ""
            )
        )
    wanted = min(LEAST_HELDOUT, max(distinct // 4, 1))
    if smallest[wanted - 1] < below <= largest:
        return below
    return int(smallest[wanted])


def _bad_records(job: Job) -> list[BadRecord]:
    """Return the first bad records in the order of the sources, with their lines in the files."""
    lines = np.zeros(int(job.plan.first_segment[-1]), np.int64)
    found = list[tuple[int, BadRecord]]()
    for number, piece in enumerate(_pieces(job)):
        parts = job.plan.piece(number)
        segments = [int(job.plan.first_segment[part.file]) + part.segment for part in parts]
        lines[segments] = piece.lines
        found += [(segments[i], BadRecord(*arguments)) for i, arguments in piece.bad]
    before = np.cumsum(lines) - lines
    found.sort(key=lambda each: each[0])
    result = list[BadRecord]()
    for segment, record in found[:LISTED]:
        file = int(np.searchsorted(job.plan.first_segment, segment, "right")) - 1
        skip = before[segment] - before[job.plan.first_segment[file]]
        result.append(record.moved(int(skip)))
    return result


def _as_dict(record: BadRecord) -> dict[str, Any]:
    place = {record.unit: record.line} if record.line else {}
    reason = record.reason if record.byte < 0 else f"byte {record.byte}: {record.reason}"
    return {"file": os.fspath(record.path), **place, "reason": reason}
