"""Fused operations of a BERT encoder over packed sequences, each usable alone in any torch model.

`from fastbert_kernels import varlen_attention` imports that operation and nothing else.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastbert_kernels._dropout import row_seeds
    from fastbert_kernels._linear import linear
    from fastbert_kernels._tile_schedule import attention_tile_schedule
    from fastbert_kernels.add_norm import add_layer_norm
    from fastbert_kernels.attention import varlen_attention
    from fastbert_kernels.embedding import embedding_layer_norm
    from fastbert_kernels.geglu import bias_geglu
    from fastbert_kernels.gelu import bias_gelu
    from fastbert_kernels.mlm_loss import masked_cross_entropy
    from fastbert_kernels.norm import dropout_add_layer_norm, layer_norm
    from fastbert_kernels.rotary import packed_positions, rotary_embedding, rotary_table

__all__ = [
    "add_layer_norm",
    "attention_tile_schedule",
    "bias_geglu",
    "bias_gelu",
    "dropout_add_layer_norm",
    "embedding_layer_norm",
    "layer_norm",
    "linear",
    "masked_cross_entropy",
    "packed_positions",
    "rotary_embedding",
    "rotary_table",
    "row_seeds",
    "varlen_attention",
]
__version__ = "0.2.0"

_MODULES = {
    "add_layer_norm": "add_norm",
    "attention_tile_schedule": "_tile_schedule",
    "bias_geglu": "geglu",
    "bias_gelu": "gelu",
    "dropout_add_layer_norm": "norm",
    "embedding_layer_norm": "embedding",
    "layer_norm": "norm",
    "linear": "_linear",
    "masked_cross_entropy": "mlm_loss",
    "packed_positions": "rotary",
    "rotary_embedding": "rotary",
    "rotary_table": "rotary",
    "row_seeds": "_dropout",
    "varlen_attention": "attention",
}


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"fastbert_kernels has no {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(f"fastbert_kernels.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*__all__, *(name for name in globals() if name.startswith("__"))])
