"""Files that survive a power cut and can be verified: fsync, atomic writes, SHA-256, manifests."""

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import signal
import stat
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

STAGING = ".writing-"
LEFTOVER_S = 86400.0


def sync(path: Path) -> None:
    """Wait until a file, or the list of files of a folder, is on the disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def parents_of(path: Path) -> Iterator[None]:
    """Make the folders above `path` for this block; those that it made go again if it fails.

    Raises:
        OSError: the disk refused.
    """
    missing = [folder for folder in path.absolute().parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # somebody else's file is in one of them
            for folder in missing:
                folder.rmdir()
        raise


def staging_of(path: Path) -> Path:
    """A hidden name beside `path` for what becomes `path`, different for every writer.

    What writers left there that were killed is deleted after a day.
    """
    with contextlib.suppress(OSError):
        for name in os.listdir(path.parent):
            if name.startswith(f"{STAGING}{path.name}-") and len(name) == _length(path):
                leftover = path.with_name(name)
                if time.time() - leftover.lstat().st_mtime > LEFTOVER_S:
                    shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    return path.with_name(f"{STAGING}{path.name}-{secrets.token_hex(4)}")


def _length(path: Path) -> int:
    return len(STAGING) + len(path.name) + 9


def write_new(path: Path, text: str) -> None:
    """Write a new file of text; where the disk refuses, nothing is left.

    Raises:
        FileExistsError: there is something at `path`.
        OSError: the disk refused.
    """
    with open(path, "x"):
        pass
    try:
        path.write_text(text, encoding="utf-8")
    except BaseException:
        path.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def named(path: Path, staging: Path | None = None) -> Iterator[None]:
    """Let an OSError of this block name `path`, which its user knows, and not `staging`.

    Python names the file where opening it fails, but none where a write does, as on a full disk.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        name = str(path) if error.filename is None else str(error.filename)
        name = name if staging is None else name.replace(str(staging), str(path))
        raise OSError(error.errno, error.strerror, name) from error


@contextlib.contextmanager
def exit_at_signals() -> Iterator[None]:
    """Let SIGTERM, SIGHUP and SIGQUIT raise SystemExit, so that unfinished files are removed.

    Those that are ignored, as by nohup, stay ignored. Only the main thread can do this.
    """
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)}
        before = {s: old for s, old in before.items() if old is not signal.SIG_IGN}
    for number in before:
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextlib.contextmanager
def replacing(path: Path, staging: Path | None = None) -> Iterator[Path]:
    """Write a file atomically: yield a temporary path, and rename it to `path` at the end.

    A reader of `path` sees the old file or the whole new one. If the block fails, the temporary
    file is removed and `path` is left as it was. A link at `path` is replaced; its target is not
    touched. The new file has the permissions of the old one. The block calls `sync` itself where
    the file must survive a power cut.

    Args:
        path: the file to write; it may exist.
        staging: the temporary path, on the same file system, which the block creates. By default
            a new hidden name beside `path`, where an empty file is.

    Raises:
        OSError: the disk refused.
    """
    new = staging or staging_of(path)
    try:
        with named(path, new):
            if staging is None:
                _create_like(path, new)
            yield new
            new.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            new.unlink()
        raise


def _create_like(path: Path, new: Path) -> None:
    """Create the empty file `new`, with the permissions of `path` where that is a file."""
    mode = None
    with contextlib.suppress(FileNotFoundError):
        found = path.lstat().st_mode
        mode = stat.S_IMODE(found) & 0o777 if stat.S_ISREG(found) else None
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    descriptor = os.open(new, flags, 0o666 if mode is None else mode & 0o600)
    try:
        if mode is not None:
            with contextlib.suppress(PermissionError):  # of a file system without permissions
                os.fchmod(descriptor, mode)
    finally:
        os.close(descriptor)


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
    with replacing(path) as new, open(new, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


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
