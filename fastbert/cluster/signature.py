"""The key that all processes of a run share, and what is signed with it.

Processes of a run leave values for each other in stores that anybody who reaches a port may read and write. The key tells the values of the
run from those of a stranger. No store can hand it out, since a stranger would read it there. It is

- the environment variable FASTBERT_RENDEZVOUS_KEY, where that is set: at least 32 characters, the same for every process of the run;
- else the content of ~/.fastbert/rendezvous.key, which is made at random by the first process that needs it. Only its owner may read it:
  mode 0600 in a folder of mode 0700. On one machine, and where nodes share the home directory, there is nothing to set up.

A signature is HMAC-SHA256 over the name of a value and the value. So a value counts only under the name for which it was signed: one that is
copied to another key, or comes from another run, is refused like one that is not signed at all. Nothing is encrypted.
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
LEAST = 32  # characters of a key: who reads a signed value may try short ones until one fits
MOST = 4096  # bytes of the file that are read
SIGNATURE = 64  # characters, in hexadecimal
NEWS_S = 5.0  # for a file that another node has just made to be seen here: network disks remember for a while that it was not there

OTHERWISE = f"or set {VARIABLE} to the same value for every process of the run"


class Key:
    """A secret, and where it comes from; neither `repr` nor any message shows the secret."""

    def __init__(self, secret: bytes, source: str):
        self._secret, self.source = secret, source

    def sign(self, name: str, value: bytes) -> bytes:
        """The value with its signature in front, for the name under which it will be read."""
        return self._signature(name, value) + value

    def verify(self, name: str, signed: bytes) -> bytes | None:
        """The value, or None where it was not signed with this key for this name."""
        value = signed[SIGNATURE:]
        return (
            value if hmac.compare_digest(signed[:SIGNATURE], self._signature(name, value)) else None
        )

    def mismatch(self, whom: str) -> str:
        """What to say, and to do, where another process of the run turns out to have another key."""
        return (
            f"{whom} and this process ({self.source}) do not have the same key, which every process of a run needs; where the nodes do not "
            f"share home directories, set {VARIABLE} to the same value on each of them, or copy ~/{FOLDER}/{FILE} to each"
        )

    def _signature(self, name: str, value: bytes) -> bytes:
        label = name.encode("utf-8", "surrogateescape")
        return (
            hmac.digest(self._secret, len(label).to_bytes(8, "big") + label + value, "sha256")
            .hex()
            .encode()
        )


def find_key() -> Key:
    """The key of this user's runs, made now where there is none.

    Raises:
        InputError: it is too short, its file may be read by others, or there is no place where it could be kept.
    """
    if (given := os.environ.get(VARIABLE)) is not None:
        secret = os.fsencode(given.strip())
        if len(secret) < LEAST:
            raise InputError(
                f"{VARIABLE} has {len(secret)} characters; must have at least {LEAST}; make one by: openssl rand -hex 32"
            )
        return Key(secret, VARIABLE)
    try:
        home = Path.home()
    except RuntimeError:  # neither HOME nor an entry in the list of users
        home = Path()
    if not home.is_absolute():
        raise InputError(
            f"there is no home directory to keep the key of the rendezvous in; set HOME, {OTHERWISE}"
        )
    path = home / FOLDER / FILE
    try:
        secret = _read(path)
        return Key(_make(path) if secret is None else secret, str(path))
    except OSError as error:
        raise InputError(
            f"{path}: the key of the rendezvous cannot be kept there: {error.strerror}; see to that, {OTHERWISE}"
        ) from None


def _read(path: Path) -> bytes | None:
    """The key in the file; None where there is no file."""
    try:
        folder, file = (
            os.stat(path.parent),
            os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC),
        )  # a FIFO would keep us waiting
    except FileNotFoundError:
        return None
    with open(file, "rb") as opened:
        found = os.fstat(file)
        for place, what in ((path.parent, folder), (path, found)):
            if what.st_uid != os.geteuid():
                raise InputError(
                    f"{place}: belongs to another user (number {what.st_uid}), who could read the key; remove it, {OTHERWISE}"
                )
        if folder.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise InputError(
                f"{path.parent}: other users may put a key of theirs there (mode {_mode(folder)}); run: chmod 700 {path.parent}"
            )
        if found.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise InputError(
                f"{path}: other users may read or change the key (mode {_mode(found)}); if nobody has, run: chmod 600 {path}; "
                "else remove it, and the next run makes a new one"
            )
        secret = opened.read(MOST).strip() if stat.S_ISREG(found.st_mode) else b""
    if len(secret) < LEAST:
        raise InputError(
            f"{path}: not a key, which has at least {LEAST} characters; remove it, and the next run makes a new one"
        )
    return secret


def _make(path: Path) -> bytes:
    """A new key in a file that is there as a whole or not at all; where another process was quicker, its key."""
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
