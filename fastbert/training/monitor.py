"""What a user sees of a run: terminal, log.txt, metrics.jsonl, loss.png, TensorBoard, trackers.

Only rank 0 writes and prints.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
import shutil
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, TextIO

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Column
from torch.utils.tensorboard import SummaryWriter

from fastbert.checkpoints.saver import Saved
from fastbert.config import LOSSES, RunConfig
from fastbert.data.mixture import source_of
from fastbert.data.phases import Phase
from fastbert.durable import named
from fastbert.terminal import can_redraw, one_line, safe
from fastbert.training import diagnosis
from fastbert.training.engine import StepResult
from fastbert.training.heldout import HeldOut
from fastbert.training.history import History
from fastbert.training.loggers import STOP_REASON, Loggers
from fastbert.training.metrics import LOSS_KEYS, STEP_KEYS, MetricsFile, read_metrics
from fastbert.training.picture import loss_figure, write_picture
from fastbert.training.train_state import StopCriteria, TrainState

LINE_EVERY_S = 5.0  # between two lines where there is no terminal
BAR_EVERY_S = 0.5  # between two updates of the progress bar
PICTURE_EVERY_S = 60.0  # drawing loss.png takes half a second
TENSORBOARD_EVERY = 10  # steps, since a scalar costs 0.05 ms

log = logging.getLogger("fastbert")


@dataclass
class _Window:
    """Sums since the terminal was last written to."""

    began: float
    steps: int = 0
    loss: float = 0.0
    tokens: int = 0
    flops: float = 0.0
    waited: float = 0.0


class Monitor:
    """Reports a run.

    Args:
        run: the run folder, which exists.
        step: optimizer steps done. At 0 the records of an unfinished run in the folder are deleted;
            otherwise they are continued.
        criteria: the recipe's limits, for the progress bar and the time left.
        peak: FLOP/s of all devices, for the fraction that is used; None leaves it out.
        vocab_size, baselines: of the dataset, for the diagnosis.
        recipe: the run's, for the same.
        is_main: False on every rank but the first, which then writes and prints nothing.

    Raises:
        OSError: from any method, when the disk refuses.
    """

    def __init__(
        self,
        run: Path,
        *,
        step: int,
        criteria: StopCriteria,
        peak: float | None,
        vocab_size: int,
        recipe: RunConfig,
        baselines: Mapping[str, float],
        is_main: bool = True,
    ):
        self.run, self.is_main, self._criteria = run, is_main, criteria
        self._peak, self._baselines = peak, baselines
        self._vocab_size, self._recipe = vocab_size, recipe
        # Warnings of libraries go to the log, where they do not break the progress bar.
        self._warnings = logging.getLogger("py.warnings")
        self._handlers = self._warnings.handlers
        before, self._level = warnings.showwarning, log.level
        logging.captureWarnings(True)
        # False where the program around this one had turned it on.
        self._captures = warnings.showwarning is not before
        if not is_main:
            self._warnings.handlers = [logging.NullHandler()]
            return
        fresh = step == 0
        if fresh:
            # Deleted and not opened with mode "w", which would empty the target of a link.
            (run / "log.txt").unlink(missing_ok=True)
        self._log_file = _LogFile(run / "log.txt", encoding="utf-8")
        self._log_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        log.setLevel(logging.INFO)
        log.addHandler(self._log_file)
        self._warnings.handlers = [self._log_file]
        self._metrics = MetricsFile(run / "metrics.jsonl", fresh)
        self._history = History(LOSS_KEYS)
        bad = self._history.bad
        self._history.read(read_metrics(run / "metrics.jsonl", bad))
        if fresh:
            shutil.rmtree(run / "tensorboard", ignore_errors=True)
        self._tensorboard = SummaryWriter(
            str(run / "tensorboard"), purge_step=None if fresh else step + 1
        )
        self._loggers = Loggers(run, recipe, fresh)
        self._console = Console(highlight=False, soft_wrap=True)
        self._redraws = can_redraw(self._console)
        columns = (
            TaskProgressColumn(table_column=Column(no_wrap=True)),
            # The bar gets the width that the text leaves.
            BarColumn(bar_width=None, table_column=Column(ratio=1)),
            TextColumn("{task.description}", table_column=Column(no_wrap=True)),
        )
        self._bar = Bar(*columns, console=self._console, auto_refresh=False, expand=True)
        self._task = self._bar.add_task("", total=1.0)
        if self._redraws:
            self._bar.start()
        self._window = _Window(time.perf_counter())
        self._drawn = time.perf_counter()
        self._norms = diagnosis.GradientNorm(recipe)
        self._losses = diagnosis.TrainingLoss(vocab_size, recipe)
        self._advised: set[str] = set()
        self._done = False  # a stop condition was reached
        if bad:
            self.say(
                f"{run / 'metrics.jsonl'}: {len(bad):,} of its lines cannot be read and are "
                f"left out; the first is line {bad[0]:,}"
            )

    def say(self, line: str) -> None:
        """Print one line for the user, and write it to log.txt."""
        if self.is_main:
            line = one_line(line)
            log.info(line)
            with self._printing():
                self._console.print(safe(line, self._console.encoding), markup=False)

    def event(self, kind: str, step: int, **values: Any) -> None:
        """Write an event to metrics.jsonl.

        Args:
            kind: "evaluate", "phase", "save", "skip", "resume", "branch" or "stop".
            step: optimizer steps done.
            values: further keys.
        """
        if self.is_main:
            self._metrics.write({"event": kind, "step": step, **values})

    def step(
        self,
        done: TrainState,
        result: StepResult,
        *,
        lr: float,
        seconds: float,
        waited: float,
        flops: float,
    ) -> None:
        """Report an optimizer step.

        Args:
            done: the counters, including this step.
            result: its losses and counts.
            lr: its learning rate.
            seconds: how long it took, including `waited`.
            waited: how many seconds it waited for its data.
            flops: its useful operations, over all ranks.
        """
        if not self.is_main:
            return
        values = {
            "step": done.step,
            **asdict(result),
            "lr": lr,
            "seconds": seconds,
            "tokens_per_s": result.tokens / seconds,
        }
        record = {key: values[key] for key in STEP_KEYS}
        self._metrics.write(record)
        self._history.add(record)
        if done.step % TENSORBOARD_EVERY == 0:
            self._scalars(
                "train",
                done.step,
                {k: v for k, v in record.items() if k not in ("step", "sequences", "seconds")},
            )
        if done.step == 1:
            self._advise(
                "first loss",
                1,
                diagnosis.first_loss(result.loss, self._vocab_size, self._recipe),
            )
        self._advise("gradient", done.step, self._norms.add(done.step, result.grad_norm))
        self._advise("diverged", done.step, self._losses.add(done.step, result.loss))
        window = self._window
        window.steps += 1
        window.loss += result.loss
        window.tokens += result.tokens
        window.flops += flops
        window.waited += waited
        if time.perf_counter() - window.began >= (BAR_EVERY_S if self._redraws else LINE_EVERY_S):
            self._show(done)

    def phase(self, step: int, phase: Phase) -> None:
        """Report a phase of the recipe that begins, or that a process begins with.

        Args:
            step: optimizer steps done.
            phase: that of the next step.
        """
        if self.is_main:
            self._metrics.write(record := phase_record(step, phase))
            self._history.add(record)
            self.say(describe(phase))

    def evaluate(
        self,
        done: TrainState,
        found: HeldOut,
        seconds: float,
        by_source: Mapping[str, HeldOut] = MappingProxyType({}),
    ) -> None:
        """Report a held-out evaluation, and what it says about the run.

        Args:
            done: the counters at this evaluation.
            found: its losses.
            seconds: how long it took.
            by_source: the losses of each source; those of a single one are not reported again.
        """
        if not self.is_main:
            return
        record = {"event": "evaluate", "step": done.step, **asdict(found), "seconds": seconds}
        record |= {"training_tokens": done.tokens, "training_seconds": done.seconds}
        several = by_source if len(by_source) > 1 else {}
        if several:
            record["sources"] = {name: asdict(one) for name, one in several.items()}
        self._metrics.write(record)
        self._history.add(record)
        self._scalars("heldout", done.step, asdict(found))
        share = self._criteria.share(done)
        text = self._format(found) if found.finite else "the loss is not finite"
        self.say(f"held-out at step {done.step:,}: {text}")
        if several:
            parts = [f"{name} {one.loss_mlm:.3f}" for name, one in several.items()]
            self.say(f"MLM loss by source: {', '.join(parts)}")
        for name, one in several.items():
            self._scalars(f"heldout/{name}", done.step, asdict(one))
        lost = diagnosis.diverged(found.loss, self._vocab_size, self._recipe)
        self._advise("diverged", done.step, lost)
        if lost is None and done.step >= diagnosis.EARLY:
            if found.loss_mask_token is not None:
                self._advise(
                    "plateau",
                    done.step,
                    diagnosis.plateau(share, found.loss_mask_token, self._baselines, self._recipe),
                )
            self._advise(
                "pairs", done.step, diagnosis.stuck_pairs(share, found.loss_nsp, found.accuracy_nsp)
            )
        # `stop` draws the last picture.
        if share < 1.0 and time.perf_counter() - self._drawn >= PICTURE_EVERY_S:
            self._draw()
        # A new window, since the evaluation's time belongs to no step.
        self._window = _Window(time.perf_counter())

    def skip(self, step: int, reason: str, examples: list[int], sequences: int) -> None:
        """Report a step that was not applied.

        Args:
            step: optimizer steps done.
            reason: what was not finite.
            examples: indices in the epoch of the examples whose own loss is not finite, as in
                `Spans.index`.
            sequences: how many examples the step had.
        """
        names: Sequence[int | str] = examples
        if len(self._recipe.sources) > 1:
            names = [example_name(example, self._recipe.source_names) for example in examples]
        self.event("skip", step, reason=reason, examples=names)
        shown = ", ".join(map(str, names[:8])) + (", ..." if len(names) > 8 else "")
        where = "in no single example" if not examples else f"for the examples {shown} of the epoch"
        if len(examples) == sequences:
            where = "for every example: the weights have diverged; no single example is to blame"
        self.say(f"step {step:,} is skipped: {reason}, {where}")

    def saved(self, saved: Saved | None) -> None:
        """Report a checkpoint, or why it could not be written; None reports nothing."""
        if saved is None:
            return
        if saved.path is not None:
            self.event("save", saved.step, checkpoint=saved.path.name, seconds=saved.stall_s)
        else:
            self.event("save", saved.step, problem=saved.problem)
            self.say(
                f"no checkpoint at step {saved.step:,}: {saved.problem}; "
                "older checkpoints are untouched"
            )

    def stop(self, step: int, reason: str, advice: str = "") -> None:
        """Report that this process ends its part of the run.

        Args:
            step: optimizer steps done.
            reason: why it ends.
            advice: what the user may do now; empty where the run is finished.
        """
        self.event("stop", step, reason=reason)
        if self.is_main:
            with self._printing():
                self._bar.update(
                    self._task,
                    completed=1.0 if not advice else None,
                    refresh=self._redraws,
                )
            self._draw()
            self.say(f"stopped at step {step:,}: {reason}" + (f"; {advice}" if advice else ""))
            self._done = not advice
            self._loggers.note(step, STOP_REASON, reason)

    def close(self) -> None:
        """Close every file; a disk that refuses has been reported before."""
        self._warnings.handlers = self._handlers
        if self._captures:
            logging.captureWarnings(False)
        if not self.is_main:
            return
        if self._redraws:
            with self._printing():
                self._bar.stop()
        self._loggers.close(self._done)
        with contextlib.suppress(OSError):
            self._say_problems()
        for close in (self._tensorboard.close, self._metrics.close, self._log_file.close):
            with contextlib.suppress(OSError):
                close()
        log.removeHandler(self._log_file)
        log.setLevel(self._level)

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _show(self, done: TrainState) -> None:
        window, now = self._window, time.perf_counter()
        elapsed = now - window.began
        share = self._criteria.share(done)
        # A narrow terminal cuts the end of the line.
        parts = [f"step {done.step:,}", f"loss {window.loss / window.steps:.3f}"]
        if done.heldout_loss is not None:
            parts.append(f"held-out {done.heldout_loss:.3f}")
        if (left := self._criteria.seconds_left(done)) is not None:
            parts.append(f"{_clock(left)} left")
        parts.append(f"{window.tokens / elapsed:,.0f} tok/s")
        if self._peak and window.flops / elapsed > self._peak:
            self._peak = None  # other processes slowed down its measurement at the start
        if self._peak:
            parts.append(f"{window.flops / elapsed / self._peak:.0%} of peak")
        parts.append(f"{window.waited / elapsed:.1%} wait")
        if self._redraws:
            with self._printing():
                self._bar.update(
                    self._task, completed=share, description="  ".join(parts), refresh=True
                )
        else:
            self.say(", ".join([f"{share:.0%}", *parts]))
        self._window = _Window(now)

    def _format(self, found: HeldOut) -> str:
        parts = list[str]()
        for name in LOSSES:
            loss, accuracy = getattr(found, f"loss_{name}"), getattr(found, f"accuracy_{name}")
            if loss is not None:
                parts.append(f"{name.upper()} loss {loss:.3f}, accuracy {accuracy:.1%}")
        if found.loss_mask_token is not None:
            place = diagnosis.compare(found.loss_mask_token, self._baselines)
            parts.append(f"on [MASK] {found.loss_mask_token:.3f}, {place}")
        return "; ".join(parts)

    def _advise(self, rule: str, step: int, line: str | None) -> None:
        """Print a rule's line, the first time that it has one."""
        if line is not None and rule not in self._advised:
            self._advised.add(rule)
            self.say(f"note: {line}")
            self._loggers.note(step, f"note/{rule.replace(' ', '_')}", line)

    def _say_problems(self) -> None:
        for line in self._loggers.problems():
            self.say(line)

    def _scalars(self, group: str, step: int, values: Mapping[str, float | None]) -> None:
        with named(self.run / "tensorboard"):
            for name, value in values.items():
                if value is not None and math.isfinite(value):
                    self._tensorboard.add_scalar(f"{group}/{name}", value, step)
        self._loggers.log(step, {f"{group}/{name}": value for name, value in values.items()})
        self._say_problems()

    @contextlib.contextmanager
    def _printing(self) -> Iterator[None]:
        """Continue without printing when the terminal is gone, or the disk of stdout is full.

        log.txt has every line.
        """
        try:
            yield
        except SystemExit:  # rich raises it on a broken pipe, and prints nothing from then on
            pass
        except OSError as error:
            self._console.quiet = True
            log.warning("nothing more is printed: standard output: %s", error.strerror)

    def _draw(self) -> None:
        """Draw loss.png; where that fails, log the reason."""
        figure = functools.partial(loss_figure, self._history, self.run.name, self._baselines)
        if (problem := write_picture(self.run / "loss.png", figure)) is not None:
            log.warning(problem)
        self._drawn = time.perf_counter()


def example_name(example: int, sources: Sequence[str]) -> str:
    """Return the source of an example of a mixture, and its index there, such as "wiki:17"."""
    source, index = source_of(np.array(example))
    return f"{sources[int(source)]}:{int(index)}"


def phase_record(step: int, phase: Phase) -> dict[str, Any]:
    """The event of a phase in metrics.jsonl: when it begins and ends, and what holds in it.

    Args:
        step: steps done.
        phase: that of the next step.
    """
    config = phase.config
    return {
        "event": "phase",
        "step": step,
        "phase": phase.number,
        "first_step": phase.first,
        "end_step": phase.end,
        "mask_rate": config.objective.mask_rate,
        "max_length": config.batch.max_length,
        "sequences": config.batch.sequences,
    }


def describe(phase: Phase) -> str:
    """The line of the log on a phase that begins."""
    config, settings = phase.config, phase.settings
    parts = [
        f"mask rate {config.objective.mask_rate:g}",
        f"{config.batch.sequences:,} sequences of up to {config.batch.max_length} tokens",
    ]
    if settings.batch.warmup_tokens:
        parts[1] += f" (growing for {settings.batch.warmup_tokens:,} tokens)"
    if settings.weights is not None:
        parts.append(f"weights {settings.weights}")
    if settings.schedule is not None:
        parts.append(f"its own schedule, decay {settings.schedule.decay}")
    until = "until the run stops" if phase.end is None else f"to {phase.end:,}"
    return f"phase {phase.number}, from step {phase.first:,} {until}: {', '.join(parts)}"


class _LogFile(logging.FileHandler):
    """A log file whose disk errors are raised, so that they end the run with a clear message.

    logging's own handler would print a traceback to the terminal for each line.
    """

    def _open(self) -> TextIO:
        return open(self.baseFilename, "a", encoding=self.encoding, opener=_at_once)

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, self.baseFilename) from error
        super().handleError(record)


def _at_once(path: str, flags: int) -> int:
    """Open a file without waiting for the reader of a pipe, which is an error instead."""
    return os.open(path, flags | os.O_NONBLOCK, 0o666)


def _clock(seconds: float) -> str:
    """Format a duration as h:mm:ss or m:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
