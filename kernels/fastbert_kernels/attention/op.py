"""`varlen_attention`: attention within each of many sequences that lie end to end, with dropout on the weights."""

import torch

from fastbert_kernels._checks import check_dropout, check_implementation, check_tensor
from fastbert_kernels.attention.cpu import cpu
from fastbert_kernels.attention.reference import reference

_IMPLEMENTATIONS = {"cpu": cpu, "reference": reference}


def varlen_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    *,
    dropout_p: float = 0.0,
    keys: torch.Tensor | None = None,
    site: int = 0,
    queries: torch.Tensor | None = None,
    scale: float | None = None,
    impl: str = "reference",
) -> torch.Tensor:
    """Bidirectional scaled dot-product attention over packed sequences: softmax(q k' * scale), dropped, times v.

    Args:
        q: [R, H, K], fp32, fp16 or bf16; R = T unless `queries` is given. May be strided (a slice of a joint projection).
        k, v: [T, H, K], as q.
        cu_seqlens: int32 [B + 1], first token of each sequence, then T.
        max_seqlen: length of the longest sequence, in tokens.
        dropout_p: probability to drop an attention weight, rounded to a multiple of 2**-16.
        keys: int64 [B], one key a sequence; masks are a function of (key, site, head, position of q, position of k).
        site: which operation of the model this is, so that layers draw different masks.
        queries: int64 [R], ascending: the packed positions whose outputs are wanted, if not all T. Cutting the queries
            leaves every output that remains exactly as it was, dropout included.
        scale: factor of the scores; 1 / sqrt(K) if None.
        impl: "cpu" or "reference".

    Returns:
        [R, H, K], in the dtype of q.

    Raises:
        ValueError: a shape that does not fit, dropout without keys, an unknown `impl`.
        TypeError: a dtype that does not fit.

    Source: Vaswani et al., 2017, section 3.2.1; packed layout as in FlashAttention's `flash_attn_varlen_func`.
    """
    _check(q, k, v, cu_seqlens, dropout_p, keys, queries)
    check_implementation("varlen_attention", impl, tuple(_IMPLEMENTATIONS))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return _IMPLEMENTATIONS[impl](q, k, v, cu_seqlens, max_seqlen, dropout_p, keys, site, queries, scale)


def _check(q, k, v, cu_seqlens, dropout_p, keys, queries) -> None:
    name = "varlen_attention"
    check_tensor(name, "k", k, ("T", "H", "K"), (torch.float32, torch.float16, torch.bfloat16, torch.float64))
    total, heads, size = k.shape
    check_tensor(name, "q", q, ("R" if queries is not None else total, heads, size), k.dtype)
    check_tensor(name, "v", v, (total, heads, size), k.dtype)
    check_tensor(name, "cu_seqlens", cu_seqlens, ("B + 1",), torch.int32)
    if queries is not None:
        check_tensor(name, "queries", queries, (q.shape[0],), torch.int64)
    check_dropout(name, dropout_p, keys, cu_seqlens.shape[0] - 1)
