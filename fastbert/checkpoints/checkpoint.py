"""Checkpoints: fp32 weights, optimizer slots and a manifest, all by parameter name.

    run/checkpoints/step-00000200/
        manifest.json                    format, step, metadata, size and SHA-256 of every other
                                         file, and the manifest's own SHA-256
        tensors-00000-00000.safetensors  "weight/NAME", "exp_avg/NAME", "exp_avg_sq/NAME", ...;
                                         the numbers are the rank and the file's number

Checkpoints contain no pickle and do not depend on ZeRO stage, world size or precision. The ranks'
files are shares of one state, split only for writing.

A folder is written under another name, fsynced, read back and then renamed, so a folder called
step-... is complete. The hashes show later damage. A valid checkpoint is never replaced, and a
folder is renamed before it is deleted. So whenever a process dies, the newest valid checkpoint
keeps its name.

The tensor files are written here and not by safetensors, for two reasons. The hash is of the
numbers in memory, so what is read back from the disk is compared with those. And an error is the
operating system's own, with its errno, where the library would give only a text.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastbert.checkpoints.failpoint import reach
from fastbert.durable import sha256_of, sync
from fastbert.errors import InputError
from fastbert.presence import names_in, status, unreadable
from fastbert.regular_file import read_bytes

FORMAT = 2
MANIFEST = "manifest.json"
SHARD_BYTES = 2 << 30  # largest file, unless a single tensor is larger
# How many numbers are checked, hashed and written at a time: 4 MiB, which stay in the cache
# between these three steps.
PIECE = 1 << 20
WEIGHT = "weight"
_NAME = re.compile(r"step-(\d{8,})")
_WRITING, _DELETED = ".writing-", ".deleted-"
# Every name that is written into checkpoints/.
_OURS = re.compile(rf"({re.escape(_WRITING)}|{re.escape(_DELETED)})?step-\d{{8,}}(-.*)?")
# Errors that mean that a checkpoint is damaged. Any other says nothing about what is there.
_DAMAGE = {errno.ENOENT, errno.EIO, errno.EISDIR, errno.ENOTDIR}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files are all there and have the sizes and hashes of its manifest.

    Attributes:
        path: its folder on this machine.
        step: optimizer steps done.
        url: of the checkpoint in a bucket of which `path` is a copy.
        metadata: the run's recipe, dataset_sha256, vocab_size and progress.
    """

    path: Path
    step: int
    metadata: dict[str, Any]
    url: str | None = None

    @property
    def place(self) -> str:
        """Where the user knows it to be."""
        return self.url or str(self.path)


def staging_of(folder: Path, step: int, token: str) -> Path:
    """The folder in which step-XXXXXXXX is written before it gets that name.

    Args:
        token: identifies one attempt to save that step.
    """
    return folder / f"{_WRITING}{_name(step)}-{token}"


def share_of(rank: int, world: int, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Copy to the CPU those tensors that `rank` writes.

    Each tensor goes to the rank that has the fewest bytes so far. Every rank iterates over all
    tensors, one at a time, since gathering a tensor may need all ranks.

    Args:
        tensors: names and tensors of any dtype, in the same order on every rank.

    Returns:
        This rank's tensors by name: fp32, contiguous, on the CPU.
    """
    share: dict[str, Tensor] = {}
    held = [0] * world
    for name, tensor in tensors:
        owner = held.index(min(held))
        held[owner] += tensor.numel() * tensor.element_size()
        if owner == rank:
            share[name] = tensor.detach().to(
                "cpu", torch.float32, copy=True, memory_format=torch.contiguous_format
            )
    return share


def write_share(
    staging: Path, rank: int, tensors: Mapping[str, Tensor]
) -> dict[str, dict[str, Any]]:
    """Write a rank's share into `staging`, fsync it, and read it back.

    Args:
        staging: the folder; made where it is missing.
        rank: part of the file names.
        tensors: fp32, contiguous, on the CPU, by name ("weight/..."). They go into files of at
            most SHARD_BYTES.

    Returns:
        Size in bytes and SHA-256 by file name.

    Raises:
        OSError: with the file's name; the files of this share are deleted, to free the disk.
        ValueError: a number is not finite; the files are deleted too.
    """
    staging.mkdir(parents=True, exist_ok=True)
    reach("staging-made")
    files: dict[str, dict[str, Any]] = {}
    try:
        for number, shard in enumerate(_shards(tensors)):
            file = staging / f"tensors-{rank:05d}-{number:05d}.safetensors"
            files[file.name] = {}
            files[file.name] = _write_durably(file, "tensors", _safetensors(shard))
        sync(staging)
    except BaseException:
        for name in files:
            with contextlib.suppress(OSError):
                (staging / name).unlink()
        raise
    reach("share-written")
    return files


def publish(
    folder: Path,
    step: int,
    staging: Path,
    files: Mapping[str, Mapping[str, Any]],
    metadata: Mapping[str, Any],
) -> Path:
    """Make the shares in `staging` the checkpoint `folder`/step-XXXXXXXX; takes milliseconds.

    Args:
        folder: the run's checkpoints/.
        step: optimizer steps done.
        staging: where all ranks have written their shares.
        files: what write_share returned, of all ranks.
        metadata: goes into the manifest as JSON.

    Returns:
        The checkpoint's folder.

    Raises:
        OSError: the disk refused, a share is not visible from here, or another valid checkpoint of
            that step is there.
        InputError: a checkpoint of that step is there that cannot be read, so that it may be valid.
    """
    path = folder / _name(step)
    # A rank may have written to a disk of its own machine, under the same name.
    for name, entry in files.items():
        if (staging / name).stat().st_size != entry["size"]:
            raise OSError(
                errno.EIO, "does not have the size that its rank wrote", str(staging / name)
            )
    manifest = manifest_of(step, files, metadata)
    _write_durably(staging / MANIFEST, "manifest", [manifest_bytes(manifest)])
    sync(staging)
    if os.path.lexists(path) and isinstance(_read(path), Checkpoint):
        if _files(path) != manifest["files"]:
            raise FileExistsError(
                errno.EEXIST, "another valid checkpoint of that step is there, and stays", str(path)
            )
        # It is from an attempt that failed after its rename.
        shutil.rmtree(staging, ignore_errors=True)
    else:
        if os.path.lexists(path):
            reach("moving-aside")
            path.rename(_deleted(path))
            reach("moved-aside")
        staging.rename(path)
    reach("renamed")
    sync(folder)
    sync(folder.parent)  # in case the folder is new
    reach("published")
    return path


def manifest_of(
    step: int, files: Mapping[str, Mapping[str, Any]], metadata: Mapping[str, Any]
) -> dict[str, Any]:
    """The values of a manifest without its own SHA-256; arguments as in `publish`."""
    return {"format": FORMAT, "step": step, "metadata": dict(metadata), "files": dict(files)}


def retire(folder: Path, step: int, keep: int) -> list[Path]:
    """Rename all but the newest `keep` checkpoints for deletion.

    They are renamed, since a half-deleted checkpoint would look like a damaged one. Only
    checkpoints older than `step` are renamed: one of a later step is a damaged one that a resumed
    run has not reached again. What cannot be read or renamed stays.

    Args:
        folder: the run's checkpoints/.
        step: the newest checkpoint, which counts as one of `keep`.
        keep: how many checkpoints stay.

    Returns:
        The folders that `delete` may delete.
    """
    try:
        older = [path for path in _folders(folder) if _step(path) < step]
        for path in older[: max(0, len(older) - (keep - 1))]:
            with contextlib.suppress(OSError):
                path.rename(_deleted(path))
        return [folder / name for name in names_in(folder) if name.startswith(_DELETED)]
    except InputError:
        return []


def delete(folders: Iterable[Path]) -> None:
    """Delete retired checkpoints; what cannot be deleted stays.

    Of a symbolic link only the link is deleted, since its target is not ours.
    """
    for folder in folders:
        with contextlib.suppress(OSError):
            if not stat.S_ISDIR(folder.lstat().st_mode):
                folder.unlink()
                continue
            for number, name in enumerate(sorted(os.listdir(folder))):
                with contextlib.suppress(OSError):
                    if number == 1:
                        reach("deleting")
                    (folder / name).unlink()
            folder.rmdir()


def sweep(folder: Path) -> None:
    """Delete what processes left that died while they saved or deleted.

    No other process may be saving into `folder`.

    Raises:
        InputError: the folder cannot be read.
    """
    for leftover in [
        folder / name for name in names_in(folder) if name.startswith((_WRITING, _DELETED))
    ]:
        with contextlib.suppress(OSError):
            if stat.S_ISDIR(leftover.lstat().st_mode):
                shutil.rmtree(leftover, ignore_errors=True)
            else:  # of a symbolic link only the link
                leftover.unlink()


def newest_valid(run: Path) -> tuple[Checkpoint | None, list[str]]:
    """Find the newest checkpoint of a run that passes verification.

    Returns:
        The checkpoint, or None where there is no valid one; and a line on each newer one that is
        damaged.

    Raises:
        InputError: checkpoints/ or a newer checkpoint cannot be read, so its state is unknown.
    """
    complaints = []
    for path in reversed(_folders(run / "checkpoints")):
        found = _read(path)
        if isinstance(found, Checkpoint):
            return found, complaints
        complaints.append(f"{path}: damaged: {found}")
    return None, complaints


def exists(run: Path) -> bool:
    """Whether a run has any checkpoint, valid or not.

    Raises:
        InputError: checkpoints/ cannot be read.
    """
    return bool(_folders(run / "checkpoints"))


def steps(run: Path) -> list[int]:
    """Return the steps of a run's checkpoints, valid or not, in ascending order.

    Raises:
        InputError: checkpoints/ cannot be read.
    """
    return [_step(path) for path in _folders(run / "checkpoints")]


def folder_of(run: Path, step: int) -> Path:
    """Return the folder of a run's checkpoint."""
    return run / "checkpoints" / _name(step)


def has_written(run: Path) -> bool:
    """Whether a run's checkpoints/ holds anything that a save writes, complete or not.

    Raises:
        InputError: checkpoints/ cannot be read.
    """
    return any(_OURS.fullmatch(name) for name in names_in(run / "checkpoints"))


def open_checkpoint(path: Path) -> Checkpoint:
    """Verify the checkpoint in the folder `path`.

    Raises:
        InputError: it is not valid; the message says what is wrong.
    """
    found = _read(path)
    if isinstance(found, str):
        raise InputError(f"{path}: not a valid checkpoint: {found}")
    return found


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read the weights alone, fp32, by parameter name, from a verified Checkpoint's `path`."""
    return dict(read_all(path).get(WEIGHT, {}))


def read_all(path: Path) -> dict[str, Slot]:
    """Map the weights and every optimizer slot of a verified Checkpoint into memory.

    Tensors are mapped, not read, since all of them together are three times the model. The disk is
    read when a page is touched, and the system may drop the page again.

    Args:
        path: of a verified Checkpoint.

    Returns:
        {"weight": {name: fp32 tensor}, "exp_avg": ..., ...}.

    Raises:
        InputError: a file holds something else, although its hash is that of the manifest.
    """
    slots: dict[str, dict[str, Any]] = {}
    for file in _files(path):
        try:
            shard = safe_open(path / file, framework="pt")
            keys = list(shard.keys())
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path / file}: cannot be read as safetensors: {error}") from None
        for key in keys:
            slot, _, name = key.partition("/")
            slots.setdefault(slot, {})[name] = shard
    return {slot: Slot(slot, shards) for slot, shards in slots.items()}


class Slot(Mapping[str, Tensor]):
    """Tensors of one slot by parameter name, taken from their files one at a time."""

    def __init__(self, slot: str, shards: Mapping[str, Any]):
        self._slot, self._shards = slot, shards

    def __getitem__(self, name: str) -> Tensor:
        return self._shards[name].get_tensor(f"{self._slot}/{name}")

    def __iter__(self) -> Iterator[str]:
        return iter(self._shards)

    def __len__(self) -> int:
        return len(self._shards)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor; no tensor is read."""
        return {
            name: tuple(shard.get_slice(f"{self._slot}/{name}").get_shape())
            for name, shard in self._shards.items()
        }


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _folders(folder: Path) -> list[Path]:
    """The folders named as checkpoints, oldest first."""
    return sorted((folder / name for name in names_in(folder) if _NAME.fullmatch(name)), key=_step)


def _deleted(path: Path) -> Path:
    """A new name for a checkpoint that is to be deleted.

    It is different each time, since an earlier deletion may have failed.
    """
    return path.with_name(f"{_DELETED}{path.name}-{secrets.token_hex(4)}")


def _files(path: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 by file name, of a verified Checkpoint."""
    return json.loads(read_bytes(path / MANIFEST))["files"]


def _read(path: Path) -> Checkpoint | str:
    """Verify a checkpoint; a returned string says how it is damaged.

    Raises:
        InputError: it cannot be read, so that nothing is known about it.
    """
    if not _may_be_read(path / MANIFEST):
        return f"{MANIFEST} is not a file"
    try:
        parsed = parse_manifest(read_bytes(path / MANIFEST))
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except OSError as error:
        return _describe_damage(path / MANIFEST, error)
    if isinstance(parsed, str):
        return parsed
    found, entries = Checkpoint(path, parsed.step, parsed.metadata), parsed.files
    for name, (size, digest) in entries.items():
        if not _may_be_read(path / name):
            return f"{name} is not a file"
        try:
            if (there := (path / name).stat().st_size) != size:
                return f"{name} has {there:,} bytes in place of {size:,}"
            if sha256_of(path / name) != digest:
                return f"{name} does not have the SHA-256 of the manifest"
        except OSError as error:
            return _describe_damage(path / name, error)
    return found


@dataclass(frozen=True)
class Manifest:
    """The content of a valid manifest; `files` has size and SHA-256 by name."""

    step: int
    metadata: dict[str, Any]
    files: dict[str, tuple[int, str]]


def parse_manifest(text: bytes) -> Manifest | str:
    """Read a manifest; a returned string says how it is damaged."""
    try:
        manifest = json.loads(text)
        if manifest["format"] != FORMAT:
            return (
                f"{MANIFEST}: format = {manifest['format']!r}, "
                f"this fastbert reads format {FORMAT}; "
                "open it with the version that wrote it, and export it"
            )
        del manifest["sha256"]
        if text != manifest_bytes(manifest):
            return f"{MANIFEST} does not have its own SHA-256"
        found = Manifest(
            manifest["step"],
            manifest["metadata"],
            {
                str(name): (int(entry["size"]), str(entry["sha256"]))
                for name, entry in manifest["files"].items()
            },
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{MANIFEST}: not the manifest of a checkpoint"
    if type(found.step) is not int or not isinstance(found.metadata, dict) or not found.files:
        return f"{MANIFEST}: not the manifest of a checkpoint"
    for name in found.files:
        if Path(name).name != name or not name.endswith(".safetensors"):
            return f"{MANIFEST} names a file that is none of a checkpoint: {name!r}"
    return found


def _may_be_read(file: Path) -> bool:
    """Whether the path is a regular file or does not exist; reading a pipe would block."""
    found = status(file)
    return found is None or stat.S_ISREG(found.st_mode)


def _describe_damage(file: Path, error: OSError) -> str:
    """Say that a file of a checkpoint is damaged.

    Raises:
        InputError: the error does not mean damage.
    """
    if error.errno in _DAMAGE:
        return f"{file.name} cannot be read: {error.strerror}"
    raise unreadable(file, error)


def manifest_bytes(manifest: dict[str, Any]) -> bytes:
    """The bytes of the manifest file.

    They are compared exactly, since JSON has two ways to write some letters and numbers, and a
    flipped bit may turn one into the other.
    """
    return json.dumps({**manifest, "sha256": _own_sha256(manifest)}, indent=1).encode()


def _own_sha256(manifest: dict[str, Any]) -> str:
    """The hash of everything else in the manifest, so that a changed number is detected."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _shards(tensors: Mapping[str, Tensor]) -> Iterator[dict[str, np.ndarray]]:
    """Group tensors by the file they go into, as arrays that share their memory."""
    shard: dict[str, np.ndarray] = {}
    held = 0
    for name, tensor in tensors.items():
        array = tensor.numpy()
        if shard and held + array.nbytes > SHARD_BYTES:
            yield shard
            shard, held = {}, 0
        shard[name] = array
        held += array.nbytes
    if shard:
        yield shard


def _safetensors(arrays: Mapping[str, np.ndarray]) -> list[bytes | memoryview]:
    """Build a safetensors file in pieces: the header's length, the header, the numbers.

    Raises:
        ValueError: a number is not finite.
    """
    header, pieces, end = {}, [], 0
    for name, array in arrays.items():
        begin, end = end, end + array.nbytes
        header[name] = {"dtype": "F32", "shape": array.shape, "data_offsets": [begin, end]}
        flat = array.reshape(-1)
        mine = [flat[start : start + PIECE] for start in range(0, flat.size, PIECE)]
        if not all(np.isfinite(piece).all() for piece in mine):
            raise ValueError(f"{name} holds numbers that are not finite")
        pieces += [piece.data for piece in mine]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # aligns the numbers to a multiple of 8 bytes
    return [struct.pack("<Q", len(text)), text, *pieces]


def _write_durably(file: Path, kind: str, pieces: Sequence[bytes | memoryview]) -> dict[str, Any]:
    """Write a file, fsync it, and read it back from the disk.

    Args:
        file: it must not exist.
        kind: "tensors" or "manifest", for the failpoints.
        pieces: the content.

    Returns:
        "size" in bytes and "sha256".

    Raises:
        OSError: the disk refused, or the content read back differs; it names the file.
    """
    digest = hashlib.sha256()
    try:
        with open(file, "xb") as handle:
            for number, piece in enumerate(pieces):
                if number == len(pieces) // 2:
                    handle.flush()
                    reach(f"{kind}-half")
                digest.update(piece)
                handle.write(piece)
            handle.flush()
            reach(f"{kind}-written")
            os.fsync(handle.fileno())
            # Drop the file from the page cache, or it would be read back from memory.
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        reach(f"{kind}-synced")
        if sha256_of(file) != digest.hexdigest():
            raise OSError(errno.EIO, "read back wrong right after it was written", str(file))
        reach(f"{kind}-read-back")
        return {"size": file.stat().st_size, "sha256": digest.hexdigest()}
    except OSError as error:  # that of a write or an fsync does not name the file
        raise OSError(error.errno, error.strerror, str(file)) from None
