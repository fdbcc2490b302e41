"""Three embedding look-ups, LayerNorm and dropout in one operation."""

from fastbert_kernels.embedding.op import embedding_layer_norm as embedding_layer_norm
