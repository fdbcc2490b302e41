"""A prepared launch uses the kernel that Triton would launch, and its cache is bounded."""

from __future__ import annotations

import pytest
import torch

from fastbert_kernels import _launch
from fastbert_kernels._launch import Kernel
from fastbert_kernels._tiles import chosen_by
from fastbert_kernels.gelu import kernel as gelu_kernel
from fastbert_kernels.specs import SPECS
from tests.test_kernel_properties import inputs, tensors
from tests.test_kernels import GPU, watched
from tests.uninterpreted import run_module

X = torch.ones(3, 32, device="cuda" if GPU else "cpu")


@pytest.mark.skipif(GPU, reason="the driver that launches nothing takes tensors of the CPU")
@pytest.mark.slow
def test_a_prepared_kernel_is_the_one_that_triton_finds():
    """This runs without the interpreter, which compiles nothing."""
    result = run_module("tests.launched_twice")
    assert result.returncode == 0, result.stdout + result.stderr
    compared, direct = map(int, result.stdout.split())
    assert direct > compared / 4


def test_what_is_kept_is_bounded():
    kernel = Kernel(gelu_kernel._forward_kernel, "gelu_forward")
    for stride in range(3 * _launch._MOST):
        kernel.prepare(X, 32, (), stride)
        assert len(kernel._prepared) <= _launch._MOST
    assert kernel.prepare(X, 32, (), stride) is kernel.prepare(X, 32, (), stride)


def test_while_tiles_are_tuned_nothing_is_kept():
    kernel = Kernel(gelu_kernel._forward_kernel, "gelu_forward")
    usual = kernel.prepare(X, 32, (), 32)
    for warps in (1, 2):
        with chosen_by(lambda name, row, warps=warps: {**row, "num_warps": warps}):
            assert kernel.prepare(X, 32, (), 32).tile["num_warps"] == warps
    assert kernel.prepare(X, 32, (), 32) is usual


@pytest.mark.parametrize("name", SPECS)
def test_a_good_call_does_not_excuse_a_bad_one(name):
    """Make a good call, then a bad one for each argument, then the good call again."""
    spec, good = SPECS[name], inputs(name)

    def call(**changes: object) -> None:
        with watched("triton"), torch.no_grad():
            spec.function(**{**good, **changes}, impl="triton")

    call()
    for key, value in tensors(good).items():
        with pytest.raises(TypeError, match=f": {key} is int8"):
            call(**{key: value.to(torch.int8)})
        with pytest.raises(ValueError, match=r": \w+ is on meta|the other tensors on meta"):
            call(**{key: value.to("meta")})
        if value.shape[-1] > 1:
            apart = torch.stack((value, value), -1).flatten(-2)[..., ::2]
            assert apart.shape == value.shape
            with pytest.raises(ValueError, match=rf": {key} has stride 2 along its last axis"):
                call(**{key: apart})
    if "dropout_seeds" in good:
        with pytest.raises(ValueError, match="needs dropout_seeds"):
            call(dropout_seeds=None)
    call()
