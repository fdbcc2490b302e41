"""Shapes, inputs and least work of `embedding_layer_norm`."""

from typing import Any

import torch

from fastbert_kernels._spec import Shape, Spec, generator, integers, normal, random_seeds
from fastbert_kernels.embedding.op import embedding_layer_norm


def _inputs(shape: Shape, dtype: torch.dtype, dropout_p: float) -> dict[str, Any]:
    draw = generator(shape)
    rows, size = shape["T"], shape["D"]
    if "P" not in shape:  # as in ModernBERT
        return {
            "input_ids": integers(draw, shape["V"], rows),
            "position_ids": None,
            "token_type_ids": None,
            "word_embeddings": normal(draw, dtype, shape["V"], size),
            "position_embeddings": None,
            "token_type_embeddings": None,
            "norm_weight": normal(draw, dtype, size),
            "norm_bias": None,
            "dropout_p": dropout_p,
            "dropout_seeds": random_seeds(draw, rows),
        }
    return {
        "input_ids": integers(draw, shape["V"], rows),
        "position_ids": integers(draw, shape["P"], rows),
        "token_type_ids": integers(draw, 2, rows),
        "word_embeddings": normal(draw, dtype, shape["V"], size),
        "position_embeddings": normal(draw, dtype, shape["P"], size),
        "token_type_embeddings": normal(draw, dtype, 2, size),
        "norm_weight": normal(draw, dtype, size),
        "norm_bias": normal(draw, dtype, size),
        "dropout_p": dropout_p,
        "dropout_seeds": random_seeds(draw, rows),
    }


def _least_bytes(shape: Shape, size: int) -> int:
    rows, columns = shape["T"], shape["D"]
    if "P" not in shape:  # one row a token, and no norm_bias
        passes = ((2 * rows + 1) + (3 * rows + 2)) * columns * size + 2 * rows * (8 + 8 + 4 + 4)
        return passes + (rows + shape["V"]) * columns * size + rows * 8
    # Forward reads three rows a token, norm_weight, norm_bias, the indices and the seeds; it writes
    # y, mean and rstd.
    forward = (4 * rows + 2) * columns * size + rows * (3 * 8 + 8 + 4 + 4)
    # Backward reads dy, the three rows, norm_weight, the indices, the seeds, mean and rstd; it
    # writes dz, dnorm_weight and dnorm_bias.
    backward = (5 * rows + 3) * columns * size + rows * (3 * 8 + 8 + 4 + 4)
    # Each of the three tables then reads dz once, and in which order. All rows are written, those
    # that do not occur as zeros.
    tables = (3 * rows + shape["V"] + shape["P"] + 2) * columns * size + 3 * rows * 8
    return forward + backward + tables


SPEC = Spec(
    function=embedding_layer_norm,
    implementations=("triton", "cpu", "reference"),
    shapes=(
        {"T": 0, "V": 3, "P": 2, "D": 16},
        {"T": 1, "V": 1, "P": 1, "D": 16},
        {"T": 65, "V": 50, "P": 32, "D": 255},
        {"T": 64, "V": 1, "P": 2, "D": 256},
        {"T": 131, "V": 30, "P": 64, "D": 257},
        {"T": 9, "V": 20, "P": 3, "D": 1025},
        {"T": 0, "V": 3, "D": 16},
        {"T": 1, "V": 1, "D": 16},
        {"T": 131, "V": 30, "D": 257},
    ),
    inputs=_inputs,
    differentiable=(
        "word_embeddings",
        "position_embeddings",
        "token_type_embeddings",
        "norm_weight",
        "norm_bias",
    ),
    least_bytes=_least_bytes,
    flops=lambda s: 30 * s["T"] * s["D"],
)
