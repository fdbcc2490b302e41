"""The definition of `embedding_layer_norm` in the plainest torch."""

import torch

from fastbert_kernels._dropout import row_multiplier
from fastbert_kernels.norm.reference import reference as norm_reference


def reference(
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
    """dropout(LN(word + position + segment)); arguments and result as in `op.py`."""
    wide = torch.promote_types(words.dtype, torch.float32)
    total = (
        words[ids].to(wide) + position_table[positions].to(wide) + segment_table[segments].to(wide)
    )
    y = norm_reference(total, None, None, weight, shift, eps, 0.0, None, 0)
    if dropout_p > 0:
        y = y * row_multiplier(keys, site, y.shape[1], dropout_p, wide)
    return y.to(words.dtype)
