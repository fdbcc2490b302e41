"""`fastbert prepare`: from raw text to a dataset.

    sources ── read_chunks ──► chunks ── ChunkEncoder, one in each worker ──► ids ── ShardWriter ──► shards
               this process              documents, sentences, ids, hashes          this process, in order

The result depends on the text and the options alone: chunks are cut the same way and written in order however many
workers there are, and nothing in the dataset is a time or a path. It is written into a hidden folder beside the target,
and renamed when every byte is on the disk.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from fastbert.data import baselines as baselines
from fastbert.data.dataset import (
    FORMAT,
    MANIFEST,
    OTHER_FILES,
    SPLITS,
    ShardWriter,
    Split,
    token_dtype,
)
from fastbert.data.documents import Chunk, find_sources, parse, read_chunks
from fastbert.data.encode import ChunkEncoder, EncodedChunk
from fastbert.data.report import CorpusStats, Report, make_report
from fastbert.data.tokenizer import (
    check_vocab_size,
    load_tokenizer,
    save_tokenizer,
    special_ids,
    train_tokenizer,
)
from fastbert.data.workers import map_in_order
from fastbert.durable import sealed, sha256_of, sync
from fastbert.errors import InputError

VOCABULARY_BYTES = (
    64 << 20
)  # text that the vocabulary is trained on, spread evenly over the sources
# More held-out text than comes from this much on disk (some ten thousand documents) makes evaluation no better; fewer
# documents than these make it worthless.
HELDOUT_BYTES = 64 << 20
LEAST_HELDOUT = 16
BYTES_PER_WORKER = (
    16 << 20
)  # for less another process does not pay: it has to start, and to meet every word for the first time


def prepare(
    sources: Sequence[str | Path],
    out: str | Path,
    *,
    vocab_size: int = 30522,
    tokenizer: str | Path | None = None,
    lowercase: bool = True,
    workers: int | None = None,
    heldout: float = 0.01,
    text_format: str | None = None,
    text_field: str = "text",
    progress: bool = True,
) -> Report:
    """Make the dataset `out` from text files and folders.

    Args:
        sources: files and folders; documents.py says which formats.
        out: the dataset's folder; must not exist yet.
        vocab_size: of the WordPiece vocabulary that is trained on the text.
        tokenizer: a Hugging Face folder or vocab.txt to use instead; then vocab_size and lowercase are not looked at.
        lowercase: whether a trained vocabulary turns capitals into small letters.
        workers: processes that encode; by default one for each core, fewer for little text. They never change the result.
        heldout: share of the documents that is set aside for evaluation, chosen by a hash of the text, so that
            copies of a document never lie on both sides. Bounded by HELDOUT_BYTES and LEAST_HELDOUT.
        text_format: txt, lines, jsonl or parquet, where the suffix does not say it.
        text_field: the field of JSON lines, or the column of Parquet, that holds the text.
        progress: show a bar on stderr.

    Raises:
        InputError: anything wrong with the sources, the tokenizer, the options or the disk. Nothing is left behind then.
    """
    out = Path(out)
    if out.exists() or out.is_symlink():
        raise InputError(f"{out}: exists already; remove it or choose another --out")
    if not 0 < heldout <= 0.5:
        raise InputError(
            f"--heldout {heldout}: must be above 0 and at most 0.5 (share of the documents)"
        )
    if workers is not None and workers < 1:
        raise InputError(f"--workers {workers}: must be 1 or more")
    files, ignored = find_sources(sources, text_format)
    if ignored:
        more = ", ..." if len(ignored) > 5 else ""
        print(
            f"{len(ignored)} files left out by their suffix: {', '.join(map(str, ignored[:5]))}{more}",
            file=sys.stderr,
        )
    given = load_tokenizer(tokenizer) if tokenizer is not None else None
    size = sum(source.path.stat().st_size for source in files)
    options = {"heldout": heldout, "text_format": text_format, "text_field": text_field}
    if given is None:
        check_vocab_size(vocab_size)
        options |= {"vocab_size": vocab_size, "lowercase": lowercase}
    with _staging(out) as folder, _Bar(size, progress) as bar:
        vocabulary = given
        if vocabulary is None:
            sample = _spread(
                bar.follow("reading for the vocabulary", read_chunks(files, text_field))
            )
            with bar.wait("training the vocabulary"):
                vocabulary = train_tokenizer(
                    (text for chunk in sample for text in parse(chunk, text_field)),
                    vocab_size,
                    lowercase,
                )
            del sample
        save_tokenizer(vocabulary, folder / "tokenizer")
        dtype = token_dtype(vocabulary.get_vocab_size())

        def write(heldout_below: int) -> _Written:
            chunks = bar.follow("documents, sentences, tokens", read_chunks(files, text_field))
            processes = workers or min(_cores(), 1 + size // BYTES_PER_WORKER)
            # Closed at once after a failure, so that no process outlives this call.
            with closing(
                map_in_order(
                    ChunkEncoder,
                    (vocabulary.to_str(), text_field, heldout_below),
                    chunks,
                    processes,
                )
            ) as encoded:
                return _write(encoded, folder, dtype, heldout_below)

        written = write(int(min(heldout, HELDOUT_BYTES / max(size, 1)) * 2**64))
        if (below := _better_bound(written, sources)) is not None:
            for split in SPLITS:
                shutil.rmtree(folder / split)
            written = write(below)
        with bar.wait("baselines"):
            train, held = (
                Split(folder / name, written.writers[name].shards, dtype) for name in SPLITS
            )
            measured = baselines.measure(train, held, vocabulary.get_vocab_size())
        report = make_report(
            written.stats, vocabulary.get_vocab_size(), options.get("vocab_size"), measured
        )
        _write_text(folder / "baselines.json", _json(measured))
        _write_text(folder / "report.json", report.json())
        _write_text(folder / "report.md", report.markdown())
        (folder / MANIFEST).write_bytes(sealed(_manifest(folder, vocabulary, options, written)))
    return report


@dataclass(frozen=True)
class _Written:
    writers: dict[str, ShardWriter]
    stats: CorpusStats
    smallest: np.ndarray  # uint64, ascending: the smallest distinct hashes of documents
    heldout_below: int


def _write(
    chunks: Iterable[EncodedChunk], folder: Path, dtype: np.dtype, heldout_below: int
) -> _Written:
    """Write both splits and count."""
    writers = {name: ShardWriter(folder / name, dtype) for name in SPLITS}
    stats, smallest = CorpusStats(), np.zeros(0, np.uint64)
    for chunk in chunks:
        for name, part in zip(SPLITS, (chunk.train, chunk.heldout), strict=True):
            writers[name].add(part.tokens, part.sentences, part.documents)
        stats.add(chunk)
        smallest = np.unique(np.concatenate([smallest, chunk.document_hashes]))[: 4 * LEAST_HELDOUT]
    for writer in writers.values():
        writer.close()
    return _Written(writers, stats, smallest, heldout_below)


def _better_bound(written: _Written, sources: Sequence[str | Path]) -> int | None:
    """The bound of hashes that gives both splits enough documents, where the share alone did not; only little text."""
    distinct = len(written.smallest)  # as far as it matters
    if distinct < 2:
        found = "one distinct document" if distinct else "no document with text"
        raise InputError(
            f"{', '.join(map(str, sources))}: {found}; a dataset needs two at least, one to train on and one to hold out"
        )
    wanted = min(LEAST_HELDOUT, max(distinct // 4, 1))
    if written.smallest[wanted - 1] < written.heldout_below and written.writers["train"].shards:
        return None
    return int(written.smallest[wanted])


def _manifest(
    folder: Path, vocabulary: Tokenizer, options: dict[str, Any], written: _Written
) -> dict[str, Any]:
    files = {
        name: {"size": (folder / name).stat().st_size, "sha256": sha256_of(folder / name)}
        for name in OTHER_FILES
    }
    for writer in written.writers.values():
        files |= writer.files
    return {
        "format": FORMAT,
        "vocab_size": vocabulary.get_vocab_size(),
        "special": asdict(special_ids(vocabulary, folder)),
        "options": options,
        "tokenizer_sha256": files["tokenizer/tokenizer.json"]["sha256"],
        "splits": {name: writer.summary() for name, writer in written.writers.items()},
        "files": files,
    }


def _spread(chunks: Iterable[Chunk]) -> list[Chunk]:
    """Chunks spread evenly over the text, VOCABULARY_BYTES of them at most: every one, every second, every fourth, ..."""
    kept: list[Chunk] = []
    stride, size = 1, 0
    for i, chunk in enumerate(chunks):
        if i % stride == 0:
            kept.append(chunk)
            size += len(chunk.data)
        while size > VOCABULARY_BYTES and len(kept) > 1:
            kept, stride = kept[::2], 2 * stride
            size = sum(len(chunk.data) for chunk in kept)
    return kept


@contextmanager
def _staging(out: Path) -> Iterator[Path]:
    """A folder that becomes `out` if all goes well, and is removed if anything does not, a signal included."""
    folder = out.with_name(f".{out.name}.{os.getpid()}.partial")
    main = threading.current_thread() is threading.main_thread()
    before = (
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM)) if main else None
    )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir()
        yield folder
        for path in [*folder.rglob("*"), folder]:
            sync(path)
        folder.rename(out)
        sync(out.parent)
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise InputError(
                f"{out}: no space left on its disk ({error.strerror}); free some or choose another --out"
            ) from None
        raise InputError(f"{out}: cannot be written: {error}") from None
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        if main:
            signal.signal(signal.SIGTERM, before)


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")


def _json(value: Any) -> str:
    return json.dumps(value, indent=1) + "\n"


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Bar:
    """Progress on stderr, by bytes of the sources read."""

    def __init__(self, size: int, show: bool):
        self._size, self._progress = size, None
        if show:
            from rich.console import Console  # with what it needs 0.1 s: not where nobody looks
            from rich.progress import (
                BarColumn,
                DownloadColumn,
                Progress,
                TextColumn,
                TimeRemainingColumn,
                TransferSpeedColumn,
            )

            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                DownloadColumn(),
                TransferSpeedColumn(),
                TimeRemainingColumn(),
            )
            self._progress = Progress(*columns, console=Console(stderr=True))

    def __enter__(self) -> _Bar:
        if self._progress:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress:
            self._progress.stop()

    def follow(self, name: str, chunks: Iterable[Chunk]) -> Iterator[Chunk]:
        if not self._progress:
            yield from chunks
            return
        task = self._progress.add_task(name, total=self._size)
        for chunk in chunks:
            yield chunk
            self._progress.advance(task, chunk.read_bytes)
        self._progress.update(task, completed=self._size)

    @contextmanager
    def wait(self, name: str) -> Iterator[None]:
        """For work of unknown length: a bar that moves to and fro."""
        task = self._progress.add_task(name, total=None) if self._progress else None
        yield
        if self._progress and task is not None:
            self._progress.update(task, total=1, completed=1)
