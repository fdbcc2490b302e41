"""Where a part runs: on the GPU of this machine, or dry, on a CPU, with a driver that compiles every kernel and launches none."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch

from benchmarks.cases import TOKENS, VOCABULARY, Case, production
from benchmarks.machine import PEAKS, Peak, device_name, peak_of

DRY_ARCHITECTURE = "sm_90"
DRY_PEAK = PEAKS["NVIDIA H100 80GB HBM3"]
# Small, and yet the same kernels: sizes are compiled in by whether 16 divides them, in the first slab of the vocabulary and in the last.
DRY_TOKENS, DRY_VOCABULARY = 512, 5000


class Place(NamedTuple):
    device: torch.device
    dry: bool
    architecture: str  # "sm_90", as in tiles.json

    @property
    def tokens(self) -> int:
        """Of the pack that an operation is checked and timed on."""
        return DRY_TOKENS if self.dry else TOKENS

    @property
    def vocabulary(self) -> int:
        return DRY_VOCABULARY if self.dry else VOCABULARY

    def cases(self) -> dict[str, Case]:
        """Those of the benchmarks by name, on packs of so many tokens."""
        found = {str(case): case for case in production(self.tokens)}
        return {
            name: case._replace(
                shape=case.shape | ({"V": self.vocabulary} if "V" in case.shape else {})
            )
            for name, case in found.items()
        }

    @property
    def name(self) -> str:
        return device_name(self.device)

    def peak(self) -> Peak:
        return DRY_PEAK if self.dry else peak_of(self.device)

    def wait(self) -> None:
        """For all that was launched. Raises where the device can no longer be used by this process."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@contextlib.contextmanager
def place(dry: bool) -> Iterator[Place]:
    """Inside, `impl="triton"` works on tensors of the device; dry, what it returns is whatever was in memory.

    Raises:
        RuntimeError: there is no GPU, and this is no dry run.
    """
    if dry:
        from benchmarks.no_launch import no_launch

        with no_launch(DRY_ARCHITECTURE):
            yield Place(torch.device("cpu"), True, DRY_ARCHITECTURE)
        return
    from fastbert_kernels._triton import architecture

    device = torch.device("cuda")
    yield Place(device, False, architecture(device))
