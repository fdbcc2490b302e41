"""The model of an H100's multiprocessor against results that were worked out by hand.

This covers decoding, counting and running of instructions, and the page that is made from them.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest

from benchmarks.compiled.ahead_of_time import RECORD as RESOURCES
from benchmarks.harness.tables_and_plots import filled, places
from benchmarks.kernels.tune import BLOCKS, COMMON
from benchmarks.machine_code import h100, ours, search
from benchmarks.machine_code.counts import (
    class_of,
    least_cycles,
    operand_bytes,
    per_element,
    shared_cycles,
    tensor_cycles,
)
from benchmarks.machine_code.decode import Code, Instruction, decode
from benchmarks.machine_code.multiprocessor import L2, Memory, run
from benchmarks.machine_code.path import loops, main_loop, way_through
from benchmarks.machine_code.report import PAGE, PROPOSED, RECORD, RECORDED, factor, parts, read
from fastbert_kernels._tiles import TABLE
from tests.uninterpreted import run_module

ROOT = Path(__file__).parents[1]


def one(opcode: str, operands: str = "", **control: int) -> Instruction:
    return Instruction(0, "", opcode, operands, **control)


FFMA = one("FFMA", "R1, R2, R3, R4")
# 32 cycles of the tensor cores.
PRODUCT = one("HGMMA.64x64x16.F32.BF16", "R24, gdesc[UR8], R24, gsb0")
LOAD = one("LDG.E.128", "R4, desc[UR4][R2.64]", write_barrier=0)
COPY = one("LDGSTS.E.BYPASS.128", "[R3], desc[UR4][R2.64]")


# Decoding


def test_an_instruction_is_decoded_with_what_it_waits_for():
    """Worked out by hand from the upper half of the instruction.

    Bits 41 to 44 are the stall count. After the yield bit come two barriers of 3 bits and a mask of
    6 bits.
    """
    upper = 5 << 41 | 2 << 46 | 7 << 49 | 0b001010 << 52
    text = f"""//--------------------- .text.kernel --------------------------
.L_x_1:
        /*0010*/              @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;  /* 0x0000000402048981 */
                                                                     /* 0x{upper:016x} */
        /*0020*/                   BRA `(.L_x_1) ;                   /* 0x0000000402048981 */
                                                                     /* 0x000fc0000383ffff */
//--------------------- .text.another --------------------------
        /*0010*/                   EXIT ;                            /* 0x000000000000794d */
                                                                     /* 0x000fea0003800000 */
"""
    code = decode(text)
    assert code.instructions[0] == Instruction(
        0x10, "@!P0", "LDG.E.128", "R4, desc[UR4][R2.64]", 5, 2, 7, 0b001010
    )
    assert len(code.instructions) == 2 and code.target(1) == 0
    with pytest.raises(ValueError, match="nvdisasm"):
        decode("nothing")


@pytest.mark.slow
def test_our_own_kernels_decode_into_what_the_hardware_demands():
    result = run_module("tests.decoded_kernels")
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.slow
def test_launches_hand_all_options_of_a_row_to_the_compiler():
    """The options include a limit on registers."""
    result = run_module("tests.launched_options")
    assert result.returncode == 0, result.stdout + result.stderr


# Counting


def test_classes_and_counts():
    body = [
        FFMA,
        FFMA,
        one("MUFU.EX2", "R1, R2"),
        one("IMAD.MOV.U32", "R1, RZ, RZ, R2"),
        one("UIADD3", "UR4"),
        FFMA._replace(predicate="@!PT"),
    ]
    assert [class_of(each) for each in body[:5]] == ["fp32", "fp32", "exp2", "move", "uniform"]
    assert per_element(body, 2) == {"exp2": 0.5, "fp32": 1.0, "move": 0.5, "uniform": 0.5}
    assert least_cycles([FFMA, FFMA, one("MUFU.EX2", "R1, R2")], warps=4) == {
        "issue": 12,
        "fma": 8,
        "xu": 32,
    }


def test_bytes_and_cycles_of_single_instructions():
    assert (
        operand_bytes(LOAD) == 512
        and operand_bytes(one("LDG.E.U16", "R1")) == 64
        and operand_bytes(one("LDG.E", "R1")) == 128
    )
    assert operand_bytes(COPY) == 512  # not the number in "LTC128B"
    four_matrices = one("LDSM.16.M88.4", "R4, [R3]")  # of 8 rows of 16 bytes
    assert operand_bytes(four_matrices) == 512 and shared_cycles(four_matrices) == 4 * 4
    assert tensor_cycles(PRODUCT) == 32  # 2 x 64 x 64 x 16 FLOPs at 4,096 a cycle
    # A (16 cycles) and B (4) come through shared memory.
    assert tensor_cycles(one("HGMMA.64x16x16.F32.BF16", "R24, gdesc[UR8], R24")) == 20
    # A is in registers.
    assert tensor_cycles(one("HGMMA.64x16x16.F32.BF16", "R24, R4, gdesc[UR8], R24")) == 8


# The way through a kernel


def code_of(text: str) -> Code:
    """Make code from words, one instruction each: f is arithmetic, p a product, E an exit.

    "<n" and ">n" are branches to instruction n. A "?" before them makes them conditional.
    """
    found: list[Instruction] = []
    for word in text.split():
        predicate = "@P0" if word.startswith("?") else ""
        word = word.lstrip("?")
        if word[0] in "<>":
            found.append(Instruction(len(found), predicate, "BRA", f"`(.L{word[1:]})"))
        else:
            opcode, operands = {
                "f": ("FFMA", "R1"),
                "p": (PRODUCT.opcode, PRODUCT.operands),
                "E": ("EXIT", ""),
            }[word]
            found.append(Instruction(len(found), predicate, opcode, operands))
    return Code(found, {f".L{number}": number for number in range(len(found))})


@pytest.mark.parametrize(
    ("text", "passes", "inner", "way"),
    [
        ("f f p ?<1 E", 3, 1, [0, *[1, 2, 3] * 3, 4]),
        ("f ?>3 f f E", 1, 1, [0, 1, 2, 3, 4]),  # a conditional branch is not taken
        ("f >3 f f E", 1, 1, [0, 1, 3, 4]),  # one without a condition is
        ("f p ?<1 ?>5 p f E", 1, 1, [0, 1, 2, 3, 5, 6]),  # nor is the tail's product made
        # This branch leads to the main loop, and all others lead past it.
        ("?>3 f >5 p ?<3 E", 2, 1, [0, 3, 4, 3, 4, 5]),
        ("?>3 f ?<1 p ?<3 E", 2, 1, [0, 3, 4, 3, 4, 5]),  # a loop for a sum of no terms
        # Instructions 2 and 3, the end of a turn, run in every second pass.
        ("p ?>4 f f f ?<0 E", 4, 2, [0, 1, 4, 5, 0, 1, 2, 3, 4, 5] * 2 + [6]),
        ("f E <2", 1, 1, [0, 1]),
    ],
)
def test_the_way_of_a_warp(text, passes, inner, way):
    assert [
        instruction.address for instruction in way_through(code_of(text), passes, inner=inner)
    ] == way


def test_loops_are_the_innermost_ones():
    code = code_of("f p f ?<1 f f f ?<4 f ?<0 E <11")
    assert loops(code) == [(1, 3), (4, 7)]
    assert (
        main_loop(code) == (1, 3)
        and main_loop(code, "longest") == (4, 7)
        and main_loop(code, "0") == (1, 3)
    )
    assert main_loop(code_of("f f E")) is None


# The model. `cycles` is when the last instruction is issued; the first one is at 0.


def test_independent_arithmetic_takes_a_cycle_each():
    assert run([FFMA] * 100, warps=1, programs=1).cycles == 99
    assert run([FFMA] * 100, warps=2, programs=2).cycles == 399
    assert run([one("LOP3.LUT", "R1")] * 100, 1, 1).cycles == 2 * 99  # half as many lanes
    assert run([one("MUFU.EX2", "R1")] * 100, 1, 1).cycles == 8 * 99  # 4 lanes


def test_pipes_work_side_by_side():
    """Eight cycles have room for one exponential, and seven others."""
    body = [one("MUFU.EX2", "R1"), *[FFMA] * 7]
    result = run(body * 50, warps=1, programs=1)
    assert result.cycles == 8 * 50 - 1
    assert result.busy["issue"] == pytest.approx(1, abs=0.01) and result.busy[
        "xu"
    ] == pytest.approx(1, abs=0.01)


def test_a_dependent_chain_takes_its_stall_counts_and_other_warps_fill_them():
    chain = [FFMA._replace(stall=4)] * 50
    assert run(chain, 1, 1).cycles == 4 * 49
    assert run(chain, 4, 1).cycles == 4 * 49 + 3


def test_a_load_is_waited_for():
    use = FFMA._replace(waits=1)
    alone = run([LOAD, use], 1, 1).cycles
    assert alone == pytest.approx(h100.L2 + 4 * 512 / h100.L2_BYTES)
    # Six loads at once share one latency, and arrive at the memory's rate.
    assert run([*[LOAD] * 6, use], 1, 1).cycles == pytest.approx(
        h100.L2 + 6 * 4 * 512 / h100.L2_BYTES
    )
    assert run([LOAD, use], 1, 1, Memory(1000, 4)).cycles == 1000 + 512


def test_products_queue_behind_each_other_while_the_warp_continues():
    await_all = one("WARPGROUP.DEPBAR.LE", "gsb0, 0x0")
    assert run([*[PRODUCT] * 4, await_all], 1, 1).cycles == 8 + 4 * 32 + h100.WGMMA
    assert run([*[PRODUCT] * 4, *[FFMA] * 50], 1, 1).cycles == 53
    # It waits for all but the last group, which overlaps with what follows.
    assert (
        run([*[PRODUCT] * 4, one("WARPGROUP.DEPBAR.LE", "gsb0, 0x1")], 1, 1).cycles
        == 8 + 3 * 32 + h100.WGMMA
    )
    # Two warps take turns at the tensor cores: 16 products overlap, and do not each add their
    # latency.
    assert run([*[PRODUCT] * 8, await_all], 2, 1).cycles == 8 + 16 * 32 + h100.WGMMA


def test_copies_are_waited_for_by_groups():
    commit = one("LDGDEPBAR")
    first, second = h100.L2 + 4 * 512 / h100.L2_BYTES, h100.L2 + 2 * 4 * 512 / h100.L2_BYTES
    assert run(
        [COPY, commit, COPY, commit, one("DEPBAR.LE", "SB0, 0x1")], 1, 1
    ).cycles == pytest.approx(first)
    assert run(
        [COPY, commit, COPY, commit, one("DEPBAR.LE", "SB0, 0x0")], 1, 1
    ).cycles == pytest.approx(second)


def test_a_loop_without_prefetch_shows_the_latency_in_every_pass():
    """This is why rows of the table have three stages.

    With two stages, a pass waits for the copy that it needs right after issuing it.
    """
    work, commit = [FFMA] * 400, one("LDGDEPBAR")
    at_once = [COPY, commit, one("DEPBAR.LE", "SB0, 0x0"), *work]
    a_pass_ahead = [COPY, commit, one("DEPBAR.LE", "SB0, 0x1"), *work]
    slow, fast = (run(body * 20, 1, 1).cycles / 20 for body in (at_once, a_pass_ahead))
    assert slow == pytest.approx(400 + h100.L2 + 4 * 512 / h100.L2_BYTES, rel=0.02)
    assert fast == pytest.approx(403, rel=0.05)


def test_a_barrier_holds_all_warps_of_a_program():
    barrier = one("BAR.SYNC.DEFER_BLOCKING", "0x0")
    # Two warps issue at cycles 0 and 1. They reach the barrier at 100 and 101, and the second one
    # releases both.
    assert run([FFMA._replace(stall=100), barrier, FFMA], 2, 1).cycles == 101 + h100.BARRIER + 1
    # A warp of another program does not wait for them. With one warp each, none waits.
    assert run([FFMA._replace(stall=100), barrier, FFMA], 1, 2).cycles == 101 + h100.BARRIER


def test_programs_follow_each_other_in_a_place():
    assert run([FFMA] * 10, 1, 1, rounds=3).cycles == 3 * 9 + 2 * h100.LAUNCH
    result = run([FFMA, *[FFMA._replace(address=16)] * 3], 1, 1, L2, mark=16)
    assert result.passes == [1, 2, 3]


# The search for tiles


@pytest.mark.slow
def test_a_row_is_judged_by_the_kernels_that_it_serves():
    rows = {
        ("gelu_forward", "4096"): {(3072, 0), (4096, 0)},
        ("norm_backward", "768"): {(768, 768)},
        ("norm_backward", "4096"): {(4096, 4096)},  # wider than any in training: one is resized
        ("attention_dq", "64"): {(64, 64)},
        ("attention_dq", "128"): {(128, 128)},
        ("norm_forward", "768"): {(768, 768)},
    }
    result = run_module("tests.served_kernels", *(word for row in rows for word in row))
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert [set(map(tuple, one["forms"])) for one in found] == list(rows.values())
    # With dropout and without; not the head's LayerNorm.
    assert found[-1]["seeds"] == ["*i64", None]


def test_candidates_are_rows_of_the_same_kind():
    for table, rows in read(TABLE)["sm_90"].items():
        for row in [row for row in rows if row["bits"] == 16 and table in ours.JUDGED]:
            found = search.candidates(table, row, BLOCKS.get(table, {}), COMMON)
            assert found[0] == row and len({str(trial) for trial in found}) == len(found)
            assert all(
                trial.keys() == row.keys() - {"maxnreg"} and trial["size"] == row["size"]
                for trial in found[1:]
            )


def judged(
    seconds: float, traffic: float = 1.0, registers: int = 128, programs: int = 2, **row: int
) -> search.Judged:
    tile = {"bits": 16, "size": 64, "BLOCK_Q": 64, "num_warps": 8, "num_stages": 3, **row}
    return search.Judged(tile, (seconds, seconds), traffic, (registers,), (programs,))


def test_limits_on_registers_are_those_that_let_one_more_program_in():
    """512 registers for each lane of a scheduler: 8 warps are two on each, 4 warps one."""
    assert [row["maxnreg"] for row in search.limited(judged(1, registers=167, programs=1))] == [128]
    assert [
        row["maxnreg"] for row in search.limited(judged(1, registers=242, programs=2, num_warps=4))
    ] == [168]
    # Half as many registers would spill.
    assert list(search.limited(judged(1, registers=255, programs=1))) == []
    # Shared memory has no space for a third program.
    assert list(search.limited(judged(1, registers=76, programs=2))) == []


def test_the_larger_tile_is_preferred_where_the_model_cannot_tell():
    small, large = judged(1.00, traffic=2.0, BLOCK_Q=32), judged(1.04, traffic=1.0, BLOCK_Q=128)
    assert search.preferred([small, large]) == [large, small]
    far = judged(1.06, traffic=1.0, BLOCK_Q=128)
    assert search.preferred([small, far]) == [small, far]
    more_stages, fewer_stages = judged(1.0, num_stages=4), judged(1.01)
    assert search.preferred([more_stages, fewer_stages]) == [fewer_stages, more_stages]


@pytest.mark.slow
def test_the_search_runs_and_says_what_it_found(tmp_path):
    """It searches one small row for real with a table of its own; the project's stays unchanged."""
    table = tmp_path / "tiles.json"
    result = run_module(
        "benchmarks.kernels.tune",
        "--model",
        "--kernels=attention_prepare",
        "--seconds=6",
        f"--table={table}",
    )
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].startswith("attention_prepare 16-bit 32") and "tried" in lines[0]
    proposed = sum("of the time by the model" in line for line in lines)
    rows = read(tmp_path / "proposed_tiles.json")["sm_90"]["attention_prepare"] if proposed else []
    assert len({row["size"] for row in rows}) == proposed and all(
        row["predicted_ratio"] > 1 for row in rows
    )


# What is on record


def test_the_correction_is_the_mean_of_what_was_published():
    recorded = read(RECORDED)
    ratios: dict[str, list[float]] = {}
    for row in recorded["calibration"]:
        ratios.setdefault(row["pass"], []).append(statistics.mean(row["published"]) / row["model"])
    assert set(ratios) == set(recorded["factors"])
    for which, about in recorded["factors"].items():
        assert statistics.mean(ratios[which]) == pytest.approx(about["factor"], abs=about["spread"])
    assert (factor(recorded, "forward"), factor(recorded, "backward")) == (0.83, 0.75)
    assert [round(ratio, 2) for ratio in ratios["forward"]] == [0.86, 0.85, 0.82, 0.80]


def test_the_page_shows_the_record():
    page = PAGE.read_text(encoding="utf-8")
    assert set(places(page)) == set(parts())
    assert page == filled(page, parts()), "run python -m benchmarks.machine_code --on-record"


def test_the_record_is_of_these_kernels():
    """It has their tiles, and registers as in resources.json.

    To update it, run python -m benchmarks.machine_code --write.
    """
    resources, table, record = (
        json.loads(path.read_text(encoding="utf-8")) for path in (RESOURCES, TABLE, RECORD)
    )
    assert record["triton"] == resources["triton"]
    for name, row in record["kernels"].items():
        assert name in resources["sm_90"], name
        for figure in ("registers", "spilled", "shared", "programs"):
            assert row[figure] == resources["sm_90"][name][figure], (name, figure)
    tiles = [
        {key: value for key, value in row.items() if key not in ("bits", "size")}
        for rows in table["sm_90"].values()
        for row in rows
    ]
    assert all(row["tile"] in tiles for row in record["kernels"].values())


def test_proposed_rows_are_rows_of_the_table_with_other_options():
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    for architecture, kernels in read(PROPOSED).items():
        for kernel, rows in kernels.items():
            for row in rows:
                present = next(
                    known
                    for known in table[architecture][kernel]
                    if (known["bits"], known["size"]) == (row["bits"], row["size"])
                )
                options = {key: value for key, value in row.items() if key != "predicted_ratio"}
                assert options != present and row["predicted_ratio"] > 0
                assert options.keys() ^ present.keys() <= {"maxnreg"}
