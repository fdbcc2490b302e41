"""The definition of `embedding_layer_norm` in the plainest torch."""

import torch

from fastbert_kernels._dropout import row_multiplier
from fastbert_kernels.norm.reference import reference as norm_reference


def reference(
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
    """dropout(LN(word + position + token type)); arguments and result as in `op.py`."""
    wide = torch.promote_types(word_embeddings.dtype, torch.float32)
    total = (
        word_embeddings[input_ids].to(wide)
        + position_embeddings[position_ids].to(wide)
        + token_type_embeddings[token_type_ids].to(wide)
    )
    y = norm_reference(total, None, None, norm_weight, norm_bias, eps, 0.0, None, 0)
    if dropout_p > 0:
        y = y * row_multiplier(dropout_seeds, dropout_stream, y.shape[1], dropout_p, wide)
    return y.to(word_embeddings.dtype)
