"""How far a run is, and which of the recipe's stop conditions ends it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from fastbert.config import RunConfig
from fastbert.errors import InputError

_LOSSES = ("heldout_loss", "best_loss")
_MOST = 2**63


@dataclass
class TrainState:
    """Counters of the whole run, across interruptions; checkpoints contain them.

    Attributes:
        step: batches done: optimizer steps, including those that were skipped.
        tokens: real tokens seen, including [CLS] and [SEP].
        seconds: time since the first step, including evaluations and saving, without the pauses
            between two processes.
        heldout_loss: of the last evaluation, in nats; None before the first one, and where it was
            not finite.
        best_loss: the lowest held-out loss by a margin of min_delta (see `update_best`).
        evals_since_best: evaluations since that one.
        skipped: steps that were not applied, since their loss or gradient was not finite.
        skipped_in_a_row: how many of the last steps were skipped.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    heldout_loss: float | None = None
    best_loss: float | None = None
    evals_since_best: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0

    @classmethod
    def read(cls, values: Any, source: str) -> TrainState:
        """Check and read the counters in a checkpoint's metadata.

        Keys of a later release are left out, and keys that an earlier one did not have are 0.

        Args:
            values: the object in the metadata.
            source: the checkpoint, for messages.

        Raises:
            InputError: it is no object, or a value is not what the attributes above say.
        """
        if not isinstance(values, dict) or "step" not in values:
            raise InputError(f"{source}: no counters of a run in its metadata; take another one")
        given = {item.name: values[item.name] for item in fields(cls) if item.name in values}
        for name, value in given.items():
            kinds: Any = (int, float) if name in ("seconds", *_LOSSES) else int
            fits = isinstance(value, kinds) and not isinstance(value, bool) and 0 <= value < _MOST
            if not fits and not (value is None and name in _LOSSES):
                raise InputError(f"{source}: progress.{name} = {value!r:.40}; take another one")
        state = cls(**given)
        if not state.skipped_in_a_row <= state.skipped <= state.step:
            raise InputError(f"{source}: more steps are skipped than were made; take another one")
        return state

    @property
    def updates(self) -> int:
        """Optimizer steps that were applied."""
        return self.step - self.skipped

    def applied_since(self, step: int) -> bool:
        """Whether a step after `step` was applied.

        Then the weights at `step` have given a finite loss and gradient.
        """
        return self.step - self.skipped_in_a_row > step

    def applied(self, tokens: int) -> None:
        """Count an applied step and its tokens."""
        self.step += 1
        self.tokens += tokens
        self.skipped_in_a_row = 0

    def skip(self) -> None:
        """Count a step that was not applied; its examples count as seen all the same."""
        self.step += 1
        self.skipped += 1
        self.skipped_in_a_row += 1

    def forget_best(self) -> None:
        """Forget the lowest held-out loss, since another text is held out."""
        self.heldout_loss, self.best_loss, self.evals_since_best = None, None, 0

    def update_best(self, heldout_loss: float, min_delta: float) -> None:
        """Record an evaluation.

        Args:
            heldout_loss: nats. One that is not finite is never better.
            min_delta: by how many nats a loss must be lower than the best to replace it; 0 means
                by any amount.
        """
        if not math.isfinite(heldout_loss):
            self.heldout_loss, self.evals_since_best = None, self.evals_since_best + 1
            return
        self.heldout_loss = heldout_loss
        better = self.best_loss is None or (
            heldout_loss < self.best_loss and self.best_loss - heldout_loss >= min_delta
        )
        if better:
            self.best_loss, self.evals_since_best = heldout_loss, 0
        else:
            self.evals_since_best += 1


class StopCriteria:
    """The recipe's limits, compared with a TrainState.

    Args:
        config: the recipe. Where it has none of stop.steps, epochs, tokens and seconds, the limit
            is one epoch.
        steps_per_epoch: examples per epoch divided by examples per step; need not be whole.
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
        """How much of the learning rate's horizon is done, 0 to 1.

        The horizon is the nearest limit in the unit of schedule.over. Without such a limit (a
        constant schedule) the result is 0.
        """
        return max(
            (amount(done) / limit for _, unit, limit, amount in self._limits if unit == self._over),
            default=0.0,
        )

    def share(self, done: TrainState) -> float:
        """How much of the run is done, 0 to 1, by the limit that is reached first at this pace."""
        return min(1.0, max(amount(done) / limit for _, _, limit, amount in self._limits))

    def seconds_left(self, done: TrainState) -> float | None:
        """The time left at the run's mean pace, in seconds; None before the first step."""
        share = self.share(done)
        return max(0.0, done.seconds * (1.0 / share - 1.0)) if share and done.seconds else None

    def reached(self, done: TrainState) -> str | None:
        """The stop condition that ends the run, as text; None where none is reached."""
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
            return (
                f"stop.patience = {self._stop.patience}: "
                f"{found} for {done.evals_since_best} evaluations"
            )
        return None
