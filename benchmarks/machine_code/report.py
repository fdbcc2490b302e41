"""The recorded figures of the model, and the tables of docs/kernels.md made from them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.machine import ROOT
from benchmarks.harness.tables_and_plots import table
from benchmarks.kernels.cases import TOKENS
from benchmarks.machine_code.h100 import DRAM_RATE

RECORD = ROOT / "benchmarks/results/machine_code.json"
# Kernels that cannot be compiled with today's packages.
RECORDED = Path(__file__).with_name("recorded.json")
PROPOSED = ROOT / "benchmarks/kernels/proposed_tiles.json"
PAGE = ROOT / "docs/kernels.md"

Row = dict[str, Any]
HIDDEN = 768  # of BERT-base, for which attention is reported
LENGTHS = (128, 512, 1024, 4096)
_CLASSES = (
    "products",
    "exp2",
    "fp32",
    "compare",
    "integer",
    "convert",
    "shared",
    "wait",
    "uniform",
)


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def parts() -> dict[str, str]:
    """The text for each place of the page, by name."""
    record, recorded = read(RECORD), read(RECORDED)
    return {
        "versions": _versions(record, recorded),
        "calibration": _calibration(recorded),
        "attention": _attention(record, recorded),
        "short": _short(record),
        "loops": _loops(record, recorded),
        "rows": _rows(record),
        "mlm": _mlm(record),
        "tiles": _tiles(),
    }


def factor(recorded: Row, which: str) -> float:
    """Calibration factor for a rate of the model."""
    return recorded["factors"][which]["factor"]


def attention_teraflops(n: int, which: str, seconds: float) -> float:
    """Useful rate of a layer of BERT-base: two products forward, five backward, of all scores."""
    return 2 * (2 if which == "forward" else 5) * TOKENS * n * HIDDEN / seconds / 1e12


# The tables.


def _versions(record: Row, recorded: Row) -> str:
    packages = ", ".join(sorted({row["version"] for row in record["peers"].values()}))
    return (
        f"Compiled by Triton {record['triton']} for sm_90; {packages}. "
        f"Rows marked (recorded) were made in the same way at commit {recorded['commit']}."
    )


def _calibration(recorded: Row) -> str:
    rows = []
    for one in recorded["calibration"]:
        low, high = one["published"]
        published = f"{low}" if low == high else f"{low} to {high}"
        ratio = f"{low / one['model']:.2f}" + (
            "" if low == high else f" to {high / one['model']:.2f}"
        )
        rows.append(
            [
                one["kernel"],
                f"{one['n']:,}",
                one["what"],
                published,
                f"{one['model']}",
                f"**{ratio}**",
            ]
        )
    columns = (
        "kernel",
        "n",
        "what the model ran",
        "published, TFLOP/s",
        "model, TFLOP/s",
        "published / model",
    )
    used = ", ".join(
        f"{which} {about['factor']} ± {about['spread']}"
        for which, about in recorded["factors"].items()
    )
    return f"{table(columns, rows)}\n\nUsed below: {used}."


def _attention(record: Row, recorded: Row) -> str:
    rows = []
    for which in ("forward", "backward"):
        for dropout in (False, True):
            cells = []
            for n in LENGTHS[1:]:
                found = record["attention"][f"{which} dropout={dropout} n={n}"]
                raw = attention_teraflops(n, which, found["seconds"])
                cells.append(f"{raw:.0f} → **{raw * factor(recorded, which):.0f}**")
            rows.append([f"ours, {which}, p = {'0.1' if dropout else '0'}", *cells])
        for one in recorded["published"]:
            if one["pass"] == which:
                rows.append(
                    [
                        f"{one['kernel']}, p = 0, published",
                        *(f"{one['teraflops'][str(n)]}" for n in LENGTHS[1:]),
                    ]
                )
    return table(("TFLOP/s, model → predicted", *(f"n = {n:,}" for n in LENGTHS[1:])), rows)


def _short(record: Row) -> str:
    rows = []
    for name, found in record["attention"].items():
        if name.endswith("n=128"):
            which, dropout, _ = name.split()
            # Forward: q, k, v, out. Backward: q, k, v, dout, dq, dk, dv.
            tensors = 4 if which == "forward" else 7
            least = tensors * TOKENS * HIDDEN * 2 / DRAM_RATE * 1e6
            rows.append(
                [
                    f"{which}, p = {'0.1' if dropout.endswith('True') else '0'}",
                    f"{found['seconds'] * 1e6:.0f}",
                    f"{least:.0f}",
                ]
            )
    return table(
        ("sequences of 128 tokens", "model, µs", "reading and writing each tensor once, µs"), rows
    )


def _loops(record: Row, recorded: Row) -> str:
    ours = [
        _loop(f"**{_titled(name, row)}**", row, recorded)
        for name, row in record["kernels"].items()
        if _walks(name, row)
    ]
    others = [
        _loop(name, row, recorded) for name, row in record["peers"].items() if _walks(name, row)
    ]
    others += [
        _loop(f"{row['name']} (recorded)", _as_seen(row), recorded) for row in recorded["peers"]
    ]
    columns = (
        "kernel",
        "registers",
        "spilled",
        "programs",
        *_CLASSES,
        "sum",
        "cycles",
        "TFLOP/s, model → predicted",
    )
    return table(columns, [*ours, *others])


def _walks(name: str, row: Row) -> bool:
    """Whether it is attention that loops over tiles; a tile with a whole sequence has no loop."""
    return "attention" in name and "short" not in name and row["teraflops"] > 0


def _titled(name: str, row: Row) -> str:
    """The kernel's name with its tile and its warps."""
    blocks = " x ".join(
        f"{value}" for option, value in row["tile"].items() if option.startswith("BLOCK")
    )
    return f"{name}, {blocks}, {row['warps']} warps, {row['stages']} stages" if blocks else name


def _as_seen(row: Row) -> Row:
    """A row of `recorded.json` in the form of the record's rows."""
    counts = {
        word: count
        for word, count in row["per_score"].items()
        if word != "sum" and count is not None
    }
    return row | {"instructions": counts, "sum": row["per_score"]["sum"]}


def _loop(name: str, row: Row, recorded: Row) -> list[str]:
    counts = row["instructions"]
    complete = "products" in counts
    classes = [
        f"{counts.get(word, 0):.2f}".rstrip("0").rstrip(".") if complete or word in counts else ""
        for word in _CLASSES
    ]
    calibrated = row["teraflops"] * factor(
        recorded, "forward loop" if "forward" in name else "backward"
    )
    return [
        name,
        f"{row['registers']}",
        f"{row['spilled']}",
        f"{row['programs']}",
        *classes,
        f"{row.get('sum') or sum(counts.values()):.1f}",
        f"{row['cycles_per_score']:.3f}",
        f"{row['teraflops']:.0f} → {calibrated:.0f}",
    ]


def _rows(record: Row) -> str:
    rows = []
    for name, row in [*record["kernels"].items(), *record["peers"].items()]:
        if not row["gigabytes"] or row["teraflops"]:
            continue
        microseconds = f"{row['launches'][0] * 1e6:.0f}" if row.get("launches") else ""
        waits = f"{row['waits']:.0%}"
        cells = [
            f"{row['registers']}",
            f"{row['programs']}",
            f"{sum(row['instructions'].values()):.1f}",
            f"{row['gigabytes'] / 1e3:.2f}",
        ]
        shown = f"**{_titled(name, row)}**" if name in record["kernels"] else name
        rows.append([shown, *cells, f"{row['issue']:.0%}", waits, microseconds])
    columns = (
        "kernel",
        "registers",
        "programs",
        "instructions an element",
        "TB/s in the loop",
        "issuing",
        "waiting for loads",
        "µs",
    )
    return table(columns, rows)


def _mlm(record: Row) -> str:
    rows = []
    for name, row in [*record["kernels"].items(), *record["peers"].items()]:
        if ("mlm_loss" in name or "CCE" in name) and row["teraflops"]:
            whole = (
                [
                    f"{row['launches'][0] * 1e6:.0f}",
                    f"{row['useful'] / row['launches'][0] / 1e12:.0f}",
                ]
                if row.get("launches")
                else ["", ""]
            )
            cells = [f"{row['registers']}", f"{row['spilled']}", f"{row['programs']}"]
            rows.append(
                [
                    f"**{_titled(name, row)}**" if name in record["kernels"] else name,
                    *cells,
                    "" if row["nested"] else f"{row['teraflops']:.0f}",
                    *whole,
                ]
            )
    return table(
        (
            "kernel",
            "registers",
            "spilled",
            "programs",
            "TFLOP/s in the loop, model",
            "µs, model",
            "TFLOP/s, model",
        ),
        rows,
    )


def _tiles() -> str:
    rows = []
    for architecture, kernels in read(PROPOSED).items():
        present = read(ROOT / "kernels/fastbert_kernels/tiles.json")[architecture]
        for kernel, others in kernels.items():
            for other in others:
                now = next(
                    row
                    for row in present[kernel]
                    if (row["bits"], row["size"]) == (other["bits"], other["size"])
                )
                rows.append(
                    [
                        f"{kernel}, {other['bits']} bits, {other['size']}",
                        _shown(now),
                        _shown(other),
                        f"{other['predicted_ratio']:.2f}",
                    ]
                )
    return table(
        (
            "row",
            "in the table",
            "to be timed beside it",
            "its time over that of the table's row, model",
        ),
        rows,
    )


def _shown(row: Row) -> str:
    skipped = ("bits", "size", "predicted_ratio")
    return ", ".join(f"{name} {value}" for name, value in row.items() if name not in skipped)


def text(record: Row) -> Iterator[str]:
    """Lines for the terminal."""
    for name, row in [*record["kernels"].items(), *record["peers"].items()]:
        rate = (
            f"{row['teraflops']:6.0f} TFLOP/s"
            if row["teraflops"]
            else f"{row['gigabytes']:6.0f} GB/s"
        )
        times: Sequence[float] = row.get("launches", ())
        launches = ", ".join(f"{seconds * 1e6:.0f} µs" for seconds in times)
        yield (
            f"{name:70} registers {row['registers']:3} spilled {row['spilled']:3} "
            f"programs {row['programs']:2}"
            f" | loop {row['cycles']:6.0f} cycles {rate} | {launches}"
        )
