"""Documents out of files: plain text, one document a line, JSON lines, csv, Parquet; gzip and zstd; files and folders.

Reading has two halves, so that all cores can share the second. `read_chunks` runs through the files in order and only
cuts: pieces of about a MiB that end where a document ends. `parse` turns one chunk into documents and is where text
is decoded and checked. Memory holds a few chunks, whatever the size of the files.
"""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import os
import re
import stat
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from fastbert.errors import InputError

FORMATS = {
    "txt": (".txt",),
    "lines": (".txt",),
    "jsonl": (".jsonl", ".ndjson", ".json"),
    "csv": (".csv",),
    "parquet": (".parquet",),
}
COMPRESSIONS = (".gz", ".zst")
CHUNK_BYTES = 1 << 20
# A longer document is a file in another format than it is said to be, and would not fit the promise of flat memory.
LONGEST_DOCUMENT_BYTES = 64 << 20

_BLANK_LINE = re.compile(rb"\n[ \t\r\f\v]*\n")
_BETWEEN_DOCUMENTS = re.compile(r"\n\s*\n")
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Source:
    """One file to read."""

    path: Path
    format: str  # a key of FORMATS
    compression: str  # one of COMPRESSIONS, or ""


@dataclass(frozen=True)
class Chunk:
    """Some whole documents of one file, not yet decoded."""

    source: Source
    data: bytes  # text; for csv the field alone, a JSON string a line; for Parquet one record batch, serialised
    line: int  # the first line's number in the file, from 1; for Parquet the first row's, from 0
    offset: int  # of the first byte in the (unpacked) file
    read_bytes: int  # how far the file on disk had been read, less the chunk before: what a progress bar advances by


def find_sources(
    paths: Sequence[str | Path], text_format: str | None = None
) -> tuple[list[Source], list[Path]]:
    """The files to read, in order, and those in folders that are left out because their suffix says nothing.

    Folders are walked in sorted order, without hidden files. `text_format` overrides what the suffix says.

    Raises:
        InputError: a path that does not exist or cannot be read, a suffix that is not known, or nothing to read.
    """
    if text_format is not None and text_format not in FORMATS:
        raise InputError(f"--format {text_format}: not a format; known: {', '.join(FORMATS)}")
    sources: dict[str, Source] = {}
    ignored: list[Path] = []
    for path in map(Path, paths):
        try:
            mode = path.stat().st_mode
        except FileNotFoundError:
            raise InputError(f"{path}: no such file or folder") from None
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror}") from None
        if stat.S_ISDIR(mode):
            names = list(_walk(path))
            found = [
                source for name in names if (source := _source(name, text_format, in_folder=True))
            ]
            if not found:
                raise InputError(
                    f"{path}: no file in this folder ends in {_suffixes(text_format)}; name a file or another folder"
                )
            ignored += sorted(set(names) - {source.path for source in found})
        elif stat.S_ISREG(mode):
            source = _source(path, text_format, in_folder=False)
            if source is None:
                raise InputError(
                    f"{path}: the suffix does not tell the format; add --format {'|'.join(FORMATS)}"
                )
            found = [source]
        else:
            raise InputError(
                f"{path}: not a regular file; sources are read twice, so write it to a file first"
            )
        for source in found:
            sources.setdefault(
                os.path.realpath(source.path), source
            )  # a file that is named twice is read once
    if not sources:
        raise InputError("no SOURCE given; name text files or folders")
    return list(sources.values()), ignored


def read_chunks(sources: Iterable[Source], text_field: str = "text") -> Iterator[Chunk]:
    """Cut the files into chunks, in order.

    Raises:
        InputError: a file that is empty, cannot be read, is packed wrongly or cut short, has no `text_field`, or a document too long.
    """
    for source in sources:
        try:
            with open(source.path, "rb") as file:
                if source.format in _BY_COLUMN:
                    yield from _BY_COLUMN[source.format](source, file, text_field)
                else:
                    yield from _text_chunks(source, file)
        except OSError as error:
            raise InputError(f"{source.path}: cannot be read: {error.strerror or error}") from None


def parse(chunk: Chunk, text_field: str = "text") -> list[str]:
    """The documents of a chunk, empty ones included; always valid Unicode.

    Raises:
        InputError: bytes that are not UTF-8, a line that is not a JSON object, or one without `text_field`.
    """
    if chunk.source.format == "parquet":
        return _parse_parquet(chunk)
    if chunk.source.format == "csv":
        return [json.loads(line) for line in chunk.data.splitlines()]
    if chunk.source.format == "jsonl":
        return _parse_json_lines(chunk, text_field)
    text = _decode(chunk.data, chunk.source.path, chunk.line, chunk.offset)
    if chunk.source.format == "lines":
        return text.removesuffix("\n").split("\n")
    return [
        document
        for document in _BETWEEN_DOCUMENTS.split(text)
        if not document.isspace() and document
    ]


def read_documents(
    paths: Sequence[str | Path], text_format: str | None = None, text_field: str = "text"
) -> Iterator[str]:
    """All documents of files and folders, in order, one at a time."""
    sources, _ = find_sources(paths, text_format)
    for chunk in read_chunks(sources, text_field):
        yield from parse(chunk, text_field)


def _walk(folder: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise InputError(f"{error.filename}: cannot be read: {error.strerror}")

    for root, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(root, name) for name in sorted(files) if not name.startswith("."))


def _source(path: Path, text_format: str | None, in_folder: bool) -> Source | None:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compression = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSIONS else ""
    suffix = suffixes[-1] if suffixes else ""
    if text_format is None:
        # .json is often one big object, so it is not read as JSON lines unless --format says so.
        known = next(
            (name for name, endings in FORMATS.items() if suffix in endings and suffix != ".json"),
            None,
        )
    else:
        known = text_format if not in_folder or suffix in FORMATS[text_format] else None
    return Source(path, known, compression) if known else None


def _suffixes(text_format: str | None) -> str:
    endings = (
        FORMATS[text_format] if text_format else (".txt", ".jsonl", ".ndjson", ".csv", ".parquet")
    )
    return ", ".join(endings) + " (or these with .gz or .zst)"


def _text_chunks(source: Source, file: BinaryIO) -> Iterator[Chunk]:
    """Cut at the last end of a document in what has been read; the rest waits for more."""
    last_end = _last_blank_line if source.format == "txt" else _last_line_end
    waiting, line, offset, reported = b"", 1, 0, 0

    def chunk(data: bytes) -> Chunk:
        nonlocal line, offset, reported
        made = Chunk(source, data, line, offset, file.tell() - reported)
        line, offset, reported = line + data.count(b"\n"), offset + len(data), file.tell()
        return made

    for piece in _UNPACK[source.compression](source.path, file):
        searched = len(waiting)
        waiting += piece
        if len(waiting) < CHUNK_BYTES:
            continue
        end = last_end(waiting, searched)
        if end:
            yield chunk(waiting[:end])
            waiting = waiting[end:]
        elif len(waiting) > LONGEST_DOCUMENT_BYTES:
            raise InputError(
                f"{source.path}: the document that begins at line {line} is longer than {LONGEST_DOCUMENT_BYTES >> 20} MiB; "
                + (
                    "put a blank line between documents, or say --format lines"
                    if source.format == "txt"
                    else "cut it into documents, one a line"
                )
            )
    if waiting:
        yield chunk(waiting)
    elif offset == 0:
        raise _empty(source)


def _empty(source: Source) -> InputError:
    return InputError(f"{source.path}: the file is empty; remove it from the sources")


def _last_line_end(data: bytes, searched: int) -> int:
    return data.rfind(b"\n", searched) + 1


def _last_blank_line(data: bytes, searched: int) -> int:
    # A blank line may have begun in the part that was searched before, at its last line end.
    begin = max(data.rfind(b"\n", 0, searched), 0)
    end = 0
    for match in _BLANK_LINE.finditer(data, begin):
        end = match.end()
    return end


def _read_plain(path: Path, file: BinaryIO) -> Iterator[bytes]:
    while piece := file.read(CHUNK_BYTES):
        yield piece


def _read_gzip(path: Path, file: BinaryIO) -> Iterator[bytes]:
    try:
        with gzip.GzipFile(fileobj=file) as unpacked:
            while piece := unpacked.read(CHUNK_BYTES):
                yield piece
    except EOFError:
        raise InputError(f"{path}: the gzip file is cut short; copy or download it again") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise InputError(
            f"{path}: not a sound gzip file ({error}); copy or download it again"
        ) from None


def _read_zstd(path: Path, file: BinaryIO) -> Iterator[bytes]:
    import zstandard

    # A frame at a time through decompressobj: stream_reader takes a file that is cut short for a complete one.
    context = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    frame = context.decompressobj()
    try:
        while packed := file.read(CHUNK_BYTES // 8):
            while packed:
                if frame.eof:
                    frame = context.decompressobj()
                yield frame.decompress(packed)
                packed = frame.unused_data
    except zstandard.ZstdError as error:
        raise InputError(
            f"{path}: not a sound zstd file ({error}); copy or download it again"
        ) from None
    if not frame.eof and file.tell() > 0:
        raise InputError(f"{path}: the zstd file is cut short; copy or download it again")


_UNPACK: dict[str, Callable[[Path, BinaryIO], Iterator[bytes]]] = {
    "": _read_plain,
    ".gz": _read_gzip,
    ".zst": _read_zstd,
}


def _decode(data: bytes, path: Path, line: int, offset: int) -> str:
    if offset == 0 and data.startswith(b"\xef\xbb\xbf"):
        data = data[3:]  # a byte order mark is not text
        offset = 3
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        raise InputError(
            f"{path}: line {line}, byte {offset + error.start}: 0x{data[error.start]:02x} is not UTF-8; convert the file, for example with iconv -t UTF-8"
        ) from None


def _parse_json_lines(chunk: Chunk, text_field: str) -> list[str]:
    documents = []
    text = _decode(chunk.data, chunk.source.path, chunk.line, chunk.offset)
    # Not splitlines: JSON strings may hold the other characters at which it breaks.
    for line, record in enumerate(text.split("\n"), chunk.line):
        if not record or record.isspace():
            continue
        where = f"{chunk.source.path}: line {line}"
        try:
            value = json.loads(record)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}: not JSON ({error}); every line holds one object") from None
        if not isinstance(value, dict):
            raise InputError(
                f"{where}: a JSON {_JSON_NAMES[type(value)]}; every line holds one object with a field '{text_field}'"
            )
        if text_field not in value:
            raise InputError(f"{where}: no field '{text_field}'; {_fields(value)}")
        document = value[text_field]
        if document is None:
            document = ""
        if not isinstance(document, str):
            raise InputError(
                f"{where}: the field '{text_field}' is a {_JSON_NAMES[type(document)]}, not a string; {_fields(value)}"
            )
        if "\\u" in record:
            # Half of a surrogate pair can be written as an escape; it is no character, and no encoder takes it.
            document = _SURROGATE.sub("\ufffd", document)
        documents.append(document)
    return documents


_JSON_NAMES = {
    dict: "object",
    list: "list",
    str: "string",
    int: "number",
    float: "number",
    bool: "boolean",
    type(None): "null",
}


def _fields(names: Iterable[str]) -> str:
    shown = [repr(name)[1:-1][:40] for name in names]
    more = f" and {len(shown) - 20} more" if len(shown) > 20 else ""
    return (
        f"choose with --text-field among: {', '.join(shown[:20])}{more}"
        if shown
        else "the object is empty"
    )


def _csv_chunks(source: Source, file: BinaryIO, text_field: str) -> Iterator[Chunk]:
    """Read here and not in `parse`: a quoted field may hold line ends, so only who has read all before knows where a row begins."""
    csv.field_size_limit(LONGEST_DOCUMENT_BYTES)
    reader = csv.reader(_lines(source, file), strict=True)
    reported, texts, held = 0, list[bytes](), 0

    def chunk() -> Chunk:
        nonlocal reported
        made = Chunk(source, b"\n".join(texts), reader.line_num, 0, file.tell() - reported)
        reported = file.tell()
        return made

    try:
        columns = next(reader, None)
        if columns is None:
            raise _empty(source)
        if text_field not in columns:
            raise InputError(
                f"{source.path}: no column '{text_field}' in the header; {_fields(columns)}"
            )
        column = columns.index(text_field)
        for row in reader:
            if not row:
                continue
            if len(row) != len(columns):
                raise InputError(
                    f"{source.path}: line {reader.line_num}: {len(row)} fields, and the header has {len(columns)}; put texts with commas in quotes"
                )
            texts.append(json.dumps(row[column]).encode())
            held += len(texts[-1])
            if held >= CHUNK_BYTES:
                yield chunk()
                texts, held = [], 0
    except csv.Error as error:
        raise InputError(f"{source.path}: line {reader.line_num}: not valid csv: {error}") from None
    if texts:
        yield chunk()
    elif reported == 0:
        raise InputError(f"{source.path}: no row below the header; remove it from the sources")


def _lines(source: Source, file: BinaryIO) -> Iterator[str]:
    """Decoded, each with its end."""
    waiting, line, offset = b"", 1, 0
    for piece in itertools.chain(_UNPACK[source.compression](source.path, file), [b""]):
        waiting += piece
        end = waiting.rfind(b"\n") + 1 if piece else len(waiting)
        whole, waiting = waiting[:end], waiting[end:]
        yield from io.StringIO(_decode(whole, source.path, line, offset), newline="\n")
        line, offset = line + whole.count(b"\n"), offset + len(whole)


def _parquet_chunks(source: Source, file: BinaryIO, text_field: str) -> Iterator[Chunk]:
    import pyarrow
    import pyarrow.parquet

    if source.compression:
        raise InputError(
            f"{source.path}: Parquet packs its own columns and is not read through {source.compression}; unpack the file first"
        )
    size, row = os.fstat(file.fileno()).st_size, 0
    if size == 0:
        raise _empty(source)
    try:
        table = pyarrow.parquet.ParquetFile(file)
        schema, metadata = table.schema_arrow, table.metadata
        if text_field not in schema.names:
            raise InputError(f"{source.path}: no column '{text_field}'; {_fields(schema.names)}")
        kind = schema.field(text_field).type
        kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
        if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
            raise InputError(
                f"{source.path}: the column '{text_field}' holds {kind}, not strings; {_fields(schema.names)}"
            )
        if metadata.num_rows == 0:
            raise _empty(source)
        row_bytes = (
            sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))
            // metadata.num_rows
        )
        chunk_rows = min(max(CHUNK_BYTES // (row_bytes + 1), 1), 1 << 16)
        for batch in table.iter_batches(chunk_rows, columns=[text_field], use_threads=False):
            sink = pyarrow.BufferOutputStream()
            with pyarrow.ipc.new_stream(sink, batch.schema) as stream:
                stream.write_batch(batch)
            # The file is not read from front to back: progress is the share of its rows.
            advance = (
                size * (row + batch.num_rows) // metadata.num_rows - size * row // metadata.num_rows
            )
            yield Chunk(source, sink.getvalue().to_pybytes(), row, 0, advance)
            row += batch.num_rows
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(
            f"{source.path}: not a sound Parquet file ({' '.join(str(error).split())}); copy or download it again"
        ) from None


def _parse_parquet(chunk: Chunk) -> list[str]:
    import pyarrow

    column = pyarrow.ipc.open_stream(chunk.data).read_all().column(0)
    documents = []
    for row, value in enumerate(column, chunk.line):
        try:
            documents.append(value.as_py() or "")
        except UnicodeDecodeError as error:
            raise InputError(
                f"{chunk.source.path}: row {row}: byte {error.start} of the string is not UTF-8; write the table again"
            ) from None
    return documents


# Formats whose text is a column: what else a row holds is never handed on.
_BY_COLUMN: dict[str, Callable[[Source, BinaryIO, str], Iterator[Chunk]]] = {
    "csv": _csv_chunks,
    "parquet": _parquet_chunks,
}
