"""Opens a model folder as checked parts.

It may be a run, a checkpoint of a run, or a Hugging Face folder of a BERT or ModernBERT.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from torch import Tensor

from fastbert.checkpoints import checkpoint, hugging_face, hugging_face_config
from fastbert.checkpoints.sentence_folder import (
    MODULES,
    VectorSettings,
    read_max_length,
    read_vector_settings,
)
from fastbert.checkpoints.weight_names import check_finite, check_layers, heads, shapes
from fastbert.checkpoints.weight_table import MLM, NSP
from fastbert.config import ModelConfig, RunConfig
from fastbert.data.tokenizer import behaviour, load_tokenizer, lowercases
from fastbert.errors import InputError, warn
from fastbert.presence import hub_hint, is_file, is_folder, status
from fastbert.recipe import parse_config


class CheckpointWarning(UserWarning):
    """The newest checkpoint of a run is damaged, and an older one is used."""


@dataclass(frozen=True)
class ModelParts:
    """The parts of a model.

    Attributes:
        path: the folder of the weights; for a run, the folder of its checkpoint.
        weights: fp32, by our names (weight_names.py); a head may be missing.
        config: the encoder's sizes.
        vocab_size: V, the rows of the word embeddings.
        heads: which of "mlm" and "nsp" the weights hold.
        tokenizer: the model's tokenizer.
        tokenizer_path: the folder where it was found.
        max_length: the most tokens of a text, with [CLS] and [SEP], that the model was trained on.
        vectors: how the folder's author makes a vector of a text.
        recipe: the run's recipe; None for a Hugging Face folder.
        metadata: the checkpoint's metadata and its "step"; empty for a Hugging Face folder.
    """

    path: Path
    weights: dict[str, Tensor]
    config: ModelConfig
    vocab_size: int
    heads: frozenset[str]
    tokenizer: Tokenizer
    tokenizer_path: Path
    max_length: int
    vectors: VectorSettings
    recipe: RunConfig | None
    metadata: dict[str, Any]


def open_model(path: Path) -> ModelParts:
    """Read and check a model from any of the three kinds of folders.

    Args:
        path: a run folder (its newest valid checkpoint is used), a checkpoint folder of a run, or a
            Hugging Face folder (config.json, model.safetensors, tokenizer.json or vocab.txt).

    Raises:
        InputError: one line on what is missing or wrong there, and what to do.
    """
    if status(path) is None:
        raise InputError(
            f"{path}: no such folder; "
            "give a run, a checkpoint of a run, or a Hugging Face folder of a BERT or ModernBERT"
            + hub_hint(path)
        )
    if not is_folder(path):
        raise InputError(f"{path}: a file; give the folder of a run or a Hugging Face folder")
    if is_folder(path / "checkpoints") or is_file(path / "config.toml"):
        return _from_run(path)
    # Of format 3, and of format 2.
    if is_folder(path / "part-00000") or all(is_folder(path / n) for n in ("train", "heldout")):
        raise InputError(
            f"{path}: a dataset of text, not a model; train one with `fastbert pretrain`"
        )
    if is_file(path / checkpoint.MANIFEST) or path.parent.name == "checkpoints":
        return _from_checkpoint(checkpoint.open_checkpoint(path))
    if is_file(path / hugging_face.CONFIG):
        return _from_hugging_face(path)
    raise InputError(
        f"{path}: neither a run (checkpoints/) nor a checkpoint (manifest.json) "
        f"nor a Hugging Face folder (config.json){_hint(path)}"
    )


def _hint(path: Path) -> str:
    """Say what a folder without a model is, where that is easy to see."""
    weights = (hugging_face.WEIGHTS, hugging_face.INDEX, *hugging_face.PICKLES)
    # A cache of the Hub, the output of a Trainer, the older layout of sentence-transformers.
    inside = sorted(
        file.parent.relative_to(path)
        for level in ("*", "snapshots/*")
        for file in path.glob(f"{level}/{hugging_face.CONFIG}")
        if any(is_file(file.with_name(name)) for name in weights)
    )
    if inside:
        hint = f"; models are in it: {', '.join(map(str, inside[:5]))}; give the folder of one"
        pool = ", and the pool that 1_Pooling/config.json names" if is_file(path / MODULES) else ""
        return hint + pool
    if is_file(path / "adapter_config.json"):
        return (
            "; an adapter of PEFT; merge it into its model in Python: PeftModel.from_pretrained("
            "MODEL, DIR).merge_and_unload().save_pretrained(NEW)"
        )
    if is_file(path / "bert_config.json"):
        return "; a BERT of Google's code; convert its weights for PyTorch with transformers"
    return ""


def _from_run(path: Path) -> ModelParts:
    newest, complaints = checkpoint.newest_valid(path)
    for complaint in complaints if newest else ():
        warn(f"{complaint}; an older checkpoint is taken", CheckpointWarning)
    if newest is None:
        if complaints:
            raise InputError(f"{path}: a run without a valid checkpoint: {complaints[0]}")
        raise InputError(
            f"{path}: a run without a checkpoint; "
            f"train it: fastbert pretrain {path / 'config.toml'} --resume"
        )
    return _from_checkpoint(newest)


def _from_checkpoint(found: checkpoint.Checkpoint) -> ModelParts:
    manifest = found.path / checkpoint.MANIFEST
    text, vocab_size = found.metadata.get("recipe"), found.metadata.get("vocab_size")
    if not isinstance(text, str) or type(vocab_size) is not int:
        raise InputError(
            f"{manifest}: recipe or vocab_size is missing from its metadata; "
            "take another checkpoint"
        )
    recipe = parse_config(text, str(manifest))
    weights = checkpoint.read_weights(found.path)
    check_layers(recipe.model.num_hidden_layers, len(weights), str(manifest))
    wanted = shapes(recipe.model, vocab_size)
    wrong = [
        name
        for name in weights.keys() | wanted.keys()
        if name not in weights or tuple(weights[name].shape) != wanted.get(name)
    ]
    if wrong:
        raise InputError(
            f"{found.path}: {min(wrong)} is missing or does not have the shape "
            f"that the recipe in {checkpoint.MANIFEST} gives"
        )
    check_finite(weights, found.path)
    tokenizer_path = found.path.resolve().parents[1] / "tokenizer"
    if not is_folder(tokenizer_path):
        raise InputError(
            f"{tokenizer_path}: no such folder; "
            "use a checkpoint where its run wrote it, beside the run's tokenizer"
        )
    tokenizer = load_tokenizer(tokenizer_path)
    wanted = found.metadata.get("tokenizer_sha256")
    if wanted is not None and wanted != tokenizer_sha256(tokenizer):
        raise InputError(
            f"{tokenizer_path}: not the tokenizer that {found.path} was trained with; put back the "
            f"tokenizer/ of the dataset {recipe.sources[0].path}"
        )
    _check_embeddings(tokenizer, tokenizer_path, vocab_size)
    return ModelParts(
        path=found.path,
        weights=weights,
        config=recipe.model,
        vocab_size=vocab_size,
        heads=frozenset({MLM, NSP} if recipe.objective.pairs else {MLM}),
        tokenizer=tokenizer,
        tokenizer_path=tokenizer_path,
        max_length=trained_length(found, recipe),
        vectors=VectorSettings(),
        recipe=recipe,
        metadata={"step": found.step, **found.metadata},
    )


def _check_embeddings(tokenizer: Tokenizer, path: Path, vocab_size: int) -> None:
    tokens = tokenizer.get_vocab_size()
    if tokens > vocab_size:
        raise InputError(
            f"{path}: {tokens:,} tokens for {vocab_size:,} embeddings; take the model's own "
            "tokenizer, or where tokens were added, give them embeddings with transformers: "
            "model.resize_token_embeddings(len(tokenizer)), then save_pretrained"
        )


def tokenizer_sha256(tokenizer: Tokenizer) -> str:
    """SHA-256 of what `same_tokens` compares."""
    return hashlib.sha256(json.dumps(behaviour(tokenizer), sort_keys=True).encode()).hexdigest()


def trained_length(found: checkpoint.Checkpoint, recipe: RunConfig) -> int:
    """The longest sequence that the weights were trained on, also before this run by `init`."""
    length = found.metadata.get("trained_length", recipe.batch.max_length)
    if type(length) is not int or not 3 < length <= recipe.model.max_position_embeddings:
        raise InputError(
            f"{found.path / checkpoint.MANIFEST}: trained_length = {length!r}; must be a number of "
            "the model's positions; take another checkpoint"
        )
    return length


def _from_hugging_face(path: Path) -> ModelParts:
    config, vocab_size, tied = hugging_face_config.read_config(path / hugging_face.CONFIG)
    weights = hugging_face.read_weights(path, config, vocab_size, tied)
    tokenizer = load_tokenizer(path)
    _check_embeddings(tokenizer, path, vocab_size)
    return ModelParts(
        path=path,
        weights=weights,
        config=config,
        vocab_size=vocab_size,
        heads=heads(weights, config),
        tokenizer=tokenizer,
        tokenizer_path=path,
        max_length=read_max_length(path, config.max_position_embeddings),
        vectors=read_vector_settings(path, lowercases(tokenizer)),
        recipe=None,
        metadata={},
    )
