"""Sets up a run: builds and checks everything that it needs before DeepSpeed is initialized."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastbert.checkpoints import checkpoint
from fastbert.checkpoints.checkpoint import Checkpoint
from fastbert.checkpoints.model_folder import ModelParts, tokenizer_sha256, trained_length
from fastbert.checkpoints.weight_names import shapes
from fastbert.cluster.group import Group
from fastbert.config import RunConfig
from fastbert.data.batches import Batches, heldout_batches
from fastbert.data.dataset import TokenDataset
from fastbert.data.mixture import BLOCK
from fastbert.data.phases import Position
from fastbert.data.tokenizer import load_tokenizer
from fastbert.errors import InputError
from fastbert.machine import memory_sizes, processes_for
from fastbert.models.build import Model, build_model
from fastbert.presence import is_file
from fastbert.recipe import DEEPSPEED, dump_config, load_config, parse_config
from fastbert.storage import is_url, objects, place, read
from fastbert.training.branch import ORIGIN, begin_state, open_parent, origin_in, position_of
from fastbert.training.ds_config import DeepSpeedSettings, read_ds_config
from fastbert.training.engine import check_settings
from fastbert.training.graphs import check_cuda_graphs
from fastbert.training.heldout import HeldOutSource, mean_baselines
from fastbert.training.initial import open_initial, put, with_sizes
from fastbert.training.loggers import check_loggers
from fastbert.training.precision import Precision, resolve_precision
from fastbert.training.rounds import answering
from fastbert.training.start import Start, open_bucket_run, open_run
from fastbert.training.train_state import StopCriteria, TrainState
from fastbert.training.verified_dataset import open_sources


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
        lengths = (phase.config.batch.max_length for phase in own)
        return max([self.trained_before, *lengths])  # none where no step is left

    @property
    def heldout_now(self) -> list[HeldOutSource]:
        """The held-out batches of the phase of the last step."""
        phase = self.batches.timetable.phase_at(max(self.state.step - 1, 0))
        return self.heldout[phase.config.batch.max_length]

    @property
    def baselines(self) -> dict[str, float]:
        """The losses of count models, nats per token: means over the sources by their shares."""
        shares = [source.share for source in next(iter(self.heldout.values()))]
        return mean_baselines([dataset.baselines for dataset in self.datasets], shares)

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
        if group.is_main:
            check_loggers(config, recipe)
    paths = [source.path for source in config.sources]
    datasets = open_sources(paths, group, config.order.window)
    dataset = datasets[0]
    with group.raise_on_all_ranks():
        _check_memory(config.largest, dataset.vocab_size, group.world, recipe)
        torch.manual_seed(config.seed)
        model = build_model(
            config.model, dataset.vocab_size, config.runtime.kernels, group.device.type
        )
        if config.init is not None and initial is not None:
            put(config.init, initial, model, dataset, recipe)
        if group.is_main and not is_url(config.run):
            start = open_run(config, recipe, datasets, resume)
    if is_url(config.run):
        start = open_bucket_run(config, recipe, datasets, resume, group)
    else:
        start = Start.load(group.broadcast(start.dump() if start else None))
        if start.branches and is_url(config.branch_from or ""):
            with group.raise_on_all_ranks():  # each machine has a copy of its own
                parent = open_parent(config.branch_from or "", recipe)
            start = replace(start, checkpoint=parent)
    with group.raise_on_all_ranks():
        batches = Batches(datasets, config, _origin(start, datasets))
        batches.check(group.world)
        state, criteria = _state(start), StopCriteria(config, batches.timetable.steps_per_epoch)
        if start.branches and (reason := criteria.reached(state)) is not None:
            raise InputError(
                f"{recipe}: branch_from = {config.branch_from!r}: {reason} is reached there "
                "already, so no step is left; raise it"
            )
        heldout = _heldout(config, batches)
        # The text of the first step is opened and verified.
        batches.draw(start.checkpoint.step if start.checkpoint else 0)
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
            # Each machine may have a copy of its own.
            **{
                f"data = {source.path!r}: the dataset's manifest": found.sha256
                for source, found in zip(config.sources, datasets, strict=True)
            },
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
            # One of a bucket may have been saved again meanwhile.
            f"branch_from = {config.branch_from!r}: the checkpoint": start.checkpoint.path.name
            if start.checkpoint and start.branches
            else "",
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
        state=state,
        criteria=criteria,
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
    if resume and (before := _resolved_before(config.run)) is not None:
        model = before.model  # the other run may be gone
    else:
        found = open_parent(config.branch_from, recipe)
        model = parse_config(found.metadata["recipe"], str(found.path)).model
    return with_sizes(replace(config, init=None), model, recipe)


def _precision_before(found: Checkpoint | None) -> str:
    """Return the resolved precision of the run that saved a checkpoint; "auto" if there is none."""
    if found is None:
        return "auto"
    return parse_config(found.metadata["recipe"], str(found.place)).runtime.precision


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
        # A rank draws all examples, or those of its lane, and reads the tokens of its own.
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
    if resume and (before := _resolved_before(config.run)) is not None:
        return with_sizes(config, before.model, recipe), None
    initial = open_initial(config.init)
    return with_sizes(config, initial.config, recipe), initial


def _resolved_before(run: str) -> RunConfig | None:
    """Return the resolved recipe of a run that has checkpoints; None where it has none."""
    at = place(run)
    if isinstance(at, Path):
        there = checkpoint.exists(at) and is_file(at / "config.toml")
        return load_config(at / "config.toml") if there else None
    with answering():
        if "manifest.json" in {e.name.rpartition("/")[2] for e in objects(at / "checkpoints")}:
            with contextlib.suppress(FileNotFoundError):
                text = read(at / "config.toml").decode("utf-8", "replace")
                return parse_config(text, str(at / "config.toml"))
    return None


def _digest(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 of all weights, in the order of their names."""
    sha = hashlib.sha256()
    for name in sorted(weights):
        sha.update(weights[name].contiguous().view(-1).numpy().data)
    return sha.hexdigest()


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
