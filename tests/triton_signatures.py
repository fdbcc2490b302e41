"""`python -m tests.triton_signatures` compares recorded signatures with Triton's own.

Before Triton compiles, it tells its `jit_cache_hook` for which types, constants and alignments.
Prints how many kernels it was asked for and how many are recorded, then those on one side only.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from triton import knobs

from benchmarks.compiled.no_launch import no_launch
from benchmarks.compiled.signatures import aot_signatures, launch, source, training_calls
from fastbert_kernels._tiles import tile


def described(function: Any, types: Any, constants: Any, attributes: Any) -> str:
    """Return one line for the signature of a kernel, independent of the order of arguments."""
    aligned = sorted(
        index for index, found in attributes.items() if ["tt.divisibility", 16] in found
    )
    named = {str(key): str(value) for key, value in constants.items()}
    return (
        f"{function.__module__}.{function.__name__} {dict(types)} {sorted(named.items())} {aligned}"
    )


def asked_of_triton() -> set[str]:
    found = set()

    def hook(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        found.add(
            described(
                fn.jit_function.fn,
                compile["signature"],
                compile["constants"],
                compile["configs"][0],
            )
        )
        return True  # do not compile

    knobs.runtime.jit_cache_hook = hook
    with no_launch("sm_90"):
        for case, dtype in itertools.product(training_calls(), (torch.bfloat16, torch.float32)):
            launch(case, dtype)
    return found


def recorded() -> set[str]:
    found = set()
    for one in aot_signatures().values():
        built = source(one, tile(one.table, "sm_90", one.dtype, one.size))
        found.add(described(built.fn.fn, built.signature, built.constants, built.attrs))
    return found


def main() -> None:
    triton, ours = asked_of_triton(), recorded()
    print(len(triton), len(ours))
    for line in sorted(triton ^ ours):
        print("Triton alone:" if line in triton else "recorded alone:", line)


if __name__ == "__main__":
    main()
