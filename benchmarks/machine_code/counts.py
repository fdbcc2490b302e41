"""Instructions by class and per element, and the minimum cycles that they need on each unit."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence

from benchmarks.machine_code.decode import Instruction
from benchmarks.machine_code.h100 import (
    FMA,
    HEAVY,
    L2_BYTES,
    PIPES,
    SCHEDULERS,
    SHARED_BYTES,
    TENSOR_FLOPS,
)

# Classes as named in the tables, and the instructions of each.
CLASSES: dict[str, tuple[str, ...]] = {
    "products": ("HGMMA", "HMMA", "QGMMA", "UTCHMMA", "IMMA", "DMMA", "UTCQMMA"),
    "exp2": ("MUFU",),
    "fp32": ("FFMA", "FMUL", "FADD", "FFMA2", "FMUL2", "FADD2"),
    "compare": (
        "FMNMX",
        "FSEL",
        "SEL",
        "FSETP",
        "ISETP",
        "FSET",
        "PLOP3",
        "FMNMX3",
        "VIMNMX",
        "IMNMX",
    ),
    "integer": (
        *("IMAD", "IADD3", "IADD", "LOP3", "SHF", "LEA", "PRMT", "SHL", "SHR", "IABS"),
        *("VIADD", "SGXT", "BMSK", "POPC", "FLO", "I2FP", "IADD64"),
    ),
    "convert": ("F2FP", "F2F", "I2F", "F2I", "F2IP"),
    "shared": ("LDS", "STS", "LDSM", "STSM"),
    "shuffle": ("SHFL", "REDUX", "CREDUX"),
    "global": (
        "LDG",
        "LDGSTS",
        "STG",
        "UTMALDG",
        "UTMASTG",
        "UBLKCP",
        "RED",
        "ATOMG",
        "LD",
        "ST",
        "UTMAREDG",
    ),
    "spill": ("LDL", "STL"),
    "wait": (
        *(
            "BAR",
            "WARPSYNC",
            "WARPGROUP",
            "DEPBAR",
            "LDGDEPBAR",
            "MEMBAR",
            "FENCE",
            "SYNCS",
            "ARRIVES",
            "BSSY",
            "BSYNC",
            "NANOSLEEP",
        ),
        *("UTCBAR", "UTMACMDFLUSH", "ERRBAR", "CCTL", "ELECT", "LDTM", "STTM"),
    ),
    "move": (
        "MOV",
        "R2UR",
        "UMOV",
        "S2R",
        "CS2R",
        "S2UR",
        "P2R",
        "R2P",
        "LDC",
        "ULDC",
        "VOTE",
        "VOTEU",
    ),
    "uniform": (),  # all others whose names begin with U: values common to a warp
    "branch": (),  # all remaining instructions
}
_CLASS_OF = {name: word for word, names in CLASSES.items() for name in names}
_SHAPE = re.compile(r"(\d+)x(\d+)x(\d+)")
_SIZE = re.compile(r"[SU]?(8|16|32|64|128|256)")
_MMA_FLOPS = {"16816": 4096, "1688": 2048, "1684": 1024}  # HMMA.16816: m16 n8 k16
_SHARED_MEMORY = (  # with spills, which go through the same pipe to the L1 cache
    "LDS",
    "STS",
    "LDSM",
    "STSM",
    "LDGSTS",
    "ATOMS",
    "LDL",
    "STL",
)
_GLOBAL_MEMORY = ("LDG", "STG", "LD", "ST", "RED", "ATOMG")


def class_of(one: Instruction) -> str:
    if one.opcode.startswith("IMAD.MOV") or (
        one.opcode.startswith("IMAD.U32") and "RZ, RZ" in one.operands
    ):
        return "move"  # ptxas moves values with the multiplier when that pipe is idle
    return _CLASS_OF.get(one.base) or ("uniform" if one.base.startswith("U") else "branch")


def per_element(body: Sequence[Instruction], elements: float) -> dict[str, float]:
    """Instructions of each class per element of a tile, in the order of CLASSES.

    Args:
        body: the instructions of one pass through the loop.
        elements: elements of the tile that one pass computes, per thread.
    """
    counts = Counter(class_of(one) for one in body if not one.never_runs)
    return {word: counts[word] / elements for word in CLASSES if counts[word]}


def matrix_flops(one: Instruction) -> int:
    """FLOPs of one warp; a wgmma is executed by four warps."""
    shape = _SHAPE.search(one.opcode)
    if one.base in ("HGMMA", "QGMMA") and shape:
        m, n, k = map(int, shape.groups())
        return 2 * m * n * k // 4
    if one.base == "HMMA":
        return next((_MMA_FLOPS[part] for part in one.opcode.split(".") if part in _MMA_FLOPS), 0)
    return 0


def tensor_cycles(one: Instruction) -> float:
    """Cycles of a scheduler's tensor core.

    A wgmma of 64 x N x 16 needs N / 2. It reads B from shared memory in N / 4 cycles, and A, if not
    in registers, in 16.
    """
    if one.base not in ("HGMMA", "QGMMA"):
        return matrix_flops(one) / TENSOR_FLOPS
    shape = _SHAPE.search(one.opcode)
    n = int(shape[2]) if shape else 64
    from_registers = re.match(r"R\d+, R\d+, gdesc", one.operands)
    return max(n / 2, n / 4 + (0 if from_registers else 16))


def operand_bytes(one: Instruction) -> int:
    """Bytes that a load or store of a warp moves: 32 lanes of the size in its suffix, else of 4."""
    suffixes = one.opcode.split(".")[1:]
    if one.base in ("LDSM", "STSM"):  # 8 x 8 matrices of 16 bits; the suffix is their number
        return 128 * int(
            next((suffix for suffix in reversed(suffixes) if suffix in ("2", "4")), "1")
        )
    sizes = [size for suffix in suffixes if (size := _SIZE.fullmatch(suffix))]
    return 32 * int(sizes[0][1]) // 8 if sizes else 128


def moved_bytes(one: Instruction) -> int:
    """Bytes that a warp moves from or to global memory."""
    return (
        operand_bytes(one) if one.base in (*_GLOBAL_MEMORY, "LDGSTS") and not one.never_runs else 0
    )


def shared_cycles(one: Instruction) -> int:
    """Cycles of the pipe to shared memory and L1, of which each scheduler has a quarter."""
    if one.never_runs:
        return 0
    if one.base == "SHFL":
        return SCHEDULERS
    if one.base in (*_SHARED_MEMORY, *_GLOBAL_MEMORY):
        return SCHEDULERS * max(1, operand_bytes(one) // SHARED_BYTES)
    return 0


def least_cycles(body: Sequence[Instruction], warps: int) -> dict[str, float]:
    """Minimum cycles of each unit for one pass of a scheduler's warps, if nothing had to wait."""
    need: dict[str, float] = defaultdict(float)
    for one in body:
        if one.never_runs:
            continue
        need["issue"] += 1
        pipe, cycles = PIPES.get(one.base, ("", 0))
        if one.base == "IMAD" and "WIDE" in one.opcode:
            need[FMA] += 2
            need[HEAVY] += 4
        elif pipe == HEAVY:
            need[FMA] += 1
            need[HEAVY] += cycles
        elif pipe == FMA:
            need[FMA] += cycles / 2  # two pipes
        elif pipe:
            need[pipe] += cycles
        need["shared"] += shared_cycles(one)
        need["tensor"] += tensor_cycles(one)
        need["L2"] += moved_bytes(one) * SCHEDULERS / L2_BYTES
    return {name: value * warps for name, value in need.items() if value}
