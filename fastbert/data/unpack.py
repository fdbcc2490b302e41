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
# A longer line or document means that the file has another format than stated. It would also need
# too much memory.
LONGEST_TEXT_BYTES = 64 << 20
# So many bytes of a zstd file are unpacked at a time. Four bytes can hold a block of 128 KiB.
_FED_BYTES = 1 << 10


def unpacked(source: Source, file: BinaryIO) -> Iterator[bytes]:
    """Yield the unpacked bytes of a file in pieces of about a MiB, at most some 30; none is empty.

    Raises:
        InputError: the file is packed wrongly or cut short.
    """
    yield from filter(None, _UNPACK[source.compression](source.path, file))


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
        yield from io.StringIO(decode(whole, source.path, line, offset), newline="\n")
        line, offset = line + whole.count(b"\n"), offset + len(whole)
        waiting = [piece[end:]]


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


_UNPACK: dict[str, Callable[[Path, BinaryIO], Iterator[bytes]]] = {
    "": _read_plain,
    ".gz": _read_gzip,
    ".zst": _read_zstd,
}
