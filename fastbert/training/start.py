"""Where a run begins: an empty folder, or the newest sound checkpoint of one that was there; and all that it needs, checked."""

from __future__ import annotations

import dataclasses
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastbert.config import RunConfig, dump_config, parse_config
from fastbert.data.batches import Batches, PackedBatch, heldout_batches
from fastbert.data.store import Store, open_store
from fastbert.errors import InputError
from fastbert.model import BertForPreTraining
from fastbert.training import checkpoint
from fastbert.training.checkpoint import Checkpoint
from fastbert.training.ds_config import DeepSpeedSettings, read_ds_config
from fastbert.training.engine import check_settings, launched_world, local_device
from fastbert.training.precision import resolve_precision
from fastbert.training.progress import Horizon, Progress

# What may differ between a checkpoint and the recipe that goes on from it: where things lie, when it ends, what it reports and how it is
# run. A learning rate or a schedule may be changed too: it changes no example and no shape, and is noted. Anything else would make the
# second half another experiment than the first.
FREE = ("data", "run", "model.preset", "stop", "evaluate", "checkpoint", "runtime", "batch.micro_batch_tokens")
NOTED = ("optimizer.lr", "optimizer.betas", "optimizer.eps", "optimizer.weight_decay", "optimizer.clip", "schedule")


@dataclass(frozen=True)
class Start:
    """A run folder that is ready to be written to.

    Attributes:
        run: the folder.
        checkpoint: what to go on from; None for a start from the beginning.
        notes: lines for the user, such as damaged checkpoints that were passed over.
    """

    run: Path
    checkpoint: Checkpoint | None
    notes: list[str] = field(default_factory=list)


def open_run(config: RunConfig, recipe: str, store: Store, resume: bool) -> Start:
    """Find out where to begin; writes nothing yet.

    Raises:
        InputError: a run is there and --resume was not given, or all its checkpoints are damaged, or the recipe or the store
            is another than the checkpoint's.
    """
    run = Path(config.run)
    if run.exists() and not run.is_dir():
        raise InputError(f"{recipe}: run = {config.run!r}: a file; give a folder")
    if not checkpoint.exists(run):
        return Start(run, None, [f"{run}: no checkpoint to resume from; starting from the beginning"] if resume else [])
    if not resume:
        raise InputError(
            f"{recipe}: run = {config.run!r}: holds a run with checkpoints; go on with it by --resume, or give another folder by run=..."
        )
    found, notes = checkpoint.newest_sound(run)
    if found is None:
        raise InputError(f"{notes[0]}; no sound checkpoint is left there; give another folder by run=... to start anew")
    if notes:
        notes = [*notes, f"going on from {found.path}, the newest sound one"]
    return Start(run, found, [*notes, *_check_same_run(config, recipe, store, found)])


@dataclass(frozen=True)
class Setup:
    """Everything that a run is made of, before DeepSpeed."""

    config: RunConfig
    store: Store
    settings: DeepSpeedSettings
    start: Start
    batches: Batches
    heldout: list[PackedBatch]
    device: torch.device
    precision: str
    precision_why: str
    model: BertForPreTraining
    progress: Progress
    horizon: Horizon

    @property
    def metadata(self) -> dict[str, Any]:
        """What a checkpoint knows besides tensors."""
        return {
            "recipe": dump_config(self.config),
            "store_sha256": self.store.sha256,
            "vocab_size": self.store.vocab_size,
            "progress": dataclasses.asdict(self.progress),
        }


def set_up(config: RunConfig, recipe: str, resume: bool) -> Setup:
    """Build and check all of it; raises InputError for whatever is wrong with the recipe or what it names. Writes nothing."""
    store, settings = open_store(config.data), read_ds_config(config, recipe)
    check_settings(settings)
    start = open_run(config, recipe, store, resume)
    if (world := launched_world()) > 1:
        raise InputError(f"WORLD_SIZE = {world}: this version trains on one process; start it without a launcher")
    batches, heldout = Batches(store, config), heldout_batches(store, config, config.evaluate.sequences)
    device = local_device()
    precision, why = resolve_precision(config.runtime.precision, device, recipe)
    settings.stage(precision=precision, world=world, optimizer=config.optimizer.name)
    torch.manual_seed(config.seed)
    return Setup(
        config=config,
        store=store,
        settings=settings,
        start=start,
        batches=batches,
        heldout=heldout,
        device=device,
        precision=precision,
        precision_why=why,
        model=BertForPreTraining(config.model, store.vocab_size, config.runtime.kernels, device.type),
        progress=Progress(**start.checkpoint.metadata["progress"]) if start.checkpoint else Progress(),
        horizon=Horizon(config, batches.examples_per_epoch / config.batch.sequences),
    )


def prepare_folder(start: Start, config: RunConfig, store: Store) -> None:
    """Write the resolved recipe, and a copy of the tokenizer, so that the run can be used when the store is gone.

    Raises:
        InputError: the folder cannot be made or written.
    """
    try:
        start.run.mkdir(parents=True, exist_ok=True)
        (start.run / "config.toml").write_text(dump_config(config), encoding="utf-8")
        shutil.copytree(store.tokenizer_dir, start.run / "tokenizer", dirs_exist_ok=True)
    except OSError as error:
        raise InputError(f"run = {config.run!r}: {error.filename or start.run} cannot be written: {error.strerror}") from None


def _check_same_run(config: RunConfig, recipe: str, store: Store, found: Checkpoint) -> list[str]:
    """Raise where the recipe or the store is not that of the checkpoint; return a line on each change that is allowed but matters."""
    before = _flat(parse_config(found.metadata["recipe"], str(found.path)))
    now = _flat(config)
    changed = [key for key in now if now[key] != before[key] and not _among(key, FREE)]
    for key in changed:
        if not _among(key, NOTED):
            raise InputError(
                f"{recipe}: {key} = {now[key]!r}, but the checkpoint {found.path} was trained with {before[key]!r}; "
                "set it back, or start another run by run=..."
            )
    if store.sha256 != found.metadata["store_sha256"]:
        raise InputError(
            f"{recipe}: data = {config.data!r}: not the store that {found.path} was trained on; give that one, or start another run by run=..."
        )
    return [f"changed since the checkpoint: {key} was {before[key]!r}, now {now[key]!r}" for key in changed]


def _flat(config: RunConfig) -> dict[str, Any]:
    """Values by dotted key."""
    values: dict[str, Any] = {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            values |= {f"{item.name}.{f.name}": getattr(value, f.name) for f in dataclasses.fields(value)}
        else:
            values[item.name] = value
    return values


def _among(key: str, places: tuple[str, ...]) -> bool:
    return key in places or key.partition(".")[0] in places
