"""A model that a run starts from (`init = "folder"`): its sizes become the recipe's, its weights the first ones, and its tokens must be the dataset's."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

from fastbert.checkpoints.model_folder import ModelParts, open_model
from fastbert.checkpoints.weight_names import DECODER
from fastbert.config import ModelConfig, RunConfig, check_config
from fastbert.data.dataset import TokenDataset
from fastbert.data.tokenizer import load_tokenizer, same_tokens
from fastbert.errors import InputError
from fastbert.models.bert import BertForPreTraining

# What a model is; everything else of [model] is how it is trained, and the recipe's own.
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
    """The model at `path`: any folder that `fastbert.load` opens, with a tied decoder.

    Raises:
        InputError: it cannot be opened, or its decoder is a matrix of its own.
    """
    parts = open_model(Path(path))
    if DECODER in parts.weights:
        raise InputError(
            f"{parts.path}: its decoder is not tied to the word embeddings; only a model with a tied one can be trained further"
        )
    return parts


def with_sizes(config: RunConfig, found: ModelConfig, recipe: str) -> RunConfig:
    """The recipe with the sizes of the model that it starts from.

    Raises:
        InputError: the recipe asks for another size itself, or for a start that there is no room for.
    """
    defaults = {item.name: item.default for item in fields(ModelConfig)}
    for name in SIZES:
        mine, theirs = getattr(config.model, name), getattr(found, name)
        if mine not in (theirs, defaults[name]):
            raise InputError(
                f"{recipe}: model.{name} = {mine}, but init = {config.init!r} has {theirs}; leave it out, or leave init out"
            )
    if config.model.initial_attention != defaults["initial_attention"]:
        raise InputError(
            f'{recipe}: model.initial_attention = "{config.model.initial_attention}" and init = {config.init!r}: choose one'
        )
    resolved = replace(
        config, model=replace(config.model, **{name: getattr(found, name) for name in SIZES})
    )
    check_config(resolved, recipe)
    return resolved


def put(
    source: str, initial: ModelParts, model: BertForPreTraining, dataset: TokenDataset, recipe: str
) -> None:
    """Copy the weights into a new model; a head that is missing keeps its random start.

    Raises:
        InputError: the dataset was made with other tokens.
    """
    theirs = load_tokenizer(dataset.tokenizer_dir)
    if not same_tokens(theirs, initial.tokenizer):
        raise InputError(
            f"{recipe}: init = {source!r} has {initial.tokenizer.get_vocab_size():,} tokens that are not those of {dataset.path} "
            f"({theirs.get_vocab_size():,}); prepare the text with --tokenizer {source}"
        )
    # Some models pad their tables: rows past the last token stand for nothing.
    weights = {
        name: tensor[: dataset.vocab_size] if name in PER_TOKEN else tensor
        for name, tensor in initial.weights.items()
    }
    result = model.load_state_dict(weights, strict=False)
    assert not result.unexpected_keys and all("_head." in name for name in result.missing_keys), (
        result
    )
