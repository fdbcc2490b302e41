"""Run one case, forward and backward, for a profiler.

    python -m benchmarks.gpu.launches "attention n=512 p=0.1"

A first round warms up. Only the calls between cudaProfilerStart and cudaProfilerStop are profiled.
"""

from __future__ import annotations

import sys

import torch
import torch.cuda.profiler

from benchmarks.gpu.measure import DTYPE
from benchmarks.harness import children
from benchmarks.kernels.cases import TOKENS, Case, arguments, call, leaves, production, upstream_of


def find(name: str, tokens: int = TOKENS) -> Case:
    return next(case for case in production(tokens) if str(case) == name)


def main() -> int:
    children.end_with_parent()
    case, device = find(sys.argv[1]), torch.device("cuda")
    given = arguments(case, DTYPE, device)
    upstream = upstream_of(call(case, given, "triton"))
    for profiled in (False, True):
        if profiled:
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
        result = call(case, given, "triton")
        torch.autograd.grad(result, leaves(case, given), upstream)
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
