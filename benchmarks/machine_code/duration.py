"""Predicted time of a launch, whose programs are distributed over an H100's multiprocessors."""

from __future__ import annotations

import math
from typing import NamedTuple

from benchmarks.machine_code import multiprocessor
from benchmarks.machine_code.examine import Built
from benchmarks.machine_code.h100 import CLOCK, DRAM_RATE, MULTIPROCESSORS
from benchmarks.machine_code.multiprocessor import L2, Memory
from benchmarks.machine_code.path import way_through

ROUNDS = 5  # programs in each slot of a multiprocessor, if there are more than fit concurrently
_STEADY = 24  # passes that are simulated; a longer loop continues at the speed of the second half


class Launch(NamedTuple):
    """A kernel at one size of training."""

    label: str
    programs: float  # total number
    passes: float  # mean number of passes of a program through its main loop
    memory: Memory = L2
    inner: int = 1  # of fused nested loops: passes per iteration of the outer loop
    sums: int = 0  # bytes of partial sums that torch then adds up


def seconds(built: Built, launch: Launch, rounds: int = ROUNDS) -> float:
    """Time of the launch and of adding up its partial sums, without start-up and tail effects."""
    low, high = max(1, math.floor(launch.passes)), math.ceil(launch.passes)
    if high > _STEADY:
        low, high = _STEADY // 2 * launch.inner, _STEADY * launch.inner
    cycles = _cycles(built, launch, low, rounds)
    if low != launch.passes:
        cycles += (
            (launch.passes - low)
            / max(high - low, 1)
            * (_cycles(built, launch, high, rounds) - cycles)
        )
    return cycles / CLOCK + launch.sums / DRAM_RATE


def _cycles(built: Built, launch: Launch, passes: int, rounds: int) -> float:
    """Cycles that a multiprocessor needs for its share of the programs."""
    share = launch.programs / MULTIPROCESSORS
    resident = max(1, min(built.programs, math.ceil(share)))
    trace = way_through(built.code, passes, built.case.loop, launch.inner)
    warps, side_by_side = built.on_a_scheduler(resident)
    rounds = rounds if share > built.programs else 1
    stagger = len(trace) * warps / 2 / side_by_side / (passes if rounds == 1 else 1)
    run = multiprocessor.run(
        trace, warps, side_by_side, launch.memory, rounds=rounds, stagger=stagger
    )
    return run.cycles * share / (rounds * resident)
