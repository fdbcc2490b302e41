"""Assemble a shard of training text from pieces, and set the held-out documents of these aside.

dataset-KEY/part-00000/train-00000      the shard
shard-KEY-00000.npz                     its table of blocks, its counts, and the held-out
                                        documents with their hashes; written last
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
from tokenizers import Tokenizer

from fastbert.data.block_table import Blocks
from fastbert.data.block_writer import BlockWriter
from fastbert.data.blocks import BLOCK
from fastbert.data.encode import Documents
from fastbert.data.format_3 import HELDOUT_HASHES
from fastbert.data.job import Job
from fastbert.data.manifest import token_dtype
from fastbert.data.pieces import Piece, PieceEncoder, is_intact, read_documents_of, read_piece
from fastbert.data.report import CorpusStats
from fastbert.data.results import disk_errors, publish, read_arrays, write_arrays
from fastbert.data.settle import Settled
from fastbert.data.tokenizer import is_bert, special_ids

Item = TypeVar("Item")

TRAIN, HELDOUT = 0, 1  # as in dataset.SPLITS


@dataclass(frozen=True)
class Shard:
    """A shard of training text, and what was held out beside it."""

    size: int  # bytes of the file
    table: np.ndarray  # BLOCK [blocks]
    heldout: Documents
    heldout_hashes: np.ndarray  # uint64, of the documents that are held out
    facts: dict[str, Any]  # of CorpusStats
    arrays: dict[str, np.ndarray]  # of CorpusStats


class Assembler:
    """Assembles shards, given by their numbers.

    Args:
        job: what to make.
        settled: what was decided.
        verify: of a shard that is there already, compare every block with its SHA-256; else only
            its size is compared.
    """

    def __init__(self, job: Job, settled: Settled, verify: bool = True):
        self._job, self._settled, self._verify = job, settled, verify
        tokenizer = Tokenizer.from_str(job.tokenizer)
        self._dtype = token_dtype(tokenizer.get_vocab_size())
        self._has_words = not is_bert(tokenizer)
        self._unknown = special_ids(tokenizer, "tokenizer").unk

    def __call__(self, number: int) -> int:
        """Publish a shard unless it is there, and return the bytes of text that it stands for.

        Raises:
            InputError: the disk refused, or a damaged piece could not be made again.
        """
        job, settled = self._job, self._settled
        begin, end = settled.groups[number : number + 2].tolist()
        text = sum(map(job.plan.piece_size, range(begin, end)))
        if is_assembled(job, number, self._verify):
            return text
        stats = CorpusStats(self._unknown, settled.bits)
        heldout, hashes = list[Documents](), [np.zeros(0, np.uint64)]
        path = job.part / f"train-{number:05d}"
        with disk_errors(job.out):
            path.parent.mkdir(parents=True, exist_ok=True)
            # Threads read the next documents and count the last ones while these are written.
            with publish(path, job.work) as new, ThreadPoolExecutor(2) as pool:
                writer = BlockWriter(new, TRAIN, number, self._dtype)
                counting = pool.submit(lambda: None)
                for train, held, of_held in _one_ahead(pool, self._split(begin, end)):
                    counting.result()
                    counting = pool.submit(_count, stats, train, held)
                    writer.add(train)
                    if len(of_held):
                        heldout.append(held)
                        hashes.append(of_held)
                counting.result()
                table = writer.close()
                size = new.stat().st_size
            facts, arrays = stats.to_arrays()
            arrays |= _as_arrays(heldout, self._dtype, self._has_words)
            arrays |= {"table": table, "hashes": np.concatenate(hashes)}
            write_arrays(job.shard_path(number), {**facts, "size": size}, **arrays)
        return text

    @cached_property
    def _held_before(self) -> np.ndarray | None:
        """The hashes of documents that earlier parts hold out."""
        if self._job.base is None:
            return None
        files = [
            np.load(path, allow_pickle=False)
            for path in sorted(self._job.out.glob(f"part-*/{HELDOUT_HASHES}"))
        ]
        return np.concatenate([np.zeros(0, np.uint64), *files])

    def _split(self, begin: int, end: int) -> Iterator[tuple[Documents, Documents, np.ndarray]]:
        """Yield training text of pieces, held-out text, and the hashes of the latter."""
        for number in range(begin, end):
            for documents, dropped, of_text in self._documents(number):
                held = of_text < self._settled.heldout_below
                if self._held_before is not None:
                    held |= np.isin(of_text, self._held_before)
                train = documents.chosen(~held & ~dropped)
                held &= ~dropped
                yield train, documents.chosen(held), of_text[held]

    def _documents(self, number: int) -> Any:
        """Yield the documents of a piece, which are left out, and their hashes."""
        piece = self._piece(number)
        first = int(self._settled.first_document[number])
        dropped = np.zeros(len(piece.hashes), bool)
        if self._dropped is not None:
            dropped = self._dropped[first : first + len(piece.hashes)]
        at = 0
        for documents in read_documents_of(self._job.piece_path(number), self._has_words):
            chosen = slice(at, at + len(documents.documents))
            yield documents, dropped[chosen], piece.hashes[chosen]
            at = chosen.stop

    def _piece(self, number: int) -> Piece:
        """Return a piece; one that is missing or damaged is made again."""
        piece = read_piece(self._job, number)
        if piece is None or not is_intact(self._job.piece_path(number), piece.sha256):
            self._encoder(number)
            piece = read_piece(self._job, number)
            assert piece is not None
        return piece

    @cached_property
    def _encoder(self) -> PieceEncoder:
        return PieceEncoder(self._job)

    @cached_property
    def _dropped(self) -> np.ndarray | None:
        if not (self._job.drop_copies or self._job.without):
            return None
        return np.load(self._job.dropped_path, mmap_mode="r", allow_pickle=False)


def _one_ahead(pool: ThreadPoolExecutor, items: Iterator[Item]) -> Iterator[Item]:
    """Yield the items, while a thread takes the next one."""
    waiting = pool.submit(next, items, None)
    while (item := waiting.result()) is not None:
        waiting = pool.submit(next, items, None)
        yield item


def _count(stats: CorpusStats, train: Documents, heldout: Documents) -> None:
    stats.add(train)
    stats.add(heldout, heldout=True)


def is_assembled(job: Job, number: int, verify: bool) -> bool:
    """Whether a shard is there, and with `verify` whether no block is damaged."""
    shard = read_shard(job, number)
    path = job.part / f"train-{number:05d}"
    if shard is None or not path.exists() or path.stat().st_size != shard.size:
        return False
    if not verify or not shard.size:
        return True
    tokenizer = Tokenizer.from_str(job.tokenizer)
    size, parts = tokenizer.get_vocab_size(), np.full(len(shard.table), job.part_number)
    width, words = token_dtype(size).itemsize, not is_bert(tokenizer)
    blocks = Blocks(job.dataset, shard.table, parts, width, words, size)
    return not any(claim.problem(job.dataset) for claim in blocks.claims())


def read_shard(job: Job, number: int) -> Shard | None:
    """Return what is known of a shard; None where it is missing or damaged."""
    found = read_arrays(job.shard_path(number))
    if found is None:
        return None
    facts, arrays = found
    table, hashes = arrays.pop("table"), arrays.pop("hashes")
    tokens, sentences, documents = (
        arrays.pop(f"held_{name}") for name in ("tokens", "sentences", "documents")
    )
    words = arrays.pop("held_words", None)
    begins = None if words is None else np.unpackbits(words, count=len(tokens)).astype(bool)
    heldout = Documents(tokens, sentences, documents, begins)
    if table.dtype != BLOCK:
        return None
    return Shard(facts.pop("size"), table, heldout, hashes, facts, arrays)


def _as_arrays(heldout: list[Documents], dtype: np.dtype, has_words: bool) -> dict[str, np.ndarray]:
    def joined(arrays: list[np.ndarray], kind: Any) -> np.ndarray:
        return np.concatenate([np.zeros(0, kind), *arrays]).astype(kind, copy=False)

    result = {
        "held_tokens": joined([part.tokens for part in heldout], dtype),
        "held_sentences": joined([part.sentences for part in heldout], np.int64),
        "held_documents": joined([part.documents for part in heldout], np.int64),
    }
    if has_words:
        begins = [part.begins_word for part in heldout if part.begins_word is not None]
        result["held_words"] = np.packbits(joined(begins, bool))
    return result
