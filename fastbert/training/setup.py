"""Where a run begins: an empty folder, or the newest sound checkpoint of one that was there; and all that it needs, checked."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import stat
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastbert.checkpoints import checkpoint
from fastbert.checkpoints.checkpoint import Checkpoint
from fastbert.checkpoints.model_folder import ModelParts
from fastbert.checkpoints.ownership import CLAIM, RunLock
from fastbert.cluster.group import Group
from fastbert.config import DEEPSPEED, RunConfig, dump_config, load_config, parse_config
from fastbert.data.batches import Batches, PackedBatch, heldout_batches
from fastbert.data.dataset import OTHER_FILES, TokenDataset
from fastbert.durable import write_whole
from fastbert.errors import InputError
from fastbert.models.bert import BertForPreTraining
from fastbert.presence import is_file, is_folder, names_in, status, unreadable
from fastbert.training.ds_config import DeepSpeedSettings, read_ds_config
from fastbert.training.engine import check_settings
from fastbert.training.graphs import check_cuda_graphs
from fastbert.training.initial import open_initial, put, with_sizes
from fastbert.training.metrics import read_metrics
from fastbert.training.precision import resolve_precision
from fastbert.training.train_state import StopCriteria, TrainState
from fastbert.training.verified_dataset import open_verified

# What may differ between a checkpoint and the recipe that goes on from it: where things lie, when it ends, what it reports and how it is
# run. A learning rate or a schedule may be changed too: it changes no example and no shape, and is noted. Anything else would make the
# second half another experiment than the first.
FREE = (
    "data",
    "run",
    "model.preset",
    "stop",
    "evaluate",
    "checkpoint",
    "runtime",
    "batch.micro_batch_tokens",
)
DISK = "lost+found"  # what a new disk holds
SHARED_DISK_S = 20.0  # how long another machine's disk may take to show a new file
NOTED = (
    "optimizer.lr",
    "optimizer.betas",
    "optimizer.eps",
    "optimizer.weight_decay",
    "optimizer.max_grad_norm",
    "schedule",
)


@dataclass(frozen=True)
class Start:
    """A run folder that is ready to be written to.

    Attributes:
        run: the folder.
        checkpoint: what to resume from; None for a start from the beginning.
        notes: lines for the user, such as damaged checkpoints that were passed over.
    """

    run: Path
    checkpoint: Checkpoint | None
    notes: list[str] = field(default_factory=list)

    def dump(self) -> dict[str, Any]:
        """As JSON, for the other ranks."""
        found = self.checkpoint
        return {
            "run": str(self.run),
            "checkpoint": found
            and {"path": str(found.path), "step": found.step, "metadata": found.metadata},
            "notes": self.notes,
        }

    @staticmethod
    def load(values: dict[str, Any]) -> Start:
        found = values["checkpoint"]
        return Start(
            Path(values["run"]),
            found and Checkpoint(Path(found["path"]), found["step"], found["metadata"]),
            values["notes"],
        )


def open_run(config: RunConfig, recipe: str, dataset: TokenDataset, resume: bool) -> Start:
    """Find out where to begin; writes nothing yet.

    Raises:
        InputError: the folder is something else than a run; a run is there and --resume was not given; its checkpoints are gone, cannot be
            read, or are all damaged; or the recipe or the dataset is another than the checkpoint's.
    """
    run, place = Path(config.run), f"{recipe}: run = {config.run!r}"
    _check_folder(run, place)
    if not checkpoint.exists(run):
        _check_nothing_is_lost(run, place, resume)
        return Start(
            run,
            None,
            [f"{run}: no checkpoint to resume from; starting from the beginning"] if resume else [],
        )
    if not resume:
        raise InputError(
            f"{place}: holds a run with checkpoints; resume with --resume, or give another folder by run=..."
        )
    found, notes = checkpoint.newest_sound(run)
    if found is None:
        raise InputError(
            f"{notes[0]}; no sound checkpoint is left there; give another folder by run=... to start anew"
        )
    if notes:
        notes = [*notes, f"resuming from {found.path}, the newest sound one"]
    return Start(run, found, [*notes, *_check_same_run(config, recipe, dataset, found)])


def _check_folder(run: Path, place: str) -> None:
    """A run begins in a folder that is new or empty; one that holds anything else must be a run already."""
    try:
        if status(run) is None:
            return
        if not is_folder(run):
            raise InputError("a file; give a folder")
        # A start that died before it had claimed the folder leaves CLAIM...; checkpoints/ and the folder itself may be disks of their own.
        others = [
            name
            for name in names_in(run)
            if not name.startswith(CLAIM) and name not in (DISK, "checkpoints")
        ]
        others += [f"checkpoints/{name}" for name in names_in(run / "checkpoints") if name != DISK]
        if others and not RunLock.was_claimed(run) and not checkpoint.has_written(run):
            more = f" and {len(others) - 3} more" if len(others) > 3 else ""
            raise InputError(
                f"holds {', '.join(others[:3])}{more}, and is no run; give a new or an empty folder by run=..."
            )
    except InputError as error:
        raise InputError(f"{place}: {error}") from None


def _check_nothing_is_lost(run: Path, place: str, resume: bool) -> None:
    """Raise where a start from the beginning would wipe the records of a run whose checkpoints are elsewhere, or that is still going on."""
    step, saved, metrics = 0, None, run / "metrics.jsonl"
    try:
        for record in read_metrics(metrics):
            step = max(step, record["step"])
            saved = (
                record["checkpoint"] if isinstance(record.get("checkpoint"), str) else saved
            )  # of an event "save" or "resume"
    except OSError as error:
        raise InputError(f"{place}: {unreadable(metrics, error)}") from None
    if saved is not None:
        raise InputError(
            f"{place}: metrics.jsonl has {step:,} steps and a checkpoint {saved}, but {run / 'checkpoints'} holds none; mount its disk or put "
            "the checkpoints back, and resume with --resume; or give another folder by run=... to start anew"
        )
    if step and not resume:
        raise InputError(
            f"{place}: holds a run of {step:,} steps without a checkpoint, which may be going on; if it has ended, --resume starts it from the "
            "beginning; or give another folder by run=..."
        )


@dataclass(frozen=True)
class Setup:
    """Everything that a run is made of, before DeepSpeed."""

    config: RunConfig
    dataset: TokenDataset
    settings: DeepSpeedSettings
    start: Start
    batches: Batches
    heldout: list[PackedBatch]
    precision: str
    precision_why: str
    model: BertForPreTraining
    state: TrainState
    criteria: StopCriteria

    @property
    def metadata(self) -> dict[str, Any]:
        """What a checkpoint knows besides tensors."""
        return {
            "recipe": dump_config(self.config),
            "dataset_sha256": self.dataset.sha256,
            "vocab_size": self.dataset.vocab_size,
            "progress": dataclasses.asdict(self.state),
        }


def set_up(config: RunConfig, recipe: str, resume: bool, group: Group) -> Setup:
    """Build and check all of it, on every rank; rank 0 says where to begin. Writes nothing.

    Raises:
        InputError: whatever is wrong with the recipe or what it names, on any rank: then on all.
    """
    start = initial = None
    with group.raise_on_all_ranks():
        if config.init is not None:
            config, initial = _start_from(config, recipe, resume)
        settings = read_ds_config(config, recipe)
        check_settings(settings)
    dataset = open_verified(config.data, group)
    with group.raise_on_all_ranks():
        batches, heldout = (
            Batches(dataset, config),
            heldout_batches(dataset, config, config.evaluate.sequences),
        )
        batches.check(group.world)
        precision, why = resolve_precision(config.runtime.precision, group.device, recipe)
        stage = settings.stage(
            precision=precision, world=group.world, optimizer=config.optimizer.name
        )
        torch.manual_seed(config.seed)
        model = BertForPreTraining(
            config.model, dataset.vocab_size, config.runtime.kernels, group.device.type
        )
        if config.runtime.cuda_graphs:
            check_cuda_graphs(recipe, group.device.type, model.impl, stage)
        if config.init is not None and initial is not None:
            put(config.init, initial, model, dataset, recipe)
        if group.is_main:
            start = open_run(config, recipe, dataset, resume)
    _check_same_everywhere(
        group,
        {
            f"{recipe}: the recipe": hashlib.sha256(dump_config(config).encode()).hexdigest(),
            f"data = {config.data!r}: the dataset's manifest": dataset.sha256,
            f"{config.runtime.deepspeed or DEEPSPEED.name}: the file": hashlib.sha256(
                json.dumps(settings.values, sort_keys=True).encode()
            ).hexdigest(),
            "torch's version": torch.__version__,
            "DeepSpeed's version": version("deepspeed"),
            f"runtime.precision = {config.runtime.precision!r} here means": precision,
            f"runtime.kernels = {config.runtime.kernels!r} here means": model.impl,
            f"init = {config.init!r}: the weights": _digest(initial.weights) if initial else "",
        },
    )
    start = Start.load(group.broadcast(start.dump() if start else None))
    return Setup(
        config=config,
        dataset=dataset,
        settings=settings,
        start=start,
        batches=batches,
        heldout=heldout,
        precision=precision,
        precision_why=why,
        model=model,
        state=TrainState(**start.checkpoint.metadata["progress"])
        if start.checkpoint
        else TrainState(),
        criteria=StopCriteria(config, batches.steps_per_epoch),
    )


def _start_from(
    config: RunConfig, recipe: str, resume: bool
) -> tuple[RunConfig, ModelParts | None]:
    """The recipe with the sizes of the model that it starts from, and that model; None where a checkpoint has been trained on from it."""
    assert config.init is not None
    resolved = Path(config.run) / "config.toml"
    if resume and checkpoint.exists(Path(config.run)) and is_file(resolved):
        return with_sizes(config, load_config(resolved).model, recipe), None
    initial = open_initial(config.init)
    return with_sizes(config, initial.config, recipe), initial


def _digest(weights: Mapping[str, Tensor]) -> str:
    sha = hashlib.sha256()
    for name in sorted(weights):
        sha.update(weights[name].contiguous().view(-1).numpy().data)
    return sha.hexdigest()


def take_folder(setup: Setup, group: Group) -> RunLock:
    """Write what a run begins with, and make the folder this start's own.

    Raises:
        InputError: the folder cannot be made or written, or a rank does not see it.
    """
    token = None
    with group.raise_on_all_ranks():
        if group.is_main:
            token = _prepare(setup).token
    owner = RunLock(setup.start.run, group.broadcast(token))
    with group.raise_on_all_ranks():
        deadline = time.monotonic() + SHARED_DISK_S
        while not owner.holds():
            if time.monotonic() > deadline:
                raise InputError(
                    f"run = {setup.config.run!r}: what rank 0 wrote there does not show here; "
                    "give a folder on a disk that all machines share"
                )
            time.sleep(0.1)
    return owner


def _prepare(setup: Setup) -> RunLock:
    """Claim the folder; then the resolved recipe, and a copy of the tokenizer, so that the run can be used when the dataset is gone."""
    run, config = setup.start.run, setup.config
    tokenizer = {
        Path(name).name: _read_plain(setup.dataset.path / name)
        for name in OTHER_FILES
        if name.startswith("tokenizer/")
    }
    try:
        run.mkdir(parents=True, exist_ok=True)
        owner = RunLock.claim(run)
        write_whole(run / "config.toml", dump_config(config).encode())
        (run / "tokenizer").mkdir(exist_ok=True)
        for name, data in tokenizer.items():
            write_whole(run / "tokenizer" / name, data)
        return owner
    except OSError as error:
        raise InputError(
            f"run = {config.run!r}: {error.filename or run} cannot be written: {error.strerror}"
        ) from None


def _read_plain(file: Path) -> bytes:
    """A file that goes into the run, to be published with it; a link might name any file of this machine."""
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(descriptor, "rb") as opened:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise InputError(
                    f"{file}: not a file; make the dataset again with `fastbert prepare`"
                )
            return opened.read()
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise InputError(
                f"{file}: a link, which is not followed; put the file itself there"
            ) from None
        raise unreadable(file, error) from None


def _check_same_everywhere(group: Group, facts: dict[str, str]) -> None:
    """Ranks that differ in one of these would train another model each."""
    everywhere = group.gather(facts)
    for rank, there in enumerate(everywhere):
        for what, value in everywhere[0].items():
            if there.get(what) != value:
                raise InputError(
                    f"{what} {value[:16]} on rank 0 and {there.get(what, 'another')[:16]} on rank {rank}; make them equal"
                )


def _check_same_run(
    config: RunConfig, recipe: str, dataset: TokenDataset, found: Checkpoint
) -> list[str]:
    """Raise where the recipe or the dataset is not that of the checkpoint; return a line on each change that is allowed but matters."""
    before = _flat(parse_config(found.metadata["recipe"], str(found.path)))
    now = _flat(config)
    changed = [key for key in now if now[key] != before[key] and not _among(key, FREE)]
    for key in changed:
        if not _among(key, NOTED):
            raise InputError(
                f"{recipe}: {key} = {now[key]!r}, but the checkpoint {found.path} was trained with {before[key]!r}; "
                "set it back, or start another run by run=..."
            )
    if dataset.sha256 != found.metadata["dataset_sha256"]:
        raise InputError(
            f"{recipe}: data = {config.data!r}: not the dataset that {found.path} was trained on; give that one, or start another run by run=..."
        )
    return [
        f"changed since the checkpoint: {key} was {before[key]!r}, now {now[key]!r}"
        for key in changed
    ]


def _flat(config: RunConfig) -> dict[str, Any]:
    """Values by dotted key."""
    values: dict[str, Any] = {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            values |= {
                f"{item.name}.{f.name}": getattr(value, f.name) for f in dataclasses.fields(value)
            }
        else:
            values[item.name] = value
    return values


def _among(key: str, places: tuple[str, ...]) -> bool:
    return key in places or key.partition(".")[0] in places
