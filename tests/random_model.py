"""A small encoder with random parameters, for tests of one implementation against another."""

from __future__ import annotations

import torch

from fastbert.config import BertConfig
from fastbert.models.bert import BertForPreTraining
from tests.random_batch import VOCAB


def build(dropout: float = 0.0, heads: int = 3) -> BertForPreTraining:
    """Build two layers in training mode, in fp32, with heads of 16.

    The last layer computes only what is read. Biases and norms are not 0 and 1.
    """
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=16 * heads,
        num_hidden_layers=2,
        num_attention_heads=heads,
        intermediate_size=96,
        max_position_embeddings=160,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    model = BertForPreTraining(config, VOCAB)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.train()
