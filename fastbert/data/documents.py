"""Read documents from files: text, lines, JSON lines, csv and Parquet, also with gzip or zstd.

Reading has two halves, so that all cores can share the second one. `read_chunks` goes through the
files in order and only cuts them, into pieces of about a MiB that end where a document ends.
`parse` decodes and checks the text of one chunk and returns its documents. Only a few chunks are in
memory at a time, whatever the size of the files.
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
# A longer document means that the file has another format than stated. It would also need too much
# memory.
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
    # Text. For csv only the text column, one JSON string per line; for Parquet one record batch,
    # serialised.
    data: bytes
    line: int  # number of the first line in the file, from 1; for Parquet of the first row, from 0
    offset: int  # of the first byte in the (unpacked) file
    # Bytes of the file on disk read since the chunk before; a progress bar advances by them.
    read_bytes: int


def find_sources(
    paths: Sequence[str | Path], text_format: str | None = None
) -> tuple[list[Source], list[Path]]:
    """Find the files to read.

    Folders are walked in sorted order, without hidden files.

    Args:
        paths: files and folders.
        text_format: a key of FORMATS; by default the suffix of each file decides.

    Returns:
        The files to read, in order, and the files in folders that are left out because of their
        suffix.

    Raises:
        InputError: a path that does not exist or cannot be read, an unknown suffix, or nothing to
            read.
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
                    f"{path}: no file in this folder ends in {_suffixes(text_format)}; "
                    "name a file or another folder"
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
            # A file that is named twice is read once.
            sources.setdefault(os.path.realpath(source.path), source)
    if not sources:
        raise InputError("no SOURCE given; name text files or folders")
    return list(sources.values()), ignored


def read_chunks(sources: Iterable[Source], text_field: str = "text") -> Iterator[Chunk]:
    """Cut the files into chunks, in order.

    Raises:
        InputError: a file that is empty, cannot be read, is packed wrongly or cut short, has no
            `text_field`, or has a document that is too long.
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
    """Return the documents of a chunk, including empty ones, as valid Unicode.

    Raises:
        InputError: bytes that are not UTF-8, a line that is not a JSON object, or one without
            `text_field`.
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
    """Yield all documents of files and folders, in order, one at a time."""
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
    """Cut the data read so far at the last end of a document; the rest waits for more data."""
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
            hint = (
                "put a blank line between documents, or use --format lines"
                if source.format == "txt"
                else "split it into documents, one per line"
            )
            raise InputError(
                f"{source.path}: the document that begins at line {line} is longer than "
                f"{LONGEST_DOCUMENT_BYTES >> 20} MiB; {hint}"
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
    # A blank line may have begun at the last line end of the part that was searched before.
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
            f"{path}: not a valid gzip file ({error}); copy or download it again"
        ) from None


def _read_zstd(path: Path, file: BinaryIO) -> Iterator[bytes]:
    import zstandard

    # Frames are decompressed one by one with decompressobj, because stream_reader takes a file that
    # is cut short for a complete one.
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
            f"{path}: not a valid zstd file ({error}); copy or download it again"
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
            f"{path}: line {line}, byte {offset + error.start}: 0x{data[error.start]:02x} is not "
            "UTF-8; convert the file, for example with iconv -t UTF-8"
        ) from None


def _parse_json_lines(chunk: Chunk, text_field: str) -> list[str]:
    documents = []
    text = _decode(chunk.data, chunk.source.path, chunk.line, chunk.offset)
    # Not splitlines, which would also split at other characters that JSON strings may contain.
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
                f"{where}: a JSON {_JSON_NAMES[type(value)]}; "
                f"every line holds one object with a field '{text_field}'"
            )
        if text_field not in value:
            raise InputError(f"{where}: no field '{text_field}'; {_field_hint(value)}")
        document = value[text_field]
        if document is None:
            document = ""
        if not isinstance(document, str):
            raise InputError(
                f"{where}: the field '{text_field}' is a {_JSON_NAMES[type(document)]}, "
                f"not a string; {_field_hint(value)}"
            )
        if "\\u" in record:
            # JSON can write half of a surrogate pair as an escape. This is not a character, and no
            # encoder accepts it.
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


def _field_hint(names: Iterable[str]) -> str:
    shown = [repr(name)[1:-1][:40] for name in names]
    if not shown:
        return "the object is empty"
    more = f" and {len(shown) - 20} more" if len(shown) > 20 else ""
    return f"choose with --text-field among: {', '.join(shown[:20])}{more}"


def _csv_chunks(source: Source, file: BinaryIO, text_field: str) -> Iterator[Chunk]:
    """Cut a csv file into chunks, keeping only the text column.

    The rows are parsed here and not in `parse`. A quoted field may contain line ends, so where a
    row begins is known only after reading everything before it.
    """
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
                f"{source.path}: no column '{text_field}' in the header; {_field_hint(columns)}"
            )
        column = columns.index(text_field)
        for row in reader:
            if not row:
                continue
            if len(row) != len(columns):
                raise InputError(
                    f"{source.path}: line {reader.line_num}: {len(row)} fields, and the header has "
                    f"{len(columns)}; put texts with commas in quotes"
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
    """Yield the decoded lines, each with its line end."""
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
            f"{source.path}: Parquet compresses its own columns and is not read through "
            f"{source.compression}; unpack the file first"
        )
    size, row = os.fstat(file.fileno()).st_size, 0
    if size == 0:
        raise _empty(source)
    try:
        table = pyarrow.parquet.ParquetFile(file)
        schema, metadata = table.schema_arrow, table.metadata
        if text_field not in schema.names:
            raise InputError(
                f"{source.path}: no column '{text_field}'; {_field_hint(schema.names)}"
            )
        kind = schema.field(text_field).type
        kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
        if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
            raise InputError(
                f"{source.path}: the column '{text_field}' holds {kind}, not strings; "
                f"{_field_hint(schema.names)}"
            )
        if metadata.num_rows == 0:
            raise _empty(source)
        groups = range(metadata.num_row_groups)
        total_bytes = sum(metadata.row_group(i).total_byte_size for i in groups)
        row_bytes = total_bytes // metadata.num_rows
        chunk_rows = min(max(CHUNK_BYTES // (row_bytes + 1), 1), 1 << 16)
        for batch in table.iter_batches(chunk_rows, columns=[text_field], use_threads=False):
            sink = pyarrow.BufferOutputStream()
            with pyarrow.ipc.new_stream(sink, batch.schema) as stream:
                stream.write_batch(batch)
            # A Parquet file is not read from front to back, so progress is the share of its rows.
            before, after = (
                size * rows // metadata.num_rows for rows in (row, row + batch.num_rows)
            )
            yield Chunk(source, sink.getvalue().to_pybytes(), row, 0, after - before)
            row += batch.num_rows
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"{source.path}: not a valid Parquet file ({reason}); copy or download it again"
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
                f"{chunk.source.path}: row {row}: byte {error.start} of the string is not UTF-8; "
                "write the table again"
            ) from None
    return documents


# Formats whose text is a column; the other columns of a row are not passed on.
_BY_COLUMN: dict[str, Callable[[Source, BinaryIO, str], Iterator[Chunk]]] = {
    "csv": _csv_chunks,
    "parquet": _parquet_chunks,
}
