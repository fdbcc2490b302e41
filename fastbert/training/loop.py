"""`pretrain` runs a recipe: it sets up, trains until the run ends, and reports failures."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager

import torch

from fastbert import storage
from fastbert.checkpoints import checkpoint
from fastbert.checkpoints.bucket import BucketLock, InBucket
from fastbert.checkpoints.ownership import LostOwnership, RunLock
from fastbert.checkpoints.saver import Destination, OnDisk, Saver
from fastbert.cluster.group import Group, Interrupted, RankLost, form_group
from fastbert.cluster.signals import StopRequest
from fastbert.cluster.watchdog import Watchdog
from fastbert.config import RunConfig
from fastbert.data.prefetch import STEPS_AHEAD, Prefetch
from fastbert.errors import InputError
from fastbert.machine import (
    MOST_PROCESSES,
    check_threads,
    measure_gemm_rate,
    share_cores,
)
from fastbert.out_of_memory import shortage
from fastbert.terminal import tell
from fastbert.training.ending import FAILED, INTERRUPTED, Ending, conclude, how_to_resume
from fastbert.training.engine import Engine
from fastbert.training.monitor import Monitor
from fastbert.training.run import Consensus, Run
from fastbert.training.run_folder import take_folder
from fastbert.training.setup import Setup, set_up

# Threads of a run beside those that compute: about ten of torch, gloo and our own, and some spare.
THREADS = 16


class Ended(Exception):
    """The run failed for a reason outside its code; the message is one line for the user."""


def pretrain(
    config: RunConfig, recipe: str, resume: bool, stop_request: StopRequest | None = None
) -> Ending:
    """Train as the recipe says, from the beginning or from the newest valid checkpoint of its run.

    Every rank calls it.

    Args:
        config: the resolved recipe.
        recipe: its path, for messages.
        resume: resume the run that is in the folder.
        stop_request: one that already receives signals; by default a new one.

    Returns:
        The exit code and the reason. A reason that `Monitor.stop` has not shown is on stderr.

    Raises:
        InputError: the recipe, the dataset, DeepSpeed's settings or the run folder is wrong, or too
            few threads can be started; nothing has been written then. Or text of a dataset larger
            than a window turned out to be damaged during the run.
    """
    children = MOST_PROCESSES - 1  # of parallel_model.py, at most, with two threads each
    check_threads("a run", THREADS + torch.get_num_threads() + 2 * children)
    timeout_s = config.runtime.timeout_s
    with stop_request or StopRequest() as stop_request:
        try:
            with (
                form_group(timeout_s, stop_request) as group,
                Watchdog(group, timeout_s, storage.waits) as watchdog,
            ):
                group.connect()
                watchdog.tick("the set-up")
                if group.device.type == "cpu":
                    share_cores(group.local_world)
                setup = set_up(config, recipe, resume, group)
                with closing(setup.start):
                    return _open_and_train(setup, group, watchdog, stop_request)
        except Interrupted as signal:
            ending = Ending(INTERRUPTED, f"interrupted by {signal} before the first step")
            tell(ending.reason)
        except RankLost as end:
            ending = Ending(FAILED, f"{end}; resume with --resume")
            tell(ending.reason)
        except Ended as end:
            ending = Ending(FAILED, str(end))
            tell(end)
        return ending


def train(run: Run) -> Ending:
    """Step, evaluate and save until a stop condition, a signal or diverged weights end the run."""
    every = run.setup.config.evaluate.every
    reason = run.criteria.reached(run.state)
    while reason is None and not (run.stop or run.diverged):
        run.step()
        reason = run.criteria.reached(run.state)
        if (reason or run.state.step % every == 0) and not run.diverged:
            run.evaluate()
            reason = run.criteria.reached(run.state)
        run.save_when_due()
    last = run.save_at_the_end(finished=reason is not None)
    return conclude(run, reason, last)


def _open_and_train(
    setup: Setup, group: Group, watchdog: Watchdog, stop_request: StopRequest
) -> Ending:
    """Take the run folder, build the engine, and train.

    Raises:
        Ended: the disk or the memory failed, or another start took over the run; the message is one
            line, which the other ranks get too.
    """
    try:
        return _open_run(setup, group, watchdog, stop_request)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        reason = f"{where}{error.strerror or error}"
        line = f"run failed: {reason}; fix this, then {how_to_resume(setup)}"
        watchdog.report_exit(line)
        raise Ended(line) from error
    except LostOwnership as error:
        watchdog.report_exit(str(error))
        raise Ended(f"the run ended here: {error}") from error
    except RankLost:  # its text may quote another rank that is out of memory
        raise
    except (MemoryError, RuntimeError) as error:
        if (lacking := shortage(error)) is None:
            raise
        tokens = setup.config.batch.micro_batch_tokens
        lower = f"lower batch.micro_batch_tokens (now {tokens:,}) or take a smaller model"
        line = f"{lacking}; {lower}, then {how_to_resume(setup)}"
        watchdog.report_exit(line)
        raise Ended(f"{group.name(group.rank)}: {line}" if group.world > 1 else line) from error


def _open_run(setup: Setup, group: Group, watchdog: Watchdog, stop_request: StopRequest) -> Ending:
    config, state, folder = setup.config, setup.state, setup.start.run
    found = setup.start.checkpoint
    watchdog.tick("the run folder")
    lock = take_folder(setup, group)
    destination: Destination = OnDisk(folder / "checkpoints", config.checkpoint.keep)
    if setup.start.bucket is not None:
        destination = InBucket(setup.start.bucket, int(lock.token), config.checkpoint.keep)
    saver = Saver(group, destination, lock.token)
    saver.sweep()
    watchdog.tick("building the engine")
    tensors = checkpoint.read_all(found.path) if found else None
    peak, cores = _peak(setup, group), torch.get_num_threads()
    with (
        _last_records(setup, group, lock),
        Engine(
            setup.model,
            config,
            setup.settings,
            setup.precision.parameters,
            group,
            tensors,
            state.updates,
            setup.at_once,
        ) as engine,
        Monitor(
            folder,
            step=0 if setup.start.branches else state.step,
            criteria=setup.criteria,
            peak=peak,
            vocab_size=setup.dataset.vocab_size,
            recipe=config,
            baselines=setup.baselines,
            is_main=group.is_main,
        ) as monitor,
        Prefetch(setup.batches, state.step, group.rank, group.world, setup.at_once) as feed,
    ):
        _introduce(setup, group, engine, monitor, cores)
        consensus = Consensus(group, stop_request, lock, time.monotonic() - state.seconds)
        try:
            for step in range(state.step, state.step + STEPS_AHEAD) if feed.lanes > 1 else ():
                feed.settle(step, consensus.agree(True, feed.facts(step)).sums)
            return train(Run(setup, group, consensus, engine, monitor, saver, feed))
        except InputError as error:  # damage in a window of text that was opened during the run
            line = f"run failed: {error}; then {how_to_resume(setup)}"
            watchdog.report_exit(line)
            saver.give_up()
            raise InputError(line) from None


@contextmanager
def _last_records(setup: Setup, group: Group, lock: RunLock | BucketLock) -> Iterator[None]:
    """Upload the records of a run in a bucket after the monitor has closed them."""
    try:
        yield
    finally:
        if isinstance(lock, BucketLock) and setup.start.bucket is not None and group.is_main:
            lock.close()
            try:
                setup.start.bucket.upload_records(lock.number)
            except LostOwnership:  # the newer start's records stay
                pass
            except (OSError, InputError) as error:
                tell(f"{setup.start.place}: its last records could not be uploaded: {error}")


def _introduce(setup: Setup, group: Group, engine: Engine, monitor: Monitor, cores: int) -> None:
    """Report what was resolved, and where the run begins."""
    for note in setup.start.notes:
        monitor.say(note)
    parameters = sum(p.numel() for p in setup.model.parameters())
    ranks = f"{group.world} ranks, " if group.world > 1 else ""
    at_once = f" in {setup.at_once} processes" if setup.at_once > 1 else ""
    monitor.say(
        f"{setup.start.place}: {parameters:,} parameters, "
        f"{setup.batches.examples_per_epoch:,} examples an epoch, on {ranks}{group.device}, "
        f"{setup.precision.name} ({setup.precision.why}), kernels {setup.model.impl}, "
        f"ZeRO stage {engine.stage}, {cores} threads{at_once}"
    )
    positions = setup.config.model.max_position_embeddings
    longest = max(setup.trained_length, setup.config.longest)
    if longest < positions:
        monitor.say(
            f"note: batch.max_length = {longest}: the model will read texts of {longest} tokens at "
            f"most, since its positions up to max_position_embeddings = {positions} stay untrained"
        )
    if (found := setup.start.checkpoint) is not None and setup.start.branches:
        monitor.say(f"branching after step {found.step:,} from {found.place}")
        monitor.event("branch", found.step, checkpoint=str(found.place))
    elif found is not None:
        monitor.say(f"resuming after step {found.step:,} from {found.place}")
        monitor.event("resume", found.step, checkpoint=found.path.name)


def _peak(setup: Setup, group: Group) -> float | None:
    """FLOP/s of all ranks together, extrapolated from rank 0; None on the other ranks."""
    if not group.is_main:
        return None
    parameters = torch.bfloat16 if setup.precision.parameters == "bf16" else torch.float32
    dtypes = parameters, setup.precision.operands
    return gemm_rate(*dtypes, str(group.device), torch.get_num_threads()) * group.world


@functools.cache
def gemm_rate(dtype: torch.dtype, operands: torch.dtype | None, device: str, threads: int) -> float:
    """FLOP/s of this process, measured at the first run in it, since that takes half a second.

    Args:
        dtype, operands: of the factors, as in `measure_gemm_rate`.
        device: "cpu", "cuda" or "cuda:N".
        threads: torch's number of threads, on which the rate depends.
    """
    return measure_gemm_rate(dtype, device=device, operands=operands)
