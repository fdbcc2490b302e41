"""Maps a file into memory as a read-only array, without keeping it open.

Python's own `mmap` keeps a descriptor for each mapping, and a dataset of 100 GB has some 1,300
files; a process may often have 1,024 descriptors (since Python 3.13 `mmap` can do without).
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from pathlib import Path

import numpy as np

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = (
    *(ctypes.c_void_p, ctypes.c_size_t),
    *(ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long),
)
_LIBC.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_FAILED = ctypes.c_void_p(-1).value


def map_file(path: str | Path, dtype: np.dtype, length: int) -> np.ndarray:
    """Return the first `length` elements of a file, read-only.

    The file is unmapped when the array, and every view of it, is gone.

    Args:
        path: at least `length` elements long; reading beyond the end of a file kills the process.
        dtype: of an element.
        length: at least 1.

    Raises:
        OSError: the file cannot be opened or mapped.
    """
    size = length * dtype.itemsize
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if os.fstat(file).st_size < size:
            raise OSError(f"{path}: shorter than {size:,} bytes")
        address = _LIBC.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, file, 0)
        if address == _FAILED:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(path))
    finally:
        os.close(file)
    memory = (ctypes.c_char * size).from_address(address)
    # Not at the exit of the interpreter: another thread may still read.
    weakref.finalize(memory, _LIBC.munmap, address, size).atexit = False
    array = np.frombuffer(memory, dtype)  # pyright: ignore[reportCallIssue, reportArgumentType]
    array.flags.writeable = False
    return array
