"""Do the kernels train the same model? Loss curves in bf16 with equal weights and masks.

The text is made up, with word frequencies that follow Zipf's law. A model of four layers trains for
100 steps, with and without dropout: on the reference in fp32, on the reference in bf16, and on the
kernels in bf16. The loss must fall. The mean distance over the steps between the kernels' curve and
the fp32 curve must be at most three times that of the reference in bf16. Both differ from fp32 by
rounding; the kernels round in a few more places (the attention weights are bf16 before they are
multiplied with the values).
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Sequence

import torch

from benchmarks.gpu.items import Item, Part, program
from benchmarks.gpu.results import Line
from benchmarks.step.made_up_training import Sizes, made_up_batch, model_config, ours
from fastbert.data.packing import PackedBatch

# Sequence lengths on both sides of 128, where attention switches kernels.
SIZES, DRY_SIZES = Sizes("mini", 8192, 4096, 256), Sizes("tiny", 200, 256, 32)
STEPS, DRY_STEPS = 100, 12
AT_ONCE = 10  # steps whose losses are written together
FALL = 0.97  # maximum of the last tenth of a curve over its first tenth
NOISE = 3  # maximum distance from the fp32 curve: the kernels' over that of the reference in bf16
EXACT, PLAIN, OURS = "reference, fp32", "reference", "triton"


def items(part: Part) -> list[Item]:
    return [
        Item(f"dropout {dropout:g}", functools.partial(train, part, dropout))
        for dropout in (0.0, 0.1)
    ]


def train(part: Part, dropout: float, seconds: float) -> None:
    """Three runs with the same number of steps.

    The first is the slowest; it stops after a third of the time.
    """
    where = part.place
    sizes, steps = (DRY_SIZES, DRY_STEPS) if where.dry else (SIZES, STEPS)
    batches = [made_up_batch(sizes, seed, where.device) for seed in range(steps)]
    exact = curve(
        part,
        EXACT,
        dropout,
        sizes,
        torch.float32,
        batches,
        float("inf") if where.dry else seconds / 3,
    )
    plain, kernels = (
        curve(part, name, dropout, sizes, torch.bfloat16, batches[: len(exact)])
        for name in (PLAIN, OURS)
    )
    near, far = distance(kernels, exact), distance(plain, exact)
    right = falls(kernels) and near <= NOISE * far
    facts = {
        "dropout_p": dropout,
        "steps": len(kernels),
        "falls": falls(kernels),
        "distance": near,
        "distance_of_reference": far,
    }
    part.results.add(
        "curves agree", **facts, first=kernels[0], last=kernels[-1], verdict=part.verdict(right)
    )


def curve(
    part: Part,
    name: str,
    dropout: float,
    sizes: Sizes,
    dtype: torch.dtype,
    batches: Sequence[PackedBatch],
    seconds: float = float("inf"),
) -> list[float]:
    """The losses of a step on each batch, until `seconds` have passed after the first step.

    The first step loads and compiles, so it is not counted.
    """
    impl = "triton" if name == OURS else "reference"
    trainer = ours(
        model_config(sizes.preset, dropout), sizes.vocab_size, impl, part.place.device, dtype
    )
    losses: list[float] = []
    end = float("inf")
    for batch in batches:
        if time.monotonic() > end:
            break
        losses.append(float(trainer.step(batch)))
        end = min(end, time.monotonic() + seconds)
        if len(losses) % AT_ONCE == 0:
            write(part, name, dropout, losses, len(losses) - AT_ONCE)
    if rest := len(losses) % AT_ONCE:
        write(part, name, dropout, losses, len(losses) - rest)
    return losses


def write(part: Part, name: str, dropout: float, losses: list[float], first: int) -> None:
    part.results.add(
        "curve", implementation=name, dropout_p=dropout, first_step=first, losses=losses[first:]
    )


def distance(curve: Sequence[float], exact: Sequence[float]) -> float:
    """The mean over the steps, in nats."""
    return statistics.mean(abs(a - b) for a, b in zip(curve, exact, strict=True))


def falls(curve: Sequence[float]) -> bool:
    tenth = max(1, len(curve) // 10)
    return statistics.mean(curve[-tenth:]) < FALL * statistics.mean(curve[:tenth])


def joined(lines: Sequence[Line]) -> dict[tuple[float, str], list[float]]:
    """Curves by dropout and implementation, from the lines that this part has written."""
    found: dict[tuple[float, str], list[float]] = {}
    for line in lines:
        if line["what"] == "curve":
            found.setdefault((line["dropout_p"], line["implementation"]), []).extend(
                map(float, line["losses"])
            )
    return found


if __name__ == "__main__":
    program("curves", items)
