"""Bias, dropout, residual stream and LayerNorm in one operation that returns sum and norm."""

from fastbert_kernels.add_norm.op import add_layer_norm as add_layer_norm
