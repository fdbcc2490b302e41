"""Shapes, inputs and least work of `dropout_add_layer_norm`."""

from typing import Any

import torch

from fastbert_kernels._spec import Shape, Spec, generator, normal, random_seeds
from fastbert_kernels.norm.op import dropout_add_layer_norm


def _inputs(shape: Shape, dtype: torch.dtype, dropout_p: float) -> dict[str, Any]:
    draw = generator(shape)
    rows, size = shape["T"], shape["D"]
    bare = shape.get("bare", 0)
    return {
        "x": normal(draw, dtype, rows, size),
        "bias": None if bare else normal(draw, dtype, size),
        "residual": None if bare else normal(draw, dtype, rows, size),
        "norm_weight": normal(draw, dtype, size),
        "norm_bias": normal(draw, dtype, size),
        "dropout_p": dropout_p,
        "dropout_seeds": random_seeds(draw, rows),
        "dropout_stream": 7,
    }


def _least_bytes(shape: Shape, size: int) -> int:
    rows, columns, bare = shape["T"], shape["D"], shape.get("bare", 0)
    # Forward reads x, residual, bias, norm_weight, norm_bias and the seeds; it writes y, mean and
    # rstd.
    forward = ((2 if bare else 3) * rows + (2 if bare else 3)) * columns * size + rows * (8 + 4 + 4)
    # Backward reads dy, x, residual, bias, norm_weight, the seeds, mean and rstd; it writes dx,
    # dresidual, dbias, dnorm_weight and dnorm_bias.
    backward = ((3 if bare else 5) * rows + (3 if bare else 5)) * columns * size + rows * (
        8 + 4 + 4
    )
    return forward + backward


SPEC = Spec(
    function=dropout_add_layer_norm,
    implementations=("triton", "cpu", "reference"),
    shapes=(
        {"T": 0, "D": 16},
        {"T": 1, "D": 16},
        {"T": 7, "D": 255},
        {"T": 33, "D": 256},
        {"T": 20, "D": 257},
        {"T": 9, "D": 768},
        {"T": 5, "D": 1024},
        {"T": 3, "D": 2049},
        {"T": 9, "D": 64, "bare": 1},
    ),
    inputs=_inputs,
    differentiable=("x", "bias", "residual", "norm_weight", "norm_bias"),
    least_bytes=_least_bytes,
    flops=lambda s: 30 * s["T"] * s["D"],
)
