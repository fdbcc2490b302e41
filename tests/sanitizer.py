"""A sanitizer for Triton kernels that run under TRITON_INTERPRET=1.

    with sanitize() as report:
        kernel[grid](...)                      # any number of launches
    report.launches[0].tensors["x_ptr"].loaded # bytes

Leaving the block raises SanitizerError with a line for every fault:

- an access outside the elements of the tensor that the pointer was derived from (of its view, not
  of its storage). It is reported instead of performed, so nothing crashes. Masked-off lanes are
  not checked;
- a race between two programs of a launch: one stores an element that another one loads or stores,
  unless both accesses are atomic;
- two lanes of one store that write different values to one element;
- a `tl.device_assert`, `tl.assume` or (of a number) `tl.multiple_of` that does not hold.

Where the stock interpreter's arithmetic differs from a GPU's, most of all for bf16, the sanitizer
computes as a GPU does (`gpu_arithmetic.py`). The types of arguments are those of a compiled kernel:
a Python float is fp32, so its product with bf16 is fp32, while the stock interpreter returns bf16.
What the language leaves undefined is poisoned: a masked-off lane without `other` loads NaN or the
largest integer.

How it works: `sanitize` replaces the interpreter's builder by `_Builder`, and a few of its
functions, for the duration of the block. The type of a pointer carries the argument it came from
through all pointer arithmetic. Every storage of a launch has shadow arrays that record which
program loaded, stored or atomically updated each element. Loads and stores are NumPy indexing,
which is many times faster than the stock interpreter's. So a launch takes about half its time.

What it cannot see:

- races between the warps of one program;
- the order that programs establish by atomics (locks, "the last one reduces"): it reports such a
  kernel;
- races between two arguments of different element size on one storage;
- reads of memory that nobody has written;
- rounding inside a 16-bit `tl.sum` or `tl.cumsum` (a GPU rounds after every addition: sum in fp32);
- TF32 (fp32 dot products stay fp32).

What kernels must avoid, because it cannot be run:

- `@triton.autotune` with several configurations, inline assembly and libdevice;
- pointers that are made from integers, chosen between two arguments by `tl.where`, cast to elements
  of another size, or passed in tuples and host-side tensor descriptors;
- `if` on a block of more than one element: the condition is always true here, and an error when
  compiled.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton
import triton.language as tl
from triton import knobs
from triton._utils import validate_block_shape
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, TensorHandle
from triton.runtime.jit import mangle_type

from tests.gpu_arithmetic import (
    ARITHMETIC_PATCHES,
    GpuArithmetic,
    decode,
    encode,
    np_dtype,
    round_bf16,
)

RIVALS = {
    "load": ("store", "atomic"),
    "store": ("store", "load", "atomic"),
    "atomic": ("store", "load"),
}
VERBS = {"load": "loads", "store": "stores", "atomic": "atomically updates"}
PAST = {"load": "loaded", "store": "stored", "atomic": "atomically updated"}
_HERE = (__file__, str(Path(triton.__file__).parent))


class SanitizerError(AssertionError):
    """A kernel made a forbidden access; the message has a line for every fault."""


@dataclass
class Fault:
    """A fault, at its first occurrence in a launch."""

    kernel: str
    program: tuple[int, ...]
    argument: str
    offsets: list[int]  # in elements from the first of the tensor
    what: str
    line: str  # file:line of the kernel
    repeats: int = 0  # how many more times in this launch, by any program

    def __str__(self) -> str:
        offsets = ", ".join(map(str, self.offsets[:4])) + (
            f", ... {self.offsets[-1]}" if len(self.offsets) > 4 else ""
        )
        again = f", and {self.repeats} times more" if self.repeats else ""
        where = f"{self.kernel}, program {self.program}: {self.argument}[{offsets}]"
        return f"{self.line}: {where} {self.what}{again}"


@dataclass
class Traffic:
    """Bytes of one tensor in one launch: active lanes times element size.

    `distinct` counts every element once. An atomic update counts as a load and a store. Arguments
    that share elements also share their distinct ones.
    """

    loaded: int = 0
    stored: int = 0
    distinct_loaded: int = 0
    distinct_stored: int = 0


@dataclass
class Launch:
    """One launch.

    It holds the grid, the operations of the dot products (2 m n k each) and the bytes of each
    tensor argument.
    """

    kernel: str
    grid: tuple[int, ...] = ()
    flops: int = 0
    tensors: dict[str, Traffic] = field(default_factory=dict)

    @property
    def loaded(self) -> int:
        return sum(traffic.loaded for traffic in self.tensors.values())

    @property
    def stored(self) -> int:
        return sum(traffic.stored for traffic in self.tensors.values())


@dataclass
class Report:
    """The record of the launches of one `sanitize` block."""

    launches: list[Launch] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)


class _Shadow:
    """Which program of a launch touched each element of a storage, for each kind of access.

    0 is nobody, i + 1 program i, negative several programs, of which the first.
    """

    def __init__(self, size: int):
        self.size = size
        self.owners: dict[str, np.ndarray] = {}

    def claim(
        self, action: str, index: np.ndarray, program: int
    ) -> tuple[str, int, np.ndarray] | None:
        """Record that `program` touches the elements.

        Returns:
            If that is a race: the rival access, its program, and where. Otherwise None.
        """
        race = None
        for rival in RIVALS[action]:
            if rival in self.owners and race is None:
                owners = self.owners[rival].take(index)
                foreign = (owners != 0) & (owners != program)
                if foreign.any():
                    race = rival, int(owners[foreign][0]), index[foreign]
        if action not in self.owners:
            self.owners[action] = np.zeros(self.size, np.int32)
        mine = self.owners[action]
        before = mine.take(index)
        mine[index] = (
            np.where((before == 0) | (before == program), np.int32(program), -np.abs(before))
            if before.any()
            else program
        )
        return race


class _Argument:
    """One tensor argument: its memory, and the elements of the storage that belong to it."""

    def __init__(self, name: str, tensor: torch.Tensor, shadow: _Shadow, traffic: Traffic):
        self.name, self.shadow, self.traffic = name, shadow, traffic
        self.shape, self.strides, self.size = (
            tuple(tensor.shape),
            tensor.stride(),
            tensor.element_size(),
        )
        self.address, self.origin = tensor.data_ptr(), tensor.storage_offset()
        self.span = (
            1 + sum((n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True))
            if tensor.numel()
            else 0
        )
        bits = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32, 8: torch.uint64}[self.size]
        self.memory = tensor.as_strided((self.span,), (1,)).view(bits).numpy()
        member = np.zeros(self.span, bool)
        self.own(member)[...] = True
        # Which elements of the span belong to the view; None if all do.
        self.member = None if member.all() else member

    def own(self, span: np.ndarray) -> np.ndarray:
        """Pick the elements of the view, each once.

        `span` has an entry for every element of the view's span.
        """
        sizes = [
            min(n, 1) if stride == 0 else n
            for n, stride in zip(self.shape, self.strides, strict=True)
        ]
        return np.lib.stride_tricks.as_strided(
            span, sizes, [stride * span.itemsize for stride in self.strides]
        )

    def distinct(self, *actions: str) -> int:
        """Return the bytes of the elements that any of the actions touched."""
        touched = np.zeros(self.span, bool)
        for action in self.shadow.owners.keys() & actions:
            touched |= self.shadow.owners[action][self.origin : self.origin + self.span] != 0
        return int(np.count_nonzero(self.own(touched))) * self.size if self.span else 0


class _Pointer(tl.pointer_type):
    """A pointer type that remembers its argument.

    Every operation of the builder passes the type of its operand on.
    """

    def __init__(self, element_ty: tl.dtype, argument: _Argument | None):
        super().__init__(element_ty)
        self.argument = argument


class _Builder(GpuArithmetic):
    """The interpreter's operations, with memory accesses checked."""

    def __init__(self, report: Report, order: str | int):
        super().__init__()
        # debug=True executes device_assert. The stock interpreter repeats int32 arithmetic in
        # int64, without any effect.
        self.options = dataclasses.replace(self.options, debug=True, sanitize_overflow=False)
        self.report, self.order = report, order

    # ---- launches

    def begin(self, kernel: str, names: list[str]) -> None:
        """Open the record of a launch; `end` closes it."""
        self.launch, self.names = Launch(kernel), names
        self.report.launches.append(self.launch)
        self.faults: dict[tuple[str, str, str], Fault] = {}
        self.arguments: dict[int, _Argument] = {}  # by id of the alias that stands for the argument

    def bind(self, args: tuple, kwargs: dict) -> tuple[list, dict]:
        """Give every tensor an alias of its own, by which `convert` knows the argument.

        It is called in place of the copy to the host.
        """
        shadows: dict[tuple[int, int], _Shadow] = {}

        def alias(name: str, value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            if value.device.type != "cpu":
                raise ValueError(
                    f"sanitize: {self.launch.kernel}: {name} is on {value.device}; "
                    "the interpreter works on CPU tensors"
                )
            storage, value = value.untyped_storage(), value.detach()
            size = storage.nbytes() // value.element_size()
            shadow = shadows.setdefault((storage.data_ptr(), value.element_size()), _Shadow(size))
            traffic = self.launch.tensors.setdefault(name, Traffic())
            self.arguments[id(value)] = _Argument(name, value, shadow, traffic)
            return value

        # The others are passed by name.
        positional = [alias(name, value) for name, value in zip(self.names, args, strict=False)]
        return positional, {name: alias(name, value) for name, value in kwargs.items()}

    def convert(self, value: Any) -> Any:
        """Convert an argument to what a kernel sees.

        A tensor becomes a pointer, and a number gets the type that the compiler gives it.
        """
        if not isinstance(value, (torch.Tensor, bool, int, float)):
            return _stock_implicit_cvt(value)
        ty: Any = tl.str_to_ty(mangle_type(value), None)
        if argument := self.arguments.get(id(value)):
            return tl.tensor(
                TensorHandle(
                    np.array([argument.address], np.uint64), _Pointer(ty.element_ty, argument)
                ),
                ty,
            )
        return tl.tensor(TensorHandle(np.array([value], np_dtype(ty)), ty), ty)

    def end(self) -> None:
        for argument in self.arguments.values():
            argument.traffic.distinct_loaded = argument.distinct("load", "atomic")
            argument.traffic.distinct_stored = argument.distinct("store", "atomic")
        self.arguments = {}

    def set_grid_dim(self, nx: int, ny: int, nz: int) -> None:
        super().set_grid_dim(int(nx), int(ny), int(nz))
        self.launch.grid = self.grid_dim
        self.programs = np.arange(nx * ny * nz)
        if isinstance(self.order, int):
            np.random.default_rng(self.order).shuffle(self.programs)
        elif self.order == "reversed":
            self.programs = self.programs[::-1]

    def set_grid_idx(self, x: int, y: int, z: int) -> None:
        turn = (x * self.grid_dim[1] + y) * self.grid_dim[2] + z
        self.program = int(self.programs[turn]) + 1
        super().set_grid_idx(*self._index(self.program))

    def _index(self, program: int) -> tuple[int, ...]:
        return tuple(map(int, np.unravel_index(program - 1, self.grid_dim)))

    def fault(self, argument: str, kind: str, offsets: Any, what: str) -> None:
        """Record a fault; only the first of a kind, argument and line in a launch is kept."""
        frame = sys._getframe(1)
        while frame.f_back and frame.f_code.co_filename.startswith(_HERE):
            frame = frame.f_back
        line = f"{'/'.join(Path(frame.f_code.co_filename).parts[-2:])}:{frame.f_lineno}"
        key = (argument, kind, line)
        if key in self.faults:
            self.faults[key].repeats += 1
            return
        where = np.unique(offsets).tolist()
        self.faults[key] = Fault(
            self.launch.kernel, self._index(self.program), argument, where, what, line
        )
        self.report.faults.append(self.faults[key])

    # ---- memory

    def _touch(
        self, pointers: TensorHandle, mask: TensorHandle | None, action: str
    ) -> tuple[_Argument, np.ndarray, np.ndarray | None]:
        """Check and count an access.

        Returns:
            The argument, the elements that may be touched, and the lanes that touch them
            (None: all).
        """
        argument = getattr(pointers.dtype.scalar, "argument", None)
        if argument is None:
            raise TypeError(
                f"sanitize: {self.launch.kernel} {VERBS[action]} through a pointer that comes from "
                "no tensor argument"
            )
        if argument.size != max(1, pointers.get_element_ty().primitive_bitwidth // 8):
            raise TypeError(
                f"sanitize: {self.launch.kernel} casts {argument.name} to a pointer to elements of "
                "another size"
            )
        index = (pointers.data - np.uint64(argument.address)).view(np.int64) >> (
            argument.size.bit_length() - 1
        )
        inside = index.view(np.uint64) < argument.span  # negative indices are large when unsigned
        if argument.member is not None:
            inside[inside] = argument.member[index[inside]]
        lanes = np.ones_like(inside) if mask is None else np.asarray(mask.data, bool)
        if not inside.all():
            outside = lanes & ~inside
            if outside.any():
                self._outside(argument, action, np.unique(index[outside]))
            lanes = lanes & inside
        lanes = None if lanes.all() else lanes
        index = index.ravel() if lanes is None else index[lanes]
        argument.traffic.loaded += index.size * argument.size if action != "store" else 0
        argument.traffic.stored += index.size * argument.size if action != "load" else 0
        if race := argument.shadow.claim(action, index + argument.origin, self.program):
            rival, owner, where = race
            whom = (
                f"program {self._index(abs(owner))}"
                if abs(owner) != self.program
                else "other programs"
            )
            self.fault(
                argument.name,
                f"{action} {rival}",
                where - argument.origin,
                f"race: {VERBS[action]} what {whom} {PAST[rival]}",
            )
        return argument, index, lanes

    def _outside(self, argument: _Argument, action: str, offsets: np.ndarray) -> None:
        if offsets[0] < 0:
            where = "before the start"
        elif offsets[-1] >= argument.span:
            where = f"past the end: the tensor spans {argument.span} elements"
        else:
            where = (
                f"between those of the view, of shape {argument.shape} "
                f"and strides {argument.strides}"
            )
        self.fault(
            argument.name,
            f"{action} {where}",
            offsets,
            f"out of bounds: {VERBS[action]} {len(offsets)} elements {where}",
        )

    def create_masked_load(self, ptrs, mask, other, cache_modifier, eviction_policy, is_volatile):
        dtype, shape = ptrs.get_element_ty(), ptrs.data.shape
        argument, index, lanes = self._touch(ptrs, mask, "load")
        values = decode(argument.memory.take(index), dtype)
        if lanes is None:
            return TensorHandle(values.reshape(shape), dtype)
        undefined = np.nan if dtype.is_floating() else np.iinfo(np_dtype(dtype)).max
        data = np.full(shape, undefined if other is None else other.data, np_dtype(dtype))
        data[lanes] = values
        return TensorHandle(data, dtype)

    def create_masked_store(self, ptrs, value, mask, cache_modifier, eviction_policy):
        argument, index, lanes = self._touch(ptrs, mask, "store")
        values = np.broadcast_to(value.data, ptrs.data.shape)
        raw = encode(values.ravel() if lanes is None else values[lanes], ptrs.get_element_ty())
        argument.memory[index] = raw
        differs = argument.memory.take(index) != raw
        if differs.any():
            self.fault(
                argument.name,
                "lanes",
                index[differs],
                "race: lanes of one store write different values",
            )

    def create_atomic_rmw(self, rmwOp, ptr, val, mask, sem, scope):
        argument, index, lanes = self._touch(ptr, mask, "atomic")
        dtype, shape = ptr.get_element_ty(), ptr.data.shape
        lanes = np.ones(shape, bool) if lanes is None else lanes
        values = np.array(np.broadcast_to(val.data, shape))
        if not dtype.is_bf16():
            return super().create_atomic_rmw(
                rmwOp,
                ptr,
                TensorHandle(values, val.dtype),
                TensorHandle(lanes, tl.int1),
                sem,
                scope,
            )
        before = np.zeros(shape, np.float32)
        for lane, i in zip(
            np.argwhere(lanes), index, strict=True
        ):  # one at a time, since lanes may share an element
            before[tuple(lane)] = old = decode(argument.memory[i : i + 1], dtype).item()
            argument.memory[i] = encode(
                round_bf16(old + values[tuple(lane)]), dtype
            ).item()  # bf16 has no atomic but `add`
        return TensorHandle(before, dtype)

    def create_atomic_cas(self, ptr, cmp, val, sem, scope):
        _, _, lanes = self._touch(ptr, None, "atomic")
        # Other elements are out of bounds and reported.
        return super().create_atomic_cas(ptr, cmp, val, sem, scope) if lanes is None else cmp

    def create_bitcast(self, src, dst_type):
        dst = dst_type.scalar
        if dst.is_ptr():
            return TensorHandle(
                src.data.view(np.uint64),
                _Pointer(dst.element_ty, getattr(src.dtype.scalar, "argument", None)),
            )
        return TensorHandle(decode(encode(src.data, src.dtype.scalar), dst), dst)

    create_int_to_ptr = create_ptr_to_int = create_bitcast

    def create_assert(self, condition, message):
        if not np.all(condition.data):
            self.fault("device_assert", message, [], f"fails: {message}")

    def create_assume(self, condition):
        if not np.all(condition.data):
            self.fault("assume", "", [], "does not hold")

    def create_dot(self, a, b, *others):
        self.launch.flops += 2 * a.data.size * b.data.shape[-1]
        return super().create_dot(a, b, *others)


# ---- shapes. Triton computes a shape's constants again for every tensor and type, which takes a
# fifth of the time of a launch.


@functools.cache
def _shape(shape: tuple[int, ...]) -> tuple[Any, Any]:
    """Return a tensor's `shape` and `numel`."""
    return tl.tuple([tl.constexpr(n) for n in shape]), tl.constexpr(math.prod(shape))


_elements = functools.cache(validate_block_shape)


def _begin_block_type(self: tl.block_type, element_ty: tl.dtype, shape: Any) -> None:
    self.element_ty = element_ty
    self.shape = tuple([n.value if isinstance(n, tl.constexpr) else n for n in shape])
    if not self.shape:
        raise TypeError("0d block_type is forbidden")
    self.numel = _elements(self.shape)
    self.name = f"<{self.shape}, {element_ty}>"


def _begin_tensor(self: tl.tensor, handle: TensorHandle, type: tl.dtype) -> None:
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.shape, self.numel = _shape(type.shape if type.is_block() else ())


# ---- the block

_stock_call = GridExecutor.__call__
_stock_implicit_cvt = interpreter._implicit_cvt
_stock_patch_lang = interpreter._patch_lang


@contextmanager
def sanitize(*, order: str | int = "ascending", raise_on_fault: bool = True) -> Iterator[Report]:
    """Check every kernel launched inside the block; the Report grows with each launch.

    Args:
        order: of the programs of a grid: "ascending", "reversed", or the seed of a shuffle.
        raise_on_fault: False leaves `report.faults` to the caller.

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
    report = Report()
    builder = _Builder(report, order)

    def call(executor: GridExecutor, *args: Any, **kwargs: Any) -> None:
        builder.begin(executor.fn.__name__, executor.arg_names)
        with np.errstate(all="ignore"):  # a GPU overflows and divides by zero without a warning
            _stock_call(executor, *args, **kwargs)
        builder.end()

    def check_hint(value: TensorHandle, name: str, multiples: list[int]) -> None:
        if name == "tt.divisibility" and value.data.size == 1 and value.data.item() % multiples[0]:
            builder.fault(
                "multiple_of", "", [], f"{multiples[0]} does not hold for {value.data.item()}"
            )

    patches = [
        *ARITHMETIC_PATCHES,
        (interpreter, "interpreter_builder", builder),
        (interpreter, "_implicit_cvt", builder.convert),
        (GridExecutor, "__call__", call),
        (GridExecutor, "_init_args_hst", builder.bind),
        # Kernels work on the tensors themselves.
        (GridExecutor, "_restore_args_dev", lambda *_: None),
        (TensorHandle, "set_attr", check_hint),
        (tl.block_type, "__init__", _begin_block_type),
        (tl.tensor, "__init__", _begin_tensor),
        # In the stock interpreter every call of a device function patches the language again, which
        # takes most of the time. Here it is patched once.
        (interpreter, "_patch_lang", lambda fn: SimpleNamespace(restore=lambda: None)),
    ]
    with ExitStack() as stack:
        for owner, name, value in patches:
            stack.enter_context(mock.patch.object(owner, name, value))
        if hasattr(interpreter, "interpreter_semantic"):
            stack.enter_context(
                mock.patch.object(interpreter.interpreter_semantic, "builder", builder)
            )
        stack.callback(
            _stock_patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core})).restore
        )
        # Triton 3.6 uses int() here, which NumPy 2.4 refuses.
        stack.enter_context(
            mock.patch.object(tl.tensor, "__index__", lambda number: number.handle.data.item())
        )
        yield report
    if raise_on_fault and report.faults:
        raise SanitizerError(
            "\n".join(
                [
                    f"{len(report.faults)} faults in {len(report.launches)} launches:",
                    *map(str, report.faults),
                ]
            )
        )
