"""Read the bytes of a file through its compression, piece by piece, and decode them as UTF-8.

What is no text, such as an archive or UTF-16, is recognised by its first bytes and refused. As text
it would give rubbish, or an error that leads nowhere.
"""

from __future__ import annotations

import gzip
import io
import itertools
import re
import shlex
import zlib
from collections.abc import Callable, Iterator
from io import BufferedReader
from pathlib import PurePosixPath
from typing import Any

from fastbert.data.sources import COMPRESSIONS, Source
from fastbert.errors import InputError
from fastbert.storage import Place, Url

PIECE_BYTES = 1 << 20
# A longer line or document means that the file has another format than stated. It would also need
# too much memory.
LONGEST_TEXT_BYTES = 64 << 20
# Bytes of a zstd file that are unpacked at a time. Four bytes can hold a block of 128 KiB.
_FED_BYTES = 1 << 10


class BadRecord(InputError):
    """A single record that cannot be read; the records around it can.

    Args:
        path: the file.
        reason: what is wrong with the record, and what to do.
        line: number of its line, or of its row, from 1; 0 where it is not known.
        unit: "line" or "row".
        byte: where in the unpacked file it is wrong; -1 where that is not known.
    """

    def __init__(self, path: str, reason: str, line: int = 0, unit: str = "line", byte: int = -1):
        # All arguments, so that an exception that another process raised can be pickled.
        super().__init__(path, reason, line, unit, byte)
        self.path, self.reason, self.line, self.unit, self.byte = path, reason, line, unit, byte

    def __str__(self) -> str:
        place = f"{self.unit} {self.line}" if self.line else ""
        place += f", byte {self.byte}" if self.byte >= 0 else ""
        return f"{self.path}: {place}{': ' if place else ''}{self.reason}"

    def moved(self, lines: int) -> BadRecord:
        """Return the same with `lines` more lines before it."""
        line = self.line + lines if self.line and self.unit == "line" else self.line
        return BadRecord(self.path, self.reason, line, self.unit, self.byte)


def unpacked(source: Source, file: BufferedReader) -> Iterator[bytes]:
    """Yield the unpacked bytes of a file in pieces of about a MiB, at most some 30; none is empty.

    A packed file is recognised by its first bytes where its name does not say so. Where lines end
    in carriage returns alone, as on old Macs, these become line feeds.

    Raises:
        InputError: the file is packed wrongly or cut short, or it is no text.
    """
    head = file.peek(_HEAD_BYTES)
    if not head:
        return
    compression = source.compression or packed_as(head)
    pieces = filter(None, _UNPACK[compression](source.path, file))
    first = next(pieces, b"")
    check_text(source.path, first)
    old_mac = has_old_line_ends(first)
    for piece in itertools.chain([first] if first else [], pieces):
        yield piece.replace(b"\r", b"\n") if old_mac else piece


def has_old_line_ends(first: bytes) -> bool:
    """Whether lines end in carriage returns alone, by the first bytes of a file."""
    return b"\r" in first[:-1] and b"\n" not in first


def packed_as(head: bytes) -> str:
    """Return the compression that the first bytes of a file show, one of COMPRESSIONS, or ""."""
    return next((c for c, magic in _PACKED.items() if magic.match(head)), "")


def check_text(path: Place, first: bytes) -> None:
    """Raise InputError where the first bytes of a file are not those of text in UTF-8."""
    if packed := packed_as(first):
        raise InputError(f"{path}: packed twice, the second time as {packed}; unpack it once")
    for magic, what, remedy in _NO_TEXT:
        if re.match(magic, first, re.DOTALL):
            name = shlex.quote(str(path))
            raise InputError(f"{path}: {what}, not text; {remedy.format(name=name)}")
    for mark, encoding in (
        (b"\xff\xfe\0\0", "UTF-32"),
        (b"\xff\xfe", "UTF-16"),
        (b"\xfe\xff", "UTF-16"),
    ):
        if first.startswith(mark):
            raise InputError(
                f"{path}: begins with the mark of {encoding}; {_iconv(path, encoding)}"
            )
    some = first[:_HEAD_BYTES]
    for order, zeros in (("LE", some[1::2]), ("BE", some[::2])):
        if len(some) > 3 and zeros.count(0) > 0.9 * len(zeros):
            raise InputError(
                f"{path}: every second byte is NUL, so it looks like UTF-16; "
                f"{_iconv(path, f'UTF-16{order}')}"
            )


def _iconv(path: Place, encoding: str) -> str:
    """Return the advice to convert a file from an encoding."""
    packed = path.suffix.lower() in COMPRESSIONS
    here = PurePosixPath(path.name) if isinstance(path, Url) else path
    plain = here.with_suffix("") if packed else here
    old, new = (shlex.quote(str(p)) for p in (plain, plain.with_name(f"utf8-{plain.name}")))
    convert = f"convert it: iconv -f {encoding} -t UTF-8 {old} > {new}"
    return f"unpack it and {convert}" if packed else convert


def decode(data: bytes, path: Place, line: int, offset: int, strict: bool = True) -> str:
    """Decode UTF-8.

    Args:
        data: bytes of a file.
        path: the file.
        line, offset: where `data` begins in the unpacked file; lines count from 1, bytes from 0.
        strict: raise where bytes are not UTF-8, instead of decoding them to what `is_broken` finds.

    Raises:
        BadRecord: bytes that are not UTF-8.
    """
    if offset == 0 and data.startswith(b"\xef\xbb\xbf"):
        data = data[3:]  # a byte order mark is not text
        offset = 3
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        if not strict:
            return data.decode("utf-8", "surrogateescape")
        line += data.count(b"\n", 0, error.start)
        raise BadRecord(
            str(path),
            f"0x{data[error.start]:02x} is not UTF-8; "
            f"if the file is in Windows-1252, {_iconv(path, 'WINDOWS-1252')}",
            line,
            byte=offset + error.start,
        ) from None


def is_broken(text: str) -> bool:
    """Whether `decode` met bytes here that are not UTF-8."""
    return not text.isascii() and _ESCAPED.search(text) is not None


_ESCAPED = re.compile("[\udc80-\udcff]")


def lines(source: Source, file: BufferedReader, strict: bool = True) -> Iterator[str]:
    """Yield the decoded lines of a file, each with its line end.

    Raises:
        InputError: a line of more than LONGEST_TEXT_BYTES, or bytes that are not UTF-8.
    """
    waiting, line, offset = list[bytes](), 1, 0
    for piece in itertools.chain(unpacked(source, file), [b""]):
        end = piece.rfind(b"\n") + 1
        if piece and not end:
            waiting.append(piece)
            if sum(map(len, waiting)) > LONGEST_TEXT_BYTES:
                raise InputError(
                    f"{source.path}: line {line} is longer than {LONGEST_TEXT_BYTES >> 20} MiB; "
                    f"is this {source.format}?"
                )
            continue
        whole = b"".join([*waiting, piece[:end]])
        yield from io.StringIO(decode(whole, source.path, line, offset, strict), newline="\n")
        line, offset = line + whole.count(b"\n"), offset + len(whole)
        waiting = [piece[end:]]


def is_empty(source: Source) -> InputError:
    """Return the error for a file without content."""
    return InputError(f"{source.path}: the file is empty; remove it from the sources")


def _read_plain(path: Place, file: BufferedReader) -> Iterator[bytes]:
    while piece := file.read(PIECE_BYTES):
        yield piece


def _read_gzip(path: Place, file: BufferedReader) -> Iterator[bytes]:
    stream = gzip.GzipFile(fileobj=file)
    return _read_stream(path, stream, "gzip", (gzip.BadGzipFile, zlib.error))


def _read_zstd(path: Place, file: BufferedReader) -> Iterator[bytes]:
    import zstandard

    # Frames are decompressed one by one with decompressobj, because stream_reader takes a file that
    # is cut short for a complete one.
    context = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    frame = context.decompressobj()
    try:
        while block := file.read(PIECE_BYTES // 8):
            held, size = list[bytes](), 0
            for i in range(0, len(block), _FED_BYTES):
                packed = block[i : i + _FED_BYTES]
                while packed:
                    if frame.eof:
                        frame = context.decompressobj()
                    held.append(frame.decompress(packed))
                    size += len(held[-1])
                    packed = frame.unused_data
                    if size >= PIECE_BYTES:
                        yield b"".join(held)
                        held, size = [], 0
            yield b"".join(held)
    except zstandard.ZstdError as error:
        raise InputError(
            f"{path}: not a valid zstd file ({error}); copy or download it again"
        ) from None
    if not frame.eof and file.tell() > 0:
        raise InputError(f"{path}: the zstd file is cut short; copy or download it again")


def _read_xz(path: Place, file: BufferedReader) -> Iterator[bytes]:
    import lzma

    return _read_stream(path, lzma.LZMAFile(file), "xz", lzma.LZMAError)


def _read_bzip2(path: Place, file: BufferedReader) -> Iterator[bytes]:
    import bz2

    return _read_stream(path, bz2.BZ2File(file), "bzip2", OSError)


def _read_stream(
    path: Place, stream: Any, kind: str, invalid: type[Exception] | tuple[type[Exception], ...]
) -> Iterator[bytes]:
    """Read to the end of a stream that raises `invalid` where the file is not of this kind."""
    try:
        with stream:
            while piece := stream.read(PIECE_BYTES):
                yield piece
    except EOFError:
        raise InputError(
            f"{path}: the {kind} file is cut short; copy or download it again"
        ) from None
    except invalid as error:
        if isinstance(error, OSError) and error.errno is not None:  # the disk's, not the file's
            raise
        raise InputError(
            f"{path}: not a valid {kind} file ({error}); copy or download it again"
        ) from None


_HEAD_BYTES = 1024
_PACKED = {
    ".gz": re.compile(rb"\x1f\x8b\x08"),
    ".zst": re.compile(rb"\x28\xb5\x2f\xfd"),
    ".xz": re.compile(rb"\xfd7zXZ\x00"),
    ".bz2": re.compile(rb"BZh[1-9]1AY&SY"),
}
# The first bytes of files that are no text, what they are, and what to do.
_NO_TEXT = (
    (rb".{257}ustar", "a tar archive", "unpack it with tar -xf {name}, and name the folder"),
    (
        rb"PK\x03\x04",
        "a zip archive or an office document",
        "unpack it with unzip {name}, or save the document as text",
    ),
    (rb"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it with 7z x {name}"),
    (rb"Rar!\x1a\x07", "a rar archive", "unpack it with unrar x {name}"),
    (rb"\x04\x22\x4d\x18", "packed by lz4", "unpack it with lz4 -d {name}"),
    (rb"\x1f\x9d", "packed by compress", "unpack it with gzip -d {name}"),
    (rb"%PDF-", "a PDF", "extract its text, for example with pdftotext {name}"),
    (rb"\{\\rtf", "an RTF document", "save it as text"),
    (rb"PAR1", "a Parquet file", "read it with --format parquet"),
    (rb"ARROW1", "an Arrow file", "write it as Parquet"),
    (rb"SQLite format 3\x00", "an SQLite database", "write its text as JSON lines"),
)
_UNPACK: dict[str, Callable[[Place, BufferedReader], Iterator[bytes]]] = {
    "": _read_plain,
    ".gz": _read_gzip,
    ".zst": _read_zstd,
    ".xz": _read_xz,
    ".bz2": _read_bzip2,
}
