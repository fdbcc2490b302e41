"""What the launches of a `sanitize` block did: bytes, operations and faults."""

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch

from fastbert_kernels.checker.fresh import Fresh
from fastbert_kernels.checker.report import count


@dataclass
class Fault:
    """A fault, at its first occurrence in a launch.

    Attributes:
        kind: "out of bounds", "race", "uninitialised read", "assertion" or "deadlock".
        program: the program's index in the grid.
        argument: name of the kernel's argument.
        offsets: in elements from the first of the tensor.
        line: file and line of the kernel.
        repeats: how many more times in this launch, by any program.
    """

    kernel: str
    kind: str
    program: tuple[int, ...]
    argument: str
    offsets: list[int]
    what: str
    line: str
    repeats: int = 0

    def __str__(self) -> str:
        offsets = ", ".join(map(str, self.offsets[:4])) + (
            f", ... {self.offsets[-1]}" if len(self.offsets) > 4 else ""
        )
        again = f", and {count(self.repeats, 'time')} more" if self.repeats else ""
        where = f"{self.kernel}, program {self.program}: {self.argument}"
        if self.offsets:
            where += f"[{offsets}] {self.kind}:"
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
    tensors: dict[str, Traffic] = field(default_factory=dict[str, Traffic])

    @property
    def loaded(self) -> int:
        return sum(traffic.loaded for traffic in self.tensors.values())

    @property
    def stored(self) -> int:
        return sum(traffic.stored for traffic in self.tensors.values())


@dataclass
class Record:
    """The record of the launches of one `sanitize` block.

    Attributes:
        functions: the Python functions of the kernels, for the lint, which reads their source.
        dtypes: of the tensor arguments, by kernel and argument.
        writers: by the address of a storage: the storage, and the kernel and the line that stored
            to it last.
        undefined: the lines of loads whose masked-off lanes have no `other`.
        fresh: which memory has been written.
        configurations: the most that an `@triton.autotune` of the launches has; 1 without one.
    """

    launches: list[Launch] = field(default_factory=list[Launch])
    faults: list[Fault] = field(default_factory=list[Fault])
    functions: list[object] = field(default_factory=list[object])
    dtypes: dict[tuple[str, str], str] = field(default_factory=dict[tuple[str, str], str])
    writers: dict[int, tuple[weakref.ref[Any], str, str]] = field(
        default_factory=dict[int, tuple[weakref.ref[Any], str, str]]
    )
    undefined: set[str] = field(default_factory=set[str])
    fresh: Fresh = field(default_factory=Fresh)
    configurations: int = 1

    def writer_of(self, tensor: torch.Tensor) -> tuple[str, str]:
        """The kernel and the line that stored to the tensor last; "" if none did."""
        storage, kernel, line = self.writers.get(
            tensor.untyped_storage().data_ptr(), (None, "", "")
        )
        alive = storage is not None and storage() is not None  # else the address is another's now
        return (kernel, line) if alive else ("", "")

    def last_writer(self) -> tuple[str, str]:
        """The kernel and the line of the latest store that is known; "" if there is none."""
        return next(((k, line) for _, k, line in reversed(self.writers.values())), ("", ""))
