"""The names of the weights, ours and those of Hugging Face's BertForPreTraining, both ways.

Two differences, otherwise only names: our `qkv` is their query over key over value, joined along the rows, and their
decoder is our word embedding (tied), so that it is stored once.

Source: transformers, `models/bert/modeling_bert.py`; the `gamma` and `beta` of LayerNorm are the names of the first
checkpoints, converted from TensorFlow.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fastbert.config import ModelConfig
from fastbert.errors import InputError

SEGMENTS = 2  # rows of the segment embedding, BertConfig's type_vocab_size
MLM, NSP = "mlm", "nsp"
HEADS = {MLM: "mlm_head.", NSP: "nsp_head."}

_NORM = ("weight", "bias")
_OUTSIDE = {  # module by module, ours and theirs
    "embeddings.norm": "bert.embeddings.LayerNorm",
    "mlm_head.dense": "cls.predictions.transform.dense",
    "mlm_head.norm": "cls.predictions.transform.LayerNorm",
    "nsp_head.pooler": "bert.pooler.dense",
    "nsp_head.classifier": "cls.seq_relationship",
}
_LAYER = {
    "attention.qkv": ("attention.self.query", "attention.self.key", "attention.self.value"),
    "attention.output": ("attention.output.dense",),
    "attention.norm": ("attention.output.LayerNorm",),
    "feed_forward.up": ("intermediate.dense",),
    "feed_forward.down": ("output.dense",),
    "feed_forward.norm": ("output.LayerNorm",),
}
_DECODER, _DECODER_BIAS = "cls.predictions.decoder.weight", "cls.predictions.decoder.bias"
_WORDS, _BIAS = "bert.embeddings.word_embeddings.weight", "cls.predictions.bias"
_OTHER_TASKS = ("classifier.", "qa_outputs.")  # heads that a fine-tuned folder brings along; the encoder below them is a BERT


def names(num_hidden_layers: int) -> dict[str, tuple[str, ...]]:
    """Our name of every weight, and the one name in Hugging Face's, or the three (query, key, value) that it joins."""
    table: dict[str, tuple[str, ...]] = {}
    for kind in ("word", "position", "token_type"):
        table[f"embeddings.{kind}_embeddings.weight"] = (f"bert.embeddings.{kind}_embeddings.weight",)
    for ours, theirs in _OUTSIDE.items():
        table |= {f"{ours}.{part}": (f"{theirs}.{part}",) for part in _NORM}
    table["mlm_head.bias"] = (_BIAS,)
    for i in range(num_hidden_layers):
        for ours, several in _LAYER.items():
            for part in _NORM:
                table[f"layers.{i}.{ours}.{part}"] = tuple(f"bert.encoder.layer.{i}.{theirs}.{part}" for theirs in several)
    return table


def shapes(model: ModelConfig, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """The shape of every weight, by our name."""
    D, F, V = model.hidden_size, model.intermediate_size, vocab_size
    linear = {
        "attention.qkv": (3 * D, D),
        "attention.output": (D, D),
        "feed_forward.up": (F, D),
        "feed_forward.down": (D, F),
        "mlm_head.dense": (D, D),
        "nsp_head.pooler": (D, D),
        "nsp_head.classifier": (2, D),
    }
    rows = {"word": V, "position": model.max_position_embeddings, "token_type": SEGMENTS}
    found: dict[str, tuple[int, ...]] = {}
    for name in names(model.num_hidden_layers):
        module, part = name.rsplit(".", 1)
        if module.endswith("_embeddings"):
            found[name] = (rows[module.removeprefix("embeddings.").removesuffix("_embeddings")], D)
        elif name == "mlm_head.bias":
            found[name] = (V,)
        elif module.endswith("norm"):
            found[name] = (D,)
        else:
            weight = linear[".".join(module.split(".")[-2:])]
            found[name] = weight if part == "weight" else weight[:1]
    return found


def heads(state: Mapping[str, Tensor]) -> frozenset[str]:
    """Which of the heads `"mlm"` and `"nsp"` the weights, by our names, hold whole."""
    wanted = names(0)
    return frozenset(head for head, prefix in HEADS.items() if all(name in state for name in wanted if name.startswith(prefix)))


def to_hugging_face(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our weights under the names of BertForPreTraining, as its `save_pretrained` would store them (the tied decoder is left out).

    Args:
        state: by our names; a head may be missing as a whole.

    Returns:
        Contiguous tensors of the same dtype that share no memory with each other, as safetensors wants them.
    """
    layers = len({name.split(".")[1] for name in state if name.startswith("layers.")})
    table = names(layers)
    assert set(state) <= set(table), sorted(set(state) - set(table))
    result: dict[str, Tensor] = {}
    for ours, tensor in state.items():
        theirs = table[ours]
        for name, part in zip(theirs, tensor.detach().chunk(len(theirs)), strict=True):
            result[name] = part.clone()
    return result


def from_hugging_face(state: Mapping[str, Tensor], model: ModelConfig, vocab_size: int, source: str) -> dict[str, Tensor]:
    """The weights of a Hugging Face BERT under our names, in fp32.

    Taken: with or without the prefix `bert.`, `gamma`/`beta` for a LayerNorm's weight and bias, the decoder missing or equal to the
    word embedding, a head that is missing (see `heads`), the heads of other tasks (they are left out).

    Raises:
        InputError: a weight of the encoder that is missing, a name that no BERT has, a shape other than the one that config.json
            asks for, or a decoder that is not tied to the word embedding. `source` is the file that the message names.
    """
    given = {_canonical(name, state): tensor for name, tensor in state.items() if not name.endswith("embeddings.position_ids")}
    given = {name: tensor for name, tensor in given.items() if not name.startswith(_OTHER_TASKS)}
    if _DECODER_BIAS in given:
        bias = given.pop(_DECODER_BIAS)
        given.setdefault(_BIAS, bias)
    decoder = given.pop(_DECODER, None)

    result: dict[str, Tensor] = {}
    missing: list[str] = []
    wanted = shapes(model, vocab_size)
    for ours, theirs in names(model.num_hidden_layers).items():
        absent = [name for name in theirs if name not in given]
        if absent:
            missing += [] if ours.startswith(tuple(HEADS.values())) else absent
            continue
        parts = [given.pop(name) for name in theirs]
        shape = (wanted[ours][0] // len(theirs), *wanted[ours][1:])
        for name, part in zip(theirs, parts, strict=True):
            if tuple(part.shape) != shape:
                raise InputError(f"{source}: {name} has the shape {list(part.shape)}; config.json asks for {list(shape)}")
        result[ours] = torch.cat([part.float() for part in parts])
    if missing:
        raise InputError(f"{source}: {_some(missing)} missing; config.json describes a BERT of {model.num_hidden_layers} layers")
    if given:
        raise InputError(f"{source}: {_some(sorted(given))} unknown; this is not the BERT that config.json describes")
    if decoder is not None and not torch.equal(decoder.float(), result["embeddings.word_embeddings.weight"]):
        raise InputError(f"{source}: {_DECODER} differs from {_WORDS}; only a decoder tied to the word embedding can be loaded")
    return result


def _canonical(name: str, state: Mapping[str, Tensor]) -> str:
    """The name as transformers writes it today."""
    if name.startswith(("embeddings.", "encoder.", "pooler.")):
        name = "bert." + name
    if "LayerNorm." in name:
        name = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
    return name


def _some(listed: list[str]) -> str:
    """The first three names and how many more there are, with the verb that a sentence needs."""
    more = f" and {len(listed) - 3} more" if len(listed) > 3 else ""
    return ", ".join(listed[:3]) + more + (" are" if len(listed) > 1 else " is")
