"""A model of one multiprocessor of an H100: the cycles that its warps need for their instructions.

One of the four schedulers is simulated; the others are assumed to do the same. In each cycle it
issues one instruction of one warp, in the warp's order. An instruction can be issued when

- the stall count of the warp's last instruction has passed, and the barriers that the instruction
  waits for are released (`decode.py`),
- the pipe that it needs is free; the queues before shared memory and the tensor cores are short,
- enough groups of wgmma or cp.async are complete, if it waits for those; and if it is a barrier,
  all warps of the program have arrived.

Among several possible warps, the one with the earliest time is chosen, and among equal ones the one
that was issued last. A wgmma runs asynchronously, in turn with those of other warps. Global memory
answers after its latency and delivers at its rate.

The model does not include the instruction cache, banks of registers and of shared memory, clocks
that fall under load, the real arbiter, atomics, tensor memory (sm_100) and TMA. `recorded.json`
compares its results with published ones.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from benchmarks.machine_code import h100
from benchmarks.machine_code.counts import moved_bytes, shared_cycles, tensor_cycles
from benchmarks.machine_code.decode import NO_BARRIER, Instruction
from benchmarks.machine_code.h100 import ALU, FMA, FP64, HEAVY, PIPES, SCHEDULERS, XU

SHARED, TENSOR, UNIFORM = "shared", "tensor", "uniform"
LITE = "fma lite"  # the second pipe for fp32; integer multiplications (HEAVY) run on the first, FMA
_SHARED_QUEUE = 48  # cycles of work that may wait for shared memory before a warp is blocked
_TENSOR_QUEUE = 160  # the same for the tensor cores
_MMA_SYNC = 0.62  # share of the tensor cores' rate that mma.sync reaches on an H100

# Kinds of instructions that the model distinguishes.
_ISSUE, _FP32, _PIPE, _MEMORY, _TENSOR, _AWAIT_TENSOR, _AWAIT_COPIES, _COMMIT, _BARRIER, _FENCE = (
    range(10)
)


class Memory(NamedTuple):
    """The memory from which global loads come."""

    latency: float
    rate: float  # bytes per cycle and multiprocessor


L2 = Memory(h100.L2, h100.L2_BYTES)
DRAM = Memory(h100.DRAM, h100.DRAM_BYTES)


@dataclasses.dataclass
class Run:
    """Result of a run; shares refer to all cycles."""

    cycles: float
    passes: list[float]  # mean time over the warps at which the marked instruction was issued
    busy: dict[str, float]  # share in which each unit worked
    waits: dict[str, float]  # share without an issue, by the reason of the warp that was next


class _Step(NamedTuple):
    kind: int
    pipe: str
    cycles: float  # on the pipe
    latency: float  # after these, until the result is available
    keep: int  # of wgmma or cp.async: groups that may still be in progress
    # Of a memory access: "load", "copy", "store". Of a product: "group" if it ends one, "wait" for
    # mma.sync.
    role: str
    bytes: float  # from or to global memory
    stall: int
    write_barrier: int
    read_barrier: int
    waits: tuple[int, ...]
    address: int


class _Warp:
    __slots__ = (
        "at",
        "barriers",
        "copies",
        "copying",
        "left",
        "multiplied",
        "products",
        "program",
        "ready",
        "waiting",
    )

    def __init__(self, program: int, ready: float, rounds: int):
        self.program, self.ready, self.left = program, ready, rounds
        self.waiting = False  # at a barrier
        self.restart()

    def restart(self) -> None:
        self.at = 0
        self.barriers = [0.0] * 8  # times of release
        self.products: list[float] = []  # times at which groups of wgmma are complete
        self.copies: list[float] = []  # times at which groups of cp.async are complete
        self.copying = 0.0  # time at which the last cp.async outside of a group is complete
        self.multiplied = 0.0  # time at which the last wgmma is complete


def run(
    trace: Sequence[Instruction],
    warps: int,
    programs: int,
    memory: Memory = L2,
    *,
    rounds: int = 1,
    stagger: float = 0.0,
    mark: int = -1,
) -> Run:
    """Run programs concurrently on a scheduler, until each slot has executed `rounds` of them.

    Args:
        trace: instructions in the order in which every warp executes them.
        warps: warps of a program on this scheduler.
        programs: concurrent programs.
        memory: where global loads come from.
        rounds: programs per slot.
        stagger: cycles between the starts of the first programs.
        mark: address of the instruction whose issues are recorded in `passes`.
    """
    return _Scheduler(
        [_step(one) for one in trace], warps, programs, memory, rounds, stagger, mark
    ).run()


class _Scheduler:
    def __init__(
        self,
        steps: list[_Step],
        warps: int,
        programs: int,
        memory: Memory,
        rounds: int,
        stagger: float,
        mark: int,
    ):
        self.steps, self.warps, self.memory, self.mark = steps, warps, memory, mark
        self.active = [
            _Warp(program, program * stagger, rounds)
            for program in range(programs)
            for _ in range(warps)
        ]
        # Time at which each pipe is free.
        self.free: dict[str, float] = dict.fromkeys(
            (FMA, LITE, HEAVY, ALU, XU, FP64, SHARED, TENSOR, UNIFORM), 0.0
        )
        self.delivered = 0.0  # time at which the memory has delivered all requests
        self.arrived: dict[int, list[_Warp]] = defaultdict(list)  # at the barrier, by program
        self.busy: dict[str, float] = defaultdict(float)
        self.waits: dict[str, float] = defaultdict(float)
        self.marks: dict[_Warp, list[float]] = defaultdict(list)

    def run(self) -> Run:
        now, last = -1.0, None
        while self.active:
            best, when, why = None, float("inf"), ""
            for warp in self.active:
                if warp.waiting:
                    continue
                time, reason = self.earliest(warp)
                if time < when or (time == when and warp is last):
                    best, when, why = warp, time, reason
            if best is None:
                raise RuntimeError(
                    "every warp waits at a barrier that not all warps of its program reach"
                )
            if when > now + 1:
                self.waits[why] += when - now - 1
            now, last = max(when, now + 1), best
            self.issue(best, now)
        rows = list(self.marks.values())
        passes = [sum(times) / len(times) for times in zip(*rows, strict=False)]
        busy = {name: cycles / now for name, cycles in self.busy.items()} if now > 0 else {}
        return Run(now, passes, busy, {name: cycles / now for name, cycles in self.waits.items()})

    def earliest(self, warp: _Warp) -> tuple[float, str]:
        """The earliest time of the warp's next instruction, and what it waits for until then."""
        step = self.steps[warp.at]
        time, reason = warp.ready, "stall count"
        for barrier in step.waits:
            if warp.barriers[barrier] > time:
                time, reason = warp.barriers[barrier], "result"
        kind = step.kind
        if kind == _PIPE:
            until = self.free[step.pipe]
        elif kind == _FP32:
            until = min(self.free[FMA], self.free[LITE])
        elif kind == _MEMORY:
            until = self.free[SHARED] - _SHARED_QUEUE
        elif kind == _TENSOR:
            until = self.free[TENSOR] - _TENSOR_QUEUE
        elif kind == _AWAIT_TENSOR:
            until = warp.products[-step.keep - 1] if len(warp.products) > step.keep else 0.0
        elif kind == _AWAIT_COPIES:
            until = warp.copies[-step.keep - 1] if len(warp.copies) > step.keep else 0.0
        else:
            return time, reason
        return (until, step.pipe) if until > time else (time, reason)

    def issue(self, warp: _Warp, now: float) -> None:
        """Issue the warp's next instruction at `now`: occupy its pipes and release its barriers."""
        step, free = self.steps[warp.at], self.free
        kind = step.kind
        if step.address == self.mark:
            self.marks[warp].append(now)
        self.busy["issue"] += 1
        warp.ready = now + max(step.stall, 1)
        done, read = now + step.latency, now + 10
        if kind == _PIPE:
            free[step.pipe] = now + step.cycles
            if step.pipe == HEAVY:  # fp32 that is already in progress goes first
                free[FMA] = free[HEAVY] = max(free[FMA], now) + step.cycles
                self.busy[FMA] += step.cycles / 2
            self.busy[step.pipe] += step.cycles
            done += step.cycles
        elif kind == _FP32:
            free[FMA if free[FMA] <= free[LITE] else LITE] = now + step.cycles
            self.busy[FMA] += step.cycles / 2
        elif kind == _MEMORY:
            done = self.access(warp, step, now)
        elif kind == _TENSOR:
            free[TENSOR] = max(free[TENSOR], now + 8) + step.cycles
            self.busy[TENSOR] += step.cycles
            warp.multiplied = max(warp.multiplied, free[TENSOR] + h100.WGMMA)
            read = free[TENSOR]
            if step.role == "group":
                warp.products.append(warp.multiplied)
            elif step.role == "wait":
                done = free[TENSOR] + 18
        elif kind == _COMMIT:
            warp.copies.append(warp.copying)
        elif kind == _BARRIER:
            self.arrive(warp, now)
        elif kind == _FENCE:
            warp.ready = now + h100.FENCE
        if step.write_barrier != NO_BARRIER:
            warp.barriers[step.write_barrier] = max(warp.barriers[step.write_barrier], done)
        if step.read_barrier != NO_BARRIER:
            warp.barriers[step.read_barrier] = max(warp.barriers[step.read_barrier], read)
        warp.at += 1
        if warp.at == len(self.steps):
            self.end(warp, now)

    def access(self, warp: _Warp, step: _Step, now: float) -> float:
        """Access shared or global memory; returns the time at which the access is complete."""
        start = max(self.free[SHARED], now)
        self.free[SHARED] = start + step.cycles
        self.busy[SHARED] += step.cycles
        if not step.bytes:
            return start + step.cycles + step.latency
        # The other schedulers' loads are interleaved.
        cycles = SCHEDULERS * step.bytes / self.memory.rate
        self.delivered = max(self.delivered, start) + cycles
        self.busy["memory"] += cycles
        done = self.delivered + self.memory.latency
        if step.role == "copy":
            warp.copying = max(warp.copying, done)
        return start + step.cycles + 12 if step.role == "store" else done

    def arrive(self, warp: _Warp, now: float) -> None:
        here = self.arrived[warp.program]
        here.append(warp)
        warp.waiting = True
        if len(here) == self.warps:
            for other in here:
                other.waiting, other.ready = False, now + h100.BARRIER
            here.clear()

    def end(self, warp: _Warp, now: float) -> None:
        warp.left -= 1
        if warp.left:
            warp.restart()
            warp.ready = now + h100.LAUNCH
        else:
            self.active.remove(warp)


# The treatment of each instruction.

# Cycles until the result; other instructions below have the latency of shared memory.
_ANSWERS = {"SHFL": h100.SHUFFLE, "R2UR": h100.UNIFORM + 2, "LDL": h100.L1}
_OTHER_MEMORY = {
    "LDS",
    "STS",
    "LDSM",
    "STSM",
    "SHFL",
    "LDL",
    "STL",
    "ATOMS",
    "LDC",
    "S2R",
    "R2UR",
    "REDUX",
}
_STORES = {"STG", "ST", "RED"}
_LAST_NUMBER = re.compile(r"0x([0-9a-f]+)\s*$")


@functools.cache
def _step(one: Instruction) -> _Step:
    base = one.base
    last = _LAST_NUMBER.search(one.operands)
    groups = int(last[1], 16) if last else 0

    def step(
        kind: int,
        pipe: str = "",
        cycles: float = 0.0,
        latency: float = 0.0,
        keep: int = 0,
        role: str = "",
        moved: float = 0.0,
    ) -> _Step:
        waits = tuple(bit for bit in range(6) if one.waits >> bit & 1)
        return _Step(
            kind,
            pipe,
            cycles,
            latency,
            keep,
            role,
            moved,
            one.stall,
            one.write_barrier,
            one.read_barrier,
            waits,
            one.address,
        )

    if one.never_runs:
        return step(_ISSUE, latency=4)
    if base in ("HGMMA", "QGMMA"):
        return step(
            _TENSOR, TENSOR, tensor_cycles(one), role="group" if "gsb0" in one.operands else ""
        )
    if base == "HMMA":
        return step(_TENSOR, TENSOR, tensor_cycles(one) / _MMA_SYNC, role="wait")
    if base == "WARPGROUP" and "DEPBAR" in one.opcode:
        return step(_AWAIT_TENSOR, "wgmma", keep=groups)
    if base == "DEPBAR":
        return step(_AWAIT_COPIES, "cp.async", keep=groups)
    if base == "LDGDEPBAR":
        return step(_COMMIT, latency=8)
    if base == "BAR" and "SYNC" in one.opcode:
        return step(_BARRIER)
    if base in ("MEMBAR", "FENCE"):
        return step(_FENCE)
    if moved := moved_bytes(one):
        role = "copy" if base == "LDGSTS" else "store" if base in _STORES else "load"
        return step(_MEMORY, SHARED, shared_cycles(one), role=role, moved=moved)
    if base in _OTHER_MEMORY:
        return step(_MEMORY, SHARED, shared_cycles(one), _ANSWERS.get(base, h100.SHARED))
    if base == "IMAD" and "WIDE" in one.opcode:
        return step(_PIPE, HEAVY, 4, h100.ARITHMETIC)
    if base in PIPES:
        pipe, cycles = PIPES[base]
        if pipe == FMA:
            return step(_FP32, FMA, cycles, h100.FP32)
        return step(_PIPE, pipe, cycles, h100.MUFU if pipe == XU else h100.ARITHMETIC)
    if base.startswith("U") and base not in ("UTMALDG", "UTMASTG"):
        return step(_PIPE, UNIFORM, 2, h100.UNIFORM)
    return step(_ISSUE, latency=8 if base == "WARPGROUP" else 20)
