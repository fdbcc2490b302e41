"""Maps files into memory as read-only arrays, without keeping them open.

Python's own `mmap` keeps a descriptor for each mapping, and a dataset of 100 GB has some 1,300
files; a process may often have 1,024 descriptors (since Python 3.13 `mmap` can do without).
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from fastbert.errors import InputError

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = (
    *(ctypes.c_void_p, ctypes.c_size_t),
    *(ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long),
)
_LIBC.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_FAILED = ctypes.c_void_p(-1).value
# Numbers of Linux that Python's mmap module does not have in every version.
_NO_ACCESS, _FIXED, _NORESERVE = 0, 0x10, 0x4000


def map_ranges(ranges: Sequence[tuple[Path, int, int]], places: np.ndarray) -> np.ndarray:
    """Return ranges of files as one array of bytes, read-only.

    Address space is reserved once, and the ranges are mapped into it. Between them are bytes that
    kill the process when they are read. All is unmapped when the array, and every view of it, is
    gone.

    Args:
        ranges: file, first byte and number of bytes of each; first bytes are multiples of
            `blocks.ALIGNMENT`, and numbers are at least 1.
        places: int64 [N + 1], where each range begins in the array, multiples of it too, and the
            length of the array.

    Raises:
        OSError: a file cannot be opened or mapped, or is too short; its `filename` says which.
        InputError: the process has as many mappings as it may (vm.max_map_count).
    """
    size = int(places[-1])
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE
    address = _map(None, size, _NO_ACCESS, flags, -1, 0)
    memory = (ctypes.c_char * size).from_address(address)
    weakref.finalize(memory, _LIBC.munmap, address, size).atexit = False
    for path, begin, place, length in _joined(ranges, places):
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if os.fstat(file).st_size < begin + length:
                raise OSError(errno.ENODATA, f"shorter than {begin + length:,} bytes", str(path))
            flags = mmap.MAP_SHARED | _FIXED
            _map(address + place, length, mmap.PROT_READ, flags, file, begin, path)
        finally:
            os.close(file)
    array = np.frombuffer(memory, np.uint8)  # pyright: ignore[reportCallIssue, reportArgumentType]
    array.flags.writeable = False
    return array


def _joined(
    ranges: Sequence[tuple[Path, int, int]], places: np.ndarray
) -> Iterator[tuple[Path, int, int, int]]:
    """Yield file, first byte, place and length, with ranges that continue each other as one.

    A process may have 65,530 mappings (vm.max_map_count).
    """
    found: list[tuple[Path, int, int, int]] = []
    for (path, begin, length), place in zip(ranges, places[:-1].tolist(), strict=True):
        if found:
            last, first, at, _ = found[-1]
            if last == path and begin - first == place - at:
                found[-1] = last, first, at, place - at + length
                continue
        found.append((path, begin, place, length))
    yield from found


def _map(
    address: int | None,
    size: int,
    access: int,
    flags: int,
    file: int,
    offset: int,
    path: str | Path = "address space",
) -> int:
    """Return the address of a new mapping; see mmap(2)."""
    found = _LIBC.mmap(address, size, access, flags, file, offset)
    if found == _FAILED:
        number = ctypes.get_errno()
        if number == errno.ENOMEM and (most := _most_mappings()):
            raise InputError(
                f"{path}: cannot be mapped: this process has {most:,} mappings, as many as the "
                f"system allows; lower order.window, or raise vm.max_map_count (now {most:,})"
            )
        raise OSError(number, os.strerror(number), str(path))
    return found


def _most_mappings() -> int | None:
    """Return the number of mappings that Linux allows a process, if this process has as many."""
    try:
        most = int(Path("/proc/sys/vm/max_map_count").read_text())
        with open("/proc/self/maps", "rb") as file:  # of megabytes, and memory is short here
            found = sum(part.count(b"\n") for part in iter(lambda: file.read(1 << 16), b""))
    except OSError:
        return None
    return most if found >= most - 4 else None  # a new one may divide another one in three
