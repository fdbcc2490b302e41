"""ModernBERTs with random weights, and the same models of transformers."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import torch
import transformers
from torch import Tensor

from fastbert.checkpoints.hugging_face_config import written
from fastbert.checkpoints.weight_names import to_hugging_face
from fastbert.config import ModernBertConfig
from fastbert.data.manifest import SpecialIds
from fastbert.data.packing import PackedBatch
from fastbert.models.modernbert import ModernBertForMaskedLM
from tests.random_batch import VOCAB

SPECIAL = SpecialIds(pad=0, unk=1, cls=2, sep=3, mask=4)
SMALL = ModernBertConfig(
    hidden_size=48,
    num_hidden_layers=4,
    num_attention_heads=3,
    intermediate_size=40,
    max_position_embeddings=96,
    local_attention=16,
)
# The published models differ in these.
CONFIGS = {
    "modernbert": SMALL,
    "biases": dataclasses.replace(
        SMALL, norm_bias=True, attention_bias=True, mlp_bias=True, classifier_bias=True
    ),
    "untied": dataclasses.replace(SMALL, tie_word_embeddings=False, decoder_bias=False),
    "ettin and mmBERT": dataclasses.replace(
        SMALL, local_rope_theta=160_000.0, num_hidden_layers=7, num_attention_heads=1
    ),
    "every second layer": dataclasses.replace(
        SMALL, global_attn_every_n_layers=2, local_attention=6, norm_eps=1e-3
    ),
}


def new_model(config: ModernBertConfig, **more: Any) -> ModernBertForMaskedLM:
    """A model whose biases and norms are not 0 and 1, and whose logits are not near 0."""
    torch.manual_seed(0)
    model = ModernBertForMaskedLM(config, VOCAB, **more)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def their_config(config: ModernBertConfig, **more: Any) -> transformers.ModernBertConfig:
    return transformers.ModernBertConfig(vocab_size=VOCAB, **written(config, SPECIAL), **more)


def twin_of(model: ModernBertForMaskedLM) -> transformers.ModernBertForMaskedLM:
    """The same model of transformers."""
    twin = transformers.ModernBertForMaskedLM(their_config(model.config)).eval()
    missing, unexpected = twin.load_state_dict(
        to_hugging_face(model.state_dict(), model.config), strict=False
    )
    tied = {"decoder.weight"} if model.config.tie_word_embeddings else set[str]()
    assert not unexpected and set(missing) == tied
    return twin


def padded(batch: PackedBatch) -> tuple[dict[str, Tensor], Tensor]:
    """A pack as transformers takes it, with labels; and which places hold tokens, bool [B, N]."""
    bounds = list(itertools.pairwise(batch.cu_seqlens.tolist()))
    ids = torch.zeros(len(bounds), batch.max_seqlen, dtype=torch.long)
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    flat = torch.full_like(batch.input_ids, -100)
    flat[batch.masked_positions] = batch.labels
    for row, (start, end) in enumerate(bounds):
        ids[row, : end - start], labels[row, : end - start] = (
            batch.input_ids[start:end],
            flat[start:end],
        )
        mask[row, : end - start] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}, mask.bool()
