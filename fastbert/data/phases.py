"""When each phase of a run begins, how large each step is, and where in the data it stands.

All of it is a function of the step, so a resumed run needs nothing but its step. The batch size is
constant over stretches of steps, of which there are few, so a table of them is made once.

Tokens. An end in tokens is turned into a step at the start of the run, by the mean length of an
example, which `Streams.rate` estimates from a sample. The tokens that a run has really counted by
then differ from it by a fraction of a percent.

Eras. Where neither the weights of the sources nor max_length change, the examples go on as one
sequence. Where they change, a new one begins, in which each source continues where it stood. With
another max_length a source has another number of examples per epoch. It then continues after the
same share of its epoch.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import asdict, dataclass, replace
from typing import Any

from fastbert.config import PhaseConfig, RunConfig
from fastbert.data.mixture import BLOCK
from fastbert.data.streams import RATE_UNIT, Era, Streams
from fastbert.errors import InputError

# A batch that grows does so in this many stages or fewer, each a multiple of a power of two.
STAGES = 16


@dataclass(frozen=True)
class Phase:
    """A part of a run."""

    number: int  # counted from 1; the part after the last phase of a recipe has a number too
    settings: PhaseConfig  # the recipe's phase; without changes after the last one
    config: RunConfig  # the resolved settings
    first: int  # its first step
    end: int | None  # the step after its last one; None where it lasts until the run stops

    def share(self, step: int) -> float:
        """How much of the phase is done before this step, 0 to 1. It has an end."""
        assert self.end is not None
        length = self.end - self.first
        return min(1.0, (step - self.first) / length) if length > 0 else 1.0


@dataclass(frozen=True)
class Stretch:
    """Steps with the same settings and batch size."""

    first: int  # its first step
    sequences: int  # examples of a step
    number: int  # the number, in its era, of its first example
    phase: int  # index in the timetable
    era: int  # index in the timetable
    tokens: int  # how many are expected to come before it, in parts of 1 / RATE_UNIT


@dataclass(frozen=True)
class Position:
    """Where in the data a run stands after a number of steps; a branch of the run begins there."""

    step: int  # steps done
    tokens: int  # as in `Stretch`
    era: Era
    number: int  # the number that its next example has in its era

    def dump(self) -> dict[str, Any]:
        """Convert to JSON."""
        return asdict(self)

    @staticmethod
    def load(values: dict[str, Any]) -> Position:
        """Convert back from JSON."""
        era = values["era"]
        era = Era(era["max_length"], tuple(era["quotas"]), tuple(era["first"]))
        return Position(values["step"], values["tokens"], era, values["number"])

    def widened(self, sources: int) -> Position:
        """The same position in a mixture to which sources were added at the end."""
        more = (0,) * (sources - len(self.era.first))
        era = replace(self.era, quotas=self.era.quotas + more, first=self.era.first + more)
        return replace(self, era=era)


class Timetable:
    """The phases of a run in steps.

    Args:
        config: the recipe.
        streams: of its datasets.
        origin: where a branch of another run begins; None for a run that begins at step 0.

    Raises:
        InputError: a phase would end before it begins.
    """

    def __init__(self, config: RunConfig, streams: Streams, origin: Position | None = None):
        self.config, self._streams = config, streams
        self.origin = origin.widened(len(streams)) if origin else None
        self.phases: list[Phase] = []
        self.eras: list[Era] = []
        self.stretches: list[Stretch] = []
        # Where the table has come to. `_number` counts examples of the era from `_step` on.
        self._step = self._tokens = self._number = 0
        settings = list(config.phase)
        if not settings or settings[-1].has_end:
            settings.append(PhaseConfig())
        for phase in settings:
            self._add_phase(phase)
        self._firsts = [stretch.first for stretch in self.stretches]

    @property
    def first_step(self) -> int:
        """The step with which the run begins, 0 where it is no branch."""
        return self.origin.step if self.origin else 0

    def at(self, step: int) -> Stretch:
        """Return the stretch that a step, counted from 0, belongs to."""
        return self.stretches[max(0, bisect_right(self._firsts, step) - 1)]

    def phase_at(self, step: int) -> Phase:
        """Return the phase that a step, counted from 0, belongs to."""
        return self.phases[self.at(step).phase]

    def position(self, step: int) -> Position:
        """Return where in the data the run stands before a step."""
        stretch = self.at(step)
        examples = (step - stretch.first) * stretch.sequences
        era = self.eras[stretch.era]
        tokens = stretch.tokens + examples * self._streams.rate(era)
        return Position(step, tokens, era, stretch.number + examples)

    def epochs(self, step: int) -> list[float]:
        """Return how often each source has been used before a step."""
        stretch = self.at(step)
        era = self.eras[stretch.era]
        number = stretch.number + (step - stretch.first) * stretch.sequences
        lengths = [self._streams.epoch(i, era.max_length) for i in self._sources]
        return [n / of for n, of in zip(self._running(era, number), lengths, strict=True)]

    def planned_steps(self) -> int | None:
        """Return the step at which the run ends; None where only time or the loss ends it.

        An epoch of a mixture has as many examples as its sources have together.
        """
        stop = self.config.stop
        ends = [stop.steps] if stop.steps else []
        if stop.tokens:
            wanted = stop.tokens * RATE_UNIT
            before = [s for s in self.stretches if s.tokens <= wanted] or self.stretches[:1]
            stretch = before[-1]
            rate = stretch.sequences * self._streams.rate(self.eras[stretch.era])
            ends.append(stretch.first - (stretch.tokens - wanted) // rate)
        epochs = stop.epochs or (None if ends or stop.seconds else 1.0)
        if epochs:
            ends.append(math.ceil(epochs * self.steps_per_epoch))
        return min(ends, default=None)

    @property
    def steps_per_epoch(self) -> float:
        """Steps per epoch of all sources, a fraction: an epoch may begin within a step."""
        batch = self.config.batch
        examples = sum(self._streams.epoch(i, batch.max_length) for i in self._sources)
        return examples / batch.sequences

    def epochs_problem(self) -> str | None:
        """Return which source the planned run uses more often than it may, and what to change."""
        bounded = [(i, s) for i, s in enumerate(self.config.sources) if s.epochs]
        if not bounded:
            return None
        end = self.planned_steps()
        if end is None:
            return (
                f"data: {bounded[0][1].path} has epochs = {bounded[0][1].epochs:g}, which needs a "
                "run of known length: set stop.steps, stop.tokens or stop.epochs"
            )
        used = self.epochs(end)
        for i, source in bounded:
            assert source.epochs is not None
            if used[i] <= source.epochs:
                continue
            fits = source.epochs / used[i]
            share = self._streams.quotas(self.config)[i] / BLOCK
            advice = (
                f"about a share of {share * fits:.3g} of the examples would fit, or a run of "
                f"{int(end * fits):,} steps"
            )
            if any(phase.weights for phase in self.config.phase):
                advice = f"lower its weight or the length of the run to {fits:.0%} of what they are"
            return (
                f"data: the run of {end:,} steps would use {source.path}, with a share of "
                f"{share:.3g} of the examples, for {used[i]:.3g} epochs, and it may be used for "
                f"epochs = {source.epochs:g}; {advice}"
            )
        return None

    @property
    def _sources(self) -> range:
        return range(len(self._streams))

    def _add_phase(self, settings: PhaseConfig) -> None:
        config = self.config.in_phase(settings)
        before = self.phases[-1].config.batch.sequences if self.phases else config.batch.sequences
        first, tokens = self._step, self._tokens
        index = len(self.phases)
        self._enter(config)
        for part, sequences in _stages(before, config.batch.sequences, settings):
            # A stage of the growth ends with its share of the tokens, the last one with the phase.
            until = None if part is None else tokens + part * RATE_UNIT
            self._add_stage(settings, index, sequences, until)
        end = self._step if settings.has_end else None
        if settings.has_end and self._step <= first:
            unit = "steps" if settings.steps else "tokens"
            raise InputError(
                f"phase {index + 1}: {unit} = {settings.steps or settings.tokens} is reached at "
                f"step {first}, where it begins; ends are counted from the start of the run"
            )
        self.phases.append(Phase(index + 1, settings, config, first, end))
        if end is None and settings.schedule is not None:
            # The schedule of a last phase without an end leads to the end of the run.
            self.phases[-1] = replace(self.phases[-1], end=self.planned_steps())

    def _add_stage(
        self, settings: PhaseConfig, phase: int, sequences: int, until: int | None
    ) -> None:
        """Add the steps of one batch size.

        Args:
            settings: of the phase.
            phase: its index.
            sequences: examples of a step.
            until: the tokens at which they end, in parts of 1 / RATE_UNIT; None: the phase's end.
        """
        end, origin = self._end_of_stage(settings, sequences, until), self.origin
        passed = origin is not None and self._step < origin.step
        if origin is not None and passed and (end is None or end >= origin.step):
            # The other run made the steps up to here.
            self._step, self._tokens = origin.step, origin.tokens
            self.eras, self._number, passed = [origin.era], origin.number, False
            if end != origin.step:
                self._enter(self.config.in_phase(settings))
                end = self._end_of_stage(settings, sequences, until)
        if end == self._step:
            return
        if not passed:
            era = len(self.eras) - 1
            self.stretches.append(
                Stretch(self._step, sequences, self._number, phase, era, self._tokens)
            )
        if end is not None:
            examples = (end - self._step) * sequences
            self._number += examples
            self._tokens += examples * self._streams.rate(self._era)
            self._step = end

    def _end_of_stage(self, settings: PhaseConfig, sequences: int, until: int | None) -> int | None:
        """Return the step at which `_add_stage` ends; None where the run does."""
        ends = [settings.steps] if settings.steps else []
        marks = [settings.tokens * RATE_UNIT] if settings.tokens else []
        marks += [] if until is None else [until]
        for mark in marks:
            rate = sequences * self._streams.rate(self._era)
            ends.append(self._step - (self._tokens - mark) // rate)
        return max(self._step, min(ends)) if ends else None

    @property
    def _era(self) -> Era:
        return self.eras[-1]

    def _enter(self, config: RunConfig) -> None:
        """Begin a new era where the settings need one."""
        max_length, quotas = config.batch.max_length, self._streams.quotas(config)
        if not self.eras:
            self.eras.append(Era(max_length, quotas, (0,) * len(self._streams)))
        if (self._era.max_length, self._era.quotas) == (max_length, quotas):
            return
        running = self._running(self._era, self._number)
        if self._era.max_length != max_length:
            old = [self._streams.epoch(i, self._era.max_length) for i in self._sources]
            new = [self._streams.epoch(i, max_length) for i in self._sources]
            running = [-(-n * new[i] // old[i]) for i, n in enumerate(running)]
        self.eras.append(Era(max_length, quotas, tuple(running)))
        self._number = 0

    def _running(self, era: Era, number: int) -> list[int]:
        """Return the running number of each source's next example, at a number of an era."""
        used = self._streams.mixture(era).used(number)
        return [first + n for first, n in zip(era.first, used, strict=True)]


def _stages(before: int, sequences: int, settings: PhaseConfig) -> list[tuple[int | None, int]]:
    """Return the batch sizes of a phase, each with the tokens of the phase at which it ends.

    Sizes are multiples of a power of two that divides both ends, so that ranks can share them. The
    last one ends with the phase (None).
    """
    warmup = settings.batch.warmup_tokens
    if not warmup or before == sequences:
        return [(None, sequences)]
    most = max(1, abs(sequences - before) // (STAGES // 2))
    unit = 1
    while 2 * unit <= most and before % (2 * unit) == 0 and sequences % (2 * unit) == 0:
        unit *= 2
    count = min(STAGES, abs(sequences - before) // unit)
    sizes = [before + (sequences - before) * i // (count * unit) * unit for i in range(count)]
    return [*((warmup * (i + 1) // count, size) for i, size in enumerate(sizes)), (None, sequences)]
