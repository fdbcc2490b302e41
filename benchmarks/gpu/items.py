"""A part of the run: a list of items whose begin and end are recorded in results.jsonl.

So a crash, a hang or a kill loses only one item. A process that is started again for the same part
resumes after the item that ended the previous process. An item that takes far longer than its share
is considered hung: the process ends, with the stack of every thread in the log.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from benchmarks.gpu.place import Place, place
from benchmarks.gpu.results import Results
from benchmarks.harness import children

# Exit codes of a part.
DONE = 0
WRONG = 3  # a result was wrong, or an item failed; it is in results.jsonl
BROKEN = 4  # this process can no longer use the GPU; start a new one
PATIENCE = 3  # an item is considered hung after this multiple of its share, but not before:
LEAST_PATIENCE_S = 45  # enough if kernels were not compiled in advance
DRY_PATIENCE = 20  # factor for dry runs, in which a few busy cores compile every kernel


class Item(NamedTuple):
    name: str
    run: Callable[[float], None]  # its argument is the number of seconds that it should take
    weight: float = 1.0
    patience_s: float = LEAST_PATIENCE_S


class Part:
    """What the items of a part need: where they run, and where results are written."""

    def __init__(self, name: str, where: Place, out: Path):
        self.place, self.out = where, out
        self.results = Results(out, name, where.dry)
        self.wrong = False

    def verdict(self, right: bool) -> str:
        """The verdict of a comparison; "dry" in a dry run, which launches nothing."""
        if self.place.dry:
            return "dry"
        self.wrong |= not right
        return "right" if right else "wrong"

    def walk(self, items: list[Item], until: float) -> int:
        """Run the items that have not begun yet, and return the exit code.

        Each gets its share of the time until `until` of time.time().
        """
        waiting = [item for item in items if not self.results.has("begin", item=item.name)]
        for index, item in enumerate(waiting):
            left = until - time.time()
            if left <= 0:
                self.results.add("note", item=item.name, why="no time was left")
                continue
            share = left * item.weight / sum(other.weight for other in waiting[index:])
            # In a dry run every measurement takes its minimum time.
            seconds = 0.0 if self.place.dry else share
            self.results.add("begin", item=item.name)
            patience = max(item.patience_s, PATIENCE * share) * (
                DRY_PATIENCE if self.place.dry else 1
            )
            faulthandler.dump_traceback_later(patience, exit=True)
            try:
                item.run(seconds)
            except Exception as failure:  # the other items are still measured
                traceback.print_exc()
                self.wrong = True
                self.results.add("failed", item=item.name, why=in_one_line(failure))
            faulthandler.cancel_dump_traceback_later()
            try:
                self.place.wait()
            except Exception as failure:
                self.results.add(
                    "failed",
                    item=item.name,
                    why=f"the GPU cannot be used any more: {in_one_line(failure)}",
                )
                return BROKEN
            self.results.add("end", item=item.name)
        return WRONG if self.wrong else DONE


def in_one_line(failure: BaseException) -> str:
    return f"{type(failure).__name__}: {' '.join(str(failure).split())}"[:300]


def main(name: str, items: Callable[[Part], list[Item]]) -> int:
    """The main program of a part."""
    children.end_with_parent()
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.gpu.{name}")
    parser.add_argument("--out", type=Path, required=True, help="folder of results.jsonl")
    parser.add_argument(
        "--until",
        type=float,
        help="end time, in seconds since 1970 (in two minutes)",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="on a CPU: compile every kernel, launch none"
    )
    options = parser.parse_args()
    with place(options.dry_run) as where:
        part = Part(name, where, options.out)
        return part.walk(items(part), options.until or time.time() + 120)


def program(name: str, items: Callable[[Part], list[Item]]) -> None:
    """Run the part and exit without cleanup, because CUDA's cleanup may hang on a broken device."""
    code = main(name, items)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
