"""Instructions by class, by element of the result, and the cycles that each unit of a multiprocessor needs for them at the least."""

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

# Classes as the tables name them, and the instructions in each.
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
    "uniform": (),  # all others whose name begins with U: a warp's common values
    "branch": (),  # the rest
}
_CLASS_OF = {name: word for word, names in CLASSES.items() for name in names}
_SHAPE = re.compile(r"(\d+)x(\d+)x(\d+)")
_SIZE = re.compile(r"[SU]?(8|16|32|64|128|256)")
_MMA_FLOPS = {"16816": 4096, "1688": 2048, "1684": 1024}  # HMMA.16816: m16 n8 k16
_SHARED_MEMORY = (
    "LDS",
    "STS",
    "LDSM",
    "STSM",
    "LDGSTS",
    "ATOMS",
    "LDL",
    "STL",
)  # spills go through the same pipe to the L1 cache
_GLOBAL_MEMORY = ("LDG", "STG", "LD", "ST", "RED", "ATOMG")


def class_of(one: Instruction) -> str:
    if one.opcode.startswith("IMAD.MOV") or (
        one.opcode.startswith("IMAD.U32") and "RZ, RZ" in one.operands
    ):
        return "move"  # by the multiplier, as ptxas likes to do where that pipe is idle
    return _CLASS_OF.get(one.base) or ("uniform" if one.base.startswith("U") else "branch")


def per_element(body: Sequence[Instruction], elements: float) -> dict[str, float]:
    """Instructions of each class for one element of a tile, in the order of CLASSES.

    Args:
        elements: of the tile, for each thread, that one pass through the body makes.
    """
    counts = Counter(class_of(one) for one in body if not one.never_runs)
    return {word: counts[word] / elements for word in CLASSES if counts[word]}


def matrix_flops(one: Instruction) -> int:
    """Of a warp; a wgmma is the work of four."""
    shape = _SHAPE.search(one.opcode)
    if one.base in ("HGMMA", "QGMMA") and shape:
        m, n, k = map(int, shape.groups())
        return 2 * m * n * k // 4
    if one.base == "HMMA":
        return next((_MMA_FLOPS[part] for part in one.opcode.split(".") if part in _MMA_FLOPS), 0)
    return 0


def tensor_cycles(one: Instruction) -> float:
    """Of a scheduler's tensor core. A wgmma of 64 x N x 16 needs N / 2; its B comes from shared memory in N / 4, and A, if not in registers, in 16."""
    if one.base not in ("HGMMA", "QGMMA"):
        return matrix_flops(one) / TENSOR_FLOPS
    shape = _SHAPE.search(one.opcode)
    n = int(shape[2]) if shape else 64
    from_registers = re.match(r"R\d+, R\d+, gdesc", one.operands)
    return max(n / 2, n / 4 + (0 if from_registers else 16))


def operand_bytes(one: Instruction) -> int:
    """What a load or store of a warp moves: 32 lanes of the size in its suffix, else of 4 bytes."""
    suffixes = one.opcode.split(".")[1:]
    if one.base in ("LDSM", "STSM"):  # matrices of 8 x 8 in 16 bits; the suffix says how many
        return 128 * int(
            next((suffix for suffix in reversed(suffixes) if suffix in ("2", "4")), "1")
        )
    sizes = [size for suffix in suffixes if (size := _SIZE.fullmatch(suffix))]
    return 32 * int(sizes[0][1]) // 8 if sizes else 128


def moved_bytes(one: Instruction) -> int:
    """From or to global memory, by a warp."""
    return (
        operand_bytes(one) if one.base in (*_GLOBAL_MEMORY, "LDGSTS") and not one.never_runs else 0
    )


def shared_cycles(one: Instruction) -> int:
    """Of a scheduler's share of the pipe to shared memory and L1, which the four of them take turns at."""
    if one.never_runs:
        return 0
    if one.base == "SHFL":
        return SCHEDULERS
    if one.base in (*_SHARED_MEMORY, *_GLOBAL_MEMORY):
        return SCHEDULERS * max(1, operand_bytes(one) // SHARED_BYTES)
    return 0


def least_cycles(body: Sequence[Instruction], warps: int) -> dict[str, float]:
    """Cycles that each unit needs for one pass of all warps of a scheduler through the body, if nothing ever waited."""
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
