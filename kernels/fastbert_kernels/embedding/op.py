"""`embedding_layer_norm`: the input of BERT."""

import torch

from fastbert_kernels._autocast import widened
from fastbert_kernels._checks import (
    INT64,
    check_dropout,
    check_implementation,
    check_leader,
    check_range,
    check_tensors,
    check_triton,
    values_checked,
)
from fastbert_kernels._library import backward_once, operator
from fastbert_kernels.embedding.cpu import cpu
from fastbert_kernels.embedding.reference import reference
from fastbert_kernels.norm.op import WIDEST


def embedding_layer_norm(
    ids: torch.Tensor,
    positions: torch.Tensor,
    segments: torch.Tensor,
    words: torch.Tensor,
    position_table: torch.Tensor,
    segment_table: torch.Tensor,
    weight: torch.Tensor,
    shift: torch.Tensor,
    *,
    eps: float = 1e-12,
    dropout_p: float = 0.0,
    keys: torch.Tensor | None = None,
    site: int = 0,
    check_values: bool | None = None,
    impl: str = "reference",
) -> torch.Tensor:
    """dropout(LayerNorm(words[ids] + position_table[positions] + segment_table[segments])), biased variance.

    Under autocast it runs in fp32, as torch's layer_norm. Saved for the backward pass: "triton": the indices, and the mean and rstd of
    each token, fp32 [T]; "cpu": the indices, the sum of the three rows, mean, rstd and the mask.

    Args:
        ids, positions, segments: int64 [T].
        words: [V, D], fp32, fp16 or bf16. position_table: [P, D]. segment_table: [S, D]. All as words.
        weight, shift: [D], LayerNorm's gamma and beta, as words.
        eps: added to the variance.
        dropout_p: probability to drop an element, rounded to a multiple of 2**-16.
        keys: int64 [T], one key a row (`row_keys`). site: which operation of the model this is.
        check_values: whether indices outside their tables are looked for. None: on a CPU; True: also on a GPU, which then waits for
            the device. Unchecked, "triton" reads nothing for such an index, and the token's result is NaN.
        impl: "triton" (one pass forward; D up to 8,192; rows of the tables may be strided), "cpu" or "reference".

    Returns:
        [T, D], as words; the gradients of the tables are summed in a fixed order, with "triton" in fp32.

    Raises:
        ValueError: a shape or device that does not fit, dropout without keys, an unknown `impl`, an index outside its table (see
            check_values); "triton": D above 8,192, a last axis that is not contiguous.
        TypeError: a dtype that does not fit; "triton": float64.

    Source: Devlin et al., 2019, section 3 and figure 2.
    """
    words, position_table, segment_table, weight, shift = widened(
        words, position_table, segment_table, weight, shift
    )
    check(
        ids,
        positions,
        segments,
        words,
        position_table,
        segment_table,
        weight,
        shift,
        dropout_p,
        keys,
        check_values,
        impl,
    )
    arguments = (
        ids,
        positions,
        segments,
        words,
        position_table,
        segment_table,
        weight,
        shift,
        eps,
        dropout_p,
        keys,
        site,
    )
    return _IMPLEMENTATIONS[impl](*arguments)


def check(
    ids,
    positions,
    segments,
    words,
    position_table,
    segment_table,
    weight,
    shift,
    dropout_p,
    keys,
    check_values,
    impl,
):
    name = "embedding_layer_norm"
    check_leader(name, "ids", ids, ("T",), INT64)
    check_leader(name, "words", words, ("V", "D"))
    check_leader(name, "position_table", position_table, ("P", "D"), (words.dtype,))
    check_leader(name, "segment_table", segment_table, ("S", "D"), (words.dtype,))
    T, (V, D), P, S, floats = (
        ids.shape[0],
        words.shape,
        position_table.shape[0],
        segment_table.shape[0],
        (words.dtype,),
    )
    check_dropout(name, dropout_p, keys, T)
    tensors = (
        ("words", words, (V, D), floats),
        ("ids", ids, (T,), INT64),
        ("positions", positions, (T,), INT64),
        ("segments", segments, (T,), INT64),
        ("position_table", position_table, (P, D), floats),
        ("segment_table", segment_table, (S, D), floats),
        ("weight", weight, (D,), floats),
        ("shift", shift, (D,), floats),
        ("keys", keys if dropout_p > 0 else None, (T,), INT64),
    )
    check_tensors(name, words.device, *tensors)
    check_implementation(name, impl, _IMPLEMENTATIONS)
    if values_checked(check_values, ids):
        check_range(name, "ids", ids, V, "V")
        check_range(name, "positions", positions, P, "P")
        check_range(name, "segments", segments, S, "S")
    if impl == "triton":
        check_triton(name, *tensors)
        if D > WIDEST:
            raise ValueError(
                f'{name}: words has D = {D}; impl = "triton" takes up to {WIDEST}, use impl = "reference"'
            )


def _forward_fake(ids, positions, segments, words, *_):
    rows = (words.new_empty(ids.shape[0], dtype=torch.float32) for _ in range(2))
    return words.new_empty(ids.shape[0], words.shape[1]), *rows


def _backward_fake(dy, ids, positions, segments, words, position_table, segment_table, *_):
    rows = words.shape[0] + position_table.shape[0] + segment_table.shape[0]
    return dy.new_empty(rows, dy.shape[1]), dy.new_empty(2, dy.shape[1])


_INDICES = "Tensor ids, Tensor positions, Tensor segments"
_TABLES = "Tensor words, Tensor position_table, Tensor segment_table"
FORWARD = operator(
    f"embedding_layer_norm_forward({_INDICES}, {_TABLES}, Tensor weight, Tensor shift, Tensor? keys, "
    "float eps, float dropout_p, int site) -> (Tensor, Tensor, Tensor)",
    "embedding.kernel.forward",
    _forward_fake,
)
BACKWARD = operator(
    f"embedding_layer_norm_backward(Tensor dy, {_INDICES}, {_TABLES}, Tensor weight, Tensor? keys, Tensor mean, Tensor rstd, "
    "float dropout_p, int site) -> (Tensor, Tensor)",
    "embedding.kernel.backward",
    _backward_fake,
)


class _EmbeddingLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        ids,
        positions,
        segments,
        words,
        position_table,
        segment_table,
        weight,
        shift,
        eps,
        dropout_p,
        keys,
        site,
    ):
        read = (ids, positions, segments, words, position_table, segment_table, weight)
        y, mean, rstd = FORWARD(*read, shift, keys, eps, dropout_p, site)
        ctx.save_for_backward(*read, keys, mean, rstd)
        ctx.dropout_p, ctx.site = dropout_p, site
        return y

    @staticmethod
    @backward_once
    def backward(ctx, dy):  # type: ignore[override]
        saved = ctx.saved_tensors
        dtables, vectors = BACKWARD(dy.contiguous(), *saved, ctx.dropout_p, ctx.site)
        dwords, dpositions, dsegments = dtables.split([table.shape[0] for table in saved[3:6]])
        dweight, dshift = vectors.unbind()
        return (
            None,
            None,
            None,
            dwords,
            dpositions,
            dsegments,
            dweight,
            dshift,
            None,
            None,
            None,
            None,
        )


def _triton(*arguments):
    return _EmbeddingLayerNorm.apply(*arguments)


_IMPLEMENTATIONS = {"triton": _triton, "cpu": cpu, "reference": reference}
