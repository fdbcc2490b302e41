"""The checker finds kernels that are wrong in one way each, and says which kernel it is."""

import os
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip(
        "needs TRITON_INTERPRET=1, which tests/conftest.py sets where there is no GPU",
        allow_module_level=True,
    )

import triton

from fastbert_kernels.checker.cases import carry_out
from tests import wrong_kernels
from tests.right_kernels import BLOCK_POINTERS, RIGHT, ROUNDING, WAITING
from tests.wrong_kernels import WRONG

SLOW = {  # each takes a second or two, and others are of the same kind
    "reads what another program writes",
    "counts, but does not wait",
    "first one clears",
    "one lane after the other",
    "no maximum",
    "read past the end",
    "offset of 32 bits",
    "waits for the last program",
    "rounded too early",
    "all store",
    "unlocks too early",
    "gradient by another row",
    "transposed",
    "tail of the next row",
    "sum of 16 bits",
    "gradient summed in 16 bits by torch",
    "turns that order nothing",
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in WRONG]
)
def test_a_wrong_kernel_is_found_and_named(name):
    wrong = WRONG[name]
    report = carry_out(wrong.check)
    found = [f for f in report.findings if f.kind == wrong.kind and f.kernel == wrong.kernel]
    found = [f for f in found if f.tensor == wrong.tensor or not wrong.tensor]
    assert found, f"expected {wrong.kind} of {wrong.kernel}, got\n{report}"
    for finding in found:
        if finding.kernel and finding.kind != "grid":  # whose line is that of the launch
            file, _, line = finding.line.rpartition(":")
            assert file == "tests/wrong_kernels.py", finding
            source = Path(wrong_kernels.__file__).read_text(encoding="utf-8").splitlines()
            above = [text for text in source[: int(line)] if text.startswith("def ")]
            assert above[-1].startswith(f"def {finding.kernel}("), finding


def test_there_is_a_wrong_kernel_of_every_kind_that_the_docs_list():
    page = (Path(__file__).parents[1] / "docs/checker.md").read_text(encoding="utf-8")
    table = page.partition("| kind | what it means |\n|---|---|\n")[2].partition("\n\n")[0]
    listed = {row.split("|")[1].strip() for row in table.splitlines()}
    listed.remove("does not compile, shared memory, spilled registers")  # by --compile alone
    kinds = {wrong.kind for wrong in WRONG.values()}
    assert {"lint ..." if kind.startswith("lint ") else kind for kind in kinds} == listed


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) if n == "sums of many rows" else n for n in RIGHT],
)
def test_nothing_is_found_in_a_right_kernel(name):
    report = carry_out(RIGHT[name])
    assert not report.findings, str(report)
    assert all(case.launches and case.errors for case in report.cases)


def test_block_pointers_run_until_triton_removes_them():

    report = carry_out(BLOCK_POINTERS)
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9):
        assert not report.findings, str(report)
    else:
        (fault,) = report.findings
        assert (fault.kind, fault.kernel) == ("exception", "block_pointer_kernel")
        assert "Block pointers have been removed" in fault.message


@pytest.mark.slow
@pytest.mark.parametrize("name", ROUNDING)
def test_sums_in_the_order_of_the_programs_are_a_note(name):
    report = carry_out(ROUNDING[name])
    assert not report.faults, str(report)
    assert {finding.kind for finding in report.notes} == {"order of programs"}


@pytest.mark.parametrize("name", WAITING)
def test_programs_that_wait_for_those_before_them_are_a_note(name):
    report = carry_out(WAITING[name])
    assert not report.faults, str(report)
    assert {finding.kind for finding in report.notes} == {"deadlock"}
