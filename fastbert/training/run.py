"""A training run: the objects of one rank, and what the ranks agree on after each step."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fastbert.checkpoints.bucket import BucketLock
from fastbert.checkpoints.ownership import RunLock
from fastbert.checkpoints.saver import Saved, Saver
from fastbert.cluster.group import Group
from fastbert.cluster.signals import StopRequest
from fastbert.data.packing import PackedBatch
from fastbert.data.phases import Phase
from fastbert.data.prefetch import STEPS_AHEAD, Prefetch
from fastbert.planning.flops import executed_flops
from fastbert.storage import Place, place
from fastbert.training.engine import Engine, NotFinite
from fastbert.training.heldout import HeldOut, together
from fastbert.training.monitor import Monitor
from fastbert.training.schedule import factor
from fastbert.training.setup import Setup
from fastbert.training.train_state import StopCriteria, TrainState


@dataclass(frozen=True)
class Agreement:
    """What one sum over all ranks decides after each step.

    Attributes:
        seconds: training time by rank 0's clock.
        stop: some rank was asked to stop.
        written: every rank has written its part of the save in flight.
        sums: of the numbers that the ranks brought along.
    """

    seconds: float
    stop: bool
    written: bool
    sums: list[float]


class Consensus:
    """Keeps the ranks together: rank 0's clock, stop requests, the folder's lock.

    Args:
        group: the run's processes.
        stop_request: this process's signals.
        lock: the ownership of the run folder.
        began: when the first step would have begun without interruptions, as `time.monotonic()`.
    """

    def __init__(
        self,
        group: Group,
        stop_request: StopRequest,
        lock: RunLock | BucketLock,
        began: float,
    ):
        self.stop_request, self._lock = stop_request, lock
        self._group, self._began = group, began
        # The sum of a single process stays on the CPU, so that it does not wait for the GPU.
        self._device = group.device if group.world > 1 else torch.device("cpu")

    def agree(self, written: bool, numbers: Sequence[float] = ()) -> Agreement:
        """Agree with the other ranks, by one collective.

        Args:
            written: this rank has written its part of the save in flight.
            numbers: to be summed as well; as many on every rank.
        """
        clock = time.monotonic() - self._began if self._group.is_main else 0.0
        mine = [clock, self.stop_request.asked is not None, not written, *numbers]
        total = torch.tensor(mine, dtype=torch.float64, device=self._device)
        seconds, stop, writing, *sums = self._group.sum(total).tolist()
        return Agreement(seconds, stop > 0, writing == 0, sums)

    def check_lock(self) -> None:
        """Check, on rank 0, that this start still owns the run folder.

        Raises:
            LostOwnership: a newer start has taken it over.
        """
        if self._group.is_main:
            self._lock.check()


class Run:
    """One training run. The loop calls its methods in turn; every rank calls the same ones.

    A checkpoint is published, and older ones are deleted for it, only after its weights have given
    a finite loss and gradient. One step can break weights that look valid, and then every later
    step is skipped.

    Attributes:
        stop: a rank was asked to stop.
        diverged: the weights give no finite loss any more.
        learned: this process has applied a step.
        newest: the newest checkpoint that was published; None before the first.
    """

    def __init__(
        self,
        setup: Setup,
        group: Group,
        consensus: Consensus,
        engine: Engine,
        monitor: Monitor,
        saver: Saver,
        feed: Prefetch,
    ):
        self.setup, self.group, self.consensus = setup, group, consensus
        self.engine, self.monitor, self.saver, self.feed = engine, monitor, saver, feed
        self.stop = self.diverged = False
        found = setup.start.checkpoint
        self.newest: Place | None = place(found.place) if found else None
        self._saved, self._due, self._written = self.state.step, False, True
        # The held-out losses of the current weights; None where they have not been measured.
        self._found: HeldOut | None = None
        # This rank's packs of the last applied step.
        self._last_applied: list[PackedBatch] | None = None
        self._phase: Phase | None = None

    @property
    def state(self) -> TrainState:
        return self.setup.state

    @property
    def criteria(self) -> StopCriteria:
        return self.setup.criteria

    @property
    def learned(self) -> bool:
        return self._last_applied is not None

    def step(self) -> None:
        """Take the next batch, and apply its gradient if that is finite."""
        state, result = self.state, None
        self._begin_phase()
        self.group.tick(f"step {state.step + 1}")
        number, packs, waited = next(self.feed)
        started = time.perf_counter()
        lr = self._lr()
        try:
            result = self.engine.step(packs, lr)
            state.applied(result.tokens)
            self._found, self._last_applied = None, packs
        except NotFinite as error:
            self._skip(error)
        self._written = self._agree(number + STEPS_AHEAD)
        self.consensus.check_lock()
        if result is not None:
            seconds = waited + time.perf_counter() - started
            flops = _flops(self.setup, packs) * self.group.world
            self.monitor.step(state, result, lr=lr, seconds=seconds, waited=waited, flops=flops)

    def evaluate(self) -> None:
        """Measure the held-out losses."""
        started = time.perf_counter()
        sources, mask_id = self.setup.heldout_now, self.setup.dataset.special.mask
        found = [self.engine.evaluate(source.batches, mask_id) for source in sources]
        self._found = together(found, [source.share for source in sources])
        seconds = time.perf_counter() - started
        self.state.update_best(self._found.loss, self.setup.config.stop.min_delta)
        self._agree()
        by_source = {s.name: one for s, one in zip(sources, found, strict=True)}
        self.monitor.evaluate(self.state, self._found, seconds, by_source)

    def save_when_due(self) -> None:
        """Publish the save in flight if it is written and proven; begin the next one if it is due.

        A save is proven when a later step has given a finite loss and gradient.
        """
        if self.saver.busy and self._written and self.state.applied_since(self._saved):
            self._note(self.saver.finish())
        self._due = self._due or self.state.step % self.setup.config.checkpoint.every == 0
        if self._due and not self.state.skipped_in_a_row:
            # This waits only where a save takes longer than the steps between two saves.
            self._note(self.saver.wait())
            self._begin_save()

    def save_at_the_end(self, finished: bool) -> Saved | None:
        """Save the last weights if they give a finite loss.

        Args:
            finished: a stop condition was reached, so the last weights are judged by the held-out
                loss.

        Returns:
            The result of the save; None where nothing was left to save.
        """
        self.group.tick("the last checkpoint")
        if finished and self._found is None and self.state.heldout_loss is None:
            self.evaluate()  # a finished run was started again, and is judged as before
        if self.saver.busy and self.state.applied_since(self._saved):
            self._note(self.saver.wait())
        last = None
        finite = self._found is not None and self._found.finite
        if not self.diverged and self._saved != self.state.step and (self.learned or finite):
            if self.saver.busy:
                # It has the same weights, from before the steps that were skipped.
                self.saver.discard("")
            self._begin_save()
        if self.saver.busy and self._is_proven():
            last = self.saver.wait()
            self._note(last)
        elif self.saver.busy:
            self._note(self.saver.discard("its weights give no finite loss"))
            self.diverged = True
        self.saver.wait()
        return last

    def _lr(self) -> float:
        """The learning rate of the next step, by the schedule of its phase or of the run."""
        config, step = self.setup.config, self.state.step
        phase = self.setup.batches.timetable.phase_at(step)
        if phase.settings.schedule is not None:
            return config.optimizer.lr * factor(phase.settings.schedule, phase.share(step))
        return config.optimizer.lr * factor(config.schedule, self.criteria.scheduled(self.state))

    def _begin_phase(self) -> None:
        """Report a phase that begins with the next step.

        With another max_length the held-out text is another one, so the best loss is forgotten.
        """
        timetable, step = self.setup.batches.timetable, self.state.step
        phase = timetable.phase_at(step)
        if len(timetable.phases) == 1 or phase is self._phase:
            return
        self._phase = phase
        self.monitor.phase(step, phase)
        if step == phase.first and phase.number > 1:
            before = timetable.phases[phase.number - 2].config.batch
            if before.max_length != phase.config.batch.max_length:
                self.state.forget_best()

    def _skip(self, error: NotFinite) -> None:
        """Count a step that was not applied, and report the examples that caused it."""
        self.state.skip()
        bad_examples = sorted(
            example for examples in self.group.gather(error.examples) for example in examples
        )
        sequences = self.setup.batches.timetable.at(self.state.step - 1).sequences
        self.monitor.skip(self.state.step, str(error), bad_examples, sequences)
        self.diverged = self.state.skipped_in_a_row > self.setup.config.stop.skipped

    def _agree(self, ahead: int | None = None) -> bool:
        """Agree with the other ranks on the time and on stopping.

        Args:
            ahead: a later step, of which the ranks exchange the facts of their lanes.

        Returns:
            Whether all ranks have written their part of the save in flight.
        """
        facts = [] if ahead is None else self.feed.facts(ahead)
        agreement = self.consensus.agree(self.saver.written, facts)
        if ahead is not None:
            self.feed.settle(ahead, agreement.sums)
        self.state.seconds, self.stop = agreement.seconds, agreement.stop
        return agreement.written

    def _begin_save(self) -> None:
        self.saver.begin(self.state.step, self.engine.tensors(), self.setup.metadata)
        self._saved, self._due = self.state.step, False

    def _note(self, save: Saved | None) -> None:
        self.monitor.saved(save)
        self.newest = save.path if save and save.path else self.newest

    def _is_proven(self) -> bool:
        """Whether the weights give a finite loss.

        Where the last evaluation does not answer this, the batch of the last applied step does.
        """
        finite = self._found is not None and self._found.finite
        if finite and (not self.state.skipped_in_a_row or self._last_applied is None):
            return True
        assert self._last_applied is not None
        self.group.tick("the step that the last checkpoint waits for")
        try:
            # This may change the optimizer's state, but the save has its own copy.
            self.engine.step(self._last_applied, lr=0.0)
            return True
        except NotFinite:
            return False


def _flops(setup: Setup, packs: list[PackedBatch]) -> float:
    """Executed FLOPs of this rank's part of a step; over the peak they give the utilization."""
    lengths = [n for pack in packs for n in pack.cu_seqlens.diff().tolist()]
    masked, pairs = (
        sum(map(len, tensors))
        for tensors in zip(*((p.labels, p.examples) for p in packs), strict=True)
    )
    pairs = pairs if setup.config.objective.pairs else 0
    return executed_flops(setup.config.model, setup.dataset.vocab_size, lengths, masked, pairs)
