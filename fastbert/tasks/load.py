"""`fastbert.load`: open a run, a checkpoint of a run or a Hugging Face folder."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from fastbert.checkpoints import checkpoint, hugging_face
from fastbert.checkpoints.weight_names import DECODER, MLM, NSP, check_finite, heads, shapes
from fastbert.config import ModelConfig, RunConfig, parse_config
from fastbert.data.tokenizer import load_tokenizer, special_ids
from fastbert.errors import InputError
from fastbert.models.bert import BertForPreTraining
from fastbert.presence import is_file, is_folder, status
from fastbert.tasks.pretrained import Pretrained
from fastbert.training.initial import Initial


class CheckpointWarning(UserWarning):
    """The newest checkpoint of a run is damaged, and an older one was taken."""


@dataclass(frozen=True)
class _Parts:
    """A model's parts, read and checked."""

    path: Path
    weights: dict[str, Tensor]
    config: ModelConfig
    vocab_size: int
    heads: frozenset[str]
    tokenizer: Tokenizer
    tokenizer_path: Path
    recipe: RunConfig | None
    metadata: dict[str, Any]


def load(path: str | Path, device: str | None = None) -> Pretrained:
    """Open a model.

    Args:
        path: a run folder (its newest sound checkpoint is taken), a checkpoint folder of a run, or a Hugging Face BERT folder
            (config.json, model.safetensors, tokenizer.json or vocab.txt).
        device: "cpu" or "cuda"; by default a GPU where there is one.

    Raises:
        InputError: one line on what is missing or wrong there, and what to do.
    """
    parts = _read(Path(path))
    tokens = parts.tokenizer.get_vocab_size()
    if tokens > parts.vocab_size:
        raise InputError(f"{parts.tokenizer_path}: {tokens:,} tokens for {parts.vocab_size:,} embeddings; the tokenizer is another model's")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = BertForPreTraining(parts.config, parts.vocab_size, device=device, tied=DECODER not in parts.weights)
    result = model.load_state_dict(parts.weights, strict=False)
    # A head that the folder does not hold keeps its random start; `Pretrained.heads` has it refused wherever it would be used.
    assert not result.unexpected_keys and all("_head." in name for name in result.missing_keys), result
    return Pretrained(
        model=model.to(device).eval().requires_grad_(False),
        tokenizer=parts.tokenizer,
        special=special_ids(parts.tokenizer, parts.tokenizer_path),
        config=parts.config,
        heads=parts.heads,
        path=parts.path,
        recipe=parts.recipe,
        metadata=parts.metadata,
    )


def read_initial(path: str) -> Initial:
    """What pre-training may start from: any folder that `load` opens; raises InputError as it does."""
    parts = _read(Path(path))
    if DECODER in parts.weights:
        raise InputError(f"{parts.path}: its decoder is not tied to the word embeddings; only a model with a tied one can be trained on")
    return Initial(path, parts.config, parts.weights, parts.tokenizer)


def _read(path: Path) -> _Parts:
    if status(path) is None:
        raise InputError(f"{path}: no such folder; give a run, a checkpoint of a run, or a Hugging Face BERT folder")
    if not is_folder(path):
        raise InputError(f"{path}: a file; give the folder of a run or of a Hugging Face BERT")
    if is_folder(path / "checkpoints") or is_file(path / "config.toml"):
        return _from_run(path)
    if is_folder(path / "train") and is_folder(path / "heldout"):
        raise InputError(f"{path}: a store of text, not a model; train one with `fastbert pretrain`")
    if is_file(path / checkpoint.MANIFEST) or path.parent.name == "checkpoints":
        return _from_checkpoint(checkpoint.open_checkpoint(path))
    if is_file(path / hugging_face.CONFIG):
        return _from_hugging_face(path)
    raise InputError(f"{path}: neither a run (checkpoints/) nor a checkpoint (manifest.json) nor a Hugging Face folder (config.json)")


def _from_run(path: Path) -> _Parts:
    newest, complaints = checkpoint.newest_sound(path)
    for complaint in complaints if newest else ():
        warnings.warn(f"{complaint}; an older checkpoint is taken", CheckpointWarning, stacklevel=4)
    if newest is None:
        why = f" ({complaints[0]})" if complaints else ""
        raise InputError(f"{path}: a run without a sound checkpoint{why}; train it: fastbert pretrain {path / 'config.toml'} --resume")
    return _from_checkpoint(newest)


def _from_checkpoint(found: checkpoint.Checkpoint) -> _Parts:
    manifest = found.path / checkpoint.MANIFEST
    text, vocab_size = found.metadata.get("recipe"), found.metadata.get("vocab_size")
    if not isinstance(text, str) or not isinstance(vocab_size, int):
        raise InputError(f"{manifest}: recipe or vocab_size is missing from its metadata; take another checkpoint")
    recipe = parse_config(text, str(manifest))
    weights, wanted = checkpoint.read_weights(found.path), shapes(recipe.model, vocab_size)
    wrong = [name for name in weights.keys() | wanted.keys() if name not in weights or tuple(weights[name].shape) != wanted.get(name)]
    if wrong:
        raise InputError(f"{found.path}: {min(wrong)} is missing or does not have the shape that the recipe in {checkpoint.MANIFEST} gives")
    check_finite(weights, found.path)
    tokenizer_path = found.path.resolve().parents[1] / "tokenizer"
    if not is_folder(tokenizer_path):
        raise InputError(f"{tokenizer_path}: no such folder; use a checkpoint where its run wrote it, beside the run's tokenizer")
    return _Parts(
        path=found.path,
        weights=weights,
        config=recipe.model,
        vocab_size=vocab_size,
        heads=frozenset({MLM, NSP} if recipe.objective.pairs else {MLM}),
        tokenizer=load_tokenizer(tokenizer_path),
        tokenizer_path=tokenizer_path,
        recipe=recipe,
        metadata={"step": found.step, **found.metadata},
    )


def _from_hugging_face(path: Path) -> _Parts:
    config, vocab_size, tied = hugging_face.read_config(path / hugging_face.CONFIG)
    weights = hugging_face.read_weights(path, config, vocab_size, tied)
    return _Parts(
        path=path,
        weights=weights,
        config=config,
        vocab_size=vocab_size,
        heads=heads(weights),
        tokenizer=load_tokenizer(path),
        tokenizer_path=path,
        recipe=None,
        metadata={},
    )
