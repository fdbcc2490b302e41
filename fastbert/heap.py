"""Let the C heap keep the memory that the next training step needs, and nothing else.

glibc returns every block above 32 MB to the system at once, and trims the top of its heap. Every
step then causes page faults for its temporaries. (Filling 49 MB on one thread of an AMD EPYC takes
21.8 ms, and 1.9 ms with the heap kept.)

oneDNN caches the last 1,024 operations that it has compiled, each for exact shapes. Rounded factors
have few shapes (fastbert_kernels/_linear.py), whose products come again and again: compiling them
each time took half of a step's time with AMX. Other operations have the shapes of one pack, are
never used again, and fragment the heap: in fp32, with no products that come again, a run took 2,400
MB at its end with 1,024 (AMD EPYC). A cache of 512 keeps the former and less of the latter. With
256, the products of recipes/library.toml in bf16 push each other out: its steps take 0.66 s of CPU
time in place of 0.39 (Intel Xeon with AMX, steps 40 to 110 in two processes, beside others).
"""

import ctypes
import os
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_KEEP = (1 << 31) - 1  # bytes; the largest value that mallopt accepts
# Operations in the cache of oneDNN itself, and in the one that torch puts before it in fp32.
CACHES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "512", "LRU_CACHE_CAPACITY": "32"}


def keep_heap() -> None:
    """Configure the heap of this process; call it before torch computes anything.

    oneDNN is configured by environment variables. A user's own values take precedence, and child
    processes inherit them. The heap is left alone on systems other than Linux with glibc.
    """
    for cache, operations in CACHES.items():
        os.environ.setdefault(cache, operations)
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "gnu_get_libc_version"):
            libc.mallopt(_M_MMAP_THRESHOLD, _KEEP)
            libc.mallopt(_M_TRIM_THRESHOLD, _KEEP)
