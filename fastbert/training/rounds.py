"""Long work that every rank does for itself, in rounds in which the ranks meet.

It may take longer than the ranks wait for each other, so they meet four times within that time. A
rank that is stuck in its work keeps the others waiting, and the watchdog names it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Iterable
from contextlib import nullcontext

from fastbert.cluster.group import Group
from fastbert.storage import answering
from fastbert.terminal import tell

LINE_EVERY_S = 5.0  # between progress lines; most work is done before the first


def in_rounds(work: Iterable[tuple[int, int]], what: str, group: Group | None) -> None:
    """Iterate over this rank's work while the others do theirs; every rank calls it.

    Args:
        work: yields (bytes done, bytes in all) often; empty on a rank that has none.
        what: for the line on the progress, and for the watchdog, such as "verifying data/my".
        group: the run's processes; None for a single process without a group.

    Raises:
        Exception: what the work raised, on any rank, by Group.raise_on_all_ranks.
        Interrupted: a signal came to any rank.
        RankLost: another rank did not respond in time.
    """
    on_all_ranks, heed = (
        (group.raise_on_all_ranks, group.heed) if group else (nullcontext, lambda: None)
    )
    round_s = group.timeout_s / 4 if group else math.inf
    said, more, steps = time.monotonic(), True, iter(work)
    try:
        while more:
            if group:
                group.tick(what)
            more, end = False, time.monotonic() + round_s
            with on_all_ranks(), answering():
                heed()
                for done, total in steps:
                    heed()
                    now = time.monotonic()
                    if now > said + LINE_EVERY_S and (group is None or group.is_main):
                        said = now
                        tell(f"{what}: {done / max(total, 1):.0%} of {total / 1e9:,.1f} GB")
                    if now > end:
                        more = True
                        break
            if group:
                more = any(group.gather(more))
    finally:
        if isinstance(steps, Generator):
            steps.close()
