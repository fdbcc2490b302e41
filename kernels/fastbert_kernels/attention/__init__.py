"""Attention over packed sequences, with dropout."""

from fastbert_kernels.attention.op import varlen_attention as varlen_attention
