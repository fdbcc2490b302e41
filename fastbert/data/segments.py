"""Cut files into segments of about a MiB by their size alone, and read one segment.

A segment holds the documents that begin in it. Where it begins is a function of the file and of a
multiple of SEGMENT_BYTES near by: the first line start there, or for a text with blank lines the
end of the first blank line. Both neighbours find the same place, so nobody reads the whole file to
know what belongs to whom. A document longer than a segment leaves the segments behind it empty.

A file is one segment where it is compressed, where a row may contain line ends (csv, tsv), or where
it is one document. Parquet is cut between its groups of rows.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from io import BufferedReader
from itertools import accumulate

from fastbert import storage
from fastbert.data.documents import (
    WIKI,
    Chunk,
    begins_wiki,
    lines_before,
    parquet_chunks,
    read_chunks,
)
from fastbert.data.sources import Source, open_source, reading
from fastbert.data.unpack import (
    LONGEST_TEXT_BYTES,
    check_text,
    has_old_line_ends,
    is_empty,
    packed_as,
)
from fastbert.errors import InputError

SEGMENT_BYTES = 1 << 20
# As much of a file tells whether it can be cut.
_HEAD_BYTES = 1 << 16
_MARGIN = 1 << 16  # read behind a segment, where the next one begins

# What ends just before a segment begins.
_ENDS = {
    "txt": re.compile(rb"\n[ \t\r\f\v]*\n"),
    WIKI: re.compile(rb"\n</doc>[^\n]*\n"),
    "lines": re.compile(rb"\n"),
    "jsonl": re.compile(rb"\n"),
}


@dataclass(frozen=True)
class File:
    """A source and how it is cut."""

    source: Source  # its format is WIKI where it was recognised
    size: int  # bytes on disk
    stamp: str  # what changes when the file is written again; see storage.py
    step: int = 0  # text is cut near multiples of this many bytes; 0 where it is not cut so
    # Parquet is cut into these groups of rows, from each to the next; () where it is not.
    groups: tuple[int, ...] = ()
    places: tuple[int, ...] = ()  # where each of these begins in the file, in bytes, by their sizes

    @property
    def segments(self) -> int:
        """Into how many segments the file is cut."""
        if self.groups:
            return len(self.groups) - 1
        return max(-(-self.size // self.step), 1) if self.step else 1

    def bounds(self, number: int) -> tuple[int, int]:
        """Return where a segment begins and ends, in bytes; text is cut near these."""
        if self.groups:
            return self.places[number], self.places[number + 1]
        if not self.step:
            return 0, self.size
        return number * self.step, min((number + 1) * self.step, self.size)


def lay_out(source: Source) -> File:
    """Return how a file is cut. Of a file of more than one segment the first bytes are read.

    Raises:
        InputError: the file is empty, is no text, or cannot be read.
    """
    with reading(source.path):
        size, stamp = storage.stamp(source.path)
    if size == 0:
        raise is_empty(source)
    file = File(source, size, stamp)
    if file.size <= SEGMENT_BYTES or source.compression:
        return file
    with open_source(source) as opened:
        if source.format == "parquet":
            return _lay_out_parquet(file, opened)
        if source.format not in _ENDS:
            return file
        head = opened.read(_HEAD_BYTES)
        if packed_as(head):
            return file
        check_text(source.path, head)
        if b"\n" not in head and has_old_line_ends(head + opened.read(SEGMENT_BYTES)):
            return file
    if source.format == "txt" and begins_wiki(head):
        source = replace(source, format=WIKI)
    return replace(file, source=source, step=SEGMENT_BYTES)


def _lay_out_parquet(file: File, opened: BufferedReader) -> File:
    """Cut at groups of rows, so that each segment has at least SEGMENT_BYTES of the file."""
    import pyarrow
    import pyarrow.parquet

    try:
        metadata = pyarrow.parquet.ParquetFile(opened).metadata
        sizes = [metadata.row_group(i).total_byte_size or 1 for i in range(metadata.num_row_groups)]
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError):
        return file  # reading it says what is wrong
    if len(sizes) < 2:
        return file
    ends = [file.size * end // sum(sizes) for end in accumulate(sizes)]
    groups, places = [0], [0]
    for number, end in enumerate(ends, 1):
        if end - places[-1] >= SEGMENT_BYTES or number == len(ends):
            groups.append(number)
            places.append(end)
    return replace(file, groups=tuple(groups), places=tuple(places))


def check_unchanged(file: File) -> None:
    """Raise InputError where a file is not what it was when `lay_out` saw it."""
    with reading(file.source.path):
        found = storage.stamp(file.source.path)
    if found != (file.size, file.stamp):
        raise InputError(
            f"{file.source.path}: changed while it was read; start again when nothing writes to it"
        )


def read_segment(
    file: File, number: int, text_field: str = "text", skip_bad: bool = False
) -> Iterator[Chunk]:
    """Yield the documents of a segment as chunks; see `documents.read_chunks`.

    Raises:
        InputError: as `read_chunks`.
    """
    if not file.step and not file.groups:
        yield from read_chunks([file.source], text_field, skip_bad)
        return
    with open_source(file.source) as opened:
        if file.groups:
            groups = range(file.groups[number], file.groups[number + 1])
            yield from parquet_chunks(file.source, opened, text_field, groups)
        else:
            yield from _read_text(file, number, opened)


def _read_text(file: File, number: int, opened: BufferedReader) -> Iterator[Chunk]:
    near_begin, near_end = file.bounds(number)
    end_of = _ENDS[file.source.format]
    # A segment that begins at a byte begins after what ends there, so the byte before counts.
    first = max(near_begin - 1, 0)
    opened.seek(first)
    data = opened.read(near_end - first + _MARGIN)
    complete = first + len(data) >= file.size

    def cut(near: int) -> int:
        """Return the place near a byte where a segment begins."""
        nonlocal data, complete
        if near in (0, file.size):
            return near
        searched = near - 1 - first
        while True:
            if found := end_of.search(data, searched):
                return first + found.end()
            if complete:
                return file.size
            if len(data) - searched > LONGEST_TEXT_BYTES:
                raise _too_long(file, near)
            more = opened.read(max(len(data) - searched, 1 << 20))
            complete = not more or first + len(data) + len(more) >= file.size
            data += more

    begin, end = cut(near_begin), cut(near_end)
    if begin < end:  # else one document covers the whole segment
        part = data[begin - first : end - first]
        yield Chunk(file.source, part, 1, begin, near_end - near_begin, counted_from=begin)


def _too_long(file: File, near: int) -> InputError:
    line = 1 + lines_before(file.source.path, near)
    advice = (
        "put a blank line between documents, or use --format lines"
        if file.source.format == "txt"
        else "split it into documents"
    )
    return InputError(
        f"{file.source.path}: the document at line {line} is longer than "
        f"{LONGEST_TEXT_BYTES >> 20} MiB; {advice}"
    )
