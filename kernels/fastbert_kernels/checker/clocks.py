"""Which accesses of a launch are ordered, although they belong to different programs.

Programs of a grid run in any order, so accesses of two programs race unless something orders them.
That something is an atomic operation on one element (a lock, a counter): a program that reads its
result comes after every program that has updated the element before. The interpreter runs one
program after the other, so "before" is the order in which they run.

Each program counts its own updates; the count is its epoch. A stamp is a program and an epoch. A
program knows a stamp if that access happened before, directly or through others. These are the
vector clocks of the literature, held only for programs that synchronise.

Source: Flanagan and Freund, FastTrack, PLDI 2009, section 2; Lamport, 1978.
"""

EPOCHS = 1 << 24  # a stamp is program * EPOCHS + epoch; programs count from 1


class Clocks:
    """The order of one launch. Orders of atomics that are `relaxed` are left out by the caller."""

    def __init__(self) -> None:
        self._epochs: dict[int, int] = {}
        self._known: dict[int, dict[int, int]] = {}  # by program: epochs of the others
        self._elements: dict[int, dict[int, int]] = {}  # by address: what a reader gets to know

    def stamp(self, program: int) -> int:
        """The stamp of what the program does now."""
        return program * EPOCHS + self._epochs.get(program, 0)

    def release(self, program: int, address: int) -> None:
        """The program updates an element: programs that read the result see its past."""
        element = self._elements.setdefault(address, {})
        epoch = self._epochs.get(program, 0)
        _join(element, self._known.get(program, {}))
        _join(element, {program: epoch})
        self._epochs[program] = epoch + 1

    def acquire(self, program: int, address: int) -> None:
        """The program reads the result of an update of that element."""
        _join(self._known.setdefault(program, {}), self._elements.get(address, {}))

    def knows(self, program: int, stamp: int) -> bool:
        """Whether the access with that stamp happened before what the program does now."""
        other, epoch = divmod(stamp, EPOCHS)
        return epoch <= self._known.get(program, {}).get(other, -1)


def _join(into: dict[int, int], other: dict[int, int]) -> None:
    for program, epoch in other.items():
        if into.get(program, -1) < epoch:
            into[program] = epoch
