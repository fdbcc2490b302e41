"""What a new user meets first: defaults, optional arguments, messages, and the example."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import torch

import fastbert_kernels
from fastbert.config import BertConfig
from fastbert.errors import InputError
from fastbert.models.bert import BertForPreTraining
from fastbert_kernels import (
    _checks,
    _linear,
    add_layer_norm,
    bias_geglu,
    bias_gelu,
    dropout_add_layer_norm,
    embedding_layer_norm,
    layer_norm,
    masked_cross_entropy,
    varlen_attention,
)
from fastbert_kernels._checks import chosen_implementation
from fastbert_kernels.specs import SPECS

README = Path(__file__).parents[1] / "kernels/README.md"
NORM = {"norm_weight": torch.rand(16), "norm_bias": torch.rand(16)}


def test_dir_shows_the_public_names_and_no_others():
    shown = [name for name in dir(fastbert_kernels) if not name.startswith("__")]
    assert shown == sorted(fastbert_kernels.__all__)
    hidden = [name for name in shown if not callable(getattr(fastbert_kernels, name))]
    assert not hidden, "a folder of the same name hides the function; rename the folder"


def test_the_example_of_the_readme_runs(capsys):
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    names: dict = {}
    exec(example, names)
    assert names["qkv"].grad.isfinite().all() and names["qkv"].grad.any()
    assert len(example.splitlines()) <= 15


@pytest.mark.parametrize("name", SPECS)
def test_auto_is_the_default_and_cpu_on_a_cpu(name):
    """Results equal those of the CPU implementation bit for bit; the reference's do not."""
    spec = SPECS[name]
    assert inspect.signature(spec.function).parameters["impl"].default == "auto"
    arguments = spec.inputs(spec.shapes[2], torch.float32, 0.1)
    found, wanted = spec.function(**arguments), spec.function(**arguments, impl="cpu")
    for one, other in zip(
        found if isinstance(found, tuple) else (found,),
        wanted if isinstance(wanted, tuple) else (wanted,),
        strict=True,
    ):
        assert torch.equal(one, other)


class On:
    """The attributes of a tensor that the choice of an implementation reads."""

    def __init__(self, device: str):
        self.device = torch.device(device)
        self.is_cpu, self.is_cuda = self.device.type == "cpu", self.device.type == "cuda"


def test_auto_is_triton_on_a_gpu_or_one_line(monkeypatch):
    offered = dict.fromkeys(("triton", "cpu", "reference"))
    assert chosen_implementation("f", "auto", offered, On("cuda:1")) == "triton"
    assert chosen_implementation("f", "auto", offered, On("cpu")) == "cpu"
    assert chosen_implementation("f", "reference", offered, On("cuda:1")) == "reference"
    with pytest.raises(ValueError, match='"auto" is for cpu and cuda, and the tensors are on meta'):
        chosen_implementation("f", "auto", offered, On("meta"))
    monkeypatch.setattr(_checks, "_HAS_TRITON", False)
    with pytest.raises(ImportError) as error:
        chosen_implementation("f", "auto", offered, On("cuda:1"))
    assert str(error.value) == (
        'f: impl = "auto" needs Triton 3.6 or newer on cuda:1: '
        'pip install triton, or use impl = "reference"'
    )


CALLS = {  # an operation and its tensors, of which the named one may be missing
    "mlm": (
        lambda impl, bias: masked_cross_entropy(
            torch.ones(5, 16).requires_grad_(),
            torch.arange(128.0).view(8, 16) / 128,
            bias,
            None,
            torch.tensor([0, 7, 3, -100, 1]),
            impl=impl,
        )[0],
        8,
    ),
    "gelu": (lambda impl, bias: bias_gelu(torch.ones(5, 16).requires_grad_(), bias, impl=impl), 16),
    "geglu": (
        lambda impl, bias: bias_geglu(torch.ones(5, 16).requires_grad_(), bias, impl=impl),
        16,
    ),
    "layer_norm": (
        lambda impl, bias: layer_norm(
            torch.arange(80.0).view(5, 16).requires_grad_(), NORM["norm_weight"], bias, impl=impl
        ),
        16,
    ),
    "norm": (
        lambda impl, bias: dropout_add_layer_norm(
            torch.arange(80.0).view(5, 16).requires_grad_(),
            None,
            None,
            NORM["norm_weight"],
            bias,
            impl=impl,
        ),
        16,
    ),
    "add_norm": (
        lambda impl, bias: add_layer_norm(
            torch.arange(80.0).view(5, 16).requires_grad_(),
            None,
            torch.ones(5, 16),
            NORM["norm_weight"],
            bias,
            impl=impl,
        )[0],
        16,
    ),
    "embedding": (
        lambda impl, bias: embedding_layer_norm(
            *(torch.zeros(5, dtype=torch.int64) for _ in range(3)),
            *(torch.arange(16.0).view(1, 16).requires_grad_() for _ in range(3)),
            NORM["norm_weight"],
            bias,
            impl=impl,
        ),
        16,
    ),
}


@pytest.mark.parametrize("impl", ["triton", "cpu", "reference"])
@pytest.mark.parametrize("name", CALLS)
def test_no_bias_is_a_bias_of_zeros(name, impl):
    function, size = CALLS[name]
    found, wanted = function(impl, None), function(impl, torch.zeros(size))
    assert torch.equal(found, wanted)
    found.sum().backward()


def test_a_bad_label_is_told_about_the_label_to_ignore():
    hidden, weight = torch.randn(3, 16), torch.randn(8, 16)
    with pytest.raises(ValueError) as error:
        masked_cross_entropy(hidden, weight, None, None, torch.tensor([2, -1, -100]))
    assert str(error.value) == (
        "masked_cross_entropy: labels span -1 to 2; "
        "must be in [0, V = 8), or -100 for a token to ignore"
    )


def test_dropout_without_seeds_says_how_to_make_them():
    q = torch.randn(5, 2, 16)
    bounds = torch.tensor([0, 3, 5], dtype=torch.int32)
    with pytest.raises(ValueError) as error:
        varlen_attention(q, q, q, bounds, 3, dropout_p=0.1)
    (how,) = re.findall(r"torch\.randint\(.*\)", str(error.value))
    seeds = eval(how)
    varlen_attention(q, q, q, bounds, 3, dropout_p=0.1, dropout_seeds=seeds)


def test_head_sizes_that_triton_does_not_take():
    """They get one line, also where the model is built; the advised padding with zeros works."""
    bounds = torch.tensor([0, 3, 5], dtype=torch.int32)
    for size in (8, 24, 40, 56, 136, 256):
        q, k, v = torch.randn(3, 5, 2, size)
        with pytest.raises(ValueError) as error:
            varlen_attention(q, k, v, bounds, 3, impl="triton")
        assert f"head size K = {size};" in str(error.value)
        assert "takes 16, 32, 48, 64, 80, 96, 112, 128;" in str(error.value)
        assert "\n" not in str(error.value)
        config = BertConfig(
            hidden_size=2 * size, num_attention_heads=2, num_hidden_layers=1, intermediate_size=32
        )
        with pytest.raises(InputError, match=f"num_attention_heads = {size};"):
            BertForPreTraining(config, 100, "triton", "cuda")
        BertForPreTraining(config, 100, "reference", "cuda")
    q, k, v = torch.randn(3, 5, 2, 24)
    padded = (torch.nn.functional.pad(x, (0, 8)) for x in (q, k, v))
    found = varlen_attention(*padded, bounds, 3, scale=24**-0.5, impl="triton")[..., :24]
    wanted = varlen_attention(q, k, v, bounds, 3, impl="reference")
    torch.testing.assert_close(found, wanted)


def test_a_linear_layer_refuses_a_second_derivative():
    x, weight = torch.randn(20, 16, requires_grad=True), torch.randn(8, 16, requires_grad=True)
    loss = _linear._Rounded.apply(x, weight, None, torch.nn.functional.linear).sum()
    with pytest.raises(RuntimeError, match="Rounded: create_graph=True"):
        torch.autograd.grad(loss, [x, weight], create_graph=True)
    loss.backward()  # the first derivative is there
    assert weight.grad is not None and weight.grad.any()
