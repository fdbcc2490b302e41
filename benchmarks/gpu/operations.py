"""MLM loss, norm, GELU and embedding: present and proposed tiles, and their rivals.

The rivals are eager torch, its fused loss, and Liger-Kernel and Cut Cross-Entropy if installed.
"""

from __future__ import annotations

from typing import Any

from benchmarks.gpu import measure
from benchmarks.gpu.items import Item, Part, program
from benchmarks.gpu.place import Place
from benchmarks.kernels.cases import Case
from benchmarks.kernels.peers import peers
from benchmarks.kernels.rivals import Rival, rivals

WANTED = (  # the most important first
    "mlm_loss D=768",
    "norm D=768 p=0.1",
    "gelu F=3072",
    "embedding D=768 p=0.1",
    "norm alone D=768 p=0",
    "norm D=1024 p=0.1",
    "norm D=768 p=0",
    "embedding D=1024 p=0.1",
    "norm alone D=1024 p=0",
)


def cases(where: Place) -> list[Case]:
    by_name = where.cases()
    return [by_name[name] for name in WANTED]


def offered(case: Case, given: dict[str, Any]) -> dict[str, Rival | str]:
    return {**rivals(case, given), **peers(case, given)}


def items(part: Part) -> list[Item]:
    return measure.items(part, cases(part.place), measure.proposals_for(part), offered)


if __name__ == "__main__":
    program("operations", items)
