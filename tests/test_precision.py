"""The choice between fp32 and bf16."""

from __future__ import annotations

import pytest
import torch

from fastbert.errors import InputError
from fastbert.machine import Bf16Probe, probe_bf16
from fastbert.training.precision import resolve_precision
from tests.ranks import Ranks

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "asked, safe, faster, expected",
    [
        ("fp32", True, True, "fp32"),
        ("auto", True, True, "fp32"),
        ("auto", False, False, "fp32"),
        ("bf16", True, False, "bf16"),
    ],
)
def test_what_a_processor_gets(asked, safe, faster, expected):
    precision, why = resolve_precision(
        asked, CPU, "demo.toml", lambda: Bf16Probe(safe, faster, "the reason")
    )
    assert precision == expected
    assert why == ("the default on a CPU" if asked == "auto" else "the recipe says so")


def test_bf16_where_it_kills_the_process():
    with pytest.raises(InputError) as error:
        resolve_precision(
            "bf16",
            CPU,
            "demo.toml",
            lambda: Bf16Probe(False, False, "a bf16 product kills the process"),
        )
    assert (
        str(error.value)
        == 'demo.toml: runtime.precision = "bf16": a bf16 product kills the process; use "fp32" or '
        '"auto"'
    )


@pytest.mark.slow  # the default tier trains in bf16 where the probe says so (test_engine.py)
def test_this_processor():
    """The probe does no harm on any processor, and a precision that it calls safe works."""
    if probe_bf16().safe:
        assert resolve_precision("bf16", CPU, "demo.toml") == ("bf16", "the recipe says so")
    else:
        with pytest.raises(InputError, match=r"demo\.toml: runtime\.precision"):
            resolve_precision("bf16", CPU, "demo.toml")


def test_bf16_in_the_interpreter_is_refused(tmp_path, small_dataset):
    """Its products would be wrong, so nothing is trained and no folder is created."""
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f'data = "{small_dataset.path}"\nrun = "{tmp_path}/run"\n'
        '[model]\npreset = "tiny"\n[runtime]\nkernels = "triton"\nprecision = "bf16"\n'
        "[stop]\nsteps = 1\n"
    )
    with Ranks(["pretrain", str(recipe)], tmp_path, TRITON_INTERPRET="1") as ranks:
        assert ranks.wait() == [2]
        (line,) = ranks.errors.splitlines()
    assert f'{recipe}: runtime.kernels = "triton" on a CPU, with runtime.precision = "bf16"' in line
    assert not (tmp_path / "run").exists()
