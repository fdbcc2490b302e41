"""What the Triton kernels share: facts on the device, and dropout as device functions. The only other Triton files are `kernel.py`."""

import functools
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime import driver, interpreter

INTERPRETED = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1: kernels run on the CPU, in NumPy

# Triton 3.10 turns floating-point fusion off by default; every launch says what it wants.
FUSE = {"enable_fp_fusion": True}


class Production(NamedTuple):
    """One kernel at one configuration that it has in training, for the ahead-of-time gate."""

    kernel: Any  # the @triton.jit function
    table: str  # its name in tiles.json
    size: int  # its row there
    dtype: torch.dtype
    arguments: dict[
        str, Any
    ]  # name to Triton type ("*bf16", "i32", ...), or to the value of a constexpr; tile values come from the table
    aligned: tuple[str, ...] = ()  # integers that are multiples of 16; pointers always are
    wide: tuple[str, ...] = ()  # pointers whose loads must be 128 bits wide


@functools.cache
def architecture(device: torch.device) -> str:
    """ "sm_90", "gfx942", ...: the first key of `tiles.json`. The interpreter runs the tiles of sm_90."""
    if INTERPRETED:
        return "sm_90"
    target = driver.active.get_current_target()
    return f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch).split(":")[0]


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many programs run side by side at the least; under the interpreter, as many as an H100 has."""
    if INTERPRETED:
        return 132
    return driver.active.utils.get_device_properties(driver.active.get_current_device())[
        "multiprocessor_count"
    ]


def current_device() -> int:
    """The device that a launch goes to, by Triton's number for it."""
    return 0 if INTERPRETED else driver.active.get_current_device()


def current_stream(device: int) -> int:
    """The stream that a launch on `device` goes to, as the driver knows it."""
    return driver.active.get_current_stream(device)


def hooked() -> bool:
    """Whether somebody has asked Triton to be called before or after each launch, as profilers do."""
    runtime = triton.knobs.runtime
    return bool(runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls)


def takes_cpu_tensors() -> bool:
    """Whether kernels run on tensors of the CPU: in the interpreter, or by a driver that says so."""
    if INTERPRETED:
        return True
    try:
        return driver.active.get_active_torch_device().type == "cpu"
    except RuntimeError:  # no GPU, hence no active driver
        return False


def computes_bf16() -> bool:
    """False in Triton's interpreter as it comes, which takes the bits of bf16 for integers.

    A corrected interpreter, such as that of the tests, holds them as numbers of another type.
    """
    return not INTERPRETED or interpreter._get_np_dtype(tl.bfloat16) != np.uint16


def dot_precision(dtype: torch.dtype) -> str:
    """`input_precision` of tl.dot: fp32 products follow torch's own setting, `torch.set_float32_matmul_precision`."""
    return (
        "tf32"
        if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
        else "ieee"
    )


@triton.jit
def splitmix64(x):
    """The mixer of `_dropout.py`; uint64 of any shape."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def row_seed(seed, position):
    """As `row_seeds`: int64 seed of a sequence and position of a token in it, to the token's uint64 seed."""
    return splitmix64(
        seed.to(tl.uint64, bitcast=True) + (position + 1).to(tl.uint64) * 0x9E3779B97F4A7C15
    )


@triton.jit
def stream_keys(row, dropout_stream, head):
    """As `stream_keys`: uint64 row seeds to two uint32 of the same shape; the first comes with its lowest bit set, as masks use it."""
    mixed = splitmix64(
        row
        + (tl.cast(dropout_stream, tl.uint64) * 65536 + tl.cast(head, tl.uint64) + 1)
        * 0x9E3779B97F4A7C15
    )
    return mixed.to(tl.uint32) | 1, (mixed >> 32).to(tl.uint32)


@triton.jit
def _kept(lo, hi, first_column, column, threshold):
    """Of [ROWS, COLUMNS] or [COLUMNS, ROWS]: keys and columns come as vectors along their axis, with an axis of 1 for the other.

    Five instructions for two elements, and a comparison each. In the layouts of the matrix units both columns of a word lie in one thread,
    whichever axis they run along, so the compiler finds that the word is the same and makes it once. A half of a word is compared
    where it stands in the upper bits: the bits below it never matter.
    """
    # The mask of 28 bits changes no number. Without it, the compiler sees that words of successive tiles differ by a constant, and keeps
    # all of them in registers to add it: 20 registers a thread in the forward pass, which cost it one of two programs on a multiprocessor.
    pair = (first_column // 2 + (column // 16 * 8 + column % 8)) & 0xFFFFFFF
    x = pair.to(tl.uint32) * lo + hi
    x = (x ^ (x >> 15)) * 0x735A2D97
    return (
        tl.where(column % 16 < 8, x << 16, x).to(tl.int32, bitcast=True)
        >= (threshold - 32768) << 16
    )


@triton.jit
def keep_mask(lo, hi, first_column, COLUMNS: tl.constexpr, threshold):
    """As `keep_mask` of `_dropout.py`: which elements of [ROWS, COLUMNS] are kept, from the stream keys [ROWS].

    `first_column` and COLUMNS are multiples of 16, the first of the second too.
    """
    return _kept(lo[:, None], hi[:, None], first_column, tl.arange(0, COLUMNS)[None, :], threshold)


@triton.jit
def keep_mask_transposed(lo, hi, first_column, COLUMNS: tl.constexpr, threshold):
    """The same as [COLUMNS, ROWS]."""
    return _kept(lo[None, :], hi[None, :], first_column, tl.arange(0, COLUMNS)[:, None], threshold)
