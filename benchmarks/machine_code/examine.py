"""Compile and examine a kernel: the contents of its main loop, and its speed in the model."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import triton

from benchmarks.machine_code import multiprocessor
from benchmarks.machine_code.counts import least_cycles, matrix_flops, moved_bytes, per_element
from benchmarks.machine_code.decode import Code, Instruction, decode
from benchmarks.machine_code.h100 import CLOCK, MULTIPROCESSORS, SCHEDULERS
from benchmarks.machine_code.multiprocessor import L2, Memory, Run
from benchmarks.machine_code.path import main_loop
from fastbert_kernels._triton import FUSE
from fastbert_kernels.checker.machine_code import DEVICES, cuda_registers, disassemble, programs

DEVICE = DEVICES["sm_90"]  # the only device that the model describes
_PASSES = 14  # simulated passes of a loop; the first and last are not counted


class Case(NamedTuple):
    """A kernel with everything that the compiler needs, and facts about its main loop."""

    name: str
    source: Any  # a triton ASTSource
    options: dict[str, Any]  # of the launch
    elements: float  # elements of the tile (of attention: scores) per pass of the main loop, or 0
    loop: str = "products"  # which loop is the main one: see `path.main_loop`
    memory: Memory = L2  # the memory from which that loop loads its operands
    useful: float = 1.0  # share of the loop's products that is useful work


@dataclasses.dataclass(frozen=True)
class Built:
    """A compiled kernel; memory in bytes."""

    case: Case
    code: Code
    registers: int  # per thread
    spilled: int  # per thread
    shared: int  # per program
    warps: int  # per program
    stages: int
    programs: int  # that run concurrently on a multiprocessor

    def on_a_scheduler(self, resident: int) -> tuple[int, int]:
        """Warps per program and number of programs on the fullest of the four schedulers.

        `resident` programs run on the multiprocessor.
        """
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
    """The table's figures of a kernel."""

    name: str
    registers: int
    spilled: int
    shared: int
    warps: int
    stages: int
    programs: int
    instructions: dict[str, float]  # by class; per element if the case has a number of elements
    least: dict[str, float]  # minimum cycles of each unit for a pass of all warps
    cycles: float  # predicted
    teraflops: float  # of the device, in the main loop; 0 for a kernel without products
    gigabytes: float  # per second, loaded and stored by the loop
    busy: dict[str, float]
    waits: dict[str, float]


def build(case: Case) -> Built:
    """Compile and disassemble; compiler errors of any class pass through."""
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
    """Cycles for a pass of all resident programs through the main loop.

    For a kernel without a loop, the cycles for the whole kernel.
    """
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
