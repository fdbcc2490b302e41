"""Shapes, inputs and least work of `rotary_embedding`."""

import itertools
from typing import Any

import torch

from fastbert_kernels._spec import Shape, Spec, generator, normal
from fastbert_kernels.rotary.op import rotary_embedding
from fastbert_kernels.rotary.table import packed_positions, rotary_table


def _inputs(shape: Shape, dtype: torch.dtype, _dropout_p: float) -> dict[str, Any]:
    draw = generator(shape)
    lengths = shape["lengths"]
    bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    total = sum(lengths) + shape.get("rest", 0)
    return {
        "qkv": normal(draw, dtype, total, 3, shape["H"], shape["K"]),
        "position_ids": packed_positions(bounds, total),
        "table": rotary_table(max(lengths, default=0) + 1, shape["K"]),
    }


def _least_bytes(shape: Shape, size: int) -> int:
    tokens = sum(shape["lengths"]) + shape.get("rest", 0)
    # Forward reads and writes q and k; backward reads and writes the gradients of q, k and v. Both
    # read the position and the angles of each token.
    return tokens * (10 * shape["H"] * shape["K"] * size + 2 * (8 + 4 * shape["K"]))


SPEC = Spec(
    function=rotary_embedding,
    implementations=("triton", "cpu", "reference"),
    shapes=(
        {"lengths": [], "H": 1, "K": 16},
        {"lengths": [1], "H": 1, "K": 16},
        {"lengths": [5, 1, 0, 12], "H": 3, "K": 32},
        {"lengths": [20, 3], "H": 12, "K": 64},
        {"lengths": [700], "H": 1, "K": 128},
        {"lengths": [2], "H": 5, "K": 48},
        {"lengths": [9, 8], "H": 2, "K": 96, "rest": 5},
    ),
    inputs=_inputs,
    differentiable=("qkv",),
    least_bytes=_least_bytes,
    # Six operations for two elements, forward and backward, of q and k.
    flops=lambda s: 12 * (sum(s["lengths"]) + s.get("rest", 0)) * s["H"] * s["K"],
    dropout=False,
)
