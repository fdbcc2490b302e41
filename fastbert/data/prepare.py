"""`fastbert prepare`: from raw text to a dataset.

    sources ─ read_chunks ─► chunks ─ ChunkEncoder, one per worker ─► ids ─ ShardWriter ─► shards
              this process            documents, sentences, ids, hashes     this process, in order

The result depends on the text and the options only. Chunks are cut in the same way and written in
order for any number of workers, and the dataset contains no time and no path. It is written into a
hidden folder beside the target, which is renamed when every byte is on the disk.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from fastbert import storage
from fastbert.data import baselines as baselines
from fastbert.data.byte_level import rounded_up
from fastbert.data.copies import find_copies, without_copies
from fastbert.data.cuts import Cuts
from fastbert.data.dataset import (
    FORMAT,
    MANIFEST,
    SPLITS,
    Split,
    other_files,
    token_dtype,
)
from fastbert.data.documents import Chunk, read_chunks
from fastbert.data.encode import ChunkEncoder, EncodedChunk
from fastbert.data.progress import Progress
from fastbert.data.report import CorpusStats, Report, make_report
from fastbert.data.shards import ShardWriter
from fastbert.data.sources import Source, find_sources
from fastbert.data.staging import staging
from fastbert.data.tokenizer import (
    is_bert,
    kind_of,
    load_tokenizer,
    save_tokenizer,
    special_ids,
    unreachable,
)
from fastbert.data.unpack import BadRecord
from fastbert.data.vocabulary import (
    ALGORITHMS,
    BPE,
    WORDPIECE,
    VocabularyTrainer,
    check_vocab_size,
)
from fastbert.data.workers import apply_in_child, map_in_order
from fastbert.durable import sealed, sha256_of
from fastbert.errors import InputError
from fastbert.machine import usable_cores
from fastbert.presence import status
from fastbert.terminal import tell

# Bytes of text that the vocabulary is trained on, spread evenly over the sources.
VOCABULARY_BYTES = 64 << 20
# With less text than this the vocabulary is trained in this process, in about a second.
TRAINED_HERE_BYTES = 1 << 19
# The text of at most this many bytes on disk (some ten thousand documents) is held out: more does
# not improve the evaluation. With fewer held-out documents than LEAST_HELDOUT it is worthless.
HELDOUT_BYTES = 64 << 20
LEAST_HELDOUT = 16
# One more worker for each of these. With less text it does not pay: a worker has to start, and to
# tokenize every word for the first time.
BYTES_PER_WORKER = 16 << 20
MOST_PER_CORE = 4  # workers; more only take memory


def prepare(
    sources: Sequence[str | Path],
    out: str | Path,
    *,
    vocab_size: int = 30522,
    algorithm: str = WORDPIECE,
    tokenizer: str | Path | None = None,
    lowercase: bool = True,
    keep_accents: bool = False,
    workers: int | None = None,
    heldout: float = 0.01,
    text_format: str | None = None,
    text_field: str = "text",
    bad_records: str = "error",
    dedup: bool = False,
    progress: bool = True,
) -> Report:
    """Make the dataset `out` from text files and folders.

    Args:
        sources: files and folders; sources.py lists the formats.
        out: the dataset's folder; it must not exist yet.
        vocab_size: of the vocabulary that is trained on the text; of BPE a multiple of 64, to which
            another size is rounded up.
        algorithm: "wordpiece", as BERT; or "bpe", byte-level as ModernBERT, which keeps case,
            accents, spaces and line breaks.
        tokenizer: a Hugging Face folder with any tokenizer.json, or a vocab.txt, to use instead;
            vocab_size, algorithm, lowercase and keep_accents are then ignored.
        lowercase: whether a trained vocabulary converts capitals to small letters; accents and
            vowel signs are then dropped too, as in BERT.
        keep_accents: whether it keeps these all the same.
        workers: processes that encode, at most MOST_PER_CORE per core; by default one per core, and
            fewer for little text. The number does not change the result.
        heldout: share of the documents that is set aside for evaluation. They are chosen by a hash
            of the text, so copies of a document are all in the same split. HELDOUT_BYTES and
            LEAST_HELDOUT bound the share.
        text_format: a key of sources.FORMATS, where the suffix does not tell the format.
        text_field: the field of JSON lines, or the column of a table, that holds the text; "a.b" is
            the field b of the object a.
        bad_records: "error" raises at a record that cannot be read (no UTF-8, no JSON, no text,
            a csv row of other columns); "skip" leaves it out, and the report counts it.
        dedup: leave out documents that are copies of an earlier one; blanks at the beginning and
            the end do not count. This reads the text once more.
        progress: show progress on stderr: bars on a terminal, else a line every ten seconds.

    Returns:
        The report on the data.

    Raises:
        InputError: something is wrong with the sources, the tokenizer, the options or the disk.
            Nothing is left on the disk then.
    """
    out = Path(out)
    if os.path.islink(out) or status(out) is not None:
        raise InputError(f"{out}: exists already; remove it or choose another --out")
    if not 0 < heldout <= 0.5:
        raise InputError(
            f"--heldout {heldout}: must be above 0 and at most 0.5 (share of the documents)"
        )
    if workers is not None and workers < 1:
        raise InputError(f"--workers {workers}: must be 1 or more")
    if algorithm not in ALGORITHMS:
        raise InputError(f"--algorithm {algorithm}: must be {' or '.join(ALGORITHMS)}")
    if algorithm == BPE and tokenizer is None and (keep_accents or not lowercase):
        option = "--keep-accents" if keep_accents else "--cased"
        raise InputError(f"{option}: --algorithm bpe keeps case and accents anyway; leave it out")
    if bad_records not in ("error", "skip"):
        raise InputError(f"--bad-records {bad_records}: must be error or skip")
    files, left_out = find_sources(sources, text_format)
    for reason in dict.fromkeys(item.reason for item in left_out):
        paths = [str(item.path) for item in left_out if item.reason == reason]
        more = ", ..." if len(paths) > 5 else ""
        tell(f"left out ({reason}): {len(paths):,}: {', '.join(paths[:5])}{more}")
    given = load_tokenizer(tokenizer) if tokenizer is not None else None
    stamps = [_stamp(source) for source in files]
    size = sum(file_size for file_size, _ in stamps)
    options = {"heldout": heldout, "text_format": text_format, "text_field": text_field}
    if bad_records == "skip":
        options["bad_records"] = bad_records
    if given is None:
        check_vocab_size(vocab_size, algorithm)
        options |= {"vocab_size": vocab_size}
        options |= {"algorithm": algorithm} if algorithm == BPE else {"lowercase": lowercase}
        if keep_accents:
            options["keep_accents"] = True
    if dedup:
        options["dedup"] = True
    reading = files, text_field, bad_records == "skip"
    processes = min(
        workers or 1 + size // BYTES_PER_WORKER,
        usable_cores() * (MOST_PER_CORE if workers else 1),
    )
    with _advice_on_bad_records(), staging(out) as folder, Progress(size, progress) as bar:
        copies = None
        if dedup:
            chunks = bar.follow("looking for copies", read_chunks(*reading))
            copies = find_copies(chunks, *reading[1:], processes)

        def read(part: str) -> Iterator[Chunk]:
            chunks = bar.follow(part, read_chunks(*reading))
            return chunks if copies is None else without_copies(chunks, copies)

        vocabulary = given
        if vocabulary is None:
            sample = _spread(read("reading for the vocabulary"))
            trainer = *reading[1:], algorithm, vocab_size, lowercase, keep_accents
            with bar.wait("training the vocabulary"):
                if sum(len(chunk.data) for chunk in sample) < TRAINED_HERE_BYTES:
                    trained = VocabularyTrainer(*trainer)(sample)
                else:
                    trained = apply_in_child(VocabularyTrainer, trainer, sample)
            del sample
            vocabulary = Tokenizer.from_str(trained)
            vocabulary.encode_special_tokens = True
        save_tokenizer(vocabulary, folder / "tokenizer")
        kind = None if is_bert(vocabulary) else kind_of(vocabulary)
        if kind is not None and (problem := Cuts(vocabulary).problem) is not None:
            tell(f"tokenizer: no words are looked up, which takes several times as long: {problem}")
        dtype = token_dtype(vocabulary.get_vocab_size())

        def write(heldout_below: int) -> _Written:
            chunks = read("documents, sentences, tokens")
            arguments = vocabulary.to_str(), text_field, heldout_below, bad_records == "skip"
            encoded = map_in_order(ChunkEncoder, arguments, chunks, processes)
            with closing(encoded):  # so that after a failure no process outlives this call
                return _write(encoded, folder, dtype, heldout_below)

        written = write(int(min(heldout, HELDOUT_BYTES / max(size, 1)) * 2**64))
        blank_lines = any(source.format == "txt" for source in files)
        if (below := _heldout_bound(written, sources, blank_lines)) is not None:
            for split in SPLITS:
                shutil.rmtree(folder / split)
            written = write(below)
        with bar.wait("baselines"):
            train, held = (Split(folder / n, written.writers[n].shards, dtype) for n in SPLITS)
            measured = baselines.measure(train, held, vocabulary.get_vocab_size())
        report = make_report(
            written.stats,
            vocabulary.get_vocab_size(),
            rounded_up(vocab_size) if algorithm == BPE and not given else options.get("vocab_size"),
            measured,
            len(files),
            blank_lines,
            unreachable(given) if given else (),
            None if copies is None else sum(map(len, copies)),
            kind,
        )
        for source, stamp in zip(files, stamps, strict=True):
            if _stamp(source) != stamp:
                raise InputError(
                    f"{source.path}: changed while it was read; "
                    "start again when nothing writes to it"
                )
        _write_text(folder / "baselines.json", _json(measured))
        _write_text(folder / "report.json", report.json())
        _write_text(folder / "report.md", report.markdown())
        (folder / MANIFEST).write_bytes(sealed(_manifest(folder, vocabulary, options, written)))
    return report


@contextmanager
def _advice_on_bad_records() -> Iterator[None]:
    try:
        yield
    except BadRecord as error:
        raise InputError(f"{error}; or leave out what cannot be read: --bad-records skip") from None


def _stamp(source: Source) -> tuple[int, str]:
    """Return the size of a file and what a change of it changes."""
    try:
        return storage.stamp(source.path)
    except OSError as error:
        raise InputError(f"{source.path}: cannot be read: {error.strerror}") from None


@dataclass(frozen=True)
class _Written:
    """The splits that were written, and what was counted."""

    writers: dict[str, ShardWriter]
    stats: CorpusStats
    smallest: np.ndarray  # uint64, ascending: the smallest distinct hashes of documents
    heldout_below: int


def _write(
    chunks: Iterable[EncodedChunk], folder: Path, dtype: np.dtype, heldout_below: int
) -> _Written:
    """Write both splits and collect the counts."""
    writers = {name: ShardWriter(folder / name, dtype) for name in SPLITS}
    stats, smallest = CorpusStats(), np.zeros(0, np.uint64)
    for chunk in chunks:
        for name, part in zip(SPLITS, (chunk.train, chunk.heldout), strict=True):
            writers[name].add(part.tokens, part.sentences, part.documents, part.begins_word)
        stats.add(chunk)
        smallest = np.unique(np.concatenate([smallest, chunk.document_hashes]))[: 4 * LEAST_HELDOUT]
    for writer in writers.values():
        writer.close()
    return _Written(writers, stats, smallest, heldout_below)


def _heldout_bound(
    written: _Written, sources: Sequence[str | Path], blank_lines: bool
) -> int | None:
    """Return a bound of the hashes that gives both splits enough documents.

    It is None where the given share already does. Only little text needs another bound.

    Args:
        written: what was written with the given share.
        sources: for the error.
        blank_lines: whether blank lines end documents in one of them.
    """
    distinct = len(written.smallest)  # capped; larger numbers make no difference
    if distinct < 2:
        found = "one distinct document" if distinct else "no document with text"
        raise InputError(
            f"{', '.join(map(str, sources))}: {found}; "
            "a dataset needs at least two, one to train on and one to hold out"
            + ("; put a blank line between documents, or use --format lines" * blank_lines)
        )
    wanted = min(LEAST_HELDOUT, max(distinct // 4, 1))
    if written.smallest[wanted - 1] < written.heldout_below and written.writers["train"].shards:
        return None
    return int(written.smallest[wanted])


def _manifest(
    folder: Path, vocabulary: Tokenizer, options: dict[str, Any], written: _Written
) -> dict[str, Any]:
    has_words = not is_bert(vocabulary)
    files = {
        name: {"size": (folder / name).stat().st_size, "sha256": sha256_of(folder / name)}
        for name in other_files(has_words)
    }
    for writer in written.writers.values():
        files |= writer.files
    return {
        "format": FORMAT,
        **({"tokenizer": kind_of(vocabulary)} if has_words else {}),
        "vocab_size": vocabulary.get_vocab_size(),
        "special": asdict(special_ids(vocabulary, folder)),
        "options": options,
        "tokenizer_sha256": files["tokenizer/tokenizer.json"]["sha256"],
        "splits": {name: writer.summary() for name, writer in written.writers.items()},
        "files": files,
    }


def _spread(chunks: Iterable[Chunk]) -> list[Chunk]:
    """Return chunks spread evenly over the text, at most VOCABULARY_BYTES in all.

    These are all chunks, or every second, every fourth, and so on.
    """
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


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")


def _json(value: Any) -> str:
    return json.dumps(value, indent=1) + "\n"
