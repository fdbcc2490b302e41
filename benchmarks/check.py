"""Have we become slower? Compares a fresh run with the results on record for this kind of machine; `make bench-check`.

    python -m benchmarks.check FOLDER

FOLDER is what benchmarks.run wrote. Only ratios are compared, each measured side by side in one run: a slow machine slows both sides.
Exit code 1 where one has fallen below 0.85 of what is on record; 2 where nothing is on record for such a machine, or there is no such folder.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.machine import folder_name
from benchmarks.record import read_record

RESULTS = Path(__file__).with_name("results")
LEAST = 0.85  # of the ratio on record
APART = {
    "quality",
    "downstream",
}  # records of benchmarks that benchmarks.run leaves out, since they take longer; compared where FOLDER has them


class Compared(NamedTuple):
    name: str
    before: float
    now: (
        float | None
    )  # NaN where the fresh run has no such record, None where the record is there and has no such figure: no time was left

    @property
    def fell(self) -> bool:
        return self.now is not None and not self.now >= LEAST * self.before


def compare(before: Path, now: Path) -> Iterator[Compared]:
    """Every ratio on record, with that of the fresh run."""
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
    parser.add_argument("folder", type=Path, help="what benchmarks.run wrote")
    options = parser.parse_args()
    on_record = RESULTS / folder_name(torch.device("cpu"))
    if not on_record.is_dir():
        known = ", ".join(sorted(path.name for path in RESULTS.iterdir() if path.is_dir()))
        print(
            f"check: nothing is on record for {on_record.name}, only for {known}; benchmarks.run --record puts it there"
        )
        return 2
    if not options.folder.is_dir():
        print(f"check: {options.folder}: no such folder; make bench OUT=folder makes one")
        return 2
    found = list(compare(on_record, options.folder))
    for one in found:
        now = (
            "no time" if one.now is None else "missing" if math.isnan(one.now) else f"{one.now:.2f}"
        )
        print(f"{'FELL ' if one.fell else '     '} {one.before:8.2f} {now:>8}  {one.name}")
    fallen, unmeasured = sum(one.fell for one in found), sum(one.now is None for one in found)
    print(
        f"{len(found)} ratios on record; {fallen} have fallen by more than {1 - LEAST:.0%}, {unmeasured} were not measured for want of time"
    )
    return 1 if fallen else 0


if __name__ == "__main__":
    sys.exit(main())
