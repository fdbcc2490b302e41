"""Opens and verifies the dataset of a run or an evaluation.

Every rank opens it. One process of each machine verifies it while the others wait. A dataset in a
bucket is copied to each machine before.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

from fastbert.cluster.group import Group
from fastbert.data.dataset import TokenDataset, open_dataset
from fastbert.data.remote_dataset import dataset_copy
from fastbert.storage import Url, place
from fastbert.training.rounds import answering, in_rounds


def open_verified(path: str | Path, group: Group | None = None) -> TokenDataset:
    """Open and verify the dataset at `path`; every rank of the group calls it.

    Args:
        path: the dataset's folder, or its URL.
        group: the run's processes; None for a single process without a group.

    Raises:
        InputError: the dataset is invalid, on any machine; all ranks raise it.
        Interrupted: a signal came to any rank.
        RankLost: another rank did not respond in time.
    """
    on_all_ranks = group.raise_on_all_ranks if group else nullcontext
    if isinstance(at := place(path), Url):
        with on_all_ranks(), answering():
            copy = dataset_copy(at)
        in_rounds(copy, f"fetching {at}", group)
        path = copy.path
    with on_all_ranks():
        dataset = open_dataset(path, verify=False)
    mine = dataset.verify() if group is None or group.local_rank == 0 else ()
    in_rounds(mine, f"verifying {at}", group)
    return dataset
