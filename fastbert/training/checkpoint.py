"""Checkpoints: fp32 weights, optimizer slots and a manifest, by parameter name, whatever ran them.

    run/checkpoints/step-00000200/manifest.json            format, step, metadata, size and SHA-256 of every other file, and its own
                                  tensors-00000.safetensors "weight/NAME", "exp_avg/NAME", "exp_avg_sq/NAME", ...

No pickle, no ZeRO stage, no world size, no precision: a checkpoint is readable by any of them. A folder is written under another name,
fsynced and renamed, so that one called step-... is complete; what was damaged afterwards shows in the hashes.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastbert.durable import sha256_of, sync
from fastbert.errors import InputError

FORMAT = 1
MANIFEST = "manifest.json"
SHARD_BYTES = 2 << 30  # a shard is held in memory while it is written
WEIGHT = "weight"
_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files are all there and have the sizes and hashes of its manifest."""

    path: Path
    step: int  # optimizer steps done
    metadata: dict[str, Any]  # what the run knew: recipe, store_sha256, vocab_size, progress


def save(folder: Path, step: int, tensors: Iterable[tuple[str, Tensor]], metadata: Mapping[str, Any], keep: int) -> Path:
    """Write `folder`/step-XXXXXXXX, read it back, and only then delete all but the newest `keep`.

    Args:
        folder: the run's checkpoints/; made where it is missing.
        step: optimizer steps done; a checkpoint of the same step is replaced.
        tensors: names ("weight/...", "exp_avg/...") and fp32 tensors, taken one at a time.
        metadata: goes into the manifest as JSON.
        keep: how many checkpoints stay, this one counted.

    Raises:
        OSError: the disk refused (full, read-only, ...). Nothing half-written is left, and no older checkpoint is touched.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:08d}"
    staging, replaced = folder / f".writing-{path.name}", folder / f".replaced-{path.name}"
    # A process killed in the middle of a save leaves these.
    for leftover in [*folder.glob(".writing-*"), *folder.glob(".replaced-*")]:
        shutil.rmtree(leftover)
    try:
        staging.mkdir()
        files = _write_shards(staging, tensors)
        manifest = {"format": FORMAT, "step": step, "metadata": dict(metadata), "files": files}
        _write_durably(staging / MANIFEST, json.dumps({**manifest, "sha256": _own_sha256(manifest)}, indent=1).encode())
        sync(staging)
        if path.exists():
            path.rename(replaced)
        staging.rename(path)
        sync(folder)
    except BaseException:
        if replaced.exists() and not path.exists():
            replaced.rename(path)
        shutil.rmtree(staging, ignore_errors=True)
        raise
    problem = _read(path)
    if isinstance(problem, str):
        raise OSError(errno.EIO, f"read back wrong right after it was written: {problem}", str(path))
    shutil.rmtree(replaced, ignore_errors=True)
    # Only older ones: a checkpoint of a later step is a damaged one that a resumed run has not reached again.
    older = [old for old in _folders(folder) if _step(old) < step]
    for old in older[: max(0, len(older) - (keep - 1))]:
        shutil.rmtree(old, ignore_errors=True)
    return path


def newest_sound(run: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint of a run that passes verification, and a line on each newer one that does not."""
    complaints = []
    for path in reversed(_folders(run / "checkpoints")):
        found = _read(path)
        if isinstance(found, Checkpoint):
            return found, complaints
        complaints.append(f"{path}: damaged: {found}")
    return None, complaints


def exists(run: Path) -> bool:
    """Whether a run has any checkpoint, sound or not."""
    return bool(_folders(run / "checkpoints"))


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in the folder `path`; raises InputError with what is wrong."""
    found = _read(path)
    if isinstance(found, str):
        raise InputError(f"{path}: not a sound checkpoint: {found}")
    return found


def read_weights(path: Path) -> dict[str, Tensor]:
    """The weights alone, fp32, by parameter name; `path` is that of a verified Checkpoint."""
    return _slots(path, WEIGHT)[WEIGHT]


def read_all(path: Path) -> dict[str, dict[str, Tensor]]:
    """{"weight": {name: fp32}, "exp_avg": ...}: weights and every optimizer slot; `path` is that of a verified Checkpoint."""
    return _slots(path, None)


def _slots(path: Path, wanted: str | None) -> dict[str, dict[str, Tensor]]:
    slots: dict[str, dict[str, Tensor]] = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, framework="pt") as shard:
            for key in shard.keys():
                slot, _, name = key.partition("/")
                if wanted in (None, slot):
                    slots.setdefault(slot, {})[name] = shard.get_tensor(key)
    return slots


def _folders(folder: Path) -> list[Path]:
    """Folders named as checkpoints, oldest first."""
    return sorted((path for path in folder.glob("step-*") if _NAME.fullmatch(path.name) and path.is_dir()), key=_step)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _read(path: Path) -> Checkpoint | str:
    """Verify a checkpoint; a string says what is wrong with it."""
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        if manifest["format"] != FORMAT:
            return f"{MANIFEST}: format = {manifest['format']!r}, this fastbert reads format {FORMAT}"
        if manifest.pop("sha256") != _own_sha256(manifest):
            return f"{MANIFEST} does not have its own SHA-256"
        found = Checkpoint(path, manifest["step"], manifest["metadata"])
        entries = {str(name): (int(entry["size"]), str(entry["sha256"])) for name, entry in manifest["files"].items()}
        if type(found.step) is not int or not isinstance(found.metadata, dict) or not entries:
            return f"{MANIFEST}: not the manifest of a checkpoint"
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except OSError as error:
        return f"{MANIFEST} cannot be read: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{MANIFEST}: not the manifest of a checkpoint"
    for name, (size, digest) in entries.items():
        try:
            if Path(name).name != name or not name.endswith(".safetensors"):
                return f"{MANIFEST} names a file that is none of a checkpoint: {name!r}"
            if (there := (path / name).stat().st_size) != size:
                return f"{name} has {there:,} bytes in place of {size:,}"
            if sha256_of(path / name) != digest:
                return f"{name} does not have the SHA-256 of the manifest"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    return found


def _write_shards(folder: Path, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, dict[str, Any]]:
    """Tensors into shards of at most SHARD_BYTES (or one tensor); returns size and SHA-256 by file name."""
    files: dict[str, dict[str, Any]] = {}
    shard: dict[str, Tensor] = {}
    held = 0

    def write() -> None:
        file = folder / f"tensors-{len(files):05d}.safetensors"
        try:
            save_file(shard, file)
        except SafetensorError as error:  # its text holds the system's error, such as "... (os error 28)"
            code = re.search(r"os error (\d+)", str(error))
            raise OSError(int(code[1]) if code else errno.EIO, os.strerror(int(code[1])) if code else str(error), str(file)) from None
        sync(file)
        files[file.name] = {"size": file.stat().st_size, "sha256": sha256_of(file)}
        shard.clear()

    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if shard and held + size > SHARD_BYTES:
            write()
            held = 0
        shard[name] = tensor.detach().cpu().contiguous()
        held += size
    if shard:
        write()
    return files


def _own_sha256(manifest: dict[str, Any]) -> str:
    """Of everything else that the manifest says, so that a changed number in it does not pass."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _write_durably(file: Path, data: bytes) -> None:
    with open(file, "wb") as handle:
        handle.write(data)
        handle.flush()
        os.fsync(handle.fileno())
