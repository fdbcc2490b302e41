"""Parse the output of `nvdisasm --print-code -hex`, with the control bits that ptxas sets.

Since Volta an instruction has 128 bits. The upper ones contain the number of cycles that the warp
must wait before its next instruction, and up to six barriers ("scoreboards"). They say which
barrier the instruction releases when its result is available or its operands are read, and which
barriers it waits for.

Source: Jia et al., 2018, "Dissecting the NVIDIA Volta GPU Architecture via Microbenchmarking",
section 2.1.
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
    write_barrier: int = NO_BARRIER  # released when the result is available
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
    labels: dict[str, int]  # each with the number of the instruction that follows it

    def target(self, number: int) -> int | None:
        """The target of a branch; None for any other instruction."""
        instruction = self.instructions[number]
        found = _TARGET.search(instruction.operands) if instruction.base == "BRA" else None
        return self.labels.get(found[1]) if found else None


_LINE = re.compile(
    r"\s*/\*([0-9a-f]{4,})\*/\s+(@!?U?P[T\d]+)?\s*"
    r"([A-Z][\w.]*)\s*(.*?)\s*;\s*/\* 0x[0-9a-f]{16} \*/"
)
_UPPER = re.compile(r"\s*/\* 0x([0-9a-f]{16}) \*/")
_LABEL = re.compile(r"(\.L\w+):")
_TARGET = re.compile(r"`\((\.L\w+)\)")


def decode(text: str) -> Code:
    """Decode the first function of a disassembly.

    Raises:
        ValueError: the text contains no instruction.
    """
    found: list[Instruction] = []
    labels: dict[str, int] = {}
    # An instruction whose upper 64 bits follow on the next line.
    pending: tuple[str, ...] | None = None
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
            "no instruction in this text; it must be the output of nvdisasm --print-code -hex"
        )
    return Code(found, labels)


def control(upper: int) -> tuple[int, int, int, int]:
    """Stall, write barrier, read barrier and waits, from the upper 64 bits of an instruction."""
    return upper >> 41 & 15, upper >> 46 & 7, upper >> 49 & 7, upper >> 52 & 63
