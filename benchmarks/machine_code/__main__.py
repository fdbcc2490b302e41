"""Predict the speed of our kernels and of other packages' on an H100 from their machine code.

    python -m benchmarks.machine_code [--only WORD ...]     print a line for each kernel
    python -m benchmarks.machine_code --write               record all figures and fill the page
    python -m benchmarks.machine_code --on-record           fill the page from the record

It needs no GPU and takes two minutes on two cores. The record is
benchmarks/results/machine_code.json, the page docs/kernels.md. `--on-record` compiles nothing. If a
package is not installed, its kernels keep their rows in the record, with the recorded version.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import triton

from benchmarks.compiled.ahead_of_time import check_tools
from benchmarks.compiled.signatures import AotSignature
from benchmarks.harness.forked import forked
from benchmarks.harness.tables_and_plots import filled
from benchmarks.machine_code import ours, peers
from benchmarks.machine_code.duration import Launch, seconds
from benchmarks.machine_code.examine import Case, build, examine
from benchmarks.machine_code.report import LENGTHS, PAGE, RECORD, parts, read, text


def row(case: Case, launches: list[Launch]) -> dict[str, Any]:
    """The record's row of one kernel."""
    seen = examine(case)
    built = build(case)
    return {
        **{
            name: getattr(seen, name)
            for name in ("registers", "spilled", "shared", "warps", "stages", "programs")
        },
        "instructions": {word: round(count, 3) for word, count in seen.instructions.items()},
        "cycles": round(seen.cycles, 1),
        "cycles_per_score": round(seen.cycles / (max(case.elements, 1) * seen.programs), 5),
        "teraflops": round(seen.teraflops, 1),
        "gigabytes": round(seen.gigabytes, 1),
        "issue": round(seen.busy.get("issue", 0.0), 3),
        "waits": round(seen.waits.get("result", 0.0), 3),
        # Its loop contains the end of an outer loop's iteration, which runs rarely.
        "nested": any(launch.inner > 1 for launch in launches),
        "launches": [round(seconds(built, launch), 8) for launch in launches],
        "tile": {name: value for name, value in case.options.items() if isinstance(value, int)},
    }


def examined(words: list[str]) -> dict[str, Any]:
    """The record of all kernels whose names contain one of the words; without words, of all."""
    kernels = ours.kernels(words)
    jobs = [
        (ours.case(*one), ours.launches(*one[1:], LENGTHS[1:]))
        for one in ((name, *about) for name, about in kernels.items())
    ]
    others = [
        (case, version)
        for case, version in peers.cases(lambda line: print(line, file=sys.stderr))
        if _wanted(case.name, words)
    ]
    rows = list(forked(row, [*jobs, *((case, []) for case, _ in others)]))
    mine = dict(zip(kernels, rows, strict=False))
    for name, (signature, _) in kernels.items():
        if signature.table in ours.MLM:
            # FLOPs of the product.
            mine[name]["useful"] = 2 * ours.MASKED * ours.VOCABULARY * signature.size
    theirs = {
        case.name: found | {"version": version}
        for (case, version), found in zip(others, rows[len(jobs) :], strict=True)
    }
    return {
        "triton": triton.__version__,
        "attention": _layers(kernels, mine),
        "kernels": mine,
        "peers": theirs,
    }


def _wanted(name: str, words: list[str]) -> bool:
    return not words or any(word in name for word in words)


def _layers(
    kernels: dict[str, tuple[AotSignature, dict[str, Any]]], rows: dict[str, Any]
) -> dict[str, Any]:
    """Time of all attention kernels of a pass, by pass, dropout and length."""
    found: dict[str, Any] = {}
    for name, (signature, options) in kernels.items():
        if not signature.table.startswith("attention"):
            continue
        which = "forward" if "forward" in signature.table else "backward"
        for n in LENGTHS:
            short = signature.table in ours.SHORT
            if short != (n == LENGTHS[0]) or (
                short and ours.tokens_of_tile(signature, options) != n
            ):
                continue
            times = rows[name]["launches"]
            took = times[0] if len(times) == 1 else times[LENGTHS.index(n) - 1]
            key = f"{which} dropout={signature.arguments['DROPOUT']} n={n}"
            found.setdefault(key, {"seconds": 0.0})["seconds"] += took
    return found


def write_page() -> None:
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), parts()), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="WORD",
        help="only kernels whose name contains one of these words",
    )
    parser.add_argument(
        "--write",
        action="store_true",
        help=f"record the figures in {RECORD.name}, and fill {PAGE.name}",
    )
    parser.add_argument(
        "--on-record",
        action="store_true",
        help="fill the page from the record without compiling",
    )
    options = parser.parse_args()
    if options.write and options.only:
        parser.error("--write records all kernels; leave out --only")
    if options.on_record:
        write_page()
        return
    check_tools()
    record = examined(options.only)
    print("\n".join(text(record)))
    if options.write:
        kept = read(RECORD)["peers"] if RECORD.exists() else {}
        record["peers"] = kept | record["peers"]
        RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        write_page()


if __name__ == "__main__":
    main()
