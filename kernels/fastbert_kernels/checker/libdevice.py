"""The functions of CUDA's libdevice, which the interpreter lacks, by their definitions.

A kernel calls them as `libdevice.tanh` or, after `from ... import tanh`, as a global of its own.
Both are replaced while a `sanitize` block runs. They compute in fp64 and round once; libdevice's
own are within a few units in the last place.
"""

# pyright: basic
# Triton's interpreter has no types.

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import TensorHandle

from fastbert_kernels.checker.arithmetic import np_dtype

MODULES = ("triton.language.extra.libdevice", "triton.language.extra.cuda.libdevice")
SAME_NAME = (
    *("abs", "acos", "acosh", "asin", "asinh", "atan", "atan2", "atanh", "ceil", "cos", "cosh"),
    *("erf", "erfc", "erfinv", "exp", "exp2", "expm1", "floor", "hypot", "lgamma", "log", "log10"),
    *("log1p", "log2", "pow", "round", "rsqrt", "sin", "sinh", "sqrt", "tan", "tanh", "trunc"),
)
DEFINITIONS: dict[str, Callable[..., torch.Tensor]] = {
    **{name: getattr(torch, name) for name in SAME_NAME},
    "fast_expf": torch.exp,
    "fast_logf": torch.log,
    "fast_sinf": torch.sin,
    "fast_cosf": torch.cos,
    "fast_powf": torch.pow,
    "fast_dividef": torch.divide,
    "div_rn": torch.divide,
    "rcp_rn": torch.reciprocal,
    "sqrt_rn": torch.sqrt,
    "rint": torch.round,
    "nearbyint": torch.round,
    "fmod": torch.fmod,
    "isinf": torch.isinf,
    "isnan": torch.isnan,
    "copysign": torch.copysign,
}


def _on_tensors(definition: Callable[..., torch.Tensor]) -> Callable[..., tl.tensor]:
    def function(*args: Any, **_: Any) -> tl.tensor:
        first = next(arg for arg in args if isinstance(arg, tl.tensor))
        numbers = [
            torch.from_numpy(np.array(arg.handle.data, np.float64))
            if isinstance(arg, tl.tensor)
            else torch.tensor(float(arg), dtype=torch.float64)
            for arg in args
        ]
        result = definition(*numbers)
        dtype = tl.int1 if result.dtype == torch.bool else first.dtype
        data = result.numpy().astype(np_dtype(dtype))
        shape = list(data.shape)
        kind = tl.block_type(dtype, shape) if isinstance(first.type, tl.block_type) else dtype
        return tl.tensor(TensorHandle(data, dtype), kind)

    return function


REPLACEMENTS = {name: _on_tensors(definition) for name, definition in DEFINITIONS.items()}


def patches(namespace: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The names in a kernel's globals that mean a function of libdevice, and what replaces them."""
    for name, value in list(namespace.items()):
        if type(value) is FunctionType and value.__module__ in MODULES:
            known = REPLACEMENTS.get(getattr(value, "__name__", ""))
            if known is not None:
                yield name, known


def modules() -> Iterator[Any]:
    """Triton's own modules of these functions."""
    for name in MODULES:
        try:
            yield importlib.import_module(name)
        except ImportError:  # a Triton without this backend
            continue
