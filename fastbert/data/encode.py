"""Chunks of text to token ids, on all cores, in order: the hot path of `fastbert prepare`."""

from __future__ import annotations

import hashlib
import multiprocessing
import queue
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from fastbert.data.documents import Chunk, parse
from fastbert.data.sentences import split_sentences
from fastbert.data.store import token_dtype
from fastbert.data.tokenizer import Encoder, special_ids
from fastbert.errors import InputError

LONGEST_SENTENCE = 254  # tokens; a longer one is cut: two of them and three special tokens still fit 512


@dataclass(frozen=True)
class Part:
    """What a chunk adds to one split, as ShardWriter.add takes it."""

    tokens: np.ndarray  # [T], as stored
    sentences: np.ndarray  # int64 [S], tokens of each
    documents: np.ndarray  # int64 [N], sentences of each


@dataclass(frozen=True)
class EncodedChunk:
    """The documents of a chunk that hold text, and what the report wants to know of them."""

    train: Part
    heldout: Part
    document_hashes: np.ndarray  # uint64 [N], of the text, in both splits
    sentence_hashes: np.ndarray  # uint64, of the ids; a sentence that was cut counts as one
    empty_documents: int
    cut_sentences: int
    unknown_tokens: int


class ChunkEncoder:
    """Encodes chunks, one after the other.

    Args:
        tokenizer: as `Tokenizer.to_str` gives it.
        text_field: see documents.py.
        heldout_below: documents with a hash below this are held out.
    """

    def __init__(self, tokenizer: str, text_field: str, heldout_below: int):
        self._tokenizer = Tokenizer.from_str(tokenizer)
        self._tokenizer.encode_special_tokens = True
        self._encode = Encoder(self._tokenizer)
        self._unknown = special_ids(self._tokenizer, "tokenizer").unk
        self._dtype = token_dtype(self._tokenizer.get_vocab_size())
        self._text_field, self._heldout_below = text_field, heldout_below

    def __call__(self, chunk: Chunk) -> EncodedChunk:
        texts = parse(chunk, self._text_field)
        hashes = np.array([hash_text(text) for text in texts], np.uint64)
        split = [split_sentences(text) for text in texts]
        tokens, lengths = self._encode([sentence for sentences in split for sentence in sentences])
        owners = np.repeat(np.arange(len(texts)), [len(sentences) for sentences in split])[lengths > 0]
        lengths = lengths[lengths > 0]
        sentence_hashes = _hash_spans(tokens, lengths)
        pieces = -(-lengths // LONGEST_SENTENCE)
        lengths, owners = _cut(lengths, pieces), np.repeat(owners, pieces)
        documents = np.bincount(owners, minlength=len(texts))
        heldout = hashes < self._heldout_below

        def part(chosen: np.ndarray) -> Part:
            sentences = chosen[owners]
            ids = tokens[np.repeat(sentences, lengths)].astype(self._dtype)
            return Part(ids, lengths[sentences], documents[chosen & (documents > 0)])

        return EncodedChunk(
            train=part(~heldout),
            heldout=part(heldout),
            document_hashes=hashes[documents > 0],
            sentence_hashes=sentence_hashes,
            empty_documents=int((documents == 0).sum()),
            cut_sentences=int((pieces > 1).sum()),
            unknown_tokens=int((tokens == self._unknown).sum()),
        )


def encode_chunks(chunks: Iterable[Chunk], tokenizer: str, text_field: str, heldout_below: int, workers: int) -> Iterator[EncodedChunk]:
    """Encode chunks in `workers` processes (1: in this one) and give the results back in order.

    A few chunks a worker are on their way at any time, so that memory does not grow with the text. Close the generator
    to end the processes.

    Raises:
        InputError: whatever is wrong with the text, or a worker that was killed.
    """
    if workers == 1:
        yield from map(ChunkEncoder(tokenizer, text_field, heldout_below), chunks)
        return
    # Not concurrent.futures: when a worker is killed while a chunk is being written to it, its pool waits for ever.
    pool: list[_Worker] = []
    source = iter(chunks)
    more, sent, given = True, 0, 0  # chunks left to read; how many went to workers, and how many came out in order
    done: dict[int, EncodedChunk] = {}
    try:
        _start(pool, workers)
        for worker in pool:
            worker.send((tokenizer, text_field, heldout_below))
        while more or given < sent:
            # Two for each worker, so that it never waits; no further ahead than the order allows to give out soon.
            for worker in pool:
                while more and len(worker.waiting) < 2 and sent - given < 4 * workers:
                    chunk = next(source, None)
                    if chunk is None:
                        more = False
                    else:
                        worker.send(chunk)
                        worker.waiting.append(sent)
                        sent += 1
            for number, result in _receive(pool):
                done[number] = result
            while given in done:
                yield done.pop(given)
                given += 1
    finally:
        for worker in pool:
            worker.connection.close()  # the worker reads the end of its input, and ends
        for worker in pool:
            worker.process.join()


def hash_text(text: str) -> int:
    """64 bits of a document's text; the same in every process and on every machine."""
    return int.from_bytes(hashlib.blake2b(text.strip().encode(), digest_size=8).digest(), "little")


@dataclass
class _Worker:
    process: BaseProcess
    connection: Connection
    waiting: deque[int]  # numbers of the chunks it has

    def send(self, message: Chunk | tuple[str, str, int]) -> None:
        try:
            self.connection.send(message)
        except OSError:
            raise _killed() from None


def _start(pool: list[_Worker], count: int) -> None:
    """Add `count` new workers to the pool."""
    # Not fork: the tokenizer's threads, alive after training, would leave locked locks behind in the copies.
    spawn = multiprocessing.get_context("spawn")
    # A signal in the middle of a start would leave half a process. And Ctrl-C, which reaches every process of a terminal,
    # stays blocked in the workers, who inherit that: this process ends them.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        for _ in range(count):
            ours, theirs = spawn.Pipe()
            # What a worker needs goes through the pipe: start() would wait for ever if it had much to pass on to a
            # process that is killed before it reads.
            process = spawn.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            pool.append(_Worker(process, ours, deque()))
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _receive(pool: list[_Worker]) -> Iterator[tuple[int, EncodedChunk]]:
    """Wait for at least one result; give all that are there, with the numbers of their chunks."""
    busy = {worker.connection: worker for worker in pool if worker.waiting}
    for connection in wait(list(busy)) if busy else []:
        worker = busy[connection]  # type: ignore[index]
        try:
            result = worker.connection.recv()
        except (EOFError, OSError):
            raise _killed() from None
        if isinstance(result, InputError):
            raise result
        yield worker.waiting.popleft(), result


def _killed() -> InputError:
    return InputError(
        "a worker of prepare was killed, most likely for want of memory: try fewer --workers"
        " (in a script of your own, call prepare under `if __name__ == '__main__':`)"
    )


def _serve(connection: Connection) -> None:
    """A worker: chunks in, results out, until the other end is closed, be it because that process is gone."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    chunks: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def read() -> None:
        # In a thread of its own: were both sides writing at once, neither would ever read.
        try:
            while True:
                chunks.put(connection.recv())
        except (EOFError, OSError):
            chunks.put(None)

    threading.Thread(target=read, daemon=True).start()
    arguments = chunks.get()
    if arguments is None:
        return
    encoder = ChunkEncoder(*arguments)
    while (chunk := chunks.get()) is not None:
        try:
            result: EncodedChunk | InputError = encoder(chunk)
        except InputError as error:
            result = error
        try:
            connection.send(result)
        except OSError:
            return


def _cut(lengths: np.ndarray, pieces: np.ndarray) -> np.ndarray:
    """Lengths after each is cut into `pieces` parts, all but the last of LONGEST_SENTENCE."""
    result = np.full(int(pieces.sum()), LONGEST_SENTENCE)
    result[np.cumsum(pieces) - 1] = lengths - (pieces - 1) * LONGEST_SENTENCE
    return result


def _hash_spans(tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """uint64 [len(lengths)]: a hash of the ids of each span, of their order too."""
    if len(lengths) == 0:
        return np.zeros(0, np.uint64)
    starts = np.cumsum(lengths) - lengths
    places = (np.arange(len(tokens)) - np.repeat(starts, lengths)).astype(np.uint64)
    mixed = _mix(_mix(tokens.astype(np.uint64) + np.uint64(1)) + places)
    return _mix(np.add.reduceat(mixed, starts))


def _mix(x: np.ndarray) -> np.ndarray:
    """Each number to another that looks random. Source: Steele et al., 2014, splitmix64's finalizer."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
