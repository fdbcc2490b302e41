"""GELU of one half times the other half, with a bias, in one operation."""

from fastbert_kernels.geglu.op import bias_geglu as bias_geglu
