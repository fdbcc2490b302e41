"""The dataset of a run or an evaluation: opened by every rank, and verified by one process of each machine while the others wait."""

from __future__ import annotations

import math
import sys
import time
from contextlib import closing, nullcontext
from pathlib import Path

from fastbert.cluster.group import Group
from fastbert.data.dataset import TokenDataset, open_dataset

LINE_EVERY_S = 5.0  # most datasets are verified within that time, without a word


def open_verified(path: str | Path, group: Group | None = None) -> TokenDataset:
    """Open the dataset at `path`; every rank of the group calls it.

    Raises:
        InputError: what is wrong with it, on any machine: then on all ranks.
        Interrupted: a signal came meanwhile, to any rank.
        RankLost: another rank did not come along.
    """
    fate, heed = (group.raise_on_all_ranks, group.heed) if group else (nullcontext, lambda: None)
    with fate():
        dataset = open_dataset(path, verify=False)
    # It may take longer than the ranks are willing to wait for each other, so they meet every now and then.
    round_s = group.timeout_s / 4 if group else math.inf
    said, more = time.monotonic(), True
    with closing(dataset.verify()) as work:
        while more:
            more, end = False, time.monotonic() + round_s
            with fate():
                heed()
                for done, total in work if group is None or group.local_rank == 0 else ():
                    heed()
                    now = time.monotonic()
                    if now > said + LINE_EVERY_S and (group is None or group.is_main):
                        said = now
                        print(
                            f"verifying {path}: {done / total:.0%} of {total / 1e9:,.1f} GB",
                            file=sys.stderr,
                        )
                    if now > end:
                        more = True
                        break
            if group:
                more = any(group.gather(more))
                group.tick("verifying the dataset")
    return dataset
