"""The choice between fp32 and bf16, and what bf16 means on a CPU."""

from __future__ import annotations

import json

import pytest
import torch

from fastbert.cluster.group import join
from fastbert.errors import InputError
from fastbert.machine import Bf16Probe, probe_bf16
from fastbert.training.precision import Precision, resolve_precision
from tests.ranks import Ranks

LARGE = 1 << 40
PAYS, SLOW = Bf16Probe(True, 2.0, "twice as fast"), Bf16Probe(True, 1.2, "a little faster")
SLOWER, WRONG = Bf16Probe(True, 0.5, "half as fast"), Bf16Probe(False, 0.0, "SIGILL")


def resolve(asked, probe, before="auto", kernels="cpu", largest=LARGE) -> Precision:
    with join(10) as group:
        return resolve_precision(asked, before, kernels, largest, group, "demo.toml", lambda: probe)


@pytest.mark.parametrize(
    "asked, probe, before, expected, why",
    [
        ("fp32", PAYS, "auto", "fp32", "the recipe says so"),
        ("fp32", PAYS, "bf16", "fp32", "the recipe says so"),
        ("auto", PAYS, "auto", "bf16", "twice as fast"),
        ("auto", SLOW, "auto", "fp32", "a little faster"),
        ("auto", WRONG, "auto", "fp32", "SIGILL"),
        ("bf16", SLOW, "auto", "bf16", "the recipe says so"),
        ("bf16", SLOW, "fp32", "bf16", "the recipe says so"),
        # A run that is resumed keeps what was measured, where that is possible at all.
        ("auto", PAYS, "fp32", "fp32", "as before"),
        ("auto", SLOW, "bf16", "bf16", "as before"),
        ("auto", SLOWER, "bf16", "fp32", "half as fast"),
        ("auto", WRONG, "bf16", "fp32", "SIGILL"),
    ],
)
def test_what_a_processor_gets(asked, probe, before, expected, why):
    found = resolve(asked, probe, before)
    assert (found.name, found.why) == (expected, why)
    assert found.parameters == "fp32"
    assert found.operands == (torch.bfloat16 if expected == "bf16" else None)


def test_a_model_of_small_products_is_not_probed():
    found = resolve("auto", None, largest=(1 << 22) - 1)
    assert (found.name, found.why) == (
        "fp32",
        "the model's products are too small to gain from bf16",
    )


@pytest.mark.parametrize(
    "probe, kernels, why",
    [
        (WRONG, "cpu", "SIGILL"),
        (
            PAYS,
            "triton",
            'runtime.kernels = "triton" on a CPU: Triton\'s interpreter computes bf16 wrongly',
        ),
    ],
)
def test_bf16_where_it_cannot_be_had_is_refused(probe, kernels, why):
    with pytest.raises(InputError) as error:
        resolve("bf16", probe, kernels=kernels)
    assert str(error.value) == (
        f'demo.toml: runtime.precision = "bf16": {why}; use "fp32" or "auto"'
    )
    assert resolve("auto", probe, kernels=kernels).name == "fp32"


class Gathered:
    """A group of ranks that chose as given; rank 0 is the caller."""

    device = torch.device("cpu")

    def __init__(self, *others):
        self.others = others

    def raise_on_all_ranks(self):
        return join(10)  # of one process, where nothing is to be raised elsewhere

    def gather(self, own):
        return json.loads(json.dumps([own, *self.others]))


@pytest.mark.parametrize("own", [PAYS, SLOW])
def test_one_rank_in_fp32_is_enough(own):
    group = Gathered(("bf16", "twice as fast"), ("fp32", "a slow rank"))
    found = resolve_precision("auto", "auto", "cpu", LARGE, group, "demo.toml", lambda: own)  # type: ignore[arg-type]
    assert found.name == "fp32"
    assert found.why == ("rank 2: a slow rank" if own is PAYS else "a little faster")


@pytest.mark.slow  # the default tier trains in bf16 where the probe says so (test_engine.py)
def test_bf16_is_measured_where_the_processor_has_it():
    """Torch reads the processor's own registers, and the probe the list of the Linux kernel."""
    has = {name for name, value in torch.cpu.get_capabilities().items() if value}
    probe = probe_bf16()
    if has & {"avx512_bf16", "amx_bf16", "bf16", "arm_bf16"}:
        assert probe.gain > 0 if probe.right else probe.gain == 0
    else:
        assert probe == Bf16Probe(True, 0.0, "the processor has no bf16 instructions")


def test_bf16_in_the_interpreter_leaves_no_folder(tmp_path, small_dataset):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f'data = "{small_dataset.path}"\nrun = "{tmp_path}/run"\n'
        '[model]\npreset = "tiny"\n[runtime]\nkernels = "triton"\nprecision = "bf16"\n'
        "[stop]\nsteps = 1\n"
    )
    with Ranks(["pretrain", str(recipe)], tmp_path, TRITON_INTERPRET="1") as ranks:
        assert ranks.wait() == [2]
        (line,) = ranks.errors.splitlines()
    assert f'{recipe}: runtime.precision = "bf16": runtime.kernels = "triton" on a CPU' in line
    assert not (tmp_path / "run").exists()
