"""Print as JSON what the tile search times for rows.

Run it as `python -m tests.served_kernels TABLE SIZE ...`. Signatures are recorded from launches,
which Triton's interpreter would run, so this needs a separate process.
"""

from __future__ import annotations

import json
import sys

from benchmarks.machine_code import search


def main() -> None:
    found = []
    for table, size in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
        row = {"bits": 16, "size": int(size)}
        found.append(
            {
                "forms": [
                    (p.size, p.arguments.get("K", 0) or p.arguments.get("D", 0))
                    for p in search.forms(table, row)
                ],
                "seeds": [
                    p.arguments.get("dropout_seeds_ptr") for p in search.timed_forms(table, row)
                ],
            }
        )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
