"""Bias, dropout, residual and LayerNorm in one operation."""

from fastbert_kernels.norm.op import dropout_add_layer_norm as dropout_add_layer_norm
from fastbert_kernels.norm.op import layer_norm as layer_norm
