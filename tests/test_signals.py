"""After a signal to any rank at any time: a checkpoint, exit code 75, and the same run resumed."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from fastbert.cluster.signals import StopRequest
from tests.ranks import ROOT, Ranks, catches, environment, free_port
from tests.tiers import slow
from tests.trials import Laboratory, Trial, lines_so_far, wait_for, wait_until_ready

WORLD, STAGE = 2, 1
SOON_S = 60.0  # "within a few seconds", on cores that others use too
LONG = "runtime.timeout_s=120"  # so that no time limit can be the cause
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


@pytest.fixture(scope="module")
def lab(tmp_path_factory, small_dataset) -> Laboratory:
    return Laboratory(tmp_path_factory.mktemp("interruptions"), small_dataset.path)


def interrupted(ranks: Ranks, trial: Trial) -> list[int]:
    """Return the exit codes of signalled ranks, which must end soon."""
    codes = ranks.wait(SOON_S)
    assert set(codes) == {75}, (
        f"{trial.folder}, start {trial.starts}: exit codes {codes}: {ranks.errors}"
    )
    return codes


@pytest.mark.parametrize(
    "number, to",
    [
        slow(signal.SIGINT, "all"),
        slow(signal.SIGUSR1, "rank 0"),
        (signal.SIGTERM, "rank 1"),
    ],
)
def test_a_signal_while_training(lab, number, to):
    """The moment differs by case: within a step, an evaluation or a save."""
    generator = random.Random(f"{number} {to}")
    trial, lines = lab.trial(LONG, stage=STAGE), generator.randint(1, 8)
    with trial.start(WORLD) as ranks:
        wait_for(lambda: lines_so_far(trial) >= lines)
        time.sleep(0.05 * generator.random())
        for rank in ranks.ranks if to == "all" else [ranks[int(to[-1])]]:
            rank.signal(number)
        interrupted(ranks, trial)
        said = ranks[0].out.read_text().splitlines()[-1]
    done = trial.steps[-1]["step"]
    name = signal.Signals(number).name
    assert trial.records("stop") == [
        {
            "event": "stop",
            "step": done,
            "reason": f"interrupted by {name if to != 'rank 1' else 'another rank'}",
        }
    ]
    assert said.endswith(f"resume with: fastbert pretrain {trial.run / 'config.toml'} --resume")
    assert trial.checkpoints[-1].name == f"step-{done:08}"
    assert lab.finish(trial, WORLD, STAGE).passed


@pytest.mark.parametrize(
    "share, to",
    [
        (0.0, "all"),
        slow(0.0, "rank 1"),
        (0.25, "rank 1"),
        slow(0.5, "rank 0"),
        (0.75, "all"),
    ],
)
def test_a_signal_while_starting(lab, to, share):
    """It comes before the ranks join, while they join, or while DeepSpeed starts."""
    trial, seconds = lab.trial(LONG, stage=STAGE), share * lab.seconds(WORLD, STAGE)[0]
    number = SIGNALS[int(share * 4) % 3]
    with trial.start(WORLD) as ranks:
        wait_until_ready(ranks)
        time.sleep(seconds)
        for rank in ranks.ranks if to == "all" else [ranks[int(to[-1])]]:
            rank.signal(number)
        interrupted(ranks, trial)
    assert not (trial.run / "checkpoints").exists() or all(
        path.name.startswith("step-") for path in (trial.run / "checkpoints").iterdir()
    )


@pytest.mark.slow
def test_signals_one_after_the_other(lab):
    """A scheduler may repeat a signal, or send SIGUSR1 and soon after SIGTERM; both count once."""
    trial = lab.trial(LONG, stage=STAGE)
    with trial.start(WORLD) as ranks:
        wait_for(lambda: lines_so_far(trial) >= 3)
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1):
            ranks.signal(number)
        interrupted(ranks, trial)
    assert lab.finish(trial, WORLD, STAGE).passed


# The same with the commands that users type. The processes above were forked from one that had
# already imported everything.


def torchrun(trial: Trial) -> list[str]:
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(WORLD),
        "-m",
        "fastbert",
        *trial.command,
    ]


def deepspeed(trial: Trial) -> list[str]:
    hosts = trial.folder / "hostfile"
    hosts.write_text(f"localhost slots={WORLD}\n")
    launcher = str(Path(sys.executable).with_name("deepspeed"))
    where = [
        "--hostfile",
        str(hosts),
        "--no_ssh_check",
        "--master_addr",
        "127.0.0.1",
        "--master_port",
        str(free_port()),
    ]
    return [launcher, *where, "--no_local_rank", "--module", "fastbert", *trial.command]


def by_hand(trial: Trial) -> list[str]:
    return [sys.executable, "-m", "fastbert", *trial.command]


@contextmanager
def started(command: list[str], trial: Trial) -> Iterator[subprocess.Popen]:
    """Run a command and its children in a new session; their output goes to the trial's `said`."""
    with open(trial.folder / "said", "ab") as said:
        process = subprocess.Popen(
            command, env=environment(), cwd=ROOT, stdout=said, stderr=said, start_new_session=True
        )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


# test_end_to_end.py does it without a launcher. torchrun itself only knows 0 and 1.
@pytest.mark.slow
@pytest.mark.parametrize("launcher, code", [(torchrun, 1), (deepspeed, 75)])
def test_the_commands_that_users_type(lab, launcher, code):
    """A run is interrupted, and resumed by another launcher: equal to the last digit."""
    trial = lab.trial(stage=STAGE)
    with started(launcher(trial), trial) as process:
        wait_for(lambda: lines_so_far(trial) >= 4 or process.poll() is not None)
        assert process.poll() is None, (trial.folder / "said").read_text()
        ranks = [
            p for p in psutil.Process(process.pid).children(recursive=True) if not p.children()
        ]
        assert len(ranks) == WORLD
        ranks[0].send_signal(signal.SIGUSR1)
        assert process.wait(timeout=120) == code, (trial.folder / "said").read_text()
    assert [stop["reason"] for stop in trial.records("stop")] in (
        ["interrupted by SIGUSR1"],
        ["interrupted by another rank"],
    )
    assert lab.finish(trial, WORLD, STAGE).passed


@pytest.mark.slow
def test_a_signal_while_torch_is_imported(lab):
    trial = lab.trial()
    with started(by_hand(trial), trial) as process:
        wait_for(lambda: catches(process.pid, signal.SIGTERM) or process.poll() is not None)
        assert not any(
            "libtorch" in line
            for line in Path(f"/proc/{process.pid}/maps").read_text().splitlines()
        )
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=120) == 75, (trial.folder / "said").read_text()


def test_a_request_that_is_entered_twice_gives_back_the_handlers_and_the_second_ctrl_c():
    """The command line enters it before the imports, and the loop enters it again."""

    def ours(number: int, frame: object) -> None:
        seen.append(number)

    seen: list[int] = []
    before = signal.signal(signal.SIGINT, ours)
    try:
        with StopRequest() as request:
            with request:
                os.kill(os.getpid(), signal.SIGINT)
                assert (request.asked, seen) == ("SIGINT", [])
                os.kill(os.getpid(), signal.SIGINT)
                assert seen == [signal.SIGINT]
            os.kill(os.getpid(), signal.SIGTERM)  # the outer context still listens
            assert request.asked == "SIGTERM"
        assert signal.getsignal(signal.SIGINT) is ours
    finally:
        signal.signal(signal.SIGINT, before)


LAUNCHER = """
import os, subprocess, sys
worker = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=sys.stdout)
print(worker.pid, flush=True)
worker.wait()
"""
WORKER = """
import sys, time
from fastbert.cluster.signals import StopRequest
with StopRequest() as request:
    print("ready", flush=True)
    until = time.monotonic() + float(sys.argv[1] if sys.argv[1:] else 20)
    while request.asked is None and time.monotonic() < until:
        time.sleep(0.05)
    print(request.asked, flush=True)
"""


@pytest.mark.parametrize(
    "variable, name",
    [
        ("TORCHELASTIC_RUN_ID", "torchrun"),
        ("CROSS_SIZE", "deepspeed"),
        ("SLURM_STEP_NUM_TASKS", "srun"),
        ("RANK", None),
        ("SLURM_STEP_NUM_TASKS without WORLD_SIZE", None),
    ],
)
def test_the_end_of_a_launcher_is_a_stop_request(variable, name):
    """The end of a shell is none: a run that was started with nohup and & continues."""
    variable, _, without = variable.partition(" without ")
    worker = WORKER if name else WORKER.replace("else 20", "else 3")
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, worker],
        stdout=subprocess.PIPE,
        text=True,
        env=environment(**{variable: "1", **({} if without else {"WORLD_SIZE": "2"})}),
    )
    assert launcher.stdout is not None
    lines = {launcher.stdout.readline().strip(), launcher.stdout.readline().strip()}
    assert "ready" in lines
    launcher.kill()
    assert launcher.stdout.read().strip() == (f"the end of {name}" if name else "None")
    launcher.wait()


def test_the_ranks_of_deepspeed_do_not_outlive_its_launcher(tmp_path):
    """The process that starts ranks on each machine, not the command `deepspeed`, is killed."""
    (tmp_path / "worker.py").write_text(WORKER.replace("else 20", "else 300"), encoding="utf-8")
    nodes = base64.urlsafe_b64encode(json.dumps({"localhost": [0, 1]}).encode()).decode()
    launch = [sys.executable, "-m", "deepspeed.launcher.launch", f"--world_info={nodes}"]
    where = ["--node_rank=0", "--master_addr=127.0.0.1", f"--master_port={free_port()}"]
    said = tmp_path / "said"
    with open(said, "w") as out:
        launcher = subprocess.Popen(
            [*launch, *where, "--no_local_rank", str(tmp_path / "worker.py")],
            stdout=out,
            stderr=subprocess.DEVNULL,
            env=environment(),
        )
    try:
        wait_for(lambda: said.read_text().count("ready") == 2 or launcher.poll() is not None)
        ranks = psutil.Process(launcher.pid).children()
    finally:
        launcher.kill()
        launcher.wait()
    _, alive = psutil.wait_procs(ranks, timeout=SOON_S)
    for rank in alive:
        rank.kill()
    assert len(ranks) == 2 and not alive
    assert said.read_text().count("the end of deepspeed") == 2
