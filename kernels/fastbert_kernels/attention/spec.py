"""Shapes, inputs and least work of `varlen_attention`."""

import itertools
from typing import Any

import torch

from fastbert_kernels._spec import Shape, Spec, generator, normal, random_seeds
from fastbert_kernels._tile_schedule import one_tile
from fastbert_kernels.attention.op import varlen_attention


def _inputs(shape: Shape, dtype: torch.dtype, dropout_p: float) -> dict[str, Any]:
    draw = generator(shape)
    total = sum(shape["lengths"]) + shape.get("rest", 0)
    # One joint projection, sliced: the strided layout in which the encoder calls it.
    q, k, v = normal(draw, dtype, total, 3, shape["H"], shape["K"]).unbind(1)
    arguments = {
        "q": q,
        "k": k,
        "v": v,
        "cu_seqlens": torch.tensor([0, *itertools.accumulate(shape["lengths"])], dtype=torch.int32),
        "max_seqlen": max(shape["lengths"], default=0),
        "dropout_p": dropout_p,
        "dropout_seeds": random_seeds(draw, len(shape["lengths"])),
        "dropout_stream": 3,
    }
    if "window" in shape:
        arguments["window"] = shape["window"]
    if shape.get("R"):
        query_indices = torch.randperm(total, generator=draw)[: shape["R"]].sort().values
        arguments |= {"q": q[query_indices].clone(), "query_indices": query_indices}
    return arguments


def _least_bytes(shape: Shape, size: int) -> int:
    """Everything once, whatever the tiles.

    What is saved for the backward pass depends on whether each sequence fits one tile.
    """
    lengths, heads = shape["lengths"], shape["H"]
    tokens, row = sum(lengths), heads * shape["K"] * size
    selected, rest = shape.get("R", 0), shape.get("rest", 0)
    rows = selected or tokens
    # cu_seqlens, dropout_seeds and query_indices
    tables = 4 * (len(lengths) + 1) + 8 * len(lengths) + 8 * selected
    # Forward: q in, out out; k and v in. Backward: q and dout in, dq out; k and v in, dk, dv out.
    forward = 2 * rows * row + 2 * tokens * row + tables
    backward = 3 * rows * row + 4 * tokens * row + tables
    if not selected:
        # Zeros. Of selected queries, only the inputs tell how many are behind the last sequence.
        forward += rest * row
        backward += rest * row
    backward += 2 * rest * row
    if not one_tile(torch.bfloat16 if size == 2 else torch.float32, max(lengths, default=0)):
        forward += 2 * 4 * rows * heads  # row_max and inv_sum out, fp32
        backward += rows * row + 2 * 4 * rows * heads  # out, row_max and inv_sum in
    return forward + backward


def pairs(length: int, window: int | None) -> int:
    """Return how many keys the queries of a sequence see, all together."""
    if window is None or window >= length:
        return length * length
    return length * (2 * window + 1) - window * (window + 1)


SPEC = Spec(
    function=varlen_attention,
    implementations=("triton", "cpu", "reference"),
    shapes=(
        {"lengths": [1], "H": 1, "K": 16},
        {"lengths": [1, 1, 1], "H": 2, "K": 32},
        {"lengths": [15, 16, 17, 1], "H": 3, "K": 32},
        {"lengths": [127, 128, 129, 5], "H": 2, "K": 64},
        {"lengths": [3, 200, 1, 64, 63, 65], "H": 2, "K": 64},
        {"lengths": [40, 7, 90, 33], "H": 2, "K": 64, "R": 31},
        {"lengths": [40, 1, 90, 33], "H": 2, "K": 64, "R": 2},
        {"lengths": [300], "H": 1, "K": 128},
        {"lengths": [], "H": 2, "K": 16, "rest": 3},
        {"lengths": [33, 0, 64, 65, 0, 0], "H": 2, "K": 64, "rest": 11},
        {"lengths": [140, 5, 0], "H": 2, "K": 32, "rest": 150},
        {"lengths": [40, 100, 0], "H": 2, "K": 64, "R": 50, "rest": 60},
        {"lengths": [129, 2], "H": 2, "K": 48, "R": 40, "rest": 30},
        {"lengths": [200, 63, 65, 1], "H": 2, "K": 64, "window": 64},
        {"lengths": [120, 9, 128], "H": 2, "K": 64, "window": 16},
        {"lengths": [257], "H": 1, "K": 32, "window": 127},
        {"lengths": [128, 0, 40], "H": 2, "K": 32, "R": 50, "rest": 60, "window": 15},
        # More rows than the programs that fill them with zeros reach in their first turn.
        {"lengths": [5, 0], "H": 1, "K": 16, "rest": 160},
        {"lengths": [400, 0, 33], "H": 2, "K": 48, "R": 70, "rest": 30, "window": 17},
        {"lengths": [1, 129, 300], "H": 2, "K": 64, "R": 90, "rest": 1, "window": 64},
    ),
    inputs=_inputs,
    differentiable=("q", "k", "v"),
    least_bytes=_least_bytes,
    # Two products forward, four backward and the scores once more, 2 H K for each pair.
    flops=lambda s: 14 * sum(pairs(n, s.get("window")) for n in s["lengths"]) * s["H"] * s["K"],
)
