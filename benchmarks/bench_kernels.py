"""Each kernel against torch: whether it is right, and how fast it is.

    python -m benchmarks.bench_kernels --out folder [--only attention norm] [--seconds 120] [--compile one|all|none]

Walks the operations at the sizes of BERT-base and large, packs of 16,384 tokens, bf16. Each case is first compared with the reference
in higher precision, result and gradients, by the bound of the tests. Then forward and backward passes are timed in turns, same inputs:

    triton          ours (on a CPU `cpu`, packs of 512 tokens)
    eager           the same function as one writes it with torch.nn.functional; attention padded, its scores [B, H, n, n]
    torch.compile   of that; it takes many seconds a case, so only for one of an operation, with dropout, unless `--compile all`
    SDPA, varlen_attn, linear_cross_entropy     torch's own fused operation, where this torch has one

A rate is the least work of the spec (that with dropout) over the time: floating-point operations where matrix products set the pace, else
bytes. Extra memory is the peak beyond the inputs, gradients included. The folder gets kernels.json, a row for each implementation, and kernels.md,
a row for each of ours; both are written anew after each case, so that an early end leaves what there is. Exit code 1 if a result is
wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import TOKENS, Case, arguments, call, leaves, outcome, production, truth, upstream_of
from benchmarks.machine import PEAKS, device_name, header, header_line
from benchmarks.rivals import Rival, rivals
from benchmarks.timing import Contender, Times, differentiated, extra_memory, in_turns
from fastbert_kernels.specs import SPECS

PASSES = ("forward", "backward", "both")
CPU_TOKENS = 512
TIMING_SHARE = 0.5  # of a case's time; the rest is left to compiling and checking
MATRIX_WORK = 20  # floating-point operations a byte; above it matrix products set the pace

# What the forward pass has of the least work, which the specs give for both passes together; without a line here a pass has no rate.
FORWARD_SHARE = {
    "attention": lambda shape: 2 / 7,  # two products of seven
    "mlm_loss": lambda shape: 1 / 3,  # one of three, wherever the other two are made
    "norm": lambda shape: (
        2 / 5 if shape.get("bare") else 3 / 8
    ),  # x, y of x, y, x, dy, dx; the residual is read twice, its gradient written
    "gelu": lambda shape: 2 / 5,  # x, y of x, y, x, dy, dx
}

# Published for FlashAttention-2 on an H100, K = 64, TFLOP/s forward and backward. Source: the plots without causal mask in
# Shah et al., 2024 (FlashAttention-3).
FLASH_ATTENTION_2 = {512: (282, 198), 1024: (306, 238), 2048: (318, 264), 4096: (321, 279)}
GOALS_ARE_FOR = ("H100", "H200")

Row = dict[str, Any]


def bench(case: Case, device: torch.device, compiled: bool, seconds: float) -> list[Row]:
    """A row for each pass and implementation, ours first; one with a "note" where a rival is missing or failed."""
    ours = "triton" if device.type == "cuda" else "cpu"
    given = arguments(case, torch.bfloat16 if device.type == "cuda" else torch.float32, device)
    upstream = upstream_of(call(case, given, ours))
    error = truth(case, given, upstream).share(outcome(case, given, ours, upstream))

    contenders = {ours: differentiated(lambda: call(case, given, ours), leaves(case, given), upstream)}
    others, notes = contending_rivals(rivals(case, given), compiled)
    contenders |= others
    memory = {name: extra_memory(contender, device) for name, contender in contenders.items()}
    times = in_turns(contenders, device, seconds)
    return [
        *(row | {"extra_bytes": memory[row["implementation"]]} for row in measured_rows(case, ours, times, error, device)),
        *({"case": str(case), "implementation": name, "note": note} for name, note in notes.items()),
    ]


def contending_rivals(offered: dict[str, Rival | str], compiled: bool) -> tuple[dict[str, Contender], dict[str, str]]:
    """Those that ran once, forward and backward, and why each of the others did not."""
    found: dict[str, Contender] = {}
    notes: dict[str, str] = {}
    eager = offered["eager"]
    if compiled and not isinstance(eager, str):
        torch.compiler.reset()
        offered["torch.compile"] = torch.compile(eager[0], fullgraph=True, dynamic=False), eager[1]
    for name, rival in offered.items():
        if isinstance(rival, str):
            notes[name] = rival
            continue
        try:
            forward, gradients = rival
            result = forward()
            contender = differentiated(forward, gradients, torch.randn_like(result))
            contender.backward(result)
            found[name] = contender
        except Exception as failure:  # whatever a rival may raise, the others are measured
            notes[name] = f"failed: {type(failure).__name__}: {str(failure).partition(chr(10))[0][:200]}"
    return found, notes


def to_compile(cases: list[Case], which: str) -> set[str]:
    """The names of the cases to compile too; "one" of an operation is its first with dropout, if it has dropout."""
    one: dict[str, Case] = {}
    for case in sorted(cases, key=lambda case: case.dropout_p == 0):
        one.setdefault(case.operation, case)
    return {str(case) for case in {"one": one.values(), "all": cases, "none": []}[which]}


def measured_rows(case: Case, ours: str, times: dict[str, Times], error: float, device: torch.device) -> list[Row]:
    spec, peak = SPECS[case.operation], PEAKS.get(device_name(device))
    size = 2 if device.type == "cuda" else 4
    flops, least_bytes = spec.flops(case.shape), spec.least_bytes(case.shape, size)
    of_products = flops > MATRIX_WORK * least_bytes
    work, top = (flops, peak and peak.bf16) if of_products else (least_bytes, peak and peak.bandwidth)
    shares = {"both": 1.0}
    if case.operation in FORWARD_SHARE:
        forward = FORWARD_SHARE[case.operation](case.shape)
        shares |= {"forward": forward, "backward": 1 - forward}
    rows = []
    for which in PASSES:
        spreads = {name: t.spread(which) for name, t in times.items()}
        fastest = min((s.median for name, s in spreads.items() if name != ours), default=None)
        for name, spread in spreads.items():
            rate = 1e3 * work * shares[which] / spread.median if which in shares else None
            rows.append(
                {
                    "case": str(case),
                    "pass": which,
                    "implementation": name,
                    "ms": spread.median,
                    "quartiles": [spread.low, spread.high],
                    "rate": rate,
                    "unit": "FLOP/s" if of_products else "B/s",
                    "share_of_peak": rate / top if rate and top else None,
                    "fastest_rival_over_this": fastest / spread.median if fastest else None,
                    "error_over_allowed": error if name == ours else None,
                }
            )
    return rows


# ------------------------------------------------------------------------------------------------------------- goals


def goals(rows: list[Row]) -> list[tuple[str, float | None, str, float]]:
    """What was aimed for on an H100 or H200: what, the measured value (None: not measured), ">=" or "<=", the goal."""

    def get(key: str, case: str, which: str, implementation: str = "triton") -> float | None:
        wanted = (case, which, implementation)
        return next((row[key] for row in rows if "note" not in row and (row["case"], row["pass"], row["implementation"]) == wanted), None)

    def over(a: float | None, b: float | None) -> float | None:
        return a / b if a is not None and b else None

    found: list[tuple[str, float | None, str, float]] = []
    for n, (forward, backward) in FLASH_ATTENTION_2.items():
        case = f"attention n={n}"
        for which, published, factor in (("forward", forward, 1.15), ("backward", backward, 0.95)):
            rate = get("rate", f"{case} p=0", which)
            found.append((f"{case} {which}, over FlashAttention-2's {published} TFLOP/s", over(rate, published * 1e12), ">=", factor))
        slower = over(get("ms", f"{case} p=0.1", "forward"), get("ms", f"{case} p=0", "forward"))
        found.append((f"{case} forward, time with dropout over without", slower, "<=", 1.12))
    case = "mlm_loss D=768"
    ms = get("ms", case, "both")
    best = [t for name in ("torch.compile", "linear_cross_entropy") if (t := get("ms", case, "both", name)) is not None]
    memory = over(get("extra_bytes", case, "both"), get("extra_bytes", case, "both", "eager"))
    found += [
        (f"{case}, eager's time over ours", over(get("ms", case, "both", "eager"), ms), ">=", 1.4),
        (f"{case}, our time over the best of torch.compile and linear_cross_entropy", over(ms, min(best, default=None)), "<=", 1.05),
        (f"{case}, our extra memory over eager's", memory, "<=", 0.1),
    ]
    for case in [f"norm {label}" for size in ("D=768", "D=1024") for label in (f"alone {size} p=0", f"{size} p=0.1")]:
        found += [
            (f"{case} forward, share of the memory bandwidth", get("share_of_peak", case, "forward"), ">=", 0.75),
            (f"{case} backward, share of the memory bandwidth", get("share_of_peak", case, "backward"), ">=", 0.65),
            (f"{case}, eager's time over ours", over(get("ms", case, "both", "eager"), get("ms", case, "both")), ">=", 1.6),
        ]
    return found


def reached(goal: tuple[str, float | None, str, float]) -> str:
    _, value, direction, bound = goal
    if value is None:
        return "not measured"
    return "reached" if (value >= bound if direction == ">=" else value <= bound) else "**not reached**"


# ------------------------------------------------------------------------------------------------------------- report


def report(facts: dict[str, str], rows: list[Row], left_out: list[Case], ours: str) -> str:
    """Markdown: the goals, a line for each of our rows, and what could not be measured."""
    lines = ["# Kernels", "", header_line(facts), ""]
    if any(name in facts["device"] for name in GOALS_ARE_FOR):
        lines += ["| goal on an H100 or H200 | wanted | measured | |", "|---|---|---|---|"]
        for goal in goals(rows):
            what, value, direction, bound = goal
            lines.append(f"| {what} | {direction} {bound:g} | {'-' if value is None else f'{value:.2f}'} | {reached(goal)} |")
        lines.append("")
    lines += [
        "| case | pass | ms (quartiles) | rate | of peak | extra MB | rivals, ms | fastest rival over ours | error of allowed |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    measured = [row for row in rows if "note" not in row]
    for row in (row for row in measured if row["implementation"] == ours):
        others = [r for r in measured if (r["case"], r["pass"]) == (row["case"], row["pass"]) and r is not row]
        low, high = row["quartiles"]
        unit, scale, digits = ("TFLOP/s", 1e12, 1) if row["unit"] == "FLOP/s" else ("GB/s", 1e9, 0)
        share, ratio, memory = row["share_of_peak"], row["fastest_rival_over_this"], row["extra_bytes"]
        cells = [
            row["case"],
            row["pass"],
            f"{row['ms']:.3f} ({low:.3f} to {high:.3f})",
            "-" if row["rate"] is None else f"{row['rate'] / scale:,.{digits}f} {unit}",
            "-" if share is None else f"{100 * share:.0f} %",
            "-" if memory is None else f"{memory / 1e6:,.0f}",
            ", ".join(f"{r['implementation']} {r['ms']:.3f}" for r in others) or "-",
            "-" if ratio is None else f"{ratio:.2f}",
            f"{row['error_over_allowed']:.2f}" + ("" if row["error_over_allowed"] <= 1 else " **WRONG**"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    notes = [f"- {row['case']}: {row['implementation']}: {row['note']}" for row in rows if "note" in row]
    notes += [f"- {case}: not run: no time was left" for case in left_out]
    return "\n".join([*lines, "", *(["Not measured:", "", *notes, ""] if notes else [])])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for kernels.json and kernels.md")
    parser.add_argument("--only", nargs="+", choices=list(SPECS), default=list(SPECS), help="operations (all)")
    parser.add_argument("--tokens", type=int, help=f"tokens of a pack ({TOKENS}; on a CPU {CPU_TOKENS})")
    parser.add_argument("--seconds", type=float, default=300, help="what all cases together may take, about (300)")
    parser.add_argument("--compile", choices=["one", "all", "none"], default="one", help="for which cases of an operation (one)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()

    device = torch.device(options.device)
    ours = "triton" if device.type == "cuda" else "cpu"
    cases = [c for c in production(options.tokens or (TOKENS if device.type == "cuda" else CPU_TOKENS)) if c.operation in options.only]
    facts = header(device)
    rows: list[Row] = []
    compiled = to_compile(cases, options.compile)
    wrong: list[Case] = []
    options.out.mkdir(parents=True, exist_ok=True)
    print(header_line(facts), flush=True)
    end = time.monotonic() + options.seconds
    while cases and time.monotonic() < end:
        case = cases.pop(0)
        start = time.monotonic()
        try:
            new: list[Row] = bench(case, device, str(case) in compiled, TIMING_SHARE * (end - start) / (len(cases) + 1))
        except Exception as failure:  # one broken kernel must not hide the others
            new = [{"case": str(case), "implementation": ours, "note": f"failed: {type(failure).__name__}: {failure}"[:500]}]
        rows += new
        first = new[0]
        if "note" in first or not first["error_over_allowed"] <= 1:
            wrong.append(case)
        times = ", ".join(f"{r['implementation']} {r['ms']:.3f}" for r in new if r.get("pass") == "both")
        print(f"{case!s:28} {first.get('note') or 'ms, both passes: ' + times} ({time.monotonic() - start:.0f} s)", flush=True)
        (options.out / "kernels.json").write_text(json.dumps({"header": facts, "goals": goals(rows), "rows": rows}, indent=1) + "\n")
        (options.out / "kernels.md").write_text(report(facts, rows, cases, ours))
    print(f"{options.out / 'kernels.md'}: {len(wrong)} wrong or failed, {len(cases)} not run for want of time", flush=True)
    for case in wrong:
        print(f"wrong or failed: {case}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
