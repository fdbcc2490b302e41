"""Shapes, inputs and least work of `add_layer_norm`."""

from typing import Any

import torch

from fastbert_kernels._spec import Shape, Spec, generator, normal, random_seeds
from fastbert_kernels.add_norm.op import add_layer_norm


def _inputs(shape: Shape, dtype: torch.dtype, dropout_p: float) -> dict[str, Any]:
    draw = generator(shape)
    rows, size = shape["T"], shape["D"]
    bare = shape.get("bare", 0)  # without biases, as in ModernBERT
    return {
        "x": normal(draw, dtype, rows, size),
        "bias": None if bare else normal(draw, dtype, size),
        "residual": normal(draw, dtype, rows, size),
        "norm_weight": normal(draw, dtype, size),
        "norm_bias": None if bare else normal(draw, dtype, size),
        "dropout_p": dropout_p,
        "dropout_seeds": random_seeds(draw, rows),
        "dropout_stream": 7,
    }


def _least_bytes(shape: Shape, size: int) -> int:
    rows, columns, biases = shape["T"], shape["D"], 0 if shape.get("bare", 0) else 2
    statistics = rows * (8 + 4 + 4)
    # Forward reads x, residual, the vectors and the seeds; it writes y, the sum, mean and rstd.
    forward = (4 * rows + 1 + biases) * columns * size + statistics
    # Backward reads dy, the gradient of the sum, the sum, norm_weight, the seeds, mean and rstd; it
    # writes dx, dresidual, and the gradients of the vectors.
    backward = (5 * rows + 2 + biases) * columns * size + statistics
    return forward + backward


SPEC = Spec(
    function=add_layer_norm,
    implementations=("triton", "cpu", "reference"),
    shapes=(
        {"T": 0, "D": 16},
        {"T": 1, "D": 16},
        {"T": 7, "D": 255},
        {"T": 33, "D": 256},
        {"T": 9, "D": 768},
        {"T": 3, "D": 2049},
        {"T": 20, "D": 257, "bare": 1},
    ),
    inputs=_inputs,
    differentiable=("x", "bias", "residual", "norm_weight", "norm_bias"),
    least_bytes=_least_bytes,
    flops=lambda s: 32 * s["T"] * s["D"],
)
