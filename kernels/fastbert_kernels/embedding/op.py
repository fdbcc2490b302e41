"""`embedding_layer_norm`: the input of BERT."""

import torch

from fastbert_kernels._autocast import cast_fp32
from fastbert_kernels._checks import (
    INT64,
    check_dropout,
    check_implementation,
    check_leader,
    check_range,
    check_row_width,
    check_tensors,
    check_triton,
    values_checked,
)
from fastbert_kernels._library import backward_once, operator
from fastbert_kernels.embedding.cpu import cpu
from fastbert_kernels.embedding.reference import reference


def embedding_layer_norm(
    input_ids: torch.Tensor,
    position_ids: torch.Tensor,
    token_type_ids: torch.Tensor,
    word_embeddings: torch.Tensor,
    position_embeddings: torch.Tensor,
    token_type_embeddings: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    *,
    eps: float = 1e-12,
    dropout_p: float = 0.0,
    dropout_seeds: torch.Tensor | None = None,
    dropout_stream: int = 0,
    check_values: bool | None = None,
    impl: str = "reference",
) -> torch.Tensor:
    """dropout(LayerNorm(word + position + token-type embedding of each token)), biased variance.

    Under autocast it runs in fp32, as torch's layer_norm. Saved for the backward pass: "triton": the indices, and the mean and rstd of
    each token, fp32 [T]; "cpu": the indices, the sum of the three rows, mean, rstd and the mask.

    Args:
        input_ids, position_ids, token_type_ids: int64 [T].
        word_embeddings: [V, D], fp32, fp16 or bf16.
        position_embeddings: [P, D], token_type_embeddings: [S, D], as word_embeddings.
        norm_weight, norm_bias: [D], LayerNorm's gamma and beta, as word_embeddings.
        eps: added to the variance.
        dropout_p: probability to drop an element, rounded to a multiple of 2**-16.
        dropout_seeds: int64 [T], one seed a row (`row_seeds`).
        dropout_stream: which operation of the model this is, so that each draws its own masks.
        check_values: whether indices outside their tables are looked for. None: on a CPU; True: also on a GPU, which then waits for
            the device. Unchecked, "triton" reads nothing for such an index, and the token's result is NaN.
        impl: "triton" (one pass forward; D up to 8,192; rows of the tables may be strided), "cpu" or "reference".

    Returns:
        [T, D], as word_embeddings; the gradients of the tables are summed in a fixed order, with "triton" in fp32.

    Raises:
        ValueError: a shape or device that does not fit, dropout without seeds, an unknown `impl`, an index outside its table (see
            check_values); "triton": D above 8,192, a last axis that is not contiguous.
        TypeError: a dtype that does not fit; "triton": float64.

    Source: Devlin et al., 2019, section 3 and figure 2.
    """
    word_embeddings, position_embeddings, token_type_embeddings, norm_weight, norm_bias = cast_fp32(
        word_embeddings, position_embeddings, token_type_embeddings, norm_weight, norm_bias
    )
    check(
        input_ids,
        position_ids,
        token_type_ids,
        word_embeddings,
        position_embeddings,
        token_type_embeddings,
        norm_weight,
        norm_bias,
        dropout_p,
        dropout_seeds,
        check_values,
        impl,
    )
    arguments = (
        input_ids,
        position_ids,
        token_type_ids,
        word_embeddings,
        position_embeddings,
        token_type_embeddings,
        norm_weight,
        norm_bias,
        eps,
        dropout_p,
        dropout_seeds,
        dropout_stream,
    )
    return _IMPLEMENTATIONS[impl](*arguments)


def check(
    input_ids,
    position_ids,
    token_type_ids,
    word_embeddings,
    position_embeddings,
    token_type_embeddings,
    norm_weight,
    norm_bias,
    dropout_p,
    dropout_seeds,
    check_values,
    impl,
):
    name = "embedding_layer_norm"
    check_leader(name, "input_ids", input_ids, ("T",), INT64)
    check_leader(name, "word_embeddings", word_embeddings, ("V", "D"))
    check_leader(
        name, "position_embeddings", position_embeddings, ("P", "D"), (word_embeddings.dtype,)
    )
    check_leader(
        name, "token_type_embeddings", token_type_embeddings, ("S", "D"), (word_embeddings.dtype,)
    )
    T, (V, D), P, S, floats = (
        input_ids.shape[0],
        word_embeddings.shape,
        position_embeddings.shape[0],
        token_type_embeddings.shape[0],
        (word_embeddings.dtype,),
    )
    check_dropout(name, dropout_p, dropout_seeds, T)
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
    check_tensors(name, word_embeddings.device, *tensors)
    check_implementation(name, impl, _IMPLEMENTATIONS)
    if values_checked(check_values, input_ids):
        check_range(name, "input_ids", input_ids, V, "V")
        check_range(name, "position_ids", position_ids, P, "P")
        check_range(name, "token_type_ids", token_type_ids, S, "S")
    if impl == "triton":
        check_triton(name, *tensors)
        check_row_width(name, "word_embeddings", D)


def _forward_fake(input_ids, position_ids, token_type_ids, word_embeddings, *_):
    rows = (word_embeddings.new_empty(input_ids.shape[0], dtype=torch.float32) for _ in range(2))
    return word_embeddings.new_empty(input_ids.shape[0], word_embeddings.shape[1]), *rows


def _backward_fake(
    dy,
    input_ids,
    position_ids,
    token_type_ids,
    word_embeddings,
    position_embeddings,
    token_type_embeddings,
    *_,
):
    rows = word_embeddings.shape[0] + position_embeddings.shape[0] + token_type_embeddings.shape[0]
    return dy.new_empty(rows, dy.shape[1]), dy.new_empty(2, dy.shape[1])


_INDICES = "Tensor input_ids, Tensor position_ids, Tensor token_type_ids"
_TABLES = "Tensor word_embeddings, Tensor position_embeddings, Tensor token_type_embeddings"
FORWARD = operator(
    f"embedding_layer_norm_forward({_INDICES}, {_TABLES}, Tensor norm_weight, Tensor norm_bias, Tensor? dropout_seeds, "
    "float eps, float dropout_p, int dropout_stream) -> (Tensor, Tensor, Tensor)",
    "embedding.kernel.forward",
    _forward_fake,
)
BACKWARD = operator(
    f"embedding_layer_norm_backward(Tensor dy, {_INDICES}, {_TABLES}, Tensor norm_weight, Tensor? dropout_seeds, Tensor mean, Tensor rstd, "
    "float dropout_p, int dropout_stream) -> (Tensor, Tensor)",
    "embedding.kernel.backward",
    _backward_fake,
)


class _EmbeddingLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        input_ids,
        position_ids,
        token_type_ids,
        word_embeddings,
        position_embeddings,
        token_type_embeddings,
        norm_weight,
        norm_bias,
        eps,
        dropout_p,
        dropout_seeds,
        dropout_stream,
    ):
        read = (
            input_ids,
            position_ids,
            token_type_ids,
            word_embeddings,
            position_embeddings,
            token_type_embeddings,
            norm_weight,
        )
        y, mean, rstd = FORWARD(*read, norm_bias, dropout_seeds, eps, dropout_p, dropout_stream)
        ctx.save_for_backward(*read, dropout_seeds, mean, rstd)
        ctx.dropout_p, ctx.dropout_stream = dropout_p, dropout_stream
        return y

    @staticmethod
    @backward_once
    def backward(ctx, dy):  # type: ignore[override]
        saved = ctx.saved_tensors
        dtables, vectors = BACKWARD(dy.contiguous(), *saved, ctx.dropout_p, ctx.dropout_stream)
        dword_embeddings, dposition_embeddings, dtoken_type_embeddings = dtables.split(
            [table.shape[0] for table in saved[3:6]]
        )
        dnorm_weight, dnorm_bias = vectors.unbind()
        return (
            None,
            None,
            None,
            dword_embeddings,
            dposition_embeddings,
            dtoken_type_embeddings,
            dnorm_weight,
            dnorm_bias,
            None,
            None,
            None,
            None,
        )


def _triton(*arguments):
    return _EmbeddingLayerNorm.apply(*arguments)


_IMPLEMENTATIONS = {"triton": _triton, "cpu": cpu, "reference": reference}
