"""The report on kernels from the measurements of pytest-benchmark: rows, a page and figures.

A rate is the least work of the spec (with dropout) over the time. The work is floating-point
operations if matrix products limit the speed, else bytes. Extra memory is the peak beyond the
inputs, gradients included.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import quantiles

from benchmarks.harness.machine import Peak
from benchmarks.harness.record import Row
from benchmarks.harness.tables_and_plots import colour, figure_of, save, table
from benchmarks.kernels.cases import Case
from fastbert.training.picture import INK, MUTED
from fastbert_kernels.specs import SPECS

PASSES = ("forward", "backward", "both")
OURS = ("triton", "cpu")
SIZE = " T="  # marks the cases that differ only in size, and form one line of a figure
MATRIX_WORK = 20  # FLOP per byte; above it matrix products limit the speed

# Share of the least work that the forward pass has; the specs give it for both passes together.
# Without an entry here a single pass has no rate.
FORWARD_SHARE = {
    "attention": lambda shape: 2 / 7,  # two products of seven
    "mlm_loss": lambda shape: 1 / 3,  # one product of three, in whichever pass the others run
    # x, y of x, y, x, dy, dx; the residual is read twice, and its gradient written.
    "norm": lambda shape: 2 / 5 if shape.get("bare") else 3 / 8,
    # x, residual, y and the sum; then dy, the sum and its gradient, dx, dresidual.
    "add_norm": lambda shape: 4 / 9,
    "gelu": lambda shape: 2 / 5,  # x, y of x, y, x, dy, dx
    "geglu": lambda shape: 3 / 8,  # the same, where x and dx are twice as wide
}
# TFLOP/s forward and backward, published for FlashAttention-2 on an H100 with K = 64. Source: the
# plots without causal mask in Shah et al., 2024 (FlashAttention-3).
FLASH_ATTENTION_2 = {512: (282, 198), 1024: (306, 238), 2048: (318, 264), 4096: (321, 279)}
GOALS_ARE_FOR = ("H100", "H200")


def rows_of(
    case: Case, which: str, seconds: Mapping[str, Sequence[float]], peak: Peak, element: int
) -> list[Row]:
    """One row for each implementation.

    Args:
        case: what was timed.
        which: one of PASSES.
        seconds: the rounds of each implementation, ours included.
        peak: peak rates of the device.
        element: bytes of a number.
    """
    spec = SPECS[case.operation]
    flops, least_bytes = spec.flops(case.shape), spec.least_bytes(case.shape, element)
    of_products = flops > MATRIX_WORK * least_bytes
    work, top = (flops, peak.flops) if of_products else (least_bytes, peak.bandwidth)
    shares = {"both": 1.0}
    if case.operation in FORWARD_SHARE:
        forward = FORWARD_SHARE[case.operation](case.shape)
        shares |= {"forward": forward, "backward": 1 - forward}
    spreads = {name: quantiles(rounds, n=4, method="inclusive") for name, rounds in seconds.items()}
    fastest = min((spread[1] for name, spread in spreads.items() if name not in OURS), default=None)
    rows = []
    for name, (low, median, high) in spreads.items():
        rate = work * shares[which] / median if which in shares else None
        rows.append(
            {
                "case": str(case),
                "operation": case.operation,
                "tokens": case.tokens,
                "pass": which,
                "implementation": name,
                "ms": 1e3 * median,
                "quartiles": [1e3 * low, 1e3 * high],
                "rounds": len(seconds[name]),
                "rate": rate,
                "unit": "FLOP/s" if of_products else "B/s",
                "share_of_peak": rate / top if rate else None,
                "fastest_rival_over_this": fastest / median if fastest else None,
            }
        )
    return rows


def ratios(rows: Sequence[Row]) -> dict[str, float]:
    """The fastest rival's time over ours, for both passes of each case at a size of training.

    The small packs of the figures are left out, because they take too little time.
    """
    ours = [
        row
        for row in rows
        if row.get("pass") == "both" and row["implementation"] in OURS and SIZE not in row["case"]
    ]
    return {
        f"{row['case']}, fastest rival over ours": row["fastest_rival_over_this"]
        for row in ours
        if row["fastest_rival_over_this"]
    }


def goals(rows: Sequence[Row]) -> list[tuple[str, float | None, str, float]]:
    """The goals for an H100 or H200: description, measured value, ">=" or "<=", and bound.

    The value is None if it was not measured.
    """

    def get(key: str, case: str, which: str, implementation: str = "triton") -> float | None:
        wanted = (case, which, implementation)
        return next(
            (
                row[key]
                for row in rows
                if "note" not in row and (row["case"], row["pass"], row["implementation"]) == wanted
            ),
            None,
        )

    def over(a: float | None, b: float | None) -> float | None:
        return a / b if a is not None and b else None

    found: list[tuple[str, float | None, str, float]] = []
    for n, (forward, backward) in FLASH_ATTENTION_2.items():
        case = f"attention n={n}"
        for which, published, factor in (("forward", forward, 1.15), ("backward", backward, 0.95)):
            rate = get("rate", f"{case} p=0", which)
            found.append(
                (
                    f"{case} {which}, over FlashAttention-2's {published} TFLOP/s",
                    over(rate, published * 1e12),
                    ">=",
                    factor,
                )
            )
        slower = over(get("ms", f"{case} p=0.1", "forward"), get("ms", f"{case} p=0", "forward"))
        found.append((f"{case} forward, time with dropout over without", slower, "<=", 1.12))
    case = "mlm_loss D=768"
    ms = get("ms", case, "both")
    best = [
        t
        for name in ("torch.compile", "linear_cross_entropy")
        if (t := get("ms", case, "both", name)) is not None
    ]
    memory = over(get("extra_bytes", case, "both"), get("extra_bytes", case, "both", "eager"))
    found += [
        (f"{case}, eager's time over ours", over(get("ms", case, "both", "eager"), ms), ">=", 1.4),
        (
            f"{case}, our time over the best of torch.compile and linear_cross_entropy",
            over(ms, min(best, default=None)),
            "<=",
            1.05,
        ),
        (f"{case}, our extra memory over eager's", memory, "<=", 0.1),
    ]
    for case in [
        f"norm {label}"
        for size in ("D=768", "D=1024")
        for label in (f"alone {size} p=0", f"{size} p=0.1")
    ]:
        found += [
            (
                f"{case} forward, share of the memory bandwidth",
                get("share_of_peak", case, "forward"),
                ">=",
                0.75,
            ),
            (
                f"{case} backward, share of the memory bandwidth",
                get("share_of_peak", case, "backward"),
                ">=",
                0.65,
            ),
            (
                f"{case}, eager's time over ours",
                over(get("ms", case, "both", "eager"), get("ms", case, "both")),
                ">=",
                1.6,
            ),
        ]
    return found


def reached(goal: tuple[str, float | None, str, float]) -> str:
    _, value, direction, bound = goal
    if value is None:
        return "not measured"
    return (
        "reached"
        if (value >= bound if direction == ">=" else value <= bound)
        else "**not reached**"
    )


def goals_table(rows: Sequence[Row], heading: str) -> str:
    """A table in Markdown: a line for each goal."""
    lines = []
    for goal in goals(rows):
        what, value, direction, bound = goal
        found = "-" if value is None else f"{value:.2f}"
        lines.append([what, f"{direction} {bound:g}", found, reached(goal)])
    return table((heading, "wanted", "measured", ""), lines)


def page(device: str, rows: Sequence[Row], peak: Peak) -> str:
    """The page in Markdown: the goals, a line for each of our rows, and what was not measured."""
    lines = ["Kernels", ""]
    if any(name in device for name in GOALS_ARE_FOR):
        lines += [goals_table(rows, "goal on an H100 or H200"), ""]
    lines += [
        f"Peaks: {peak.flops / 1e12:,.3g} TFLOP/s, {peak.bandwidth / 1e9:,.0f} GB/s, "
        f"{peak.source}. A rate is the least work of the "
        "operation over the time; its share is that of the resource that limits the operation.",
        "",
        "![time and share of the peak against size](kernels.png)",
        "",
    ]
    measured = [row for row in rows if "note" not in row]
    columns = (
        "case",
        "pass",
        "ms (quartiles)",
        "rate",
        "of peak",
        "extra MB",
        "rivals, ms",
        "fastest rival over ours",
        "error over allowed",
    )
    body = []
    for row in (row for row in measured if row["implementation"] in OURS):
        others = [
            r
            for r in measured
            if (r["case"], r["pass"]) == (row["case"], row["pass"]) and r is not row
        ]
        low, high = row["quartiles"]
        unit, scale, digits = ("TFLOP/s", 1e12, 1) if row["unit"] == "FLOP/s" else ("GB/s", 1e9, 0)
        if row["unit"] == "FLOP/s" and (row["rate"] or 0) < 1e12:
            unit, scale, digits = "GFLOP/s", 1e9, 0
        share = row["share_of_peak"]
        ratio = row["fastest_rival_over_this"]
        memory = row["extra_bytes"]
        body.append(
            [
                row["case"],
                row["pass"],
                f"{row['ms']:.3f} ({low:.3f} to {high:.3f})",
                "-" if row["rate"] is None else f"{row['rate'] / scale:,.{digits}f} {unit}",
                "-" if share is None else f"{100 * share:.0f} %",
                "-" if memory is None else f"{memory / 1e6:,.0f}",
                ", ".join(f"{r['implementation']} {r['ms']:.3f}" for r in others) or "-",
                "-" if ratio is None else f"{ratio:.2f}",
                f"{row['error_over_allowed']:.2f}"
                + ("" if row["error_over_allowed"] <= 1 else " **WRONG**"),
            ]
        )
    lines.append(table(columns, body))
    notes = sorted(
        {
            f"- {row['case']}: {row['implementation']}: {row['note']}"
            for row in rows
            if "note" in row
        }
    )
    return "\n".join([*lines, *(["", "Not measured:", "", *notes] if notes else [])])


def draw(rows: Sequence[Row], path: Path) -> None:
    """Plot both passes over the tokens of the pack, with a row of panels for each operation.

    The panels show the time with its quartiles, and the share of the peak.
    """
    lines: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        if row.get("pass") == "both" and SIZE in row["case"]:
            lines.setdefault(row["operation"], {}).setdefault(row["implementation"], []).append(row)
    if not lines:
        return
    figure, axes = figure_of(len(lines), 2)
    for contenders, (time, share) in zip(lines.values(), axes, strict=True):
        for name, found in contenders.items():
            tokens = [row["tokens"] for row in found]
            style = {
                "color": colour(name),
                "marker": "o",
                "markersize": 3.5,
                "linewidth": 2.0 if name in OURS else 1.2,
            }
            time.plot(tokens, [row["ms"] for row in found], label=name, **style)
            time.fill_between(
                tokens,
                *zip(*(row["quartiles"] for row in found), strict=True),
                color=colour(name),
                alpha=0.15,
                linewidth=0,
            )
            share.plot(tokens, [100 * row["share_of_peak"] for row in found], **style)
        one = next(iter(contenders.values()))
        time.set(xscale="log", yscale="log")
        share.set(xscale="log")
        share.set_ylim(bottom=0)
        time.set_ylabel("ms, forward + backward", color=MUTED)
        share.set_ylabel(f"share of the peak in {one[0]['unit']}, %", color=MUTED)
        label = " ".join(
            word for word in one[0]["case"].split() if not word.startswith(SIZE.strip())
        )
        time.set_title(label, loc="left", color=INK, fontsize=10, fontweight="bold")
        for ax in (time, share):
            ax.set_xticks([row["tokens"] for row in one], [f"{row['tokens']:,}" for row in one])
            ax.minorticks_off()
        time.legend(frameon=False, fontsize=8, labelcolor=INK)
    for ax in axes[-1]:
        ax.set_xlabel("tokens of the pack", color=MUTED)
    save(figure, path)
