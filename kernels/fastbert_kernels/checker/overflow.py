"""Offsets that exceed 32 bits at large sizes, found without allocating anything.

The function runs on torch's fake tensors, which have a shape and no memory. Of each launch a few
programs run twice: with 32-bit integers that wrap, as a GPU's do, and with integers that do not.
Loads return zero, and loops run their first and last turns only. An access that goes elsewhere in
the second run is one whose offset has wrapped.

Indices that are loaded from memory are zero here, so offsets that depend on them are not checked.
"""

# pyright: basic
# Triton's interpreter has no types.

from __future__ import annotations

import builtins
import inspect
import itertools
from contextlib import ExitStack
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton.language as tl
from torch._C import DispatchKey
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, TensorHandle

from fastbert_kernels.checker import arithmetic
from fastbert_kernels.checker.arithmetic import np_dtype
from fastbert_kernels.checker.builder import Builder
from fastbert_kernels.checker.execute import NO_BACKWARD, draw, launch_both_ways
from fastbert_kernels.checker.memory import span_of
from fastbert_kernels.checker.record import Record
from fastbert_kernels.checker.report import Finding, show
from fastbert_kernels.checker.sanitizer import install

ROOM = 1 << 44  # between the addresses of two tensors, in bytes
RANDOM_PROGRAMS = 2
TORCH = ("aten", "prims", "prim", "profiler")  # namespaces of operators
MOST_ACCESSES = 2_000  # of one program; a loop whose turns depend on memory may not end


class _Enough(Exception):
    """A program has made MOST_ACCESSES."""


class _Launching(TorchDispatchMode):
    """Run what is registered with torch.library, where fake tensors would only get a shape."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace not in TORCH:
            for key in (DispatchKey.CompositeExplicitAutograd, DispatchKey.CPU):
                if func.has_kernel_for_dispatch_key(key):
                    with self:
                        return func._op_dk(key, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


class _Virtual:
    """A tensor without memory; the part of `memory.Argument` that addresses need."""

    def __init__(self, name: str, tensor: torch.Tensor, number: int):
        self.name, self.size = name, tensor.element_size()
        self.address = number * ROOM
        self.span = span_of(tuple(tensor.shape), tensor.stride())


class _Addresses(Builder):
    """The interpreter's operations, where memory is not there and accesses are listed."""

    def __init__(self, wide: bool):
        super().__init__(Record(), "ascending", "nan")
        self.wide = wide
        self.accesses: list[tuple[str, str, np.ndarray, np.ndarray]] = []
        self.count = 0

    def _alias(self, name: str, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            value = value.detach()
            virtual: Any = _Virtual(name, value, len(self.arguments) + 1)
            self.arguments[id(value)] = virtual
            self.held.append(value)
        return value

    def begin(self, function: Any, names: list[str]) -> None:
        super().begin(function, names)
        self.held: list[torch.Tensor] = []

    def end(self) -> None:
        self.arguments = {}

    def binary_op(self, lhs, rhs, op):
        if self.wide and lhs.dtype.scalar.name == "int32":
            lhs = TensorHandle(lhs.data.astype(np.int64), lhs.dtype)
            rhs = TensorHandle(rhs.data.astype(np.int64), rhs.dtype)
        return super().binary_op(lhs, rhs, op)

    def _list(self, pointers: TensorHandle, mask: Any) -> None:
        argument: Any = getattr(pointers.dtype.scalar, "argument", None)
        self.count += 1
        if self.count > MOST_ACCESSES:
            raise _Enough
        if argument is None:
            return
        index = (pointers.data - np.uint64(argument.address)).view(np.int64) // argument.size
        lanes = np.ones_like(index, bool) if mask is None else np.asarray(mask.data, bool)
        self.accesses.append((self.line(), argument.name, index, np.array(lanes)))

    def create_masked_load(self, ptrs, mask, other, *_, **__):
        self._list(ptrs, mask)
        dtype = ptrs.get_element_ty()
        return TensorHandle(np.zeros(ptrs.data.shape, np_dtype(dtype)), dtype)

    def create_masked_store(self, ptrs, value, mask, *_, **__):
        self._list(ptrs, mask)

    def create_atomic_rmw(self, rmwOp, ptr, val, mask, sem, scope):
        self._list(ptr, mask)
        return TensorHandle(np.zeros(ptr.data.shape, np_dtype(val.dtype)), val.dtype.scalar)

    def create_atomic_cas(self, ptr, cmp, val, sem, scope):
        self._list(ptr, None)
        return TensorHandle(np.zeros(ptr.data.shape, np_dtype(val.dtype)), val.dtype.scalar)

    def create_atomic_load(self, ptr, mask, sem, scope):
        return self.create_masked_load(ptr, mask, None)

    def create_atomic_store(self, ptr, val, mask, sem, scope):
        self._list(ptr, mask)

    def create_atomic_poll(self, ptr, expected, timeout_ns, sem, scope):
        self._list(ptr, None)
        return TensorHandle(np.ones(ptr.data.shape, bool), tl.int1)

    def launch_sampled(self, executor: GridExecutor, args: tuple, kwargs: dict) -> None:
        """Run a few programs of a launch."""
        self.begin(executor.fn, executor.arg_names)
        known = inspect.getfullargspec(executor.fn).args
        given, named = self.bind(args, {k: v for k, v in kwargs.items() if k in known})
        function: Any = executor.fn
        bound = inspect.getcallargs(function, *given, **named)
        converted = {
            name: value if name in executor.constexprs else self.convert(value)
            for name, value in bound.items()
        }
        grid: Any = executor.grid(converted) if callable(executor.grid) else executor.grid
        grid = tuple(int(n) for n in (*grid, 1, 1)[:3])
        self.check_grid(grid)
        for index in _programs(grid):
            self.grid_idx, self.count = index, 0
            self.accesses.append((f"{self.launch.kernel} {index}", "", np.zeros(0), np.zeros(0)))
            try:
                executor.fn(**converted)
            except _Enough:
                continue
        self.end()


def _programs(grid: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The corners of a grid, and a few programs between them."""
    corners = list(itertools.product(*[sorted({0, n - 1}) for n in grid]))
    draw = np.random.default_rng(0)
    between = [tuple(int(draw.integers(n)) for n in grid) for _ in range(RANDOM_PROGRAMS)]
    return list(dict.fromkeys(corners + between))


def _few(*bounds: Any) -> Any:
    """`range`, of which only the first two and the last two turns run."""
    whole = builtins.range(*[int(getattr(b, "value", b)) for b in map(_number, bounds)])
    if len(whole) <= 4:
        return whole
    return [whole[0], whole[1], whole[-2], whole[-1]]


def _number(bound: Any) -> Any:
    return bound.handle.data.item() if isinstance(bound, tl.tensor) else bound


def _few_turns(first: Any, last: Any = None, step: Any = 1, **_: Any) -> Any:
    return _few(first) if last is None else _few(first, last, step)


def overflows(checked: Any, shape: dict[str, Any], remarks: list[str]) -> list[Finding]:
    """The accesses whose 32-bit offset wraps at a large shape.

    Args:
        checked: the Check.
        shape: one of its `large`.
        remarks: gets a line if something could not be checked.
    """
    from fastbert_kernels.checker.cases import DTYPES

    dtype = checked.dtypes[0]
    runs = []
    stopped, backward = None, False
    for wide in (False, True):
        builder = _Addresses(wide)
        try:
            backward = _run(checked, shape, DTYPES[dtype], builder)
        except Exception as error:
            # What was launched before is still compared.
            after = "" if builder.accesses else "no kernel was launched; "
            lines = str(error).splitlines() or [""]
            stopped = f"{after}stopped by {type(error).__name__}: {lines[0][:200]}"
        runs.append(builder)
    narrow, wide = (run.accesses for run in runs)
    if stopped is not None or not wide:
        reason = stopped or "no kernel was launched on fake tensors"
        remarks.append(f"32-bit offsets at {show(shape)}: {reason}")
    elif not backward:
        remarks.append(f"32-bit offsets at {show(shape)}: {NO_BACKWARD}")
    found: list[Finding] = []
    kernel, program = "", ""
    for (line, name, index, lanes), (_, _, right, active) in zip(narrow, wide, strict=False):
        if not name:
            kernel, _, program = line.partition(" ")
            continue
        if index.shape != right.shape:
            break
        wrong = active & ((index != right) | ~lanes)
        if wrong.any():
            where = int(np.argmax(wrong.ravel()))
            got, expected = int(index.ravel()[where]), int(right.ravel()[where])
            numbers = program.strip("()").split(", ")
            message = f"has a 32-bit offset that wraps: {expected:,} becomes {got:,}"
            if got == expected:
                message = f"has a 32-bit number in its mask that wraps: {expected:,} is left out"
            found.append(
                Finding(
                    "32-bit overflow",
                    message,
                    kernel=kernel,
                    line=line,
                    program=tuple(int(n) for n in numbers if n),
                    tensor=name,
                    shape=shape,
                    dtype=dtype,
                    smallest=shape,
                )
            )
    grids = [fault for fault in runs[0].record.faults if fault.kind == "grid"]
    found += [
        Finding(
            *(fault.kind, fault.what),
            kernel=fault.kernel,
            line=fault.line,
            shape=shape,
            dtype=dtype,
            smallest=shape,
        )
        for fault in grids
    ]
    return list({finding.key: finding for finding in reversed(found)}.values())[::-1]


def _run(checked: Any, shape: dict[str, Any], dtype: torch.dtype, builder: _Addresses) -> bool:
    """Call the kernel on fake tensors; whether its backward pass ran, too, or there is none."""
    with ExitStack() as stack:
        install(builder, stack)
        for owner, name, value in (
            (GridExecutor, "__call__", lambda e, *a, **k: builder.launch_sampled(e, a, k)),
            (tl, "range", _few_turns),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        replace = interpreter._patch_lang

        def few_turns(function: Any) -> Any:
            namespace = function.__globals__
            if "range" not in namespace:
                namespace["range"] = _few
                stack.callback(namespace.pop, "range", None)
            return replace(function)

        stack.enter_context(mock.patch.object(interpreter, "_patch_lang", few_turns))
        if builder.wide:
            wide = {"int32": np.dtype(np.int64)}
            stack.enter_context(mock.patch.dict(arithmetic.np_dtypes, wide))
            fits = mock.patch.object(interpreter, "_validate_np_data_size", lambda *_: True)
            stack.enter_context(fits)
        stack.enter_context(np.errstate(all="ignore"))
        stack.enter_context(FakeTensorMode())
        stack.enter_context(_Launching())
        inputs = draw(checked.inputs, dtype, shape)
        return launch_both_ways(checked.kernel, inputs, checked.gradients)
