"""Has anything become slower? Compare a new run with the results on record; `make bench-check`.

    python -m benchmarks.check FOLDER

FOLDER is the output of make bench. It is compared with the record of this kind of machine. Only
ratios are compared, each measured side by side in one run, because a slow machine slows both sides.
The exit code is 1 if a ratio has fallen below 0.85 of the recorded one, and 2 if there is no record
for such a machine or no such folder.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.harness.machine import folder_name
from benchmarks.harness.record import read_record

RESULTS = Path(__file__).with_name("results")
LEAST = 0.85  # of the ratio on record
# Records of longer benchmarks, which make bench leaves out; compared only if FOLDER has them.
APART = {
    "quality",
    "downstream",
}


class Compared(NamedTuple):
    """A ratio on record and that of the new run.

    `now` is NaN if the new run has no such record. It is None if the record exists but lacks this
    figure, because the time was used up.
    """

    name: str
    before: float
    now: float | None

    @property
    def fell(self) -> bool:
        return self.now is not None and not self.now >= LEAST * self.before


def compare(before: Path, now: Path) -> Iterator[Compared]:
    """Every ratio on record, with that of the new run."""
    for path in sorted(before.glob("*.json")):
        if path.stem in APART and not (now / path.name).exists():
            continue
        on_record, there = read_record(path).ratios, (now / path.name).exists()
        ratios: Mapping[str, float] = (
            read_record(now / path.name).ratios if there else dict.fromkeys(on_record, math.nan)
        )
        for name, value in on_record.items():
            yield Compared(f"{path.stem}: {name}", value, ratios.get(name))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="the output folder of make bench")
    options = parser.parse_args()
    on_record = RESULTS / folder_name(torch.device("cpu"))
    if not on_record.is_dir():
        known = ", ".join(sorted(path.name for path in RESULTS.iterdir() if path.is_dir()))
        print(
            f"check: there is no record for {on_record.name}, only for {known}; "
            "python -m benchmarks --record adds one"
        )
        return 2
    if not options.folder.is_dir():
        print(f"check: {options.folder}: no such folder; run make bench OUT=folder to make one")
        return 2
    found = list(compare(on_record, options.folder))
    for one in found:
        now = (
            "no time" if one.now is None else "missing" if math.isnan(one.now) else f"{one.now:.2f}"
        )
        print(f"{'FELL ' if one.fell else '     '} {one.before:8.2f} {now:>8}  {one.name}")
    fallen, unmeasured = sum(one.fell for one in found), sum(one.now is None for one in found)
    print(
        f"{len(found)} ratios on record; {fallen} have fallen by more than {1 - LEAST:.0%}, "
        f"{unmeasured} were not measured because the time was used up"
    )
    return 1 if fallen else 0


if __name__ == "__main__":
    sys.exit(main())
