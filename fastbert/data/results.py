"""Results of tasks as files, in a folder beside the dataset: published by rename, named by a hash.

The name of a result is a hash of everything that it depends on, so a result that is there is the
right one. A task that was killed leaves at most a temporary file with a random name.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from fastbert.durable import replacing, sealed, sync, unsealed
from fastbert.errors import InputError

_DIGEST = 32  # bytes of a SHA-256
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def key_of(*values: Any) -> str:
    """Return a hash of values that JSON can hold."""
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


@contextmanager
def publish(path: Path, folder: Path | None = None) -> Iterator[Path]:
    """Yield a temporary path; what the block writes there is synced and becomes `path`.

    Two writers of the same result do not disturb each other: the later one replaces equal bytes.

    Args:
        path: the file.
        folder: of the temporary path, on the same disk; by default that of `path`.
    """
    new = (folder or path.parent) / f".{path.name}.{secrets.token_hex(6)}"
    with replacing(path, new):
        yield new
        sync(new)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Publish a JSON object with its own SHA-256."""
    with publish(path) as new:
        new.write_bytes(sealed(value))


def read_json(path: Path) -> dict[str, Any] | None:
    """Return what `write_json` wrote; None where it is missing or damaged."""
    try:
        return unsealed(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError, TypeError, KeyError, RecursionError):
        return None


def write_arrays(path: Path, facts: dict[str, Any], **arrays: np.ndarray) -> None:
    """Publish arrays, and facts that JSON can hold, as an .npz file with its SHA-256 behind it."""
    text = np.frombuffer(json.dumps(facts).encode(), np.uint8)
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **{**arrays, "facts": text})
    data = buffer.getvalue()
    with publish(path) as new:
        new.write_bytes(data + hashlib.sha256(data).digest())


def read_arrays(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]] | None:
    """Return what `write_arrays` wrote; None where it is missing or damaged."""
    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    if hashlib.sha256(data[:-_DIGEST]).digest() != data[-_DIGEST:]:
        return None
    with np.load(io.BytesIO(data[:-_DIGEST]), allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    return json.loads(arrays.pop("facts").tobytes()), arrays


class ArrayFile:
    """Arrays that are written one after another, with the SHA-256 of all bytes."""

    def __init__(self, path: Path):
        self._file = open(path, "xb")
        self._digest = hashlib.sha256()

    def write(self, data: bytes) -> int:
        """Write bytes; numpy calls it."""
        self._digest.update(data)
        return self._file.write(data)

    def add(self, *arrays: np.ndarray) -> None:
        """Write arrays."""
        for array in arrays:
            np.lib.format.write_array(self, np.ascontiguousarray(array), allow_pickle=False)  # type: ignore[arg-type]

    def close(self) -> str:
        """Return the SHA-256 of the file."""
        self._file.close()
        return self._digest.hexdigest()


def read_array_file(path: Path, per_item: int) -> Iterator[list[np.ndarray]]:
    """Yield the arrays of an ArrayFile, `per_item` at a time."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        while file.tell() < size:
            yield [np.lib.format.read_array(file, allow_pickle=False) for _ in range(per_item)]


@contextmanager
def disk_errors(out: Path) -> Iterator[None]:
    """Turn what the disk refused into an InputError that names the dataset."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise InputError(
                f"{out}: no space left on its disk ({error.strerror}); "
                "free disk space or choose another --out"
            ) from None
        raise InputError(f"{out}: cannot be written: {error}") from None
