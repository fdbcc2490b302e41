"""One run of the function under check, or of its reference: results, gradients and the record."""

# pyright: basic
# The results of other people's functions may be anything.

from __future__ import annotations

import contextlib
import re
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastbert_kernels.checker.record import Record

SEED = 20_260_731  # of inputs and upstream gradients
NO_BACKWARD = "the backward pass was not run: no output of the kernel requires a gradient"


@dataclass
class Outcome:
    """What a run returned.

    Attributes:
        values: outputs and gradients by name.
        outputs: the names of the outputs alone.
        record: of the launches; None for the reference.
        error: what it raised, with its line; None if it ended well.
        writers: by name of an output or gradient, the kernel and line that stored it last.
        missing: by the same, how many elements nobody has written.
        changed: inputs that have other values afterwards.
    """

    values: dict[str, Tensor] = field(default_factory=dict)
    outputs: tuple[str, ...] = ()
    record: Record | None = None
    error: tuple[str, str] | None = None
    writers: dict[str, tuple[str, str]] = field(default_factory=dict)
    missing: dict[str, int] = field(default_factory=dict)
    changed: dict[str, Tensor] = field(default_factory=dict)


def draw(
    make: Callable[..., Mapping[str, Any]],
    dtype: torch.dtype,
    shape: Mapping[str, Any],
    number: int = 0,
) -> dict[str, Any]:
    """The inputs of a case: always the same for the same shape, dtype and number of the draw."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED + number)
        try:
            given = make(dtype, **shape)
        except (Exception, SystemExit) as error:
            what, line = what_and_where(error)
            place = f" ({line})" if line else ""
            raise ValueError(f"inputs fails at {dict(shape)}: {what}{place}") from error
    if not isinstance(given, Mapping):
        raise ValueError(
            f"inputs returns {type(given).__name__}, expected a dict of arguments by name"
        )
    for name, value in given.items():
        if isinstance(value, Tensor) and value.device.type not in ("cpu", "meta"):
            raise ValueError(
                f"inputs: {name} is on {value.device}, expected the CPU, where kernels are run"
            )
    return dict(given)


def copy(inputs: Mapping[str, Any], dtype: torch.dtype | None = None) -> dict[str, Any]:
    """Copies with the same strides; floating-point tensors in `dtype` if it is given."""

    def copied(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        target = dtype if dtype is not None and x.is_floating_point() else x.dtype
        whole = x.detach() if x._base is None else x._base.detach()
        if whole.dtype != x.dtype:
            return x.detach().to(target, copy=True)
        moved = whole.to(target, copy=True, memory_format=torch.preserve_format)
        if moved.untyped_storage().nbytes() // moved.element_size() < _last(x):
            return x.detach().to(target, copy=True)
        return moved.as_strided(x.shape, x.stride(), x.storage_offset())

    return {name: copied(value) for name, value in inputs.items()}


def by_a_rounding(
    inputs: Mapping[str, Any], dtype: torch.dtype = torch.float32, number: int = 0
) -> dict[str, Any]:
    """Inputs whose floating-point numbers have each moved up or down by a rounding of a dtype.

    Those of fp64 move by one of fp64.
    """
    generator = torch.Generator().manual_seed(SEED + number)

    def moved(x: Any) -> Any:
        if not (isinstance(x, Tensor) and x.is_floating_point()):
            return x
        signs = torch.randint(0, 2, x.shape, generator=generator) * 2 - 1
        eps = min(torch.finfo(dtype).eps, torch.finfo(x.dtype).eps if x.itemsize == 8 else 1.0)
        return x.double() * (1 + signs * eps)

    return {name: moved(x) for name, x in inputs.items()}


def coarsest(inputs: Mapping[str, Any], dtype: torch.dtype) -> torch.dtype:
    """The dtype of a case, or fp64 if all floating-point inputs are of fp64."""
    dtypes = {x.dtype for x in inputs.values() if isinstance(x, Tensor) and x.is_floating_point()}
    return torch.float64 if dtypes == {torch.float64} else dtype


def _last(x: Tensor) -> Any:
    """How many elements the storage needs for this view."""
    if not x.numel():
        return 0
    return (
        x.storage_offset() + 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    )


def run(
    function: Callable[..., Any],
    inputs: Mapping[str, Any],
    dtype: torch.dtype | None = None,
    rounding: torch.dtype = torch.float32,
    gradients: Sequence[str] | None = None,
    contiguous: bool = True,
    sanitizing: Mapping[str, Any] | None = None,
) -> Outcome:
    """Call a function on copies of the inputs, and differentiate its outputs.

    Args:
        function: takes the inputs by name; returns a tensor, or a tuple, list or dict of tensors.
        inputs: by name.
        dtype: to which floating-point inputs are converted; None to leave them.
        rounding: the dtype of the case. Upstream gradients can be represented in it, so that they
            are the same for every run.
        gradients: inputs to differentiate by; None for all floating-point ones.
        contiguous: whether upstream gradients are; else every second element of a tensor.
        sanitizing: options of `sanitize`, for kernels; None for the reference.
    """
    arguments = copy(inputs, dtype)
    given = {name: x.clone() for name, x in arguments.items() if isinstance(x, Tensor)}
    leaves = [
        name
        for name, x in arguments.items()
        if isinstance(x, Tensor)
        and x.is_floating_point()
        and (gradients is None or name in gradients)
    ]
    for name in leaves:
        arguments[name].requires_grad_()
    outcome = Outcome()
    with contextlib.ExitStack() as stack:
        if sanitizing is not None:
            from fastbert_kernels.checker.sanitizer import sanitize

            outcome.record = stack.enter_context(sanitize(raise_on_fault=False, **sanitizing))
        try:
            named = _named(function(**arguments))
            outcome.outputs = tuple(named)
            leaves_by_name = {name: arguments[name] for name in leaves}
            named |= _gradients(named, leaves_by_name, rounding, contiguous)
        except (Exception, SystemExit) as error:
            outcome.error = what_and_where(error)
            return outcome
        if outcome.record is not None:
            for name, x in named.items():
                outcome.missing[name] = outcome.record.fresh.missing(x)
                outcome.writers[name] = outcome.record.writer_of(x)
    outcome.values = {name: _bits(x.detach()) for name, x in named.items()}
    outcome.changed = {
        name: arguments[name].detach().clone()
        for name, before in given.items()
        if not same(before, arguments[name].detach())
    }
    for name in outcome.changed:
        if outcome.record is None:
            break
        outcome.writers.setdefault(name, outcome.record.writer_of(arguments[name]))
    return outcome


def _bits(x: Tensor) -> Tensor:
    """A copy, also of the bytes of a bool that are neither 0 nor 1, which `clone` replaces."""
    return x.view(torch.uint8).clone().view(x.dtype) if x.dtype == torch.bool else x.clone()


def launch_both_ways(
    kernel: Callable[..., Any], inputs: Mapping[str, Any], gradients: Sequence[str] | None
) -> bool:
    """Call the function under check, and its backward pass where it has one, for the launches.

    Args:
        kernel, gradients: as in `Check`.
        inputs: its arguments by name.

    Returns:
        False if the backward pass did not run, although there are inputs to differentiate by.
    """
    leaves = [
        x.requires_grad_()
        for name, x in inputs.items()
        if isinstance(x, Tensor)
        and x.is_floating_point()
        and (gradients is None or name in gradients)
    ]
    outputs = [x for x in _named(kernel(**inputs)).values() if x.requires_grad]
    if outputs and leaves:
        upstream = [torch.ones_like(x) for x in outputs]
        torch.autograd.grad(outputs, leaves, upstream, allow_unused=True)
    return bool(outputs) or not leaves


def _named(result: Any) -> dict[str, Tensor]:
    if isinstance(result, Tensor):
        return {"result": result}
    if isinstance(result, Mapping):
        return {str(name): x for name, x in result.items() if isinstance(x, Tensor)}
    if isinstance(result, (tuple, list)):
        return {f"result[{i}]": x for i, x in enumerate(result) if isinstance(x, Tensor)}
    if result is None:
        return {}
    raise TypeError(f"returned {type(result).__name__}, expected a tensor or several")


def _gradients(
    outputs: dict[str, Tensor],
    leaves: dict[str, Tensor],
    rounding: torch.dtype,
    contiguous: bool,
) -> dict[str, Tensor]:
    differentiable = [x for x in outputs.values() if x.requires_grad]
    if not differentiable or not leaves:
        return {}
    generator = torch.Generator().manual_seed(SEED)
    upstream = [
        torch.randn(x.shape, generator=generator).to(rounding).to(x.dtype) for x in differentiable
    ]
    if not contiguous:  # as autograd gives them after a slice, a transposition or a sum
        upstream = [torch.stack([x, x], -1)[..., 0] for x in upstream]
    found = torch.autograd.grad(differentiable, list(leaves.values()), upstream, allow_unused=True)
    return {
        f"d{name}": gradient
        for name, gradient in zip(leaves, found, strict=True)
        if gradient is not None
    }


def same(a: Tensor, b: Tensor) -> bool:
    """Whether all bits are equal; NaN equals NaN."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.is_floating_point() and a.element_size() == 1:  # torch cannot compare fp8
        return torch.equal(a.view(torch.uint8), b.view(torch.uint8))
    if a.is_floating_point():
        return bool(((a == b) | (a.isnan() & b.isnan())).all())
    return torch.equal(a, b)


def what_and_where(error: BaseException) -> tuple[str, str]:
    """The last message of a chain of exceptions, and the line of the kernel or its launcher."""
    libraries = tuple(str(Path(file).parent) for file in (__file__, torch.__file__, np.__file__))
    frames = _frames(error, libraries)
    while error.__cause__ is not None:
        error = error.__cause__
        frames = _frames(error, libraries) or frames
    line = f"{'/'.join(Path(frames[-1].filename).parts[-2:])}:{frames[-1].lineno}" if frames else ""
    text = str(error).strip().splitlines()
    message = f"{type(error).__name__}: {text[0] if text else ''}"
    return message + _advice(error, message, (frames[-1].line or "") if frames else ""), line


def _advice(error: BaseException, message: str, source: str) -> str:
    """What to do about an exception that the way of running causes; "" for others.

    Args:
        error: the exception.
        message: its type and first line.
        source: the line of the launcher that it comes from.
    """
    if type(error).__name__ == "DataDependentOutputException":  # of torch's FakeTensor
        return "; tensors of such a size have no values here, so none can be read"
    text = f"{message} {source}" if isinstance(error, AssertionError) else message
    if re.search(r"cuda|\bgpu\b|nvidia", text, re.IGNORECASE):
        return "; kernels run on CPU tensors here: leave out what asks for a GPU"
    return ""


def _frames(error: BaseException, libraries: tuple[str, ...]) -> list[traceback.FrameSummary]:
    """Where an exception came through, without Triton and these libraries."""
    return [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if "/triton/" not in frame.filename and not frame.filename.startswith(libraries)
    ]
