"""A kernel, compiled and looked into: what its main loop consists of, and how fast the model runs it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import triton

from benchmarks.ahead_of_time import DEVICES, cuda_registers, disassemble, programs
from benchmarks.machine_code import multiprocessor
from benchmarks.machine_code.counts import least_cycles, matrix_flops, moved_bytes, per_element
from benchmarks.machine_code.decode import Code, Instruction, decode
from benchmarks.machine_code.h100 import CLOCK, MULTIPROCESSORS, SCHEDULERS
from benchmarks.machine_code.multiprocessor import L2, Memory, Run
from benchmarks.machine_code.path import main_loop
from fastbert_kernels._triton import FUSE

DEVICE = DEVICES["sm_90"]  # the only one that the model knows
_PASSES = 14  # of a loop; the first and last ones, where programs start and end, are left out


class Case(NamedTuple):
    """A kernel with all that a compiler must know of it, and what its main loop is about."""

    name: str
    source: Any  # a triton ASTSource
    options: dict[str, Any]  # of the launch
    elements: (
        float  # of the tile that one pass through the main loop makes (of attention: scores), or 0
    )
    loop: str = "products"  # which loop is the main one: see `path.main_loop`
    memory: Memory = L2  # where the operands of that loop come from
    useful: float = 1.0  # share of the loop's products that count


@dataclasses.dataclass(frozen=True)
class Built:
    """What the compilers made of it; memory in bytes."""

    case: Case
    code: Code
    registers: int  # a thread
    spilled: int  # a thread
    shared: int  # a program
    warps: int  # of a program
    stages: int
    programs: int  # that a multiprocessor runs side by side

    def on_a_scheduler(self, resident: int) -> tuple[int, int]:
        """Warps of a program, and programs, on the fullest of the four, of `resident` programs on the multiprocessor."""
        return max(1, self.warps // SCHEDULERS), math.ceil(
            resident * min(self.warps, SCHEDULERS) / SCHEDULERS
        )

    @property
    def loop(self) -> list[Instruction]:
        """The main loop, or everything if there is none."""
        span = main_loop(self.code, self.case.loop)
        return self.code.instructions[span[0] : span[1] + 1] if span else self.code.instructions


@dataclasses.dataclass(frozen=True)
class Seen:
    """What a table says of it."""

    name: str
    registers: int
    spilled: int
    shared: int
    warps: int
    stages: int
    programs: int
    instructions: dict[
        str, float
    ]  # by class; for one element where the case says how many there are
    least: dict[str, float]  # cycles that each unit needs for a pass of all warps
    cycles: float  # by the model
    teraflops: float  # of the device, in the main loop; 0 for a kernel without products
    gigabytes: float  # a second, that the loop loads and stores
    busy: dict[str, float]
    waits: dict[str, float]


def build(case: Case) -> Built:
    """Compile and disassemble; raises whatever the compilers raise, which have no class for it."""
    compiled = triton.compile(case.source, target=DEVICE.target, options={**case.options, **FUSE})
    registers, spilled = cuda_registers(compiled.asm)
    about = compiled.metadata
    return Built(
        case,
        decode(disassemble("nvdisasm", "--print-code", "-hex", cubin=compiled.asm["cubin"])),
        registers,
        spilled,
        about.shared,
        about.num_warps,
        about.num_stages,
        programs(DEVICE, registers, about.shared, about.num_warps, 0),
    )


def examine(case: Case) -> Seen:
    built = build(case)
    body = built.loop
    elements = case.elements / (32 * built.warps) or 1.0  # of a thread
    warps, side_by_side = built.on_a_scheduler(built.programs)
    cycles, run = steady_cycles(built)
    flops = sum(map(matrix_flops, body)) * built.warps * case.useful
    each_second = built.programs / cycles * MULTIPROCESSORS * CLOCK
    return Seen(
        case.name,
        *(built.registers, built.spilled, built.shared, built.warps, built.stages, built.programs),
        per_element(body, elements),
        least_cycles(body, warps * side_by_side),
        cycles,
        flops * each_second / 1e12,
        sum(map(moved_bytes, body)) * built.warps * each_second / 1e9,
        run.busy,
        run.waits,
    )


def steady_cycles(built: Built) -> tuple[float, Run]:
    """Cycles for a pass of all programs side by side through the main loop; of a kernel without one, for all of it."""
    warps, side_by_side = built.on_a_scheduler(built.programs)
    body, memory = built.loop, built.case.memory
    if main_loop(built.code, built.case.loop) is None:
        rounds = 6
        run = multiprocessor.run(body, warps, side_by_side, memory, rounds=rounds, stagger=600)
        return run.cycles / rounds, run
    run = multiprocessor.run(
        body * _PASSES,
        warps,
        side_by_side,
        memory,
        mark=body[0].address,
        stagger=0.37 * len(body) * warps,
    )
    gaps = [
        later - earlier for earlier, later in zip(run.passes[4:-2], run.passes[5:-1], strict=True)
    ]
    return sum(gaps) / len(gaps), run
