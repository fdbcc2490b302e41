"""The path of a step on a device that does not exist: see `tests/fake_cuda.py`."""

from __future__ import annotations

from tests.uninterpreted import run_module


def test_a_step_stays_on_its_device_and_never_waits_for_it():
    result = run_module("tests.fake_cuda")
    assert result.returncode == 0, result.stderr
    assert "launches on fake CUDA tensors" in result.stdout
