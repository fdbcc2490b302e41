"""Checks that the public functions share.

A message names the function, the argument, its value and what is expected. The checks run in every
call of every layer, while a GPU may be waiting, so they are fast: a tensor takes three comparisons.
"""

import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import torch

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INT32, INT64 = (torch.int32,), (torch.int64,)
_HAS_TRITON = importlib.util.find_spec("triton") is not None

# A program of the row kernels holds a row, and its share of three gradients, in registers.
WIDEST_ROW = 8192

# A name, the tensor (None is always right), its shape, the dtypes that it may have.
Expected = tuple[str, torch.Tensor | None, tuple[int, ...], tuple[torch.dtype, ...]]

# By `impl`: functions with the same arguments and results.
Implementations = Mapping[str, Callable[..., Any]]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return " or ".join(map(_name, dtypes))


def check_leader(
    function: str,
    name: str,
    x: torch.Tensor,
    axes: tuple[str, ...],
    dtypes: tuple[torch.dtype, ...] = FLOATS,
) -> None:
    """Check the number of axes and the dtype of a tensor from which sizes are taken."""
    if x.dim() != len(axes):
        raise ValueError(
            f"{function}: {name} has shape {list(x.shape)}, expected [{', '.join(axes)}]"
        )
    if x.dtype not in dtypes:
        raise TypeError(f"{function}: {name} is {_name(x.dtype)}, expected {_names(dtypes)}")


def check_tensors(function: str, device: torch.device, *tensors: Expected) -> None:
    """Check that each tensor is as expected, and on `device`."""
    for name, x, shape, dtypes in tensors:
        if x is None:
            continue
        if x.shape != shape:
            raise ValueError(
                f"{function}: {name} has shape {list(x.shape)}, "
                f"expected [{', '.join(map(str, shape))}]"
            )
        if x.dtype not in dtypes:
            raise TypeError(f"{function}: {name} is {_name(x.dtype)}, expected {_names(dtypes)}")
        if x.device != device:
            raise ValueError(
                f"{function}: {name} is on {x.device}, the other tensors on {device}; move it there"
            )


def check_dropout(function: str, p: float, dropout_seeds: torch.Tensor | None, length: int) -> None:
    """Check that there are seeds where they are needed; `check_tensors` checks what they are."""
    if not 0 <= p < 1 - 2**-17:  # beyond, it rounds to 1
        raise ValueError(
            f"{function}: dropout_p = {p}; must be at least 0 and below 1, to a multiple of 2**-16"
        )
    if p > 0 and dropout_seeds is None:
        raise ValueError(
            f"{function}: dropout_p = {p} needs dropout_seeds, int64 [{length}], "
            f"such as torch.randint(2**63 - 1, [{length}])"
        )


def chosen_implementation(
    function: str, name: str, offered: Implementations, like: torch.Tensor
) -> str:
    """Return the implementation for `impl = name`; "auto" goes by the device of `like`."""
    if name in offered:
        return name
    if name != "auto":
        raise ValueError(
            f"{function}: impl = {name!r}; this operation has auto, {', '.join(offered)}"
        )
    if like.is_cpu:
        return "cpu"
    if not like.is_cuda:
        raise ValueError(
            f'{function}: impl = "auto" is for cpu and cuda, and the tensors are on {like.device}; '
            'use impl = "reference"'
        )
    if not _HAS_TRITON:
        raise ImportError(
            f'{function}: impl = "auto" needs Triton 3.6 or newer on {like.device}: '
            'pip install triton, or use impl = "reference"'
        )
    return "triton"


def check_triton(function: str, *tensors: Expected) -> None:
    """Check what the Triton implementations need beyond the rest.

    That is a device that runs them, a dtype that they compute in, and a last axis that is
    contiguous. The tensors have passed `check_tensors`: all are on one device, and if any is
    float64, the first one is.
    """
    if not _HAS_TRITON:
        raise ImportError(
            f'{function}: impl = "triton" needs Triton 3.6 or newer: pip install triton'
        )
    for name, x, *_ in tensors:
        if x is not None and not x.is_contiguous() and x.shape[-1] > 1 and x.stride(-1) != 1:
            raise ValueError(
                f"{function}: {name} has stride {x.stride(-1)} along its last axis, expected 1; "
                "call .contiguous()"
            )
    name, first, *_ = tensors[0]
    assert first is not None
    if first.dtype == torch.float64:
        raise TypeError(
            f'{function}: {name} is float64, which impl = "triton" does not compute in; '
            'use impl = "reference"'
        )
    if first.is_cpu and not _takes_cpu_tensors():
        raise ValueError(
            f'{function}: {name} is on the CPU, where impl = "triton" only runs in Triton\'s '
            'interpreter (TRITON_INTERPRET=1, slow); use impl = "cpu"'
        )
    if first.is_cpu and first.dtype == torch.bfloat16 and not _computes_bf16():
        raise TypeError(
            f"{function}: {name} is bfloat16, which Triton's interpreter computes wrongly; "
            'use float32 or float16 there, impl = "cpu", or a block '
            "`with fastbert_kernels.checker.sanitize():`, which corrects it"
        )


def check_row_width(function: str, name: str, width: int) -> None:
    """Check that a row fits the registers of a program (`_rows.py`)."""
    if width > WIDEST_ROW:
        raise ValueError(
            f'{function}: {name} has D = {width}; impl = "triton" takes up to {WIDEST_ROW}, '
            'use impl = "reference"'
        )


def _takes_cpu_tensors() -> bool:
    from fastbert_kernels._triton import takes_cpu_tensors

    return takes_cpu_tensors()


def _computes_bf16() -> bool:
    from fastbert_kernels._triton import computes_bf16

    return computes_bf16()


def values_checked(asked: bool | None, x: torch.Tensor) -> bool:
    """Whether to check the values of an index tensor.

    By default they are checked on a CPU only, since a GPU would have to be waited for. While
    torch.compile traces, they never are.
    """
    return (x.is_cpu if asked is None else asked) and not torch.compiler.is_compiling()


def check_range(
    function: str, name: str, x: torch.Tensor, bound: int, axis: str, exception: str = ""
) -> None:
    """Check that every value of an integer tensor is in [0, bound); `axis` names the bound."""
    if x.numel():
        low, high = int(x.min()), int(x.max())
        if low < 0 or high >= bound:
            raise ValueError(
                f"{function}: {name} span {low} to {high}; "
                f"must be in [0, {axis} = {bound}){exception}"
            )
