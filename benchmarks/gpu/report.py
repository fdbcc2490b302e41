"""Write report.md from the current contents of results.jsonl and the test results.

    python -m benchmarks.gpu.report FOLDER [--record]

It also works after a run that was killed, and on another machine. `--record` stores the lines and
the report in benchmarks/results/, in a folder named after the GPU.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.kernel_tests import summary_of_tests
from benchmarks.gpu.proposals import winners
from benchmarks.gpu.results import FILE, Line, is_wrong, read
from benchmarks.harness.children import ROOT
from benchmarks.harness.machine import folder_of
from benchmarks.harness.record import Record
from benchmarks.harness.tables_and_plots import table
from benchmarks.kernels.kernel_report import goals_table

NAME = "report.md"
CLOCKS = "clocks.csv"
SHOWN_WORDS = 160  # maximum number of characters of a message


def latest(lines: Sequence[Line], what: str) -> list[Line]:
    """The last line of each case, pass and implementation.

    So a time that was measured in turns replaces one that was measured alone.
    """
    found = {
        (line["part"], line["case"], line["pass"], line["implementation"]): line
        for line in lines
        if line["what"] == what
    }
    return list(found.values())


def page(out: Path) -> str:
    """The whole report. If a section cannot be made, only that section is missing."""
    lines = read(out)
    of_lines = (
        head,
        failures,
        parts,
        machine,
        checks,
        operations,
        missing,
        tiles,
        aims,
        steps,
        counters,
        curves,
        tuned,
    )
    makers = [functools.partial(make, lines) for make in of_lines] + [
        functools.partial(make, out) for make in (summary_of_tests, clocks)
    ]
    sections = []
    for make in makers:
        try:
            sections.append(make())
        except Exception as failure:
            sections.append(
                titled(
                    make.func.__name__,
                    f"This section cannot be made: {type(failure).__name__}: {failure}",
                )
            )
    return "\n\n".join(section for section in sections if section) + "\n"


def write(out: Path) -> Path:
    """Write to another name first, so that no reader sees an incomplete page, even after a kill."""
    partial = out / f".{NAME}"
    partial.write_text(page(out), encoding="utf-8")
    os.replace(partial, out / NAME)
    return out / NAME


# ----------------------------------------------------------------------------------------- sections


def head(lines: Sequence[Line]) -> str:
    dry = any(line.get("dry") for line in lines)
    text = "# The run on a GPU" + (
        ": DRY RUN, nothing was launched and all numbers are meaningless" if dry else ""
    )
    wrong = [line for line in lines if is_wrong(line)]
    checked = [line for line in lines if line["what"] == "check"]
    stopped = [line["why"] for line in lines if line["what"] == "stopped"]
    if wrong:
        verdict = f"**{len(wrong)} results are wrong or failed**; they are listed below."
    else:
        judged = "none was judged" if dry else "all right"
        verdict = f"{len(checked)} comparisons with the reference: {judged}."
    return "\n\n".join([text, verdict, *(f"**Stopped: {why}**" for why in stopped)])


def parts(lines: Sequence[Line]) -> str:
    rows = [
        [line["part"], bold_unless(line["outcome"], "passed"), f"{line['seconds']:.0f}"]
        for line in lines
        if line["what"] == "part"
    ]
    begun = dict.fromkeys(line["part"] for line in lines if line["what"] == "begin")
    rows += [
        [name, "**not finished**", "-"] for name in begun if name not in {row[0] for row in rows}
    ]
    return of_rows("Parts", ("part", "outcome", "seconds"), rows)


def machine(lines: Sequence[Line]) -> str:
    found = []
    for line in lines:
        if line["what"] == "machine":
            found += [f"- {name}: {value}" for name, value in line["facts"].items()]
            found.append(
                f"- installed besides: {', '.join(line['installed']) or 'nothing'}; "
                f"tools: {', '.join(line['tools']) or 'none'}"
            )
        elif line["what"] == "driver":
            found.append(
                "- " + ", ".join(f"{name} {value}" for name, value in line["answers"].items())
            )
        elif line["what"] == "rates":
            share = [
                f" ({100 * line[key]:.0f} % of the peak)" if key in line else ""
                for key in ("gemm_share_of_peak", "bandwidth_share_of_peak")
            ]
            found.append(
                f"- products {line['gemm'] / 1e12:,.1f} TFLOP/s{share[0]}, "
                f"copies {line['bandwidth'] / 1e9:,.0f} GB/s{share[1]}"
            )
        elif line["what"] == "warm-up" and "jobs" in line:
            jobs = f"{line['failed']} of {line['jobs']} jobs failed"
            found.append(
                f"- compiled in advance: {line['kernels']} kernels in {line['seconds']:.0f} s "
                f"on {line['cores']} cores, {jobs}"
            )
        elif line["what"] == "warm-up":
            found.append(f"- compiled in advance: {line.get('job', '')} {line['why']}")
    return titled("Environment", "\n".join(found))


def checks(lines: Sequence[Line]) -> str:
    rows = [
        [
            line["case"],
            bold_unless(line["verdict"], "right", "dry"),
            number(line["error_over_allowed"], "{:.3g}"),
            line.get("worst", ""),
            shape(line),
        ]
        for line in lines
        if line["what"] == "check" and line["part"] == "smoke"
    ]
    columns = ("case", "", "error over allowed", "worst tensor", "shape")
    return of_rows("Correctness", columns, rows)


def operations(lines: Sequence[Line]) -> str:
    """A row for each case and pass: ours, the rivals, and the prediction."""
    times = latest(lines, "time")
    verdicts: dict[str, str] = {}
    for line in lines:
        if (
            line["what"] == "check"
            and line["part"] != "smoke"
            and verdicts.get(line["case"]) != "wrong"
        ):
            verdicts[line["case"]] = line["verdict"]
    rows = []
    for line in times:
        if not line["implementation"].startswith("triton"):
            continue
        same = [
            other
            for other in times
            if (other["case"], other["pass"], other["part"])
            == (line["case"], line["pass"], line["part"])
        ]
        others = [other for other in same if not other["implementation"].startswith("triton")]
        fastest = min((other["ms"] for other in others), default=None)
        rows.append(
            [
                line["case"],
                line["pass"],
                line["implementation"].removeprefix("triton").removeprefix(", ") or "present tiles",
                f"{line['ms']:.3f} ({line['low_ms']:.3f} to {line['high_ms']:.3f})",
                rate(line),
                "-" if line["share_of_peak"] is None else f"{100 * line['share_of_peak']:.0f} %",
                "-"
                if line["predicted_ms"] is None
                else f"{line['predicted_ms']:.3f} ({line['ms'] / line['predicted_ms']:.2f}x)",
                ", ".join(f"{other['implementation']} {other['ms']:.3f}" for other in others)
                or "-",
                "-" if fastest is None else f"{fastest / line['ms']:.2f}",
                "-" if line["extra_bytes"] is None else f"{line['extra_bytes'] / 1e6:,.0f}",
                bold_unless(verdicts.get(line["case"], "-"), "right", "dry", "-"),
            ]
        )
    columns = (
        "case",
        "pass",
        "tiles",
        "ms (quartiles)",
        "rate",
        "of peak",
        "predicted ms (measured over it)",
        "others, ms",
        "fastest of them over ours",
        "extra MB",
        "",
    )
    return of_rows("Operations", columns, rows)


def missing(lines: Sequence[Line]) -> str:
    found = sorted(
        {
            f"- {line['operation']}: {line['implementation']}: {line['why']}"
            for line in lines
            if line["what"] == "missing"
        }
    )
    notes = [
        f"- {line['part']}: {line.get('item', '')} {line['why']}"
        for line in lines
        if line["what"] == "note"
    ]
    return titled("Not measured", "\n".join([*found, *notes]))


def tiles(lines: Sequence[Line]) -> str:
    tried = [line for line in lines if line["what"] == "tile"]
    if not tried:
        return ""
    rows = []
    for line in tried:
        predicted = line.get("predicted_us")
        rows.append(
            [
                line["tile"]["kernel"],
                options(line["tile"]),
                f"{line['case']} {line['pass']}",
                "-" if "ms" not in line else f"{line['ms']:.3f} (present {line['present_ms']:.3f})",
                number(line.get("ratio"), "{:.2f}"),
                "-" if predicted is None else f"{predicted:g} us",
                bold_unless(line["verdict"], "better", "no better", "dry")
                + (f": {line['why'][:SHOWN_WORDS]}" if "why" in line else ""),
            ]
        )
    text = [
        table(
            ("kernel", "proposed row", "case", "ms of the pass", "over present", "predicted", ""),
            rows,
        ),
        "",
    ]
    for winner in [] if any(line.get("dry") for line in tried) else winners(lines):
        if winner.row:
            text.append(
                f"- {winner.key}: takes {winner.ratio:.2f} of the time. "
                f"For tiles.json: `{json.dumps(winner.row)}`"
            )
        else:
            text.append(f"- {winner.key}: the present row stays")
    return titled("Proposed tiles", "\n".join(text))


def aims(lines: Sequence[Line]) -> str:
    """The goals and what was measured."""
    found = [
        line
        for line in latest(lines, "time")
        if line["part"] in ("attention", "operations", "compiled")
    ]
    if not found or any(line.get("dry") for line in found):
        return ""
    return titled("Goals for an H100 or H200", goals_table(found, ""))


def steps(lines: Sequence[Line]) -> str:
    rows = []
    for line in latest(lines, "step"):
        predicted = line["predicted_ms"]
        rows.append(
            [
                line["case"],
                line["implementation"],
                line["pass"],
                f"{line['ms']:.1f} ({line['low_ms']:.1f} to {line['high_ms']:.1f})",
                f"{line['tokens_per_s']:,.0f}",
                "-" if predicted is None else f"{predicted:g}",
            ]
        )
    if not rows:
        return ""
    bound = [
        f"- {line['case']}: {line['verdict']}; "
        f"queueing takes {line['submit_over_gpu']:.2f} of the GPU's time"
        for line in lines
        if line["what"] == "bound"
    ]
    text = table(
        ("case", "model", "time", "ms (quartiles)", "tokens/s at that", "predicted ms"), rows
    )
    return titled("A training step of BERT-base, bf16", "\n".join([text, "", *bound]))


def counters(lines: Sequence[Line]) -> str:
    found = [line for line in lines if line["what"] == "counters"]
    known = ("part", "what", "at", "dry", "case", "kernel")
    names = dict.fromkeys(name for line in found for name in line if name not in known)
    rows = [
        [line["case"], line["kernel"], *(str(line.get(name, "-")) for name in names)]
        for line in found
    ]
    return of_rows("Counters", ("case", "kernel", *names), rows)


def curves(lines: Sequence[Line]) -> str:
    rows = [
        [
            f"{line['dropout_p']:g}",
            str(line["steps"]),
            number(line["first"], "{:.3f}"),
            number(line["last"], "{:.3f}"),
            "yes" if line["falls"] else "**no**",
            number(line["distance"], "{:.5f}"),
            number(line["distance_of_reference"], "{:.5f}"),
            bold_unless(line["verdict"], "right", "dry"),
        ]
        for line in lines
        if line["what"] == "curves agree"
    ]
    columns = (
        "dropout",
        "steps",
        "first loss",
        "last loss",
        "falls",
        "kernels from fp32, nats",
        "reference in bf16 from fp32, nats",
        "",
    )
    return of_rows("Curves", columns, rows)


def tuned(lines: Sequence[Line]) -> str:
    rows = []
    for line in lines:
        if line["what"] == "tuned":
            better = line["best"] != line["first"]
            found = (
                f"`{json.dumps(line['best'])}` takes {line['ratio']:.2f} of the time"
                if better
                else "stays"
            )
            rows.append(
                [line["kernel"], line["case"], options(line["first"]), found, str(line["tried"])]
            )
    return of_rows("Tiles near the best", ("kernel", "case", "from", "found", "tried"), rows)


def clocks(out: Path) -> str:
    """The clock of the multiprocessors under load, from nvidia-smi's samples every second."""
    path = out / CLOCKS
    if not path.exists():
        return ""
    rows = [line.split(",") for line in path.read_text("utf-8", errors="replace").splitlines()]
    samples = [
        [float(match[0]) if (match := re.search(r"[\d.]+", word)) else 0.0 for word in row[1:5]]
        for row in rows
        if len(row) >= 5
    ]
    busy = [sample for sample in samples if sample[3] > 0]
    if not busy:
        return ""
    speed, power, heat = ([sample[i] for sample in busy] for i in range(3))
    text = (
        f"{len(busy)} samples while the GPU worked: {min(speed):.0f} to {max(speed):.0f} MHz, "
        f"median {statistics.median(speed):.0f}; "
        f"up to {max(power):.0f} W and {max(heat):.0f} degrees."
    )
    return titled("Clocks", text)


def failures(lines: Sequence[Line]) -> str:
    found = []
    for line in filter(is_wrong, lines):
        if line["what"] in ("failed", "crashed"):
            found.append(f"- {line['part']}: {line.get('item', '')}: {line['why']}")
        elif "case" in line:
            error = f"error {number(line.get('error_over_allowed'), '{:.3g}')} of what is allowed"
            found.append(
                f"- {line['part']}: {line['case']}: wrong, {error} {line.get('worst', '')}"
            )
        else:
            found.append(
                f"- {line['part']}: dropout {line['dropout_p']:g}: the curves do not agree"
            )
    return titled("Wrong or failed", "\n".join(found))


# --------------------------------------------------------------------------------------- formatting


def titled(title: str, text: str) -> str:
    """A section; nothing where there is no text."""
    return f"## {title}\n\n{text}" if text else ""


def of_rows(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A section with a table; nothing where it has no rows."""
    return titled(title, table(columns, rows) if rows else "")


def bold_unless(word: str, *fine: str) -> str:
    return word if word in fine else f"**{word}**"


def number(value: Any, form: str) -> str:
    """The number in this form; text such as "nan" is unchanged."""
    if isinstance(value, (int, float)):
        return form.format(value)
    return "-" if value is None else str(value)


def rate(line: Line) -> str:
    if line["rate"] is None:
        return "-"
    return (
        f"{line['rate'] / 1e12:,.1f} TFLOP/s"
        if line["unit"] == "FLOP/s"
        else f"{line['rate'] / 1e9:,.0f} GB/s"
    )


def shape(line: Line) -> str:
    return " ".join(f"{axis}={size}" for axis, size in line["shape"].items())


def options(row: dict[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in row.items() if name != "kernel")


# ------------------------------------------------------------------------------------------- record


def record(out: Path) -> Path:
    """Record the lines as rows, ratios to the fastest rival, and the page."""
    lines = read(out)
    facts: dict[str, str] = next((line["facts"] for line in lines if line["what"] == "machine"), {})
    times = [line for line in latest(lines, "time") if line["pass"] == "both"]
    ratios = {}
    for line in times:
        others = [
            o["ms"]
            for o in times
            if o["case"] == line["case"] and not o["implementation"].startswith("triton")
        ]
        if line["implementation"] == "triton" and others:
            ratios[f"{line['case']}, fastest rival over ours"] = min(others) / line["ms"]
    folder = ROOT / "benchmarks/results" / folder_of(str(facts.get("device", "unknown")))
    header = {
        name: str(facts.get(name, "-"))
        for name in ("device", "driver", "CUDA or HIP", "torch", "Triton", "Python", "commit")
    }
    rows = [line for line in lines if line["what"] not in ("begin", "end")]
    Record(header, rows, ratios).write(folder, "gpu", page(out).removeprefix("# "))
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help=f"the folder of {FILE}")
    parser.add_argument(
        "--record", action="store_true", help="store the results in benchmarks/results/"
    )
    arguments = parser.parse_args()
    if not (arguments.folder / FILE).exists():
        print(f"report: {arguments.folder} has no {FILE}; run make gpu OUT=folder to write one")
        return 2
    print(f"written: {write(arguments.folder)}")
    if arguments.record:
        if any(line.get("dry") for line in read(arguments.folder)):
            print("report: --record: this was a dry run; its numbers are meaningless")
            return 2
        print(f"recorded in {record(arguments.folder).relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
