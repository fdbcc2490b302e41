"""Where a part runs: on this machine's GPU, or in a dry run on a CPU.

In a dry run, the driver compiles every kernel and launches none.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch

from benchmarks.harness.machine import PEAKS, Peak, device_name, peak_of
from benchmarks.kernels.cases import TOKENS, VOCABULARY, Case, production

DRY_ARCHITECTURE = "sm_90"
DRY_PEAK = PEAKS["NVIDIA H100 80GB HBM3"]
# Small, but with the same kernels: a kernel is specialised by whether 16 divides its sizes, in the
# first slab of the vocabulary and in the last.
DRY_TOKENS, DRY_VOCABULARY = 512, 5000


class Place(NamedTuple):
    device: torch.device
    dry: bool
    architecture: str  # "sm_90", as in tiles.json

    @property
    def tokens(self) -> int:
        """Tokens of the pack on which an operation is checked and timed."""
        return DRY_TOKENS if self.dry else TOKENS

    @property
    def vocabulary(self) -> int:
        return DRY_VOCABULARY if self.dry else VOCABULARY

    def cases(self) -> dict[str, Case]:
        """The cases of the benchmarks by name, on packs of this size."""
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
        """Wait for all launches; raises if this process can no longer use the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@contextlib.contextmanager
def place(dry: bool) -> Iterator[Place]:
    """A context in which `impl="triton"` accepts tensors of the device.

    In a dry run its results are undefined.

    Raises:
        RuntimeError: there is no GPU, and this is not a dry run.
    """
    if dry:
        from benchmarks.compiled.no_launch import no_launch

        with no_launch(DRY_ARCHITECTURE):
            yield Place(torch.device("cpu"), True, DRY_ARCHITECTURE)
        return
    from fastbert_kernels._triton import architecture

    device = torch.device("cuda")
    yield Place(device, False, architecture(device))
