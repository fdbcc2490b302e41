"""The text of `nvdisasm --print-code -hex` to instructions, with what ptxas tells the hardware about waiting.

Since Volta an instruction is 128 bits. The upper ones hold how many cycles the warp must wait before its next instruction, and up to six barriers
("scoreboards"): which one this instruction releases when its result is there, or its operands are read, and for which ones it waits itself.

Source: Jia et al., 2018, "Dissecting the NVIDIA Volta GPU Architecture via Microbenchmarking", section 2.1.
"""

from __future__ import annotations

import re
from typing import NamedTuple

NO_BARRIER = 7


class Instruction(NamedTuple):
    address: int
    predicate: str  # "@P0", "@!PT", or nothing
    opcode: str  # with its suffixes: "LDG.E.128"
    operands: str
    stall: int = 1  # cycles until the warp's next instruction may be issued
    write_barrier: int = NO_BARRIER  # released when the result is there
    read_barrier: int = NO_BARRIER  # released when the operands have been read
    waits: int = 0  # bits: the barriers that must have been released

    @property
    def base(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def never_runs(self) -> bool:
        return self.predicate == "@!PT"


class Code(NamedTuple):
    """The instructions of one kernel."""

    instructions: list[Instruction]
    labels: dict[str, int]  # to the number of the instruction behind it

    def target(self, number: int) -> int | None:
        """Where a branch goes; None for any other instruction."""
        instruction = self.instructions[number]
        found = _TARGET.search(instruction.operands) if instruction.base == "BRA" else None
        return self.labels.get(found[1]) if found else None


_LINE = re.compile(
    r"\s*/\*([0-9a-f]{4,})\*/\s+(@!?U?P[T\d]+)?\s*([A-Z][\w.]*)\s*(.*?)\s*;\s*/\* 0x[0-9a-f]{16} \*/"
)
_UPPER = re.compile(r"\s*/\* 0x([0-9a-f]{16}) \*/")
_LABEL = re.compile(r"(\.L\w+):")
_TARGET = re.compile(r"`\((\.L\w+)\)")


def decode(text: str) -> Code:
    """The first function of a disassembly.

    Raises:
        ValueError: there is no instruction in it.
    """
    found: list[Instruction] = []
    labels: dict[str, int] = {}
    pending: tuple[str, ...] | None = (
        None  # an instruction whose upper 64 bits, on the next line, are still to come
    )
    functions = 0
    for line in text.splitlines():
        if line.startswith("//--") and ".text." in line:
            functions += 1
            if functions > 1:
                break
        if label := _LABEL.match(line):
            labels[label[1]] = len(found)
        elif instruction := _LINE.match(line):
            pending = instruction.groups(default="")
        elif pending and (upper := _UPPER.match(line)):
            address, predicate, opcode, operands = pending
            found.append(
                Instruction(
                    int(address, 16), predicate, opcode, operands, *control(int(upper[1], 16))
                )
            )
            pending = None
    if not found:
        raise ValueError(
            "no instruction in this text; it must come from nvdisasm --print-code -hex"
        )
    return Code(found, labels)


def control(upper: int) -> tuple[int, int, int, int]:
    """Stall, write barrier, read barrier and waits, from the upper 64 bits of an instruction."""
    return upper >> 41 & 15, upper >> 46 & 7, upper >> 49 & 7, upper >> 52 & 63
