"""Check that a launch passes all options of its row in tiles.json to the compiler.

Run it as `python -m tests.launched_options`; it prints nothing if all is well. It uses Triton's
real launcher with a driver that launches nothing, on attention in bf16 with heads of 64, forward
and backward, with dropout.
"""

from __future__ import annotations

import sys

import torch

from benchmarks.compiled.no_launch import no_launch
from benchmarks.kernels.cases import Case, arguments, call, leaves
from fastbert_kernels._tiles import tile
from fastbert_kernels.attention import kernel

ARCHITECTURE = "sm_90"
TABLES = {
    kernel._forward_kernel: "attention_forward",
    kernel._dkdv_kernel: "attention_dkdv",
    kernel._dq_kernel: "attention_dq",
}


def main() -> int:
    wrong, size = [], 64
    case = Case("attention", "", {"lengths": [300, 40], "H": 2, "K": size}, 0.1)
    with no_launch(ARCHITECTURE):
        given = arguments(case, torch.bfloat16, torch.device("cpu"))
        result = call(case, given, "triton")
        torch.autograd.grad(result, leaves(case, given), torch.zeros_like(result))
    for function, table in TABLES.items():
        (compiled,) = (
            one for cache in function.device_caches.values() for one in cache[0].values()
        )
        options = tile(table, ARCHITECTURE, torch.bfloat16, size)
        for name in ("num_warps", "num_stages", "maxnreg"):
            if options.get(name) != getattr(compiled.metadata, name):
                wrong.append(
                    f"{table}: {name} = {options.get(name)} in tiles.json, "
                    f"compiled with {getattr(compiled.metadata, name)}"
                )
    print("\n".join(wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
