"""The weights of BERT and their names in transformers' BertForPreTraining.

Two weights differ in more than the name. Our `qkv` is their query, key and value, joined along the
rows. Their decoder is our word embedding (tied), so it is stored once.

Source: transformers, `models/bert/modeling_bert.py`. LayerNorm's names `gamma` and `beta` are those
of the first checkpoints, converted from TensorFlow.
"""

from __future__ import annotations

from fastbert.checkpoints.weight_table import Entry, Table
from fastbert.config import BertConfig

# Our name: Hugging Face's name, and the axes.
_OUTSIDE = {
    "embeddings.word": ("bert.embeddings.word_embeddings.weight", "VD"),
    "embeddings.position": ("bert.embeddings.position_embeddings.weight", "PD"),
    "embeddings.token_type": ("bert.embeddings.token_type_embeddings.weight", "SD"),
    "embeddings.norm_weight": ("bert.embeddings.LayerNorm.weight", "D"),
    "embeddings.norm_bias": ("bert.embeddings.LayerNorm.bias", "D"),
    "mlm_head.weight": ("cls.predictions.transform.dense.weight", "DD"),
    "mlm_head.bias": ("cls.predictions.transform.dense.bias", "D"),
    "mlm_head.norm_weight": ("cls.predictions.transform.LayerNorm.weight", "D"),
    "mlm_head.norm_bias": ("cls.predictions.transform.LayerNorm.bias", "D"),
    "mlm_head.vocabulary_bias": ("cls.predictions.bias", "V"),
    "nsp_head.pooler.weight": ("bert.pooler.dense.weight", "DD"),
    "nsp_head.pooler.bias": ("bert.pooler.dense.bias", "D"),
    "nsp_head.classifier.weight": ("cls.seq_relationship.weight", "CD"),
    "nsp_head.classifier.bias": ("cls.seq_relationship.bias", "C"),
}
# Below "layers.i." and "bert.encoder.layer.i."; "query" stands for query, key and value.
_LAYER = {
    "attention.qkv_weight": ("attention.self.query.weight", "DD"),
    "attention.qkv_bias": ("attention.self.query.bias", "D"),
    "attention.output.weight": ("attention.output.dense.weight", "DD"),
    "attention.output.bias": ("attention.output.dense.bias", "D"),
    "attention.output.norm_weight": ("attention.output.LayerNorm.weight", "D"),
    "attention.output.norm_bias": ("attention.output.LayerNorm.bias", "D"),
    "feed_forward.weight": ("intermediate.dense.weight", "FD"),
    "feed_forward.bias": ("intermediate.dense.bias", "F"),
    "feed_forward.output.weight": ("output.dense.weight", "DF"),
    "feed_forward.output.bias": ("output.dense.bias", "D"),
    "feed_forward.output.norm_weight": ("output.LayerNorm.weight", "D"),
    "feed_forward.output.norm_bias": ("output.LayerNorm.bias", "D"),
}
_DECODER, _DECODER_BIAS = "cls.predictions.decoder.weight", "cls.predictions.decoder.bias"
# Heads that a fine-tuned folder may contain; the encoder below them is a BERT.
_OTHER_TASKS = ("classifier.", "qa_outputs.")


def bert_table(model: BertConfig) -> Table:
    """Return the weights of a model with this configuration and a tied decoder."""
    table = {ours: Entry((theirs,), axes) for ours, (theirs, axes) in _OUTSIDE.items()}
    for i in range(model.num_hidden_layers):
        for ours, (theirs, axes) in _LAYER.items():
            several = (
                [theirs.replace("query", name) for name in ("query", "key", "value")]
                if "query" in theirs
                else [theirs]
            )
            table[f"layers.{i}.{ours}"] = Entry(
                tuple(f"bert.encoder.layer.{i}.{name}" for name in several), axes
            )
    return Table("BERT", "Bert", table, _DECODER, _DECODER_BIAS, _OTHER_TASKS, _canonical)


def _canonical(name: str) -> str:
    """The name as today's transformers writes it."""
    if name.startswith(("embeddings.", "encoder.", "pooler.")):
        name = "bert." + name
    if "LayerNorm." in name:
        name = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace(
            "LayerNorm.beta", "LayerNorm.bias"
        )
    return name
