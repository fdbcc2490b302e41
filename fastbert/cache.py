"""Folders on this machine's disk that are copies of what is elsewhere, within a limit of bytes.

One process of a machine makes a copy while the others wait, by a lock file. A copy gets its name
when it is complete. A process that uses one holds a shared lock until it ends, and what nobody uses
is removed when room is needed, the longest unused first.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import math
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from fastbert.errors import InputError

FOLDER, LIMIT = "FASTBERT_CACHE", "FASTBERT_CACHE_GB"  # environment variables
LIMIT_GB = 200.0
NETWORK_DISKS = {
    *("nfs", "nfs4", "lustre", "cifs", "smb3", "ceph", "gpfs", "beegfs", "glusterfs", "9p", "afs"),
    *("fuse.sshfs", "fuse.juicefs", "fuse.glusterfs", "fuse.ceph", "fuse.gcsfuse", "fuse.s3fs"),
}
WAIT_S = 0.2  # between two looks at another process's lock
_PARTIAL, _LOCK = ".partial", ".lock"
_held: dict[Path, int] = {}  # copies that this process uses, with the descriptor of their lock


def cache_folder() -> Path:
    """The folder of all copies; the variable may name others, such as $SLURM_JOB_ID.

    On a network disk, whose locks may hold on one machine only, each machine has a folder of its
    own.
    """
    given = os.environ.get(FOLDER) or "~/.cache/fastbert"
    text = os.path.expandvars(given)
    if unset := re.search(r"\$(\w+|\{\w+\})", text):
        raise InputError(f"{FOLDER} = {given!r}: {unset[0]} is not set; set it, or leave it out")
    folder = Path(text).expanduser().absolute()
    return folder / socket.gethostname() if _kind_of_disk(folder) in NETWORK_DISKS else folder


def _kind_of_disk(folder: Path) -> str:
    """The type of the file system at a path, by the longest mount point above it; "" if unknown."""
    found = ("", "")
    with contextlib.suppress(OSError):
        for line in Path("/proc/mounts").read_text("utf-8", "replace").splitlines():
            _, point, kind, *_ = line.split(" ")
            if (Path(point) in (folder, *folder.parents)) and len(point) >= len(found[0]):
                found = point, kind
    return found[1]


class Copy:
    """A copy in the making, as an iterator of (bytes done, bytes in all).

    After the last item `path` is complete, and stays until this process ends.

    Args:
        kind: the folder of copies of its kind.
        key: identifies what is copied, such as a SHA-256; letters and digits.
        total: its bytes.
        make: called with a new folder to fill; yields the bytes of each part.

    Raises:
        InputError: there is no room within the limit.
        OSError: from the iteration: the disk or `make` failed; no copy is left.
    """

    def __init__(self, kind: str, key: str, total: int, make: Callable[[Path], Iterator[int]]):
        self.path = cache_folder() / kind / key
        self._total, self._make = total, make

    def __iter__(self) -> Iterator[tuple[int, int]]:
        path, total = self.path, self._total
        if path in _held and path.is_dir():
            return
        _make_folder(path.parent)
        lock = os.open(f"{path}{_LOCK}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            partial = path.with_name(f"{path.name}{_PARTIAL}")
            while not path.is_dir():
                if not _try_lock(lock, fcntl.LOCK_EX):  # another process makes it
                    yield _bytes_below(partial), total
                    time.sleep(WAIT_S)
                    continue
                if path.is_dir():
                    break
                shutil.rmtree(partial, ignore_errors=True)
                _make_room(total)
                partial.mkdir()
                done = 0
                try:
                    for part in self._make(partial):
                        done += part
                        yield done, total
                    partial.rename(path)
                except BaseException:
                    shutil.rmtree(partial, ignore_errors=True)
                    raise
            while not _try_lock(lock, fcntl.LOCK_SH):
                yield total, total
                time.sleep(WAIT_S)
            os.utime(path)
            _held[path] = lock
        except BaseException:
            os.close(lock)
            raise
        if not path.is_dir():  # removed between two locks
            os.close(_held.pop(path))
            yield from self


@contextlib.contextmanager
def workspace(kind: str) -> Iterator[Path]:
    """Yield a new folder of this process's own, which is removed at the end of the block.

    What killed processes left is removed by the next one.
    """
    folder = cache_folder() / kind
    _make_folder(folder)
    for name in os.listdir(folder):
        if re.fullmatch(r"[0-9a-f]{16}", name):
            with contextlib.suppress(OSError):
                lock = os.open(folder / name, os.O_RDONLY)
                if _try_lock(lock, fcntl.LOCK_EX, without=False):
                    shutil.rmtree(folder / name, ignore_errors=True)
                os.close(lock)
    # Locked before it gets the name by which others find it.
    new, path = folder / f".{secrets.token_hex(8)}", folder / secrets.token_hex(8)
    new.mkdir()
    lock = os.open(new, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _try_lock(lock, fcntl.LOCK_EX)
        new.rename(path)
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


def _make_folder(folder: Path) -> None:
    """Make a folder of copies; an InputError names the variable that chooses another disk."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{error.filename or folder}: cannot be made: {error.strerror}; set {FOLDER} to a "
            "folder for copies of what is in a bucket"
        ) from None


def _try_lock(descriptor: int, kind: int, without: bool = True) -> bool:
    """Lock a file if that is possible now; return `without` on a disk that has no locks."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except OSError as error:
        return without and error.errno not in (errno.EWOULDBLOCK, errno.EACCES)
    return True


def _make_room(needed: int) -> None:
    """Remove the longest unused copies until `needed` bytes fit.

    Raises:
        InputError: they do not fit.
    """
    most = limit()
    copies = []
    for path in cache_folder().glob("*/*"):
        if path.with_name(f"{path.name}{_LOCK}").is_file():
            copies.append((path.stat().st_mtime, path, _bytes_below(path)))
    used = sum(size for _, _, size in copies)
    for _, path, size in sorted(copies):
        if used + needed <= most:
            break
        lock = os.open(f"{path}{_LOCK}", os.O_RDWR | os.O_CREAT, 0o600)
        # A copy of ours is locked through another descriptor.
        if path not in _held and _try_lock(lock, fcntl.LOCK_EX, without=False):
            shutil.rmtree(path, ignore_errors=True)
            used -= size
        os.close(lock)
    if used + needed > most:
        raise InputError(
            f"{cache_folder()}: no room for {needed / 1e9:,.2f} GB: the limit is "
            f"{most / 1e9:,.2f} GB, of which {used / 1e9:,.2f} GB are in use; set {LIMIT} to "
            f"more, or {FOLDER} to a folder on another disk"
        )


def limit() -> float:
    """The bytes that all copies of this machine may have together."""
    text = os.environ.get(LIMIT) or str(LIMIT_GB)
    try:
        limit = float(text)
    except ValueError:
        limit = -1.0
    if not 0 <= limit < math.inf:
        raise InputError(f"{LIMIT} = {text!r}; must be a number of GB")
    return limit * 1e9


def _bytes_below(folder: Path) -> int:
    size = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                found = os.lstat(os.path.join(place, name))
                size += min(found.st_size, found.st_blocks * 512)  # a file may have holes
    return size
