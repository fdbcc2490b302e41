"""`embedding_layer_norm`: the input of BERT."""

from typing import Any

import torch
from torch import Tensor

from fastbert_kernels._autocast import cast_fp32
from fastbert_kernels._checks import (
    INT64,
    Implementations,
    check_dropout,
    check_leader,
    check_range,
    check_row_width,
    check_tensors,
    check_triton,
    chosen_implementation,
    values_checked,
)
from fastbert_kernels._function import Function, Gradients, backward_once
from fastbert_kernels._library import operator
from fastbert_kernels.embedding.cpu import cpu
from fastbert_kernels.embedding.reference import reference

NAME = "embedding_layer_norm"


def embedding_layer_norm(
    input_ids: Tensor,
    position_ids: Tensor | None,
    token_type_ids: Tensor | None,
    word_embeddings: Tensor,
    position_embeddings: Tensor | None,
    token_type_embeddings: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor | None = None,
    *,
    eps: float = 1e-12,
    dropout_p: float = 0.0,
    dropout_seeds: Tensor | None = None,
    dropout_stream: int = 0,
    check_values: bool | None = None,
    impl: str = "auto",
) -> Tensor:
    """dropout(LayerNorm(word + position + token type)), with the biased variance.

    Under autocast it runs in fp32, as torch's layer_norm. For the backward pass, "triton" saves the
    indices, and the mean and rstd of each token, fp32 [T]; "cpu" saves the indices, the sum of the
    three rows, mean, rstd and the mask.

    Args:
        input_ids, position_ids, token_type_ids: int64 [T], rows of the three tables.
        word_embeddings: [V, D], fp32, fp16 or bf16.
        position_embeddings: [P, D], token_type_embeddings: [S, D], as word_embeddings. Each may be
            None together with its ids; ModernBERT has neither.
        norm_weight: [D], LayerNorm's gamma, as word_embeddings.
        norm_bias: [D], LayerNorm's beta, as word_embeddings; None for a norm without it.
        eps: added to the variance.
        dropout_p: probability to drop an element, rounded to a multiple of 2**-16.
        dropout_seeds: int64 [T], one seed for each row, such as `row_seeds(...)` of the seeds of
            sequences, or `torch.randint(2**63 - 1, [T])`; new ones for every step.
        dropout_stream: which operation of the model this is, 0 to 2**31 - 1, so that operations
            with the same seeds draw different masks.
        check_values: whether to look for indices outside their tables. None: on a CPU; True: also
            on a GPU, which then waits for the device. Unchecked, "triton" reads nothing for such
            an index, and the token's result is NaN.
        impl: "triton" (one pass forward; D up to 8,192; rows of the tables may be strided), "cpu",
            "reference", or "auto": "triton" on a GPU, "cpu" on a CPU.

    Returns:
        [T, D], as word_embeddings. The gradients of the tables are summed in a fixed order, with
        "triton" in fp32.

    Raises:
        ValueError: a shape or device that does not fit, ids without their table or the reverse,
            dropout without seeds, an unknown `impl`, an index outside its table (see
            check_values); "triton": D above 8,192, a last axis that is not contiguous.
        TypeError: a dtype that does not fit; "triton": float64.

    Source: Devlin et al., 2019, section 3 and figure 2.
    """
    indices = (input_ids, position_ids, token_type_ids)
    *tables, norm_weight, norm_bias = cast_fp32(
        word_embeddings, position_embeddings, token_type_embeddings, norm_weight, norm_bias
    )
    impl = chosen_implementation(NAME, impl, _IMPLEMENTATIONS, tables[0])
    check(indices, tables, norm_weight, norm_bias, dropout_p, dropout_seeds, check_values, impl)
    dropout = dropout_p, dropout_seeds, dropout_stream
    return _IMPLEMENTATIONS[impl](*indices, *tables, norm_weight, norm_bias, eps, *dropout)


def check(
    indices: tuple[Tensor, Tensor | None, Tensor | None],
    tables: list[Any],
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    dropout_p: float,
    dropout_seeds: Tensor | None,
    check_values: bool | None,
    impl: str,
) -> None:
    input_ids, position_ids, token_type_ids = indices
    word_embeddings, position_embeddings, token_type_embeddings = tables
    floats = (word_embeddings.dtype,)
    check_leader(NAME, "input_ids", input_ids, ("T",), INT64)
    check_leader(NAME, "word_embeddings", word_embeddings, ("V", "D"))
    T, (V, D) = input_ids.shape[0], word_embeddings.shape
    P = _rows("position", "P", position_ids, position_embeddings, floats)
    S = _rows("token_type", "S", token_type_ids, token_type_embeddings, floats)
    check_dropout(NAME, dropout_p, dropout_seeds, T)
    tensors = (
        ("word_embeddings", word_embeddings, (V, D), floats),
        ("input_ids", input_ids, (T,), INT64),
        ("position_ids", position_ids, (T,), INT64),
        ("token_type_ids", token_type_ids, (T,), INT64),
        ("position_embeddings", position_embeddings, (P, D), floats),
        ("token_type_embeddings", token_type_embeddings, (S, D), floats),
        ("norm_weight", norm_weight, (D,), floats),
        ("norm_bias", norm_bias, (D,), floats),
        ("dropout_seeds", dropout_seeds if dropout_p > 0 else None, (T,), INT64),
    )
    check_tensors(NAME, word_embeddings.device, *tensors)
    if values_checked(check_values, input_ids):
        check_range(NAME, "input_ids", input_ids, V, "V")
        if position_ids is not None:
            check_range(NAME, "position_ids", position_ids, P, "P")
        if token_type_ids is not None:
            check_range(NAME, "token_type_ids", token_type_ids, S, "S")
    if impl == "triton":
        check_triton(NAME, *tensors)
        check_row_width(NAME, "word_embeddings", D)


def _rows(
    kind: str,
    axis: str,
    ids: Tensor | None,
    table: Tensor | None,
    floats: tuple[torch.dtype, ...],
) -> int:
    """Return the number of rows of a table that may be missing; 0 if it is."""
    if (ids is None) != (table is None):
        given, missing = ("embeddings", "ids") if ids is None else ("ids", "embeddings")
        raise ValueError(f"{NAME}: {kind}_{given} without {kind}_{missing}; pass both or neither")
    if table is None:
        return 0
    check_leader(NAME, f"{kind}_embeddings", table, (axis, "D"), floats)
    return table.shape[0]


def _forward_fake(
    input_ids: Tensor,
    position_ids: Tensor | None,
    token_type_ids: Tensor | None,
    word_embeddings: Tensor,
    *_: Any,
) -> tuple[Tensor, ...]:
    T, D = input_ids.shape[0], word_embeddings.shape[1]
    rows = (word_embeddings.new_empty(T, dtype=torch.float32) for _ in range(2))
    return word_embeddings.new_empty(T, D), *rows


def _backward_fake(
    dy: Tensor,
    input_ids: Tensor,
    position_ids: Tensor | None,
    token_type_ids: Tensor | None,
    *others: Any,
) -> tuple[Tensor, Tensor]:
    rows = sum(table.shape[0] for table in others[:3] if table is not None)
    return dy.new_empty(rows, dy.shape[1]), dy.new_empty(2, dy.shape[1])


_READ = (
    "Tensor input_ids, Tensor? position_ids, Tensor? token_type_ids, Tensor word_embeddings, "
    "Tensor? position_embeddings, Tensor? token_type_embeddings, Tensor norm_weight"
)
FORWARD = operator(
    f"embedding_layer_norm_forward({_READ}, Tensor? norm_bias, Tensor? dropout_seeds, float eps, "
    "float dropout_p, int dropout_stream) -> (Tensor, Tensor, Tensor)",
    "embedding.kernel.forward",
    _forward_fake,
)
BACKWARD = operator(
    f"embedding_layer_norm_backward(Tensor dy, {_READ}, Tensor? dropout_seeds, Tensor mean, "
    "Tensor rstd, float dropout_p, int dropout_stream) -> (Tensor, Tensor)",
    "embedding.kernel.backward",
    _backward_fake,
)


class _EmbeddingLayerNorm(Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *read, norm_bias, eps, dropout_p, seeds, stream = arguments  # `read` as in _READ
        y, mean, rstd = FORWARD(*read, norm_bias, seeds, eps, dropout_p, stream)
        ctx.save_for_backward(*read, seeds, mean, rstd)
        ctx.dropout_p, ctx.dropout_stream = dropout_p, stream
        ctx.has_norm_bias = norm_bias is not None
        return y

    @staticmethod
    @backward_once
    def backward(ctx: Any, dy: Tensor) -> Gradients:
        saved = ctx.saved_tensors
        dtables, vectors = BACKWARD(dy.contiguous(), *saved, ctx.dropout_p, ctx.dropout_stream)
        # As many rows as each table has; a missing one has none.
        parts = dtables.split([0 if table is None else table.shape[0] for table in saved[3:6]])
        tables = [
            None if table is None else part for table, part in zip(saved[3:6], parts, strict=True)
        ]
        dnorm_weight, dnorm_bias = vectors.unbind()
        dnorm_bias = dnorm_bias if ctx.has_norm_bias else None
        return None, None, None, *tables, dnorm_weight, dnorm_bias, *(None,) * 4


def _triton(*arguments: Any) -> Tensor:
    return _EmbeddingLayerNorm.apply(*arguments)


_IMPLEMENTATIONS: Implementations = {"triton": _triton, "cpu": cpu, "reference": reference}
