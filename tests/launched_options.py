"""Whether a launch hands all options of its row in tiles.json to the compiler. `python -m tests.launched_options`; silent if it does.

By Triton's real launcher, with a driver that launches nothing: attention in bf16, forward and backward, with and without dropout.
"""

from __future__ import annotations

import sys

import torch

from benchmarks.cases import Case, arguments, call, leaves
from benchmarks.no_launch import no_launch
from fastbert_kernels._tiles import tile
from fastbert_kernels.attention import kernel

ARCHITECTURE = "sm_90"
TABLES = {
    kernel._forward_kernel: "attention_forward",
    kernel._dkdv_kernel: "attention_dkdv",
    kernel._dq_kernel: "attention_dq",
}


def main() -> int:
    wrong, sizes = [], (32, 64, 128)
    with no_launch(ARCHITECTURE):
        for size in sizes:
            for p in (0.0, 0.1):
                case = Case("attention", "", {"lengths": [300, 40], "H": 2, "K": size}, p)
                given = arguments(case, torch.bfloat16, torch.device("cpu"))
                result = call(case, given, "triton")
                torch.autograd.grad(result, leaves(case, given), torch.zeros_like(result))
    for function, table in TABLES.items():
        compiled = [one for cache in function.device_caches.values() for one in cache[0].values()]
        if len(compiled) != 2 * len(sizes):
            wrong.append(f"{table}: {len(compiled)} kernels compiled, expected {2 * len(sizes)}")
        options = [tile(table, ARCHITECTURE, torch.bfloat16, size) for size in sizes]
        names = ("num_warps", "num_stages", "maxnreg")
        asked = sorted(str([row.get(name) for name in names]) for row in options for _ in range(2))
        given_to = sorted(str([getattr(one.metadata, name) for name in names]) for one in compiled)
        if asked != given_to:
            wrong.append(f"{table}: asked for {asked}, compiled with {given_to}")
    print("\n".join(wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
