"""Attention at the lengths of training, compared with torch's and FlashAttention's.

The rivals are torch's SDPA (with FlashAttention and with cuDNN), its varlen attention, and
FlashAttention if it is installed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu import measure
from benchmarks.gpu.items import Item, Part, program
from benchmarks.gpu.place import Place
from benchmarks.gpu.proposals import Proposal
from benchmarks.kernels.cases import Case
from benchmarks.kernels.peers import peers
from benchmarks.kernels.rivals import Rival, rivals

LENGTHS, DRY_LENGTHS = (512, 128, 2048, 4096), (512, 128)  # the most important first
HEAD_SIZE, HIDDEN_SIZE = 64, 768
BACKENDS = {"SDPA flash": SDPBackend.FLASH_ATTENTION, "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION}


def cases(where: Place, proposals: Sequence[Proposal] = ()) -> list[Case]:
    """Each length with and without dropout; other head sizes if a tile is proposed for them."""

    def case(n: int, size: int, p: float) -> Case:
        label = f"n={n}" if size == HEAD_SIZE else f"n={n} K={size}"
        return Case(
            "attention",
            label,
            {"lengths": [n] * (where.tokens // n), "H": HIDDEN_SIZE // size, "K": size},
            p,
        )

    asked_for = {
        proposal.key.size for proposal in proposals if proposal.key.kernel.startswith("attention")
    }
    lengths = DRY_LENGTHS if where.dry else LENGTHS
    return [case(n, HEAD_SIZE, p) for n in lengths for p in (0.1, 0.0)] + [
        case(n, size, 0.1) for size in (32, 128) if size in asked_for for n in lengths[:2]
    ]


def offered(case: Case, given: dict[str, Any]) -> dict[str, Rival | str]:
    """The rivals without the eager one, which takes too long at these lengths."""
    by_torch = rivals(case, given)
    sdpa = by_torch["SDPA"]
    assert not isinstance(sdpa, str)
    forward, leaves = sdpa
    chosen: Mapping[str, Rival | str] = {
        name: (by(backend, forward), leaves) for name, backend in BACKENDS.items()
    }
    return {**chosen, "varlen_attn": by_torch["varlen_attn"], **peers(case, given)}


def by(backend: SDPBackend, forward: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Use this backend for the forward pass; the backward pass then uses it too."""

    def run() -> Tensor:
        with sdpa_kernel(backend):
            return forward()

    return run


def items(part: Part) -> list[Item]:
    proposals = measure.proposals_for(part)
    return measure.items(part, cases(part.place, proposals), proposals, offered)


if __name__ == "__main__":
    program("attention", items)
