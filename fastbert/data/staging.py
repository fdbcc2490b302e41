"""Write a folder completely or not at all: a hidden folder beside it is renamed at the end."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastbert.durable import exit_at_signals, parents_of, sync
from fastbert.errors import InputError

# A hidden folder that is not locked, and was not written to for this long, was left behind by
# a process that was killed. The lock alone does not show it: not every network disk has locks.
ABANDONED_S = 24 * 3600


@contextmanager
def staging(out: Path) -> Iterator[Path]:
    """Yield a new folder that becomes `out` at the end, or is removed after a failure or signal.

    Its name is random, because process ids are equal in containers that share a disk.

    Raises:
        InputError: the disk refused.
    """
    folder = out.with_name(f".{out.name}.{secrets.token_hex(8)}.partial")
    try:
        with exit_at_signals(), parents_of(out), _removed(folder):
            _sweep(out)
            folder.mkdir()
            with _locked(folder):
                yield folder
                for path in [*folder.rglob("*"), folder]:
                    sync(path)
                folder.rename(out)
            sync(out.parent)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise InputError(
                f"{out}: no space left on its disk ({error.strerror}); "
                "free disk space or choose another --out"
            ) from None
        raise InputError(f"{out}: cannot be written: {error}") from None


@contextmanager
def _removed(folder: Path) -> Iterator[None]:
    """Remove the folder where the block fails."""
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Lock a folder until the end of the block or of the process; yield whether it worked."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        locked = False
        with contextlib.suppress(OSError):  # held by another process, or a disk without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locked = True
        yield locked
    finally:
        os.close(descriptor)


def _sweep(out: Path) -> None:
    """Remove hidden folders of `out` that killed processes left behind."""
    name = re.compile(rf"\.{re.escape(out.name)}\.[0-9a-f]{{16}}\.partial")
    for path in list(out.parent.iterdir()):
        if not name.fullmatch(path.name) or path.is_symlink() or not path.is_dir():
            continue
        with contextlib.suppress(OSError):  # somebody else's, or just removed
            newest = max(each.lstat().st_mtime for each in [path, *path.rglob("*")])
            if time.time() - newest < ABANDONED_S:
                continue
            with _locked(path) as locked:
                if locked:
                    shutil.rmtree(path, ignore_errors=True)
