"""Small encoders with random parameters, for tests of one implementation against another."""

from __future__ import annotations

import torch

from fastbert.config import BertConfig, ModelConfig, ModernBertConfig
from fastbert.models.bert import BertForPreTraining
from fastbert.models.build import Model, build_model
from fastbert.models.modernbert import ModernBertForMaskedLM
from tests.random_batch import VOCAB


def build(dropout: float = 0.0, heads: int = 3) -> BertForPreTraining:
    """Build two layers in training mode, in fp32, with heads of 16.

    The last layer computes only what is read. Biases and norms are not 0 and 1.
    """
    config = BertConfig(
        hidden_size=16 * heads,
        num_hidden_layers=2,
        num_attention_heads=heads,
        intermediate_size=96,
        max_position_embeddings=160,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    return _random(config)  # type: ignore[return-value]


def build_modern(dropout: float = 0.0, heads: int = 3) -> ModernBertForMaskedLM:
    """Build a global layer and a local one; the rest as in `build`."""
    config = ModernBertConfig(
        hidden_size=16 * heads,
        num_hidden_layers=2,
        num_attention_heads=heads,
        intermediate_size=48,
        max_position_embeddings=160,
        global_attn_every_n_layers=2,
        local_attention=32,
        embedding_dropout=dropout,
        attention_dropout=dropout,
        mlp_dropout=dropout,
    )
    return _random(config)  # type: ignore[return-value]


def _random(config: ModelConfig) -> Model:
    torch.manual_seed(0)
    model = build_model(config, VOCAB)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.train()
