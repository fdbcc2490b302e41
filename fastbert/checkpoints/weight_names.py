"""Translate the names of the weights to and from those of Hugging Face's BertForPreTraining.

Two weights differ in more than the name. Our `qkv` is their query, key and value, joined along the
rows. Their decoder is our word embedding (tied), so it is stored once. A folder may hold an untied
decoder; then it is `DECODER`.

Source: transformers, `models/bert/modeling_bert.py`. LayerNorm's names `gamma` and `beta` are those
of the first checkpoints, converted from TensorFlow.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from fastbert.config import ModelConfig
from fastbert.errors import InputError

SEGMENTS = 2  # rows of the token-type embedding, BertConfig's type_vocab_size
MLM, NSP = "mlm", "nsp"
HEADS = {MLM: "mlm_head.", NSP: "nsp_head."}
# The vocabulary matrix [V, D] where it is not the word embedding. fastbert trains no model with it.
DECODER = "mlm_head.decoder"

# Our name: Hugging Face's name, and the axes: V vocabulary, D hidden, F feed-forward, P positions,
# S segments, C classes of a pair.
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
THEIR_DECODER, _DECODER_BIAS = "cls.predictions.decoder.weight", "cls.predictions.decoder.bias"
_BIAS = _OUTSIDE["mlm_head.vocabulary_bias"][0]
# Heads that a fine-tuned folder may contain; the encoder below them is a BERT.
_OTHER_TASKS = ("classifier.", "qa_outputs.")


class Entry(NamedTuple):
    """How one of our weights is stored by Hugging Face.

    Attributes:
        theirs: its name there, or the names of query, key and value, which our weight joins.
        axes: a letter for each axis of one of their weights.
    """

    theirs: tuple[str, ...]
    axes: str


def entries(num_hidden_layers: int) -> dict[str, Entry]:
    """The Hugging Face names of every weight, by our name."""
    table = {ours: Entry((theirs,), axes) for ours, (theirs, axes) in _OUTSIDE.items()}
    for i in range(num_hidden_layers):
        for ours, (theirs, axes) in _LAYER.items():
            several = (
                [theirs.replace("query", name) for name in ("query", "key", "value")]
                if "query" in theirs
                else [theirs]
            )
            table[f"layers.{i}.{ours}"] = Entry(
                tuple(f"bert.encoder.layer.{i}.{name}" for name in several), axes
            )
    return table


def shapes(model: ModelConfig, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """The shape of every weight, by our name."""
    found = {
        name: (_shape(entry, model, vocab_size), len(entry.theirs))
        for name, entry in entries(model.num_hidden_layers).items()
    }
    return {name: (rows * joined, *rest) for name, ((rows, *rest), joined) in found.items()}


def check_layers(layers: int, weights: int, source: str) -> None:
    """Check the number of layers against that of weights, before anything is made for each layer.

    Raises:
        InputError: there are more layers than weights.
    """
    if layers > weights:
        raise InputError(
            f"{source}: num_hidden_layers = {layers:,}, but there are only {weights:,} weights"
        )


def _shape(entry: Entry, model: ModelConfig, vocab_size: int) -> tuple[int, ...]:
    """The shape of the weight, or of each of the three weights that it joins."""
    sizes = {
        "V": vocab_size,
        "P": model.max_position_embeddings,
        "S": SEGMENTS,
        "D": model.hidden_size,
        "F": model.intermediate_size,
        "C": 2,
    }
    return tuple(sizes[axis] for axis in entry.axes)


def heads(state: Mapping[str, Tensor]) -> frozenset[str]:
    """Which of the heads `"mlm"` and `"nsp"` are complete in weights under our names."""
    return frozenset(
        head
        for head, prefix in HEADS.items()
        if all(name in state for name in _OUTSIDE if name.startswith(prefix))
    )


def to_hugging_face(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename our weights as BertForPreTraining's `save_pretrained` would write them.

    The tied decoder is left out.

    Args:
        state: weights by our names; a head may be missing as a whole.

    Returns:
        Contiguous tensors of the same dtype that share no memory, as safetensors requires.
    """
    table = entries(len({name.split(".")[1] for name in state if name.startswith("layers.")}))
    if DECODER in state:
        table[DECODER] = Entry((THEIR_DECODER,), "VD")
    assert set(state) <= set(table), sorted(set(state) - set(table))
    result: dict[str, Tensor] = {}
    for ours, tensor in state.items():
        theirs = table[ours].theirs
        for name, part in zip(theirs, tensor.detach().chunk(len(theirs)), strict=True):
            result[name] = part.clone()
    if DECODER in state:
        # An untied decoder has a bias of its own. transformers then ignores `_BIAS`.
        result[_DECODER_BIAS] = result[_BIAS].clone()
    return result


def from_hugging_face(
    state: Mapping[str, Tensor], model: ModelConfig, vocab_size: int, source: str, tied: bool = True
) -> dict[str, Tensor]:
    """Rename the weights of a Hugging Face BERT to our names, in fp32.

    The following variants are accepted: names with or without the prefix `bert.`; `gamma` and
    `beta` for a LayerNorm's weight and bias; a decoder that is missing or equal to the word
    embedding; a missing head (see `heads`); heads of other tasks, which are dropped.

    Args:
        state: weights by Hugging Face's names, of any float dtype.
        model: the encoder's sizes.
        vocab_size: V.
        source: the file that messages name.
        tied: config.json's tie_word_embeddings; without it the decoder is a separate weight,
            `DECODER`. Where this is missing, so is the MLM head.

    Returns:
        fp32 weights by our names.

    Raises:
        InputError: a weight of the encoder is missing, a name is unknown, a shape is not the one
            that config.json gives, or a tied decoder differs from the word embedding.
    """
    check_layers(model.num_hidden_layers, len(state), source)
    given = {
        _canonical(name): tensor
        for name, tensor in state.items()
        if not name.endswith("embeddings.position_ids")
    }
    given = {name: tensor for name, tensor in given.items() if not name.startswith(_OTHER_TASKS)}
    if _DECODER_BIAS in given:
        bias = given.pop(_DECODER_BIAS)
        given[_BIAS] = given.get(_BIAS, bias) if tied else bias
    decoder = given.pop(THEIR_DECODER, None)

    result: dict[str, Tensor] = {}
    missing: list[str] = []
    for ours, entry in entries(model.num_hidden_layers).items():
        absent = [name for name in entry.theirs if name not in given]
        if absent:
            missing += [] if ours.startswith(tuple(HEADS.values())) else absent
            continue
        parts = [given.pop(name) for name in entry.theirs]
        shape = _shape(entry, model, vocab_size)
        for name, part in zip(entry.theirs, parts, strict=True):
            if tuple(part.shape) != shape:
                raise InputError(
                    f"{source}: {name} has the shape {list(part.shape)}; "
                    f"config.json asks for {list(shape)}"
                )
        result[ours] = torch.cat([part.float() for part in parts])
    if missing:
        raise InputError(
            f"{source}: {_some(missing)} missing; "
            f"config.json describes a BERT of {model.num_hidden_layers} layers"
        )
    if given:
        raise InputError(
            f"{source}: {_some(sorted(given))} unknown; "
            "this is not the BERT that config.json describes"
        )
    if decoder is None and not tied:
        # transformers would draw a random decoder, so the MLM head is not there.
        return {name: t for name, t in result.items() if not name.startswith(HEADS[MLM])}
    if decoder is None or MLM not in heads(result):
        return result
    words = result["embeddings.word"]
    if decoder.shape != words.shape:
        raise InputError(
            f"{source}: {THEIR_DECODER} has the shape {list(decoder.shape)}; "
            f"config.json asks for {list(words.shape)}"
        )
    if not torch.equal(decoder.float(), words):
        if tied:
            raise InputError(
                f"{source}: {THEIR_DECODER} differs from the word embeddings; "
                "set tie_word_embeddings to false in config.json"
            )
        result[DECODER] = decoder.float()
    return result


def check_finite(weights: Mapping[str, Tensor], source: object) -> None:
    """Check that no weight holds NaN or infinity.

    Args:
        weights: tensors by name; those that are not floating-point are skipped.
        source: what the message calls the file or folder.

    Raises:
        InputError: it names the first weight that does.
    """
    for name, tensor in weights.items():
        if tensor.is_floating_point() and tensor.numel():
            # The minimum and maximum need one pass and no temporary, and they propagate NaN.
            low, high = tensor.float().aminmax()
            if not (low.isfinite() and high.isfinite()):
                raise InputError(
                    f"{source}: {name} holds numbers that are not finite (NaN or infinity): "
                    "the model has diverged; take another"
                )


def _canonical(name: str) -> str:
    """The name as today's transformers writes it."""
    if name.startswith(("embeddings.", "encoder.", "pooler.")):
        name = "bert." + name
    if "LayerNorm." in name:
        name = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace(
            "LayerNorm.beta", "LayerNorm.bias"
        )
    return name


def _some(listed: list[str]) -> str:
    """The first three names, how many more there are, and "is" or "are"."""
    more = f" and {len(listed) - 3} more" if len(listed) > 3 else ""
    return ", ".join(listed[:3]) + more + (" are" if len(listed) > 1 else " is")
