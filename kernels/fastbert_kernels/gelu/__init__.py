"""Bias and GELU in one operation."""

from fastbert_kernels.gelu.op import bias_gelu as bias_gelu
