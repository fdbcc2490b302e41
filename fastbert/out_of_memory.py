"""Recognise exceptions that mean out of memory, and describe them in one line."""

from __future__ import annotations

import re

# torch raises the last two on a CPU and in cuBLAS as plain RuntimeErrors. Only their texts
# distinguish them from bugs.
_TEXTS = re.compile(
    r"out of memory|can't allocate memory|std::bad_alloc|CUBLAS_STATUS_ALLOC_FAILED"
)
_GPU = re.compile(
    r"Tried to allocate ([\d.]+ \w+)\.(?: GPU (\d+) has a total capacity of ([\d.]+ \w+))?"
)
_CPU = re.compile(r"tried to allocate (\d+) bytes")


def shortage(error: BaseException) -> str | None:
    """Return one line on what could not be allocated and where; None for any other exception.

    Args:
        error: from torch (CPU, CUDA or cuBLAS), numpy or Python.
    """
    text = str(error)
    if not isinstance(error, MemoryError) and not (
        isinstance(error, RuntimeError) and _TEXTS.search(text)
    ):
        return None
    if found := _GPU.search(text):
        size, gpu, capacity = found.groups()
        return f"out of GPU memory: {size} more are needed" + (
            f"; GPU {gpu} has {capacity}" if gpu else ""
        )
    if "CUBLAS" in text or "CUDA" in text:
        return "out of GPU memory"
    if found := _CPU.search(text):
        return f"out of memory: {_size(int(found[1]))} more are needed"
    return "out of memory"


def _size(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 1 << 28 else f"{size / 2**20:.2f} MiB"
