"""Translate the names of the weights to and from those of Hugging Face.

The names themselves are in bert_names.py and modernbert_names.py. Their decoder is our word
embedding where a model is tied, so it is stored once. A folder may hold an untied decoder; then it
is `DECODER`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fastbert.checkpoints.bert_names import bert_table
from fastbert.checkpoints.modernbert_names import modernbert_table
from fastbert.checkpoints.weight_table import DECODER, HEADS, MLM, Entry, Table
from fastbert.config import ModelConfig, ModernBertConfig
from fastbert.errors import InputError

SEGMENTS = 2  # rows of the token-type embedding, BertConfig's type_vocab_size
_BIAS = "mlm_head.vocabulary_bias"


def table_of(model: ModelConfig) -> Table:
    """Return all weights of a model, with Hugging Face's names, by our names."""
    if isinstance(model, ModernBertConfig):
        return modernbert_table(model)
    return bert_table(model)


def shapes(model: ModelConfig, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """The shape of every weight, by our name."""
    found = {
        name: (_shape(entry, model, vocab_size), len(entry.theirs))
        for name, entry in table_of(model).entries.items()
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
        "Q": 3 * model.hidden_size,
        "G": 2 * model.intermediate_size,
    }
    return tuple(sizes[axis] for axis in entry.axes)


def heads(state: Mapping[str, Tensor], model: ModelConfig) -> frozenset[str]:
    """Which of the heads `"mlm"` and `"nsp"` are complete in weights under our names."""
    names = table_of(model).entries.keys() - {DECODER}  # of an untied model; see from_hugging_face
    found = set[str]()
    for head, prefix in HEADS.items():
        wanted = {name for name in names if name.startswith(prefix)}
        found |= {head} if wanted and wanted <= state.keys() else set()
    return frozenset(found)


def to_hugging_face(state: Mapping[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """Rename our weights as `save_pretrained` of transformers' model would write them.

    A tied decoder is left out.

    Args:
        state: weights by our names; a head may be missing as a whole.
        model: the encoder's sizes.

    Returns:
        Contiguous tensors of the same dtype that share no memory, as safetensors requires.
    """
    table = table_of(model)
    entries = {**table.entries, DECODER: Entry((table.decoder,), "VD")}
    assert set(state) <= set(entries), sorted(set(state) - set(entries))
    result: dict[str, Tensor] = {}
    for ours, tensor in state.items():
        theirs = entries[ours].theirs
        for name, part in zip(theirs, tensor.detach().chunk(len(theirs)), strict=True):
            result[name] = part.clone()
    if DECODER in state and table.decoder_bias is not None:
        # BERT's untied decoder has a bias of its own. transformers then ignores the other one.
        result[table.decoder_bias] = state[_BIAS].detach().clone()
    return result


def from_hugging_face(
    state: Mapping[str, Tensor], model: ModelConfig, vocab_size: int, source: str, tied: bool = True
) -> dict[str, Tensor]:
    """Rename the weights of a Hugging Face folder to our names, in fp32.

    The following variants are accepted: names with or without the prefix of the encoder (`bert.`
    or `model.`); `gamma` and `beta` for a LayerNorm's weight and bias; a decoder that is missing or
    equal to the word embedding; a missing head (see `heads`); heads of other tasks, which are
    dropped.

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
    table = table_of(model)
    given = {
        table.canonical(name): tensor
        for name, tensor in state.items()
        if not name.endswith("embeddings.position_ids")
    }
    encoder = {name: t for name, t in given.items() if not name.startswith(table.other_tasks)}
    other_task, given = len(encoder) < len(given), encoder
    if table.decoder_bias in given:
        bias, (theirs,) = given.pop(table.decoder_bias), table.entries[_BIAS].theirs
        given[theirs] = given.get(theirs, bias) if tied else bias
    decoder = given.pop(table.decoder, None)

    result: dict[str, Tensor] = {}
    missing: list[str] = []
    for ours, entry in table.entries.items():
        if ours == DECODER:
            continue
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
            f"config.json describes a {table.title} of {model.num_hidden_layers} layers"
            + _wrapper(table, state)
        )
    if given:
        raise InputError(
            f"{source}: {_some(sorted(given))} unknown; "
            f"this is not the {table.title} that config.json describes"
        )
    # Without a bias, a tied decoder has no weight of its own. The other weights of ModernBERT's
    # head belong to a classifier as well, so beside one they are not trained on masked tokens.
    nothing_of_mlm = _BIAS not in table.entries and other_task
    if decoder is None and (not tied or nothing_of_mlm):
        # transformers would draw a random decoder, so the MLM head is not there.
        return {name: t for name, t in result.items() if not name.startswith(HEADS[MLM])}
    if decoder is None or MLM not in heads(result, model):
        return result
    words = result["embeddings.word"]
    if decoder.shape != words.shape:
        raise InputError(
            f"{source}: {table.decoder} has the shape {list(decoder.shape)}; "
            f"config.json asks for {list(words.shape)}"
        )
    same = torch.equal(decoder.float(), words)
    if tied and not same:
        raise InputError(
            f"{source}: {table.decoder} differs from the word embeddings; "
            "set tie_word_embeddings to false in config.json"
        )
    if not same or DECODER in table.entries:
        result[DECODER] = decoder.float()
    return result


def _wrapper(table: Table, state: Mapping[str, Tensor]) -> str:
    """Say what stands before all names, where a model was saved with what is around it."""
    (words,) = table.entries["embeddings.word"].theirs
    if any(table.canonical(name) == words for name in state):
        return ""
    for known in (words, words.partition(".")[2]):
        for name in state:
            if name.endswith(f".{known}"):
                prefix = name.removesuffix(known)
                return (
                    f"; the names begin with {prefix!r}, as where a model is saved inside another "
                    "one, such as that of torch.compile or DistributedDataParallel: save the model "
                    "inside, with transformers' save_pretrained"
                )
    return ""


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


def _some(listed: list[str]) -> str:
    """The first three names, how many more there are, and "is" or "are"."""
    more = f" and {len(listed) - 3} more" if len(listed) > 3 else ""
    return ", ".join(listed[:3]) + more + (" are" if len(listed) > 1 else " is")
