"""Writes a checkpoint from one process; saver.py does so from many."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fastbert.checkpoints.checkpoint import (
    delete,
    publish,
    retire,
    share_of,
    staging_of,
    write_share,
)


def save(
    folder: Path,
    step: int,
    tensors: Iterable[tuple[str, Tensor]],
    metadata: Mapping[str, Any],
    keep: int,
) -> Path:
    """Write `folder`/step-XXXXXXXX and return it; of the older checkpoints keep - 1 stay."""
    staging = staging_of(folder, step, secrets.token_hex(4))
    try:
        files = write_share(staging, 0, share_of(0, 1, tensors))
        path = publish(folder, step, staging, files, metadata)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    delete(retire(folder, step, keep))
    return path
