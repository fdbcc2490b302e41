"""The secret key that all processes of a run share, and signatures made with it.

Processes of a run exchange values through stores that anybody who reaches a port may read and
write. The key distinguishes the run's values from a stranger's. No store can distribute the key,
since a stranger would read it there. The key is

- the environment variable FASTBERT_RENDEZVOUS_KEY, where that is set: at least 32 characters, the
  same for every process of the run;
- else the content of ~/.fastbert/rendezvous.key, which the first process that needs it makes at
  random. Only its owner may read it: mode 0600 in a folder of mode 0700. On one machine, and where
  nodes share the home directory, there is nothing to set up.

A signature is HMAC-SHA256 over the name of a value and the value. So a value counts only under the
name for which it was signed. A value that was copied to another name, or comes from another run,
is refused like an unsigned one. Nothing is encrypted.
"""

from __future__ import annotations

import hmac
import os
import secrets
import stat
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from fastbert.errors import InputError

VARIABLE = "FASTBERT_RENDEZVOUS_KEY"
FOLDER, FILE = ".fastbert", "rendezvous.key"  # in the home directory
# Shortest key, in characters. A reader of a signed value could find a shorter key by trial.
LEAST = 32
MOST = 4096  # bytes of the file that are read
SIGNATURE = 64  # characters, in hexadecimal
# How long a file that another node has just made may take to appear here. Network disks cache for
# a while that a file is missing.
NEWS_S = 5.0

OTHERWISE = f"or set {VARIABLE} to the same value for every process of the run"


class Key:
    """A secret and its source; neither `repr` nor any message shows the secret."""

    def __init__(self, secret: bytes, source: str):
        self._secret, self.source = secret, source

    def sign(self, name: str, value: bytes) -> bytes:
        """Return the value with its signature in front, valid only under `name`."""
        return self._signature(name, value) + value

    def verify(self, name: str, signed: bytes) -> bytes | None:
        """Return the value, or None where it was not signed with this key for this name."""
        value = signed[SIGNATURE:]
        return (
            value if hmac.compare_digest(signed[:SIGNATURE], self._signature(name, value)) else None
        )

    def mismatch(self, whom: str) -> str:
        """The message for a process of the run that turns out to have another key."""
        return (
            f"{whom} and this process ({self.source}) do not have the same key, "
            "which every process of a run needs; where the nodes do not share home directories, "
            f"set {VARIABLE} to the same value on each of them, or copy ~/{FOLDER}/{FILE} to each"
        )

    def _signature(self, name: str, value: bytes) -> bytes:
        label = name.encode("utf-8", "surrogateescape")
        return (
            hmac.digest(self._secret, len(label).to_bytes(8, "big") + label + value, "sha256")
            .hex()
            .encode()
        )


def find_key() -> Key:
    """Return the key of this user's runs, and make one where there is none.

    Raises:
        InputError: it is too short, other users may read its file, or no place can keep it.
    """
    if (given := os.environ.get(VARIABLE)) is not None:
        secret = os.fsencode(given.strip())
        if len(secret) < LEAST:
            raise InputError(
                f"{VARIABLE} has {len(secret)} characters; must have at least {LEAST}; "
                "make one by: openssl rand -hex 32"
            )
        return Key(secret, VARIABLE)
    try:
        home = Path.home()
    except RuntimeError:  # neither HOME nor an entry in the system's list of users
        home = Path()
    if not home.is_absolute():
        raise InputError(
            "there is no home directory to keep the key of the rendezvous in; "
            f"set HOME, {OTHERWISE}"
        )
    path = home / FOLDER / FILE
    try:
        secret = _read(path)
        return Key(_make(path) if secret is None else secret, str(path))
    except OSError as error:
        raise InputError(
            f"{path}: the key of the rendezvous cannot be kept there: {error.strerror}; "
            f"fix this, {OTHERWISE}"
        ) from None


def _read(path: Path) -> bytes | None:
    """The key in the file; None where there is no file."""
    try:
        # O_NONBLOCK, since opening a FIFO would block.
        folder = os.stat(path.parent)
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    with open(file, "rb") as opened:
        found = os.fstat(file)
        for place, what in ((path.parent, folder), (path, found)):
            if what.st_uid != os.geteuid():
                raise InputError(
                    f"{place}: belongs to another user (number {what.st_uid}), "
                    f"who could read the key; remove it, {OTHERWISE}"
                )
        if folder.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise InputError(
                f"{path.parent}: other users may put a key of theirs there "
                f"(mode {_mode(folder)}); run: chmod 700 {path.parent}"
            )
        if found.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise InputError(
                f"{path}: other users may read or change the key (mode {_mode(found)}); "
                f"if nobody has, run: chmod 600 {path}; "
                "else remove it, and the next run makes a new one"
            )
        secret = opened.read(MOST).strip() if stat.S_ISREG(found.st_mode) else b""
    if len(secret) < LEAST:
        raise InputError(
            f"{path}: not a key, which has at least {LEAST} characters; "
            "remove it, and the next run makes a new one"
        )
    return secret


def _make(path: Path) -> bytes:
    """Make a key file atomically, and return its key.

    Where another process was quicker, return that one's key.
    """
    path.parent.mkdir(mode=0o700, exist_ok=True)
    file, new = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # mode 0600
    try:
        with open(file, "w") as opened:
            opened.write(secrets.token_hex(32) + "\n")
            opened.flush()
            os.fsync(file)
        with suppress(FileExistsError):
            os.link(new, path)
    finally:
        os.unlink(new)
    end = time.monotonic() + NEWS_S
    while (secret := _read(path)) is None:
        if time.monotonic() > end:
            raise InputError(f"{path}: was made and is not there; look at the disk, {OTHERWISE}")
        time.sleep(0.1)
    return secret


def _mode(found: os.stat_result) -> str:
    return f"{stat.S_IMODE(found.st_mode):03o}"
