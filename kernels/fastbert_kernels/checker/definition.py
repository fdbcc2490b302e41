"""A check: a kernel, what it should compute, and its inputs; and one run of either."""

# pyright: basic
# The results of other people's functions may be anything.

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastbert_kernels.checker.execute import Outcome, draw, run

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FIRST: dict[str, Any] = {"order": "ascending", "undefined": "nan"}  # of sanitize


@dataclass(frozen=True)
class Check:
    """A kernel and what it should compute.

    Attributes:
        kernel: launches the kernels; takes the inputs by name, and returns a tensor or several (a
            tuple, list or dict). If autograd can differentiate it, gradients are compared, too.
        reference: the same in plain torch, in the dtype of its inputs.
        inputs: called with a dtype and a shape, `inputs(torch.float32, rows=3)`; returns a dict of
            arguments. torch's generator is seeded before.
        shapes: by name of a size; a few around the tiles of the kernel.
        dtypes: of "fp32", "bf16", "fp16".
        gradients: inputs whose gradients are compared; None for all floating-point ones.
        large: shapes whose offsets may exceed 32 bits; nothing of that size is allocated.
        least_bytes: called with bytes of an element and a shape; the least that can be moved.
        flops: called with a shape; the least operations of matrix products.
        name: in the report.
    """

    kernel: Callable[..., Any]
    reference: Callable[..., Any]
    inputs: Callable[..., Mapping[str, Any]]
    shapes: Sequence[Mapping[str, Any]]
    dtypes: Sequence[str] = ("fp32", "bf16")
    gradients: Sequence[str] | None = None
    large: Sequence[Mapping[str, Any]] = ()
    least_bytes: Callable[..., int] | None = None
    flops: Callable[..., int] | None = None
    name: str = ""


def validate(checked: Check, name: str) -> None:
    """Raise ValueError if the check itself is wrong."""
    for what in ("kernel", "reference", "inputs"):
        function = getattr(checked, what)
        if type(function).__module__.startswith("triton."):
            raise ValueError(
                f"{name}: {what} is a @triton.jit function; give the function that launches it"
            )
        if not callable(function):
            raise ValueError(f"{name}: {what} = {function!r}; expected a function")
    for what in ("shapes", "large", "dtypes", "gradients"):
        value = getattr(checked, what)
        if what == "gradients" and value is None:
            continue
        if isinstance(value, str) or not isinstance(value, Iterable):
            raise ValueError(f"{name}: {what} = {value!r}; expected a list")
    for what in ("shapes", "large"):
        for shape in getattr(checked, what):
            if not isinstance(shape, Mapping):
                raise ValueError(
                    f"{name}: {shape!r} in {what}; expected a dict of sizes, such as {{'rows': 3}}"
                )
            try:
                inspect.signature(checked.inputs).bind(torch.float32, **shape)
            except TypeError as error:
                raise ValueError(f"inputs fails at {dict(shape)}: TypeError: {error}") from error
    for what in ("shapes", "dtypes"):
        if not getattr(checked, what):
            raise ValueError(f"{name}: {what} is empty; give one at least")
    for dtype in checked.dtypes:
        if dtype not in DTYPES:
            raise ValueError(f"{name}: dtype = {dtype!r}; known are {', '.join(DTYPES)}")
    inputs = draw(checked.inputs, DTYPES[checked.dtypes[0]], checked.shapes[0])
    for gradient in checked.gradients or ():
        value = inputs.get(gradient)
        if not (isinstance(value, Tensor) and value.is_floating_point()):
            floats = [
                n for n, x in inputs.items() if isinstance(x, Tensor) and x.is_floating_point()
            ]
            raise ValueError(
                f"{name}: gradients has {gradient!r}, which is no floating-point input; "
                f"there are {', '.join(floats) or 'none'}"
            )


def run_kernel(
    checked: Check,
    inputs: Mapping[str, Any],
    dtype: str,
    options: Mapping[str, Any] = FIRST,
    contiguous: bool = True,
) -> Outcome:
    """One run of the kernel, with options of `sanitize`."""
    gradients, rounding = checked.gradients, DTYPES[dtype]
    return run(checked.kernel, inputs, None, rounding, gradients, contiguous, sanitizing=options)


def run_reference(
    checked: Check, inputs: Mapping[str, Any], dtype: str, exact: bool = False
) -> Outcome:
    """The reference in the dtype itself, or in fp64 where it is exact."""
    wide = torch.float64 if exact else None
    return run(checked.reference, inputs, wide, DTYPES[dtype], checked.gradients)
