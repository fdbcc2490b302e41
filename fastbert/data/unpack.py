"""Read the bytes of a file through its compression, piece by piece, and decode them as UTF-8."""

from __future__ import annotations

import gzip
import io
import itertools
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from fastbert.data.sources import Source
from fastbert.errors import InputError

PIECE_BYTES = 1 << 20


def unpacked(source: Source, file: BinaryIO) -> Iterator[bytes]:
    """Yield the unpacked bytes of a file in pieces of about a MiB.

    Raises:
        InputError: the file is packed wrongly or cut short.
    """
    yield from _UNPACK[source.compression](source.path, file)


def decode(data: bytes, path: Path, line: int, offset: int) -> str:
    """Decode UTF-8.

    Args:
        data: bytes of a file.
        path: the file.
        line, offset: where `data` begins in the unpacked file; lines count from 1, bytes from 0.

    Raises:
        InputError: bytes that are not UTF-8.
    """
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


def lines(source: Source, file: BinaryIO) -> Iterator[str]:
    """Yield the decoded lines of a file, each with its line end."""
    waiting, line, offset = b"", 1, 0
    for piece in itertools.chain(unpacked(source, file), [b""]):
        waiting += piece
        end = waiting.rfind(b"\n") + 1 if piece else len(waiting)
        whole, waiting = waiting[:end], waiting[end:]
        yield from io.StringIO(decode(whole, source.path, line, offset), newline="\n")
        line, offset = line + whole.count(b"\n"), offset + len(whole)


def is_empty(source: Source) -> InputError:
    """Return the error for a file without content."""
    return InputError(f"{source.path}: the file is empty; remove it from the sources")


def _read_plain(path: Path, file: BinaryIO) -> Iterator[bytes]:
    while piece := file.read(PIECE_BYTES):
        yield piece


def _read_gzip(path: Path, file: BinaryIO) -> Iterator[bytes]:
    try:
        with gzip.GzipFile(fileobj=file) as stream:
            while piece := stream.read(PIECE_BYTES):
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
        while packed := file.read(PIECE_BYTES // 8):
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
