"""Shapes, inputs and least work of `bias_gelu`."""

from typing import Any

import torch

from fastbert_kernels._spec import Shape, Spec, generator, normal
from fastbert_kernels.gelu.op import bias_gelu


def _inputs(shape: Shape, dtype: torch.dtype, _dropout_p: float) -> dict[str, Any]:
    draw = generator(shape)
    return {
        "x": normal(draw, dtype, shape["T"], shape["F"], std=2.0),
        "bias": normal(draw, dtype, shape["F"]),
    }


SPEC = Spec(
    function=bias_gelu,
    implementations=("triton", "cpu", "reference"),
    shapes=(
        {"T": 0, "F": 8},
        {"T": 1, "F": 8},
        {"T": 15, "F": 127},
        {"T": 16, "F": 256},
        {"T": 17, "F": 257},
        {"T": 64, "F": 1024},
        {"T": 3, "F": 3073},
    ),
    inputs=_inputs,
    differentiable=("x", "bias"),
    # Forward reads x and the bias and writes y; backward reads dy, x and the bias and writes dx and
    # dbias.
    least_bytes=lambda s, size: size * s["F"] * ((2 * s["T"] + 1) + (3 * s["T"] + 2)),
    flops=lambda s: 40 * s["T"] * s["F"],
    dropout=False,
)
