"""Files that must survive a power cut, and be known again: waiting for the disk, whole files, SHA-256, manifests that hold their own."""

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Any


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of files, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, data: bytes) -> None:
    """Write a file whole or not at all: what was there stays until then. A link at `path` is replaced; what it points to is not touched.

    Raises:
        OSError: the disk refused; nothing is left of the attempt.
    """
    new = path.with_name(f".writing-{path.name}")
    try:
        new.unlink(missing_ok=True)  # of a process that died here
        with open(new, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            new.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from None


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def sealed(manifest: dict[str, Any]) -> bytes:
    """JSON of a manifest with its own SHA-256 as the last entry, `sha256`."""
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    return json.dumps({**manifest, "sha256": digest}, indent=1).encode() + b"\n"


def unsealed(data: bytes) -> dict[str, Any] | None:
    """The manifest that `sealed` wrote, or None where any bit of it is another now.

    Compared byte by byte: JSON has two ways to write some letters and numbers, and a flipped bit may choose the other.

    Raises:
        ValueError, TypeError, KeyError, RecursionError: not a JSON object that has a `sha256`.
    """
    manifest = json.loads(data)
    del manifest["sha256"]
    return manifest if sealed(manifest) == data else None
