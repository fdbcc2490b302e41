"""Check that the decoded machine code of our kernels keeps the rules of the hardware.

Run it as `python -m tests.decoded_kernels`; it prints nothing if all is well.

The hardware does not check these rules. An instruction that reads a register too early gets the old
value. So in the code that ptxas has written

- the stall counts between an fp32 operation and the first instruction that reads its result add up
  to at least its latency of four cycles,
- a barrier that an instruction waits for has been set by an earlier instruction.

If a field is decoded from the wrong bits, the code breaks these rules at once.
"""

from __future__ import annotations

import re
import sys

from benchmarks.machine_code import ours
from benchmarks.machine_code.decode import NO_BARRIER, Code
from benchmarks.machine_code.examine import DEVICE, build
from benchmarks.machine_code.path import loops
from fastbert_kernels._triton import FUSE
from fastbert_kernels.checker.machine_code import disassemble

FP32 = ("FADD", "FMUL", "FFMA")
LATENCY = 4
KERNELS = ["gelu._backward_kernel bf16 3072", "attention._forward_kernel bf16 64 DROPOUT=False"]


def faults(code: Code) -> list[str]:
    found = []
    ends = {at for at in range(len(code.instructions)) if code.target(at) is not None} | set(
        code.labels.values()
    )
    checked = 0
    for at, one in enumerate(code.instructions):
        written = re.match(r"(R\d+)\b", one.operands)
        if one.base not in FP32 or one.predicate or not written:
            continue
        cycles = one.stall
        for later in range(at + 1, len(code.instructions)):
            if later in ends or cycles >= LATENCY:
                break
            operands = code.instructions[later].operands
            if re.search(rf"\b{written[1]}\b", operands.partition(",")[2]):
                found.append(f"{operands} reads {written[1]} {cycles} cycles after it was written")
            cycles += code.instructions[later].stall
        checked += 1
    if not checked:
        found.append("no fp32 operation found")
    set_before: set[int] = set()
    for one in code.instructions:
        waited = {barrier for barrier in range(6) if one.waits >> barrier & 1}
        if not waited <= set_before:
            found.append(
                f"{one.opcode} {one.operands} waits for barriers that nobody has set: "
                f"{waited - set_before}"
            )
        set_before |= {one.write_barrier, one.read_barrier} - {NO_BARRIER}
    return found


def main() -> int:
    wrong = []
    for name, (production, options) in ours.kernels(KERNELS).items():
        import triton

        case = ours.case(name, production, options)
        compiled = triton.compile(case.source, target=DEVICE.target, options={**options, **FUSE})
        text = disassemble("nvdisasm", "--print-code", "-hex", cubin=compiled.asm["cubin"])
        code = build(case).code
        addresses = [
            int(address, 16)
            for address in re.findall(r"^\s+/\*([0-9a-f]{4})\*/", text, re.MULTILINE)
        ]
        if [one.address for one in code.instructions] != addresses:
            wrong.append(
                f"{name}: {len(code.instructions)} of {len(addresses)} instructions decoded"
            )
        if not loops(code):
            wrong.append(f"{name}: no loop found")
        wrong += [f"{name}: {fault}" for fault in faults(code)]
    print("\n".join(wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
