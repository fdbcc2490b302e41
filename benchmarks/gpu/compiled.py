"""torch.compile of the torch.nn.functional version, compared with our kernel.

Compiling takes up to a minute per case, so this part comes late and has few cases.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.gpu import measure
from benchmarks.gpu.items import Item, Part, program
from benchmarks.kernels.cases import Case
from benchmarks.kernels.rivals import Rival, rivals

WANTED = ("norm D=768 p=0.1", "mlm_loss D=768", "gelu F=3072")
PATIENCE_S = 120  # a cold compiler starts many processes


def items(part: Part) -> list[Item]:
    by_name = part.place.cases()

    def offered(case: Case, given: dict[str, Any]) -> dict[str, Rival | str]:
        eager = rivals(case, given)["eager"]
        if isinstance(eager, str):
            return {"torch.compile": eager}
        torch.compiler.reset()
        # A dry run compiles only the graph, without a compiler for the CPU.
        backend = "eager" if part.place.dry else "inductor"
        return {
            "torch.compile": (
                torch.compile(eager[0], fullgraph=True, dynamic=False, backend=backend),
                eager[1],
            )
        }

    return [
        item._replace(patience_s=PATIENCE_S)
        for item in measure.items(part, [by_name[name] for name in WANTED], [], offered)
    ]


if __name__ == "__main__":
    program("compiled", items)
