"""The same pre-training model built of torch.nn: padded sequences, SDPA. A rival in benchmarks.

It is faster than common practice: its vocabulary head computes only the masked tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastbert.config import BertConfig
from fastbert.data.packing import PackedBatch


class PaddedBatch(NamedTuple):
    input_ids: Tensor  # int64 [B, S], 0 where there is no token
    token_type_ids: Tensor  # int64 [B, S]
    attention_mask: Tensor  # bool [B, 1, 1, S]
    masked_positions: Tensor  # int64 [M], into the B * S positions
    labels: Tensor  # int64 [M]
    next_sentence_labels: Tensor  # int64 [B]


def pad(batch: PackedBatch) -> PaddedBatch:
    """The same examples, padded to [B, longest]."""
    lengths = batch.cu_seqlens.diff().tolist()

    def rows(x: Tensor) -> Tensor:
        return nn.utils.rnn.pad_sequence(list(x.split(lengths)), batch_first=True)

    mask = rows(torch.ones_like(batch.input_ids)).bool()
    places = mask.flatten().nonzero()[:, 0]  # of the packed tokens in the padded batch
    positions = places[batch.masked_positions]
    ids, types = rows(batch.input_ids), rows(batch.token_type_ids)
    return PaddedBatch(
        ids, types, mask[:, None, None, :], positions, batch.labels, batch.next_sentence_labels
    )


class PaddedLayer(nn.Module):
    def __init__(self, config: BertConfig):
        super().__init__()
        size = config.hidden_size
        self.heads = config.num_attention_heads
        self.attention_dropout = config.attention_probs_dropout_prob
        self.qkv, self.context = nn.Linear(size, 3 * size), nn.Linear(size, size)
        self.inner = nn.Linear(size, config.intermediate_size)
        self.outer = nn.Linear(config.intermediate_size, size)
        self.norms = nn.ModuleList(nn.LayerNorm(size, config.layer_norm_eps) for _ in range(2))
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        p = self.attention_dropout if self.training else 0.0
        context = (
            functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p)
            .transpose(1, 2)
            .flatten(2)
        )
        x = self.norms[0](x + self.dropout(self.context(context)))
        return self.norms[1](x + self.dropout(self.outer(functional.gelu(self.inner(x)))))


class PaddedBert(nn.Module):
    def __init__(self, config: BertConfig, vocab_size: int):
        super().__init__()
        size = config.hidden_size
        self.words, self.segments = nn.Embedding(vocab_size, size), nn.Embedding(2, size)
        self.positions = nn.Embedding(config.max_position_embeddings, size)
        self.norm = nn.LayerNorm(size, config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.layers = nn.ModuleList(PaddedLayer(config) for _ in range(config.num_hidden_layers))
        self.head = nn.Sequential(
            nn.Linear(size, size), nn.GELU(), nn.LayerNorm(size, config.layer_norm_eps)
        )
        self.vocabulary_bias = nn.Parameter(torch.zeros(vocab_size))
        self.next_sentence = nn.Sequential(nn.Linear(size, size), nn.Tanh(), nn.Linear(size, 2))
        for table in (self.words, self.positions, self.segments):
            nn.init.normal_(table.weight, std=config.initializer_range)

    def forward(self, batch: PaddedBatch) -> Tensor:
        """MLM + NSP loss, scalar fp32."""
        positions = torch.arange(batch.input_ids.shape[1], device=batch.input_ids.device)
        x = (
            self.words(batch.input_ids)
            + self.positions(positions)
            + self.segments(batch.token_type_ids)
        )
        x = self.dropout(self.norm(x))
        for layer in self.layers:
            x = layer(x, batch.attention_mask)
        masked = self.head(x.flatten(0, 1)[batch.masked_positions])
        logits = functional.linear(masked, self.words.weight, self.vocabulary_bias)
        pairs = self.next_sentence(x[:, 0])
        cross_entropy = functional.cross_entropy
        return cross_entropy(logits.float(), batch.labels) + cross_entropy(
            pairs.float(), batch.next_sentence_labels
        )
