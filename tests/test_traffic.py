"""Compare the bytes that the Triton kernels move with the minimum.

A gate fails if it moves too much, too little, or not what was predicted.
"""

from __future__ import annotations

import dataclasses
import json
import os

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip(
        "needs TRITON_INTERPRET=1, which tests/conftest.py sets where there is no GPU",
        allow_module_level=True,
    )

from benchmarks.kernels import traffic
from benchmarks.kernels.cases import Case
from benchmarks.kernels.traffic import GATES, Count, Gate, Work, faults, measure, table
from fastbert_kernels._tiles import chosen_by
from fastbert_kernels.specs import SPECS
from tests.tiers import slow

# They move the most bytes.
LARGE = (
    *("add_norm", "geglu", "embedding"),
    *("attention general p=0.1 bfloat16", "attention window p=0.1 bfloat16"),
)


@pytest.mark.parametrize(
    "gate",
    [slow(gate) if str(gate).startswith(LARGE) else gate for gate in GATES],
    ids=str,
)
def test_kernels_move_no_more_than_they_must(gate):
    result = measure(gate)
    print(table([result]))
    assert not faults(result), f"{faults(result)}\n{table([result])}"


def test_every_operation_has_a_gate():
    assert {gate.case.operation for gate in GATES} == set(SPECS)


def test_programs_that_each_read_the_vectors_for_a_few_rows_are_found():
    gate = Gate(Case("norm", "", {"T": 64, "D": 256}, 0.1), torch.bfloat16, 1.05)
    with chosen_by(lambda kernel, row: {**row, "BLOCK_T": 1, "programs": 64}):
        (fault,) = faults(measure(gate))
    assert fault.startswith(f"{gate}: 2.") and fault.endswith(
        " times the least bytes of its spec; must be at most 1.05"
    )


def test_what_is_a_fault():
    gate = traffic.attention("", [40, 27], 0.1, limit=1.01, H=1)
    good = measure(gate)
    assert faults(good) == []
    forward, backward = good.counts
    name, need = forward.kernel, good.predicted[forward.kernel].bytes

    def with_counts(*counts: Count) -> list[str]:
        return faults(dataclasses.replace(good, counts=list(counts)))

    assert with_counts(dataclasses.replace(forward, loaded=forward.loaded + 2), backward) == [
        f"{gate}: {name} moves {need + 2:,} bytes ({1 + 2 / need:.4f} times); its tiles need "
        f"{need:,}"
    ]
    assert with_counts(forward, dataclasses.replace(backward, flops=1)) == [
        f"{gate}: {backward.kernel} computes 1 FLOP; its tiles have {backward.flops:,}"
    ]
    assert faults(dataclasses.replace(good, least=2 * good.least)) == [
        f"{gate}: {good.ratio / 2:.4f} times the least bytes of its spec, which states too many"
    ]
    missing = faults(dataclasses.replace(good, predicted={**good.predicted, "_third": Work(1, 2)}))
    assert missing == [
        f"{gate}: _third moves 0 bytes (0.0000 times); its tiles need 1",
        f"{gate}: _third computes 0 FLOP; its tiles have 2",
    ]
    unforeseen = faults(dataclasses.replace(good, predicted={name: good.predicted[name]}))
    assert unforeseen == [
        f"{gate}: {backward.kernel} moves {backward.bytes:,} bytes, which no prediction covers"
    ]


def test_the_command_ends_with_1_and_names_the_fault(monkeypatch, capsys):
    good = traffic.attention("small", [20, 7], 0.1, K=16, H=1)
    monkeypatch.setattr(traffic, "GATES", (good, good._replace(limit=0.5)))
    monkeypatch.setattr("sys.argv", ["traffic", "--json"])
    assert traffic.main() == 1
    printed = capsys.readouterr()
    records = [json.loads(line) for line in printed.out.splitlines()]
    assert [record["case"] for record in records] == ["attention small p=0.1 bfloat16"] * 2
    moved = sum(kernel["loaded"] + kernel["stored"] for kernel in records[0]["kernels"])
    assert records[0]["ratio"] == moved / records[0]["least_bytes"]
    assert (
        printed.err.startswith("FAULT attention small p=0.1 bfloat16: 1.")
        and "must be at most 0.5" in printed.err
    )
