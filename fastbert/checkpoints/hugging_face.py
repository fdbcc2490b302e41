"""Reads and writes a Hugging Face BERT folder: config.json, model.safetensors and the tokenizer.

Writing is atomic.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from tokenizers import Tokenizer
from torch import Tensor

from fastbert.checkpoints.weight_names import (
    SEGMENTS,
    THEIR_DECODER,
    check_finite,
    from_hugging_face,
)
from fastbert.config import ModelConfig
from fastbert.data.tokenizer import save_tokenizer, special_ids
from fastbert.durable import exit_at_signals, named, parents_of, staging_of
from fastbert.errors import InputError
from fastbert.presence import is_file, is_folder, names_in, status
from fastbert.regular_file import read_text

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"

# The values that config.json must have where it has the key: the only encoder implemented here.
_ENCODER = {
    "hidden_act": "gelu",
    "position_embedding_type": "absolute",
    "type_vocab_size": SEGMENTS,
    "is_decoder": False,
    "add_cross_attention": False,
}
# The numeric keys of ModelConfig, which BertConfig has too. Those that are text (a preset, how
# weights are initialized) matter before training only.
_SHARED = [item for item in fields(ModelConfig) if not isinstance(item.default, str)]


def read_config(file: Path) -> tuple[ModelConfig, int, bool]:
    """Read config.json; a key that it leaves out has BertConfig's default, which is also ours.

    Returns:
        The encoder's sizes, the vocabulary size V, and whether the decoder is tied.

    Raises:
        InputError: not JSON, another architecture than BERT, an unsupported variant, or an invalid
            value.
    """
    try:
        values = json.loads(read_text(file))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file}: cannot be read as JSON: {error}") from None
    if not isinstance(values, dict) or values.get("model_type") != "bert":
        found = values.get("model_type") if isinstance(values, dict) else None
        hint = "" if found else ', so add "model_type": "bert" if this is one'
        raise InputError(f'{file}: model_type = {found!r}; only "bert" can be loaded{hint}')
    for key, wanted in _ENCODER.items():
        if values.get(key, wanted) != wanted:
            raise InputError(f"{file}: {key} = {values[key]!r}; only {wanted!r} can be loaded")
    given: dict[str, Any] = {}
    for item in _SHARED:
        if item.name in values:
            whole = isinstance(item.default, int)
            high = math.inf if whole else item.metadata["high"]
            given[item.name] = _number(values[item.name], whole, f"{file}: {item.name}", high)
    config = ModelConfig(**given)
    if config.hidden_size % config.num_attention_heads:
        heads, size = config.num_attention_heads, config.hidden_size
        raise InputError(
            f"{file}: num_attention_heads = {heads} does not divide hidden_size = {size}"
        )
    tied = values.get("tie_word_embeddings", True)
    if not isinstance(tied, bool):
        raise InputError(f"{file}: tie_word_embeddings = {tied!r}; must be true or false")
    return config, _number(values.get("vocab_size", 30522), True, f"{file}: vocab_size"), tied


def read_weights(
    folder: Path, config: ModelConfig, vocab_size: int, tied: bool
) -> dict[str, Tensor]:
    """Read the weights, fp32, under our names.

    Args:
        folder: a Hugging Face folder.
        config, vocab_size, tied: what `read_config` returned.

    Raises:
        InputError: no safetensors file, an unreadable one, or weights that are not finite or do not
            fit `config`.
    """
    file, index = folder / WEIGHTS, folder / INDEX
    if is_file(file):
        return from_hugging_face(_load(file), config, vocab_size, str(file), tied)
    if is_file(index):
        state: dict[str, Tensor] = {}
        for name in _shards(index):
            state |= _load(folder / name)
        return from_hugging_face(state, config, vocab_size, str(index), tied)
    if is_file(folder / "pytorch_model.bin"):
        raise InputError(
            f"{folder / 'pytorch_model.bin'}: a pickle, which may run any code when it is opened; "
            "convert it where you trust it: "
            "transformers.AutoModelForPreTraining.from_pretrained(DIR).save_pretrained(DIR) "
            f"writes {WEIGHTS}"
        )
    raise InputError(f"{folder}: no {WEIGHTS} in this folder; give a folder that holds a model")


def _load(file: Path) -> dict[str, Tensor]:
    if not is_file(file):  # safetensors would wait for a pipe
        raise InputError(f"{file}: missing, or no regular file; download or export it again")
    try:
        weights = load_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(
            f"{file}: cannot be read as safetensors ({error}); download or export it again"
        ) from None
    check_finite(weights, file)
    return weights


def _shards(index: Path) -> list[str]:
    """The names of the files that hold the weights of a large model, from its index."""
    try:
        names = sorted(set(json.loads(read_text(index))["weight_map"].values()))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise InputError(
            f"{index}: no JSON with a weight_map of file names; download or save the model again"
        ) from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise InputError(
                f"{index}: weight_map names {name!r}, which is no file of this folder; "
                "download or save the model again"
            )
    return names


@contextmanager
def new_folder(out: str | Path) -> Iterator[Path]:
    """Yield a folder with a temporary name, and rename it to `out` at the end of the block.

    It is removed where the block fails.

    Raises:
        InputError: `out` exists and is not an empty folder.
    """
    out = Path(out)
    check_new(out)
    staging = staging_of(out)
    with exit_at_signals(), named(out, staging), parents_of(out):
        try:
            staging.mkdir()
            yield staging
            try:
                staging.rename(out)
            except OSError:
                check_new(out)  # another process may have made it meanwhile
                raise
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def check_new(out: str | Path) -> None:
    """Check before the work that `out` can become a new folder.

    Raises:
        InputError: it exists and is not an empty folder.
    """
    out = Path(out)
    if status(out) is not None and not (is_folder(out) and not names_in(out)):
        raise InputError(f"--out {out}: is there already; remove it or choose another name")


def write_folder(
    folder: Path,
    architecture: str,
    state: Mapping[str, Tensor],
    config: ModelConfig,
    vocab_size: int,
    tokenizer: Tokenizer,
    max_length: int,
    **more: Any,
) -> None:
    """Fill an empty folder with what transformers' `from_pretrained` and AutoTokenizer read.

    Args:
        folder: the empty folder.
        architecture: the class of transformers that the weights belong to.
        state: the weights by Hugging Face's names (`to_hugging_face`).
        config, vocab_size: the encoder's sizes.
        tokenizer: written as tokenizer.json and its settings.
        max_length: the most tokens of a text, at which AutoTokenizer cuts.
        more: further keys of config.json, such as id2label.
    """
    values = {
        "architectures": [architecture],
        "model_type": "bert",
        "vocab_size": vocab_size,
        **{item.name: getattr(config, item.name) for item in _SHARED},
        "hidden_act": "gelu",
        "type_vocab_size": SEGMENTS,
        "pad_token_id": special_ids(tokenizer, folder).pad,
        "torch_dtype": "float32",
        **({"tie_word_embeddings": False} if THEIR_DECODER in state else {}),
        **more,
    }
    (folder / CONFIG).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    cpu = {name: tensor.cpu().contiguous() for name, tensor in state.items()}
    # transformers requires the metadata. `save_file` is not used, since the file that it makes is
    # readable by its owner only.
    (folder / WEIGHTS).write_bytes(save(cpu, metadata={"format": "pt"}))
    save_tokenizer(tokenizer, folder)
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    settings["model_max_length"] = max_length
    file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _number(value: Any, whole: bool, what: str, high: float = math.inf) -> Any:
    low, kinds = (1, int) if whole else (0, (int, float))
    if not isinstance(value, kinds) or isinstance(value, bool) or not low <= value <= high:
        bound = f", {high:g} at most" if high < math.inf else ""
        raise InputError(
            f"{what} = {value!r:.40}; must be a {'whole ' if whole else ''}number, {low} or more"
            + bound
        )
    return value
