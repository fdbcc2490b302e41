"""The weights of ModernBERT and their names in transformers' ModernBertForMaskedLM.

Source: transformers, `models/modernbert/modeling_modernbert.py`.
"""

from __future__ import annotations

from fastbert.checkpoints.weight_table import DECODER, Entry, Table
from fastbert.config import ModernBertConfig

# Our name: their name, the axes, and the key of the config without which the weight is not there.
_OUTSIDE = {
    "embeddings.word": ("model.embeddings.tok_embeddings.weight", "VD", None),
    "embeddings.norm_weight": ("model.embeddings.norm.weight", "D", None),
    "embeddings.norm_bias": ("model.embeddings.norm.bias", "D", "norm_bias"),
    "final_norm.weight": ("model.final_norm.weight", "D", None),
    "final_norm.bias": ("model.final_norm.bias", "D", "norm_bias"),
    "mlm_head.weight": ("head.dense.weight", "DD", None),
    "mlm_head.bias": ("head.dense.bias", "D", "classifier_bias"),
    "mlm_head.norm_weight": ("head.norm.weight", "D", None),
    "mlm_head.norm_bias": ("head.norm.bias", "D", "norm_bias"),
    "mlm_head.vocabulary_bias": ("decoder.bias", "V", "decoder_bias"),
}
# Below "layers.i." and "model.layers.i.". Layer 0 has no attention norm.
_LAYER = {
    "attention_norm.weight": ("attn_norm.weight", "D", None),
    "attention_norm.bias": ("attn_norm.bias", "D", "norm_bias"),
    "attention.qkv_weight": ("attn.Wqkv.weight", "QD", None),
    "attention.qkv_bias": ("attn.Wqkv.bias", "Q", "attention_bias"),
    "attention.output_weight": ("attn.Wo.weight", "DD", None),
    "attention.output_bias": ("attn.Wo.bias", "D", "attention_bias"),
    "feed_forward_norm.weight": ("mlp_norm.weight", "D", None),
    "feed_forward_norm.bias": ("mlp_norm.bias", "D", "norm_bias"),
    "feed_forward.input_gate_weight": ("mlp.Wi.weight", "GD", None),
    "feed_forward.input_gate_bias": ("mlp.Wi.bias", "G", "mlp_bias"),
    "feed_forward.output_weight": ("mlp.Wo.weight", "DF", None),
    "feed_forward.output_bias": ("mlp.Wo.bias", "D", "mlp_bias"),
}
_DECODER = "decoder.weight"


def modernbert_table(model: ModernBertConfig) -> Table:
    """Return the weights of a model with this configuration."""
    entries = {
        ours: Entry((theirs,), axes)
        for ours, (theirs, axes, key) in _OUTSIDE.items()
        if key is None or getattr(model, key)
    }
    if not model.tie_word_embeddings:
        entries[DECODER] = Entry((_DECODER,), "VD")
    for i in range(model.num_hidden_layers):
        for ours, (theirs, axes, key) in _LAYER.items():
            there = i > 0 or not ours.startswith("attention_norm.")
            if there and (key is None or getattr(model, key)):
                entries[f"layers.{i}.{ours}"] = Entry((f"model.layers.{i}.{theirs}",), axes)
    others = ("classifier.",)
    return Table("ModernBERT", "ModernBert", entries, _DECODER, None, others, _canonical)


def _canonical(name: str) -> str:
    """The name in ModernBertForMaskedLM of a weight that may be from a ModernBertModel."""
    return f"model.{name}" if name.startswith(("embeddings.", "layers.", "final_norm.")) else name
