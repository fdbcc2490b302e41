"""Shapes, inputs and least work of `bias_gelu`."""

from fastbert_kernels._spec import Spec, generator, normal
from fastbert_kernels.gelu.op import bias_gelu


def _inputs(shape, dtype, _dropout_p):
    draw = generator(shape)
    return {"x": normal(draw, dtype, shape["T"], shape["F"], std=2.0), "bias": normal(draw, dtype, shape["F"])}


SPEC = Spec(
    function=bias_gelu,
    implementations=("cpu", "reference"),
    shapes=({"T": 1, "F": 8}, {"T": 17, "F": 255}, {"T": 64, "F": 1024}, {"T": 3, "F": 3073}),
    inputs=_inputs,
    differentiable=("x", "bias"),
    # Forward reads x and writes y; backward reads x and dy and writes dx.
    least_bytes=lambda s, size: 5 * s["T"] * s["F"] * size,
    flops=lambda s: 40 * s["T"] * s["F"],
    dropout=False,
)
