"""What this machine's processor can do, as far as the CPU kernels choose by it."""

import functools
from pathlib import Path


@functools.cache
def flags() -> frozenset[str]:
    """The words of /proc/cpuinfo: the vendor and the instruction sets; empty where it is not."""
    file = Path("/proc/cpuinfo")
    return frozenset(file.read_text().split()) if file.exists() else frozenset()


def has_bf16_instructions() -> bool:
    """Whether products of bf16 factors have instructions of their own, in AVX-512, AMX or Arm's."""
    return bool(flags() & {"avx512_bf16", "amx_bf16", "bf16"})
