"""Kernels that people install: Liger-Kernel, Cut Cross-Entropy, FlashAttention.

If one is missing or cannot do the same, a message says so. Arguments are those of the specs. If a
peer's function covers only a part of the operation, torch does the rest, as in models that use it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.kernels.cases import Case, leaves
from benchmarks.kernels.rivals import EPS, Rival

# The peers of each operation.
NAMES = {
    "attention": ("FlashAttention",),
    "mlm_loss": ("Liger", "CCE"),
    "norm": ("Liger",),
    "gelu": (),
    "add_norm": (),
    "geglu": (),
    "rotary": (),
    "embedding": (),
}


def peers(
    case: Case, arguments: dict[str, Any], interpreted: bool = False
) -> dict[str, Rival | str]:
    """The peers of a case by name; a string says why one is missing.

    Args:
        case: what is compared.
        arguments: the inputs.
        interpreted: whether the kernels will run in Triton's interpreter, on a CPU.
    """
    device = leaves(case, arguments)[0].device
    if not interpreted and device.type == "cpu":
        return dict.fromkeys(NAMES[case.operation], "not for CPUs")
    return {name: _MAKERS[name](case, arguments) for name in NAMES[case.operation]}


def _liger(case: Case, arguments: dict[str, Any]) -> Rival | str:
    try:
        from liger_kernel.ops.layer_norm import LigerLayerNormFunction  # pyright: ignore[reportMissingImports]
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy  # pyright: ignore[reportMissingImports]
    except ImportError:
        return "not installed"
    if case.operation == "norm":
        forward: Callable[..., Tensor] = functools.partial(_norm_by, LigerLayerNormFunction.apply)
    else:
        forward = functools.partial(_liger_loss, liger_fused_linear_cross_entropy)
    return functools.partial(forward, **arguments), leaves(case, arguments)


def _norm_by(
    layer_norm: Callable[..., Tensor], *, x, bias, residual, norm_weight, norm_bias, dropout_p, **_
) -> Tensor:
    x = functional.dropout(x if bias is None else x + bias, dropout_p)
    return layer_norm(x if residual is None else residual + x, norm_weight, norm_bias, EPS)


def _liger_loss(
    loss: Callable[..., Any], *, hidden, weight, bias, positions, labels, total
) -> Tensor:
    return loss(hidden[positions], weight, labels, bias, reduction="sum") / total


def _cut_cross_entropy(case: Case, arguments: dict[str, Any]) -> Rival | str:
    try:
        from cut_cross_entropy import linear_cross_entropy  # pyright: ignore[reportMissingImports]
    except ImportError:
        return "not installed"
    if arguments["hidden"].dtype == torch.float32:
        return "not for fp32"

    def forward(*, hidden, weight, bias, positions, labels, total) -> Tensor:
        return (
            linear_cross_entropy(hidden[positions], weight, labels, reduction="sum", impl="cce")
            / total
        )

    # Its released version has no bias, which makes the comparison slightly favourable to it.
    return functools.partial(forward, **arguments), [arguments["hidden"], arguments["weight"]]


def _flash_attention(case: Case, arguments: dict[str, Any]) -> Rival | str:
    try:
        from flash_attn import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]
    except ImportError:
        return "not installed"
    bounds, longest = arguments["cu_seqlens"], max(case.shape["lengths"])
    packed = [arguments[name] for name in "qkv"]
    forward = functools.partial(
        flash_attn_varlen_func, *packed, bounds, bounds, longest, longest, dropout_p=case.dropout_p
    )
    return forward, packed


_MAKERS: Mapping[str, Callable[[Case, dict[str, Any]], Rival | str]] = {
    "Liger": _liger,
    "CCE": _cut_cross_entropy,
    "FlashAttention": _flash_attention,
}
