"""The faults of `make mutants` can still be planted, and each is detected or not as expected."""

from __future__ import annotations

import pytest

from tests import mutants
from tests.mutants import FAULTS, ROOT, TESTS, Fault, copy_of_the_checkout, plant


def test_every_fault_can_be_planted():
    """A change to a line with a fault must choose another fault."""
    for fault in FAULTS:
        text = (ROOT / fault.file).read_text(encoding="utf-8")
        assert text.count(fault.before) == 1 and fault.before != fault.after, fault
    assert len(set(FAULTS)) == len(FAULTS)
    for name in ("CONTRIBUTING.md", "Makefile"):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert f"{len(FAULTS)} faults" in text, f"{name} says another number of faults"


def test_every_fault_has_tests():
    assert {fault.file for fault in FAULTS} == set(TESTS)
    names = {name for names in TESTS.values() for name in names}
    assert not [name for name in names if not (ROOT / f"tests/{name}.py").exists()]


@pytest.mark.slow
def test_a_fault_is_noticed_and_an_equal_program_is_not(tmp_path, monkeypatch):
    """The copy is tested and restored, not the checkout."""
    monkeypatch.setattr(mutants, "TESTS", {mutants.SCHEDULE: ["test_schedule"]})
    copy = copy_of_the_checkout(tmp_path)
    before = (copy / mutants.SCHEDULE).read_bytes()
    fault = Fault(mutants.SCHEDULE, "return share / schedule.warmup", "return share")
    outcome = plant(fault, copy)
    assert outcome.noticed and outcome.by.startswith("tests/test_schedule.py::")
    equal = Fault(
        mutants.SCHEDULE, "return share / schedule.warmup", "return (share) / schedule.warmup"
    )
    assert not plant(equal, copy).noticed
    assert (copy / mutants.SCHEDULE).read_bytes() == before
