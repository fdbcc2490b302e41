"""Opens and verifies the datasets of a run or an evaluation.

Every rank opens it. One process of each machine verifies it while the others wait. A dataset in a
bucket is copied to each machine before.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from fastbert.checkpoints.model_folder import tokenizer_sha256
from fastbert.cluster.group import Group
from fastbert.data.dataset import TokenDataset, open_dataset
from fastbert.data.remote_dataset import dataset_copy, with_remote_blocks
from fastbert.data.tokenizer import load_tokenizer
from fastbert.errors import InputError
from fastbert.storage import Url, answering, place
from fastbert.training.rounds import in_rounds


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
        names = [str(place(path)) for path in paths]
        _check_distinct(datasets, names)
        check_one_tokenizer(datasets, names)
    return datasets


def _check_distinct(datasets: Sequence[TokenDataset], names: Sequence[str]) -> None:
    """Raise InputError where one dataset is there by two names, as by a link."""
    seen: dict[str, str] = {}
    for dataset, name in zip(datasets, names, strict=True):
        if (first := seen.setdefault(dataset.sha256, name)) != name:
            raise InputError(
                f"data: {name} is the same dataset as {first}; give it one larger weight"
            )


def check_one_tokenizer(datasets: Sequence[TokenDataset], names: Sequence[str]) -> None:
    """Raise InputError where two datasets were made with tokenizers that behave differently.

    Args:
        datasets: those of a run.
        names: their paths or URLs, as the user knows them.
    """
    if len(datasets) == 1:
        return
    first, *others = [
        (name, tokenizer_sha256(load_tokenizer(dataset.tokenizer_dir)), dataset.tokenizer_dir)
        for name, dataset in zip(names, datasets, strict=True)
    ]
    for name, digest, _ in others:
        if digest != first[1]:
            raise InputError(
                f"data: {name} and {first[0]} were made with different tokenizers "
                f"({digest[:12]} and {first[1][:12]}), and a run has one; prepare the text of "
                f"{name} again with --tokenizer {first[2]}"
            )


def open_verified(
    path: str | Path, group: Group | None = None, window: int | None = None
) -> TokenDataset:
    """Open and verify the dataset at `path`; every rank of the group calls it.

    Args:
        path: the dataset's folder, or its URL.
        group: the run's processes; None for a single process without a group.
        window: as in `TokenDataset.verify`.

    Raises:
        InputError: the dataset is invalid, on any machine; all ranks raise it.
        Interrupted: a signal came to any rank.
        RankLost: another rank did not respond in time.
    """
    on_all_ranks = group.raise_on_all_ranks if group else nullcontext
    if isinstance(at := place(path), Url):
        with on_all_ranks(), answering():
            copy = dataset_copy(at, window)
        in_rounds(copy, f"fetching {at}", group)
        path = copy.path
    with on_all_ranks():
        dataset = open_dataset(path, verify=False)
        if isinstance(at, Url) and dataset.blocks:
            dataset.blocks["train"] = with_remote_blocks(dataset.blocks["train"], at)
    mine = dataset.verify(window) if group is None or group.local_rank == 0 else ()
    in_rounds(mine, f"verifying {at}", group)
    return dataset
