"""Triton's real launcher with a driver that launches nothing, to compile kernels without a GPU.

    with no_launch("sm_90") as seen:
        # On the CPU; the result is undefined.
        varlen_attention(q, k, v, cu_seqlens, max_seqlen, impl="triton")
    seen.launches                                       # every launch, with its grid

Argument binding, specialisation, compilation down to machine code, and the limits of shared memory,
threads and grid are those of a real launch. Only the call to the GPU's driver is left out. Triton's
interpreter accepts code that the compiler rejects; this launcher shows whether a kernel will run.
The memory of results is not written, so no caller may depend on their values.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import ty_to_cpp
from triton.runtime import driver

from fastbert_kernels import _triton

# Bytes of shared memory that one program may have: CUDA C++ Programming Guide, "Technical
# Specifications per Compute Capability".
SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
MULTIPROCESSORS = {80: 108, 90: 132, 100: 148}  # of an A100, an H100 and a B200
GRID_LIMITS = (2**31 - 1, 65535, 65535)  # maximum programs along each axis; the same guide
MOST_THREADS = 1024  # per program


class Launch(NamedTuple):
    """One launch of one kernel."""

    name: str
    grid: tuple[int, int, int]
    threads: int


@dataclass
class Seen:
    """The launches, in order; and the kernels that were loaded for them, one per specialisation.

    A kernel is loaded once per process, so a second `no_launch` sees its launches, but no loading.

    Attributes:
        launches: every launch.
        loaded: names of the loaded kernels.
        compiled: sources and metadata of the loaded kernels.
    """

    launches: list[Launch] = field(default_factory=list)
    loaded: list[str] = field(default_factory=list)
    compiled: list[tuple[Any, Any]] = field(default_factory=list)


@contextlib.contextmanager
def no_launch(architecture: str) -> Iterator[Seen]:
    """A context in which Triton's active driver compiles for an architecture and takes CPU tensors.

    Args:
        architecture: "sm_80", "sm_90" or "sm_100".

    Raises (from within):
        Triton's own errors if a kernel does not compile or does not fit the device; ValueError for
        a grid beyond its limits.
    """
    if _triton.INTERPRETED:
        raise RuntimeError(
            "no_launch: TRITON_INTERPRET is set, so nothing would be compiled; unset it"
        )
    seen = Seen()
    before = driver._active  # not `active`, which would look for a GPU
    ours: Any = _Driver(int(architecture.removeprefix("sm_")), seen)
    driver.set_active(ours)
    _forget_device()
    try:
        yield seen
    finally:
        driver._active = before
        _forget_device()


def _forget_device() -> None:
    _triton.architecture.cache_clear()
    _triton.multiprocessors.cache_clear()


class _Driver:
    """The part of `triton.backends.driver.GPUDriver` that a launch uses."""

    def __init__(self, capability: int, seen: Seen):
        self.capability = capability
        self.utils = _Utilities(capability)
        self.launcher_cls = _Launcher
        self.seen = seen

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        # One device per architecture, because Triton keeps compiled kernels by device.
        return self.capability

    def get_current_stream(self, _device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, kind: str) -> str:
        return ty_to_cpp(kind)


def _active() -> _Driver:
    """The current driver, looked up at each launch: compiled kernels outlive their `no_launch`."""
    return driver.active  # type: ignore[return-value]


class _Utilities:
    """A device: its properties, and the loading of machine code."""

    def __init__(self, capability: int):
        self.capability = capability

    def get_device_properties(self, _device: int) -> dict[str, int]:
        capability = self.capability
        return {
            "max_shared_mem": SHARED_MEMORY[capability],
            "multiprocessor_count": MULTIPROCESSORS[capability],
            "warpSize": 32,
        }

    def load_binary(
        self, name: str, _binary: bytes, _shared: int, _device: int
    ) -> tuple[int, int, int, int, int]:
        _active().seen.loaded.append(name)
        return 1, 1, 0, 0, MOST_THREADS  # module, function, registers, spills, threads


class _Launcher:
    """The launcher of one compiled kernel."""

    def __init__(self, source: Any, metadata: Any):
        self.name, self.threads = metadata.name, 32 * metadata.num_warps
        _active().seen.compiled.append((source, metadata))

    def __call__(self, x: int, y: int, z: int, *_arguments: Any) -> None:
        for axis, programs, limit in zip("xyz", (x, y, z), GRID_LIMITS, strict=True):
            if not 0 < programs <= limit:
                raise ValueError(
                    f"{self.name}: a grid of {x} x {y} x {z} programs; "
                    f"along {axis} there must be 1 to {limit}"
                )
        _active().seen.launches.append(Launch(self.name, (x, y, z), self.threads))
