"""A layer as one function equals the layer that model.py composes of the same kernels.

Results are equal to the bit, and gradients to rounding.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import fastbert.models.bert as model_file
from fastbert.models.bert import BertForPreTraining, Layer
from fastbert.models.fused_layer import Call, fused_layer
from fastbert.models.heads import losses
from tests.random_batch import make_batch
from tests.random_model import build
from tests.test_kernels import GPU, watched
from tests.tiers import typical

DEVICE = "cuda" if GPU else "cpu"
LENGTHS = [9, 1 + 4, 20]


def two_layers(p: float, dtype: torch.dtype) -> BertForPreTraining:
    """Two layers, of which the last computes only some rows."""
    return build(p, heads=2).to(DEVICE, dtype)


def step(model: BertForPreTraining, impl: str, longest: int) -> dict[str, torch.Tensor]:
    """Return the losses of the tokens and every gradient."""
    model = copy.deepcopy(model)
    model.impl = impl
    batch = make_batch(LENGTHS).to(DEVICE)
    object.__setattr__(
        batch, "max_seqlen", longest
    )  # above 128 the general kernels of the attention run
    with watched(impl):
        found = losses(model(batch))
        found.loss.backward()
    return {"losses": found.token_losses} | {
        f"d{name}": p.grad for name, p in model.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize(
    ("p", "dtype", "longest"),
    typical(
        [(0.1, torch.bfloat16, 20), (0.0, torch.float32, 20), (0.1, torch.bfloat16, 200)],
        (0.1, torch.bfloat16, 20),
    ),
)
def test_it_is_the_composed_layer(p, dtype, longest, monkeypatch):
    model = two_layers(p, dtype)
    fused = step(model, "triton", longest)
    monkeypatch.setattr(model_file, "fused", lambda *_: False)
    composed, exact = step(model, "triton", longest), step(model.double(), "reference", longest)
    assert fused.keys() == composed.keys() == exact.keys()
    assert torch.equal(fused["losses"], composed["losses"])
    for name, truth in exact.items():
        errors = [float((x[name].double() - truth).abs().max()) for x in (fused, composed)]
        assert errors[0] <= 2 * errors[1] + torch.finfo(dtype).eps * float(truth.abs().max()), name


def test_under_autocast_the_layer_is_composed():
    """Autocast casts between the layer's operations."""
    model = two_layers(0.1, torch.float32)
    model.impl = "triton"
    with watched("triton"), torch.autocast(DEVICE, torch.bfloat16):
        losses(model(make_batch(LENGTHS).to(DEVICE))).loss.backward()
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}


def arguments(**changes: Any) -> tuple[torch.Tensor, Any, Call]:
    layer = two_layers(0.1, torch.float32).layers[0]
    assert isinstance(layer, Layer)
    batch = make_batch(LENGTHS).to(DEVICE)
    x = torch.ones(batch.tokens, 32, device=DEVICE)
    seeds = torch.arange(batch.tokens, device=DEVICE)
    call = Call(2, batch.cu_seqlens, 20, None, batch.dropout_seeds, seeds, None, 0.1, 0.1, 1, 1e-12)
    return x, layer.fused_parameters(), call._replace(**changes)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"cu_seqlens": torch.tensor([0, 34])}, TypeError, "cu_seqlens is int64, expected int32"),
        (
            {"cu_seqlens": torch.tensor([0, 10, 20, 40], dtype=torch.int32)},
            ValueError,
            "cu_seqlens ends at 40, expected at most T = 34",
        ),
        ({"sequence_seeds": None}, ValueError, "dropout_p = 0.1 needs dropout_seeds"),
        (
            {"token_seeds": torch.arange(3)},
            ValueError,
            r"token_seeds has shape \[3\], expected \[34\]",
        ),
        (
            {"token_seeds": torch.arange(34).int()},
            TypeError,
            "token_seeds is int32, expected int64",
        ),
        (
            {"rows": torch.tensor([3, 2]), "token_seeds": torch.arange(2)},
            ValueError,
            "query_indices holds 3 and then 2, expected to ascend",
        ),
        ({"heads": 4}, ValueError, "head size K = 8; impl"),
    ],
)
@pytest.mark.skipif(GPU, reason="values are looked at on a CPU")
def test_what_does_not_fit_is_refused_also_after_a_good_call(changes, error, message):
    with watched("triton"):
        fused_layer(*arguments())
        with pytest.raises(error, match=message):
            fused_layer(*arguments(**changes))


@pytest.mark.parametrize("name", ["qkv_weight", "output_bias", "norm_weight", "inner_weight"])
def test_a_parameter_of_another_dtype_or_shape_is_refused_by_name(name):
    x, parameters, call = arguments()
    parameter = getattr(parameters, name)
    with pytest.raises(TypeError, match=f"fused_layer: {name} is float16, expected float32"):
        fused_layer(x, parameters._replace(**{name: parameter.half()}), call)
    with pytest.raises(ValueError, match=rf": {name} has shape"):
        fused_layer(x, parameters._replace(**{name: parameter[..., :-1]}), call)
