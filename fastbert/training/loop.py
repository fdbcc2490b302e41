"""`pretrain`: a recipe and a store become a run."""

from __future__ import annotations

import sys
import time

import torch

from fastbert.config import RunConfig
from fastbert.data.packing import PackedBatch
from fastbert.data.prefetch import Prefetch
from fastbert.doctor import measure_gemm_rate
from fastbert.flops import executed_flops
from fastbert.training import checkpoint
from fastbert.training.engine import Engine, NotFinite
from fastbert.training.interruption import Interruption
from fastbert.training.monitor import Monitor
from fastbert.training.schedule import factor
from fastbert.training.start import Setup, prepare_folder, set_up

DONE, FAILED, INTERRUPTED = 0, 1, 75  # exit codes; 75 is EX_TEMPFAIL: a scheduler may start it again


def pretrain(config: RunConfig, recipe: str, resume: bool) -> int:
    """Train as the recipe says, from the beginning or from the newest sound checkpoint of its run.

    Args:
        config: the resolved recipe.
        recipe: its path, for messages.
        resume: go on with the run that is in the folder.

    Returns:
        0 when a stop condition was reached, 1 when the run failed, 75 when it was interrupted and a checkpoint saved.

    Raises:
        InputError: the recipe, the store, ds_config.json or the run folder is wrong; nothing has been written then.
    """
    setup = set_up(config, recipe, resume)
    prepare_folder(setup.start, config, setup.store)
    step, found = setup.progress.step, setup.start.checkpoint
    peak = measure_gemm_rate(torch.bfloat16 if setup.precision == "bf16" else torch.float32, device=str(setup.device))
    try:
        with (
            Engine(
                setup.model,
                config,
                setup.settings,
                setup.precision,
                setup.device,
                checkpoint.read_all(found.path) if found else None,  # not kept: three times the model
                step,
            ) as engine,
            Monitor(
                setup.start.run,
                step=step,
                horizon=setup.horizon,
                peak=peak * engine.world,
                vocab_size=setup.store.vocab_size,
                pairs=config.objective.pairs,
                yardsticks=setup.store.yardsticks,
                speaks=engine.rank == 0,
            ) as monitor,
            Interruption() as interruption,
            Prefetch(setup.batches, step, engine.rank, engine.world) as feed,
        ):
            _introduce(setup, engine, monitor)
            return _train(setup, engine, monitor, interruption, feed)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"the run ended: {where}{error.strerror or error}; when that is mended, {_go_on(setup)}", file=sys.stderr)
        return FAILED


def _train(setup: Setup, engine: Engine, monitor: Monitor, interruption: Interruption, feed: Prefetch) -> int:
    """The loop: steps, evaluations and checkpoints until a condition, a signal or a loss that is not finite ends it."""
    config, progress, horizon = setup.config, setup.progress, setup.horizon
    began, saved = time.monotonic() - progress.seconds, progress.step

    def save() -> None:
        nonlocal saved
        if saved != progress.step:
            path = checkpoint.save(setup.start.run / "checkpoints", progress.step, engine.tensors(), setup.metadata, config.checkpoint.keep)
            monitor.event("save", progress.step, checkpoint=path.name)
            saved = progress.step

    reason = horizon.reached(progress)
    while reason is None:
        _, packs, waited = next(feed)
        started = time.perf_counter()
        lr = config.optimizer.lr * factor(config.schedule, horizon.scheduled(progress))
        try:
            result = engine.step(packs, lr)
        except NotFinite as trouble:
            if not trouble.applied:
                save()
            monitor.stop(
                progress.step,
                f"{trouble} at step {progress.step + 1}, {_blame(trouble, packs)}",
                f"try a lower optimizer.lr; {_go_on(setup)}",
            )
            return FAILED
        progress.step += 1
        progress.tokens += result.tokens
        progress.seconds, asked = engine.agree(time.monotonic() - began, interruption.asked is not None)
        seconds = waited + time.perf_counter() - started
        monitor.step(progress, result, lr=lr, seconds=seconds, waited=waited, flops=_flops(setup, packs) * engine.world)

        reason = horizon.reached(progress)
        if reason or progress.step % config.evaluate.every == 0:
            found = engine.evaluate(setup.heldout, setup.store.special.mask)
            progress.judge(found.loss, config.stop.min_delta)
            progress.seconds, _ = engine.agree(time.monotonic() - began, False)
            monitor.evaluate(progress, found)
            reason = horizon.reached(progress)
        if reason or asked or progress.step % config.checkpoint.every == 0:
            save()
        if asked and not reason:
            monitor.stop(progress.step, f"interrupted by {interruption.asked or 'another rank'}", _go_on(setup))
            return INTERRUPTED
    monitor.stop(progress.step, reason)
    return DONE


def _introduce(setup: Setup, engine: Engine, monitor: Monitor) -> None:
    """Say once what was resolved, and where the run begins."""
    for note in setup.start.notes:
        monitor.say(note)
    parameters = sum(p.numel() for p in setup.model.parameters())
    monitor.say(
        f"{setup.start.run}: {parameters:,} parameters, {setup.batches.examples_per_epoch:,} examples an epoch, on {setup.device}, "
        f"{setup.precision} ({setup.precision_why}), kernels {setup.model.impl}, ZeRO stage {engine.stage}, {torch.get_num_threads()} threads"
    )
    if (found := setup.start.checkpoint) is not None:
        monitor.say(f"resuming after step {found.step:,} from {found.path}")
        monitor.event("resume", found.step, checkpoint=found.path.name)


def _blame(trouble: NotFinite, packs: list[PackedBatch]) -> str:
    """Where a loss that is not finite comes from."""
    examples = sorted(trouble.examples)
    if len(examples) == sum(pack.sequences for pack in packs):
        return "for every example: it is the weights, not a text"
    return (
        f"for the examples {', '.join(map(str, examples[:8]))}{' ...' if len(examples) > 8 else ''} of the epoch"
        if examples
        else "in no single example"
    )


def _go_on(setup: Setup) -> str:
    return f"go on with: fastbert pretrain {setup.start.run / 'config.toml'} --resume"


def _flops(setup: Setup, packs: list[PackedBatch]) -> float:
    """Operations of this rank's part of a step, as it is computed: the share of the peak then says how busy the processor is."""
    lengths = [n for pack in packs for n in pack.cu_seqlens.diff().tolist()]
    masked, pairs = (sum(len(tensor) for tensor in tensors) for tensors in zip(*((p.labels, p.examples) for p in packs), strict=True))
    return executed_flops(setup.config.model, setup.store.vocab_size, lengths, masked, pairs if setup.config.objective.pairs else 0)
