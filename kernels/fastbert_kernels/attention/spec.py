"""Shapes, inputs and least work of `varlen_attention`."""

import itertools

import torch

from fastbert_kernels._spec import Spec, generator, normal, random_keys
from fastbert_kernels.attention.op import varlen_attention


def _inputs(shape, dtype, dropout_p):
    draw = generator(shape)
    total = sum(shape["lengths"])
    # One joint projection, sliced: the strided layout in which the encoder calls it.
    q, k, v = normal(draw, dtype, total, 3, shape["H"], shape["K"]).unbind(1)
    arguments = {
        "q": q,
        "k": k,
        "v": v,
        "cu_seqlens": torch.tensor([0, *itertools.accumulate(shape["lengths"])], dtype=torch.int32),
        "max_seqlen": max(shape["lengths"]),
        "dropout_p": dropout_p,
        "keys": random_keys(draw, len(shape["lengths"])),
        "site": 3,
    }
    if shape.get("R"):
        queries = torch.randperm(total, generator=draw)[: shape["R"]].sort().values
        arguments |= {"q": q[queries].clone(), "queries": queries}
    return arguments


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
    ),
    inputs=_inputs,
    differentiable=("q", "k", "v"),
    # Forward reads q, k, v and writes out; backward reads those four and dout, and writes three gradients.
    least_bytes=lambda s, size: 12 * sum(s["lengths"]) * s["H"] * s["K"] * size,
    # Two products forward, four backward and the scores once more, 2 n^2 H K each.
    flops=lambda s: 14 * sum(n * n for n in s["lengths"]) * s["H"] * s["K"],
)
