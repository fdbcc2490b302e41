"""Shapes, inputs and least work of `masked_cross_entropy`."""

import torch

from fastbert_kernels._spec import Spec, generator, integers, normal
from fastbert_kernels.mlm_loss.op import masked_cross_entropy


def _inputs(shape, dtype, _dropout_p):
    draw = generator(shape)
    return {
        "hidden": normal(draw, dtype, shape["T"], shape["D"]),
        "weight": normal(draw, dtype, shape["V"], shape["D"], std=0.3),
        "bias": normal(draw, dtype, shape["V"]),
        "positions": torch.randperm(shape["T"], generator=draw)[: shape["M"]].sort().values,
        "labels": integers(draw, shape["V"], shape["M"]),
        "total": shape["M"] + 3,
    }


SPEC = Spec(
    function=masked_cross_entropy,
    implementations=("cpu", "reference"),
    shapes=(
        {"T": 5, "M": 0, "D": 16, "V": 30},
        {"T": 1, "M": 1, "D": 16, "V": 2},
        {"T": 100, "M": 15, "D": 64, "V": 1000},
        {"T": 130, "M": 65, "D": 48, "V": 4097},
        {"T": 300, "M": 300, "D": 32, "V": 30522},  # more than one slab of the cpu implementation
    ),
    inputs=_inputs,
    differentiable=("hidden", "weight", "bias"),
    # Forward reads the rows and the matrix; backward reads both again and writes both gradients.
    least_bytes=lambda s, size: (2 * s["M"] + s["T"]) * s["D"] * size + s["V"] * (s["D"] + 1) * (2 * size + 4),
    flops=lambda s: 6 * s["M"] * s["V"] * s["D"],
    dropout=False,
)
