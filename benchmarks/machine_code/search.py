"""Search for better tiles with the model, for sm_90 in 16 bits.

The candidates are all block sizes, numbers of warps and numbers of stages that the tuner may try,
and limits on registers. A row of the table is searched in two steps. The first evaluates every tile
with dropout at one launch, and drops tiles that do not compile, do not fit or spill. The second
takes the best few of them, each also with the register limits under which one more program would
fit. It evaluates them with and without dropout, at all launches, and at both ends of the known
range of the L2 cache's rate, because small tiles read more from it. Tiles are ranked by the
geometric mean of the times.

The result is a prediction. `benchmarks/kernels/proposed_tiles.json` keeps the replaced rows, so
that a GPU can time both.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from benchmarks.compiled.ahead_of_time import faults, measure
from benchmarks.compiled.signatures import AotSignature, aot_signatures, short
from benchmarks.harness.forked import forked
from benchmarks.machine_code import ours
from benchmarks.machine_code.counts import moved_bytes
from benchmarks.machine_code.duration import Launch, seconds
from benchmarks.machine_code.examine import Built, build, examine
from benchmarks.machine_code.h100 import DRAM_RATE
from benchmarks.machine_code.multiprocessor import DRAM, L2, Memory
from fastbert_kernels._tiles import TABLE, Row
from fastbert_kernels.checker.machine_code import DEVICES, REGISTERS, SCHEDULERS

ARCHITECTURE, BITS = "sm_90", 16
SLOW_L2 = L2._replace(rate=24.0)  # bytes per cycle and multiprocessor; devices give 25 to 36
_FINALISTS = 4
_ROUNDS = 3  # of programs; fewer than for a table, because only ratios count
# Programs per multiprocessor that a persistent kernel may have.
_PROGRAMS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16)
# A register limit below this share of what the compiler wants would only cause spills.
_SQUEEZE = 0.6
# Rows of other shapes that are kept in addition to the best one, if their time is at most the next
# number times the best time.
_OTHERS = 2
_WORTH_TIMING = 1.15
_FULL = 0.97  # share of the memory's rate that counts as reaching it
# Tie breaks, for tiles whose times differ by less than the factor:
_NEAR = 1.05  # the one that reads less from the L2 cache is better;
_SAME = 1.02  # with equal blocks, fewer stages and no register limit are better;
_EVEN = 1.005  # a smaller number of programs is better, because there are fewer shares to add up.


class Judged(NamedTuple):
    row: Row
    seconds: tuple[float, ...]  # for each form of the kernel and each launch
    traffic: float  # bytes that a launch reads from the L2 cache, if its tiles come from there
    registers: tuple[int, ...]  # of each form
    programs: tuple[int, ...]  # of each form, that fit concurrently

    def over(self, other: Judged) -> float:
        """This tile's time over the other's."""
        return statistics.geometric_mean(
            mine / theirs for mine, theirs in zip(self.seconds, other.seconds, strict=True)
        )


@dataclasses.dataclass
class Proposal:
    kernel: str
    present: Row
    best: Row
    ratio: float  # predicted time of the best row over that of the present one
    others: list[tuple[Row, float]]  # further good rows with other blocks or warps, and their ratio
    tried: int
    dropped: int


def forms(table: str, row: Row) -> list[AotSignature]:
    """The kernels that use a row: those of `aot_signatures()` that would look it up.

    If there are none, the largest kernels of the table, resized to the row.
    """
    alike = [
        p
        for p in aot_signatures().values()
        if p.table == table and short(p) == "bf16" and p.arguments.get("WINDOW") is None
    ]
    sizes = sorted({p.size for p in alike})
    rows = sorted(r["size"] for r in _rows(table))
    served = [
        size for size in sizes if next((r for r in rows if r >= size), rows[-1]) == row["size"]
    ]
    if served:
        return [p for p in alike if p.size in served]
    axis = "K" if "K" in alike[0].arguments else "D"
    return [
        p._replace(size=row["size"], arguments=p.arguments | {axis: row["size"]})
        for p in alike
        if p.size == sizes[-1]
    ]


def timed_forms(table: str, row: Row) -> list[AotSignature]:
    """The forms that count for the time of a row, dropout first.

    A layer of the encoder counts, its head's LayerNorm does not; the MLM loss gathers its rows.
    """
    found = [
        p
        for p in forms(table, row)
        if p.arguments.get("bias_ptr", "") is not None and p.arguments.get("GATHER", True)
    ]
    return sorted(
        found,
        key=lambda p: (
            not p.arguments.get("DROPOUT", True),
            p.arguments.get("dropout_seeds_ptr", "") is None,
            p.size,
        ),
    )


def candidates(
    table: str,
    row: Row,
    blocks: Mapping[str, tuple[int, ...]],
    common: Mapping[str, tuple[int, ...]],
) -> list[Row]:
    """The present row, then all others that are worth compiling."""
    walks, rows = ours.WALKS.get(table), table in (*ours.ROWS, *ours.GELU)
    warps = common["num_warps"] if rows else (4, 8)
    # With 2 stages nothing is loaded ahead of a wgmma (docs/kernels.md).
    stages = (3, 4) if walks or table in ours.MLM else (1,)
    found = [row]
    for values in itertools.product(*blocks.values(), warps, stages):
        trial = {**row, **dict(zip((*blocks, "num_warps", "num_stages"), values, strict=True))}
        trial.pop("maxnreg", None)
        if (walks and _is_hopeless(table, trial)) or (rows and _is_hopeless_for_rows(table, trial)):
            continue
        if trial not in found:
            found.append(trial)
    return found


def _is_hopeless(table: str, row: Row) -> bool:
    """Whether a tile of attention cannot be good.

    Either it holds more numbers at a time than a thread has registers, and takes longest to
    compile; or there are warps without rows of their own.
    """
    own, walk, products = ours.WALKS[table]
    threads = 32 * row["num_warps"]
    sums = {2: 1, 3: 1, 4: 2}[products] * row[own] * row["size"]  # O; dQ; dK and dV
    scores = {2: 1, 3: 2, 4: 2}[products] * row[own] * row[walk]  # S; backward also dP
    # The 64 rows of a wgmma belong to four warps.
    return sums + scores > 192 * threads or row[own] < 16 * row["num_warps"]


def _is_hopeless_for_rows(table: str, row: Row) -> bool:
    """Whether a tile of a kernel over rows cannot be good.

    Either its loads have less than 128 bits, or it holds more numbers at a time than a thread has
    registers.
    """
    threads, width = 32 * row["num_warps"], row.get("BLOCK_D") or row["BLOCK_F"]
    chunk = row["BLOCK_T"] * width / threads
    if table in ours.GELU:
        return not 8 <= chunk <= 64
    whole = row["BLOCK_T"] * row["size"] / threads
    # Registers per element, as in the present kernels.
    registers = (9 if "backward" in table else 5) * whole
    return not 8 <= chunk or registers > 255 or width > row["size"]


def judge(
    table: str, row: Row, signatures: list[AotSignature], thorough: bool, as_it_stands: bool = False
) -> Judged | None:
    """The predicted time for each form and launch; None if one does not compile, fit, or spills.

    Args:
        table: the kernel's name in the table.
        row: the tile.
        signatures: the forms.
        thorough: use all launches and both rates of the L2 cache, not one of each.
        as_it_stands: keep the row's own number of programs, and accept spills.
    """
    options = _options(row)
    built: list[Built] = []
    for signature in signatures:
        try:
            one = build(ours.case(table, signature, options))
        except Exception:  # the compilers have no common class for their errors
            return None
        if (
            (one.spilled and not as_it_stands)
            or not one.programs
            or one.shared > DEVICES[ARCHITECTURE].shared
        ):
            return None
        built.append(one)
    if "programs" in row and not as_it_stands:
        row, times = _best_programs(row, options, signatures, built)
    else:
        times = _times(options, signatures, built, thorough)
    traffic = sum(
        _traffic(one, ours.launches(signature, _options(row))[0])
        for signature, one in zip(signatures, built, strict=True)
    )
    return Judged(
        row,
        tuple(times),
        traffic,
        tuple(one.registers for one in built),
        tuple(one.programs for one in built),
    )


def _traffic(built: Built, launch: Launch) -> float:
    return (
        sum(map(moved_bytes, built.loop)) * built.warps * launch.passes * launch.programs
        if launch.memory == L2
        else 0.0
    )


def _best_programs(
    row: Row, options: dict[str, Any], signatures: list[AotSignature], built: list[Built]
) -> tuple[Row, list[float]]:
    """For a persistent kernel: the fastest number of programs per multiprocessor, and its times."""
    fit = min(one.programs for one in built)
    trials = []
    for programs in [n for n in _PROGRAMS if fit / 3 <= n <= fit] or [fit]:
        times = _times(options | {"programs": programs}, signatures, built, True)
        trials.append((math.prod(times) ** (1 / len(times)), programs, times))
    least = min(trials)[0]
    _, programs, times = next(trial for trial in trials if trial[0] <= _EVEN * least)
    return {**row, "programs": programs}, times


def _times(
    options: dict[str, Any], signatures: list[AotSignature], built: list[Built], thorough: bool
) -> list[float]:
    found = []
    for signature, one in zip(signatures, built, strict=True):
        launches = ours.launches(signature, options)
        for launch in launches if thorough else launches[:1]:
            memories: tuple[Memory, ...] = (
                (L2, SLOW_L2) if launch.memory == L2 and thorough else (launch.memory,)
            )
            found += [seconds(one, launch._replace(memory=memory), _ROUNDS) for memory in memories]
    return found


def limited(judged: Judged) -> Iterator[Row]:
    """The row with the register limits under which one more program would fit."""
    warps = judged.row["num_warps"]
    for registers, programs in {*zip(judged.registers, judged.programs, strict=True)}:
        limit = REGISTERS * SCHEDULERS // (warps * (programs + 1)) // 8 * 8
        if _SQUEEZE * registers <= limit < registers:
            yield {**judged.row, "maxnreg": limit}


def runs_at_the_memory_rate(table: str, row: Row, signatures: list[AotSignature]) -> bool:
    """Whether every form is limited by memory, so that a search cannot gain anything."""
    cases = [ours.case(table, signature, _options(row)) for signature in signatures]
    return all(
        case.memory == DRAM and examine(case).gigabytes > _FULL * DRAM_RATE / 1e9 for case in cases
    )


def is_faultless(table: str, row: Row) -> bool:
    """Whether all forms that use the row pass the rules of `ahead_of_time`."""
    return not faults(
        [measure(table, signature, ARCHITECTURE, _options(row)) for signature in forms(table, row)]
    )


def propose(
    table: str,
    present: Row,
    blocks: Mapping[str, tuple[int, ...]],
    common: Mapping[str, tuple[int, ...]],
    end: float,
) -> Proposal:
    """The best row that is found until `end` (of time.monotonic).

    Args:
        table: the kernel's name in the table.
        present: the row of the table.
        blocks: for each option of this kernel, the values that it may have.
        common: the same for the options that all kernels share.
        end: time limit.
    """
    signatures = timed_forms(table, present)
    if next(forked(runs_at_the_memory_rate, [(table, present, signatures)])):
        return Proposal(table, present, present, 1.0, [], 0, 0)
    trials = candidates(table, present, blocks, common)
    first = [
        found
        for found in _each(judge, [(table, row, signatures[:1], False) for row in trials], end)
        if found
    ]
    first.sort(key=lambda found: math.prod(found.seconds))
    finalists = [found.row for found in first[:_FINALISTS]]
    finalists += [row for found in first[:_FINALISTS] for row in limited(found)]
    jobs = [
        (table, present, signatures, True, True),
        *((table, row, signatures, True) for row in finalists if row != present),
    ]
    base, *judged = _each(judge, jobs, end)
    proposal = Proposal(table, present, present, 1.0, [], len(trials), len(trials) - len(first))
    if base is None:
        return proposal  # nothing to compare with
    ranked = sorted((found for found in judged if found), key=lambda found: found.over(base))
    if not ranked or ranked[0].over(base) >= 1:
        return proposal
    shapes: set[tuple] = set()  # of the best and the others
    for found in preferred(ranked):
        ratio, shape = found.over(base), _shape(found.row)
        if (
            len(shapes) > _OTHERS
            or shape in shapes
            or ratio > min(1.0, _WORTH_TIMING * (proposal.ratio if shapes else 1.0))
        ):
            continue
        if not next(forked(is_faultless, [(table, found.row)])):
            continue
        if shapes:
            proposal.others.append((found.row, ratio))
        else:
            proposal.best, proposal.ratio = found.row, ratio
        shapes.add(shape)
    return proposal


def preferred(ranked: list[Judged]) -> list[Judged]:
    """Sort from the fastest, with preferred tiles first.

    Preferred are tiles that are about as fast, and use less of what the model knows least: the L2
    cache, registers and stages.
    """
    near = [found for found in ranked if found.over(ranked[0]) < _NEAR]
    least = min(near, key=lambda found: (found.traffic, found.over(ranked[0])))
    same = [
        found
        for found in near
        if _shape(found.row) == _shape(least.row) and found.over(least) < _SAME
    ]
    same.sort(key=lambda found: (found.row["num_stages"], "maxnreg" in found.row))
    return [*same, *(found for found in ranked if found not in same)]


def _each(function: Callable[..., Any], jobs: list[tuple], end: float) -> list[Any]:
    """Results until the time limit; at least that of the first job."""
    found = []
    for result in forked(function, jobs):
        found.append(result)
        if time.monotonic() > end:
            break
    return found


def _options(row: Row) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in ("bits", "size")}


def _shape(row: Row) -> tuple:
    """The options that distinguish tiles; other options make variants of a tile."""
    return tuple(
        value for name, value in row.items() if name.startswith("BLOCK") or name == "num_warps"
    )


def _rows(table: str) -> list[Row]:
    return [
        row
        for row in json.loads(TABLE.read_text(encoding="utf-8"))[ARCHITECTURE][table]
        if row["bits"] == BITS
    ]
