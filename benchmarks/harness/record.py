"""The output of a benchmark: NAME.json with rows and ratios, and NAME.md to read."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.harness.machine import header_line

Row = dict[str, Any]


@dataclass(frozen=True)
class Record:
    """The outcome of one benchmark on one machine.

    Attributes:
        header: device, versions and commit, from `machine.header`.
        rows: flat JSON objects; units are in the names.
        ratios: figures that must not fall from one commit to the next, where higher is better;
            compared by `benchmarks.check`.
    """

    header: Mapping[str, str]
    rows: Sequence[Row]
    ratios: Mapping[str, float] = field(default_factory=dict)

    def write(self, folder: Path, name: str, text: str) -> None:
        """Write NAME.json, and NAME.md: a title, the header, and the rest of `text`."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.json").write_text(
            json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8"
        )
        title, _, rest = text.partition("\n")
        (folder / f"{name}.md").write_text(
            f"# {title}\n\n{header_line(dict(self.header))}\n{rest.rstrip()}\n", encoding="utf-8"
        )


def read_record(path: Path) -> Record:
    return Record(**json.loads(path.read_text(encoding="utf-8")))


def once(path: Path, make: Callable[[], Row]) -> Row:
    """The row that is stored at `path`; computed and stored there if it does not exist yet.

    So a long benchmark can resume after an interruption.
    """
    if not path.exists():
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(make()), encoding="utf-8")
        partial.replace(path)
    return json.loads(path.read_text(encoding="utf-8"))
