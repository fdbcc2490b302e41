"""The operations in torch: written with torch.nn.functional, and its own fused ones.

Dropout is torch's own, so results differ from ours in the masks. Arguments are those of the specs;
`_` takes those that torch does not use.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.kernels.cases import Case, leaves

EPS = 1e-12
# The rivals of each operation.
NAMES = {
    "attention": ("eager", "SDPA", "varlen_attn"),
    "mlm_loss": ("eager", "linear_cross_entropy"),
    "norm": ("eager",),
    "add_norm": ("eager",),
    "gelu": ("eager",),
    "geglu": ("eager",),
    "rotary": ("eager",),
    "embedding": ("eager",),
}
Rival = tuple[Callable[[], Tensor], list[Tensor]]  # the forward pass, and tensors with a gradient


def rivals(case: Case, arguments: dict[str, Any]) -> dict[str, Rival | str]:
    """The rivals of a case by name, "eager" among them; a string says why one is missing."""
    if case.operation == "attention":
        return _attention(case, arguments)
    gradients = leaves(case, arguments)
    found: dict[str, Rival | str] = {
        "eager": (functools.partial(_EAGER[case.operation], **arguments), gradients)
    }
    if case.operation == "mlm_loss":
        fused = (functools.partial(linear_cross_entropy, **arguments), gradients)
        found["linear_cross_entropy"] = (
            fused if hasattr(functional, "linear_cross_entropy") else "not in this torch"
        )
    return found


def eager_mlm_loss(*, hidden, weight, bias, positions, labels, total):
    logits = functional.linear(hidden[positions], weight, bias)
    return functional.cross_entropy(logits.float(), labels, reduction="sum") / total


def linear_cross_entropy(*, hidden, weight, bias, positions, labels, total):
    # The options make it work in chunks; without them it does the same as eager.
    options = torch.nn.LinearCrossEntropyOptions()
    rows = hidden[positions]
    return (
        functional.linear_cross_entropy(
            rows, weight, labels, linear_bias=bias, reduction="sum", options=options
        )
        / total
    )


def eager_norm(*, x, bias, residual, norm_weight, norm_bias, dropout_p, **_):
    x = functional.dropout(x if bias is None else x + bias, dropout_p)
    return functional.layer_norm(
        x if residual is None else residual + x, norm_weight.shape, norm_weight, norm_bias, EPS
    )


def eager_add_norm(*, x, bias, residual, norm_weight, norm_bias, dropout_p, **_):
    total = residual + functional.dropout(x if bias is None else x + bias, dropout_p)
    return functional.layer_norm(total, norm_weight.shape, norm_weight, norm_bias, 1e-5), total


def eager_gelu(*, x, bias):
    return functional.gelu(x + bias)


def eager_geglu(*, x, bias):
    a, b = (x if bias is None else x + bias).chunk(2, dim=-1)
    return functional.gelu(a) * b


def eager_rotary(*, qkv, position_ids, table):
    cos, sin = (torch.cat((x, x), -1)[:, None] for x in table[position_ids].chunk(2, dim=-1))
    first, second = qkv[:, 0].float().chunk(2, dim=-1)
    q = qkv[:, 0] * cos + torch.cat((-second, first), dim=-1) * sin
    first, second = qkv[:, 1].float().chunk(2, dim=-1)
    k = qkv[:, 1] * cos + torch.cat((-second, first), dim=-1) * sin
    return q.to(qkv.dtype), k.to(qkv.dtype), qkv[:, 2]


def eager_embedding(
    *,
    input_ids,
    position_ids,
    token_type_ids,
    word_embeddings,
    position_embeddings,
    token_type_embeddings,
    norm_weight,
    norm_bias,
    dropout_p,
    **_,
):
    z = (
        functional.embedding(input_ids, word_embeddings)
        + functional.embedding(position_ids, position_embeddings)
        + functional.embedding(token_type_ids, token_type_embeddings)
    )
    return functional.dropout(
        functional.layer_norm(z, norm_weight.shape, norm_weight, norm_bias, EPS), dropout_p
    )


_EAGER = {
    "mlm_loss": eager_mlm_loss,
    "norm": eager_norm,
    "add_norm": eager_add_norm,
    "gelu": eager_gelu,
    "geglu": eager_geglu,
    "rotary": eager_rotary,
    "embedding": eager_embedding,
}


def eager_attention(q, k, v, mask, dropout_p):
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return functional.dropout(scores.softmax(-1), dropout_p) @ v


def _attention(case: Case, arguments: dict[str, Any]) -> dict[str, Rival | str]:
    """Inputs are padded to [B, H, n, K] in advance for eager and SDPA, packed for varlen_attn."""
    packed = [arguments[name] for name in "qkv"]
    lengths = case.shape["lengths"]
    padded = [_pad(x, lengths) for x in packed]
    mask = None
    if len(set(lengths)) > 1:
        columns = torch.arange(max(lengths), device=padded[0].device)
        mask = (columns < torch.tensor(lengths, device=columns.device)[:, None])[:, None, None, :]
    sdpa = functools.partial(
        functional.scaled_dot_product_attention, *padded, attn_mask=mask, dropout_p=case.dropout_p
    )
    return {
        "eager": (functools.partial(eager_attention, *padded, mask, case.dropout_p), padded),
        "SDPA": (sdpa, padded),
        "varlen_attn": _varlen_attention(case, packed, arguments["cu_seqlens"]),
    }


def _pad(x: Tensor, lengths: list[int]) -> Tensor:
    """[T, H, K] to a leaf [B, H, n, K].

    With equal lengths it is a view in the layout of the joint projection.
    """
    if len(set(lengths)) == 1:
        padded = x.detach().unflatten(0, (len(lengths), lengths[0]))
    else:
        padded = torch.nn.utils.rnn.pad_sequence(list(x.detach().split(lengths)), batch_first=True)
    return padded.transpose(1, 2).requires_grad_()


def _varlen_attention(case: Case, packed: list[Tensor], cu_seqlens: Tensor) -> Rival | str:
    if case.dropout_p > 0:
        return "has no dropout"
    if cu_seqlens.device.type == "cpu":
        return "not for CPUs"
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return "not in this torch"
    longest = max(case.shape["lengths"])
    forward = functools.partial(varlen_attn, *packed, cu_seqlens, cu_seqlens, longest, longest)
    return forward, packed  # type: ignore[return-value]
