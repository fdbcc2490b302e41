"""`pretrain`: a recipe and a store become a run."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from fastbert.checkpoints import checkpoint
from fastbert.checkpoints.ownership import Ownership, TakenOver
from fastbert.checkpoints.saver import Saved, Saver
from fastbert.cluster.group import Group, Interrupted, RankLost, meet_others
from fastbert.cluster.signals import Interruption
from fastbert.cluster.watchdog import Watch
from fastbert.config import RunConfig
from fastbert.data.packing import PackedBatch
from fastbert.data.prefetch import Prefetch
from fastbert.machine import measure_gemm_rate
from fastbert.out_of_memory import shortage
from fastbert.planning.flops import executed_flops
from fastbert.training.engine import Engine, NotFinite
from fastbert.training.heldout import HeldOut
from fastbert.training.initial import Read
from fastbert.training.monitor import Monitor
from fastbert.training.schedule import factor
from fastbert.training.setup import Setup, set_up, take_folder

DONE, FAILED, INTERRUPTED = 0, 1, 75  # exit codes; 75 is EX_TEMPFAIL: a scheduler may start it again
LOWER = 10  # a run that diverged is to be resumed with its rate by this


class Ended(Exception):
    """The run has failed, for a reason that is none of its code; one line for the user."""


def pretrain(config: RunConfig, recipe: str, resume: bool, interruption: Interruption | None = None, read: Read | None = None) -> int:
    """Train as the recipe says, from the beginning or from the newest sound checkpoint of its run; every rank of the launcher calls it.

    Args:
        config: the resolved recipe.
        recipe: its path, for messages.
        resume: resume the run that is in the folder.
        interruption: one that has listened to signals already; by default a new one.
        read: opens the model that the recipe's `init` names, where it names one.

    Returns:
        0 when a stop condition was reached, 1 when the run failed, 75 when it was interrupted and a checkpoint saved.

    Raises:
        InputError: the recipe, the store, ds_config.json or the run folder is wrong; nothing has been written then.
    """
    with interruption or Interruption() as interruption:
        try:
            with meet_others(config.runtime.timeout_s, interruption) as group, Watch(group, config.runtime.timeout_s) as watch:
                group.connect()
                watch.tick("the set-up")
                setup = set_up(config, recipe, resume, group, read)
                return _run(setup, group, watch, interruption)
        except Interrupted as signal:
            print(f"interrupted by {signal} before the first step", file=sys.stderr)
            return INTERRUPTED
        except RankLost as end:
            print(f"fastbert: {end}; resume with --resume", file=sys.stderr)
            return FAILED
        except Ended as end:
            print(f"fastbert: {end}", file=sys.stderr)
            return FAILED


def _run(setup: Setup, group: Group, watch: Watch, interruption: Interruption) -> int:
    """Build what trains, and train; an end that is neither a stop condition nor a signal gets one clear line."""
    config, progress, run = setup.config, setup.progress, setup.start.run
    watch.tick("the run folder")
    owner = take_folder(setup, group)
    saver = Saver(group, run / "checkpoints", config.checkpoint.keep, owner.token)
    try:
        saver.sweep()
        watch.tick("building the engine")
        with (
            Engine(setup.model, config, setup.settings, setup.precision, group, _state(setup), progress.updates) as engine,
            Monitor(
                run,
                step=progress.step,
                horizon=setup.horizon,
                peak=_peak(setup, group),
                vocab_size=setup.store.vocab_size,
                pairs=config.objective.pairs,
                yardsticks=setup.store.yardsticks,
                speaks=group.speaks,
            ) as monitor,
            Prefetch(setup.batches, progress.step, group.rank, group.world) as feed,
        ):
            _introduce(setup, group, engine, monitor)
            return _train(setup, group, watch, interruption, owner, engine, monitor, saver, feed)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        line = f"the run failed: {where}{error.strerror or error}; fix this, then {_resume(setup)}"
        watch.farewell(line)
        raise Ended(line) from error
    except TakenOver as error:
        watch.farewell(str(error))
        raise Ended(f"the run ended here: {error}") from error
    except (MemoryError, RuntimeError) as error:
        if (lacking := shortage(error)) is None:
            raise
        line = f"{lacking}; lower batch.micro_batch_tokens (now {config.batch.micro_batch_tokens:,}), then {_resume(setup)}"
        watch.farewell(line)
        raise Ended(f"{group.name(group.rank)}: {line}" if group.world > 1 else line) from error


def _train(
    setup: Setup,
    group: Group,
    watch: Watch,
    interruption: Interruption,
    owner: Ownership,
    engine: Engine,
    monitor: Monitor,
    saver: Saver,
    feed: Prefetch,
) -> int:
    """The loop: steps, evaluations and checkpoints until a condition, a signal or too many losses that are not finite end it.

    A checkpoint gets its name, and older ones make room for it, only after its weights have given a finite loss and gradient: one step can
    break weights that look sound, so that every step after it is skipped.
    """
    config, progress, horizon = setup.config, setup.progress, setup.horizon
    began, saved, due, asked, hopeless = time.monotonic() - progress.seconds, progress.step, False, False, False
    newest = setup.start.checkpoint.path if setup.start.checkpoint else None
    found: HeldOut | None = None  # what the weights give as they are now, where that was measured
    last_applied: list[PackedBatch] | None = None  # this rank's packs of the last step that was applied

    def agree() -> tuple[bool, bool]:
        """Go by rank 0's clock; was any rank asked to stop, and have all of them written their part of the save in flight?"""
        mine = [time.monotonic() - began if group.speaks else 0.0, interruption.asked is not None, not saver.written]
        where = group.device if group.world > 1 else "cpu"  # alone there is nobody to send it to, and no GPU to wait for
        progress.seconds, asked, writing = group.sum(torch.tensor(mine, dtype=torch.float64, device=where)).tolist()
        return asked > 0, not writing

    def measure() -> HeldOut:
        started = time.perf_counter()
        found = engine.evaluate(setup.heldout, setup.store.special.mask)
        seconds = time.perf_counter() - started
        progress.judge(found.loss, config.stop.min_delta)
        agree()
        monitor.evaluate(progress, found, seconds)
        return found

    def note(save: Saved | None) -> None:
        nonlocal newest
        monitor.saved(save)
        newest = save.path if save and save.path else newest

    def begin() -> None:
        nonlocal saved, due
        saver.begin(progress.step, engine.tensors(), setup.metadata)
        saved, due = progress.step, False

    def proven() -> bool:
        """Do the weights give a finite loss? Where the last evaluation does not say so, the batch of the last applied step does, once more."""
        if found is not None and found.finite and (not progress.skipped_in_a_row or last_applied is None):
            return True
        assert last_applied is not None
        watch.tick("the step that the last checkpoint waits for")
        try:
            engine.step(last_applied, lr=0.0)  # the state is copied: what becomes of it here is lost
            return True
        except NotFinite:
            return False

    reason = horizon.reached(progress)
    while not (reason or asked or hopeless):
        watch.tick(f"step {progress.step + 1}")
        _, packs, waited = next(feed)
        started = time.perf_counter()
        lr = config.optimizer.lr * factor(config.schedule, horizon.scheduled(progress))
        try:
            result = engine.step(packs, lr)
            progress.applied(result.tokens)
            found, last_applied = None, packs
        except NotFinite as trouble:
            result = None
            progress.skip()
            monitor.skip(progress.step, str(trouble), _culprits(group, trouble), config.batch.sequences)
            hopeless = progress.skipped_in_a_row > config.stop.skipped
        asked, written = agree()
        if group.speaks:
            owner.check()
        if result:
            seconds = waited + time.perf_counter() - started
            monitor.step(progress, result, lr=lr, seconds=seconds, waited=waited, flops=_flops(setup, packs) * group.world)

        reason = horizon.reached(progress)
        if (reason or progress.step % config.evaluate.every == 0) and not hopeless:
            found = measure()
            reason = horizon.reached(progress)
        if saver.busy and written and progress.applied_since(saved):
            note(saver.finish())
        due = due or progress.step % config.checkpoint.every == 0
        if due and not progress.skipped_in_a_row:
            note(saver.wait())  # only where saving takes longer than the steps between
            begin()

    watch.tick("the last checkpoint")
    if reason and found is None and progress.heldout_loss is None:
        found = measure()  # a finished run that was started again: its end is judged as before
    if saver.busy and progress.applied_since(saved):
        note(saver.wait())
    last, learned = None, last_applied is not None
    if not hopeless and saved != progress.step and (learned or (found is not None and found.finite)):
        if saver.busy:
            saver.discard("")  # of the same weights, before steps that were skipped
        begin()
    if saver.busy and proven():
        last = saver.wait()
        note(last)
    elif saver.busy:
        note(saver.discard("its weights give no finite loss"))
        hopeless = True
    saver.wait()
    return _conclude(setup, monitor, reason, interruption, last, newest, hopeless, learned)


def _conclude(
    setup: Setup,
    monitor: Monitor,
    reason: str | None,
    interruption: Interruption,
    last: Saved | None,
    newest: Path | None,
    hopeless: bool,
    learned: bool,
) -> int:
    """Say why the run ended and what the user may do; returns the exit code.

    Args:
        reason: the stop condition that was reached.
        last: how the last save ended.
        newest: the newest checkpoint.
        hopeless: the weights give no finite loss.
        learned: a step of this process was applied.
    """
    config, progress = setup.config, setup.progress
    code, advice = DONE, ""
    if hopeless:
        code, advice = FAILED, _after_divergence(setup, newest, learned)
        if progress.skipped_in_a_row > config.stop.skipped:
            reason = f"stop.skipped = {config.stop.skipped}: {progress.skipped_in_a_row} steps in a row were not finite"
        else:
            reason = f"{reason or _signal(interruption)}, but the weights give no finite loss any more"
    elif reason is None:
        code, advice = INTERRUPTED, _resume(setup)
        reason = _signal(interruption)
    elif progress.heldout_loss is None:
        code, advice = (
            FAILED,
            f"the training losses of the newest checkpoint, {newest}, are finite; resume from an earlier one with a lower optimizer.lr",
        )
        reason = f"{reason}, but the held-out loss is not finite"
    if last and last.problem and not hopeless:
        code, advice = FAILED, f"fix this, then {_resume(setup)}"
        reason = f"{reason}, but it could not be saved: {last.problem}"
    monitor.stop(progress.step, reason, advice)
    return code


def _signal(interruption: Interruption) -> str:
    return f"interrupted by {interruption.asked or 'another rank'}"


def _after_divergence(setup: Setup, newest: Path | None, learned: bool) -> str:
    """What the user may do when the weights give no finite loss any more."""
    lower = f"{_command(setup)} optimizer.lr={setup.config.optimizer.lr / LOWER:g}"
    if learned and newest is not None:
        return f"the newest checkpoint with finite losses is {newest}; resume from it with a lower rate: {lower}"
    if learned:
        return f"there is no checkpoint yet; start from the beginning with a lower rate: {lower}"
    if newest is not None:
        return f"no step was finite since {newest}; move that away, and --resume takes the checkpoint before it: {_command(setup)}"
    return "no step was finite since the start; look at init, model.initializer_range and the text"


def _introduce(setup: Setup, group: Group, engine: Engine, monitor: Monitor) -> None:
    """Say once what was resolved, and where the run begins."""
    for note in setup.start.notes:
        monitor.say(note)
    parameters = sum(p.numel() for p in setup.model.parameters())
    ranks = f"{group.world} ranks, " if group.world > 1 else ""
    monitor.say(
        f"{setup.start.run}: {parameters:,} parameters, {setup.batches.examples_per_epoch:,} examples an epoch, on {ranks}{group.device}, "
        f"{setup.precision} ({setup.precision_why}), kernels {setup.model.impl}, ZeRO stage {engine.stage}, {torch.get_num_threads()} threads"
    )
    if (found := setup.start.checkpoint) is not None:
        monitor.say(f"resuming after step {found.step:,} from {found.path}")
        monitor.event("resume", found.step, checkpoint=found.path.name)


def _state(setup: Setup) -> Mapping[str, Mapping[str, Tensor]] | None:
    """What the run resumes from, read one tensor at a time."""
    return checkpoint.read_all(setup.start.checkpoint.path) if setup.start.checkpoint else None


def _peak(setup: Setup, group: Group) -> float | None:
    """FLOP/s of all ranks, by a measurement on rank 0."""
    dtype = torch.bfloat16 if setup.precision == "bf16" else torch.float32
    return measure_gemm_rate(dtype, device=str(group.device)) * group.world if group.speaks else None


def _culprits(group: Group, trouble: NotFinite) -> list[int]:
    """Examples of the epoch whose loss is not finite, of all ranks."""
    return sorted(example for examples in group.gather(trouble.examples) for example in examples)


def _resume(setup: Setup) -> str:
    return f"resume with: {_command(setup)}"


def _command(setup: Setup) -> str:
    return f"fastbert pretrain {shlex.quote(str(setup.start.run / 'config.toml'))} --resume"


def _flops(setup: Setup, packs: list[PackedBatch]) -> float:
    """Operations of this rank's part of a step, as it is computed: the share of the peak then says how busy the processor is."""
    lengths = [n for pack in packs for n in pack.cu_seqlens.diff().tolist()]
    masked, pairs = (sum(len(tensor) for tensor in tensors) for tensors in zip(*((p.labels, p.examples) for p in packs), strict=True))
    return executed_flops(setup.config.model, setup.store.vocab_size, lengths, masked, pairs if setup.config.objective.pairs else 0)
