"""Signals, at any moment and to any rank: a checkpoint, exit code 75, and the same run afterwards. Ranks that stop answering are named."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.ranks import ROOT, Ranks, environment
from tests.trials import MARGIN_S, Laboratory, Trial, lines_so_far, wait_for

WORLD, STAGE = 2, 1
SOON_S = 8.0  # "within a few seconds", on two cores that others use too; less than TIMEOUT_S, so that no time limit can be the cause
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


@pytest.fixture(scope="module")
def lab(tmp_path_factory, small_store) -> Laboratory:
    return Laboratory(tmp_path_factory.mktemp("interruptions"), small_store.path)


def ready(ranks: Ranks) -> None:
    """Until every process has its handlers: before that it is Python that starts, and a signal is the system's affair."""
    for rank in ranks.ranks:
        wait_for(lambda rank=rank: rank.catches(signal.SIGTERM))


def interrupted(ranks: Ranks, trial: Trial) -> list[int]:
    """Exit codes of ranks that were signalled, which must end soon."""
    codes = ranks.wait(SOON_S)
    assert set(codes) == {75}, f"{trial.folder}, start {trial.starts}: exit codes {codes}: {ranks.errors}"
    return codes


@pytest.mark.parametrize("number", SIGNALS, ids=lambda n: signal.Signals(n).name)
@pytest.mark.parametrize("to", ["all", "rank 0", "rank 1"])
def test_a_signal_while_training(lab, number, to):
    """At a moment that differs from case to case: within a step, an evaluation or a save."""
    generator = random.Random(f"{number} {to}")
    trial = lab.trial(f"stop.steps={lab.steps}", stage=STAGE)
    with trial.start(WORLD) as ranks:
        wait_for(lambda: lines_so_far(trial) >= generator.randrange(1, 12))
        time.sleep(0.05 * generator.random())
        for rank in ranks.ranks if to == "all" else [ranks[int(to[-1])]]:
            rank.signal(number)
        interrupted(ranks, trial)
        said = ranks[0].out.read_text().splitlines()[-1]
    done = trial.steps[-1]["step"]
    name = signal.Signals(number).name
    assert trial.records("stop") == [
        {"event": "stop", "step": done, "reason": f"interrupted by {name if to != 'rank 1' else 'another rank'}"}
    ]
    assert said.endswith(f"go on with: fastbert pretrain {trial.run / 'config.toml'} --resume")
    assert trial.checkpoints[-1].name == f"step-{done:08}"
    assert lab.finish(trial, WORLD, STAGE).sound


@pytest.mark.parametrize("to", ["all", "rank 0", "rank 1"])
@pytest.mark.parametrize("share", [0.0, 0.15, 0.3, 0.45])
def test_a_signal_while_starting(lab, to, share):
    """Before the ranks know each other, while they join, while DeepSpeed begins."""
    trial = lab.trial(stage=STAGE)
    number = SIGNALS[int(share * 10) % 3]
    with trial.start(WORLD) as ranks:
        ready(ranks)
        time.sleep(share * lab.seconds(WORLD, STAGE))
        for rank in ranks.ranks if to == "all" else [ranks[int(to[-1])]]:
            rank.signal(number)
        interrupted(ranks, trial)
    assert lab.finish(trial, WORLD, STAGE).sound


def test_signals_one_after_the_other(lab):
    """A scheduler that repeats itself, or sends SIGUSR1 first and SIGTERM soon after, gets what it wants once."""
    trial = lab.trial(stage=STAGE)
    with trial.start(WORLD) as ranks:
        wait_for(lambda: lines_so_far(trial) >= 3)
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1):
            ranks.signal(number)
        interrupted(ranks, trial)
    assert lab.finish(trial, WORLD, STAGE).sound


@pytest.mark.parametrize("frozen", [0, 1])
@pytest.mark.parametrize("when", ["starting", "training", "saving"])
def test_a_rank_that_stops_answering_is_named(lab, frozen, when):
    """SIGSTOP. Within the recipe's limit all others end; the frozen one ends too, should it ever wake up."""
    limit = 3.0
    trial = lab.trial(f"runtime.timeout_s={limit:g}", stage=STAGE)
    failpoint = {"FASTBERT_FAILPOINT": f"tensors-half:{frozen}=stop"} if when == "saving" else {}
    with trial.start(WORLD, **failpoint) as ranks:
        if when == "starting":
            ready(ranks)
        elif when == "training":
            wait_for(lambda: lines_so_far(trial) >= 4)
        if when != "saving":
            ranks[frozen].signal(signal.SIGSTOP)
        other = ranks[1 - frozen]
        assert other.wait(limit + MARGIN_S) == 1
        said = other.err.read_text()
        assert f"rank {frozen}" in said and "timeout_s" in said, said
        assert len(said.splitlines()) == 1, said
        assert ranks[frozen].code is None
        ranks[frozen].signal(signal.SIGCONT)
        assert ranks[frozen].wait(limit + MARGIN_S) == 1, ranks[frozen].err.read_text()
    assert lab.finish(trial, WORLD, STAGE).sound


def test_a_frozen_first_rank_does_not_write_into_the_run_that_went_on(lab):
    """Rank 0 sleeps, the run is resumed without it; when it wakes up in the middle of that, it must leave it alone."""
    trial = lab.trial("runtime.timeout_s=60")
    with trial.start(1) as old:
        wait_for(lambda: lines_so_far(trial) >= 4)
        old[0].signal(signal.SIGSTOP)
        with trial.start(1) as new:
            wait_for(lambda: len(trial.records("resume")) or lines_so_far(trial) < 4)
            old[0].signal(signal.SIGCONT)
            assert new.wait() == [0]
        assert old.wait() == [1]
        assert "taken" in old.errors and str(new[0].pid) in old.errors
    assert trial.compare(lab.undisturbed(1, 0)).sound


# The same by the commands that users type: the processes above were forked from one that had imported everything.


def free_of_ranks(text: str) -> str:
    """Without what launchers put before a line."""
    return re.sub(r"^\[[^]]*\]:", "", text, flags=re.MULTILINE)


def by_hand(lab: Laboratory, trial: Trial) -> list[list[str]]:
    return [[sys.executable, "-m", "fastbert", *trial.command]]


def torchrun(lab: Laboratory, trial: Trial) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "fastbert", *trial.command]


def deepspeed(lab: Laboratory, trial: Trial) -> list[str]:
    hosts = trial.folder / "hostfile"
    hosts.write_text("localhost slots=2\n")
    launcher = str(Path(sys.executable).with_name("deepspeed"))
    return [launcher, "--hostfile", str(hosts), "--no_local_rank", "--module", "fastbert", *trial.command]


@pytest.mark.parametrize("launcher", [torchrun, deepspeed])
def test_launchers(lab, launcher):
    """Interrupted by a signal to the launcher, resumed by the same command, equal to the last digit."""
    trial = lab.trial(stage=STAGE)
    command = launcher(lab, trial)
    with open(trial.folder / "log", "wb") as log:
        first = subprocess.Popen(command, env=environment(), cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
        try:
            wait_for(lambda: lines_so_far(trial) >= 4 or first.poll() is not None)
            first.send_signal(signal.SIGTERM)
            first.wait(timeout=60)
        finally:
            os.killpg(first.pid, signal.SIGKILL) if first.poll() is None else None
    text = (trial.folder / "log").read_text()
    assert [r["reason"] for r in trial.records("stop")] == ["interrupted by SIGTERM"], text
    second = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert second.returncode == 0, second.stderr
    assert trial.compare(lab.undisturbed(WORLD, STAGE)).sound


def test_one_process_by_hand(lab):
    """Also while Python still imports torch, which takes seconds."""
    trial = lab.trial()
    (command,) = by_hand(lab, trial)
    for lines in (0, 4):
        process = subprocess.Popen(command, env=environment(), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            if lines:
                wait_for(lambda: lines_so_far(trial) >= 4)
            else:
                wait_for(lambda: caught(process.pid))  # noqa: B023
            process.send_signal(signal.SIGTERM)
            _, err = process.communicate(timeout=60)
        finally:
            process.kill()
        assert process.returncode == 75, err
    assert subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, timeout=120).returncode == 0
    assert trial.compare(lab.undisturbed(1, 0)).sound
