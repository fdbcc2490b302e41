"""fp32 or bf16."""

from __future__ import annotations

import pytest
import torch

from fastbert.errors import InputError
from fastbert.machine import Bf16Probe, probe_bf16
from fastbert.training.precision import resolve_precision

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
        == 'demo.toml: runtime.precision = "bf16": a bf16 product kills the process; use "fp32" or "auto"'
    )


def test_this_processor():
    """Whatever it is: the probe answers without harm, and what it calls safe may be asked for."""
    if probe_bf16().safe:
        assert resolve_precision("bf16", CPU, "demo.toml") == ("bf16", "the recipe says so")
    else:
        with pytest.raises(InputError, match=r"demo\.toml: runtime\.precision"):
            resolve_precision("bf16", CPU, "demo.toml")
