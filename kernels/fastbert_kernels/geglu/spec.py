"""Shapes, inputs and least work of `bias_geglu`."""

from typing import Any

import torch

from fastbert_kernels._spec import Shape, Spec, generator, normal
from fastbert_kernels.geglu.op import bias_geglu


def _inputs(shape: Shape, dtype: torch.dtype, _dropout_p: float) -> dict[str, Any]:
    draw = generator(shape)
    return {
        "x": normal(draw, dtype, shape["T"], 2 * shape["F"], std=2.0),
        "bias": None if shape.get("bare") else normal(draw, dtype, 2 * shape["F"]),
    }


def _least_bytes(shape: Shape, size: int) -> int:
    T, F, bias = shape["T"], shape["F"], 0 if shape.get("bare") else 2
    # Forward reads x and the bias and writes y; backward reads dy, x and the bias and writes dx and
    # dbias.
    return size * F * ((3 * T + bias) + (5 * T + 2 * bias))


SPEC = Spec(
    function=bias_geglu,
    implementations=("triton", "cpu", "reference"),
    shapes=(
        {"T": 0, "F": 8},
        {"T": 1, "F": 8},
        {"T": 15, "F": 127},
        {"T": 16, "F": 256},
        {"T": 17, "F": 257},
        {"T": 3, "F": 2625},
        {"T": 33, "F": 64, "bare": 1},
    ),
    inputs=_inputs,
    differentiable=("x", "bias"),
    least_bytes=_least_bytes,
    flops=lambda s: 44 * s["T"] * s["F"],
    dropout=False,
)
