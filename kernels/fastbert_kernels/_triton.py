"""What the Triton kernels share: properties of the device, and dropout as device functions.

The other Triton files are `_rows.py` and every `kernel.py`.
"""

import functools

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime import driver, interpreter

INTERPRETED = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1: kernels run on the CPU, in NumPy

# Triton 3.10 turns floating-point fusion off by default; every launch says what it wants.
FUSE = {"enable_fp_fusion": True}


@functools.cache
def architecture(device: torch.device) -> str:
    """Return "sm_90", "gfx942", ... as in tiles.json. The interpreter runs the tiles of sm_90."""
    if INTERPRETED:
        return "sm_90"
    target = driver.active.get_current_target()
    return f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch).split(":")[0]


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Return the number of multiprocessors, under the interpreter that of an H100."""
    if INTERPRETED:
        return 132
    return driver.active.utils.get_device_properties(driver.active.get_current_device())[
        "multiprocessor_count"
    ]


def current_device() -> int:
    """Return Triton's number of the device that a launch goes to."""
    return 0 if INTERPRETED else driver.active.get_current_device()


def current_stream(device: int) -> int:
    """Return the driver's handle of the stream that a launch on `device` goes to."""
    return driver.active.get_current_stream(device)


def hooked() -> bool:
    """Whether a hook is set that Triton calls before or after each launch, as profilers do."""
    runtime = triton.knobs.runtime
    return bool(runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls)


def takes_cpu_tensors() -> bool:
    """Whether kernels run on CPU tensors: in the interpreter, or by a driver that says so."""
    if INTERPRETED:
        return True
    try:
        return driver.active.get_active_torch_device().type == "cpu"
    except RuntimeError:  # no GPU, so no active driver
        return False


def computes_bf16() -> bool:
    """Whether bf16 is computed correctly.

    Triton's own interpreter takes the bits of bf16 for integers. The checker's
    (`checker/arithmetic.py`) holds them as numbers of another type.
    """
    return not INTERPRETED or interpreter._get_np_dtype(tl.bfloat16) != np.uint16


def dot_precision(dtype: torch.dtype) -> str:
    """Return `input_precision` of tl.dot; fp32 follows `torch.set_float32_matmul_precision`."""
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
    """As `row_seeds`: seed of a sequence (int64), position in it, to the token's seed (uint64)."""
    return splitmix64(
        seed.to(tl.uint64, bitcast=True) + (position + 1).to(tl.uint64) * 0x9E3779B97F4A7C15
    )


@triton.jit
def stream_keys(row, dropout_stream, head):
    """As `stream_keys`: uint64 row seeds to two uint32 of the same shape.

    The lowest bit of the first is set, as masks use it.
    """
    mixed = splitmix64(
        row
        + (tl.cast(dropout_stream, tl.uint64) * 65536 + tl.cast(head, tl.uint64) + 1)
        * 0x9E3779B97F4A7C15
    )
    return mixed.to(tl.uint32) | 1, (mixed >> 32).to(tl.uint32)


@triton.jit
def _kept(lo, hi, first_column, column, threshold):
    """Return a mask [ROWS, COLUMNS] or [COLUMNS, ROWS], as the keys and columns are laid out.

    Both come as vectors along their axis, with an axis of 1 for the other. Two elements take five
    instructions, and a comparison each. In the layouts of the matrix units both columns of a word
    are in one thread, whichever axis they run along, so the compiler finds that the word is the
    same and computes it once. A half of a word is compared in the upper bits, where the bits below
    it never matter.
    """
    # The mask of 28 bits changes no number. Without it, the compiler sees that words of successive
    # tiles differ by a constant, and keeps all of them in registers to add it: 20 registers a
    # thread in the forward pass, so that one program instead of two fits on a multiprocessor.
    pair = (first_column // 2 + (column // 16 * 8 + column % 8)) & 0xFFFFFFF
    x = pair.to(tl.uint32) * lo + hi
    x = (x ^ (x >> 15)) * 0x735A2D97
    return (
        tl.where(column % 16 < 8, x << 16, x).to(tl.int32, bitcast=True)
        >= (threshold - 32768) << 16
    )


@triton.jit
def keep_mask(lo, hi, first_column, COLUMNS: tl.constexpr, threshold):
    """As `keep_mask` of `_dropout.py`: [ROWS, COLUMNS] from the stream keys [ROWS].

    COLUMNS and `first_column` are multiples of 16.
    """
    return _kept(lo[:, None], hi[:, None], first_column, tl.arange(0, COLUMNS)[None, :], threshold)


@triton.jit
def keep_mask_transposed(lo, hi, first_column, COLUMNS: tl.constexpr, threshold):
    """The same as [COLUMNS, ROWS]."""
    return _kept(lo[None, :], hi[None, :], first_column, tl.arange(0, COLUMNS)[:, None], threshold)
