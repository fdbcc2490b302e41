"""Verify that the files of a dataset are those that `fastbert prepare` wrote.

A changed token goes unnoticed in training. A token beyond the vocabulary ends a run in the middle,
or on a GPU reads memory outside the table of embeddings. Both the SHA-256 and the numbers
themselves are checked, because a file may have been changed together with its SHA-256.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import stat
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import RawIOBase
from pathlib import Path

import numpy as np

from fastbert.durable import replacing
from fastbert.errors import InputError
from fastbert.machine import usable_cores

# Bytes read at a time: they stay in the cache between the hash and the check of the numbers.
PIECE = 1 << 22
THREADS = 8  # at most; with more, the disk limits the speed
REPORT_S = 0.1
# A restarted run need not read a large dataset again if it has not been written to since. The
# period is limited, because a disk may lose a bit without any write.
VERIFIED_FOR_S = 24 * 3600.0
# The coarsest resolution of file time stamps; a change within this time may not show in them.
SETTLED_S = 2.0

AGAIN = "copy it again from an undamaged copy, or make the dataset again with `fastbert prepare`"

# Takes the next numbers of a file, at least one, and returns what is wrong with them, if anything.
NumberCheck = Callable[[np.ndarray], str | None]


@dataclass(frozen=True)
class Claim:
    """What the manifest says about a file, or a table about a part of one.

    `check`, if given, checks all numbers in order, as `dtype`, of `piece` bytes at a time.
    """

    name: str
    size: int
    sha256: str
    dtype: np.dtype
    check: NumberCheck | None
    offset: int = 0  # the first byte, for a part of a file
    piece: int | None = None
    label: str = ""  # names the part in messages; "" for a whole file

    def problem(self, folder: Path, progress: Progress | None = None) -> str | None:
        """Read the bytes, and return what is wrong with them, or None.

        Nothing is wrong with what was not read because `progress` is over.
        """
        path, digest, wrong = folder / self.name, hashlib.sha256(), None
        progress = progress or Progress()
        where = f"{path}: {self.label}" if self.label else str(path)
        buffer = memoryview(bytearray(max(1, min(self.piece or PIECE, self.size))))
        left = self.size
        try:
            with open(path, "rb", buffering=0) as file:
                file.seek(self.offset)
                while not progress.over and left:
                    size = _fill(file, buffer[:left])
                    if not size:
                        break
                    left -= size
                    digest.update(buffer[:size])
                    whole = size - size % self.dtype.itemsize
                    if self.label and left:  # a part of a file that is cut short
                        break
                    if self.check is not None and wrong is None and whole:
                        wrong = self.check(np.frombuffer(buffer[:whole], self.dtype))
                    progress.add(size)
        except OSError as error:
            return f"{where}: part of the dataset, but cannot be read ({error.strerror})"
        if progress.over:
            return None
        if digest.hexdigest() != self.sha256:
            record = "table" if self.label else "manifest"
            return f"{where}: its SHA-256 differs from the {record}'s: damaged or changed"
        return wrong and f"{where}: {wrong}"


@contextmanager
def reading_part(file: Path) -> Iterator[None]:
    """Raise InputError where a part of the dataset cannot be read in this block."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{error.filename or file}: part of the dataset, but cannot be read "
            f"({error.strerror}); {AGAIN}"
        ) from None


def _fill(file: RawIOBase, buffer: memoryview) -> int:
    """Read until the buffer is full or the file ends, and return the bytes read."""
    done = 0
    while done < len(buffer) and (size := file.readinto(buffer[done:])):
        done += size
    return done


def ids_below(vocab_size: int) -> NumberCheck:
    """Return a check that token ids are in the vocabulary."""

    def check(ids: np.ndarray) -> str | None:
        largest = int(ids.max())
        if largest < vocab_size:
            return None
        return f"holds the token id {largest:,}, but the vocabulary has {vocab_size:,} tokens"

    return check


def offsets_to(total: int, count: int) -> NumberCheck:
    """Return a check that `count` offsets rise strictly from 0 to `total`."""
    seen, last = 0, -1

    def check(offsets: np.ndarray) -> str | None:
        nonlocal seen, last
        wrong = (offsets <= np.concatenate([[last], offsets[:-1]])) | (offsets > total)
        wrong[0] |= seen == 0 and offsets[0] != 0
        wrong[-1] |= seen + len(offsets) == count and offsets[-1] != total
        if wrong.any():
            place = int(wrong.argmax())
            return (
                f"offset number {seen + place:,} is {int(offsets[place]):,}; "
                f"they must rise from 0 to {total:,}"
            )
        seen, last = seen + len(offsets), int(offsets[-1])
        return None

    return check


def verify_files(
    folder: Path, identity: str, claims: Sequence[Claim]
) -> Generator[tuple[int, int], None, bool]:
    """Check every file, or part of a file.

    Files are read on several threads, about 1 GB/s each. If the folder is writable, a note for this
    user is left in it about what was verified: names, sizes, times and inodes, which change when a
    file is written to. Where a note less than a day old matches, nothing is read.

    Args:
        folder: of the dataset.
        identity: of the manifest; a note is valid for one manifest.
        claims: the files to check, or parts of files.

    Yields:
        Bytes done and bytes in all, about every REPORT_S seconds.

    Returns:
        Whether the files were read.

    Raises:
        InputError: a file that cannot be read or differs from its claim.
    """
    began, facts = time.monotonic(), _file_state(folder, identity, claims)
    note = folder / f".verified-{os.geteuid()}"
    if _recently_verified(note, facts):
        return False
    progress, total = Progress(), sum(claim.size for claim in claims)
    with ThreadPoolExecutor(min(THREADS, usable_cores(), len(claims))) as pool:
        try:
            # The largest files go first, so that the last ones to finish are small.
            waiting = {
                pool.submit(claim.problem, folder, progress)
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
    _write_note(note, facts, folder, claims, time.monotonic() - began)
    return True


class Progress:
    """Bytes read by all threads; setting `over` ends the threads."""

    def __init__(self) -> None:
        self.done, self.over, self._lock = 0, False, threading.Lock()

    def add(self, size: int) -> None:
        with self._lock:
            self.done += size


def _file_state(folder: Path, identity: str, claims: Sequence[Claim]) -> str:
    """Return the facts that change when anybody writes to the dataset.

    Only root can set the ctime of a file.
    """
    found = {}
    for name in {claim.name: None for claim in claims}:
        with suppress(OSError):
            info = (folder / name).stat()
            found[name] = [info.st_size, info.st_mtime_ns, info.st_ctime_ns, info.st_ino]
    return json.dumps({"manifest": identity, "files": found})


def _recently_verified(note: Path, facts: str) -> bool:
    """Whether this user has verified the same files within the last day."""
    try:
        info = note.lstat()
        # A note of another user may claim anything.
        own = stat.S_ISREG(info.st_mode) and info.st_uid == os.geteuid()
        recent = 0 <= time.time() - info.st_mtime < VERIFIED_FOR_S
        return own and recent and note.read_text(encoding="utf-8") == facts
    except (OSError, ValueError):
        return False


def _write_note(
    note: Path, facts: str, folder: Path, claims: Sequence[Claim], seconds: float
) -> None:
    """Leave a note that the files were verified within the last `seconds`.

    There is none where the folder is not writable, or where a file may have changed meanwhile.
    """
    own_name = note.with_name(f"{note.name}-{secrets.token_hex(4)}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    with suppress(OSError, _NotSettled), replacing(note, own_name) as new:
        newest = max((folder / name).stat().st_ctime for name in {claim.name for claim in claims})
        with open(os.open(new, flags, 0o600), "w", encoding="utf-8") as file:
            file.write(facts)
            now = os.fstat(file.fileno()).st_ctime  # by the clock of the file system
        if newest >= now - seconds - SETTLED_S:
            raise _NotSettled


class _NotSettled(Exception):
    """A file was written so recently that its time stamps may not show the change."""
