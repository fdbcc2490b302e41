"""metrics.jsonl has one JSON object a line, for an optimizer step or an event.

Lines are only appended. A step has exactly the keys STEP_KEYS, and its counts are of that step
alone. An event has the key "event" instead of a loss. Floats round-trip. NaN and infinity, which
JSON does not have, are null. A resumed run appends to the file. Steps that the run had made after
its checkpoint then appear twice, with the same values.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastbert import strict_json
from fastbert.config import LOSSES
from fastbert.durable import named
from fastbert.regular_file import open_regular

# A loss that the objective does not have is null, and so is its accuracy.
LOSS_KEYS = tuple(f"loss_{name}" for name in LOSSES)
STEP_KEYS = (
    "step",  # optimizer steps done, including this one
    "loss",  # nats: the sum of the losses below, means over the whole global batch
    *LOSS_KEYS,
    *(f"accuracy_{name}" for name in LOSSES),
    "lr",
    "grad_norm",  # before clipping
    "tokens",  # real tokens of the step, including [CLS] and [SEP]
    "masked",
    "sequences",
    "seconds",  # duration of the step, including the wait for its data
    "tokens_per_s",
)


class MetricsFile:
    """Appends lines; each is in the file when `write` returns.

    Args:
        path: the path of metrics.jsonl.
        fresh: start a new file. Otherwise append, after dropping a last line that a process did not
            finish before it died.

    Raises:
        OSError: from any method, when the disk refuses.
    """

    def __init__(self, path: Path, fresh: bool):
        if fresh:
            path.unlink(missing_ok=True)
        else:
            with contextlib.suppress(FileNotFoundError):
                _drop_torn_line(path)
        self._path = path
        # Unbuffered, so that one write is one line, and a full disk is noticed at once.
        self._file = open(path, "ab", buffering=0)

    def write(self, record: dict[str, Any]) -> None:
        line = (strict_json.dumps(record) + "\n").encode()
        with named(self._path):
            written = self._file.write(line)
            if written != len(line):  # the disk is full; writing the rest raises the error
                self._file.write(line[written:])

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path, bad: list[int] | None = None) -> Iterator[dict[str, Any]]:
    """Yield every object of a metrics.jsonl, in the order of the file; nothing where it is missing.

    Lines that are not an object with a step are skipped. On a network disk that two processes have
    written to, a line may be torn.

    Args:
        path: the path of metrics.jsonl.
        bad: receives the numbers of those lines, from 1.

    Raises:
        OSError: the file cannot be read, or is a link to nothing.
    """
    try:
        file = open_regular(path)
    except (FileNotFoundError, NotADirectoryError):
        if path.is_symlink():
            raise
        return
    with file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                break  # a process died while it wrote this line, or is writing it now
            try:
                record = json.loads(line.decode())
            except (ValueError, RecursionError):
                record = None
            if (
                isinstance(record, dict)
                and type(record.get("step")) is int
                and isinstance(record.get("event", ""), str)
            ):
                yield record
            elif bad is not None:
                bad.append(number)


def _drop_torn_line(path: Path) -> None:
    with open(path, "rb+") as file:
        size = file.seek(0, os.SEEK_END)
        keep, block = size, 4096
        while keep > 0:
            start = max(0, keep - block)
            file.seek(start)
            newline = file.read(keep - start).rfind(b"\n")
            if newline >= 0:
                keep = start + newline + 1
                break
            keep = start
        if keep < size:
            file.truncate(keep)
