"""Opens and verifies the datasets of a run or an evaluation.

Every rank opens it. One process of each machine verifies it while the others wait.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import closing, nullcontext
from pathlib import Path

from fastbert.checkpoints.model_folder import tokenizer_sha256
from fastbert.cluster.group import Group
from fastbert.data.dataset import TokenDataset, open_dataset
from fastbert.data.tokenizer import load_tokenizer
from fastbert.errors import InputError
from fastbert.terminal import tell

LINE_EVERY_S = 5.0  # between progress lines; most datasets are verified before the first


def open_sources(
    paths: Sequence[str], group: Group | None = None, window: int | None = None
) -> tuple[TokenDataset, ...]:
    """Open and verify the datasets of a run; every rank of the group calls it.

    Args:
        paths: of the datasets.
        group, window: as in `open_verified`.

    Raises:
        InputError: as `open_verified`; or they were not made with one tokenizer.
        Interrupted, RankLost: as `open_verified`.
    """
    datasets = tuple(open_verified(path, group, window) for path in paths)
    with group.raise_on_all_ranks() if group else nullcontext():
        check_one_tokenizer(datasets)
    return datasets


def check_one_tokenizer(datasets: Sequence[TokenDataset]) -> None:
    """Raise InputError where two datasets were made with tokenizers that behave differently."""
    if len(datasets) == 1:
        return
    first, *others = [
        (dataset, tokenizer_sha256(load_tokenizer(dataset.tokenizer_dir))) for dataset in datasets
    ]
    for dataset, digest in others:
        if digest != first[1]:
            raise InputError(
                f"data: {dataset.path} and {first[0].path} were made with different tokenizers "
                f"({digest[:12]} and {first[1][:12]}), and a run has one; prepare the text of "
                f"{dataset.path} again with --tokenizer {first[0].tokenizer_dir}"
            )


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
