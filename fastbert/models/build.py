"""Makes the model of a configuration; everybody outside of this folder makes models here."""

from __future__ import annotations

from fastbert.config import ModelConfig, ModernBertConfig
from fastbert.models.bert import BertForPreTraining
from fastbert.models.modernbert import ModernBertForMaskedLM

Model = BertForPreTraining | ModernBertForMaskedLM


def build_model(
    config: ModelConfig,
    vocab_size: int,
    kernels: str = "auto",
    device: str = "cpu",
    tied: bool = True,
) -> Model:
    """Return a model with initial weights, on the CPU and in fp32.

    Args:
        config: its sizes and dropout probabilities; its class chooses the architecture.
        vocab_size: V, the size of the tokenizer's vocabulary.
        kernels: "auto", "triton", "cpu" or "reference".
        device: "cpu" or "cuda", where the model will run; it decides what "auto" means.
        tied: as in `BertForPreTraining`. A ModernBertConfig says it itself.

    Raises:
        InputError: the kernels cannot run on this device, or do not take the head size.
    """
    if isinstance(config, ModernBertConfig):
        return ModernBertForMaskedLM(config, vocab_size, kernels, device)
    return BertForPreTraining(config, vocab_size, kernels, device, tied)
