"""Shapes, inputs and least work of `masked_cross_entropy`."""

from typing import Any

import torch

from fastbert_kernels._spec import Shape, Spec, generator, integers, normal
from fastbert_kernels._tiles import tile
from fastbert_kernels.mlm_loss.op import masked_cross_entropy


def _inputs(shape: Shape, dtype: torch.dtype, _dropout_p: float) -> dict[str, Any]:
    draw = generator(shape)
    return {
        "hidden": normal(draw, dtype, shape["T"], shape["D"]),
        "weight": normal(draw, dtype, shape["V"], shape["D"], std=0.3),
        "bias": normal(draw, dtype, shape["V"]),
        "positions": torch.randperm(shape["T"], generator=draw)[: shape["M"]].sort().values,
        "labels": integers(draw, shape["V"], shape["M"]),
        "total": shape["M"] + 3,
    }


def _least_bytes(shape: Shape, size: int) -> int:
    """The bytes of the Triton kernels with the tiles of sm_90.

    The logits are computed once forward and once, by slabs, backward. The products dW and dh are
    torch's.
    """
    M, D, V = shape["M"], shape["D"], shape["V"]

    def tiles(kernel: str) -> tuple[int, int]:
        options = tile(kernel, "sm_90", torch.bfloat16 if size == 2 else torch.float32, D)
        return -(-M // options["BLOCK_M"]), -(-V // options["BLOCK_V"])

    def logits(row_tiles: int, word_tiles: int) -> int:
        rows = M * D * size * word_tiles  # once for each tile of words
        # The matrix and the bias once for each tile of rows.
        return rows + V * (D + 1) * size * row_tiles

    row_tiles, word_tiles = tiles("mlm_loss_forward")
    # positions and labels in; losses, correct and lse out
    forward = logits(row_tiles, word_tiles) + M * (8 + 8) + M * (4 + 1 + 4)
    row_tiles, word_tiles = tiles("mlm_loss_backward")
    # labels and lse, with the rows
    backward = logits(row_tiles, word_tiles) + M * (8 + 4) * word_tiles
    backward += M * V * size + V * 4 * row_tiles  # the slabs, and the shares of dbias
    return forward + backward


SPEC = Spec(
    function=masked_cross_entropy,
    implementations=("triton", "cpu", "reference"),
    shapes=(
        {"T": 5, "M": 0, "D": 16, "V": 30},
        {"T": 1, "M": 1, "D": 16, "V": 2},
        {"T": 100, "M": 15, "D": 64, "V": 1000},
        {
            "T": 127,
            "M": 127,
            "D": 63,
            "V": 255,
        },  # around the tiles of the forward pass: one below, at, one above
        {"T": 140, "M": 128, "D": 64, "V": 256},
        {"T": 140, "M": 129, "D": 65, "V": 257},
        {"T": 260, "M": 255, "D": 64, "V": 129},  # and of the backward pass
        {"T": 260, "M": 257, "D": 31, "V": 127},
        {"T": 130, "M": 65, "D": 48, "V": 4097},  # many tiles of words
    ),
    inputs=_inputs,
    differentiable=("hidden", "weight", "bias"),
    least_bytes=_least_bytes,
    flops=lambda s: (
        6 * s["M"] * s["V"] * s["D"]
    ),  # logits, dW and dh; that the logits are computed twice is our affair
    dropout=False,
)
