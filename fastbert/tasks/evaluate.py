"""How good a model is on held-out text: the loss, and what it is compared with.

The positions that show `[MASK]` are reported apart: a token that was left in place can be copied, which alone is worth 0.6 nats, so
only they compare with the count models (yardsticks) that `prepare` stored, which never see the token in question.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from fastbert.config import BatchConfig, RunConfig
from fastbert.data.batches import heldout_batches
from fastbert.data.store import Store, open_store
from fastbert.data.tokenizer import load_tokenizer
from fastbert.errors import InputError
from fastbert.objective import losses
from fastbert.tasks.pretrained import Pretrained
from fastbert.training.heldout import HeldOut, heldout_means, heldout_sums
from fastbert.weights import MLM, NSP


@dataclass(frozen=True)
class Evaluation:
    """What was found, and on how much: `masked` counts the selected tokens among `tokens`."""

    heldout: HeldOut
    sequences: int
    tokens: int
    masked: int
    yardsticks: dict[str, float]  # the store's, nats per token

    @property
    def perplexity(self) -> float:
        """e to the power of the MLM loss; infinite where that is no number any more."""
        return math.exp(self.heldout.loss_mlm) if self.heldout.loss_mlm < 700 else math.inf

    def flat(self) -> dict[str, Any]:
        """Everything side by side, for JSON."""
        counts = {"sequences": self.sequences, "tokens": self.tokens, "masked": self.masked}
        return {**asdict(self.heldout), "perplexity": self.perplexity, **counts, "yardsticks": self.yardsticks}


@torch.inference_mode()
def evaluate(pretrained: Pretrained, data: str | Path | None = None, sequences: int | None = None) -> Evaluation:
    """Evaluate on the held-out part of a store, with the masks that are the same for every model.

    Args:
        pretrained: a run's model is measured under its own recipe, a Hugging Face folder's under the default objective.
        data: the store; by default the run's own.
        sequences: how many held-out examples; by default the recipe's `evaluate.sequences`.

    Raises:
        InputError: no store named, a store that is missing or broken or made with another vocabulary, a model without an MLM head.
    """
    if MLM not in pretrained.heads:
        raise InputError(f"{pretrained.path}: no weights of an MLM head; there is no loss to measure")
    recipe = pretrained.recipe or _recipe_for(pretrained)
    data = data or recipe.data
    if not data:
        raise InputError(f"{pretrained.path}: not a run, so it names no store; give one with --data")
    store = open_store(data)
    _check_vocabulary(pretrained, store)
    if NSP not in pretrained.heads:
        recipe = replace(recipe, objective=replace(recipe.objective, kind="mlm"))
    batches = heldout_batches(store, recipe, sequences or recipe.evaluate.sequences)
    device = pretrained.model.embeddings.words.device
    sums = torch.zeros(9, dtype=torch.float64)
    for batch in batches:
        batch = batch.to(device)
        sums += heldout_sums(losses(pretrained.model(batch)), batch, store.special.mask).cpu()
    return Evaluation(
        heldout=heldout_means(sums),
        sequences=sum(batch.sequences for batch in batches),
        tokens=sum(batch.tokens for batch in batches),
        masked=sum(len(batch.labels) for batch in batches),
        yardsticks=store.yardsticks,
    )


def _recipe_for(pretrained: Pretrained) -> RunConfig:
    """The default recipe, its sequences no longer than the model's positions."""
    batch = BatchConfig(max_length=min(BatchConfig().max_length, pretrained.config.max_position_embeddings))
    return RunConfig(data="", model=pretrained.config, batch=batch)


def _check_vocabulary(pretrained: Pretrained, store: Store) -> None:
    """The store's ids must mean the same tokens, made from text in the same way, as those of the model."""
    theirs = load_tokenizer(store.tokenizer_dir)
    if _identity(theirs) != _identity(pretrained.tokenizer):
        raise InputError(
            f"{store.path}: made with another tokenizer ({theirs.get_vocab_size():,} tokens) than {pretrained.path} "
            f"({pretrained.tokenizer.get_vocab_size():,}); prepare the text with --tokenizer {pretrained.path}"
        )


def _identity(tokenizer: Tokenizer) -> tuple:
    return tokenizer.get_vocab(), json.loads(tokenizer.to_str())["normalizer"]
