"""The learning rate as a pure function of how much of the run is done."""

from __future__ import annotations

import math

from fastbert.config import ScheduleConfig


def factor(schedule: ScheduleConfig, share: float) -> float:
    """What the peak learning rate is multiplied with.

    Warm-up is linear from 0; then `linear` falls to 0 at the end, `cosine` does so along half a wave, `constant` stays, and `wsd` (warm-up, stable, decay)
    stays until the last `cooldown` of the run, which is linear to 0.

    Args:
        schedule: the recipe's section.
        share: of the horizon, before the step that is about to be made: 0 at the start, 1 (or more) at the end. It may
            count steps, tokens or seconds.

    Returns:
        A number from 0 to 1.
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
    return 0.5 * (1.0 - math.cos(math.pi * left)) if schedule.decay == "cosine" else left
