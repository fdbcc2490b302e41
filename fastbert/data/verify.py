"""Are the files of a dataset what `fastbert prepare` wrote? Their SHA-256, and their numbers one by one.

A changed token trains in silence; one beyond the vocabulary ends a run in its middle, or on a GPU reads memory that is not the model's. The
numbers are looked at too, since whoever changed a file may have changed its SHA-256 with it.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import stat
import threading
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastbert.errors import InputError

PIECE = (
    1 << 22
)  # bytes read at a time: they stay in the cache from the hash to the look at the numbers
THREADS = 8  # at most: then the disk is the slower part
REPORT_S = 0.1
# A restarted run need not read a large dataset again, if nobody has written to it since; a disk may lose a bit all by itself, so not for ever.
VERIFIED_FOR_S = 24 * 3600.0
SETTLED_S = (
    2.0  # the coarsest time stamps of files; within that time a change might not show in them
)

AGAIN = "copy it again from where it is whole, or make the dataset again with `fastbert prepare`"

Look = Callable[
    [np.ndarray], str | None
]  # takes the next numbers of a file, one at least; says what is wrong with them


@dataclass(frozen=True)
class Claim:
    """What the manifest says of a file; `look`, if any, is given all its numbers, of type `dtype`, in order."""

    name: str
    size: int
    sha256: str
    dtype: np.dtype
    look: Look | None


def ids_below(vocab_size: int) -> Look:
    """Token ids that the vocabulary has."""

    def look(ids: np.ndarray) -> str | None:
        largest = int(ids.max())
        return (
            f"holds the token id {largest:,}, but the vocabulary has {vocab_size:,} tokens"
            if largest >= vocab_size
            else None
        )

    return look


def offsets_to(total: int, count: int) -> Look:
    """So many offsets: the first is 0, each is above the one before it, the last is `total`."""
    seen, last = 0, -1

    def look(offsets: np.ndarray) -> str | None:
        nonlocal seen, last
        wrong = (offsets <= np.concatenate([[last], offsets[:-1]])) | (offsets > total)
        wrong[0] |= seen == 0 and offsets[0] != 0
        wrong[-1] |= seen + len(offsets) == count and offsets[-1] != total
        if wrong.any():
            place = int(wrong.argmax())
            return f"offset number {seen + place:,} is {int(offsets[place]):,}; they must rise from 0 to {total:,}"
        seen, last = seen + len(offsets), int(offsets[-1])
        return None

    return look


def verify_files(
    folder: Path, identity: str, claims: Sequence[Claim]
) -> Generator[tuple[int, int], None, bool]:
    """Check every file; yields bytes done and bytes in all every REPORT_S or so, and nothing where all was checked within a day.

    Files are read on several threads, about 1 GB/s each. What was verified is noted in the folder, for this user alone, if it may be
    written to: names, sizes, times and inodes, which a file cannot keep when it is written to.

    Args:
        identity: of the manifest; a note belongs to one manifest.

    Returns:
        Whether the files were read.

    Raises:
        InputError: a file that cannot be read or is not as claimed.
    """
    began, facts = time.monotonic(), _facts(folder, identity, claims)
    note = folder / f".verified-{os.geteuid()}"
    if _noted(note, facts):
        return False
    progress, total = _Progress(), sum(claim.size for claim in claims)
    with ThreadPoolExecutor(min(THREADS, _cores(), len(claims))) as pool:
        try:
            # The largest first, so that the last ones to end are small.
            waiting = {
                pool.submit(_problem, folder, claim, progress)
                for claim in sorted(claims, key=lambda claim: -claim.size)
            }
            while waiting:
                ended, waiting = wait(waiting, REPORT_S, FIRST_COMPLETED)
                for problem in sorted(filter(None, (future.result() for future in ended))):
                    raise InputError(f"{problem}; {AGAIN}")
                yield progress.done, total
        finally:
            progress.over = True
            pool.shutdown(cancel_futures=True)
    _note(note, facts, folder, claims, time.monotonic() - began)
    return True


class _Progress:
    """What the threads have read together; `over` ends them."""

    def __init__(self) -> None:
        self.done, self.over, self._lock = 0, False, threading.Lock()

    def add(self, size: int) -> None:
        with self._lock:
            self.done += size


def _problem(folder: Path, claim: Claim, progress: _Progress) -> str | None:
    """What is wrong with a file, or None."""
    path, digest, wrong = folder / claim.name, hashlib.sha256(), None
    buffer = memoryview(bytearray(max(1, min(PIECE, claim.size))))
    try:
        with open(path, "rb") as file:
            while not progress.over and (size := file.readinto(buffer)):
                digest.update(buffer[:size])
                if claim.look is not None and wrong is None and size >= claim.dtype.itemsize:
                    wrong = claim.look(
                        np.frombuffer(buffer[: size - size % claim.dtype.itemsize], claim.dtype)
                    )
                progress.add(size)
    except OSError as error:
        return f"{path}: part of the dataset, but cannot be read ({error.strerror})"
    if progress.over:
        return None
    if digest.hexdigest() != claim.sha256:
        return f"{path}: its SHA-256 differs from the manifest's: damaged or changed"
    return wrong and f"{path}: {wrong}"


def _facts(folder: Path, identity: str, claims: Sequence[Claim]) -> str:
    """What changes when anybody writes to the dataset; nobody but root can set the second time of a file."""
    found = {}
    for claim in claims:
        with suppress(OSError):
            info = (folder / claim.name).stat()
            found[claim.name] = [info.st_size, info.st_mtime_ns, info.st_ctime_ns, info.st_ino]
    return json.dumps({"manifest": identity, "files": found})


def _noted(note: Path, facts: str) -> bool:
    """Whether this user has verified the same files within the last day."""
    try:
        info = note.lstat()
        mine = (
            stat.S_ISREG(info.st_mode) and info.st_uid == os.geteuid()
        )  # another's note may claim anything
        return (
            mine
            and 0 <= time.time() - info.st_mtime < VERIFIED_FOR_S
            and note.read_text(encoding="utf-8") == facts
        )
    except (OSError, ValueError):
        return False


def _note(note: Path, facts: str, folder: Path, claims: Sequence[Claim], seconds: float) -> None:
    """Leave a note that the files were verified, within the last `seconds`; where the folder may not be written to, there is none."""
    partial = note.with_name(f"{note.name}-{secrets.token_hex(4)}")
    try:
        newest = max((folder / claim.name).stat().st_ctime for claim in claims)
        with open(
            os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8"
        ) as file:
            file.write(facts)
            now = os.fstat(file.fileno()).st_ctime  # by the clock of the files
        if newest < now - seconds - SETTLED_S:
            partial.replace(note)
    except OSError:
        pass
    finally:
        with suppress(OSError):
            partial.unlink()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
