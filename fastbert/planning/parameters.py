"""How many parameters a model has. Pure Python: numbers in, a number out.

Letters: V vocabulary, D hidden, F feed-forward, L layers.
"""

from __future__ import annotations

from fastbert.config import BertConfig, ModelConfig, ModernBertConfig


def count_parameters(model: ModelConfig, vocab_size: int) -> int:
    """Return the number of parameters of a model for pre-training; a BERT has a tied decoder."""
    if isinstance(model, ModernBertConfig):
        return _of_modernbert(model, vocab_size)
    return _of_bert(model, vocab_size)


def _of_bert(model: BertConfig, vocab_size: int) -> int:
    """Count those of BertForPreTraining.

    - Embeddings: (V + positions + 2 token types) D, and a LayerNorm of 2 D.
    - Each layer: as in `layer_parameters`.
    - MLM head: D^2 + D, a LayerNorm of 2 D, V biases.
    - NSP head: D^2 + D, and 2 (D + 1).
    """
    D = model.hidden_size
    embeddings = (vocab_size + model.max_position_embeddings + 2) * D + 2 * D
    mlm = D * D + D + 2 * D + vocab_size
    nsp = D * D + D + 2 * (D + 1)
    return embeddings + model.num_hidden_layers * layer_parameters(model) + mlm + nsp


def _of_modernbert(model: ModernBertConfig, vocab_size: int) -> int:
    """Count those of ModernBertForMaskedLM.

    - Embeddings: V D and a LayerNorm. A LayerNorm has D parameters, or 2 D with a bias.
    - Each layer: as in `layer_parameters`; the first one has no norm before its attention. Then a
      LayerNorm.
    - MLM head: D^2, a LayerNorm, V biases; another V D where it is not tied.
    """
    D = model.hidden_size
    norm = (1 + model.norm_bias) * D
    embeddings = vocab_size * D + norm
    mlm = D * D + model.classifier_bias * D + norm + model.decoder_bias * vocab_size
    mlm += 0 if model.tie_word_embeddings else vocab_size * D
    return embeddings + model.num_hidden_layers * layer_parameters(model) + mlm


def layer_parameters(model: ModelConfig) -> int:
    """Return those of a layer.

    - BERT: qkv and output 4 (D^2 + D), up F (D + 1), down D (F + 1), two LayerNorms 4 D.
    - ModernBERT: qkv and output 4 D^2, input and gate 2 D F, output D F, two LayerNorms; where they
      have biases, 4 D, 2 F and D more.
    """
    D, F = model.hidden_size, model.intermediate_size
    if isinstance(model, BertConfig):
        return 4 * (D * D + D) + F * (D + 1) + D * (F + 1) + 4 * D
    biases = model.attention_bias * 4 * D + model.mlp_bias * (2 * F + D)
    return 4 * D * D + 3 * D * F + 2 * (1 + model.norm_bias) * D + biases


def count_hidden(model: ModelConfig) -> int:
    """Return the number of parameters in the layers' matrices, which Muon updates."""
    D, F = model.hidden_size, model.intermediate_size
    return model.num_hidden_layers * (4 * D * D + model.feed_forward_matrices * D * F)
