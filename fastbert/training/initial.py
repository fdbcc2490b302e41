"""The model that a run starts from (`init = "folder"`).

The recipe takes its sizes, the first weights are its weights, and its vocabulary must be the
dataset's.
"""

from __future__ import annotations

from dataclasses import fields, replace

from fastbert.checkpoints.bucket import fetch_checkpoint
from fastbert.checkpoints.model_folder import ModelParts, open_model
from fastbert.checkpoints.weight_table import DECODER
from fastbert.config import BertConfig, ModelConfig, RunConfig
from fastbert.data.dataset import TokenDataset
from fastbert.data.tokenizer import load_tokenizer, same_tokens
from fastbert.errors import InputError
from fastbert.models.build import Model
from fastbert.recipe import check_config
from fastbert.storage import Url, place

# Weights with a row for each token.
PER_TOKEN = ("embeddings.word", "mlm_head.vocabulary_bias", DECODER)


def open_initial(path: str) -> ModelParts:
    """Open the model at `path`: any folder that `fastbert.load` opens. A BERT's decoder is tied.

    Raises:
        InputError: it cannot be opened, or it is a BERT whose decoder is not tied.
    """
    at = place(path)
    parts = open_model(fetch_checkpoint(at).path if isinstance(at, Url) else at)
    if DECODER in parts.weights and isinstance(parts.config, BertConfig):
        raise InputError(
            f"{parts.path}: its decoder is not tied to the word embeddings; "
            "only a model with a tied one can be trained further"
        )
    return parts


def with_sizes(config: RunConfig, found: ModelConfig, recipe: str) -> RunConfig:
    """Return the recipe with the sizes of the model that it starts from.

    The recipe may set keys on positions itself (`of_positions` of the model's configuration).

    Args:
        config: the recipe.
        found: the model's sizes.
        recipe: the recipe's path, for messages.

    Raises:
        InputError: the recipe has another architecture, or itself sets another size, or an
            initialization that `init` replaces.
    """
    model, key = config.model, "init" if config.branch_from is None else "branch_from"
    start = f"{key} = {getattr(config, key)!r}"
    if model.type != found.type:
        raise InputError(
            f'{recipe}: model.type = "{model.type}", but {start} has '
            f'"{found.type}"; set model.type = "{found.type}", or leave {key} out'
        )
    chosen = {name for name in found.of_positions if name in config.given}
    own = chosen.union(found.of_training)
    sizes = [item.name for item in fields(found) if item.name not in own]
    for name in sizes:
        mine, theirs = getattr(model, name), getattr(found, name)
        if name in config.given and mine != theirs:
            raise InputError(
                f"{recipe}: model.{name} = {mine}, but {start} has {theirs}; "
                f"leave it out, or leave {key} out"
            )
    if (
        key == "init"
        and isinstance(model, BertConfig)
        and model.initial_attention != BertConfig.initial_attention
    ):
        raise InputError(
            f'{recipe}: model.initial_attention = "{model.initial_attention}" '
            f"and init = {config.init!r}: choose one"
        )
    resolved = replace(
        config, model=replace(model, **{name: getattr(found, name) for name in sizes})
    )
    check_config(resolved, recipe)
    return resolved


def put(source: str, initial: ModelParts, model: Model, dataset: TokenDataset, recipe: str) -> None:
    """Copy the weights into a new model; a missing head keeps its random weights.

    Args:
        source: the recipe's init, for messages.
        initial: the opened model.
        model: the new model, which is changed.
        dataset: the run's dataset.
        recipe: the recipe's path, for messages.

    Raises:
        InputError: the dataset has another vocabulary.
    """
    theirs = load_tokenizer(dataset.tokenizer_dir)
    if not same_tokens(theirs, initial.tokenizer):
        raise InputError(
            f"{recipe}: init = {source!r} has {initial.tokenizer.get_vocab_size():,} tokens "
            f"that are not those of {dataset.path} ({theirs.get_vocab_size():,}); "
            f"prepare the text with --tokenizer {source}"
        )
    # Some models pad their embedding tables. Rows past the last token are dropped.
    weights = {
        name: tensor[: dataset.vocab_size] if name in PER_TOKEN else tensor
        for name, tensor in initial.weights.items()
    }
    result = model.load_state_dict(weights, strict=False)
    assert not result.unexpected_keys and all("_head." in name for name in result.missing_keys), (
        result
    )
