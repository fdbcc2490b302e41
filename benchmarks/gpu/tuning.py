"""Search for better tiles near the best one so far, in the remaining time.

It changes one option at a time, as `benchmarks.kernels.tune` does.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence

import torch

from benchmarks.gpu.items import Item, Part, program
from benchmarks.gpu.measure import DTYPE
from benchmarks.gpu.proposals import winners
from benchmarks.gpu.results import read
from benchmarks.kernels.cases import Truth
from benchmarks.kernels.tune import Key, Use, asked, search, uses_of

# The case in which each kernel is timed; the most expensive kernels first.
CASES = {
    "attention_dkdv": "attention n=512 p=0.1",
    "attention_dq": "attention n=512 p=0.1",
    "attention_forward": "attention n=512 p=0.1",
    "norm_backward": "norm D=768 p=0.1",
    "mlm_loss_forward": "mlm_loss D=768",
    "mlm_loss_backward": "mlm_loss D=768",
}
SWEEPS = 2  # passes over all options; a dry run makes one


class Unjudged(Truth):
    """The truth of a dry run, which launches nothing: every result passes."""

    def share(self, values: Sequence[torch.Tensor]) -> float:
        return 0.0


def items(part: Part) -> list[Item]:
    uses = functools.cache(functools.partial(uses_in, part))
    kernels = ["norm_backward"] if part.place.dry else list(CASES)
    return [Item(kernel, functools.partial(climb, part, kernel, uses)) for kernel in kernels]


def uses_in(part: Part, name: str) -> dict[Key, list[Use]]:
    """The rows of the table that a case uses."""
    found = uses_of([part.place.cases()[name]], DTYPE, part.place.device)
    if part.place.dry:
        found = {
            key: [use._replace(truth=Unjudged(*use.truth)) for use in uses]
            for key, uses in found.items()
        }
    return found


def climb(
    part: Part, kernel: str, uses_of_case: Callable[[str], dict[Key, list[Use]]], seconds: float
) -> None:
    """Search from the best of the present and proposed tiles, changing one option at a time."""
    end = float("inf") if part.place.dry else time.monotonic() + seconds
    uses = uses_of_case(CASES[kernel])
    key = next(key for key in uses if key.kernel == kernel)
    present = asked(uses[key][0].case, uses[key][0].arguments)[key].row
    first = next(
        (winner.row for winner in winners(read(part.out)) if winner.key == key and winner.row),
        present,
    )
    found = search(key, first, uses[key], part.place.device, 1 if part.place.dry else SWEEPS, end)
    facts = {
        "first": first,
        "best": found.best,
        "ratio": found.ratio,
        "tried": found.tried,
        "wrong": found.wrong,
    }
    part.results.add(
        "tuned", kernel=kernel, bits=key.bits, size=key.size, case=CASES[kernel], **facts
    )


if __name__ == "__main__":
    program("tuning", items)
