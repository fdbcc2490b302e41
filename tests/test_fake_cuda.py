"""The path of a step on a device that does not exist: see `tests/fake_cuda.py`."""

from __future__ import annotations

import pytest

from tests.tiers import slow
from tests.uninterpreted import run_module


@pytest.mark.parametrize("options", [["--short"], slow([])])
def test_a_step_stays_on_its_device_and_never_waits_for_it(options):
    result = run_module("tests.fake_cuda", *options)
    assert result.returncode == 0, result.stderr
    assert "launches on fake CUDA tensors" in result.stdout
