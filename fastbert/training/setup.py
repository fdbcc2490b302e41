"""Sets up a run: finds where it begins, and builds and checks everything that it needs.

A run begins in an empty folder or at the newest valid checkpoint of an earlier start.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastbert.checkpoints import checkpoint
from fastbert.checkpoints.checkpoint import WEIGHT, Checkpoint
from fastbert.checkpoints.model_folder import ModelParts, tokenizer_sha256, trained_length
from fastbert.checkpoints.ownership import CLAIM, RunLock
from fastbert.checkpoints.weight_names import check_layers, shapes
from fastbert.cluster.group import Group
from fastbert.config import RunConfig, settings_of
from fastbert.data.batches import Batches, heldout_batches
from fastbert.data.dataset import TokenDataset, other_files
from fastbert.data.mixture import BLOCK
from fastbert.data.phases import Position
from fastbert.data.tokenizer import load_tokenizer
from fastbert.durable import write_whole
from fastbert.errors import InputError
from fastbert.machine import memory_sizes, processes_for
from fastbert.models.build import Model, build_model
from fastbert.presence import is_file, is_folder, names_in, status, unreadable
from fastbert.recipe import DEEPSPEED, dump_config, load_config, parse_config
from fastbert.regular_file import read_bytes
from fastbert.training.branch import ORIGIN, begin_state, open_parent, origin_in, position_of
from fastbert.training.ds_config import DeepSpeedSettings, read_ds_config
from fastbert.training.engine import check_settings
from fastbert.training.graphs import check_cuda_graphs
from fastbert.training.heldout import HeldOutSource
from fastbert.training.initial import open_initial, put, with_sizes
from fastbert.training.metrics import read_metrics
from fastbert.training.optimizer import slots
from fastbert.training.precision import Precision, resolve_precision
from fastbert.training.train_state import StopCriteria, TrainState
from fastbert.training.verified_dataset import open_sources

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
    "runtime",
    "batch.micro_batch_tokens",
)
DISK = "lost+found"  # a new disk contains this folder
SHARED_DISK_S = 20.0  # how long another machine may take to see a new file on a shared disk
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


@dataclass(frozen=True)
class Start:
    """Where a run begins.

    Attributes:
        run: the run folder, which may be written to.
        checkpoint: the checkpoint to resume from; None for a start from the beginning.
        branches: the checkpoint is that of another run, from which this one branches off.
        notes: lines for the user, for example on damaged checkpoints that were skipped.
    """

    run: Path
    checkpoint: Checkpoint | None
    notes: list[str] = field(default_factory=list)
    branches: bool = False

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
        start = "the beginning" if config.branch_from is None else config.branch_from
        note = f"{run}: no checkpoint to resume from; starting from {start}"
        notes = [note] if resume else []
        if config.branch_from is None:
            return Start(run, None, notes)
        parent = open_parent(config.branch_from, recipe)
        changes = _check_same_run(config, recipe, datasets, parent, branches=True)
        return Start(run, parent, [*notes, *changes], branches=True)
    if not resume:
        raise InputError(
            f"{place}: holds a run with checkpoints; "
            "resume with --resume, or give another folder by run=..."
        )
    found, notes = checkpoint.newest_valid(run)
    if found is None:
        raise InputError(
            f"{notes[0]}; no valid checkpoint is left there; "
            "give another folder by run=... to start a new run"
        )
    if notes:
        notes = [*notes, f"resuming from {found.path}, the newest valid one"]
    return Start(run, found, [*notes, *_check_same_run(config, recipe, datasets, found)])


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


@dataclass(frozen=True)
class Setup:
    """Everything that a run needs before DeepSpeed is initialized.

    Attributes:
        config: the resolved recipe.
        datasets: the verified datasets, in the order of config.data.
        settings: the checked ds_config.json.
        start: where the run begins.
        batches: the training batches.
        heldout: the held-out batches of each source, by maximum length.
        precision: "fp32" or "bf16", what it means here, and the reason.
        at_once: how many packs each rank computes at once.
        model: fp32, with the first weights.
        state: the run's counters.
        criteria: the recipe's stop conditions.
        trained_before: the longest sequence, in tokens, that the weights were trained on before
            this start; 0 where it has the first weights.
        tokenizer_sha256: of the dataset's tokenizer.
    """

    config: RunConfig
    datasets: tuple[TokenDataset, ...]
    settings: DeepSpeedSettings
    start: Start
    batches: Batches
    heldout: dict[int, list[HeldOutSource]]
    precision: Precision
    at_once: int
    model: Model
    state: TrainState
    criteria: StopCriteria
    trained_before: int
    tokenizer_sha256: str

    @property
    def dataset(self) -> TokenDataset:
        """The first dataset; all have the same tokenizer."""
        return self.datasets[0]

    @property
    def trained_length(self) -> int:
        """The longest sequence that the weights were trained on, or will be in the first step."""
        timetable = self.batches.timetable
        first, end = timetable.first_step, max(self.state.step, timetable.first_step + 1)
        # A branch made no steps of the phases that were over when it began.
        own = [p for p in timetable.phases if p.first < end and (p.end is None or p.end > first)]
        return max(self.trained_before, *(phase.config.batch.max_length for phase in own))

    @property
    def heldout_now(self) -> list[HeldOutSource]:
        """The held-out batches of the phase of the last step."""
        phase = self.batches.timetable.phase_at(max(self.state.step - 1, 0))
        return self.heldout[phase.config.batch.max_length]

    @property
    def baselines(self) -> dict[str, float]:
        """The losses of count models, nats per token: means over the sources by their shares."""
        shares = [source.share for source in next(iter(self.heldout.values()))]
        found = [dataset.baselines for dataset in self.datasets]
        names = [name for name in found[0] if all(name in one for one in found)]
        if len(found) == 1:
            return found[0]
        return {
            name: sum(one[name] * share for one, share in zip(found, shares, strict=True))
            for name in names
        }

    @property
    def metadata(self) -> dict[str, Any]:
        """The metadata of a checkpoint."""
        digests = [dataset.sha256 for dataset in self.datasets]
        origin = self.batches.timetable.origin
        return {
            "recipe": dump_config(self.config),
            "dataset_sha256": digests[0] if len(digests) == 1 else digests,
            **({ORIGIN: origin.dump()} if origin else {}),
            "vocab_size": self.dataset.vocab_size,
            "tokenizer_sha256": self.tokenizer_sha256,
            "trained_length": self.trained_length,
            "progress": dataclasses.asdict(self.state),
        }


def set_up(config: RunConfig, recipe: str, resume: bool, group: Group) -> Setup:
    """Build and check everything, on every rank; rank 0 finds where to begin. It writes nothing.

    Args:
        config: the recipe.
        recipe: its path, for messages.
        resume: --resume was given.
        group: the run's processes.

    Raises:
        InputError: the recipe or something that it names is wrong, on any rank; all ranks raise it.
    """
    start = initial = None
    with group.raise_on_all_ranks():
        if config.branch_from is not None:
            config = _as_parent(config, recipe, resume)
        elif config.init is not None:
            config, initial = _start_from(config, recipe, resume)
        settings = read_ds_config(config, recipe)
        check_settings(settings)
    datasets = open_sources([source.path for source in config.sources], group)
    dataset = datasets[0]
    with group.raise_on_all_ranks():
        _check_memory(config.largest, dataset.vocab_size, group.world, recipe)
        torch.manual_seed(config.seed)
        model = build_model(
            config.model, dataset.vocab_size, config.runtime.kernels, group.device.type
        )
        if config.init is not None and initial is not None:
            put(config.init, initial, model, dataset, recipe)
        if group.is_main:
            start = open_run(config, recipe, datasets, resume)
    start = Start.load(group.broadcast(start.dump() if start else None))
    with group.raise_on_all_ranks():
        batches = Batches(datasets, config, _origin(start, datasets))
        batches.check(group.world)
        heldout = _heldout(config, batches)
    precision = resolve_precision(
        config.runtime.precision,
        _precision_before(start.checkpoint),
        model.impl,
        _largest_product(config.largest, dataset.vocab_size),
        group,
        recipe,
    )
    model.operands, model.recompute = precision.operands, config.runtime.recompute
    config = replace(config, runtime=replace(config.runtime, precision=precision.name))
    with group.raise_on_all_ranks():
        stage = settings.stage(
            precision=precision.parameters, world=group.world, optimizer=config.optimizer.name
        )
        if config.runtime.cuda_graphs:
            check_cuda_graphs(recipe, group.device.type, model.impl, stage)
        at_once = 1
        # Stage 3 moves weights, and Triton's interpreter runs one kernel at a time.
        if group.device.type == "cpu" and stage < 3 and model.impl != "triton":
            smallest = min(stretch.sequences for stretch in batches.timetable.stretches)
            at_once = processes_for(smallest // group.world, torch.get_num_threads())
    _check_same_everywhere(
        group,
        {
            f"{recipe}: the recipe": hashlib.sha256(dump_config(config).encode()).hexdigest(),
            **{f"data = {str(d.path)!r}: the dataset's manifest": d.sha256 for d in datasets},
            # Powers of sizes may be rounded differently on another machine.
            "the timetable of sources and phases": hashlib.sha256(
                repr((batches.timetable.stretches, batches.timetable.eras)).encode()
            ).hexdigest(),
            f"{config.runtime.deepspeed or DEEPSPEED.name}: the file": hashlib.sha256(
                json.dumps(settings.values, sort_keys=True).encode()
            ).hexdigest(),
            "torch's version": torch.__version__,
            "DeepSpeed's version": version("deepspeed"),
            f"runtime.kernels = {config.runtime.kernels!r} here means": model.impl,
            f"init = {config.init!r}: the weights": _digest(initial.weights) if initial else "",
        },
    )
    found = start.checkpoint
    earlier = initial.max_length if initial else 0
    if found is not None:
        earlier = trained_length(found, config)
    # A recipe may give a ModernBERT fewer positions than it had.
    earlier = min(earlier, config.model.max_position_embeddings)
    return Setup(
        config=config,
        datasets=datasets,
        settings=settings,
        start=start,
        batches=batches,
        heldout=heldout,
        precision=precision,
        at_once=at_once,
        model=model,
        state=_state(start),
        criteria=StopCriteria(config, batches.steps_per_epoch),
        trained_before=earlier,
        tokenizer_sha256=tokenizer_sha256(load_tokenizer(dataset.tokenizer_dir)),
    )


def _state(start: Start) -> TrainState:
    """Return the counters with which the run begins."""
    found = start.checkpoint
    if found is None:
        return TrainState()
    if start.branches:
        return begin_state(found)
    return TrainState.read(found.metadata["progress"], str(found.path))


def _origin(start: Start, datasets: Sequence[TokenDataset]) -> Position | None:
    """Return where a branch begins in the data; None where the run is no branch."""
    if start.checkpoint is None:
        return None
    if start.branches:
        return position_of(start.checkpoint, datasets)
    return origin_in(start.checkpoint)


def _heldout(config: RunConfig, batches: Batches) -> dict[int, list[HeldOutSource]]:
    """Return the held-out batches of each source, for each max_length that a phase has.

    The shares are those of the recipe, whatever the weights of a phase, so that the losses of all
    phases can be compared.
    """
    found: dict[int, list[HeldOutSource]] = {}
    datasets, shares = batches.streams.datasets, batches.streams.quotas(config)
    for phase in batches.timetable.phases:
        length = phase.config.batch.max_length
        if length not in found:
            packs = [heldout_batches(d, phase.config, config.evaluate.sequences) for d in datasets]
            found[length] = [
                HeldOutSource(name, share / BLOCK, own)
                for name, share, own in zip(config.source_names, shares, packs, strict=True)
            ]
    return found


def _as_parent(config: RunConfig, recipe: str, resume: bool) -> RunConfig:
    """Return the recipe of a branch with the sizes of the model that it begins with."""
    assert config.branch_from is not None
    resolved = Path(config.run) / "config.toml"
    if resume and checkpoint.exists(Path(config.run)) and is_file(resolved):
        model = load_config(resolved).model  # the other run may be gone
    else:
        found = open_parent(config.branch_from, recipe)
        model = parse_config(found.metadata["recipe"], str(found.path)).model
    return with_sizes(replace(config, init=None), model, recipe)


def _precision_before(found: Checkpoint | None) -> str:
    """Return the resolved precision of the run that saved a checkpoint; "auto" if there is none."""
    if found is None:
        return "auto"
    return parse_config(found.metadata["recipe"], str(found.path)).runtime.precision


def _largest_product(config: RunConfig, vocab_size: int) -> int:
    """Return how many multiplications the largest product of a step may have, at most."""
    model, tokens = config.model, config.batch.sequences * config.batch.max_length
    masked = math.ceil(config.objective.mask_rate * tokens)
    return model.hidden_size * max(tokens * model.intermediate_size, masked * vocab_size)


def _check_memory(config: RunConfig, vocab_size: int, world: int, recipe: str) -> None:
    """Check that this machine can hold the model's weights and the batch of a step at all.

    Raises:
        InputError: it cannot; the message has the GB needed and there.
    """
    model, batch = config.model, config.batch
    one, two = (
        sum(map(math.prod, shapes(replace(model, num_hidden_layers=n), vocab_size).values()))
        for n in (1, 2)
    )
    parameters = one + (two - one) * (model.num_hidden_layers - 1)
    there, _ = memory_sizes()
    for what, needed in (
        # Every process makes the whole model in fp32, with its gradients at the least.
        (f"a model of {parameters:,} parameters", 8 * parameters),
        # Every rank draws all examples, and reads the tokens of its own.
        (
            f"batch.sequences = {batch.sequences:,} of {batch.max_length} tokens",
            batch.sequences * (64 + 8 * batch.max_length // world),
        ),
    ):
        if needed > there:
            raise InputError(
                f"{recipe}: {what} needs {needed / 1e9:,.1f} GB or more, and this machine has "
                f"{there / 1e9:,.1f} GB; make it smaller"
            )


def _start_from(
    config: RunConfig, recipe: str, resume: bool
) -> tuple[RunConfig, ModelParts | None]:
    """Return the recipe with the sizes of the model in `init`, and that model.

    Where a run is resumed, its checkpoint has the weights, so the model is None.
    """
    assert config.init is not None
    resolved = Path(config.run) / "config.toml"
    if resume and checkpoint.exists(Path(config.run)) and is_file(resolved):
        return with_sizes(config, load_config(resolved).model, recipe), None
    initial = open_initial(config.init)
    return with_sizes(config, initial.config, recipe), initial


def _digest(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 of all weights, in the order of their names."""
    sha = hashlib.sha256()
    for name in sorted(weights):
        sha.update(weights[name].contiguous().view(-1).numpy().data)
    return sha.hexdigest()


def take_folder(setup: Setup, group: Group) -> RunLock:
    """Take over the run folder, and write the files that a run begins with.

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
    """Claim the folder, and write the resolved recipe and a copy of the tokenizer.

    With the copy, the run's model can be used when the dataset is gone.
    """
    run, config = setup.start.run, setup.config
    tokenizer = {
        Path(name).name: _read_plain(setup.dataset.path / name)
        for name in other_files(setup.dataset.has_words)
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
    """Read a file that is copied into the run, and may be published with it.

    Links are refused, since a link might name any file of this machine.
    """
    try:
        return read_bytes(file, follow=False)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise InputError(
                f"{file}: a link, which is not followed; put the file itself there"
            ) from None
        raise unreadable(file, error) from None


def _check_same_everywhere(group: Group, facts: dict[str, str]) -> None:
    """Check that these facts are the same on every rank.

    Ranks that differ in one of them would each train another model.

    Args:
        group: the run's processes.
        facts: value by what it is, for messages.

    Raises:
        InputError: two ranks differ; the message has both values.
    """
    everywhere = group.gather(facts)
    for rank, there in enumerate(everywhere):
        for what, value in everywhere[0].items():
            if there.get(what) != value:
                other = there.get(what, "another")
                raise InputError(
                    f"{what} {value[:16]} on rank 0 and {other[:16]} on rank {rank}; "
                    "make them equal"
                )


def _check_same_run(
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
        raise InputError(f"{found.path}: no recipe in its metadata; take another checkpoint")
    TrainState.read(found.metadata.get("progress"), str(found.path))
    before = _flat(parse_config(text, str(found.path)))
    now = _flat(config)
    free = (*FREE, *BRANCH_FREE) if branches else FREE
    keys = dict.fromkeys([*now, *before])
    changed = [key for key in keys if now.get(key) != before.get(key) and not _among(key, free)]
    other = "start another run by run=..."
    if not branches:
        other += ", which may begin here with --branch-from"
    for key in changed:
        if not _among(key, (*NOTED, *BRANCH_NOTED) if branches else NOTED):
            raise InputError(
                f"{recipe}: {key} = {now.get(key)!r}, but the checkpoint {found.path} "
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
        dataset = datasets[i] if i < len(datasets) else None
        if dataset is None or dataset.sha256 != digest:
            given = f"data = {config.shown_data!r}"
            if len(digests) > 1:
                given = f"data {i + 1} = {str(dataset.path) if dataset else None!r}"
            raise InputError(
                f"{recipe}: {given}: not the dataset that {found.path} was trained on; "
                "give that one, or start another run by run=..."
            )
    if len(datasets) > len(digests) and not branches:
        raise InputError(
            f"{recipe}: data has {len(datasets)} sources, and {found.path} was trained on "
            f"{len(digests)}; give those, or start another run by run=... with --branch-from"
        )


def _check_tensors(config: RunConfig, dataset: TokenDataset, found: Checkpoint) -> None:
    """Check that the checkpoint holds each weight, and each slot of the optimizer, in its shape.

    Raises:
        InputError: it does not.
    """
    tensors = checkpoint.read_all(found.path)
    check_layers(config.model.num_hidden_layers, len(tensors.get(WEIGHT, ())), str(found.path))
    wanted = {WEIGHT: shapes(config.model, dataset.vocab_size)}
    for name, shape in wanted[WEIGHT].items():
        for slot in slots(config.optimizer, name, shape):
            wanted.setdefault(slot, {})[name] = shape
    for slot, named in wanted.items():
        there = tensors[slot].shapes() if slot in tensors else {}
        if wrong := sorted(name for name in {*named, *there} if there.get(name) != named.get(name)):
            raise InputError(
                f"{found.path}: {slot}/{wrong[0]} is missing or does not have the shape that the "
                "recipe gives; take another checkpoint"
            )


def _flat(config: RunConfig) -> dict[str, Any]:
    """The recipe's values by dotted key; phases are numbered from 1: phase.1.batch.sequences."""
    values = _flat_section(config, "")
    own = tuple(source.weight for source in config.sources)
    values["weights"] = own if any(own) and len(own) > 1 else config.weights
    values["data"] = config.shown_data
    for number, phase in enumerate(values.pop("phase"), 1):
        values |= _flat_section(phase, f"phase.{number}.")
    return values


def _flat_section(section: Any, prefix: str) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for item in settings_of(section):
        value, key = getattr(section, item.name), f"{prefix}{item.name}"
        if dataclasses.is_dataclass(value):
            values |= _flat_section(value, f"{key}.")
        else:
            values[key] = value
    return values


def _among(key: str, places: tuple[str, ...]) -> bool:
    """Whether one of the places is the key itself or its section."""
    return key in places or key.partition(".")[0] in places
