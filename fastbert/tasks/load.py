"""`fastbert.load`: open a model folder for inference."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import torch

from fastbert.checkpoints.bucket import fetch_checkpoint
from fastbert.checkpoints.model_folder import open_model
from fastbert.checkpoints.weight_table import DECODER, NSP, POOLER
from fastbert.contention import watch_contention
from fastbert.data.tokenizer import special_ids
from fastbert.errors import InputError
from fastbert.machine import check_threads, share_cores
from fastbert.models.build import build_model
from fastbert.storage import Url, place
from fastbert.tasks.pretrained import Pretrained

THREADS = 8  # of the tokenizer, of Parquet and of the progress bar, beside those that compute

# A fork has none of the threads that torch has started, and would wait for them forever. So a
# process that multiprocessing forks computes on one, as torch's own data loaders do.
os.register_at_fork(after_in_child=functools.partial(torch.set_num_threads, 1))


def load(path: str | Path, device: str | None = None) -> Pretrained:
    """Open a model; `fastbert.load` says what its arguments are. A run may be a URL too."""
    check_threads("a model", torch.get_num_threads() + THREADS)
    at = place(path)
    parts = open_model(fetch_checkpoint(at).path if isinstance(at, Url) else at)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        kind = torch.device(device).type
    except RuntimeError:
        kind = ""
    if kind not in ("cpu", "cuda"):
        raise InputError(f'device = {device!r}; must be "cpu" or "cuda"')
    if kind == "cuda" and not torch.cuda.is_available():
        raise InputError(f'device = {device!r}, but torch sees no GPU here; use "cpu"')
    if kind == "cpu":
        share_cores(1)
        watch_contention()
    model = build_model(
        parts.config, parts.vocab_size, device=device, tied=DECODER not in parts.weights
    )
    result: Any = model.load_state_dict(parts.weights, strict=False)
    # A head that the folder does not have keeps its random initial weights. `Pretrained` refuses to
    # use it, because it is not in `heads`.
    assert not result.unexpected_keys and all("_head." in name for name in result.missing_keys), (
        result
    )
    return Pretrained(
        model=model.to(device).eval().requires_grad_(False),
        tokenizer=parts.tokenizer,
        special=special_ids(parts.tokenizer, parts.tokenizer_path),
        config=parts.config,
        max_length=parts.max_length,
        vectors=parts.vectors,
        heads=parts.heads,
        path=parts.path,
        recipe=parts.recipe,
        metadata=parts.metadata,
        # A run trains it with the pairs. A Hugging Face folder may have it without that head.
        pooler=POOLER in parts.weights if parts.recipe is None else NSP in parts.heads,
    )
