"""Compile every Triton kernel for four generations of GPUs and examine the result, without a GPU.

    python -m benchmarks.compiled.ahead_of_time              print a table of the figures
    python -m benchmarks.compiled.ahead_of_time --json       print one JSON object per line
    python -m benchmarks.compiled.ahead_of_time --write      record the figures in resources.json
    python -m benchmarks.compiled.ahead_of_time --on-record  print the record without compiling
    python -m benchmarks.compiled.ahead_of_time --one-form   compile one form of each kernel

The figures are registers, spills, shared memory, concurrent programs and the width of loads.
Every kernel is compiled as training launches it (`signatures.py`), with the tiles of `tiles.json`.
The exit code is 1, with a line for each fault. A fault is a kernel that does not compile or does
not fit the device. On sm_90 it is also a spilled register, or a load of a large operand that is
narrower than 128 bits. With the Triton version of the record it is also any figure that is worse
than the recorded one. `tests/test_ahead_of_time.py` runs this program.

The sources of the figures are `cuobjdump` for registers and stack, Triton's own metadata for shared
memory, and the machine code (`nvdisasm`) for the width of loads. All these tools are in Triton's
wheel. For AMD the source is the assembly text. The record is in kernels/fastbert_kernels.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import triton
from triton import knobs

import fastbert_kernels
from benchmarks.compiled.signatures import (
    AotSignature,
    aot_signatures,
    one_form_of_each,
    short,
    source,
)
from benchmarks.harness.forked import forked
from fastbert_kernels._tiles import tile
from fastbert_kernels._triton import FUSE, INTERPRETED
from fastbert_kernels.checker.machine_code import (
    DEVICES,
    REGISTER_UNIT,
    UNTRACED,
    amd_registers,
    cuda_registers,
    load_widths,
    programs,
)

PACKAGE = Path(fastbert_kernels.__file__).parent
RECORD = PACKAGE / "resources.json"
COMMAND = "python -m benchmarks.compiled.ahead_of_time"
WIDE = 128  # bits: the widest load of sm_90; a warp then reads 512 bytes at once


@dataclasses.dataclass(frozen=True)
class Figures:
    """The figures of one kernel on one architecture."""

    name: str
    architecture: str
    kernel: str
    table: str
    dtype: str
    size: int
    wide: tuple[str, ...]  # pointers whose loads should be 128 bits wide
    error: str | None = None  # why it does not compile; the figures are then meaningless
    tile: dict[str, int] = dataclasses.field(default_factory=dict)
    registers: int = 0  # per thread
    spilled: int = 0  # bytes per thread that are in memory because registers are full
    shared: int = 0  # bytes per program
    programs: int = 0  # that run concurrently on one multiprocessor
    # Only on sm_90: bits of the narrowest load, by pointer.
    widths: dict[str, int] = dataclasses.field(default_factory=dict)
    conversions: int = 0  # `convert_layout` in the IR: mostly a round trip through shared memory
    seconds: float = 0.0  # compile time

    @property
    def recorded(self) -> dict[str, int]:
        return {key: getattr(self, key) for key in ("registers", "spilled", "shared", "programs")}


# The results of compilation.


def measure(
    name: str, signature: AotSignature, architecture: str, options: dict[str, int] | None = None
) -> Figures:
    """Compile one kernel for one architecture, with the tile of the table.

    If `options` are given, they replace that tile.
    """
    figures = Figures(
        name,
        architecture,
        signature.kernel.__name__,
        signature.table,
        short(signature),
        signature.size,
        signature.wide,
    )
    device = DEVICES[architecture]
    start = time.perf_counter()
    try:
        options = options or tile(signature.table, architecture, signature.dtype, signature.size)
        built = source(signature, options)
        compiled = triton.compile(built, target=device.target, options={**options, **FUSE})
    except Exception as error:  # of any kind; the other kernels are still compiled
        return dataclasses.replace(figures, error=f"{type(error).__name__}: {error}")
    seconds = time.perf_counter() - start

    registers, spilled = (cuda_registers if device.target.backend == "cuda" else amd_registers)(
        compiled.asm
    )
    return dataclasses.replace(
        figures,
        tile=options,
        registers=registers,
        spilled=spilled,
        shared=compiled.metadata.shared,
        programs=programs(
            device,
            registers,
            compiled.metadata.shared,
            compiled.metadata.num_warps,
            getattr(compiled.metadata, "tmem_size", 0),
        ),
        widths=load_widths(compiled.asm, built.signature) if architecture == "sm_90" else {},
        conversions=compiled.asm["ttgir"].count("ttg.convert_layout"),
        seconds=round(seconds, 3),
    )


# The faults.


def faults(found: list[Figures]) -> list[str]:
    """The faults that no kernel may have, independent of the record."""
    lines = []
    for figures in found:
        where, device = f"{figures.architecture} {figures.name}", DEVICES[figures.architecture]
        if figures.error:
            lines.append(f"{where}: does not compile: {figures.error}")
            continue
        if figures.shared > device.shared:
            lines.append(
                f"{where}: {figures.shared} bytes of shared memory; "
                f"a program may have {device.shared}"
            )
        elif not figures.programs:
            lines.append(f"{where}: not one program fits: {figures.registers} registers a thread")
        if figures.architecture != "sm_90":
            continue
        if figures.spilled:
            lines.append(
                f"{where}: {figures.spilled} bytes of spilled registers a thread; must be 0"
            )
        if figures.wide and figures.widths.get(UNTRACED, WIDE) < WIDE:
            lines.append(
                f"{where}: a load of {figures.widths[UNTRACED]} bits cannot be traced to its "
                "argument, which may be a wide one"
            )
        for pointer in figures.wide:
            bits = figures.widths.get(pointer)
            if bits is None:
                lines.append(
                    f"{where}: no load through {pointer} found, which its `Kernel` calls wide"
                )
            elif bits < WIDE:
                lines.append(
                    f"{where}: a load through {pointer} is {bits} bits wide; must be {WIDE}"
                )
    return lines


# The record.

# A figure counts as changed if it differs by more. On one machine, kernels that are compiled in
# separate processes come out the same every time. Compiled in one process they differed by up to
# 28 registers and 40 bytes, and they may differ as much on another machine.
_MARGIN = {"registers": 4 * REGISTER_UNIT, "spilled": 64, "shared": 1024, "programs": 1}


def changes(found: list[Figures], record: dict[str, Any]) -> tuple[list[str], list[str]]:
    """The figures that are worse than the record, and those that are better.

    A kernel that is missing on either side counts as worse.
    """
    worse, better = [], []
    ahead = {
        (architecture, name)
        for architecture, rows in record.items()
        if architecture in DEVICES
        for name in rows
    }
    for figures in found:
        where = f"{figures.architecture} {figures.name}"
        ahead.discard((figures.architecture, figures.name))
        row = record.get(figures.architecture, {}).get(figures.name)
        if figures.error:
            continue  # already reported as a fault
        if row is None:
            worse.append(f"{where}: not on record")
            continue
        for key, now in figures.recorded.items():
            grown = now - row[key]
            if abs(grown) > _MARGIN[key]:
                line = f"{where}: {key} {row[key]} on record, now {now} ({grown:+d})"
                (worse if (grown > 0) != (key == "programs") else better).append(line)
    worse += [
        f"{architecture} {name}: on record, but training does not launch it"
        for architecture, name in sorted(ahead)
    ]
    return worse, better


def write(found: list[Figures]) -> None:
    """Write the record with one line per kernel, so that a diff shows the changed kernels."""
    blocks = [f'  "triton": {json.dumps(triton.__version__)}']
    for architecture in DEVICES:
        rows = [
            f"    {json.dumps(f.name)}: {json.dumps(f.recorded)}"
            for f in found
            if f.architecture == architecture
        ]
        blocks.append(f'  "{architecture}": {{\n' + ",\n".join(rows) + "\n  }")
    RECORD.write_text("{\n" + ",\n".join(blocks) + "\n}\n", encoding="utf-8")


# The command.


def check_tools() -> None:
    """Raise SystemExit if the tools to compile and disassemble are missing."""
    if INTERPRETED:
        raise SystemExit("TRITON_INTERPRET is set, so nothing would be compiled; unset it")
    for tool in ("ptxas", "cuobjdump", "nvdisasm"):
        try:
            getattr(knobs.nvidia, tool)
        except RuntimeError as error:
            raise SystemExit(
                f"Triton {triton.__version__} has no working {tool}; "
                "its wheels contain it in triton/backends/nvidia/bin"
            ) from error


def compile_all(jobs: Iterable[tuple]) -> list[Figures]:
    """Call `measure` with each of these arguments, with an empty cache."""
    check_tools()
    with tempfile.TemporaryDirectory() as cache, knobs.cache.scope():
        knobs.cache.dir = cache
        return list(forked(measure, jobs))


def table(found: list[Figures]) -> str:
    """The table as text, with a block for each architecture.

    The column "loads" has the bits of the narrowest load among those that should be wide.
    """
    head = (
        f"{'registers':>9} {'spilled':>7} {'shared':>7} {'programs':>8} {'loads':>5} "
        f"{'conversions':>11} {'compiled':>8}  tile"
    )
    lines = []
    for architecture in DEVICES:
        mine = [f for f in found if f.architecture == architecture]
        width = max((len(f.name) for f in mine), default=0)
        lines += [f"{architecture:{width}} {head}"]
        for f in mine:
            loads = min(
                (f.widths[pointer] for pointer in f.wide if pointer in f.widths), default=""
            )
            row = (
                f"{f.registers:9} {f.spilled:7} {f.shared / 1024:4.0f} KB {f.programs:8} "
                f"{loads:>5} {f.conversions:11} {f.seconds:6.2f} s  "
            )
            row += " ".join(f"{key}={value}" for key, value in f.tile.items())
            lines.append(f"{f.name:{width}} {' does not compile' if f.error else row}")
        lines.append("")
    return "\n".join(lines)


def recorded_table(record: dict[str, Any]) -> str:
    """The same for the recorded figures."""
    lines = [
        f"Triton {record['triton']}; shared memory in KB; concurrent programs on a multiprocessor",
        "",
    ]
    for architecture in DEVICES:
        rows = record.get(architecture, {})
        width = max(map(len, rows), default=0)
        lines.append(
            f"{architecture:{width}} {'registers':>9} {'spilled':>7} {'shared':>7} {'programs':>8}"
        )
        lines += [
            f"{name:{width}} {r['registers']:9} {r['spilled']:7} "
            f"{r['shared'] / 1024:4.0f} KB {r['programs']:8}"
            for name, r in rows.items()
        ]
        lines.append("")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Compile every Triton kernel and examine the result; needs no GPU."
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object per line")
    parser.add_argument("--write", action="store_true", help=f"record the figures in {RECORD.name}")
    parser.add_argument(
        "--on-record", action="store_true", help="print the record without compiling"
    )
    parser.add_argument(
        "--architecture",
        nargs="+",
        choices=list(DEVICES),
        default=list(DEVICES),
        help="the architectures to compile for (all)",
    )
    parser.add_argument(
        "--one-form",
        action="store_true",
        help="only one form of each kernel: in bf16, with all tensors and with dropout",
    )
    arguments = parser.parse_args()
    if arguments.write and (arguments.one_form or len(arguments.architecture) < len(DEVICES)):
        parser.error("--write records everything; leave out --architecture and --one-form")
    if arguments.on_record:
        print(recorded_table(json.loads(RECORD.read_text(encoding="utf-8"))))
        return 0

    signatures = aot_signatures()
    if arguments.one_form:
        signatures = one_form_of_each(signatures)
    found = compile_all(
        (name, signature, device)
        for name, signature in signatures.items()
        for device in arguments.architecture
    )
    print(
        "\n".join(json.dumps(dataclasses.asdict(figures)) for figures in found)
        if arguments.json
        else table(found)
    )

    wrong, hints = faults(found), []
    if arguments.write and not wrong:
        write(found)
    record: dict[str, Any] = (
        json.loads(RECORD.read_text(encoding="utf-8"))
        if RECORD.exists()
        else {"triton": triton.__version__}
    )
    left_out = set(DEVICES) - set(arguments.architecture)
    record = {name: rows for name, rows in record.items() if name not in left_out}
    if arguments.one_form:
        for architecture in record.keys() & DEVICES.keys():
            rows = record[architecture]
            record[architecture] = {name: rows[name] for name in rows if name in signatures}
    if record["triton"] == triton.__version__:
        worse, hints = changes(found, record)
        wrong += worse
        if worse or hints:
            hints.append(f"To record these figures, run {COMMAND} --write")
    else:
        hints.append(
            f"{RECORD.name} has figures of Triton {record['triton']}, and this is "
            f"{triton.__version__}, so they are not compared"
        )
    for line in [*(f"FAULT {line}" for line in wrong), *hints]:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
