"""`branch_from = "RUN@STEP"`: a run that begins at a checkpoint of another run.

It gets the weights, the optimizer's moments, the counters and the position in the data. The recipe
may change what comes after, but the model, its tokenizer and the datasets so far stay.
"""

from __future__ import annotations

from collections.abc import Sequence

from fastbert.checkpoints import checkpoint
from fastbert.checkpoints.bucket import checkpoint_steps, fetch_checkpoint
from fastbert.checkpoints.checkpoint import Checkpoint
from fastbert.data.dataset import TokenDataset
from fastbert.data.phases import Position, Timetable
from fastbert.data.streams import Streams
from fastbert.errors import InputError
from fastbert.presence import is_folder
from fastbert.recipe import parse_config
from fastbert.storage import Url, answering, place
from fastbert.training.train_state import TrainState

ORIGIN = "origin"  # in the metadata of a branch's checkpoints: its `Position`


def open_parent(branch_from: str, recipe: str) -> Checkpoint:
    """Find and verify the checkpoint that a branch begins with; one in a bucket is copied first.

    Args:
        branch_from: RUN@STEP.
        recipe: the recipe's path, for messages.

    Raises:
        InputError: there is no such run, or it has no valid checkpoint of this step.
    """
    name, at, step = branch_from.rpartition("@")
    where = f"{recipe}: branch_from = {branch_from!r}"
    if not at or not name or not step.isdecimal():
        raise InputError(
            f"{where}; must be RUN@STEP, the folder of a run and the step of one of its "
            "checkpoints, such as runs/base@900000"
        )
    run = place(name)
    with answering():
        if isinstance(run, Url):
            steps = checkpoint_steps(run)
        elif is_folder(run):
            steps = checkpoint.steps(run)
        else:
            raise InputError(f"{where}: {run} is no folder; name that of a run")
    if not steps:
        raise InputError(f"{where}: {run} has no checkpoints; name the folder of a run with some")
    if int(step) not in steps:
        there = ", ".join(map(str, steps))
        raise InputError(f"{where}: {run} has no checkpoint of step {step}; it has {there}")
    if isinstance(run, Url):
        return fetch_checkpoint(run, int(step))
    return checkpoint.open_checkpoint(checkpoint.folder_of(run, int(step)))


def begin_state(found: Checkpoint) -> TrainState:
    """Return the counters that a branch begins with.

    Its held-out losses are its own, since it may evaluate on other examples.
    """
    state = TrainState.read(found.metadata.get("progress"), str(found.path))
    state.forget_best()
    return state


def position_of(found: Checkpoint, datasets: Sequence[TokenDataset]) -> Position:
    """Return where in the data another run stood at a checkpoint.

    Args:
        found: the checkpoint.
        datasets: of the branch; the first of them are those of the other run.
    """
    config = parse_config(found.metadata["recipe"], str(found.path))
    streams = Streams(datasets[: len(config.sources)], config)
    return Timetable(config, streams, origin_in(found)).position(found.step)


def origin_in(found: Checkpoint) -> Position | None:
    """Return where the run of a checkpoint began in the data; None where it is no branch."""
    values = found.metadata.get(ORIGIN)
    return Position.load(values) if values else None
