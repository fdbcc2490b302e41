"""Whether a recipe and its datasets are those of a checkpoint, so that a run may begin there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastbert.checkpoints import checkpoint
from fastbert.checkpoints.checkpoint import WEIGHT, Checkpoint
from fastbert.checkpoints.weight_names import check_layers, shapes
from fastbert.config import RunConfig, by_key
from fastbert.data.dataset import TokenDataset
from fastbert.data.mixture import quotas
from fastbert.errors import InputError
from fastbert.recipe import parse_config
from fastbert.training.optimizer import slots
from fastbert.training.train_state import TrainState

# Keys that may differ between a checkpoint and the recipe that resumes it: where files are, when
# the run ends, what it reports and how it is executed. The keys of NOTED may differ too, since they
# change no example and no shape, but the change is reported. Any other change would make the second
# half another experiment than the first.
FREE = (
    "data",
    "run",
    "branch_from",
    "model.preset",
    "stop",
    "evaluate",
    "checkpoint",
    "log",
    "runtime",
    "batch.micro_batch_tokens",
)
NOTED = (
    "optimizer.lr",
    "optimizer.betas",
    "optimizer.eps",
    "optimizer.weight_decay",
    "optimizer.max_grad_norm",
    "schedule",
)
# What a branch of another run may change beside these: what its later examples are.
BRANCH_NOTED = (
    "weights",
    "phase",
    "objective.mask_rate",
    "batch.max_length",
    "batch.sequences",
)
BRANCH_FREE = ("init",)


def check_same_run(
    config: RunConfig,
    recipe: str,
    datasets: Sequence[TokenDataset],
    found: Checkpoint,
    branches: bool = False,
) -> list[str]:
    """Check that the recipe and the datasets are those of the checkpoint.

    A branch may change more, and may add datasets at the end of the list.

    Returns:
        A line on each change that is allowed but matters.

    Raises:
        InputError: they are not.
    """
    text = found.metadata.get("recipe")
    if not isinstance(text, str):
        raise InputError(f"{found.place}: no recipe in its metadata; take another checkpoint")
    TrainState.read(found.metadata.get("progress"), str(found.place))
    before = by_key(parse_config(text, str(found.place)))
    now = by_key(config)
    free = (*FREE, *BRANCH_FREE) if branches else FREE
    keys = dict.fromkeys([*now, *before])
    changed = [key for key in keys if not _same(key, now.get(key), before.get(key))]
    changed = [key for key in changed if not _among(key, free)]
    # A dataset that fits one window has the same order whatever the window.
    windows = now["order.window"], before["order.window"]
    if all(dataset.windows(window) == 1 for dataset in datasets for window in windows):
        changed = [key for key in changed if key != "order.window"]
    for key in changed:
        other = "start another run by run=..."
        if not branches and _among(key, BRANCH_NOTED):
            other += ", which may begin here with --branch-from"
        if not _among(key, (*NOTED, *BRANCH_NOTED) if branches else NOTED):
            raise InputError(
                f"{recipe}: {key} = {now.get(key)!r}, but the checkpoint {found.place} "
                f"was trained with {before.get(key)!r}; set it back, or {other}"
            )
    _check_datasets(config, recipe, datasets, found, branches)
    _check_tensors(config, datasets[0], found)
    return [
        f"changed since the checkpoint: {key} was {before.get(key)!r}, now {now.get(key)!r}"
        for key in changed
    ]


def _check_datasets(
    config: RunConfig,
    recipe: str,
    datasets: Sequence[TokenDataset],
    found: Checkpoint,
    branches: bool,
) -> None:
    """Check that the datasets are those of the checkpoint, in their order.

    Raises:
        InputError: one is another one, or missing, or new in a run that is no branch.
    """
    before: Any = found.metadata.get("dataset_sha256")
    digests: list[str] = before if isinstance(before, list) else [before]
    for i, digest in enumerate(digests):
        if i == len(datasets):
            raise InputError(
                f"{recipe}: data has {len(datasets)} of the {len(digests)} sources that "
                f"{found.place} was trained on; list all of them in the same order, "
                "with weights of 0 for those that are used up"
            )
        if datasets[i].sha256 != digest:
            given = f"data = {config.shown_data!r}"
            if len(digests) > 1:
                given = f"data {i + 1} = {config.sources[i].path!r}"
            raise InputError(
                f"{recipe}: {given}: not the dataset that {found.place} was trained on; "
                "give that one, or start another run by run=..."
            )
    if len(datasets) > len(digests) and not branches:
        raise InputError(
            f"{recipe}: data has {len(datasets)} sources, and {found.place} was trained on "
            f"{len(digests)}; give those, or start another run by run=... with --branch-from"
        )


def _check_tensors(config: RunConfig, dataset: TokenDataset, found: Checkpoint) -> None:
    """Check that the checkpoint holds each weight, and each slot of the optimizer, in its shape.

    Raises:
        InputError: it does not.
    """
    tensors = checkpoint.read_all(found.path)
    check_layers(config.model.num_hidden_layers, len(tensors.get(WEIGHT, ())), str(found.place))
    wanted = {WEIGHT: shapes(config.model, dataset.vocab_size)}
    for name, shape in wanted[WEIGHT].items():
        for slot in slots(config.optimizer, name, shape):
            wanted.setdefault(slot, {})[name] = shape
    for slot, named in wanted.items():
        there = tensors[slot].shapes() if slot in tensors else {}
        if wrong := sorted(name for name in {*named, *there} if there.get(name) != named.get(name)):
            raise InputError(
                f"{found.place}: {slot}/{wrong[0]} is missing or does not have the shape that the "
                "recipe gives; take another checkpoint"
            )


def _same(key: str, now: Any, before: Any) -> bool:
    """Whether two values mean the same: weights of 8 and 2 are the shares 0.8 and 0.2."""
    weights = key.rpartition(".")[2] == "weights"
    if weights and isinstance(now, tuple) and isinstance(before, tuple):
        return len(now) == len(before) and quotas(now) == quotas(before)
    return now == before


def _among(key: str, places: tuple[str, ...]) -> bool:
    """Whether one of the places is the key itself or its section."""
    return key in places or key.partition(".")[0] in places
