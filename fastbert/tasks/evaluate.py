"""How good a model is on held-out text: the loss, and what it is compared with.

The positions that show `[MASK]` are reported apart: a token that was left in place can be copied, which alone is worth 0.6 nats, so
only they compare with the count models (yardsticks) that `prepare` stored, which never see the token in question.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer

from fastbert.config import BatchConfig, RunConfig
from fastbert.data.batches import PackedBatch, heldout_batches
from fastbert.data.store import Store, open_store
from fastbert.data.tokenizer import load_tokenizer
from fastbert.errors import InputError
from fastbert.model import BertForPreTraining
from fastbert.objective import losses
from fastbert.tasks.pretrained import Pretrained
from fastbert.weights import MLM, NSP


@dataclass(frozen=True)
class Evaluation:
    """Losses in nats, accuracies as shares; NaN for what there is nothing of, such as pairs where the objective has none."""

    loss: float  # MLM + NSP
    loss_mlm: float
    perplexity: float  # e to the power of loss_mlm
    accuracy_mlm: float
    loss_mask_token: float  # on the positions that show [MASK]
    accuracy_mask_token: float
    loss_nsp: float
    accuracy_nsp: float
    sequences: int
    tokens: int
    masked: int


@torch.inference_mode()
def measure(model: BertForPreTraining, batches: Iterable[PackedBatch], mask_id: int) -> Evaluation:
    """Run held-out batches through the model, without dropout, and average over all of their masked tokens and pairs.

    Args:
        model: left in the mode (training or evaluation) that it was in.
        batches: as `heldout_batches` makes them; moved to the model's device.
        mask_id: the id of `[MASK]`.
    """
    training, device = model.training, model.embeddings.word_embeddings.weight.device
    model.eval()
    token_losses, token_hits, shown, pair_losses, pair_hits = [], [], [], [], []
    sequences = tokens = 0
    for batch in batches:
        batch = batch.to(device)
        result = losses(model(batch))
        token_losses.append(result.token_losses.double())
        token_hits.append(result.token_hits)
        shown.append(batch.input_ids[batch.masked_positions] == mask_id)
        paired = batch.next_sentence_labels >= 0
        pair_losses.append(result.pair_losses[paired].double())
        pair_hits.append(result.pair_hits[paired])
        sequences, tokens = sequences + batch.sequences, tokens + batch.tokens
    model.train(training)

    token_loss, token_hit, mask_shown = torch.cat(token_losses), torch.cat(token_hits), torch.cat(shown)
    pair_loss, pair_hit = torch.cat(pair_losses), torch.cat(pair_hits)
    loss_mlm = float(token_loss.mean())
    loss_nsp = float(pair_loss.mean())
    return Evaluation(
        loss=loss_mlm + (loss_nsp if len(pair_loss) else 0.0),
        loss_mlm=loss_mlm,
        perplexity=math.exp(min(loss_mlm, 700.0)),  # e to the power of 709 is the largest number there is
        accuracy_mlm=float(token_hit.double().mean()),
        loss_mask_token=float(token_loss[mask_shown].mean()),
        accuracy_mask_token=float(token_hit[mask_shown].double().mean()),
        loss_nsp=loss_nsp,
        accuracy_nsp=float(pair_hit.double().mean()),
        sequences=sequences,
        tokens=tokens,
        masked=len(token_loss),
    )


def evaluate(pretrained: Pretrained, data: str | Path | None = None, sequences: int | None = None) -> tuple[Evaluation, dict[str, float]]:
    """Evaluate on the held-out part of a store.

    Args:
        pretrained: a run's model is measured under its own recipe, a Hugging Face folder's under the default objective.
        data: the store; by default the run's own.
        sequences: how many held-out examples; by default the recipe's `evaluate.sequences`.

    Returns:
        The figures and the store's yardsticks, nats per token.

    Raises:
        InputError: no store named, a store that is missing or broken or made with another vocabulary, a model without an MLM head.
    """
    if MLM not in pretrained.heads:
        raise InputError(f"{pretrained.path}: no weights of an MLM head; there is no loss to measure")
    if data is None and pretrained.recipe is None:
        raise InputError(f"{pretrained.path}: not a run, so it names no store; give one with --data")
    store = open_store(data if data is not None else pretrained.recipe.data)
    _check_vocabulary(pretrained, store)
    recipe = pretrained.recipe or _recipe_for(pretrained)
    if NSP not in pretrained.heads:
        recipe = dataclasses.replace(recipe, objective=dataclasses.replace(recipe.objective, kind="mlm"))
    batches = heldout_batches(store, recipe, sequences or recipe.evaluate.sequences)
    return measure(pretrained.model, batches, store.special.mask), store.yardsticks


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
