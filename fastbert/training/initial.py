"""The model that a run starts from (`init = "folder"`).

The recipe takes its sizes, the first weights are its weights, and its vocabulary must be the
dataset's.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from fastbert.checkpoints.model_folder import ModelParts, open_model
from fastbert.checkpoints.weight_names import DECODER
from fastbert.config import ModelConfig, RunConfig, check_config
from fastbert.data.dataset import TokenDataset
from fastbert.data.tokenizer import load_tokenizer, same_tokens
from fastbert.errors import InputError
from fastbert.models.bert import BertForPreTraining

# The keys of [model] that define a model. The others say how it is trained, and stay the recipe's.
SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
    "layer_norm_eps",
)
PER_TOKEN = ("embeddings.word", "mlm_head.vocabulary_bias")  # weights with a row for each token


def open_initial(path: str) -> ModelParts:
    """Open the model at `path`: any folder that `fastbert.load` opens, with a tied decoder.

    Raises:
        InputError: it cannot be opened, or its decoder is not tied.
    """
    parts = open_model(Path(path))
    if DECODER in parts.weights:
        raise InputError(
            f"{parts.path}: its decoder is not tied to the word embeddings; "
            "only a model with a tied one can be trained further"
        )
    return parts


def with_sizes(config: RunConfig, found: ModelConfig, recipe: str) -> RunConfig:
    """Return the recipe with the sizes of the model that it starts from.

    Args:
        config: the recipe.
        found: the model's sizes.
        recipe: the recipe's path, for messages.

    Raises:
        InputError: the recipe itself sets another size, or an initialization that `init` replaces.
    """
    for name in SIZES:
        mine, theirs = getattr(config.model, name), getattr(found, name)
        if name in config.given and mine != theirs:
            raise InputError(
                f"{recipe}: model.{name} = {mine}, but init = {config.init!r} has {theirs}; "
                "leave it out, or leave init out"
            )
    if config.model.initial_attention != ModelConfig.initial_attention:
        raise InputError(
            f'{recipe}: model.initial_attention = "{config.model.initial_attention}" '
            f"and init = {config.init!r}: choose one"
        )
    resolved = replace(
        config, model=replace(config.model, **{name: getattr(found, name) for name in SIZES})
    )
    check_config(resolved, recipe)
    return resolved


def put(
    source: str, initial: ModelParts, model: BertForPreTraining, dataset: TokenDataset, recipe: str
) -> None:
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
