"""A model that a run starts from (`init = "folder"`): its sizes become the recipe's, its weights the first ones, and its tokens must be the store's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace

from tokenizers import Tokenizer
from torch import Tensor

from fastbert.config import ModelConfig, RunConfig, check_config
from fastbert.data.dataset import Store
from fastbert.data.tokenizer import load_tokenizer, same_tokens
from fastbert.errors import InputError
from fastbert.models.bert import BertForPreTraining

# What a model is; everything else of [model] is how it is trained, and the recipe's own.
SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "max_position_embeddings", "layer_norm_eps")
PER_TOKEN = ("embeddings.words", "mlm_head.vocabulary_bias")  # weights with a row for each token


@dataclass(frozen=True)
class Initial:
    """A model as it was found: `weights` are fp32 by our names, heads may be missing; `source` is what messages call it."""

    source: str
    config: ModelConfig
    weights: Mapping[str, Tensor]
    tokenizer: Tokenizer


Read = Callable[[str], Initial]  # opens a folder; raises InputError


def with_sizes(config: RunConfig, found: ModelConfig, recipe: str) -> RunConfig:
    """The recipe with the sizes of the model that it starts from.

    Raises:
        InputError: the recipe asks for another size itself, or for a start that there is no room for.
    """
    defaults = {item.name: item.default for item in fields(ModelConfig)}
    for name in SIZES:
        mine, theirs = getattr(config.model, name), getattr(found, name)
        if mine not in (theirs, defaults[name]):
            raise InputError(f"{recipe}: model.{name} = {mine}, but init = {config.init!r} has {theirs}; leave it out, or leave init out")
    if config.model.initial_attention != defaults["initial_attention"]:
        raise InputError(f'{recipe}: model.initial_attention = "{config.model.initial_attention}" and init = {config.init!r}: choose one')
    resolved = replace(config, model=replace(config.model, **{name: getattr(found, name) for name in SIZES}))
    check_config(resolved, recipe)
    return resolved


def put(initial: Initial, model: BertForPreTraining, store: Store, recipe: str) -> None:
    """Copy the weights into a new model; a head that is missing keeps its random start.

    Raises:
        InputError: the store was made with other tokens.
    """
    theirs = load_tokenizer(store.tokenizer_dir)
    if not same_tokens(theirs, initial.tokenizer):
        raise InputError(
            f"{recipe}: init = {initial.source!r} has {initial.tokenizer.get_vocab_size():,} tokens that are not those of {store.path} "
            f"({theirs.get_vocab_size():,}); prepare the text with --tokenizer {initial.source}"
        )
    # Some models pad their tables: rows past the last token stand for nothing.
    weights = {name: tensor[: store.vocab_size] if name in PER_TOKEN else tensor for name, tensor in initial.weights.items()}
    result = model.load_state_dict(weights, strict=False)
    assert not result.unexpected_keys and all("_head." in name for name in result.missing_keys), result
