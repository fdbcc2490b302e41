"""Regenerate the table of tiles (`kernels/fastbert_kernels/tiles.json`) for this machine's GPU.

    python -m benchmarks.kernels.tune [--kernels attention_forward gelu_backward] [--seconds 600]
    python -m benchmarks.kernels.tune --check [--seconds 60]
    python -m benchmarks.kernels.tune --model [--check]

The first form writes the table and prints the changes. Each operation runs at the sizes of training
to find the rows of the table that it uses. Each row is searched one option at a time: the values
next to the present one, among those of BLOCKS and COMMON, are timed in turns with it. The best
value stays if the gain exceeds the noise. Tiles that do not compile or fit are dropped, and so are,
with a report, tiles whose result or gradients exceed the error bound of the tests. The other
kernels of a pass keep their tiles, but the time of the whole pass counts.

`--check` changes nothing. It searches bf16 once until the time limit, and reports whether the table
is within 10 % of the best that it found.

`--model` needs no GPU. It searches the rows of sm_90 in 16 bits with the model of an H100, which
uses the compiled machine code (`machine_code/search.py`), and prints the predictions. The rows that
it replaces, and the next best of another shape, are written to `proposed_tiles.json`, so that the
first run on a GPU times them.

`--dry-run` works in Triton's interpreter, on a CPU and tiny shapes; everything is real except the
times, which are meaningless. The exit code is 1 if a present tile gives a wrong result, and 2
without a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import statistics
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.harness.machine import header, header_line
from benchmarks.harness.timing import Contender, in_turns
from benchmarks.kernels.cases import (
    Case,
    Truth,
    arguments,
    call,
    leaves,
    production,
    truth,
    upstream_of,
)
from fastbert_kernels._tiles import TABLE, Row, chosen_by, known_architecture
from fastbert_kernels.specs import SPECS

if TYPE_CHECKING:
    from benchmarks.machine_code.search import Proposal

# Values to try, in ascending order. Blocks stay within the limits of each kernel (for example,
# items of attention's tile schedule have 128 tokens). A kernel without an entry keeps its blocks.
BLOCKS: dict[str, dict[str, tuple[int, ...]]] = {
    "attention_forward": {"BLOCK_Q": (64, 128), "BLOCK_K": (32, 64, 128)},
    "attention_prepare": {"BLOCK_Q": (32, 64, 128)},
    "attention_dkdv": {"BLOCK_Q": (32, 64, 128), "BLOCK_K": (32, 64, 128)},
    "attention_dq": {"BLOCK_Q": (32, 64, 128), "BLOCK_K": (32, 64, 128)},
    "attention_forward_window": {"BLOCK_Q": (32, 64, 128), "BLOCK_K": (32, 64, 128)},
    "attention_dkdv_window": {"BLOCK_Q": (32, 64, 128), "BLOCK_K": (32, 64, 128)},
    "attention_dq_window": {"BLOCK_Q": (32, 64, 128), "BLOCK_K": (32, 64, 128)},
    "mlm_loss_forward": {
        "BLOCK_M": (64, 128),
        "BLOCK_V": (64, 128, 256),
        "BLOCK_D": (32, 64, 128),
        "COMPARED": (32, 64, 128, 256),
    },
    "mlm_loss_combine": {"BLOCK_M": (32, 64, 128, 256)},
    "mlm_loss_backward": {
        "BLOCK_M": (64, 128, 256),
        "BLOCK_V": (64, 128, 256),
        "BLOCK_D": (32, 64, 128),
    },
    "norm_forward": {"BLOCK_T": (1, 2, 4, 8), "BLOCK_D": (128, 256, 512, 1024, 2048, 4096)},
    "norm_backward": {"BLOCK_T": (1, 2, 4, 8), "BLOCK_D": (128, 256, 512, 1024, 2048, 4096)},
    "add_norm_forward": {"BLOCK_T": (1, 2, 4, 8), "BLOCK_D": (128, 256, 512, 1024, 2048, 4096)},
    "add_norm_backward": {"BLOCK_T": (1, 2, 4, 8), "BLOCK_D": (128, 256, 512, 1024, 2048, 4096)},
    "embedding_forward": {"BLOCK_T": (1, 2, 4, 8), "BLOCK_D": (128, 256, 512, 1024, 2048, 4096)},
    "embedding_backward": {"BLOCK_T": (1, 2, 4, 8), "BLOCK_D": (128, 256, 512, 1024, 2048, 4096)},
    "embedding_table": {"BLOCK_T": (4, 8, 16, 32), "BLOCK_D": (256, 512, 1024)},
    "gelu_forward": {"BLOCK_T": (4, 8, 16, 32), "BLOCK_F": (128, 256, 512)},
    "gelu_backward": {"BLOCK_T": (4, 8, 16, 32), "BLOCK_F": (128, 256, 512)},
    "geglu_forward": {"BLOCK_T": (4, 8, 16, 32), "BLOCK_F": (128, 256, 512)},
    "geglu_backward": {"BLOCK_T": (4, 8, 16, 32), "BLOCK_F": (128, 256, 512)},
}
COMMON = {
    "programs": (1, 2, 3, 4, 6, 8, 12),
    "num_warps": (1, 2, 4, 8, 16),
    "num_stages": (1, 2, 3, 4),
}

PROPOSED = Path(__file__).with_name("proposed_tiles.json")

SWEEPS = (
    4  # maximum passes over all options; more than one, because the best warps depend on blocks
)
NOISE = 0.97  # a tile is better if it takes less than this share of the other's time
CLOSE = 0.9  # the check passes if the best tile found takes at least this share of the table's time
SECONDS_A_TRIAL = 0.3


class Key(NamedTuple):
    """A row in the table of an architecture."""

    kernel: str
    bits: int
    size: int

    def __str__(self) -> str:
        return f"{self.kernel} {self.bits}-bit {self.size}"


class Use(NamedTuple):
    """A case, ready to run, and the pass ("forward" or "backward") that uses a row."""

    case: Case
    arguments: dict[str, Any]
    upstream: Tensor
    truth: Truth
    which: str = "forward"

    def contender(self, rows: Mapping[Key, Row]) -> Contender:
        """The case with these rows in place of the table's."""

        def forward() -> Tensor:
            with replacing(rows):
                return call(self.case, self.arguments, "triton")

        def backward(result: Tensor) -> object:
            with replacing(rows):
                return torch.autograd.grad(result, leaves(self.case, self.arguments), self.upstream)

        return Contender(forward, backward)

    def error(self, key: Key, row: Row) -> float:
        """The error as a share of the allowed one."""
        contender = self.contender({key: row})
        result = contender.forward()
        gradients: Any = contender.backward(result)
        return self.truth.share([result.detach(), *gradients])


class Asked(NamedTuple):
    """A row of the table that a case uses, and the pass ("forward" or "backward") that uses it."""

    which: str
    row: Row


class Found(NamedTuple):
    best: Row
    ratio: float  # time of the best over time of the present row
    tried: int
    wrong: list[Row]  # tiles with wrong results, perhaps including the present one


def training_cases() -> list[Case]:
    """The benchmarks' cases, with dropout if the operation has it, and the table's head sizes."""
    cases = [
        case for case in production() if case.dropout_p > 0 or not SPECS[case.operation].dropout
    ]
    lengths = next(case.shape["lengths"] for case in cases if case.label == "n=512")
    return cases + [
        Case("attention", f"n=512 K={size}", {"lengths": lengths, "H": 768 // size, "K": size}, 0.1)
        for size in (32, 128)
    ]


def checked_cases() -> list[Case]:
    """The first case of each operation, and short sequences, which have separate kernels."""
    cases = training_cases()
    first = {case.operation: case for case in reversed(cases)}
    return [*first.values(), *(case for case in cases if case.label == "n=128")]


def tiny_cases() -> list[Case]:
    """Cases that are small enough for the interpreter."""
    return [
        Case(name, "tiny", spec.shapes[2], 0.1 if spec.dropout else 0.0)
        for name, spec in SPECS.items()
    ]


def replacing(rows: Mapping[Key, Row]) -> contextlib.AbstractContextManager[None]:
    """A context in which these rows replace those of the table."""
    return chosen_by(lambda kernel, row: rows.get(Key(kernel, row["bits"], row["size"]), row))


def asked(case: Case, given: dict[str, Any]) -> dict[Key, Asked]:
    """All rows that a case uses, found by running it. No row serves both passes."""
    found: dict[Key, Asked] = {}
    which = "forward"

    def note(kernel: str, row: Row) -> Row:
        found.setdefault(Key(kernel, row["bits"], row["size"]), Asked(which, row))
        return row

    with chosen_by(note):
        result = call(case, given, "triton")
        which = "backward"
        torch.autograd.grad(result, leaves(case, given), torch.ones_like(result))
    return found


def uses_of(cases: list[Case], dtype: torch.dtype, device: torch.device) -> dict[Key, list[Use]]:
    """The rows that these cases use, found by running them."""
    found: dict[Key, list[Use]] = {}
    for case in cases:
        given = arguments(case, dtype, device)
        upstream = upstream_of(call(case, given, "triton"))
        use = Use(case, given, upstream, truth(case, given, upstream))
        for key, (which, _) in asked(case, given).items():
            found.setdefault(key, []).append(use._replace(which=which))
    return found


def search(
    key: Key, present: Row, uses: list[Use], device: torch.device, sweeps: int, end: float
) -> Found:
    """Improve the present row one option at a time, until no neighbour is better.

    The search stops when `end` (of time.monotonic) has passed.
    """
    options = {
        name: values
        for name, values in (BLOCKS.get(key.kernel, {}) | COMMON).items()
        if name in present
    }
    best, tried, wrong = present, 0, []
    if max(use.error(key, present) for use in uses) > 1:
        return Found(present, 1.0, 0, [present])
    seen = [present]
    for _ in range(sweeps):
        before = best
        for name, values in options.items():
            if time.monotonic() > end:
                break
            trials = [trial for trial in neighbours(best, name, values) if trial not in seen]
            seen += trials
            tried += len(trials)
            valid = [trial for trial in trials if is_valid(trial, key, uses, wrong)]
            shares = time_shares(key, best, valid, uses, device)
            if shares and min(shares) < NOISE:
                best = valid[shares.index(min(shares))]
        if best is before:
            break
    # Each step was compared with the previous one; the total gain is relative to the present row.
    ratio = 1.0 if best is present else time_shares(key, present, [best], uses, device)[0]
    return Found(best, ratio, tried, wrong) if ratio < NOISE else Found(present, 1.0, tried, wrong)


def neighbours(row: Row, name: str, values: tuple[int, ...]) -> list[Row]:
    """The row with the next smaller and the next larger value of one option."""
    smaller, larger = [v for v in values if v < row[name]], [v for v in values if v > row[name]]
    return [{**row, name: value} for value in (*smaller[-1:], *larger[:1])]


def is_valid(trial: Row, key: Key, uses: list[Use], wrong: list[Row]) -> bool:
    """Whether a tile runs and is right in every case; a wrong one is added to `wrong`."""
    try:
        right = max(use.error(key, trial) for use in uses) <= 1
    # Triton has no common class for a tile that does not compile, does not fit, or is refused by
    # the device.
    except Exception:
        if torch.cuda.is_available():
            # Raises if the trial has broken the device; then nothing more can be measured.
            torch.cuda.synchronize()
        return False
    if not right:
        wrong.append(trial)
    return right


def time_shares(
    key: Key, present: Row, trials: list[Row], uses: list[Use], device: torch.device
) -> list[float]:
    """Each trial's time over the present row's, as a geometric mean over the cases."""
    if not trials:
        return []
    shares: list[list[float]] = [[] for _ in trials]
    for use in uses:
        contenders = {
            str(number): use.contender({key: row}) for number, row in enumerate([present, *trials])
        }
        times = in_turns(contenders, device, SECONDS_A_TRIAL * len(contenders) / len(uses))
        first, *others = [t.spread(use.which).median for t in times.values()]
        for share, other in zip(shares, others, strict=True):
            share.append(other / first)
    return [statistics.geometric_mean(share) for share in shares]


# -------------------------------------------------------------------------------------------- table


def table_text(table: dict[str, dict[str, list[Row]]]) -> str:
    """JSON with one row of the table per line."""
    architectures = []
    for architecture, kernels in table.items():
        blocks = []
        for kernel, rows in sorted(kernels.items()):
            lines = ",\n".join(f"      {json.dumps(row)}" for row in rows)
            blocks.append(f"    {json.dumps(kernel)}: [\n{lines}\n    ]")
        architectures.append(f"  {json.dumps(architecture)}: {{\n" + ",\n".join(blocks) + "\n  }")
    return "{\n" + ",\n".join(architectures) + "\n}\n"


def put(table: dict[str, dict[str, list[Row]]], architecture: str, key: Key, row: Row) -> None:
    """Replace a row; a new architecture starts with a copy of the rows that it used so far."""
    rows = table.setdefault(architecture, copy.deepcopy(table[known_architecture(architecture)]))[
        key.kernel
    ]
    rows[next(i for i, old in enumerate(rows) if (old["bits"], old["size"]) == key[1:])] = row


def shown(row: Row) -> str:
    return " ".join(
        f"{name}={value}" for name, value in row.items() if name not in ("bits", "size")
    )


def tune(
    cases: list[Case],
    dtypes: list[torch.dtype],
    options: argparse.Namespace,
    device: torch.device,
    path: Path | None,
) -> int:
    """Search all rows that the cases use; returns how many present rows are wrong.

    Each row gets an equal share of the remaining time.
    """
    # Imported here, because Triton reads TRITON_INTERPRET when it is imported.
    from fastbert_kernels._triton import architecture

    here = architecture(device)
    print(f"{header_line(header(device))}, {here}", flush=True)
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    present = table.get(here) or table[known_architecture(here)]
    end = time.monotonic() + options.seconds
    if path:
        path.write_text(table_text(table), encoding="utf-8")
    searched, broken = set(), 0
    groups = [
        (dtype, name)
        for dtype in dtypes
        for name, spec in SPECS.items()
        if "triton" in spec.implementations
    ]
    for position, (dtype, operation) in enumerate(groups):
        group_end = share_of_time(end, len(groups) - position)
        uses = uses_of([case for case in cases if case.operation == operation], dtype, device)
        wanted = [key for key in uses if not options.kernels or key.kernel in options.kernels]
        for number, key in enumerate(wanted):
            if time.monotonic() > group_end:
                break
            searched.add(key)
            row = next(row for row in present[key.kernel] if (row["bits"], row["size"]) == key[1:])
            sweeps = 1 if options.check else SWEEPS
            found = search(
                key, row, uses[key], device, sweeps, share_of_time(group_end, len(wanted) - number)
            )
            print_found(key, row, found, options.check)
            broken += row in found.wrong
            if found.best != row and path:
                put(table, here, key, found.best)
                # At once, because a later trial may break the device.
                path.write_text(table_text(table), encoding="utf-8")
    rows = {
        Key(kernel, row["bits"], row["size"]) for kernel, rows in present.items() for row in rows
    }
    print(
        f"{len(searched)} of {len(rows)} rows searched; "
        "the others are not used by any case, or the time was used up"
    )
    return broken


def tune_by_model(kernels: list[str] | None, seconds: float, path: Path | None) -> None:
    """Search all rows of sm_90 in 16 bits that the model can judge.

    Rows that it replaces in the table at `path` go to `proposed_tiles.json` in the same folder.
    """
    # Imported here, because they compile, which the interpreter prevents.
    from benchmarks.machine_code import ours, search

    table = json.loads(TABLE.read_text(encoding="utf-8"))
    wanted = [
        (kernel, row)
        for kernel in kernels or ours.JUDGED
        for row in table[search.ARCHITECTURE].get(kernel, ())
        if row["bits"] == search.BITS
    ]
    end = time.monotonic() + seconds
    for number, (kernel, row) in enumerate(wanted):
        if time.monotonic() > end:
            print(
                f"time limit: {len(wanted) - number} of {len(wanted)} rows not searched", flush=True
            )
            break
        key = Key(kernel, row["bits"], row["size"])
        found = search.propose(
            kernel, row, BLOCKS.get(kernel, {}), COMMON, share_of_time(end, len(wanted) - number)
        )
        verdict = (
            f"-> {shown(found.best)}, {found.ratio:.2f} of the time by the model"
            if found.ratio < NOISE
            else "stays"
        )
        print(
            f"{key!s:34} {shown(row)} {verdict} "
            f"({found.tried} tried, {found.dropped} do not fit or spill)",
            flush=True,
        )
        if found.ratio < NOISE and path:
            put(table, search.ARCHITECTURE, key, found.best)
            path.write_text(table_text(table), encoding="utf-8")
            keep_replaced(
                path.with_name(PROPOSED.name) if path != TABLE else PROPOSED,
                search.ARCHITECTURE,
                key,
                found,
            )


def keep_replaced(path: Path, architecture: str, key: Key, found: Proposal) -> None:
    """Record the replaced row and the further rows that were found.

    Each has its predicted time over that of the row that is now in the table.
    """
    proposed = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    rows = proposed.setdefault(architecture, {}).setdefault(key.kernel, [])
    rows[:] = [row for row in rows if (row["bits"], row["size"]) != key[1:]]
    rows += [
        {**row, "predicted_ratio": round(ratio / found.ratio, 3)}
        for row, ratio in [(found.present, 1.0), *found.others]
    ]
    path.write_text(table_text(proposed), encoding="utf-8")


def share_of_time(end: float, parts: int) -> float:
    now = time.monotonic()
    return now + (end - now) / parts


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kernels", nargs="+", help="kernels of the table to search (all)")
    parser.add_argument(
        "--seconds", type=float, default=1800, help="begin no further trial after this time (1800)"
    )
    parser.add_argument(
        "--table", type=Path, help="write to this file instead of the package's own table"
    )
    parser.add_argument(
        "--check", action="store_true", help="only report how good the present table is"
    )
    parser.add_argument(
        "--model",
        action="store_true",
        help="use the model of an H100, which needs no GPU: sm_90, 16 bits",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="use the interpreter; write only to --table"
    )
    options = parser.parse_args()
    if options.model:
        from benchmarks.compiled.ahead_of_time import check_tools  # needs Triton

        check_tools()
        tune_by_model(
            options.kernels, options.seconds, None if options.check else options.table or TABLE
        )
        return 0
    if options.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"
        broken = tune(tiny_cases(), [torch.float32], options, torch.device("cpu"), options.table)
    elif not torch.cuda.is_available():
        print(
            "tune: there is no GPU; tiles must be timed on the GPU that they are for "
            "(--model predicts without one)"
        )
        return 2
    elif options.check:
        broken = tune(checked_cases(), [torch.bfloat16], options, torch.device("cuda"), None)
    else:
        broken = tune(
            training_cases(),
            [torch.bfloat16, torch.float32],
            options,
            torch.device("cuda"),
            options.table or TABLE,
        )
    return 1 if broken else 0


def print_found(key: Key, present: Row, found: Found, check: bool) -> None:
    if present in found.wrong:
        verdict = "WRONG: the present tile misses the bound"
    elif found.best == present:
        verdict = "stays"
    else:
        verdict = f"-> {shown(found.best)}, takes {found.ratio:.2f} of the time"
    if check and present not in found.wrong:
        verdict += ", within 10 %" if found.ratio >= CLOSE else ", NOT within 10 %"
    print(f"{key!s:34} {shown(present)} {verdict} ({found.tried} tried)", flush=True)
    for row in found.wrong:
        if row is not present:
            print(f"{'':34} wrong result: {shown(row)}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
