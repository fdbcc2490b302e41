"""Files that survive a power cut and can be verified: fsync, atomic writes, SHA-256, manifests."""

import contextlib
import hashlib
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def sync(path: Path) -> None:
    """Wait until a file, or the list of files of a folder, is on the disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def replacing(path: Path, staging: Path | None = None) -> Iterator[Path]:
    """Write a file atomically: yield a temporary path, and rename it to `path` at the end.

    A reader of `path` sees the old file or the whole new one. If the block fails, the temporary
    file is removed and `path` is left as it was. A link at `path` is replaced; its target is not
    touched. The block calls `sync` itself where the file must survive a power cut.

    Args:
        path: the file to write; it may exist.
        staging: the temporary path, on the same file system. By default a hidden name beside
            `path`. Where several processes may write the same file, give each its own.

    Raises:
        OSError: the disk refused.
    """
    new = staging or path.with_name(f".writing-{path.name}")
    try:
        new.unlink(missing_ok=True)  # a process that was killed may have left it
        yield new
        new.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            new.unlink()
        raise


def replaceable(path: Path) -> str | None:
    """Say why `path` is nothing that a new file may replace; None where it may be, or is not there.

    A device, a pipe or a socket is no file of the user's that was written before.
    """
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return None
    if stat.S_ISLNK(mode):  # the link is replaced, but not where it leads to a device
        with contextlib.suppress(OSError):
            mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        return "is a folder; give a file name"
    return None if stat.S_ISREG(mode) or stat.S_ISLNK(mode) else "is no file; give another name"


def write_whole(path: Path, data: bytes) -> None:
    """Write a file atomically and wait until it is on the disk; see `replacing`.

    Raises:
        OSError: the disk refused; no temporary file is left.
    """
    try:
        with replacing(path) as new, open(new, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal digits; the file is read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def sealed(manifest: dict[str, Any]) -> bytes:
    """Return the JSON of a manifest with its own SHA-256 as the last entry, `sha256`."""
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    return json.dumps({**manifest, "sha256": digest}, indent=1).encode() + b"\n"


def unsealed(data: bytes) -> dict[str, Any] | None:
    """Return the manifest that `sealed` wrote, or None where any bit of it has changed.

    The bytes are compared, not the values: JSON can write some letters and numbers in two ways, and
    a flipped bit may turn one into the other.

    Raises:
        ValueError, TypeError, KeyError, RecursionError: not a JSON object that has a `sha256`.
    """
    manifest = json.loads(data)
    del manifest["sha256"]
    return manifest if sealed(manifest) == data else None
