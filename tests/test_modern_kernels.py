"""What the tests over SPECS do not cover of the operations of ModernBERT.

They are compared with the layers of transformers and with torch's own functions.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from fastbert_kernels import bias_geglu
from fastbert_kernels.gelu import kernel as gelu_kernel
from tests.test_kernels import GPU, fresh_memory_is_nan, place, watched
from tests.test_kernels import (
    test_agrees_with_the_reference_in_fp64 as agrees,
)  # by another name, not to be collected again

__all__ = ["fresh_memory_is_nan"]  # used by every test
IMPLEMENTATIONS = ["triton", "cpu", "reference"]


def device(impl: str) -> str:
    return "cuda" if GPU and impl == "triton" else "cpu"


def config(**more):
    transformers = pytest.importorskip("transformers")
    small = {"vocab_size": 50, "hidden_size": 32, "num_attention_heads": 2, "pad_token_id": 0}
    return transformers.ModernBertConfig(**{"intermediate_size": 24, **small, **more})


# GeGLU


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_geglu_is_that_of_transformers(impl, bias):
    """Between the two matrices of its feed-forward sublayer; the gate is the second half."""
    settings = config(mlp_bias=bias)
    from transformers.models.modernbert.modeling_modernbert import ModernBertMLP

    torch.manual_seed(1)
    mlp = ModernBertMLP(settings)
    hidden = torch.randn(7, 32)
    x = functional.linear(hidden, mlp.Wi.weight).detach()
    with watched(impl):
        y = bias_geglu(**place({"x": x, "bias": mlp.Wi.bias}, device(impl)), impl=impl).cpu()
    torch.testing.assert_close(functional.linear(y, mlp.Wo.weight, mlp.Wo.bias), mlp(hidden))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("impl", ["triton", "cpu"])
def test_the_gradients_of_geglu_are_those_of_finite_differences(impl, bias):
    """By the difference quotient in fp64 of torch's own GELU."""
    torch.manual_seed(2)
    x, b = torch.randn(3, 10, dtype=torch.float64), torch.randn(10, dtype=torch.float64) * bias
    upstream, step = torch.randn(3, 5, dtype=torch.float64), 1e-6

    def loss(z: torch.Tensor) -> torch.Tensor:
        return (functional.gelu(z[:, :5]) * z[:, 5:] * upstream).sum()

    expected = torch.zeros_like(x)
    for index in range(x.numel()):
        shift = torch.zeros(x.numel(), dtype=torch.float64)
        shift[index] = step
        shift = shift.view(x.shape)
        expected.view(-1)[index] = (loss(x + b + shift) - loss(x + b - shift)) / (2 * step)
    given = place({"x": x.float(), "bias": b.float() if bias else None}, device(impl))
    leaves = [value.requires_grad_() for value in given.values() if value is not None]
    with watched(impl):
        bias_geglu(**given, impl=impl).backward(upstream.float().to(device(impl)))
    torch.testing.assert_close(leaves[0].grad.cpu(), expected.float())
    if bias:
        torch.testing.assert_close(leaves[1].grad.cpu(), expected.sum(0).float())


def test_programs_of_geglu_that_own_many_tiles(monkeypatch):
    monkeypatch.setattr(gelu_kernel, "multiprocessors", lambda device: 1)
    agrees("geglu", "triton", {"T": 150, "F": 150}, 0.0, "fp32")
