"""Run fastbert and record its steps in the file RECORD: a line of JSON for each step of a rank.

Run it as `python -m tests.recorded pretrain ...`. The file PACE holds the minimum duration of a
step in seconds, so that a test has time to disturb a run of tiny steps and no time is lost
otherwise.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastbert.cli import main
from fastbert.data.packing import PackedBatch
from fastbert.data.prefetch import Prefetch
from fastbert.training.engine import Engine


def record() -> None:
    """Record every step from now on."""
    take, compute = Prefetch.__next__, Engine.step
    number: list[int] = [0]

    def taken(feed: Prefetch) -> tuple[int, list[PackedBatch], float]:
        found = take(feed)
        number[0] = found[0] + 1
        return found

    def computed(engine: Engine, packs: Sequence[PackedBatch], lr: float) -> Any:
        began = time.monotonic()
        result = compute(engine, packs, lr)
        line = {
            "step": number[0],
            "rank": int(os.environ["RANK"]),
            "world": int(os.environ["WORLD_SIZE"]),
            "host": socket.gethostname(),
            "examples": [example for pack in packs for example in pack.examples.tolist()],
        }
        with open(
            os.environ["RECORD"], "ab", buffering=0
        ) as file:  # one appending write, so lines of ranks do not mix
            file.write(json.dumps(line).encode() + b"\n")
        time.sleep(max(0.0, began + float(Path(os.environ["PACE"]).read_text()) - time.monotonic()))
        return result

    Prefetch.__next__, Engine.step = taken, computed  # type: ignore[method-assign]


if __name__ == "__main__":
    record()
    main()
