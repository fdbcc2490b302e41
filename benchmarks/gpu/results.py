"""The measurements, written to disk at once, one JSON object per line: results.jsonl.

Every line has "part", "what" ("time", "check", "step", ...) and "at", in seconds since 1970. `dry`
marks the lines of a run without a GPU. Units are in the names. A process that is killed while it
writes leaves an incomplete line; the next line starts on a new one.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import time
from pathlib import Path
from typing import Any

FILE = "results.jsonl"

Line = dict[str, Any]


class Results:
    """Appends the lines of one part to the file in a folder; several processes may do so."""

    def __init__(self, out: Path, part: str, dry: bool):
        self.path, self.part, self.dry = out / FILE, part, dry

    def add(self, what: str, **fields: Any) -> Line:
        """Write a line and return it. Values that are not finite become text, as JSON requires."""
        line = {"part": self.part, "what": what, **fields, "at": round(time.time(), 3)} | (
            {"dry": True} if self.dry else {}
        )
        text = json.dumps(_plain(line), allow_nan=False) + "\n"
        with self.path.open("ab+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # until the file is closed, or the process ends
            size = file.seek(0, os.SEEK_END)
            if size and os.pread(file.fileno(), 1, size - 1) != b"\n":
                text = "\n" + text
            file.write(text.encode())
        return line

    def has(self, what: str, **fields: Any) -> bool:
        """Whether this part has a line with these fields."""
        wanted = {"part": self.part, "what": what, **fields}
        return any(
            all(line.get(name) == value for name, value in wanted.items())
            for line in read(self.path.parent)
        )


def read(out: Path) -> list[Line]:
    """Every complete line so far."""
    path = out / FILE
    found = []
    for text in (
        path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    ):
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue  # an incomplete line
        if isinstance(line, dict) and "part" in line and "what" in line:
            found.append(line)
    return found


def is_wrong(line: Line) -> bool:
    """Whether a line reports an error of ours or a failure; proposed tiles may be wrong."""
    return line["what"] in ("failed", "crashed") or (
        line.get("verdict") == "wrong" and line["what"] != "tile"
    )


def _plain(value: Any) -> Any:
    """The same value with types that JSON supports."""
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # "nan", "inf"
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
