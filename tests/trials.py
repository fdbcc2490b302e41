"""Disturbed runs and their comparison with undisturbed ones.

The tests run a few of these trials, and torture.py repeats them for hours.

Every trial is a run of real processes (ranks.py) in a folder of its own, started with --resume as
often as necessary. Each line of its metrics.jsonl, whether a step or an evaluation, is compared
with the line of the undisturbed run, each time that it was written. All values except timings must
be equal to the last digit.
"""

from __future__ import annotations

import functools
import json
import random
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastbert.checkpoints import checkpoint
from fastbert.checkpoints.failpoint import POINTS
from fastbert.training.metrics import read_metrics
from tests.ranks import PATIENCE_S, Ranks, catches

CLOCK = ("seconds", "tokens_per_s", "training_seconds")  # what differs between two equal runs
TIMEOUT_S = 15.0  # runtime.timeout_s: long for a step of 50 ms, also on shared cores
MARGIN_S = 50.0  # beyond it: for the processes to end
STEPS = 16

# Lengths are uneven, and 10 sequences do not divide by 4; two or three packs a step and rank.
RECIPE = """
data = "{dataset}"
run = "{run}"
[model]
num_hidden_layers = 1
hidden_size = 32
num_attention_heads = 2
intermediate_size = 48
max_position_embeddings = 64
[objective]
segments = "single"
[batch]
sequences = 10
max_length = 64
micro_batch_tokens = 200
[optimizer]
lr = 3e-3
[schedule]
warmup = 0.2
[stop]
steps = {steps}
[evaluate]
every = 10
sequences = 16
[checkpoint]
every = 3
keep = 2
[runtime]
precision = "fp32"
deepspeed = "{deepspeed}"
timeout_s = {timeout_s}
"""


@dataclass
class Tally:
    """The result of a series of trials."""

    tried: int = 0
    survived: int = 0
    compared: int = 0  # number of compared lines of metrics.jsonl
    equal: int = 0
    problems: list[str] = field(default_factory=list)

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            *(
                getattr(self, name) + getattr(other, name)
                for name in ("tried", "survived", "compared", "equal", "problems")
            )
        )

    @property
    def passed(self) -> bool:
        return self.tried == self.survived and self.compared == self.equal and not self.problems

    def __str__(self) -> str:
        counts = (
            f"tried {self.tried}, survived {self.survived}, "
            f"losses compared {self.compared:,}, losses equal {self.equal:,}"
        )
        return counts + "".join(f"\n  {problem}" for problem in self.problems)


class Trial:
    """A run in a folder of its own.

    Args:
        folder: created. The run is in its `run`, and the output of the processes in `start-00`,
            `start-01`, ...
        dataset: the training data.
        stage: the ZeRO stage.
        overrides: settings that override RECIPE's in every start.

    Attributes:
        run: the run folder, as its processes see it.
        seen: the run folder, as the tests see it.
        namespaces: id of a process whose mounts its processes see; None for those of the tests.
    """

    namespaces: int | None = None

    def __init__(
        self, folder: Path, dataset: Path, *overrides: str, stage: int = 0, steps: int = STEPS
    ):
        self.folder, self.dataset, self.overrides, self.starts = folder, dataset, overrides, 0
        self.run = self.seen = folder / "run"
        folder.mkdir(parents=True)
        self.recipe = folder / "recipe.toml"
        self.set_stage(stage)
        text = RECIPE.format(
            dataset=dataset,
            run=self.run,
            steps=steps,
            deepspeed=folder / "ds_config.json",
            timeout_s=TIMEOUT_S,
        )
        self.recipe.write_text(text, encoding="utf-8")

    def set_stage(self, stage: int) -> None:
        zero = {
            "stage": stage,
            **({"reduce_bucket_size": 20_000, "allgather_bucket_size": 20_000} if stage else {}),
        }
        (self.folder / "ds_config.json").write_text(json.dumps({"zero_optimization": zero}))

    @property
    def command(self) -> list[str]:
        """Return the arguments of fastbert that resume the run."""
        return ["pretrain", str(self.recipe), *self.overrides, "--resume"]

    def start(self, world: int = 1, *overrides: str, **more: str) -> Ranks:
        """Start the processes; their output goes to a folder of this start."""
        self.starts += 1
        return Ranks(
            [*self.command, *overrides],
            self.folder / f"start-{self.starts:02}",
            world,
            self.namespaces,
            **more,
        )

    def resume(self, world: int = 1, *overrides: str, **more: str) -> list[str]:
        """Train undisturbed to the end, and return the lines that rank 0 printed."""
        with self.start(world, *overrides, **more) as ranks:
            if any(ranks.wait()):
                raise AssertionError(
                    f"{self.folder}, start {self.starts}: exit codes {ranks.codes}: {ranks.errors}"
                )
            return ranks[0].out.read_text().splitlines()

    def records(self, *events: str | None) -> list[dict[str, Any]]:
        """Return lines of metrics.jsonl without timings: steps (None), or events of these kinds."""
        found = (r for r in read_metrics(self.seen / "metrics.jsonl") if r.get("event") in events)
        return [{k: v for k, v in r.items() if k not in CLOCK} for r in found]

    @property
    def steps(self) -> list[dict[str, Any]]:
        return self.records(None)

    @property
    def checkpoints(self) -> list[Path]:
        """Oldest first."""
        return sorted((self.seen / "checkpoints").glob("step-*"))

    def copy_of(self, other: Trial) -> Trial:
        """Copy another trial's run folder as it is now."""
        shutil.copytree(other.run, self.run)
        return self

    def compare(self, undisturbed: Trial, rounding: float = 0.0) -> Tally:
        """Compare every line of this run with the other's.

        A missing line, or one out of order, is a problem.

        Args:
            undisturbed: a complete run that nothing has disturbed.
            rounding: allowed relative difference; 0 where both runs have the same number of ranks.
        """
        expected = {(r.get("event"), r["step"]): r for r in undisturbed.records(None, "evaluate")}
        found = self.records(None, "evaluate")
        wrong = [
            r
            for r in found
            if not _equal(r, expected.get((r.get("event"), r["step"]), {}), rounding)
        ]
        tally = Tally(compared=len(found), equal=len(found) - len(wrong))
        if missing := set(expected) - {(r.get("event"), r["step"]) for r in found}:
            tally.problems.append(f"{self.folder}: lines are missing: {sorted(missing, key=str)}")
        if wrong:
            tally.problems.append(
                f"{self.folder}: {wrong[0]} should be "
                f"{expected.get((wrong[0].get('event'), wrong[0]['step']))}"
            )
        after = 0
        for record in self.records(None, "resume"):
            if "event" not in record and record["step"] != after + 1:
                tally.problems.append(
                    f"{self.folder}: step {record['step']} comes after step {after}"
                )
            after = record["step"]
        return tally


def _equal(record: dict[str, Any], expected: dict[str, Any], rounding: float) -> bool:
    """Compare two lines; all counts must be equal.

    With `rounding`, the number of correct predictions may differ where rounding turns a near miss.
    """
    if not rounding or record.keys() != expected.keys():
        return record == expected
    for key, value in record.items():
        if key.startswith(("loss", "grad_norm")):
            if abs(value - expected[key]) > rounding * abs(expected[key]):
                return False
        elif not key.startswith("accuracy") and value != expected[key]:
            return False
    return True


class Laboratory:
    """The place for trials and for the undisturbed runs that they are compared with.

    Several threads may use it.

    Args:
        folder: the folder for all of them.
        dataset: the dataset that they train on.
        width: the number of simultaneous runs in a series of trials.
        report: called with a line on each run that has ended.
    """

    steps = STEPS  # steps of every compared run

    def __init__(
        self,
        folder: Path,
        dataset: Path,
        width: int = 2,
        report: Callable[[str], None] = lambda line: None,
    ):
        self.folder, self.dataset, self.width, self._report = folder, dataset, width, report
        self._lock = threading.RLock()
        self._undisturbed: dict[tuple[int, int], tuple[Trial, tuple[float, float]]] = {}
        self._made = 0

    def trial(self, *overrides: str, stage: int = 0, steps: int = STEPS) -> Trial:
        with self._lock:
            self._made += 1
            return Trial(
                self.folder / f"trial-{self._made:04}",
                self.dataset,
                *overrides,
                stage=stage,
                steps=steps,
            )

    def undisturbed(self, world: int, stage: int) -> Trial:
        """Return a run from beginning to end, which is made once."""
        return self._reference(world, stage)[0]

    def seconds(self, world: int, stage: int) -> tuple[float, float]:
        """Return the seconds to the first step, and to the end."""
        return self._reference(world, stage)[1]

    def finish(self, trial: Trial, world: int, stage: int) -> Tally:
        """Resume a disturbed run to its end, and compare; delete its folder if all is well."""
        trial.resume(world)
        tally = trial.compare(self.undisturbed(world, stage))
        if not tally.problems:
            shutil.rmtree(trial.folder)
        return tally

    def series(self, what: str, runs: Sequence[Callable[[], Tally]]) -> Tally:
        """Make runs, several at a time; an exception in one is a problem that the tally names."""
        total = Tally()

        def make(run: Callable[[], Tally]) -> None:
            nonlocal total
            try:
                tally = run()
            except (AssertionError, TimeoutError, subprocess.TimeoutExpired) as error:
                tally = Tally(tried=1, problems=[str(error)])
            with self._lock:
                total += tally
                self._report(f"{what}: {total}")

        with ThreadPoolExecutor(self.width) as pool:
            list(pool.map(make, runs))
        return total

    def _reference(self, world: int, stage: int) -> tuple[Trial, tuple[float, float]]:
        with self._lock:
            if (world, stage) not in self._undisturbed:
                trial = self.trial(stage=stage)
                with trial.start(world) as ranks:
                    began = time.monotonic()
                    wait_for(lambda: lines_so_far(trial) or None not in ranks.codes)
                    first = time.monotonic() - began
                    assert ranks.wait() == [0] * world, ranks.errors
                self._undisturbed[world, stage] = trial, (first, time.monotonic() - began)
            return self._undisturbed[world, stage]


# kill -9

SHAPES = ((2, 1), (1, 0), (2, 3), (2, 0), (2, 2))  # ranks, stage
KILLS = 5  # of one run


def kills(lab: Laboratory, count: int, seed: int, of_one_run: int = KILLS) -> Tally:
    """Kill one rank or all with SIGKILL at random moments, until `count` kills have hit.

    Each run resumes from what it finds, and is trained to its end.

    Args:
        lab: the place for the runs.
        count: the number of kills.
        seed: of the choices of ranks and moments.
        of_one_run: kills of a run; the next one has other SHAPES.
    """
    runs = [
        functools.partial(
            _killed,
            lab,
            *SHAPES[i % len(SHAPES)],
            min(of_one_run, count - i * of_one_run),
            f"{seed}/{i}",
        )
        for i in range(-(-count // of_one_run))
    ]
    return lab.series("kills", runs)


def _killed(lab: Laboratory, world: int, stage: int, wanted: int, seed: str) -> Tally:
    """Kill one run this many times; use several runs if the first ends before."""
    generator, tally = random.Random(seed), Tally()
    lab.undisturbed(world, stage)  # before the timing matters
    while tally.tried < wanted:
        trial, hit = lab.trial(stage=stage), 0
        while tally.tried + hit < wanted and _kill(lab, trial, world, stage, generator):
            hit += 1
        result = lab.finish(trial, world, stage)
        result.tried, result.survived = hit, 0 if result.problems else hit
        result.problems = [
            f"seed {seed}, {world} ranks, stage {stage}: {problem}" for problem in result.problems
        ]
        tally += result
    return tally


def _kill(lab: Laboratory, trial: Trial, world: int, stage: int, generator: random.Random) -> bool:
    """Start the ranks, kill one or all, and return whether that hit.

    The others must end without help, and say why.
    """
    victim = generator.choice([None, *range(world)])
    # Kill while it trains, or at any time from the start to after the end.
    lines = generator.choice([1, 0, 1]) * generator.randint(1, STEPS // KILLS + 1)
    seconds = generator.random() * (0.1 if lines else lab.seconds(world, stage)[1])
    before = lines_so_far(trial)
    with trial.start(world) as ranks:
        if lines:
            wait_for(lambda: lines_so_far(trial) >= before + lines or None not in ranks.codes)
        time.sleep(seconds)
        for rank in ranks.ranks if victim is None else [ranks[victim]]:
            rank.signal(signal.SIGKILL)
        codes = ranks.wait(TIMEOUT_S + MARGIN_S)
        whom = "all" if victim is None else f"rank {victim}"
        where = (
            f"{trial.folder}, start {trial.starts}, {whom} killed after {lines} lines "
            f"and {seconds:.3f} s"
        )
        if -signal.SIGKILL not in codes:
            assert set(codes) == {0}, f"{where}: exit codes {codes}: {ranks.errors}"
            return False
        for rank, code in zip(ranks.ranks, codes, strict=True):
            # 0: the kill came after the last collective.
            assert code in (0, 1, -signal.SIGKILL), f"{where}: exit codes {codes}: {ranks.errors}"
            assert code != 1 or f"rank {victim}" in rank.err.read_text(), (
                f"{where}: nobody is named: {rank.err.read_text()!r}"
            )
    check_nothing_is_damaged(trial)
    return True


# A flipped bit


def flips(lab: Laboratory, count: int, seed: int) -> Tally:
    """Flip one bit anywhere in the newest checkpoint.

    The fault is noticed and named, and the run resumes from the previous checkpoint.
    """
    lab.undisturbed(1, 0)
    return lab.series(
        "flipped bits", [functools.partial(_flipped, lab, f"{seed}/{i}") for i in range(count)]
    )


def _flipped(lab: Laboratory, seed: str) -> Tally:
    generator, undisturbed = random.Random(seed), lab.undisturbed(1, 0)
    trial = lab.trial().copy_of(undisturbed)
    before, newest = trial.checkpoints[-2:]
    # The manifest is chosen as often as each of the much larger tensor files, because a fault there
    # could mislead a reader.
    file = generator.choice(sorted(newest.iterdir()))
    bit = generator.randrange(8 * file.stat().st_size)
    flip(file, bit)
    said = trial.resume()
    tally = trial.compare(undisturbed)
    tally.tried = 1
    named = any(line.startswith(f"{newest}: damaged: ") and file.name in line for line in said)
    if not (named and any(line.startswith(f"resuming from {before}") for line in said)):
        tally.problems.append("not noticed: " + " | ".join(said[:3]))
    if tally.problems:
        tally.problems = [
            f"seed {seed}, {file}, bit {bit}: {problem}" for problem in tally.problems
        ]
        return tally
    tally.survived = 1
    shutil.rmtree(trial.folder)
    return tally


def dataset_flips(lab: Laboratory, count: int, seed: int) -> Tally:
    """Flip one bit anywhere in the dataset.

    Training and evaluation refuse it with one line that names the file, and write nothing.
    """
    lab.undisturbed(1, 0)
    return lab.series(
        "flipped bits of a dataset",
        [functools.partial(_flipped_dataset, lab, f"{seed}/{i}") for i in range(count)],
    )


def _flipped_dataset(lab: Laboratory, seed: str) -> Tally:
    generator, trial = random.Random(seed), lab.trial()
    copy = shutil.copytree(
        lab.dataset, trial.folder / "dataset", ignore=shutil.ignore_patterns(".*")
    )
    file = generator.choice(sorted(path for path in copy.rglob("*") if path.is_file()))
    bit = generator.randrange(8 * file.stat().st_size)
    flip(file, bit)
    trained = [*trial.command, f"data={copy}"]
    evaluated = [
        "evaluate",
        str(lab.undisturbed(1, 0).run),
        "--data",
        str(copy),
        "--sequences",
        "8",
    ]
    command = generator.choice([trained, evaluated])
    with Ranks(command, trial.folder / "start") as ranks:
        codes, said = ranks.wait(), ranks.errors.splitlines()
    if codes == [2] and len(said) == 1 and str(file) in said[0] and not trial.run.exists():
        shutil.rmtree(trial.folder)
        return Tally(tried=1, survived=1)
    return Tally(
        tried=1,
        problems=[
            f"seed {seed}, {file}, bit {bit}, {command[0]}: exit code {codes[0]}: "
            f"{' | '.join(said)}"
        ],
    )


def flip(file: Path, bit: int) -> None:
    """Change one bit of a file in place."""
    with open(file, "rb+") as handle:
        handle.seek(bit // 8)
        (byte,) = handle.read(1)
        handle.seek(bit // 8)
        handle.write(bytes([byte ^ 1 << bit % 8]))


# Crash points inside a save

ON_EVERY_RANK = POINTS[: POINTS.index("gathered") + 1]
BESIDE_A_DAMAGED_ONE = ("moving-aside", "moved-aside")


def crashes(lab: Laboratory, points: Sequence[str], rank: int, world: int, stage: int) -> Tally:
    """Kill a rank with SIGKILL at one point of a save after the other, one per start.

    The points are spread over as many runs as there are at the same time.
    """
    lab.undisturbed(world, stage)
    runs = [
        functools.partial(_crashed, lab, points[i :: lab.width], rank, world, stage)
        for i in range(min(lab.width, len(points)))
    ]
    return lab.series(f"crash points of rank {rank}", runs)


def _crashed(lab: Laboratory, points: Sequence[str], rank: int, world: int, stage: int) -> Tally:
    tally, trial = Tally(), lab.trial(stage=stage)
    for point in points:
        tally.tried += 1
        with trial.start(world, FASTBERT_FAILPOINT=f"{point}:{rank}") as ranks:
            codes = ranks.wait(TIMEOUT_S + MARGIN_S)
            where = (
                f"{point}, {trial.folder}, start {trial.starts}: exit codes {codes}: {ranks.errors}"
            )
            assert codes == [-signal.SIGKILL if r == rank else 1 for r in range(world)], where
            tally.survived += 1
        check_nothing_is_damaged(trial)
    return tally + lab.finish(trial, world, stage)


def check_nothing_is_damaged(trial: Trial) -> None:
    """Check that every checkpoint is valid; `--resume` itself would skip a damaged one."""
    _, complaints = checkpoint.newest_valid(trial.seen)
    assert not complaints, f"{trial.folder}, after start {trial.starts}: {complaints}"


def lines_so_far(trial: Trial) -> int:
    """Count the lines of metrics.jsonl, cheaply enough for polling."""
    path = trial.seen / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for(what: Callable[[], Any], seconds: float = PATIENCE_S) -> Any:
    """Poll until it is true."""
    until = time.monotonic() + seconds
    while not (found := what()):
        if time.monotonic() > until:
            raise TimeoutError("it never came to be")
        time.sleep(0.005)
    return found


def wait_until_ready(ranks: Ranks) -> None:
    """Wait until every process has its signal handlers.

    Before that, Python is still starting, and a signal has its default action.
    """
    for rank in ranks.ranks:
        wait_for(lambda rank=rank: catches(rank.pid, signal.SIGTERM))
