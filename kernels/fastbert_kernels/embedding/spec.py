"""Shapes, inputs and least work of `embedding_layer_norm`."""

from fastbert_kernels._spec import Spec, generator, integers, normal, random_keys
from fastbert_kernels.embedding.op import embedding_layer_norm


def _inputs(shape, dtype, dropout_p):
    draw = generator(shape)
    rows, size = shape["T"], shape["D"]
    return {
        "ids": integers(draw, shape["V"], rows),
        "positions": integers(draw, shape["P"], rows),
        "segments": integers(draw, 2, rows),
        "words": normal(draw, dtype, shape["V"], size),
        "position_table": normal(draw, dtype, shape["P"], size),
        "segment_table": normal(draw, dtype, 2, size),
        "weight": normal(draw, dtype, size),
        "shift": normal(draw, dtype, size),
        "dropout_p": dropout_p,
        "keys": random_keys(draw, rows),
    }


SPEC = Spec(
    function=embedding_layer_norm,
    implementations=("cpu", "reference"),
    shapes=(
        {"T": 1, "V": 1, "P": 1, "D": 16},
        {"T": 65, "V": 50, "P": 32, "D": 255},
        {"T": 200, "V": 1000, "P": 128, "D": 256},
    ),
    inputs=_inputs,
    differentiable=("words", "position_table", "segment_table", "weight", "shift"),
    # Forward reads three rows a token and writes y and z; backward reads dy and z and writes the rows that occur.
    least_bytes=lambda s, size: 8 * s["T"] * s["D"] * size,
    flops=lambda s: 30 * s["T"] * s["D"],
)
