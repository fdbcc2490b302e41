"""Opens and verifies the dataset of a run or an evaluation.

Every rank opens it. One process of each machine verifies it while the others wait.
"""

from __future__ import annotations

import math
import time
from contextlib import closing, nullcontext
from pathlib import Path

from fastbert.cluster.group import Group
from fastbert.data.dataset import TokenDataset, open_dataset
from fastbert.terminal import tell

LINE_EVERY_S = 5.0  # between progress lines; most datasets are verified before the first


def open_verified(
    path: str | Path, group: Group | None = None, window: int | None = None
) -> TokenDataset:
    """Open and verify the dataset at `path`; every rank of the group calls it.

    Args:
        path: the dataset's folder.
        group: the run's processes; None for a single process without a group.
        window: as in `TokenDataset.verify`.

    Raises:
        InputError: the dataset is invalid, on any machine; all ranks raise it.
        Interrupted: a signal came to any rank.
        RankLost: another rank did not respond in time.
    """
    on_all_ranks, heed = (
        (group.raise_on_all_ranks, group.heed) if group else (nullcontext, lambda: None)
    )
    with on_all_ranks():
        dataset = open_dataset(path, verify=False)
    # Verifying may take longer than the ranks wait for each other. So they meet four times within
    # that time.
    round_s = group.timeout_s / 4 if group else math.inf
    said, more = time.monotonic(), True
    with closing(dataset.verify(window)) as work:
        while more:
            more, end = False, time.monotonic() + round_s
            with on_all_ranks():
                heed()
                for done, total in work if group is None or group.local_rank == 0 else ():
                    heed()
                    now = time.monotonic()
                    if now > said + LINE_EVERY_S and (group is None or group.is_main):
                        said = now
                        tell(f"verifying {path}: {done / total:.0%} of {total / 1e9:,.1f} GB")
                    if now > end:
                        more = True
                        break
            if group:
                more = any(group.gather(more))
                group.tick("verifying the dataset")
    return dataset
