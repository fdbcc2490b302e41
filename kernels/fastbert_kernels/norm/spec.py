"""Shapes, inputs and least work of `dropout_add_layer_norm`."""

from fastbert_kernels._spec import Spec, generator, normal, random_keys
from fastbert_kernels.norm.op import dropout_add_layer_norm


def _inputs(shape, dtype, dropout_p):
    draw = generator(shape)
    rows, size = shape["T"], shape["D"]
    bare = shape.get("bare", 0)
    return {
        "x": normal(draw, dtype, rows, size),
        "bias": None if bare else normal(draw, dtype, size),
        "residual": None if bare else normal(draw, dtype, rows, size),
        "weight": normal(draw, dtype, size),
        "shift": normal(draw, dtype, size),
        "dropout_p": dropout_p,
        "keys": random_keys(draw, rows),
        "site": 7,
    }


SPEC = Spec(
    function=dropout_add_layer_norm,
    implementations=("triton", "cpu", "reference"),
    shapes=(
        {"T": 1, "D": 16},
        {"T": 7, "D": 255},
        {"T": 33, "D": 256},
        {"T": 128, "D": 257},
        {"T": 20, "D": 1024},
        {"T": 9, "D": 64, "bare": 1},
    ),
    inputs=_inputs,
    differentiable=("x", "bias", "residual", "weight", "shift"),
    # Forward reads x and the residual, writes y and z; backward reads dy and z, writes dx and dresidual.
    least_bytes=lambda s, size: 8 * s["T"] * s["D"] * size,
    flops=lambda s: 30 * s["T"] * s["D"],
)
