"""Reads and writes config.json of a Hugging Face folder: the sizes of the two architectures.

A key that a file leaves out has the default of transformers' config class, which is also ours. Keys
of ours that are text, a preset or how weights are initialized, matter before training only.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from fastbert.checkpoints.weight_names import SEGMENTS
from fastbert.config import MODELS, BertConfig, ModelConfig, ModernBertConfig
from fastbert.data.manifest import SpecialIds
from fastbert.errors import InputError
from fastbert.regular_file import read_text

# The values that config.json must have where it has the key: the only encoders implemented here.
_FIXED: dict[str, dict[str, Any]] = {
    "bert": {
        "hidden_act": "gelu",
        "position_embedding_type": "absolute",
        "type_vocab_size": SEGMENTS,
        "is_decoder": False,
        "add_cross_attention": False,
    },
    "modernbert": {
        "hidden_activation": "gelu",
        "classifier_activation": "gelu",
        "rope_scaling": None,
    },
}
_VOCABULARY = {"bert": 30522, "modernbert": 50368}  # vocab_size where the file leaves it out
_OURS = ("type", "preset", "initial_attention")  # keys that config.json does not have
# The two kinds of layers, in files of transformers 5 and later.
_GLOBAL, _LOCAL = "full_attention", "sliding_attention"


def read_config(file: Path) -> tuple[ModelConfig, int, bool]:
    """Read config.json.

    Returns:
        The encoder's sizes, the vocabulary size V, and whether the decoder is tied.

    Raises:
        InputError: not JSON, another architecture than BERT and ModernBERT, an unsupported variant,
            or an invalid value.
    """
    try:
        values = json.loads(read_text(file))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file}: cannot be read as JSON: {error}") from None
    kind = values.get("model_type") if isinstance(values, dict) else None
    if not isinstance(kind, str) or kind not in MODELS:
        hint = "" if kind else ', so add "model_type": "bert" if this is one'
        raise InputError(
            f"{file}: model_type = {kind!r:.40}; only "
            f"{' and '.join(json.dumps(name) for name in MODELS)} can be loaded{hint}"
        )
    for key, wanted in _FIXED[kind].items():
        if values.get(key, wanted) != wanted:
            raise InputError(f"{file}: {key} = {values[key]!r:.40}; only {wanted!r} can be loaded")
    if kind == "modernbert":
        values = _with_older_keys(values, file)
    given = {
        item.name: _checked(values[item.name], item, f"{file}: {item.name}")
        for item in dataclasses.fields(MODELS[kind])
        if item.name in values and item.name not in _OURS
    }
    config = MODELS[kind](**given)
    if config.hidden_size % config.num_attention_heads:
        heads, size = config.num_attention_heads, config.hidden_size
        raise InputError(
            f"{file}: num_attention_heads = {heads} does not divide hidden_size = {size}"
        )
    if kind == "modernbert" and config.head_size % 2:
        raise InputError(
            f"{file}: hidden_size / num_attention_heads = {config.head_size}; must be even, since "
            "rotary embeddings rotate pairs"
        )
    tied = values.get("tie_word_embeddings", True)
    if not isinstance(tied, bool):
        raise InputError(f"{file}: tie_word_embeddings = {tied!r:.40}; must be true or false")
    vocab_size = _number(values.get("vocab_size", _VOCABULARY[kind]), True, f"{file}: vocab_size")
    return config, vocab_size, tied


def written(config: ModelConfig, special: SpecialIds) -> dict[str, Any]:
    """Return the keys of config.json that describe the encoder, as transformers reads them.

    Args:
        config: the encoder's sizes.
        special: the ids of the special tokens.
    """
    sizes = {k: v for k, v in dataclasses.asdict(config).items() if k not in _OURS}
    if isinstance(config, BertConfig):
        fixed: dict[str, Any] = {"hidden_act": "gelu", "type_vocab_size": SEGMENTS}
        return {"model_type": config.type, **sizes, **fixed, "pad_token_id": special.pad}
    # transformers would warn about its own ids, which lie beyond a small vocabulary.
    first = {"bos_token_id": special.cls, "cls_token_id": special.cls}
    last = {"eos_token_id": special.sep, "sep_token_id": special.sep}
    fixed = {"hidden_activation": "gelu", "classifier_activation": "gelu"}
    ids = {**first, **last, "pad_token_id": special.pad}
    return {"model_type": config.type, **sizes, **fixed, **ids}


def _with_older_keys(values: dict[str, Any], file: Path) -> dict[str, Any]:
    """Return a ModernBERT's config.json with the keys of transformers 4, which are also ours.

    Since release 5, transformers lists the kind of each layer, and gives a theta for each kind.
    """
    values = dict(values)
    layers = values.get("num_hidden_layers", ModernBertConfig.num_hidden_layers)
    kinds = values.get("layer_types")
    if isinstance(kinds, list):
        again = [i for i, kind in enumerate(kinds) if i and kind == _GLOBAL]
        every = again[0] if again else max(1, len(kinds))
        if kinds != [_LOCAL if i % every else _GLOBAL for i in range(len(kinds))]:
            raise InputError(
                f"{file}: layer_types = {str(kinds)[:80]}...; only {_GLOBAL} in the first layer "
                f"and every n-th after it, and {_LOCAL} in the others, can be loaded"
            )
        if len(kinds) != layers:
            raise InputError(
                f"{file}: layer_types has {len(kinds)} entries for num_hidden_layers = "
                f"{layers!r:.40}"
            )
        values["global_attn_every_n_layers"] = every
    ropes = _rope_parameters(values.get("rope_parameters"), file)
    for key, kind in (("global_rope_theta", _GLOBAL), ("local_rope_theta", _LOCAL)):
        if kind in ropes:
            default = values.get(key, getattr(ModernBertConfig, key))
            values[key] = ropes[kind].get("rope_theta", default)
    if values.get("local_rope_theta", 0) is None:  # in transformers 4 that of the global layers
        values["local_rope_theta"] = values.get("global_rope_theta")
    return {key: value for key, value in values.items() if value is not None}


def _rope_parameters(ropes: Any, file: Path) -> dict[str, dict[str, Any]]:
    """Return what transformers 5 writes about rotations: for a kind of layers, its theta.

    Raises:
        InputError: there is more, such as a factor that scales them.
    """
    if not isinstance(ropes, dict | None) or (ropes and ropes.keys() - {_GLOBAL, _LOCAL}):
        raise InputError(
            f"{file}: rope_parameters = {str(ropes)[:80]}; only one entry for {_GLOBAL} and one "
            f"for {_LOCAL} can be loaded"
        )
    found = {kind: rope for kind, rope in (ropes or {}).items() if rope is not None}
    for kind, rope in found.items():
        if not isinstance(rope, dict):
            raise InputError(f"{file}: rope_parameters.{kind} = {rope!r:.40}; must be an object")
        for key, value in rope.items():
            plain = key in ("rope_type", "type") and value == "default"  # "type" in older files
            if key != "rope_theta" and value is not None and not plain:
                raise InputError(
                    f"{file}: rope_parameters.{kind}.{key} = {value!r:.40}; "
                    "only rope_theta and the rope_type 'default' can be loaded"
                )
    return found


def _checked(value: Any, item: dataclasses.Field[Any], what: str) -> Any:
    """Return a value of config.json for a field of ours."""
    options = item.metadata.get("options")
    if options and value not in options:
        raise InputError(f"{what} = {value!r:.40}; must be one of {', '.join(options)}")
    if options:
        return value
    if isinstance(item.default, bool):
        if not isinstance(value, bool):
            raise InputError(f"{what} = {value!r:.40}; must be true or false")
        return value
    whole = isinstance(item.default, int)
    low = item.metadata["low"]
    high = math.inf if whole else item.metadata["high"]
    return _number(value, whole, what, high, low if low < 0 or not whole else None)


def _number(
    value: Any, whole: bool, what: str, high: float = math.inf, low: float | None = None
) -> Any:
    kinds = int if whole else (int, float)
    low = (1 if whole else 0) if low is None else low
    if not isinstance(value, kinds) or isinstance(value, bool) or not low <= value <= high:
        bound = f", {high:g} at most" if high < math.inf else ""
        raise InputError(
            f"{what} = {value!r:.40}; must be a {'whole ' if whole else ''}number, {low} or more"
            + bound
        )
    return value
