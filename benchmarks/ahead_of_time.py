"""What the compilers make of every Triton kernel, for four generations of GPUs; no GPU is needed.

    python -m benchmarks.ahead_of_time            a table of registers, spills, shared memory, programs side by side, width of loads
    python -m benchmarks.ahead_of_time --json     the same, one JSON object a line
    python -m benchmarks.ahead_of_time --write    puts the figures on record, in kernels/fastbert_kernels/resources.json
    python -m benchmarks.ahead_of_time --on-record    shows those, and compiles nothing

Compiles all that the `production()` of each `kernel.py` lists, with the tiles of `tiles.json`, and ends with 1 and a line for each
fault: a kernel that does not compile or does not fit the device; on sm_90, a spilled register or a load of a big operand that is
narrower than 128 bits; and, with the Triton version that made the record, any figure that has become worse than the one on record.
`tests/test_ahead_of_time.py` runs it.

Where the figures come from: registers and stack from `cuobjdump`, shared memory from Triton's own metadata, the width of
loads from the machine code (`nvdisasm`), all in Triton's wheel; for AMD from the assembly text.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import re
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import fastbert_kernels
from benchmarks.forked import forked
from fastbert_kernels._tiles import tile
from fastbert_kernels._triton import FUSE, INTERPRETED, Production

PACKAGE = Path(fastbert_kernels.__file__).parent
RECORD = PACKAGE / "resources.json"
COMMAND = "python -m benchmarks.ahead_of_time"
WIDE = 128  # bits: the widest load of sm_90; a warp then reads 512 bytes at once


class Device(NamedTuple):
    """What one multiprocessor offers, for how many programs run on it side by side; memory in bytes."""

    target: GPUTarget
    shared: int  # shared memory that one program may have
    shared_total: int
    reserved: int  # by the driver, of the total, for each program
    granule: int  # shared memory is given out in multiples of it
    warps: int  # on each scheduler


# CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; AMD CDNA3 instruction set, section 3.
DEVICES = {
    "sm_80": Device(GPUTarget("cuda", 80, 32), 163 << 10, 164 << 10, 1024, 128, 16),
    "sm_90": Device(GPUTarget("cuda", 90, 32), 227 << 10, 228 << 10, 1024, 128, 16),
    "sm_100": Device(GPUTarget("cuda", 100, 32), 227 << 10, 228 << 10, 1024, 128, 16),
    "gfx942": Device(GPUTarget("hip", "gfx942", 64), 64 << 10, 64 << 10, 0, 512, 8),
}
SCHEDULERS = 4  # of a multiprocessor, on all of them
REGISTERS = 512  # of a scheduler for each lane of a warp, on all of them
REGISTER_UNIT = 8  # registers a thread are given out in multiples of it
TENSOR_COLUMNS = 512  # of Blackwell's tensor memory
MOST_PROGRAMS = 32


@dataclasses.dataclass(frozen=True)
class Figures:
    """One kernel on one architecture."""

    name: str
    architecture: str
    kernel: str
    table: str
    dtype: str
    size: int
    wide: tuple[str, ...]  # pointers whose loads should be 128 bits wide
    error: str | None = None  # why it does not compile; the figures then mean nothing
    tile: dict[str, int] = dataclasses.field(default_factory=dict)
    registers: int = 0  # a thread
    spilled: int = 0  # bytes a thread that live in memory for want of registers
    shared: int = 0  # bytes a program
    programs: int = 0  # that one multiprocessor runs side by side
    widths: dict[str, int] = dataclasses.field(
        default_factory=dict
    )  # sm_90: bits of the narrowest load, by pointer
    conversions: int = 0  # `convert_layout` in the IR: mostly a way through shared memory and back
    seconds: float = 0.0  # to compile

    @property
    def recorded(self) -> dict[str, int]:
        return {key: getattr(self, key) for key in ("registers", "spilled", "shared", "programs")}


# What is compiled


def production_kernels() -> dict[str, Production]:
    """All that the `kernel.py` files list, each under a name of its own: operation, function, dtype, size, and what else tells it apart, of tensors
    which are missing."""
    alike = defaultdict(list)
    for path in sorted(PACKAGE.glob("*/kernel.py")):
        module = importlib.import_module(f"fastbert_kernels.{path.parent.name}.kernel")
        for production in module.production():
            alike[
                f"{path.parent.name}.{production.kernel.__name__} {short(production)} {production.size}"
            ].append(production)

    named = {}
    for name, productions in alike.items():
        telling = [
            key
            for key in productions[0].arguments
            if len({str(p.arguments[key]) for p in productions}) > 1
        ]
        for production in productions:
            told = {
                key: production.arguments[key]
                for key in telling
                if not str(production.arguments[key]).startswith("*")
            }
            full = " ".join([name, *(f"{key}={value}" for key, value in told.items())])
            if full in named:
                raise ValueError(f"production() lists {full} twice")
            named[full] = production
    return named


def short(production: Production) -> str:
    """ "bf16", "fp32"."""
    return (
        str(production.dtype).removeprefix("torch.").replace("bfloat", "bf").replace("float", "fp")
    )


def source(production: Production, options: dict[str, Any]) -> ASTSource:
    """The kernel with its types, its compile-time values (its own and those of the tile) and the multiples of 16 it may count on."""
    given = production.arguments | {
        key: value for key, value in options.items() if key in production.kernel.arg_names
    }
    signature, constexprs, divisible = {}, {}, {}
    for index, parameter in enumerate(production.kernel.params):
        value = given.pop(parameter.name)
        if parameter.is_constexpr or not isinstance(value, str):
            signature[parameter.name], constexprs[parameter.name] = "constexpr", value
            continue
        signature[parameter.name] = value
        if parameter.name in production.aligned and parameter.do_not_specialize:
            raise ValueError(
                f"aligned names {parameter.name}, which the kernel does not specialise: a launch would not know"
            )
        if value.startswith("*") or parameter.name in production.aligned:
            divisible[(index,)] = [["tt.divisibility", 16]]
    if given:
        raise ValueError(f"the kernel has no argument {', '.join(given)}")
    return ASTSource(production.kernel, signature, constexprs, divisible)


# What comes of it


def measure(
    name: str, production: Production, architecture: str, options: dict[str, int] | None = None
) -> Figures:
    """Compiles one kernel for one architecture, with the tile of the table or with `options` in its place."""
    figures = Figures(
        name,
        architecture,
        production.kernel.__name__,
        production.table,
        short(production),
        production.size,
        production.wide,
    )
    device = DEVICES[architecture]
    start = time.perf_counter()
    try:
        options = options or tile(production.table, architecture, production.dtype, production.size)
        built = source(production, options)
        compiled = triton.compile(built, target=device.target, options={**options, **FUSE})
    except Exception as error:  # of any kind: the other kernels are still worth a line
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


def programs(device: Device, registers: int, shared: int, warps: int, tensor_columns: int) -> int:
    """How many programs of these needs one multiprocessor runs side by side."""
    given = max(-(-registers // REGISTER_UNIT), 1) * REGISTER_UNIT
    by_registers = SCHEDULERS * min(device.warps, REGISTERS // given) // warps
    by_shared = device.shared_total // max(
        -(-shared // device.granule) * device.granule + device.reserved, 1
    )
    by_tensor_memory = TENSOR_COLUMNS // max(tensor_columns, 1)
    return min(by_registers, by_shared, by_tensor_memory, MOST_PROGRAMS)


def cuda_registers(asm: dict[str, Any]) -> tuple[int, int]:
    """Registers and bytes of stack a thread. Spilled registers are all that a Triton kernel puts on its stack."""
    usage = disassemble("cuobjdump", "--dump-resource-usage", cubin=asm["cubin"])
    return number(r"\bREG:(\d+)", usage), number(r"\bSTACK:(\d+)", usage)


def amd_registers(asm: dict[str, Any]) -> tuple[int, int]:
    """The same of AMD's assembly text; the accumulation registers share the file and are counted."""
    text = asm["amdgcn"]
    return number(r"\.vgpr_count: +(\d+)", text), number(
        r"\.private_segment_fixed_size: +(\d+)", text
    )


def number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if not found:
        raise ValueError(f"the compiler's output has no {pattern}")
    return int(found[1])


def disassemble(tool: str, *flags: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [getattr(knobs.nvidia, tool).path, *flags, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


# The width of loads. The machine code tells it, but not which argument an address comes from, as registers are reused.
# It tells of every instruction, though, on which line of the PTX it was written; and there each value has a register of its own.

UNTRACED = "an unknown argument"
_INSTRUCTION = re.compile(r"\s*(?:@!?%p\d+\s+)?([\w.:]+)\s+(.+);")
_REGISTER = re.compile(r"%rd?\d+")
_ADDRESS = re.compile(r".*\[ *(%rd\d+)")  # the last one: cp.async names where it writes before
_PARAMETER = re.compile(r"(%rd\d+), \[\w+_param_(\d+)\]")
_SASS_LINE = re.compile(r'\.nv_debug_ptx_txt", line (\d+)')
_SASS_LOAD = re.compile(r"\bLDG(?:STS)?(\.[\w.]+)? ")
_SASS_BITS = re.compile(r"[SU]?(8|16|32|64|128|256)")


def load_widths(asm: dict[str, Any], signature: dict[str, str]) -> dict[str, int]:
    """Bits of the narrowest load from global memory through each pointer that is loaded through."""
    arguments = [
        key for key, value in signature.items() if value != "constexpr"
    ]  # Triton adds its own scratch memory behind them
    loads = global_loads(asm["ptx"])
    widths = {}
    line = 0
    for text in disassemble(
        "nvdisasm", "--print-code", "--print-line-info-ptx", cubin=asm["cubin"]
    ).splitlines():
        if found := _SASS_LINE.search(text):
            line = int(found[1])
        elif found := _SASS_LOAD.search(text):
            suffixes = [_SASS_BITS.fullmatch(suffix) for suffix in (found[1] or "").split(".")]
            bits = next((int(suffix[1]) for suffix in suffixes if suffix), 32)
            names = [arguments[index] for index in loads.get(line, ()) if index < len(arguments)]
            for name in [name for name in names if signature[name].startswith("*")] or [UNTRACED]:
                widths[name] = min(widths.get(name, bits), bits)
    return widths


def global_loads(ptx: str) -> dict[int, set[int]]:
    """Number of the line of each load from global memory, and of the arguments that its address is computed from.

    What is loaded ends the trail: a row of a table is read through the table, not through the indices.
    """
    origins, parameters, addresses = defaultdict(set), {}, {}
    for number, line in enumerate(ptx.splitlines(), 1):
        instruction = _INSTRUCTION.match(line)
        if not instruction:
            continue
        opcode, operands = instruction.groups()
        if opcode.startswith("ld.param"):
            if found := _PARAMETER.match(operands):
                parameters[found[1]] = int(found[2])
        elif opcode.startswith(("ld.global", "cp.async")):
            if found := _ADDRESS.match(operands):
                addresses[number] = found[1]
        elif not opcode.startswith(("ld.", "st.", "atom.", "red.")):
            written, read = (
                operands.split("}", 1) if operands.startswith("{") else operands.partition(",")[::2]
            )
            for register in _REGISTER.findall(written):
                origins[register].update(_REGISTER.findall(read))

    def arguments(register: str) -> set[int]:
        seen, ahead = set(), [register]
        while ahead:
            if (register := ahead.pop()) not in seen:
                seen.add(register)
                ahead.extend(origins[register])
        return {parameters[register] for register in seen & parameters.keys()}

    return {number: arguments(register) for number, register in addresses.items()}


# What is wrong with it


def faults(found: list[Figures]) -> list[str]:
    """What no kernel may do, whatever is on record."""
    lines = []
    for figures in found:
        where, device = f"{figures.architecture} {figures.name}", DEVICES[figures.architecture]
        if figures.error:
            lines.append(f"{where}: does not compile: {figures.error}")
            continue
        if figures.shared > device.shared:
            lines.append(
                f"{where}: {figures.shared} bytes of shared memory; a program may have {device.shared}"
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
                f"{where}: a load of {figures.widths[UNTRACED]} bits cannot be traced to its argument, which may be a wide one"
            )
        for pointer in figures.wide:
            bits = figures.widths.get(pointer)
            if bits is None:
                lines.append(
                    f"{where}: no load through {pointer} found, which production() calls wide"
                )
            elif bits < WIDE:
                lines.append(
                    f"{where}: a load through {pointer} is {bits} bits wide; must be {WIDE}"
                )
    return lines


# What is on record

# Beyond it a figure counts as changed. Compiled in processes of their own kernels came out the same every time, on one machine; side by
# side in one process they differed by up to 28 registers and 40 bytes, and may do so on another machine.
_MARGIN = {"registers": 4 * REGISTER_UNIT, "spilled": 64, "shared": 1024, "programs": 1}


def changes(found: list[Figures], record: dict[str, Any]) -> tuple[list[str], list[str]]:
    """What has become worse than the record, and what better; a kernel missing on either side is worse."""
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
            continue  # a fault already
        if row is None:
            worse.append(f"{where}: not on record")
            continue
        for key, now in figures.recorded.items():
            grown = now - row[key]
            if abs(grown) > _MARGIN[key]:
                line = f"{where}: {key} {row[key]} on record, now {now} ({grown:+d})"
                (worse if (grown > 0) != (key == "programs") else better).append(line)
    worse += [
        f"{architecture} {name}: on record, but no production() lists it"
        for architecture, name in sorted(ahead)
    ]
    return worse, better


def write(found: list[Figures]) -> None:
    """A line for each kernel, so that a change shows as a change of its line."""
    blocks = [f'  "triton": {json.dumps(triton.__version__)}']
    for architecture in DEVICES:
        rows = [
            f"    {json.dumps(f.name)}: {json.dumps(f.recorded)}"
            for f in found
            if f.architecture == architecture
        ]
        blocks.append(f'  "{architecture}": {{\n' + ",\n".join(rows) + "\n  }")
    RECORD.write_text("{\n" + ",\n".join(blocks) + "\n}\n", encoding="utf-8")


# The command


def check_tools() -> None:
    """Ends the program with a line where nothing can be compiled or disassembled."""
    if INTERPRETED:
        raise SystemExit("TRITON_INTERPRET is set, under which nothing is compiled: unset it")
    for tool in ("ptxas", "cuobjdump", "nvdisasm"):
        try:
            getattr(knobs.nvidia, tool)
        except RuntimeError as error:
            message = f"Triton {triton.__version__} has no working {tool}; its wheels carry it in triton/backends/nvidia/bin"
            raise SystemExit(message) from error


def compile_all(jobs: Iterable[tuple]) -> list[Figures]:
    """`measure` for each of these lists of its arguments, compiled afresh."""
    check_tools()
    with tempfile.TemporaryDirectory() as cache, knobs.cache.scope():
        knobs.cache.dir = cache
        return list(forked(measure, jobs))


def table(found: list[Figures]) -> str:
    """For people: a block for each architecture; loads: the narrowest in bits among those that should be wide."""
    head = f"{'registers':>9} {'spilled':>7} {'shared':>7} {'programs':>8} {'loads':>5} {'conversions':>11} {'compiled':>8}  tile"
    lines = []
    for architecture in DEVICES:
        mine = [f for f in found if f.architecture == architecture]
        width = max((len(f.name) for f in mine), default=0)
        lines += [f"{architecture:{width}} {head}"]
        for f in mine:
            loads = min(
                (f.widths[pointer] for pointer in f.wide if pointer in f.widths), default=""
            )
            row = f"{f.registers:9} {f.spilled:7} {f.shared / 1024:4.0f} KB {f.programs:8} {loads:>5} {f.conversions:11} {f.seconds:6.2f} s  "
            row += " ".join(f"{key}={value}" for key, value in f.tile.items())
            lines.append(f"{f.name:{width}} {' does not compile' if f.error else row}")
        lines.append("")
    return "\n".join(lines)


def recorded_table(record: dict[str, Any]) -> str:
    """As `table`, of what is on record."""
    lines = [
        f"Triton {record['triton']}; shared memory in KB; programs side by side on a multiprocessor",
        "",
    ]
    for architecture in DEVICES:
        rows = record.get(architecture, {})
        width = max(map(len, rows), default=0)
        lines.append(
            f"{architecture:{width}} {'registers':>9} {'spilled':>7} {'shared':>7} {'programs':>8}"
        )
        lines += [
            f"{name:{width}} {r['registers']:9} {r['spilled']:7} {r['shared'] / 1024:4.0f} KB {r['programs']:8}"
            for name, r in rows.items()
        ]
        lines.append("")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description="What the compilers make of every Triton kernel; needs no GPU."
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")
    parser.add_argument(
        "--write", action="store_true", help=f"put the figures on record, in {RECORD.name}"
    )
    parser.add_argument(
        "--on-record", action="store_true", help="show what is there, and compile nothing"
    )
    arguments = parser.parse_args()
    if arguments.on_record:
        print(recorded_table(json.loads(RECORD.read_text(encoding="utf-8"))))
        return 0

    found = compile_all(
        (name, production, device)
        for name, production in production_kernels().items()
        for device in DEVICES
    )
    print(
        "\n".join(json.dumps(dataclasses.asdict(figures)) for figures in found)
        if arguments.json
        else table(found)
    )

    wrong, hints = faults(found), []
    if arguments.write and not wrong:
        write(found)
    record = (
        json.loads(RECORD.read_text(encoding="utf-8"))
        if RECORD.exists()
        else {"triton": triton.__version__}
    )
    if record["triton"] == triton.__version__:
        worse, hints = changes(found, record)
        wrong += worse
        if worse or hints:
            hints.append(f"To put these figures on record: {COMMAND} --write")
    else:
        hints.append(
            f"{RECORD.name} holds figures of Triton {record['triton']}, this is {triton.__version__}: not compared"
        )
    for line in [*(f"FAULT {line}" for line in wrong), *hints]:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
