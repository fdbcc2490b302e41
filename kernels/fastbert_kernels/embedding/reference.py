"""The definition of `embedding_layer_norm` in the plainest torch."""

import torch
from torch import Tensor

from fastbert_kernels._dropout import row_multiplier


def reference(
    input_ids: Tensor,
    position_ids: Tensor | None,
    token_type_ids: Tensor | None,
    word_embeddings: Tensor,
    position_embeddings: Tensor | None,
    token_type_embeddings: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    eps: float,
    dropout_p: float,
    dropout_seeds: Tensor | None,
    dropout_stream: int,
) -> Tensor:
    """dropout(LN(word + position + token type)); arguments and result as in `op.py`."""
    wide = torch.promote_types(word_embeddings.dtype, torch.float32)
    z = word_embeddings[input_ids].to(wide)
    if position_embeddings is not None:
        z = z + position_embeddings[position_ids].to(wide)
    if token_type_embeddings is not None:
        z = z + token_type_embeddings[token_type_ids].to(wide)
    mean = z.mean(-1, keepdim=True)
    rstd = ((z - mean).square().mean(-1, keepdim=True) + eps).rsqrt()
    y = (z - mean) * rstd * norm_weight.to(wide)
    if norm_bias is not None:
        y = y + norm_bias.to(wide)
    if dropout_p > 0:
        assert dropout_seeds is not None  # check_dropout
        y = y * row_multiplier(dropout_seeds, dropout_stream, y.shape[1], dropout_p, wide)
    return y.to(word_embeddings.dtype)
