"""Compile a form of every kernel for three GPUs.

No GPU is needed. The tests check what fits, what spills, and how wide loads are. sm_90 has the hard
rules. The whole table of all forms takes minutes, and is made by hand.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from benchmarks.compiled import ahead_of_time
from benchmarks.compiled.ahead_of_time import (
    Figures,
    changes,
    faults,
    recorded_table,
)
from benchmarks.compiled.signatures import training_calls
from fastbert_kernels.checker.machine_code import DEVICES, UNTRACED, global_loads, programs
from fastbert_kernels.specs import SPECS
from tests.uninterpreted import run_module

ROOT = Path(__file__).parents[1]

GOOD = Figures(
    name="norm._forward bf16 768",
    architecture="sm_90",
    kernel="_forward",
    table="norm_forward",
    dtype="bf16",
    size=768,
    wide=("x_ptr",),
    registers=64,
    shared=4096,
    programs=8,
    widths={"x_ptr": 128, "ids_ptr": 64},
)
RECORD = {"triton": "3.7.1", "sm_90": {GOOD.name: GOOD.recorded}}


def with_figures(**figures) -> list[Figures]:
    return [dataclasses.replace(GOOD, **figures)]


@pytest.mark.slow
def test_one_form_of_each_kernel_is_no_worse_than_on_record():
    """This is the form that does most. A kernel that is changed changes it, so it is noticed.

    test_launches.py makes machine code for sm_80.
    """
    architectures = [name for name in DEVICES if name != "sm_80"]
    result = run_module(
        *("benchmarks.compiled.ahead_of_time", "--architecture", *architectures),
        *("--one-form", "--json"),
    )
    assert result.returncode == 0, result.stderr
    compiled = [json.loads(line) for line in result.stdout.splitlines()]
    record = json.loads(ahead_of_time.RECORD.read_text(encoding="utf-8"))
    for architecture in architectures:
        found = {one["name"].split()[0] for one in compiled if one["architecture"] == architecture}
        assert found == {name.split()[0] for name in record[architecture]}


def test_every_operation_is_compiled_as_training_calls_it():
    assert {case.operation for case in training_calls()} == set(SPECS)


def test_signatures_are_those_that_triton_compiles_for():
    result = run_module("tests.triton_signatures")
    assert result.returncode == 0, result.stderr
    counts, *differences = result.stdout.splitlines()
    asked, recorded = map(int, counts.split())
    assert asked == recorded > 70 and not differences, result.stdout


def test_the_record_can_be_shown_without_compiling():
    record = json.loads(ahead_of_time.RECORD.read_text(encoding="utf-8"))
    shown = recorded_table(record).splitlines()
    for architecture in DEVICES:
        for name, figures in record[architecture].items():
            assert any(
                line.startswith(name) and line.split()[-1] == str(figures["programs"])
                for line in shown
            )


@pytest.mark.slow
def test_planted_faults_are_found():
    result = run_module("tests.planted_kernels")
    assert result.returncode == 0, result.stderr
    spilling, *rest = result.stdout.splitlines()
    assert spilling.startswith("sm_90 spilling: ") and spilling.endswith(
        " bytes of spilled registers a thread; must be 0"
    )
    assert rest == [
        # There is no fault for the table, nor for the indices.
        "sm_90 narrow: a load through x_ptr is 16 bits wide; must be 128",
        "sm_90 unread: no load through y_ptr found, which its `Kernel` calls wide",
        "sm_90 misnamed: does not compile: ValueError: the kernel has no argument stride",
    ]


def test_hard_rules():
    assert faults([GOOD]) == []
    assert faults(with_figures(shared=233_000)) == [
        f"sm_90 {GOOD.name}: 233000 bytes of shared memory; a program may have 232448"
    ]
    assert faults(with_figures(programs=0)) == [
        f"sm_90 {GOOD.name}: not one program fits: 64 registers a thread"
    ]
    assert faults(with_figures(widths={"x_ptr": 128, UNTRACED: 32})) == [
        f"sm_90 {GOOD.name}: a load of 32 bits cannot be traced to its argument, "
        "which may be a wide one"
    ]
    # On other devices spills and narrow loads are recorded, but are no fault.
    assert faults(with_figures(architecture="sm_80", spilled=16, widths={})) == []


def test_changes_against_the_record():
    assert changes([GOOD], RECORD) == ([], [])
    # This is within the margin.
    assert changes(with_figures(registers=96, spilled=64, shared=5120, programs=7), RECORD) == (
        [],
        [],
    )
    where = f"sm_90 {GOOD.name}"
    assert changes(with_figures(registers=100, spilled=72, shared=9000, programs=5), RECORD) == (
        [
            f"{where}: registers 64 on record, now 100 (+36)",
            f"{where}: spilled 0 on record, now 72 (+72)",
            f"{where}: shared 4096 on record, now 9000 (+4904)",
            f"{where}: programs 8 on record, now 5 (-3)",
        ],
        [],
    )
    assert changes(with_figures(registers=24, programs=12), RECORD) == (
        [],
        [
            f"{where}: registers 64 on record, now 24 (-40)",
            f"{where}: programs 8 on record, now 12 (+4)",
        ],
    )
    assert changes(with_figures(name="norm._new"), RECORD) == (
        ["sm_90 norm._new: not on record", f"{where}: on record, but training does not launch it"],
        [],
    )


def test_programs_side_by_side():
    """Compare with NVIDIA's occupancy calculator and the occupancy in the output of AMD's compiler.

    AMD's figure is in waves per SIMD (5 with 92 registers).
    """
    h100, mi300 = DEVICES["sm_90"], DEVICES["gfx942"]
    assert programs(h100, registers=32, shared=0, warps=4, tensor_columns=0) == 16  # of 64 warps
    # 512 // 168 = 3 warps on each scheduler.
    assert programs(h100, registers=168, shared=0, warps=4, tensor_columns=0) == 3
    assert programs(h100, registers=255, shared=0, warps=16, tensor_columns=0) == 0
    assert programs(h100, registers=32, shared=100 << 10, warps=4, tensor_columns=0) == 2
    assert programs(h100, registers=16, shared=0, warps=1, tensor_columns=0) == 32
    assert programs(DEVICES["sm_100"], registers=32, shared=0, warps=4, tensor_columns=256) == 2
    assert programs(mi300, registers=92, shared=0, warps=4, tensor_columns=0) == 5
    assert programs(mi300, registers=92, shared=33 << 10, warps=4, tensor_columns=0) == 1


def test_loads_are_traced_to_their_arguments_through_loops_and_asynchronous_copies():
    ptx = """
    ld.param.b64 %rd1, [k_param_0];
    ld.param.b64 %rd2, [k_param_1];
    ld.param.b32 %r1, [k_param_2];
    @%p1 ld.global.b64 { %rd3 }, [ %rd1 + 0 ];
    mad.lo.s64 %rd4, %rd3, 768, %rd2;
    mov.b64 %rd5, %rd4;
    cp.async.cg.shared.global [ %r9 + 0 ], [ %rd5 + 0 ], 0x10, %r1;
    cp.async.commit_group;
    add.s64 %rd5, %rd5, 64;
    ld.global.L1::evict_first.v4.b32 { %r2, %r3, %r4, %r5 }, [ %rd5 + 16 ];
    st.global.b64 [ %rd1 + 0 ], { %rd5 };"""
    assert global_loads(ptx) == {5: {0}, 8: {1}, 11: {1}}
