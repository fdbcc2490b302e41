"""The files of `fastbert embed`: lines of text in, vectors out; what lies between is `Pretrained.encode`."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from fastbert.errors import InputError


def read_lines(file: str | Path) -> list[str]:
    """The lines of a UTF-8 text file, without their ends; raises InputError for a file that is missing, empty or not UTF-8."""
    file = Path(file)
    try:
        data = file.read_bytes()
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}") from None
    if not data:
        raise InputError(f"{file}: empty; a text on each line is expected")
    try:
        # Split at line ends alone: str.splitlines would also break at characters that may stand in a text.
        lines = data.decode("utf-8-sig").replace("\r\n", "\n").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{file}:{data.count(10, 0, error.start) + 1}: not UTF-8; convert it first") from None
    return lines


def check_out(out: str | Path) -> Path:
    """`out` as a path that a .npy file can be written to; raises InputError otherwise. An older file is replaced."""
    out = Path(out)
    if out.suffix != ".npy":
        raise InputError(f"--out {out}: must end in .npy")
    if not out.parent.is_dir():
        raise InputError(f"--out {out}: the folder {out.parent} does not exist; make it first")
    if out.is_dir():
        raise InputError(f"--out {out}: is a folder; give a file name")
    return out


def write_vectors(out: Path, vectors: np.ndarray) -> None:
    """Save [N, D] as .npy, whole or not at all."""
    staging = out.with_name(f".writing-{out.name}")
    try:
        with open(staging, "wb") as handle:
            np.save(handle, vectors)
        os.replace(staging, out)
    finally:
        staging.unlink(missing_ok=True)
