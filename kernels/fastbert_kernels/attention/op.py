"""`varlen_attention`: attention within each of many sequences that lie end to end, with dropout."""

import itertools
from typing import Any

import torch
from torch import Tensor

from fastbert_kernels._autocast import cast_low
from fastbert_kernels._checks import (
    INT32,
    INT64,
    Implementations,
    check_dropout,
    check_leader,
    check_tensors,
    check_triton,
    chosen_implementation,
    values_checked,
)
from fastbert_kernels._function import Function, Gradients, backward_once
from fastbert_kernels._library import operator
from fastbert_kernels._tile_schedule import ITEM, one_tile
from fastbert_kernels.attention.cpu import cpu
from fastbert_kernels.attention.reference import reference

NAME = "varlen_attention"


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    dropout_p: float = 0.0,
    dropout_seeds: Tensor | None = None,
    dropout_stream: int = 0,
    query_indices: Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
    tile_schedule: Tensor | None = None,
    check_values: bool | None = None,
    impl: str = "auto",
) -> Tensor:
    """Bidirectional attention within packed sequences: dropout(softmax(q k' * scale)) v.

    Statistics and sums are fp32, products are in the dtype of the inputs. For the backward pass,
    "triton" saves q, k and v, and where sequences do not fit one tile (128 tokens, 16 bits) also
    the result and two fp32 numbers for each row and head. Masks are recomputed. Its backward pass
    uses no atomics, so every run gives the same bits. Under autocast, q, k and v are cast to its
    dtype, as by `scaled_dot_product_attention`.

    Args:
        q: [R, H, K], fp32, fp16 or bf16, or fp64 except with "triton"; R = T unless
            `query_indices` is given. It may be strided, as a slice of a joint projection is.
            "triton" needs a last stride of 1 and a head size K of 16, 32, 48, ..., 128.
        k, v: [T, H, K], as q.
        cu_seqlens: int32 [B + 1], first token of each sequence, then the end of the last one, at
            most T: a pack may be padded. Sequences may be empty, so B may be padded too.
        max_seqlen: length of the longest sequence, in tokens.
        dropout_p: probability to drop an attention weight, rounded to a multiple of 2**-16.
        dropout_seeds: int64 [B], one seed for each sequence, such as
            `torch.randint(2**63 - 1, [B])`. Any int64 will do. Masks are a function of (seed,
            stream, head, position of q, position of k), so draw new seeds for every step, and pass
            the same ones to all layers of a step and when a layer is recomputed.
        dropout_stream: which operation of the model this is, 0 to 2**31 - 1, so that operations
            with the same seeds draw different masks.
        query_indices: int64 [R], ascending: the packed positions whose outputs are wanted, if not
            all T. The outputs that remain are exactly the same, dropout included.
        window: how far a query sees: key j where |i - j| <= window, for positions i and j in the
            sequence (ModernBERT: `local_attention // 2`). None: all keys. Keys outside are not
            computed, neither forward nor backward, and "cpu" also saves n * window weights instead
            of n * n. "triton" compiles its kernels for each window.
        scale: positive factor of the scores; 1 / sqrt(K) if None.
        tile_schedule: `attention_tile_schedule(cu_seqlens, T)`, which a model computes once for all
            its layers; computed here if None. Only "triton" uses it.
        check_values: whether to check the values of cu_seqlens and query_indices. None: on a CPU;
            True: also on a GPU, which then waits for the device. Unchecked, "triton" reads and
            writes nothing out of bounds whatever they hold, but the result means nothing.
        impl: "triton", "cpu", "reference", or "auto": "triton" on a GPU, "cpu" on a CPU.

    Returns:
        [R, H, K], in the dtype of q. Rows behind the last sequence are zero, and so are the
        gradients of q, k and v there.

    Raises:
        ValueError: a shape, device or stride that does not fit; cu_seqlens that do not ascend from
            0 to at most T, or have a sequence longer than max_seqlen; query_indices that do not
            ascend within [0, T); dropout without seeds; a negative window; a head size that
            "triton" does not take; an unknown `impl`.
        TypeError: a dtype that does not fit.

    Source: Vaswani et al., 2017, section 3.2.1; window: Beltagy et al., 2020 (Longformer), section
    3.1; packed layout as in FlashAttention's `flash_attn_varlen_func`.
    """
    q, k, v = cast_low(q, k, v)
    impl = chosen_implementation(NAME, impl, _IMPLEMENTATIONS, k)
    factor: float = k.shape[-1] ** -0.5 if scale is None else scale
    tables = (cu_seqlens, max_seqlen, dropout_p, dropout_seeds)
    check(q, k, v, *tables, query_indices, window, factor, tile_schedule, check_values, impl)
    if impl == "triton":
        pack = (cu_seqlens, tile_schedule, query_indices, dropout_seeds)
        numbers = (max_seqlen, dropout_p, dropout_stream, factor, window)
        return _VarlenAttention.apply(q, k, v, *pack, *numbers)
    return _IMPLEMENTATIONS[impl](q, k, v, *tables, dropout_stream, query_indices, factor, window)


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float,
    dropout_seeds: Tensor | None,
    query_indices: Tensor | None,
    window: int | None,
    scale: float,
    tile_schedule: Tensor | None,
    check_values: bool | None,
    impl: str,
) -> None:
    check_leader(NAME, "k", k, ("T", "H", "K"))
    if query_indices is not None:
        check_leader(NAME, "query_indices", query_indices, ("R",), INT64)
    (total, heads, size), floats = k.shape, (k.dtype,)
    rows = total if query_indices is None else query_indices.shape[0]
    tensors = (
        ("k", k, (total, heads, size), floats),
        ("q", q, (rows, heads, size), floats),
        ("v", v, (total, heads, size), floats),
    )
    check_tensors(NAME, k.device, *tensors)
    if window is not None and window < 0:
        raise ValueError(f"{NAME}: window = {window}; must be at least 0, or None for all keys")
    if not scale > 0:
        raise ValueError(f"{NAME}: scale = {scale}; must be positive")
    if impl == "triton":
        check_triton(NAME, *tensors)
        check_head_size(size)
    dropout = dropout_p, dropout_seeds
    check_tables(
        k, cu_seqlens, max_seqlen, *dropout, query_indices, tile_schedule, check_values, impl
    )


def check_tables(
    like: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float,
    dropout_seeds: Tensor | None,
    query_indices: Tensor | None,
    tile_schedule: Tensor | None,
    check_values: bool | None,
    impl: str,
) -> None:
    """Check all but q, k and v; `like` has as many rows as k, and is on the same device."""
    check_leader(NAME, "cu_seqlens", cu_seqlens, ("B + 1",), INT32)
    sequences = cu_seqlens.shape[0] - 1
    check_dropout(NAME, dropout_p, dropout_seeds, sequences)
    tables = (
        ("cu_seqlens", cu_seqlens, (sequences + 1,), INT32),
        (
            "query_indices",
            query_indices,
            () if query_indices is None else (query_indices.shape[0],),
            INT64,
        ),
        ("dropout_seeds", dropout_seeds if dropout_p > 0 else None, (sequences,), INT64),
    )
    check_tensors(NAME, like.device, *tables)
    if values_checked(check_values, like):
        bounds: list[int] = cu_seqlens.tolist()  # type: ignore[type-arg]
        _check_bounds(bounds, like.shape[0], max_seqlen)
        if query_indices is not None and len(query_indices):
            indices: list[int] = query_indices.tolist()  # type: ignore[type-arg]
            _check_query_indices(indices, like.shape[0])
    if impl == "triton":
        if tile_schedule is not None:
            tables += (
                ("tile_schedule", tile_schedule, (like.shape[0] // ITEM + sequences + 1, 2), INT32),
            )
            check_tensors(NAME, like.device, tables[-1])
        check_triton(NAME, *tables)


HEAD_SIZES = range(16, 129, 16)  # of "triton": the matrix units take multiples of 16


def check_head_size(size: int) -> None:
    if size % 16 or not 16 <= size <= 128:  # torch.compile cannot trace `in` for a dynamic size
        raise ValueError(
            f'{NAME}: head size K = {size}; impl = "triton" takes '
            f"{', '.join(map(str, HEAD_SIZES))}; pad q, k and v with zeros and pass "
            f'scale = {size}**-0.5, or use impl = "reference"'
        )


def _check_bounds(bounds: list[int], total: int, max_seqlen: int) -> None:
    lengths = [end - start for start, end in itertools.pairwise(bounds)]
    if not bounds or bounds[0] != 0:
        raise ValueError(
            f"{NAME}: cu_seqlens starts at {bounds[0] if bounds else 'nothing'}, expected 0"
        )
    if lengths and min(lengths) < 0:
        i = next(i for i, length in enumerate(lengths) if length < 0)
        raise ValueError(
            f"{NAME}: cu_seqlens falls from {bounds[i]} to {bounds[i + 1]} at sequence {i}, "
            "expected to ascend"
        )
    if bounds[-1] > total:
        raise ValueError(f"{NAME}: cu_seqlens ends at {bounds[-1]}, expected at most T = {total}")
    if lengths and max(lengths) > max_seqlen:
        raise ValueError(
            f"{NAME}: max_seqlen = {max_seqlen}, "
            f"but cu_seqlens has a sequence of {max(lengths)} tokens"
        )


def _check_query_indices(query_indices: list[int], total: int) -> None:
    if query_indices[0] < 0 or query_indices[-1] >= total:
        raise ValueError(
            f"{NAME}: query_indices span {query_indices[0]} to {query_indices[-1]}; "
            f"must be in [0, T = {total})"
        )
    for a, b in itertools.pairwise(query_indices):
        if b <= a:
            raise ValueError(f"{NAME}: query_indices holds {a} and then {b}, expected to ascend")


# The Triton implementation as torch operators; arguments as above, with `scale` given


def _forward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    schedule: Tensor | None,
    query_indices: Tensor | None,
    dropout_seeds: Tensor | None,
    max_seqlen: int,
    *_: Any,
) -> tuple[Tensor, Tensor]:
    statistics = (2, q.shape[1], 0 if one_tile(q.dtype, max_seqlen) else q.shape[0])
    return q.new_empty(q.shape), q.new_empty(statistics, dtype=torch.float32)


def _backward_fake(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), k.new_empty(k.shape)


_SHARED = """Tensor cu_seqlens, Tensor? tile_schedule, Tensor? query_indices, Tensor? dropout_seeds,
    SymInt max_seqlen, float dropout_p, int dropout_stream, float scale, int? window=None"""
FORWARD = operator(
    f"varlen_attention_forward(Tensor q, Tensor k, Tensor v, {_SHARED}) -> (Tensor, Tensor)",
    "attention.kernel.forward",
    _forward_fake,
)
BACKWARD = operator(
    "varlen_attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, "
    f"Tensor statistics, {_SHARED}) -> (Tensor, Tensor, Tensor)",
    "attention.kernel.backward",
    _backward_fake,
)


class _VarlenAttention(Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens: Tensor,
        schedule: Tensor | None,
        indices: Tensor | None,
        seeds: Tensor | None,
        max_seqlen: int,
        p: float,
        stream: int,
        scale: float,
        window: int | None,
    ) -> Tensor:
        tables = (cu_seqlens, schedule, indices, seeds)
        numbers = (max_seqlen, p, stream, scale, window)
        out, statistics = FORWARD(q, k, v, *tables, *numbers)
        ctx.save_for_backward(q, k, v, out, statistics, *tables)
        ctx.numbers = numbers
        return out

    @staticmethod
    @backward_once
    def backward(ctx: Any, dout: Tensor) -> Gradients:
        dq, dk, dv = BACKWARD(dout.contiguous(), *ctx.saved_tensors, *ctx.numbers)
        return dq, dk, dv, *(None,) * 9


_IMPLEMENTATIONS: Implementations = {
    "triton": _VarlenAttention.apply,
    "cpu": cpu,
    "reference": reference,
}
