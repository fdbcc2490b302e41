"""Reads and writes a Hugging Face folder: config.json, model.safetensors and the tokenizer.

Writing is atomic.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from tokenizers import Tokenizer
from torch import Tensor

from fastbert.checkpoints.hugging_face_config import written
from fastbert.checkpoints.weight_names import check_finite, from_hugging_face, table_of
from fastbert.config import ModelConfig, ModernBertConfig
from fastbert.data.tokenizer import save_tokenizer, special_ids
from fastbert.durable import exit_at_signals, named, parents_of, staging_of
from fastbert.errors import InputError
from fastbert.presence import is_file, is_folder, names_in, status
from fastbert.regular_file import open_regular, read_text

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")


def read_weights(
    folder: Path, config: ModelConfig, vocab_size: int, tied: bool
) -> dict[str, Tensor]:
    """Read the weights, fp32, under our names.

    Args:
        folder: a Hugging Face folder.
        config, vocab_size, tied: from `hugging_face_config.read_config`.

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
    pickled = [name for name in PICKLES if is_file(folder / name)]
    if pickled:
        # The class with all heads of pre-training.
        task = "MaskedLM" if isinstance(config, ModernBertConfig) else "PreTraining"
        raise InputError(
            f"{folder / pickled[0]}: a pickle, which may run any code when it is opened; "
            "convert it where you trust it: "
            f"transformers.AutoModelFor{task}.from_pretrained(DIR).save_pretrained(DIR) "
            f"writes {WEIGHTS}"
        )
    raise InputError(f"{folder}: no {WEIGHTS} in this folder; give a folder that holds a model")


def left_out(folder: Path, config: ModelConfig) -> list[str]:
    """Return the names of the weights that `read_weights` drops: those of heads of other tasks."""
    files = [WEIGHTS] if is_file(folder / WEIGHTS) else _shards(folder / INDEX)
    names: list[str] = []
    for file in files:
        with safe_open(folder / file, "pt") as weights:
            names += weights.keys()
    return sorted(name for name in names if name.startswith(table_of(config).other_tasks))


def _load(file: Path) -> dict[str, Tensor]:
    if not is_file(file):  # safetensors would wait for a pipe
        raise InputError(f"{file}: missing, or no regular file; download or export it again")
    try:
        open_regular(file).close()
        weights = load_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"{file}: cannot be read as safetensors ({reason}); download or export it again"
        ) from None
    for name, weight in weights.items():
        if not weight.is_floating_point() and not name.endswith("position_ids"):
            raise InputError(
                f"{file}: {name} holds {str(weight.dtype).removeprefix('torch.')}, not floating "
                "point, as where weights were quantized; take the folder in fp32, fp16 or bf16"
            )
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
    keeps_end: bool,
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
        keeps_end: it cuts the beginning of a text.
        more: further keys of config.json, such as id2label.
    """
    values = {
        "architectures": [architecture],
        "vocab_size": vocab_size,
        **written(config, special_ids(tokenizer, folder)),
        "torch_dtype": "float32",
        **({"tie_word_embeddings": False} if table_of(config).decoder in state else {}),
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
    if keeps_end:
        settings["truncation_side"] = "left"
    if isinstance(config, ModernBertConfig):  # it takes no token types
        settings["model_input_names"] = ["input_ids", "attention_mask"]
    file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
