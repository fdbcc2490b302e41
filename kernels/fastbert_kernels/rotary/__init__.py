"""Rotary position embeddings of the packed projection of queries, keys and values."""

from fastbert_kernels.rotary.op import rotary_embedding as rotary_embedding
from fastbert_kernels.rotary.table import packed_positions as packed_positions
from fastbert_kernels.rotary.table import rotary_table as rotary_table
