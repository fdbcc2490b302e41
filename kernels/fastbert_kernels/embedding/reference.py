"""The definition of `embedding_layer_norm` in the plainest torch."""

import torch

from fastbert_kernels._dropout import row_multiplier


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
    z = (
        word_embeddings[input_ids].to(wide)
        + position_embeddings[position_ids].to(wide)
        + token_type_embeddings[token_type_ids].to(wide)
    )
    mean = z.mean(-1, keepdim=True)
    rstd = ((z - mean).square().mean(-1, keepdim=True) + eps).rsqrt()
    y = (z - mean) * rstd * norm_weight.to(wide) + norm_bias.to(wide)
    if dropout_p > 0:
        y = y * row_multiplier(dropout_seeds, dropout_stream, y.shape[1], dropout_p, wide)
    return y.to(word_embeddings.dtype)
