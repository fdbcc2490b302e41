"""A sanitizer for Triton kernels that run under TRITON_INTERPRET=1.

    with sanitize() as record:
        kernel[grid](...)                      # any number of launches
    record.launches[0].tensors["x_ptr"].loaded # bytes

Leaving the block raises SanitizerError with a line for every fault:

- an access outside the elements of the tensor that the pointer was derived from (of its view, not
  of its storage). It is reported instead of performed, so nothing crashes. Masked-off lanes are
  not checked;
- a race between two programs of a launch: one stores an element that another one loads or stores,
  unless both accesses are atomic, or an atomic operation on one element orders them (`clocks.py`);
- two lanes of one store that write different values to one element;
- a read of memory that nobody has written (`fresh.py`);
- a `tl.device_assert`, `tl.assume` or (of a number) `tl.multiple_of` that does not hold;
- a program that waits for one that runs later.

Where the stock interpreter's arithmetic differs from a GPU's, most of all for bf16, the sanitizer
computes as a GPU does (`arithmetic.py`). The types of arguments are those of a compiled kernel:
a Python float is fp32, so its product with bf16 is fp32, while the stock interpreter returns bf16.
What the language leaves undefined is poisoned: a masked-off lane without `other` loads NaN or the
largest integer, or what `undefined` says. Of `@triton.autotune` one configuration runs, by default
the first.

How it works: `sanitize` replaces the interpreter's builder by that of `builder.py`, and a few of
its functions, for the duration of the block. Every storage of a launch has shadow arrays that
record which program loaded, stored or atomically updated each element.

What it cannot see:

- races between the warps of one program;
- races that the order of atomic operations hides in the one order that it runs: other orders of
  the programs may show them;
- races between two arguments of different element size on one storage;
- rounding inside a 16-bit `tl.sum` or `tl.cumsum` (a GPU rounds after every addition: sum in fp32);
- TF32 (fp32 dot products stay fp32).

What kernels must avoid, because it cannot be run:

- inline assembly, and functions of libdevice that `libdevice.py` does not define;
- pointers that are made from integers, chosen between two arguments by `tl.where`, or cast to
  elements of another size;
- `if` on a block of more than one element, which the compiler refuses, too.
"""

# pyright: basic
# Triton's interpreter has no types.

from __future__ import annotations

import functools
import math
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import triton
import triton.language as tl
from triton import knobs
from triton._utils import validate_block_shape
from triton.runtime import interpreter
from triton.runtime.autotuner import Autotuner
from triton.runtime.interpreter import GridExecutor, TensorHandle

from fastbert_kernels.checker import libdevice
from fastbert_kernels.checker.arithmetic import ARITHMETIC_PATCHES
from fastbert_kernels.checker.builder import Builder
from fastbert_kernels.checker.record import Record
from fastbert_kernels.checker.report import count, launches

TRITON = str(Path(triton.__file__).parent)
SEMANTIC = str(Path(triton.__file__).parent / "language" / "semantic.py")


class SanitizerError(AssertionError):
    """A kernel made a forbidden access; the message has a line for every fault."""


# ---- shapes. Triton computes a shape's constants again for every tensor and type, which takes a
# fifth of the time of a launch.


@functools.cache
def _shape(shape: tuple[int, ...]) -> tuple[Any, Any]:
    """Return a tensor's `shape` and `numel`."""
    return tl.tuple([tl.constexpr(n) for n in shape]), tl.constexpr(math.prod(shape))


_elements = functools.cache(validate_block_shape)
_block_shape = functools.cache(
    tl.tuple
)  # Triton broadcasts tensors of unequal rank by its `values`


def _begin_block_type(self: Any, element_ty: tl.dtype, shape: Any) -> None:
    self.element_ty = element_ty
    sizes = tuple([n.value if isinstance(n, tl.constexpr) else n for n in shape])
    if not sizes:
        raise TypeError("0d block_type is forbidden")
    self.shape, self.numel = _block_shape(sizes), _elements(sizes)
    self.name = f"<{sizes}, {element_ty}>"


def _begin_tensor(self: Any, handle: TensorHandle, type: Any) -> None:
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.shape, self.numel = _shape(tuple(type.shape.values) if type.is_block() else ())


# ---- the block

_stock_call = GridExecutor.__call__
_stock_patch_lang = interpreter._patch_lang
_stock_tuned = Autotuner.run


@contextmanager
def sanitize(
    *,
    order: str | int = "ascending",
    undefined: str = "nan",
    only: str | None = None,
    configuration: int = 0,
    raise_on_fault: bool = True,
) -> Iterator[Record]:
    """Check every kernel launched inside the block; the Record grows with each launch.

    Args:
        order: of the programs of a grid: "ascending", "reversed", or the seed of a shuffle.
        undefined: what a masked-off lane without `other` loads: "nan", "largest" or "smallest".
        only: the file and line of the loads to which that applies; elsewhere it is "nan".
        configuration: which one of `@triton.autotune` runs, counted from 0; the last one where
            there are fewer.
        raise_on_fault: False leaves `record.faults` to the caller.

    Raises:
        SanitizerError: at the end of the block, if there were faults and no other exception.
        RuntimeError: Triton was imported without TRITON_INTERPRET=1, or this is inside another
            such block.
        ValueError: on an unknown order, or a tensor that is not on the CPU.
    """
    if GridExecutor.__call__ is not _stock_call:
        raise RuntimeError(
            "sanitize: already inside a sanitize block; "
            "launches would be reported to only one of them"
        )
    if not knobs.runtime.interpret:
        raise RuntimeError(
            "sanitize needs Triton's interpreter: set TRITON_INTERPRET=1 before triton is imported"
        )
    if not isinstance(order, int) and order not in ("ascending", "reversed"):
        raise ValueError(
            f"sanitize: order = {order!r}; "
            "known are 'ascending', 'reversed' and the integer seed of a shuffle"
        )
    record = Record()
    with ExitStack() as stack:
        stack.enter_context(record.fresh)
        install(Builder(record, order, undefined, only, configuration), stack)
        yield record
    if raise_on_fault and record.faults:
        raise SanitizerError(
            "\n".join(
                [
                    f"{count(len(record.faults), 'fault')} in {launches(len(record.launches))}:",
                    *map(str, record.faults),
                ]
            )
        )


def install(builder: Builder, stack: ExitStack) -> None:
    """Replace the interpreter's parts until the stack is closed."""
    replaced: set[int] = set()

    def call(executor: GridExecutor, *args: Any, **kwargs: Any) -> None:
        builder.begin(executor.fn, executor.arg_names)
        replace_libdevice(executor.fn)
        # A GPU overflows, divides by zero and reduces rows of NaN without a warning.
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            _stock_call(executor, *args, **kwargs)
        builder.end()

    def check_hint(value: TensorHandle, name: str, multiples: list[int]) -> None:
        builder.check_hint(value, name, multiples)

    def replace_in(namespace: dict[str, Any]) -> None:
        if id(namespace) not in replaced:
            replaced.add(id(namespace))
            found = dict(libdevice.patches(namespace))
            stack.callback(namespace.update, {name: namespace[name] for name in found})
            namespace.update(found)

    def replace_libdevice(function: Any) -> Any:
        # In the stock interpreter every call of a device function patches the language again, which
        # takes most of the time. Here it is patched once; `restore` is what the caller expects.
        replace_in(function.__globals__)
        return SimpleNamespace(restore=lambda: None)

    def tuned(tuner: Any, *args: Any, **kwargs: Any) -> Any:
        number = min(builder.configuration, len(tuner.configs) - 1)
        wanted = tuner.configs[number]
        builder.record.configurations = max(builder.record.configurations, len(tuner.configs))
        # An earlier run may have left its choice in the cache.
        with mock.patch.multiple(
            tuner,
            cache={},
            cache_results=False,
            _bench=lambda *_, config, **__: [float(config is not wanted)],
        ):
            return _stock_tuned(tuner, *args, **kwargs)

    patches = [
        *ARITHMETIC_PATCHES,
        (interpreter, "interpreter_builder", builder),
        (interpreter, "_implicit_cvt", builder.convert),
        (interpreter, "_patch_lang", replace_libdevice),
        (GridExecutor, "__call__", call),
        (GridExecutor, "_init_args_hst", builder.bind),
        # Kernels work on the tensors themselves.
        (GridExecutor, "_restore_args_dev", lambda *_: None),
        (TensorHandle, "set_attr", check_hint),
        (tl.block_type, "__init__", _begin_block_type),
        (tl.tensor, "__init__", _begin_tensor),
        (Autotuner, "run", tuned),
    ]
    for owner, name, value in patches:
        stack.enter_context(mock.patch.object(owner, name, value))
    for module in libdevice.modules():
        replace_in(vars(module))
    if hasattr(interpreter, "interpreter_semantic"):
        stack.enter_context(mock.patch.object(interpreter.interpreter_semantic, "builder", builder))
    _interpret_language(stack)
    # Triton 3.6 uses int() here, which NumPy 2.4 refuses.
    stack.enter_context(
        mock.patch.object(tl.tensor, "__index__", lambda number: number.handle.data.item())
    )
    stack.enter_context(mock.patch.object(tl.tensor, "__bool__", _truth))


# Triton 3.6 binds the language to the builder of the moment, so that it must be replaced again.
_BOUND_TO_A_BUILDER = "TritonSemantic" in interpreter._patch_attr.__code__.co_names


@functools.cache
def _language() -> list[tuple[Any, str, Any]]:
    """What Triton replaces in its language to interpret it: owner, name and new value."""
    scope = _stock_patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    places = {(id(owner), name): (owner, name) for owner, name, _ in scope._changes}
    found = [(owner, name, vars(owner)[name]) for owner, name in places.values()]
    scope.restore()
    return found


def _interpret_language(stack: ExitStack) -> None:
    """Replace Triton's language until the stack is closed; finding out what takes 15 ms, once."""
    if not hasattr(interpreter, "_LangPatchScope"):
        raise RuntimeError("sanitize: this Triton is older than 3.6")
    scope = interpreter._LangPatchScope()
    language = _language.__wrapped__() if _BOUND_TO_A_BUILDER else _language()
    for owner, name, value in language:
        scope.set_attr(owner, name, value)
    stack.callback(scope.restore)


def _truth(condition: tl.tensor) -> bool:
    caller = sys._getframe(1).f_code.co_filename
    if caller == SEMANTIC:  # `other.handle if other else None` asks whether there is one
        return True
    if condition.handle.data.size == 1:
        return bool(condition.handle.data.item())
    if not caller.startswith(TRITON):
        raise TypeError(
            f"sanitize: the condition of an `if` or `while` has shape {list(condition.shape)}; "
            "the compiler takes one value only"
        )
    return True
