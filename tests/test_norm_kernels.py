"""What the tests over SPECS do not cover of norm, gelu and embedding.

That is many tiles per program, long rows of a table, strides, and bad indices.
"""

import pytest
import torch

from fastbert_kernels import _rows, bias_gelu, dropout_add_layer_norm, embedding_layer_norm
from fastbert_kernels.embedding import kernel as embedding_kernel
from fastbert_kernels.specs import SPECS
from tests.test_kernels import GPU, place, run, watched
from tests.test_kernels import (
    test_agrees_with_the_reference_in_fp64 as agrees,
)  # by another name, not to be collected again
from tests.tiers import slow

DEVICE = "cuda" if GPU else "cpu"
BIN = embedding_kernel._BIN


def inputs(name, shape, p=0.0):
    arguments = place(SPECS[name].inputs(shape, torch.float32, p), DEVICE)
    return arguments if SPECS[name].dropout else {key: arguments[key] for key in ("x", "bias")}


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("norm", {"T": 61, "D": 300}),
        ("add_norm", {"T": 61, "D": 300}),
        ("gelu", {"T": 150, "F": 150}),
        ("geglu", {"T": 150, "F": 150}),
        ("embedding", {"T": 61, "V": 9, "P": 61, "D": 300}),
    ],
)
def test_programs_that_own_many_tiles(name, shape, monkeypatch):
    """The tests' devices run more programs at a time than small inputs have tiles."""
    monkeypatch.setattr(_rows, "multiprocessors", lambda device: 1)
    agrees(name, "triton", shape, 0.1, "fp32")


def test_table_gradients_of_long_rows():
    """The uses of a row end one before, at and one after the end of a bin.

    One row has many bins, one row has no uses, and some uses belong to no row. The three tables
    have 5, 2 and 4 rows, one below the other.
    """
    counts = torch.tensor([BIN - 1, BIN, BIN + 1, 0, 3 * BIN, 2 * BIN + 3])
    words = torch.repeat_interleave(torch.tensor([0, 1, 2, 3, 4, 11]), counts)  # 11 is nowhere
    draw = torch.Generator().manual_seed(3)
    words = words[torch.randperm(len(words), generator=draw)]
    positions, segments = (
        torch.randint(first, last, (len(words),), generator=draw)
        for first, last in ((5, 7), (7, 12))
    )
    uses = torch.cat((words, positions, segments)).int().to(DEVICE)
    dz = (
        torch.randint(-9, 10, (len(words), 20), generator=draw).float().to(DEVICE)
    )  # whole numbers: sums are exact
    with watched("triton"):
        found = embedding_kernel._table_gradients(dz, uses, 11)
    inside = uses < 11
    expected = torch.zeros(11, 20, device=DEVICE).index_add_(
        0, uses[inside].long(), dz.repeat(3, 1)[inside]
    )
    assert torch.equal(found, expected)


def test_one_gradient_for_two_inputs_is_still_two():
    """Without dropout dx and dresidual are one tensor; the leaves' gradients share no memory."""
    arguments = inputs("norm", {"T": 5, "D": 20})
    x, residual = (arguments[name].requires_grad_() for name in ("x", "residual"))
    with watched("triton"):
        dropout_add_layer_norm(**arguments, impl="triton").square().sum().backward()
    assert torch.equal(x.grad, residual.grad) and x.grad.data_ptr() != residual.grad.data_ptr()


@pytest.mark.parametrize("name", ["norm", "gelu", slow("embedding")])
def test_strided_rows_make_no_difference(name):
    spec = SPECS[name]
    arguments = inputs(name, spec.shapes[2], 0.1)
    strided = {
        key: torch.cat((value, torch.full_like(value, float("nan"))), -1)[:, : value.shape[1]]
        if torch.is_tensor(value) and value.dim() == 2
        else value
        for key, value in arguments.items()
    }
    assert not any(
        value.is_contiguous()
        for value in strided.values()
        if torch.is_tensor(value) and value.dim() == 2
    )
    for key, value in run(spec, arguments, "triton").items():
        assert torch.equal(value, run(spec, strided, "triton")[key]), key


@pytest.mark.parametrize("name", ["input_ids", "position_ids", "token_type_ids"])
@pytest.mark.parametrize("bad", [-1, 40])
def test_an_index_outside_its_table(name, bad):
    arguments = inputs("embedding", {"T": 9, "V": 40, "P": 12, "D": 20})
    arguments[name][4] = bad
    with pytest.raises(ValueError, match=rf"embedding_layer_norm: {name} span .*{bad}"):
        embedding_layer_norm(**arguments, check_values=True, impl="triton")
    result = run(SPECS["embedding"], {**arguments, "check_values": False}, "triton")
    assert result["result"].isnan().all(1).tolist() == [row == 4 for row in range(9)]
    assert result["dnorm_weight"].isnan().all()
    inside = arguments["input_ids"].cpu()[torch.arange(9) != 4]
    rows = result["dword_embeddings"][inside[inside != arguments["input_ids"][4].item()]]
    assert not rows.isnan().any()
    # The gradient of that token is NaN. It belongs to no row of the table that the index misses.
    table = {"input_ids": "word", "position_ids": "position", "token_type_ids": "token_type"}[name]
    assert not result[f"d{table}_embeddings"].isnan().any()


@pytest.mark.parametrize(
    ("function", "arguments", "error", "message"),
    [
        (
            bias_gelu,
            {"x": torch.ones(4, 3).T, "bias": torch.ones(4)},
            ValueError,
            "bias_gelu: x has stride 3 along its last axis",
        ),
        (
            bias_gelu,
            {"x": torch.ones(2, 4).double(), "bias": torch.ones(4).double()},
            TypeError,
            "bias_gelu: x is float64",
        ),
        (
            bias_gelu,
            {"x": torch.ones(2, 4), "bias": torch.ones(4, device="meta")},
            ValueError,
            "bias_gelu: bias is on meta",
        ),
        (
            dropout_add_layer_norm,
            {
                "x": torch.ones(2, 8193),
                "bias": None,
                "residual": None,
                "norm_weight": torch.ones(8193),
                "norm_bias": torch.ones(8193),
            },
            ValueError,
            "dropout_add_layer_norm: x has D = 8193",
        ),
    ],
)
def test_what_the_kernels_refuse(function, arguments, error, message):
    arguments = {
        key: value.to(DEVICE) if torch.is_tensor(value) and not value.is_meta else value
        for key, value in arguments.items()
    }
    with pytest.raises(error, match=message):
        function(**arguments, impl="triton")
