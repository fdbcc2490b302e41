"""What a compiled kernel needs of a GPU: registers, spills, shared memory, and the width of loads.

Registers and stack come from `cuobjdump`, loads from the machine code (`nvdisasm`); both tools are
in Triton's wheel. For AMD the source is the assembly text.
"""

# pyright: basic
# Triton has no types.

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import defaultdict
from typing import Any, NamedTuple

from triton import knobs
from triton.backends.compiler import GPUTarget


class Device(NamedTuple):
    """The resources of one multiprocessor, which limit its concurrent programs.

    Memory is in bytes.
    """

    target: GPUTarget
    shared: int  # shared memory that one program may have
    shared_total: int
    reserved: int  # shared memory that the driver reserves of the total for each program
    granule: int  # shared memory is allocated in multiples of this
    warps: int  # per scheduler


# CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; AMD CDNA3
# instruction set, section 3.
DEVICES = {
    "sm_80": Device(GPUTarget("cuda", 80, 32), 163 << 10, 164 << 10, 1024, 128, 16),
    "sm_90": Device(GPUTarget("cuda", 90, 32), 227 << 10, 228 << 10, 1024, 128, 16),
    "sm_100": Device(GPUTarget("cuda", 100, 32), 227 << 10, 228 << 10, 1024, 128, 16),
    "gfx942": Device(GPUTarget("hip", "gfx942", 64), 64 << 10, 64 << 10, 0, 512, 8),
}
SCHEDULERS = 4  # per multiprocessor, on all devices
REGISTERS = 512  # per scheduler and lane of a warp, on all devices
REGISTER_UNIT = 8  # registers of a thread are allocated in multiples of this
TENSOR_COLUMNS = 512  # columns of Blackwell's tensor memory
MOST_PROGRAMS = 32


def programs(device: Device, registers: int, shared: int, warps: int, tensor_columns: int) -> int:
    """How many programs with these needs run concurrently on one multiprocessor."""
    given = max(-(-registers // REGISTER_UNIT), 1) * REGISTER_UNIT
    by_registers = SCHEDULERS * min(device.warps, REGISTERS // given) // warps
    by_shared = device.shared_total // max(
        -(-shared // device.granule) * device.granule + device.reserved, 1
    )
    by_tensor_memory = TENSOR_COLUMNS // max(tensor_columns, 1)
    return min(by_registers, by_shared, by_tensor_memory, MOST_PROGRAMS)


def cuda_registers(asm: dict[str, Any]) -> tuple[int, int]:
    """Registers and bytes of stack per thread.

    A Triton kernel uses its stack only for spilled registers.
    """
    usage = disassemble("cuobjdump", "--dump-resource-usage", cubin=asm["cubin"])
    return number(r"\bREG:(\d+)", usage), number(r"\bSTACK:(\d+)", usage)


def amd_registers(asm: dict[str, Any]) -> tuple[int, int]:
    """The same from AMD's assembly text, including accumulation registers, which share the file."""
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


# The width of loads. The machine code contains it, but not the argument that an address comes from,
# because registers are reused. It does contain the PTX line of every instruction, and in PTX each
# value has its own register.

UNTRACED = "an unknown argument"
_INSTRUCTION = re.compile(r"\s*(?:@!?%p\d+\s+)?([\w.:]+)\s+(.+);")
_REGISTER = re.compile(r"%rd?\d+")
_ADDRESS = re.compile(r".*\[ *(%rd\d+)")  # the last one; cp.async names its target before it
_PARAMETER = re.compile(r"(%rd\d+), \[\w+_param_(\d+)\]")
_SASS_LINE = re.compile(r'\.nv_debug_ptx_txt", line (\d+)')
_SASS_LOAD = re.compile(r"\bLDG(?:STS)?(\.[\w.]+)? ")
_SASS_BITS = re.compile(r"[SU]?(8|16|32|64|128|256)")


def load_widths(asm: dict[str, Any], signature: dict[str, str]) -> dict[str, int]:
    """For each pointer with loads from global memory, the bits of the narrowest load."""
    # Triton adds its own scratch memory after these.
    arguments = [key for key, value in signature.items() if value != "constexpr"]
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


_AMD_LOAD = re.compile(r"\b(?:global|buffer|flat)_load_(?:lds_)?[us]?(byte|short|dword)(?:x(\d))?")
_AMD_BITS = {"byte": 8, "short": 16, "dword": 32}


def amd_load_widths(asm: dict[str, Any]) -> dict[str, int]:
    """The bits of the narrowest load from global memory; which argument it reads is not traced."""
    loads = _AMD_LOAD.findall(asm["amdgcn"])
    widths = [_AMD_BITS[kind] * int(times or 1) for kind, times in loads]
    return {UNTRACED: min(widths)} if widths else {}


def global_loads(ptx: str) -> dict[int, set[int]]:
    """By line number of each load from global memory: the arguments that its address depends on.

    Loaded values end the trace: a row of a table is read through the table, not through the
    indices. Arguments are numbered.
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
