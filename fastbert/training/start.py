"""Where a run begins: in an empty folder, at its newest valid checkpoint, or at another run's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fastbert.checkpoints import checkpoint
from fastbert.checkpoints.bucket import Attempt, Bucket, RunCopy
from fastbert.checkpoints.checkpoint import Checkpoint
from fastbert.checkpoints.ownership import CLAIM, RunLock
from fastbert.cluster.group import Group
from fastbert.config import RunConfig
from fastbert.data.dataset import TokenDataset
from fastbert.errors import InputError
from fastbert.presence import is_folder, names_in, status, unreadable
from fastbert.storage import Url, answering
from fastbert.training.branch import open_parent
from fastbert.training.metrics import read_metrics
from fastbert.training.rounds import in_rounds
from fastbert.training.same_run import check_same_run

DISK = "lost+found"  # a new disk contains this folder


@dataclass(frozen=True)
class Start:
    """Where a run begins.

    Attributes:
        run: the run folder on this machine, which may be written to.
        checkpoint: the checkpoint to resume from; None for a start from the beginning.
        branches: the checkpoint is that of another run, from which this one branches off.
        notes: lines for the user, for example on damaged checkpoints that were skipped.
        bucket: where the run is; None where `run` is the run folder itself.
    """

    run: Path
    checkpoint: Checkpoint | None
    notes: list[str] = field(default_factory=list)
    branches: bool = False
    bucket: Bucket | None = None

    @property
    def place(self) -> str:
        """The run folder as the user knows it."""
        return str(self.bucket.url if self.bucket else self.run)

    def close(self) -> None:
        """Remove what this process needs of a run in a bucket while it runs."""
        if self.bucket is not None:
            self.bucket.close()

    def dump(self) -> dict[str, Any]:
        """Convert to JSON, for the other ranks."""
        found = self.checkpoint
        return {
            "run": str(self.run),
            "checkpoint": found
            and {"path": str(found.path), "step": found.step, "metadata": found.metadata},
            "notes": self.notes,
            "branches": self.branches,
        }

    @staticmethod
    def load(values: dict[str, Any]) -> Start:
        """Convert back from JSON."""
        found = values["checkpoint"]
        return Start(
            Path(values["run"]),
            found and Checkpoint(Path(found["path"]), found["step"], found["metadata"]),
            values["notes"],
            values["branches"],
        )


def open_bucket_run(
    config: RunConfig, recipe: str, datasets: Sequence[TokenDataset], resume: bool, group: Group
) -> Start:
    """Find where a run in a bucket begins; every rank calls it, and it changes no run.

    Each machine gets a copy of the checkpoint. Arguments and errors as `open_run`.
    """
    place = f"{recipe}: run = {config.run!r}"
    with group.raise_on_all_ranks(), answering():
        bucket = Bucket(Url(config.run))
    try:
        return _open_bucket_run(config, recipe, datasets, resume, group, bucket, place)
    except BaseException:
        bucket.close()
        raise


def _open_bucket_run(
    config: RunConfig,
    recipe: str,
    datasets: Sequence[TokenDataset],
    resume: bool,
    group: Group,
    bucket: Bucket,
    place: str,
) -> Start:
    candidates: dict[Attempt, dict[str, int]] = {}
    with group.raise_on_all_ranks(), answering():
        if group.is_main:
            try:
                bucket.check_folder()
            except InputError as error:
                raise InputError(f"{place}: {error}") from None
            candidates = bucket.checkpoints()
            if candidates and not resume:
                raise _resume_is_missing(place)
            bucket.read_records()
            if not candidates:
                _check_nothing_is_lost(bucket.work, place, resume)
    complaints: list[str] = []
    while group.broadcast(bool(candidates)):
        copy = None
        with group.raise_on_all_ranks(), answering():
            attempt, manifest = None, None
            if group.is_main:
                attempt = next(iter(candidates))
                manifest = bucket.read_manifest(attempt, candidates.pop(attempt))
        name, valid = group.broadcast(
            [attempt.name, not isinstance(manifest, str)] if attempt else None
        )
        at = f"{bucket.url}/checkpoints/{name}"
        if not valid:
            complaints.append(f"{at}: damaged: {manifest}")
            continue
        with group.raise_on_all_ranks(), answering():
            attempt = Attempt.of(name)
            assert attempt is not None
            if not group.is_main:
                manifest = bucket.read_manifest(attempt, bucket.attempts()[attempt])
            if isinstance(manifest, str):
                raise InputError(f"{at}: damaged: {manifest}")
            assert manifest is not None
            copy = RunCopy(bucket.url, attempt, manifest, with_tokenizer=False)
        in_rounds(copy, f"fetching {at}", group)
        problems = [problem for problem in group.gather(copy.problem) if problem]
        if problems:
            complaints.append(f"{at}: damaged: {problems[0]}")
            continue
        notes = [*complaints, f"resuming from {at}, the newest valid one"] if complaints else []
        with group.raise_on_all_ranks():
            if group.is_main:
                notes += check_same_run(config, recipe, datasets, copy.checkpoint)
        return Start(bucket.work, copy.checkpoint, notes, bucket=bucket)
    complaints = group.broadcast(complaints)
    if complaints:
        raise _none_is_valid(complaints)
    with group.raise_on_all_ranks():  # there may be no common disk, so every rank opens the parent
        start = _begin(config, recipe, datasets, resume, bucket.work)
    return replace(start, bucket=bucket)


def _begin(
    config: RunConfig, recipe: str, datasets: Sequence[TokenDataset], resume: bool, run: Path
) -> Start:
    """Where a run begins that has no checkpoint of its own."""
    start = config.branch_from or "the beginning"
    where = f"{config.run}: no checkpoint to resume from; starting from {start}"
    notes = [where] if resume else []
    if config.branch_from is None:
        return Start(run, None, notes)
    parent = open_parent(config.branch_from, recipe)
    notes += check_same_run(config, recipe, datasets, parent, branches=True)
    return Start(run, parent, notes, branches=True)


def open_run(
    config: RunConfig, recipe: str, datasets: Sequence[TokenDataset], resume: bool
) -> Start:
    """Find where to begin; it writes nothing.

    Args:
        config: the recipe.
        recipe: its path, for messages.
        datasets: those of the run.
        resume: --resume was given.

    Raises:
        InputError: the folder is not a run; or a run is there and --resume was not given; or its
            checkpoints are gone, unreadable or all damaged; or the recipe or the dataset is not the
            checkpoint's.
    """
    run, place = Path(config.run), f"{recipe}: run = {config.run!r}"
    _check_folder(run, place)
    if not checkpoint.exists(run):
        _check_nothing_is_lost(run, place, resume)
        return _begin(config, recipe, datasets, resume, run)
    if not resume:
        raise _resume_is_missing(place)
    found, notes = checkpoint.newest_valid(run)
    if found is None:
        raise _none_is_valid(notes)
    if notes:
        notes = [*notes, f"resuming from {found.place}, the newest valid one"]
    return Start(run, found, [*notes, *check_same_run(config, recipe, datasets, found)])


def _resume_is_missing(place: str) -> InputError:
    return InputError(
        f"{place}: holds a run with checkpoints; "
        "resume with --resume, or give another folder by run=..."
    )


def _none_is_valid(complaints: list[str]) -> InputError:
    return InputError(
        f"{complaints[0]}; no valid checkpoint is left there; "
        "give another folder by run=... to start a new run"
    )


def _check_folder(run: Path, place: str) -> None:
    """Check that the folder is new or empty, or already is a run.

    Raises:
        InputError: it is something else.
    """
    try:
        if status(run) is None:
            return
        if not is_folder(run):
            raise InputError("a file; give a folder")
        # A start that died before it had claimed the folder leaves CLAIM... there. checkpoints/ and
        # the folder itself may be disks of their own.
        others = [
            name
            for name in names_in(run)
            if not name.startswith(CLAIM) and name not in (DISK, "checkpoints")
        ]
        others += [f"checkpoints/{name}" for name in names_in(run / "checkpoints") if name != DISK]
        if others and not RunLock.was_claimed(run) and not checkpoint.has_written(run):
            more = f" and {len(others) - 3} more" if len(others) > 3 else ""
            raise InputError(
                f"holds {', '.join(others[:3])}{more}, and is no run; "
                "give a new or an empty folder by run=..."
            )
    except InputError as error:
        raise InputError(f"{place}: {error}") from None


def _check_nothing_is_lost(run: Path, place: str, resume: bool) -> None:
    """Check that a start from the beginning would delete no records that are still of use.

    Raises:
        InputError: the records are of a run whose checkpoints are elsewhere, or that is still
            running.
    """
    step, saved, metrics = 0, None, run / "metrics.jsonl"
    try:
        for record in read_metrics(metrics):
            step = max(step, record["step"])
            # The events "save" and "resume" name a checkpoint.
            if isinstance(record.get("checkpoint"), str):
                saved = record["checkpoint"]
    except OSError as error:
        raise InputError(f"{place}: {unreadable(metrics, error)}") from None
    if saved is not None:
        raise InputError(
            f"{place}: metrics.jsonl has {step:,} steps and a checkpoint {saved}, but "
            f"{run / 'checkpoints'} holds none; mount its disk or put the checkpoints back, and "
            "resume with --resume; or give another folder by run=... to start a new run"
        )
    if step and not resume:
        raise InputError(
            f"{place}: holds a run of {step:,} steps without a checkpoint, which may be going on; "
            "if it has ended, --resume starts it from the beginning; "
            "or give another folder by run=..."
        )
