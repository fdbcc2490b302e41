"""How far a run is: what was done, how that compares with the recipe's stop conditions, and which of them ends it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from fastbert.config import RunConfig


@dataclass
class TrainState:
    """Counters of the whole run, over every interruption; they are kept in the checkpoint.

    `seconds` is the time from the first step on, evaluations and saving counted, the pauses between two processes not.
    """

    step: int = 0  # batches done: optimizer steps, and those that were skipped
    tokens: int = 0  # real tokens seen, [CLS] and [SEP] counted
    seconds: float = 0.0
    heldout_loss: float | None = (
        None  # of the last evaluation; None before the first one, and where it was not finite
    )
    best_loss: float | None = None  # the lowest, by min_delta at least (see `update_best`)
    evals_since_best: int = 0  # evaluations since then, or all of them
    skipped: int = 0  # steps that were not applied, since their loss or gradient was not finite
    skipped_in_a_row: int = 0

    @property
    def updates(self) -> int:
        """Optimizer steps that were applied."""
        return self.step - self.skipped

    def applied_since(self, step: int) -> bool:
        """Whether a step after `step` was applied: then the weights of that time have given a finite loss and gradient."""
        return self.step - self.skipped_in_a_row > step

    def applied(self, tokens: int) -> None:
        """Count a step of so many tokens."""
        self.step += 1
        self.tokens += tokens
        self.skipped_in_a_row = 0

    def skip(self) -> None:
        """Count a step that was not applied; its examples are behind the run all the same."""
        self.step += 1
        self.skipped += 1
        self.skipped_in_a_row += 1

    def update_best(self, heldout_loss: float, min_delta: float) -> None:
        """Take note of an evaluation: is it better than the best by `min_delta` nats or more (by anything, where that is 0)?

        One that is not finite is no better than anything.
        """
        if not math.isfinite(heldout_loss):
            self.heldout_loss, self.evals_since_best = None, self.evals_since_best + 1
            return
        self.heldout_loss = heldout_loss
        better = self.best_loss is None or (
            heldout_loss < self.best_loss and self.best_loss - heldout_loss >= min_delta
        )
        self.best_loss, self.evals_since_best = (
            (heldout_loss, 0) if better else (self.best_loss, self.evals_since_best + 1)
        )


class StopCriteria:
    """The recipe's limits against a TrainState.

    Args:
        config: with none of stop.steps, epochs, tokens and seconds, one epoch is the limit.
        steps_per_epoch: examples of an epoch by those of a step; need not be whole.
    """

    def __init__(self, config: RunConfig, steps_per_epoch: float):
        stop = config.stop
        epochs = stop.epochs
        if not (stop.steps or epochs or stop.tokens or stop.seconds):
            epochs = 1.0
        limits: list[tuple[str, str, float | None, Callable[[TrainState], float]]] = [
            (f"stop.steps = {stop.steps}", "steps", stop.steps, lambda done: done.step),
            (
                f"stop.epochs = {epochs:g}" if epochs else "",
                "steps",
                epochs and epochs * steps_per_epoch,
                lambda done: done.step,
            ),
            (f"stop.tokens = {stop.tokens}", "tokens", stop.tokens, lambda done: done.tokens),
            (f"stop.seconds = {stop.seconds}", "seconds", stop.seconds, lambda done: done.seconds),
        ]
        self._limits = [
            (name, unit, limit, amount) for name, unit, limit, amount in limits if limit
        ]
        self._over = config.schedule.over
        self._stop = stop

    def scheduled(self, done: TrainState) -> float:
        """Share of the learning rate's horizon, 0 to 1: the nearest limit in the unit of schedule.over; 0 without one (a flat schedule)."""
        return max(
            (amount(done) / limit for _, unit, limit, amount in self._limits if unit == self._over),
            default=0.0,
        )

    def share(self, done: TrainState) -> float:
        """Share of the run, 0 to 1, by the limit that will be reached first at this pace."""
        return min(1.0, max(amount(done) / limit for _, _, limit, amount in self._limits))

    def seconds_left(self, done: TrainState) -> float | None:
        """At the run's mean pace; None before the first step."""
        share = self.share(done)
        return max(0.0, done.seconds * (1.0 / share - 1.0)) if share and done.seconds else None

    def reached(self, done: TrainState) -> str | None:
        """The condition that ends the run, in words, or None."""
        for name, _, limit, amount in self._limits:
            if amount(done) >= limit:
                return name
        if (
            self._stop.loss
            and done.heldout_loss is not None
            and done.heldout_loss <= self._stop.loss
        ):
            return f"stop.loss = {self._stop.loss}: the held-out loss is {done.heldout_loss:.4f}"
        if self._stop.patience and done.evals_since_best >= self._stop.patience:
            found = (
                "none has been finite"
                if done.best_loss is None
                else f"no better than {done.best_loss:.4f}"
            )
            return f"stop.patience = {self._stop.patience}: {found} for {done.evals_since_best} evaluations"
        return None
