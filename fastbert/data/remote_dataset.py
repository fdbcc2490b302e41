"""Datasets in a bucket: copied to this machine to be read, and uploaded when they are made."""

from __future__ import annotations

import contextlib
import errno
import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from fastbert import storage
from fastbert.cache import Copy, limit, workspace
from fastbert.data.block_table import Blocks, read_table, shard_name, windows_of
from fastbert.data.format_3 import TABLE, part_name
from fastbert.data.manifest import MANIFEST, SPLITS
from fastbert.data.remote_blocks import BEHIND, FETCHED, RemoteBlocks, make_empty
from fastbert.durable import exit_at_signals, sha256_of, unsealed
from fastbert.errors import InputError
from fastbert.storage import Url
from fastbert.terminal import tell

# An object beside those of a dataset while it is uploaded: a hash of what it is made from.
UPLOAD = ".upload"


def dataset_copy(url: Url, window: int | None = None) -> Copy:
    """A verified copy of a dataset on this machine, in the making; one per machine.

    Args:
        url: of the dataset.
        window: as `order.window`. Where an epoch has several windows, the text to train on is not
            copied; `with_remote_blocks` gives what fetches it.

    Raises:
        InputError: there is no dataset at `url`, or its manifest is damaged.
        OSError: the store does not answer.
    """
    try:
        data = storage.read(url / MANIFEST)
    except FileNotFoundError:
        raise InputError(
            f"{url}: no such dataset; make one with `fastbert prepare SOURCE --out {url}`"
        ) from None
    try:
        manifest = unsealed(data)
        files = {} if manifest is None else files_of(manifest)
    except (ValueError, TypeError, KeyError, RecursionError):
        raise InputError(f"{url / MANIFEST}: not the manifest of a dataset") from None
    if manifest is None:
        raise InputError(f"{url / MANIFEST}: it does not have its own SHA-256: damaged or changed")

    digest, empty, blocks, room = hashlib.sha256(data).hexdigest(), dict[str, int](), 0, 0
    if window is not None and manifest["format"] == 3:
        blocks, several = _blocks(url, manifest, window)
        if several:
            digest += "-windows"
            empty = {name: files.pop(name)[0] for name in list(files) if "/train-" in name}
            room = min(sum(empty.values()), (BEHIND + 3) * window)

    def make(folder: Path) -> Iterator[int]:
        if empty:
            make_empty(folder, empty, blocks)
        for name, (size, digest) in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            yield from storage.fetch(url / name, folder / name, size, digest)
        (folder / MANIFEST).write_bytes(data)

    total = sum(size for size, _ in files.values())
    return Copy("datasets", digest, total + room, make)


def _blocks(url: Url, manifest: dict[str, Any], window: int) -> tuple[int, bool]:
    """Return the blocks to train on, and whether an epoch has several windows of them."""
    tables = (f"{part_name(number)}/{TABLE}" for number in range(len(manifest["parts"])))
    train = sum(int((read_table(storage.read(url / name))["split"] == 0).sum()) for name in tables)
    return train, windows_of(train, window) > 1


def with_remote_blocks(blocks: Blocks, url: Url) -> Blocks:
    """Return the blocks to train on of a copy, with what fetches them where they are not in it."""
    if not (blocks.folder / FETCHED).is_file():
        return blocks
    keep = int(blocks.layout.size.sum()) <= limit()
    return replace(blocks, remote=RemoteBlocks(url, blocks.folder, blocks.pieces(), keep))


def fetch_dataset(url: Url) -> Path:
    """Copy a dataset to this machine, unless it is there; return its folder, which stays.

    Raises:
        InputError: as `dataset_copy`, or the store does not answer.
    """
    with storage.answering(url):
        copy = dataset_copy(url)
        for _ in copy:
            pass
    return copy.path


def files_of(manifest: dict[str, Any]) -> dict[str, tuple[int, str | None]]:
    """Size and SHA-256 of all files of a dataset by name; None where blocks have their own hashes.

    Raises:
        ValueError, TypeError, KeyError: the manifest is wrong.
    """
    files: dict[str, tuple[int, str | None]] = {
        name: (int(entry["size"]), str(entry["sha256"]))
        for name, entry in manifest["files"].items()
    }
    for number, part in enumerate(manifest.get("parts", ())):
        for index, split in enumerate(SPLITS):
            for shard, size in enumerate(part["splits"][split]["shards"]):
                files[shard_name(number, index, shard)] = int(size), None
    for name in files:  # they become paths on this machine
        parts = PurePosixPath(name).parts
        if not parts or parts[0] == "/" or ".." in parts or "\0" in name:
            raise ValueError(f"{name!r} is no name of a file in a dataset")
    return files


@contextlib.contextmanager
def uploading(url: Url, *request: Any, add: bool = False) -> Iterator[Path]:
    """Yield a path for a new dataset, which is uploaded at the end of the block, manifest last.

    Args:
        url: of the dataset.
        request: what it is made from, as values with a `str`. An upload that was killed is
            completed by one with the same request, as the same command has the same result.
        add: whether text is to be added to a dataset; only on a disk.

    Raises:
        InputError: text shall be added to a dataset that is there; there is something else at
            `url` already, or the store refuses it. What was uploaded is removed then.
    """
    if add:
        raise InputError(
            f"--add: --out {url} is a URL; copy the dataset to a disk with the store's own tool, "
            "add the text there, and copy it back"
        )
    begun = hashlib.sha256(repr(request).encode()).hexdigest().encode()
    _check_new(url, begun)
    with workspace("prepare") as folder:
        made = folder / url.name
        yield made
        names = [entry.name for entry in storage.objects(made) if entry.name != MANIFEST]
        size = sum((made / name).stat().st_size for name in names)
        tell(f"uploading {size / 1e9:,.2f} GB to {url}")
        with exit_at_signals(), storage.answering(url):
            _claim(url, begun)
            try:
                for name in names:
                    storage.upload(made / name, url / name, sha256_of(made / name))
                if not _put_new(url / MANIFEST, (made / MANIFEST).read_bytes()):
                    raise _exists(url)
            except BaseException:
                with contextlib.suppress(OSError, InputError):
                    if storage.size(url / MANIFEST) is None:
                        for name in [*names, UPLOAD]:
                            storage.remove(url / name)
                raise
            storage.remove(url / UPLOAD)


def _check_new(url: Url, begun: bytes) -> None:
    """Raise InputError where something is there that is no upload of this request."""
    try:
        there = storage.names(url)
        ours = UPLOAD in there and storage.read(url / UPLOAD) == begun
    except OSError as error:
        raise InputError(f"{url}: {error.strerror}") from None
    if MANIFEST in there:
        raise _exists(url)
    if ours:
        tell(f"{url}: holds a part of this dataset, whose upload was killed; it will be completed")
    elif there:
        raise InputError(
            f"{url}: holds {', '.join(there[:3])}, and no dataset; if this is an upload that was "
            "killed, the same command completes it, else remove it or choose another --out"
        )


def _claim(url: Url, begun: bytes) -> None:
    """Begin an upload, which no other one can then do at this URL.

    Raises:
        InputError: another one has begun there since `_check_new`, and may have ended.
    """
    if not _put_new(url / UPLOAD, begun):
        raise InputError(
            f"{url}: another dataset is being uploaded there; choose another --out, or if that "
            f"upload was killed, remove {url / UPLOAD}"
        )
    if storage.size(url / MANIFEST) is not None:
        storage.remove(url / UPLOAD)
        raise _exists(url)


def _put_new(at: Url, data: bytes) -> bool:
    """Put an object if there is none of that name; return whether it is ours.

    Some stores say that they cannot make this a condition. There it is put in any case.
    """
    try:
        return storage.write_new(at, data)
    except OSError as error:
        if error.errno != errno.ENOSYS:
            raise
    storage.write(at, data)
    return True


def _exists(url: Url) -> InputError:
    return InputError(f"{url}: exists already; remove it or choose another --out")
