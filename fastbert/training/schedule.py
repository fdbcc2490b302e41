"""The learning rate as a pure function of how much of the run is done."""

from __future__ import annotations

import math

from fastbert.config import RateConfig


def factor(schedule: RateConfig, share: float) -> float:
    """The factor on the peak learning rate.

    Warm-up is linear from 0. After it, `linear` falls linearly to 0 at the end, `cosine` falls to 0
    along half a cosine wave, and `constant` stays at 1. `wsd` (warm-up, stable, decay) stays at 1
    until the last `cooldown` of the run, and then falls to 0. With the share s of the cooldown done
    it is 1 - s (`linear`) or 1 - sqrt(s) (`1-sqrt`).

    Args:
        schedule: the recipe's section.
        share: how much of the horizon is done before the next step: 0 at the start, 1 or more at
            the end. The horizon may be in steps, tokens or seconds.

    Returns:
        A number from 0 to 1.

    Source of `1-sqrt`: Hägele et al., 2024, "Scaling Laws and Compute-Optimal Training Beyond Fixed
    Training Durations", section 4.1.
    """
    share = min(max(share, 0.0), 1.0)
    if share < schedule.warmup:
        return share / schedule.warmup
    if schedule.decay == "constant":
        return 1.0
    falling = schedule.cooldown if schedule.decay == "wsd" else 1.0 - schedule.warmup
    if falling == 0.0:
        return 1.0
    left = min((1.0 - share) / falling, 1.0)
    if schedule.decay == "wsd" and schedule.cooldown_shape == "1-sqrt":
        return 1.0 - math.sqrt(1.0 - left)
    return 0.5 * (1.0 - math.cos(math.pi * left)) if schedule.decay == "cosine" else left
