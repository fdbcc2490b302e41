"""The tensors of a launch: which elements belong to an argument, and who touched them."""

import math
import weakref
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastbert_kernels.checker.clocks import EPOCHS, Clocks
from fastbert_kernels.checker.record import Traffic

Array = NDArray[Any]

# A volatile load is a relaxed atomic one (PTX ISA, ld.volatile).
RIVALS = {
    "load": ("store", "atomic"),
    "volatile": ("store",),
    "store": ("store", "load", "volatile", "atomic"),
    "atomic": ("store", "load"),
}


class Shadow:
    """Which program of a launch touched each element of a storage, for each kind of access.

    An entry is a stamp of `clocks.py`; 0 is nobody, and a negative one means several programs that
    nothing orders, of which the first.
    """

    def __init__(self, size: int):
        self.size = size
        self.owners: dict[str, Array] = {}

    def claim(
        self, action: str, index: Array, program: int, clocks: Clocks
    ) -> tuple[str, int, Array] | None:
        """Record that `program` touches the elements.

        Returns:
            If that is a race: the rival access, its program, and where; the program is 0 if there
            are several. Otherwise None.
        """
        race = None
        for rival in RIVALS[action]:
            if rival in self.owners and race is None:
                owners = self.owners[rival].take(index)
                foreign = (owners != 0) & (owners // EPOCHS != program)
                if foreign.any():
                    foreign &= ~_ordered(owners, foreign, program, clocks)
                    if foreign.any():
                        owner = int(owners[foreign][0])
                        first = abs(owner) // EPOCHS
                        race = rival, 0 if first == program else first, index[foreign]
        if action not in self.owners:
            self.owners[action] = np.zeros(self.size, np.int64)
        mine = self.owners[action]
        before = mine.take(index)
        stamp = clocks.stamp(program)
        if not before.any():
            mine[index] = stamp
        else:
            replaced = (before == 0) | (before // EPOCHS == program)
            if not replaced.all():
                replaced |= _ordered(before, ~replaced, program, clocks)
            mine[index] = np.where(replaced, np.int64(stamp), -np.abs(before))
        return race


def _ordered(owners: Array, which: Array, program: int, clocks: Clocks) -> Array:
    """Whether each of `owners[which]` is known to have happened before; False elsewhere."""
    known = [s for s in np.unique(owners[which]).tolist() if s > 0 and clocks.knows(program, s)]
    return which & np.isin(owners, known) if known else np.zeros_like(which)


class Argument:
    """One tensor argument: its memory, and the elements of the storage that belong to it."""

    def __init__(
        self,
        name: str,
        tensor: torch.Tensor,
        shadow: Shadow,
        traffic: Traffic,
        written: Array | None,
    ):
        self.name, self.shadow, self.traffic = name, shadow, traffic
        self.shape, self.strides, self.size = (
            tuple(tensor.shape),
            tensor.stride(),
            tensor.element_size(),
        )
        self.storage = weakref.ref(tensor.untyped_storage())
        self.storage_address = tensor.untyped_storage().data_ptr()
        self.address, self.origin = tensor.data_ptr(), tensor.storage_offset()
        self.span = span_of(self.shape, self.strides)
        # By element of the storage, whether anything has written it; None if all are written.
        self.written = written
        bits = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32, 8: torch.uint64}[self.size]
        # A zero-sized tensor may lie anywhere.
        self.memory: Array = tensor.as_strided((self.span,), (1,)).view(bits).numpy()
        member = np.zeros(self.span, bool)
        self.own(member)[...] = True
        # Which elements of the span belong to the view; None if all do.
        self.member = None if member.all() else member

    def own(self, span: Array) -> Array:
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


def span_of(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """The elements from the first to the last of a view."""
    if not math.prod(shape):
        return 0
    return 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
