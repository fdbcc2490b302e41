"""Fused operations of a BERT encoder over packed sequences, each usable alone in any torch model.

Loaded lazily: `from fastbert_kernels import varlen_attention` imports that operation and nothing else.
"""

import importlib

_PUBLIC = {
    "varlen_attention": "attention",
    "masked_cross_entropy": "mlm_loss",
    "dropout_add_layer_norm": "norm",
    "layer_norm": "norm",
    "bias_gelu": "gelu",
    "embedding_layer_norm": "embedding",
    "row_keys": "_dropout",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"fastbert_kernels has no {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(f"fastbert_kernels.{_PUBLIC[name]}"), name)
