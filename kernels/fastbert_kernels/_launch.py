"""Launch a compiled Triton kernel again without another look-up in Triton.

`kernel[grid](...)` examines every argument, builds a key from what it finds and looks the compiled
kernel up. That takes 8 us, of which the launch itself is 2. What it examines hardly ever changes. A
`Kernel` therefore keeps what Triton has compiled for each kind of arguments, and launches it with
the call that ends `kernel[grid](...)`. Only where a profiler has set hooks does Triton launch all
the way, and call them.

Triton compiles a kernel for the device, the options, the constants and, of each argument, this:

- a tensor: its dtype, and whether its address is a multiple of 16;
- None: that it is None;
- an integer: whether it fits 32 bits and, unless the kernel's `do_not_specialize` names it, whether
  it is 1 or a multiple of 16;
- a float: nothing.

`Prepared.__call__` looks at addresses and at the size of integers in every launch. The rest must
follow from the key of `prepare`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from typing import Any, NamedTuple

import torch

from fastbert_kernels import _tiles
from fastbert_kernels._triton import FUSE, architecture, current_device, current_stream, hooked

_MOST = 256  # kinds of arguments that a kernel keeps; a model has a few
_INT32 = 2**31 - 1

Constants = tuple[Any, ...]  # values of tl.constexpr parameters


class Kernel:
    """A Triton kernel with all that has been compiled of it.

    Args:
        function: the @triton.jit function. Its parameters are pointers, then numbers, then
            constants, then what the table gives.
        table: its name in tiles.json.
        wide: the pointers whose loads should be 128 bits wide, which
            `benchmarks/compiled/ahead_of_time.py` checks.
    """

    def __init__(self, function: Any, table: str, wide: tuple[str, ...] = ()):
        self.function, self.table, self.wide = function, table, wide
        self._prepared: dict[tuple[Any, ...], Prepared] = {}

    def tile(self, like: torch.Tensor, size: int) -> dict[str, int]:
        """Return the launch options of the table, where arguments depend on the tile."""
        return _tiles.tile(self.table, architecture(like.device), like.dtype, size)

    def prepare(
        self, like: torch.Tensor, size: int, constants: Constants, *kind: Any, **options: int
    ) -> Prepared:
        """The kernel for one kind of arguments.

        Args:
            like: the tensor whose device and dtype choose the tile and every pointer's dtype.
            size: as in `tile`.
            constants: values of the first tl.constexpr parameters, hashable.
            kind: which pointers are None, and the integers on which Triton specialises, such as
                strides.
            options: launch options beside those of the table.
        """
        if _recordings:
            return _Recorded(self, like, size, constants, options)
        key = (architecture(like.device), like.dtype, size, constants, kind, *options.items())
        found = self._prepared.get(key)
        if found is None or _tiles.being_tuned():
            found = Prepared(self.function, constants, {**self.tile(like, size), **FUSE, **options})
            if not _tiles.being_tuned():
                if len(self._prepared) >= _MOST:
                    self._prepared.clear()
                self._prepared[key] = found
        return found


class Prepared:
    """A kernel for one kind of arguments.

    `tile` holds its launch options, and "programs" where the table has it.
    """

    def __init__(self, function: Any, constants: Constants, tile: dict[str, int]):
        self.tile = tile
        self._function, self._constants = function, constants
        self._options = {name: value for name, value in tile.items() if name != "programs"}
        # By device: the compiled kernel, and the values of all its constants.
        self._compiled: dict[int, tuple[Any, Constants]] = {}

    def __call__(
        self,
        grid: tuple[int, ...],
        pointers: Sequence[torch.Tensor | None],
        numbers: Sequence[float],
    ) -> None:
        """Run `grid` programs on the current device and stream."""
        address = 0
        for pointer in pointers:
            if pointer is not None:
                address |= pointer.data_ptr()
        usual = not address % 16 and max(numbers) <= _INT32 and not hooked()
        device = current_device()
        if usual and (known := self._compiled.get(device)) is not None:
            compiled, constants = known
            x, y, z = (*grid, 1, 1)[:3]
            kernel = (current_stream(device), compiled.function, compiled.packed_metadata)
            no_hooks = (None, None, None)  # the metadata for hooks, and the two hooks
            compiled.run(x, y, z, *kernel, *no_hooks, *pointers, *numbers, *constants)
            return
        compiled = self._function[grid](*pointers, *numbers, *self._constants, **self._options)
        if usual and compiled is not None:  # the interpreter compiles nothing
            rest = self._function.arg_names[len(pointers) + len(numbers) + len(self._constants) :]
            self._compiled[device] = (
                compiled,
                (*self._constants, *(self._options[name] for name in rest)),
            )


# Recording, for what compiles kernels ahead of time


class Launch(NamedTuple):
    """One launch of a kernel, as `recording` lists it."""

    kernel: Kernel
    size: int  # by which the tile was chosen, as the dtype
    dtype: torch.dtype
    arguments: dict[str, Any]  # by name, without those that come from the tile


_recordings: list[list[Launch]] = []


@contextlib.contextmanager
def recording() -> Generator[list[Launch]]:
    """Inside, launches are listed instead of made, and results hold what was in memory."""
    launches: list[Launch] = []
    _recordings.append(launches)
    try:
        yield launches
    finally:
        _recordings.remove(launches)


class _Recorded(Prepared):
    """A kernel whose launches are listed."""

    def __init__(
        self,
        kernel: Kernel,
        like: torch.Tensor,
        size: int,
        constants: Constants,
        options: dict[str, int],
    ):
        super().__init__(kernel.function, constants, {**kernel.tile(like, size), **options})
        self._named = (kernel, size, like.dtype), options

    def __call__(
        self,
        grid: tuple[int, ...],
        pointers: Sequence[torch.Tensor | None],
        numbers: Sequence[float],
    ) -> None:
        names, options = self._function.arg_names, self._named[1]
        arguments = dict(zip(names, (*pointers, *numbers, *self._constants), strict=False))
        _recordings[-1].append(Launch(*self._named[0], arguments | options))
