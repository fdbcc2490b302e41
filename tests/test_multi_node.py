"""Run docs/multi-node.md and examples/cluster unchanged.

Every command there trains the same model as a single process.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import Block, Cluster, Command, block, blocks, metrics, until
from tests.namespaces import why_not

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
]

ONE_MACHINE = "One machine, several GPUs"
# The commands under these headings run too, and more is done with them: here and in
# test_lost_node.py.
APART = ("One process", "Slurm", "Kubernetes", "Nodes may come and go")
ROUNDING = 1e-4  # relative: sums of another order, over 20 steps


@pytest.fixture(scope="module")
def alone(small_dataset, tmp_path_factory) -> Path:
    """The run folder of the page's first command: a single process without a launcher."""
    with Cluster(tmp_path_factory.mktemp("alone"), small_dataset.path) as cluster:
        (command,) = cluster.start_block(block("One process"))
        until(lambda: metrics(cluster.run) or command.process.poll() is not None, "the first step")
        check_ports(cluster, several_machines=False)
        assert len(cluster.ranks(0)) == 1
        finish([command])
        return cluster.run


@pytest.fixture
def cluster(request, small_dataset, tmp_path) -> Iterator[Cluster]:
    with Cluster(tmp_path, small_dataset.path, gpus=getattr(request, "param", 1)) as cluster:
        yield cluster


def check_equal(run: Path, alone: Path) -> None:
    """Check that every step is there once, with the losses of the single process."""
    ours, reference = metrics(run), metrics(alone)
    assert [step["step"] for step in ours] == [step["step"] for step in reference]
    for one, other in zip(ours, reference, strict=True):
        assert {k: one[k] for k in ("tokens", "masked", "sequences", "lr")} == {
            k: other[k] for k in ("tokens", "masked", "sequences", "lr")
        }
        for key in ("loss_mlm", "loss_nsp", "grad_norm"):
            assert one[key] == pytest.approx(other[key], rel=ROUNDING), (key, one["step"])


def check_ports(cluster: Cluster, several_machines: bool) -> None:
    """Check that no process listens on an address that the run does not need."""
    found = cluster.listening()
    for i, port in found:
        assert port.address in ("127.0.0.1", "::1") or (
            several_machines and port.address == cluster.nodes[i].address
        ), port


def finish(commands: list[Command]) -> None:
    codes = [command.wait() for command in commands]
    assert codes == [0] * len(commands), "\n".join(command.output for command in commands)


def cases() -> list:
    found = []
    for number, one in enumerate(blocks()):
        if one.heading not in APART:
            found.append(
                pytest.param(
                    2 if one.heading == ONE_MACHINE else 1, one, id=f"{number} {one.heading}"
                )
            )
    return found


@pytest.mark.parametrize("cluster, commands", cases(), indirect=["cluster"])
def test_a_command_trains_the_same_model(commands: Block, cluster, alone):
    started = cluster.start_block(commands)
    several = commands.heading != ONE_MACHINE
    until(
        lambda: metrics(cluster.run) or any(c.process.poll() is not None for c in started),
        "the first step",
    )
    check_ports(cluster, several)
    assert [len(cluster.ranks(0)), len(cluster.ranks(1))] == ([1, 1] if several else [2, 0])
    finish(started)
    check_equal(cluster.run, alone)


def test_slurm_interrupts_and_requeues(cluster, alone):
    """SIGUSR1 reaches every task before the time limit: the run is saved, requeued and finished."""
    (job,) = cluster.start_block(block("Slurm"))
    until(lambda: len(metrics(cluster.run)) >= 5, "five steps")
    check_ports(cluster, True)
    for rank in cluster.ranks(0) + cluster.ranks(1):
        rank.send_signal(signal.SIGUSR1)
    finish([job])
    log = (cluster.folder / "slurm-7.log").read_text()
    assert log.count("interrupted, a checkpoint is saved: requeued") == 1
    (stop, end) = metrics(cluster.run, "stop")
    assert stop["reason"] == "interrupted by SIGUSR1" and end["reason"] == "stop.steps = 20"
    assert [resume["step"] for resume in metrics(cluster.run, "resume")] == [stop["step"]]
    check_equal(cluster.run, alone)


def test_slurm_does_not_requeue_bad_input(cluster):
    ((_, command),) = block("Slurm").commands
    assert cluster.start(f"{command} optimizer.lr=-1", node=0).wait() == 2
    log = (cluster.folder / "slurm-7.log").read_text()
    assert "requeued" not in log and "optimizer.lr = -1" in log


def start_kubernetes(cluster: Cluster) -> Command:
    """Create the key, then start the Job."""
    (_, create), (_, apply) = block("Kubernetes").commands
    assert cluster.start(create, node=0).wait() == 0
    return cluster.start(apply, node=0)


def test_kubernetes_replaces_an_evicted_pod(cluster, alone):
    """After SIGTERM to the first process of a pod, both pods save and end.

    Both are started again, and the Job completes.
    """
    apply = start_kubernetes(cluster)
    until(lambda: len(metrics(cluster.run)) >= 5, "five steps")
    check_ports(cluster, True)
    (rank,) = cluster.ranks(1)
    launcher = rank.parent()
    assert launcher is not None and "deepspeed.launcher.launch" in launcher.cmdline()
    launcher.send_signal(signal.SIGTERM)
    finish([apply])
    assert [f"fastbert-{i}: start 2: exit code 0" in apply.output for i in (0, 1)] == [True, True]
    assert "fastbert-0: start 1: exit code 75" in apply.output
    check_equal(cluster.run, alone)


def test_kubernetes_fails_the_job_for_bad_input(cluster):
    path = cluster.folder / "examples/cluster/kubernetes.yaml"
    path.write_text(path.read_text().replace(" --resume", " optimizer.lr=-1 --resume"))
    apply = start_kubernetes(cluster)
    assert apply.wait() == 1
    assert apply.output.count("exit code 2") == 2 and "start 2" not in apply.output
