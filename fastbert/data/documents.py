"""Read documents from files: text, lines, and a text column of JSON lines, csv, tsv and Parquet.

Reading has two halves, so that all cores can share the second one. `read_chunks` goes through the
files in order and only cuts them, into pieces of about a MiB that end where a document ends.
`parse` decodes and checks the text of one chunk and returns its documents. Only a few chunks are in
memory at a time, whatever the size of the files.
"""

from __future__ import annotations

import codecs
import functools
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fastbert import storage
from fastbert.data.rows import (
    JSON_NAMES,
    TWICE,
    array_items,
    arrow_batches,
    as_text,
    column_of,
    delimited_rows,
    field_of,
    field_type,
    is_binary,
    json_names,
    json_object,
    parquet_batches,
    parquet_names,
    rows_before,
    shown,
    value_type,
)
from fastbert.data.sources import Source, find_sources, open_source
from fastbert.data.unpack import (
    LONGEST_TEXT_BYTES,
    BadRecord,
    decode,
    is_broken,
    is_empty,
    unpacked,
)
from fastbert.errors import InputError
from fastbert.storage import Place

if TYPE_CHECKING:
    import pyarrow

CHUNK_BYTES = 1 << 20
# Parquet can write a value once that a million rows hold. More rows than this are not expanded at a
# time; text as it is found in files is far below.
_EXPANDED_BYTES = 16 << 20

_BLANK_LINE = re.compile(rb"\n[ \t\r\f\v]*\n")
_BETWEEN_DOCUMENTS = re.compile(r"\n\s*\n")
# WikiExtractor writes articles with blank lines inside, as <doc id=... title=...> ... </doc>.
_WIKI_BEGIN = re.compile(rb"(?:\xef\xbb\xbf)?\s*<doc [^>\n]*>")
_WIKI_TAGS = re.compile(r"^<doc [^>\n]*>\r?$|^</doc>\r?$", re.MULTILINE)
_WIKI_END = b"\n</doc>"
WIKI = "wikiextractor"  # a format that is recognised, not asked for


@dataclass(frozen=True)
class Chunk:
    """Some whole documents of one file, not yet decoded."""

    source: Source
    # Text. For csv and tsv only the text column, one JSON value per line: a string, or line and
    # complaint of a bad row. For Parquet one record batch, serialised.
    data: bytes
    # Number of the first line from 1, for Parquet of the first row. Lines are counted from the byte
    # `counted_from` of the file on, since a part of a file is read without what comes before it.
    line: int
    offset: int  # of the first byte in the (unpacked) file
    # Bytes of the file on disk read since the chunk before; a progress bar advances by them.
    read_bytes: int
    counted_from: int = 0


def read_chunks(
    sources: Iterable[Source], text_field: str = "text", skip_bad: bool = False
) -> Iterator[Chunk]:
    """Cut the files into chunks, in order.

    Args:
        sources: the files.
        text_field: the field or column that holds the text.
        skip_bad: leave bytes that are not UTF-8 to `parse`.

    Raises:
        InputError: a file that is empty, cannot be read, is packed wrongly or cut short, has no
            `text_field`, or has a document that is too long.
    """
    for source in sources:
        with open_source(source) as file:
            yield from READERS[source.format].chunks(source, file, text_field, skip_bad)


def parse(
    chunk: Chunk, text_field: str = "text", skipped: list[BadRecord] | None = None
) -> list[str]:
    """Return the documents of a chunk, including empty ones, as valid Unicode.

    Args:
        chunk: from `read_chunks` or `segments.read_segment`.
        text_field: the field that holds the text.
        skipped: receives what is wrong with each bad record, which is then left out. Its lines are
            counted as those of the chunk are.

    Raises:
        BadRecord: without `skipped`: bytes that are not UTF-8, a line that is not a JSON object, or
            one without `text_field`. Its line is that in the file.
    """
    documents = list[str]()
    records = READERS[chunk.source.format].records
    try:
        for document in records(chunk, text_field, skipped is None):
            if isinstance(document, str):
                documents.append(document)
            elif skipped is None:
                raise document
            else:
                skipped.append(document)
    except BadRecord as error:
        raise error.moved(lines_before(chunk.source.path, chunk.counted_from)) from None
    return documents


def lines_before(path: Place, end: int) -> int:
    """Return the number of line feeds in the first `end` bytes of a file."""
    count = 0
    if end:
        with storage.open_reading(path) as file:
            while end > 0 and (piece := file.read(min(end, 1 << 20))):
                count, end = count + piece.count(b"\n"), end - len(piece)
    return count


def _text_records(chunk: Chunk, _text_field: str, strict: bool) -> Iterable[str | BadRecord]:
    text = decode(chunk.data, chunk.source.path, chunk.line, chunk.offset, strict)
    documents = _SPLIT[chunk.source.format](text)
    return documents if strict else _without_broken(chunk, text, documents)


def _without_broken(chunk: Chunk, text: str, documents: list[str]) -> Iterator[str | BadRecord]:
    """Yield documents, or the error where some of the bytes of one were not UTF-8."""
    at = 0
    for document in documents:
        if is_broken(document):
            # Where lines end in \r\n, a document of "lines" is part of the text all the same.
            at = max(text.find(document, at), at)
            begin = at + len(document) - len(document.lstrip())
            line = chunk.line + text.count("\n", 0, begin)
            reason = f"not UTF-8: {document.strip()[:40]!a}"
            yield BadRecord(str(chunk.source.path), reason, line)
            at += len(document)
        else:
            yield document


def _between(separator: re.Pattern[str], text: str) -> list[str]:
    return [document for document in separator.split(text) if not document.isspace() and document]


def read_documents(
    paths: Sequence[str | Path], text_format: str | None = None, text_field: str = "text"
) -> Iterator[str]:
    """Yield all documents of files and folders, in order, one at a time."""
    sources, _ = find_sources(paths, text_format)
    for chunk in read_chunks(sources, text_field):
        yield from parse(chunk, text_field)


def _text_chunks(
    source: Source, file: BufferedReader, _text_field: str, _skip_bad: bool
) -> Iterator[Chunk]:
    """Cut the data read so far at the last end of a document; the rest waits for more data."""
    waiting, line, offset, reported = b"", 1, 0, 0

    def chunk(data: bytes) -> Chunk:
        nonlocal line, offset, reported
        made = Chunk(source, data, line, offset, file.tell() - reported)
        line, offset, reported = line + data.count(b"\n"), offset + len(data), file.tell()
        return made

    for piece in unpacked(source, file):
        if source.format == "txt" and offset == 0 and not waiting and begins_wiki(piece):
            source = replace(source, format=WIKI)
        last_end = _LAST_END[source.format]
        searched = len(waiting)
        waiting += piece
        if len(waiting) < CHUNK_BYTES:
            continue
        end = last_end(waiting, searched)
        if end:
            yield chunk(waiting[:end])
            waiting = waiting[end:]
        elif len(waiting) > LONGEST_TEXT_BYTES:
            hint = {
                "txt": "put a blank line between documents, or use --format lines",
                "file": "use another --format, or split the file",
            }.get(source.format, "split it into documents")
            raise InputError(
                f"{source.path}: the document that begins at line {line} is longer than "
                f"{LONGEST_TEXT_BYTES >> 20} MiB; {hint}"
            )
    if waiting:
        yield chunk(waiting)
    elif offset == 0:
        raise is_empty(source)


def begins_wiki(head: bytes) -> bool:
    """Whether a file is written by WikiExtractor, by its first bytes."""
    return _WIKI_BEGIN.match(head) is not None


def _last_line_end(data: bytes, searched: int) -> int:
    return data.rfind(b"\n", searched) + 1


def _last_blank_line(data: bytes, searched: int) -> int:
    # A blank line may have begun at the last line end of the part that was searched before.
    begin = max(data.rfind(b"\n", 0, searched), 0)
    end = 0
    for match in _BLANK_LINE.finditer(data, begin):
        end = match.end()
    return end


def _last_wiki_end(data: bytes, searched: int) -> int:
    end = data.rfind(_WIKI_END, max(searched - len(_WIKI_END) - 2, 0))
    return data.find(b"\n", end + len(_WIKI_END)) + 1 if end >= 0 else 0


# Where the last whole document in some data ends; the search need not go back before `searched`.
_LAST_END: dict[str, Callable[[bytes, int], int]] = {
    "txt": _last_blank_line,
    WIKI: _last_wiki_end,
    "lines": _last_line_end,
    "jsonl": _last_line_end,
    "file": lambda data, searched: 0,
}
# The documents in the text of a chunk.
_SPLIT: dict[str, Callable[[str], list[str]]] = {
    "txt": functools.partial(_between, _BETWEEN_DOCUMENTS),
    WIKI: functools.partial(_between, _WIKI_TAGS),
    "lines": lambda text: text.replace("\r\n", "\n").removesuffix("\n").split("\n"),
    "file": lambda text: [text],
}


def _json_records(chunk: Chunk, text_field: str, strict: bool) -> Iterator[str | BadRecord]:
    text = decode(chunk.data, chunk.source.path, chunk.line, chunk.offset, strict)
    # Not splitlines, which would also split at other characters that JSON strings may contain.
    for line, record in enumerate(text.split("\n"), chunk.line):
        if not record or record.isspace():
            continue
        value = json_object(record)
        problem = (
            f"{value}; every line holds one object with a field '{text_field}'"
            if isinstance(value, str)
            else _field_problem(value, text_field)
        )
        if not strict and is_broken(record):
            problem = "not UTF-8"
        if problem:
            what = "object" if chunk.source.format == "json" else "line"
            yield BadRecord(str(chunk.source.path), problem, line, what)
        else:
            yield as_text(field_of(value, text_field))


def _field_problem(value: dict[str, Any], text_field: str) -> str:
    """Return what is wrong with the text of a JSON object, or ""."""
    try:
        text = field_of(value, text_field)
    except KeyError:
        return f"no field '{text_field}'; {_choose_among_fields(value)}"
    if text is TWICE:
        return f"the field '{text_field}' is given twice; keep one"
    if not isinstance(text, str | None):
        return (
            f"the field '{text_field}' is a {JSON_NAMES[type(text)]}, not a string; "
            f"{_choose_among_fields(value)}"
        )
    return ""


def _choose_among_fields(value: dict[str, Any]) -> str:
    """Name the fields that hold a string, or null, which may be a string in another record."""
    kinds = {name: field_of(value, name) for name in json_names(value)}
    if texts := [name for name, found in kinds.items() if isinstance(found, str | None)]:
        return _choose_among(texts)
    return f"no field of the object holds text: {shown(kinds)}" if kinds else "the object is empty"


def _choose_among(names: Iterable[str]) -> str:
    among = shown(names)
    return f"choose with --text-field among: {among}" if among else "there is no other"


def _delimited_chunks(
    source: Source, file: BufferedReader, text_field: str, skip_bad: bool
) -> Iterator[Chunk]:
    """Cut a csv or tsv file into chunks, keeping only the text column.

    The rows are parsed here and not in `parse`. A quoted field may contain line ends, so where a
    row begins is known only after reading everything before it.
    """

    def choose(columns: list[str]) -> list[str]:
        if text_field not in columns:
            raise InputError(
                f"{source.path}: no column '{text_field}' in the header; {_choose_among(columns)}"
            )
        return [text_field]

    reported, texts, held = 0, list[bytes](), 0
    for line, row in delimited_rows(source, file, choose, strict=not skip_bad):
        value = [line, row] if isinstance(row, str) else row[text_field]
        texts.append(json.dumps(value).encode())
        held += len(texts[-1])
        if held >= CHUNK_BYTES:
            yield Chunk(source, b"\n".join(texts), line, 0, file.tell() - reported)
            texts, held, reported = [], 0, file.tell()
    if texts:
        yield Chunk(source, b"\n".join(texts), 0, 0, file.tell() - reported)
    elif reported == 0:
        raise InputError(f"{source.path}: no row below the header; remove it from the sources")


def _delimited_records(chunk: Chunk, _text_field: str, _strict: bool) -> Iterator[str | BadRecord]:
    return (_row_text(chunk, json.loads(line)) for line in chunk.data.splitlines())


def _row_text(chunk: Chunk, value: Any) -> str | BadRecord:
    if isinstance(value, str):
        return value
    line, problem = value
    return BadRecord(str(chunk.source.path), problem, line)


def _text_column(source: Source, text_field: str, schema: pyarrow.Schema) -> list[str]:
    """Choose the column of the text; raise InputError where it is missing or holds no strings."""
    kinds = {name: field_type(schema, name) for name in parquet_names(schema)}
    # Not string_view by pyarrow's functions, which older releases lack.
    strings = ("string", "large_string", "string_view")
    texts = [name for name, kind in kinds.items() if value_type(kind) in strings]
    if text_field not in kinds:
        raise InputError(f"{source.path}: no column '{text_field}'; {_choose_among(texts)}")
    if text_field not in texts and not is_binary(kinds[text_field]):
        raise InputError(
            f"{source.path}: the column '{text_field}' holds {kinds[text_field]}, "
            f"not strings; {_choose_among(texts)}"
        )
    return [text_field]


def _serialised(texts: pyarrow.Array) -> bytes:
    import pyarrow

    part = pyarrow.record_batch({"text": texts})
    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, part.schema) as stream:
        stream.write_batch(part)
    return sink.getvalue().to_pybytes()


def _parquet_chunks(
    source: Source, file: BufferedReader, text_field: str, _skip_bad: bool
) -> Iterator[Chunk]:
    return parquet_chunks(source, file, text_field)


def parquet_chunks(
    source: Source, file: BufferedReader, text_field: str, groups: range | None = None
) -> Iterator[Chunk]:
    """Cut a Parquet file into chunks; `groups` are the numbers of its groups of rows to read."""

    choose = functools.partial(_text_column, source, text_field)
    row, size = 0, file.seek(0, os.SEEK_END)
    if groups:
        row = rows_before(file, groups[0])
    for batch, rows in parquet_batches(source, file, choose, CHUNK_BYTES, groups):
        for texts in _bounded(source, column_of(batch, text_field), row + 1, _EXPANDED_BYTES):
            # A Parquet file is not read from front to back, so progress is the share of its rows.
            before, after = (size * n // rows for n in (row, row + len(texts)))
            yield Chunk(source, _serialised(texts), row + 1, 0, after - before)
            row += len(texts)


def _arrow_chunks(
    source: Source, file: BufferedReader, text_field: str, skip_bad: bool
) -> Iterator[Chunk]:
    choose = functools.partial(_text_column, source, text_field)
    row, reported = 0, 0
    for batch in arrow_batches(source, file, choose):
        # A batch of save_to_disk has 1,000 rows, which may be far more than a chunk.
        for texts in _bounded(source, column_of(batch, text_field), row + 1, CHUNK_BYTES):
            read = file.tell()
            yield Chunk(source, _serialised(texts), row + 1, 0, read - reported)
            row, reported = row + len(texts), read


def _array_chunks(
    source: Source, file: BufferedReader, _text_field: str, skip_bad: bool
) -> Iterator[Chunk]:
    """Cut a JSON array of objects into chunks with an object per line; `line` counts objects.

    A file that does not begin with a bracket holds an object per line.
    """
    pieces = unpacked(source, file)
    first = b""
    while len(first) < 4 or not first.removeprefix(codecs.BOM_UTF8).strip():
        if (piece := next(pieces, None)) is None:
            break
        first += piece
    if not first.strip():
        raise is_empty(source)
    if not first.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
        file.seek(0)
        yield from _text_chunks(replace(source, format="jsonl"), file, _text_field, skip_bad)
        return
    objects, held, number, reported = list[bytes](), 0, 1, 0
    for item in array_items(source, itertools.chain([first], pieces)):
        # A line end may stand between two tokens, and in no string.
        objects.append(item.encode().replace(b"\n", b" ").replace(b"\r", b" "))
        held += len(objects[-1])
        if held >= CHUNK_BYTES:
            read = file.tell()
            yield Chunk(source, b"\n".join(objects), number, 0, read - reported)
            number, reported = number + len(objects), read
            objects, held = [], 0
    if objects:
        yield Chunk(source, b"\n".join(objects), number, 0, file.tell() - reported)
    elif number == 1:
        raise is_empty(source)


def _bounded(source: Source, column: pyarrow.Array, row: int, most: int) -> Iterator[pyarrow.Array]:
    """Yield the strings of a column, in parts of at most `most` bytes or of one string.

    Args:
        source: the file.
        column: strings; dictionary-coded ones may expand to far more than they take.
        row: number of the first row.
        most: bytes.
    """
    import pyarrow
    from pyarrow.compute import call_function

    if pyarrow.types.is_dictionary(column.type):
        sizes = call_function("binary_length", [column.dictionary]).take(column.indices)
    else:
        column = column.cast(pyarrow.string())
        sizes = call_function("binary_length", [column])
    ends = np.cumsum(sizes.fill_null(0).to_numpy())
    begin = 0
    while begin < len(column):
        done = ends[begin - 1] if begin else 0
        end = max(int(np.searchsorted(ends, done + most, "right")), begin + 1)
        if ends[end - 1] - done > LONGEST_TEXT_BYTES:
            raise InputError(
                f"{source.path}: the text in row {row + begin} is longer than "
                f"{LONGEST_TEXT_BYTES >> 20} MiB; split it into documents"
            )
        yield column.slice(begin, end - begin).cast(pyarrow.string())
        begin = end


def _parquet_records(chunk: Chunk, _text_field: str, _strict: bool) -> list[str | BadRecord]:
    import pyarrow

    column = pyarrow.ipc.open_stream(chunk.data).read_all().column(0)
    try:
        return [text or "" for text in column.to_pylist()]
    except UnicodeDecodeError:
        pass  # which row it is in
    documents = list[str | BadRecord]()
    for row, value in enumerate(column, chunk.line):
        try:
            documents.append(value.as_py() or "")
        except UnicodeDecodeError as error:
            documents.append(
                BadRecord(
                    str(chunk.source.path),
                    f"byte {error.start} of the string is not UTF-8; write the table again",
                    row,
                    "row",
                )
            )
    return documents


class Reader(NamedTuple):
    """The two halves of reading a format."""

    # The file, open; text_field; skip_bad.
    chunks: Callable[[Source, BufferedReader, str, bool], Iterator[Chunk]]
    # text_field; whether bytes that are not UTF-8 raise an error.
    records: Callable[[Chunk, str, bool], Iterable[str | BadRecord]]


READERS = {
    **dict.fromkeys(_SPLIT, Reader(_text_chunks, _text_records)),
    "jsonl": Reader(_text_chunks, _json_records),
    "csv": Reader(_delimited_chunks, _delimited_records),
    "tsv": Reader(_delimited_chunks, _delimited_records),
    "parquet": Reader(_parquet_chunks, _parquet_records),
    "arrow": Reader(_arrow_chunks, _parquet_records),
    "json": Reader(_array_chunks, _json_records),
}
