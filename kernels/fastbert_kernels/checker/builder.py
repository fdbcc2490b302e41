"""The interpreter's operations with every access to memory checked: `Builder`.

The type of a pointer carries the argument it came from through all pointer arithmetic. Loads and
stores are NumPy indexing, which is many times faster than the stock interpreter's.
"""

# pyright: basic
# Triton's interpreter has no types.

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime import interpreter
from triton.runtime.interpreter import TensorHandle
from triton.runtime.jit import mangle_type
from triton.tools.tensor_descriptor import TensorDescriptor

from fastbert_kernels.checker.arithmetic import (
    GpuArithmetic,
    decode,
    encode,
    np_dtype,
    round_bf16,
)
from fastbert_kernels.checker.clocks import Clocks
from fastbert_kernels.checker.memory import Argument, Shadow
from fastbert_kernels.checker.record import Fault, Launch, Record, Traffic
from fastbert_kernels.checker.report import count

VERBS = {
    "load": "loads",
    "volatile": "loads",
    "store": "stores",
    "atomic": "atomically updates",
}
PAST = {
    "load": "loaded",
    "volatile": "loaded",
    "store": "stored",
    "atomic": "atomically updated",
}
READS = ("load", "volatile")  # which store nothing
MOST_PROGRAMS = (2**31 - 1, 65_535, 65_535)  # along x, y and z: CUDA refuses larger grids
SPINS = 1_000  # updates of one element by one program in a row, after which it waits for ever
LOADS = 10_000  # the same of loads, which a loop may repeat for other reasons
_HERE = (str(Path(__file__).parent), str(Path(triton.__file__).parent))
_stock_implicit_cvt = interpreter._implicit_cvt


class _Pointer(tl.pointer_type):
    """A pointer type that remembers its argument.

    Every operation of the builder passes the type of its operand on.
    """

    def __init__(self, element_ty: tl.dtype, argument: Argument | None):
        super().__init__(element_ty)
        self.argument = argument


class _Returned(TensorHandle):
    """The result of an atomic update, which tells when a program looks at it first."""

    def __init__(self, data: np.ndarray, dtype: tl.dtype, on_read: Any):
        self._data, self.dtype, self.attr, self._on_read = data, dtype, {}, on_read

    @property
    def data(self) -> np.ndarray:
        if self._on_read:
            on_read, self._on_read = self._on_read, None
            on_read()
        return self._data


class Builder(GpuArithmetic):
    """The interpreter's operations, with memory accesses checked.

    Args:
        record: what the launches are added to.
        order: of the programs of a grid: "ascending", "reversed", or the seed of a shuffle.
        undefined: what a masked-off lane without `other` loads: "nan" (for integers the largest),
            "largest" or "smallest".
        only: the line of the loads to which that applies; elsewhere it is "nan". None: all.
        configuration: which one of `@triton.autotune` runs.
    """

    def __init__(
        self,
        record: Record,
        order: str | int,
        undefined: str,
        only: str | None = None,
        configuration: int = 0,
    ):
        super().__init__()
        # debug=True executes device_assert. The stock interpreter repeats int32 arithmetic in
        # int64, without any effect.
        self.options = dataclasses.replace(self.options, debug=True, sanitize_overflow=False)
        self.record, self.order, self.undefined, self.only = record, order, undefined, only
        self.configuration = configuration

    # ---- launches

    def begin(self, function: Any, names: list[str]) -> None:
        """Open the record of a launch; `end` closes it."""
        self.launch, self.names = Launch(function.__name__), names
        self.record.launches.append(self.launch)
        if function not in self.record.functions:
            self.record.functions.append(function)
        self.faults: dict[tuple[str, str, str], Fault] = {}
        self.arguments: dict[int, Argument] = {}  # by id of the alias that stands for the argument
        self.shadows: dict[tuple[int, int], Shadow] = {}
        self.clocks = Clocks()
        self.spinning, self.spins = (0, 0), 0
        self.loading, self.loads = (0, 0), 0
        self.stored: set[int] = set()

    def bind(self, args: tuple, kwargs: dict) -> tuple[list, dict]:
        """Give every tensor an alias of its own, by which `convert` knows the argument.

        It is called in place of the copy to the host.
        """
        # The others are passed by name.
        positional = [
            self._alias(name, value) for name, value in zip(self.names, args, strict=False)
        ]
        return positional, {name: self._alias(name, value) for name, value in kwargs.items()}

    def _alias(self, name: str, value: Any) -> Any:
        if isinstance(value, tuple):
            parts = [self._alias(f"{name}[{i}]", part) for i, part in enumerate(value)]
            return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
        if isinstance(value, TensorDescriptor):
            return dataclasses.replace(value, base=self._alias(name, value.base))
        if not isinstance(value, torch.Tensor):
            return value
        if value.device.type != "cpu":
            raise ValueError(
                f"sanitize: {self.launch.kernel}: {name} is on {value.device}; "
                "the interpreter works on CPU tensors"
            )
        written = self.record.fresh.written(value)
        storage, value = value.untyped_storage(), value.detach()
        size = storage.nbytes() // value.element_size()
        key = (storage.data_ptr(), value.element_size())
        shadow = self.shadows.setdefault(key, Shadow(size))
        traffic = self.launch.tensors.setdefault(name, Traffic())
        self.arguments[id(value)] = Argument(name, value, shadow, traffic, written)
        self.record.dtypes[self.launch.kernel, name] = str(value.dtype).removeprefix("torch.")
        return value

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
            argument.traffic.distinct_loaded = argument.distinct("load", "volatile", "atomic")
            argument.traffic.distinct_stored = argument.distinct("store", "atomic")
        self.arguments = {}

    def set_grid_dim(self, nx: int, ny: int, nz: int) -> None:
        super().set_grid_dim(int(nx), int(ny), int(nz))
        self.launch.grid = self.grid_dim
        self.check_grid(self.grid_dim)
        self.programs = np.arange(nx * ny * nz)
        if isinstance(self.order, int):
            np.random.default_rng(self.order).shuffle(self.programs)
        elif self.order == "reversed":
            self.programs = self.programs[::-1]

    def check_grid(self, grid: tuple[int, ...]) -> None:
        """Report a grid that a GPU does not launch."""
        self.grid_dim, self.program = grid, 1
        for axis, programs, most in zip("xyz", grid, MOST_PROGRAMS, strict=True):
            if programs > most:
                what = f"{count(programs, 'program')} along {axis}; a GPU launches {most:,} at most"
                self.fault("", "grid", [], f"has {what}", axis)

    def set_grid_idx(self, x: int, y: int, z: int) -> None:
        turn = (x * self.grid_dim[1] + y) * self.grid_dim[2] + z
        self.program = int(self.programs[turn]) + 1
        super().set_grid_idx(*self._index(self.program))

    def _index(self, program: int) -> tuple[int, ...]:
        return tuple(map(int, np.unravel_index(program - 1, self.grid_dim)))

    def line(self) -> str:
        """File and line of the kernel that runs now."""
        frame = sys._getframe(1)
        while frame.f_back and frame.f_code.co_filename.startswith(_HERE):
            frame = frame.f_back
        return f"{'/'.join(Path(frame.f_code.co_filename).parts[-2:])}:{frame.f_lineno}"

    def fault(self, argument: str, kind: str, offsets: Any, what: str, detail: str = "") -> None:
        """Record a fault; only the first of a kind, argument and line in a launch is kept."""
        line = self.line()
        key = (argument, kind + detail, line)
        if key in self.faults:
            self.faults[key].repeats += 1
            return
        where = np.unique(offsets).tolist()
        self.faults[key] = Fault(
            self.launch.kernel, kind, self._index(self.program), argument, where, what, line
        )
        self.record.faults.append(self.faults[key])

    # ---- memory

    def _touch(
        self, pointers: TensorHandle, mask: TensorHandle | None, action: str
    ) -> tuple[Argument, np.ndarray, np.ndarray | None]:
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
        argument.traffic.stored += index.size * argument.size if action not in READS else 0
        place = index + argument.origin if argument.origin else index
        if race := argument.shadow.claim(action, place, self.program, self.clocks):
            rival, owner, where = race
            whom = f"program {self._index(owner)}" if owner else "other programs"
            self.fault(
                argument.name,
                "race",
                where - argument.origin,
                f"{VERBS[action]} what {whom} {PAST[rival]}",
                f"{action} {rival}",
            )
        self._count_loads(argument, action, index)
        if argument.written is not None:
            self._follow_values(argument, action, place)
        if action not in READS and argument.storage_address not in self.stored:
            self.stored.add(argument.storage_address)
            writer = argument.storage, self.launch.kernel, self.line()
            self.record.writers[argument.storage_address] = writer
        return argument, index, lanes

    def _count_loads(self, argument: Argument, action: str, index: np.ndarray) -> None:
        """A program that loads one element, and touches nothing else, waits for another one."""
        what = (self.program, argument.address + int(index[0])) if index.size == 1 else (0, 0)
        again = action in READS and what == self.loading and what != (0, 0)
        self.loads = self.loads + 1 if again else 0
        self.loading = what if action in READS else (0, 0)
        if self.loads > LOADS:
            self._deadlock(argument, index)

    def _deadlock(self, argument: Argument, index: np.ndarray) -> None:
        self.fault(
            argument.name,
            "deadlock",
            index,
            "waits for a program that runs later: "
            "a GPU does not promise to run all programs at a time",
        )
        raise RuntimeError(f"sanitize: {self.launch.kernel} does not end")

    def _follow_values(self, argument: Argument, action: str, place: np.ndarray) -> None:
        written: Any = argument.written
        if action != "store":
            missing = ~written[place]
            if missing.any():
                self.fault(
                    argument.name,
                    "uninitialised read",
                    place[missing] - argument.origin,
                    f"{VERBS[action]} {count(int(missing.sum()), 'element')} "
                    "that nobody has written",
                )
        if action not in READS:
            written[place] = True

    def _outside(self, argument: Argument, action: str, offsets: np.ndarray) -> None:
        if offsets[0] < 0:
            where = "before the start"
        elif offsets[-1] >= argument.span:
            where = f"past the end: the tensor spans {count(argument.span, 'element')}"
        else:
            where = (
                f"between those of the view, of shape {argument.shape} "
                f"and strides {argument.strides}"
            )
        self.fault(
            argument.name,
            "out of bounds",
            offsets,
            f"{VERBS[action]} {count(len(offsets), 'element')} {where}",
            action + where,
        )

    # Versions of Triton pass other policies of caches, which change no result.
    def create_masked_load(self, ptrs, mask, other, *policies, **named):
        dtype, shape = ptrs.get_element_ty(), ptrs.data.shape
        volatile = named.get("is_volatile", policies[-1] if policies else False)
        argument, index, lanes = self._touch(ptrs, mask, "volatile" if volatile else "load")
        values = decode(argument.memory.take(index), dtype)
        if lanes is None:
            return TensorHandle(values.reshape(shape), dtype)
        value = self._undefined(dtype) if other is None else other.data
        data = np.full(shape, value, np_dtype(dtype))
        data[lanes] = values
        return TensorHandle(data, dtype)

    def _undefined(self, dtype: tl.dtype) -> float:
        line = self.line()
        self.record.undefined.add(line)
        undefined = self.undefined if self.only in (None, line) else "nan"
        if dtype.is_floating():
            if undefined == "nan":
                return np.nan
            limit = float(np.finfo(np_dtype(dtype)).max) / 2
            return limit if undefined == "largest" else -limit
        if dtype.is_bool():
            return undefined != "smallest"
        info = np.iinfo(np_dtype(dtype))
        return info.min if undefined == "smallest" else info.max

    def create_masked_store(self, ptrs, value, mask, *_, **__):
        argument, index, lanes = self._touch(ptrs, mask, "store")
        values = np.broadcast_to(value.data, ptrs.data.shape)
        raw = encode(values.ravel() if lanes is None else values[lanes], ptrs.get_element_ty())
        argument.memory[index] = raw
        differs = argument.memory.take(index) != raw
        if differs.any():
            self.fault(
                argument.name,
                "race",
                index[differs],
                "lanes of one store write different values",
                "lanes",
            )

    def create_atomic_rmw(self, rmwOp, ptr, val, mask, sem, scope):
        dtype, shape = ptr.get_element_ty(), ptr.data.shape
        if val.data.size > ptr.data.size:
            raise ValueError(
                f"sanitize: an atomic update of {list(shape)} elements by values of shape "
                f"{list(val.data.shape)}; give a pointer to each"
            )
        argument, index, lanes = self._touch(ptr, mask, "atomic")
        lanes = np.ones(shape, bool) if lanes is None else lanes
        values = np.array(np.broadcast_to(val.data, shape))
        if not dtype.is_bf16():
            result = super().create_atomic_rmw(
                rmwOp,
                ptr,
                TensorHandle(values, val.dtype),
                TensorHandle(lanes, tl.int1),
                sem,
                scope,
            )
            return self._synchronised(argument, index, sem, result)
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
        argument, index, lanes = self._touch(ptr, None, "atomic")
        if lanes is not None:  # the other elements are out of bounds and reported
            return cmp
        result = super().create_atomic_cas(ptr, cmp, val, sem, scope)
        return self._synchronised(argument, index, sem, result)

    # Triton 3.9 has atomics that only load, store or wait.
    def create_atomic_load(self, ptr, mask, sem, scope):
        argument, index, lanes = self._touch(ptr, mask, "atomic")
        dtype, shape = ptr.get_element_ty(), ptr.data.shape
        data = np.zeros(shape, np_dtype(dtype))
        data[... if lanes is None else lanes] = decode(argument.memory.take(index), dtype).reshape(
            shape if lanes is None else -1
        )
        return self._synchronised(argument, index, sem, TensorHandle(data, dtype))

    def create_atomic_store(self, ptr, val, mask, sem, scope):
        argument, index, lanes = self._touch(ptr, mask, "atomic")
        values = np.broadcast_to(val.data, ptr.data.shape)
        values = values.ravel() if lanes is None else values[lanes]
        argument.memory[index] = encode(values, ptr.get_element_ty())
        self._synchronised(argument, index, sem, val)

    def create_atomic_poll(self, ptr, expected, timeout_ns, sem, scope):
        argument, index, _ = self._touch(ptr, None, "atomic")
        values = decode(argument.memory.take(index), ptr.get_element_ty())
        matched = values.reshape(ptr.data.shape) == expected.data
        if not isinstance(timeout_ns, TensorHandle) and not matched.all():
            self._deadlock(argument, index)
        result = self._synchronised(argument, index, sem, TensorHandle(matched, tl.int1))
        # Who has waited knows, whether or not it looks at the result.
        return TensorHandle(result.data, tl.int1)

    def _synchronised(
        self, argument: Argument, index: np.ndarray, sem: Any, result: TensorHandle
    ) -> TensorHandle:
        """Order programs by an atomic update of one element, as `clocks.py` says."""
        if index.size != 1:
            return result
        address, program = argument.address + int(index.item()) * argument.size, self.program
        self.spins = self.spins + 1 if self.spinning == (program, address) else 0
        self.spinning = program, address
        if self.spins > SPINS:
            self._deadlock(argument, index)
        if sem == ir.MEM_SEMANTIC.RELAXED:
            return result
        if sem != ir.MEM_SEMANTIC.ACQUIRE:
            self.clocks.release(program, address)
        if sem == ir.MEM_SEMANTIC.RELEASE:
            return result
        clocks = self.clocks
        return _Returned(result.data, result.dtype, lambda: clocks.acquire(program, address))

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
            self.fault("device_assert", "assertion", [], f"fails: {message}", message)

    def create_assume(self, condition):
        if not np.all(condition.data):
            self.fault("assume", "assertion", [], "does not hold")

    def create_dot(self, a, b, d, *others):
        batch = int(np.prod(a.data.shape[:-2]))
        rows, inner = a.data.shape[-2:]
        self.launch.flops += 2 * batch * rows * inner * b.data.shape[-1]
        return super().create_dot(a, b, d, *others)

    def check_hint(self, value: TensorHandle, name: str, multiples: list[int]) -> None:
        """Check a `tl.multiple_of` of a number."""
        if name == "tt.divisibility" and value.data.size == 1 and value.data.item() % multiples[0]:
            self.fault(
                "multiple_of",
                "assertion",
                [],
                f"{multiples[0]} does not hold for {value.data.item()}",
            )
