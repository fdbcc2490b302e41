"""One of two nodes is lost, and the other one resumes from the newest checkpoint.

It learns what an undisturbed run learns.
"""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster import Cluster, Command, block, metrics, until
from tests.namespaces import why_not

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
]

STEPS, EVERY = 60, 5
TIMEOUT_S = 15  # to build an engine on a busy machine takes several seconds
ALONE_S = 1.5  # per step while one node is away, so that steps are left when it is back
ROUNDING = 1e-3  # relative: sums of another order, over STEPS steps at a high learning rate
QUICK = (
    "--rdzv-conf last_call_timeout=1,keep_alive_interval=1,keep_alive_max_attempt=3,read_timeout=5"
)


def notes(folder: Path) -> list[dict[str, Any]]:
    """Return the notes of the ranks, in order."""
    path = folder / "record.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def make(folder: Path, dataset: Path) -> Cluster:
    cluster = Cluster(folder, dataset, steps=STEPS, every=EVERY)
    cluster.environment |= {"RECORD": str(folder / "record.jsonl"), "PACE": str(folder / "pace")}
    pace(cluster, 0)
    return cluster


def pace(cluster: Cluster, seconds: float) -> None:
    """Set the minimum duration of each step from now on."""
    new = cluster.folder / "pace.new"
    new.write_text(str(seconds))
    new.replace(cluster.folder / "pace")


@pytest.fixture(scope="module")
def undisturbed(small_dataset, tmp_path_factory) -> Path:
    """The run folder of an undisturbed run of one process."""
    cluster = make(tmp_path_factory.mktemp("undisturbed"), small_dataset.path)
    command = ["python", "-m", "tests.recorded", "pretrain", "base.toml"]
    environment = {**cluster.environment, "RANK": "0", "WORLD_SIZE": "1"}
    done = subprocess.run(
        command, cwd=cluster.folder, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return cluster.folder


@pytest.fixture
def cluster(small_dataset, tmp_path) -> Iterator[Cluster]:
    with make(tmp_path, small_dataset.path) as cluster:
        yield cluster


def start(cluster: Cluster, node: int, endpoint: str = "node0") -> Command:
    """Start the document's command with short time-outs and a record."""
    ((_, command),) = block("Nodes may come and go").commands
    for of, by in {
        "node0:29500": f"{endpoint}:29500 {QUICK}",
        "-m fastbert": "-m tests.recorded",
        "timeout_s=60": f"timeout_s={TIMEOUT_S}",
    }.items():
        assert of in command
        command = command.replace(of, by)
    return cluster.start(command, node)


def start_both(cluster: Cluster) -> list[Command]:
    """Start both nodes, and wait for a checkpoint and later steps."""
    pace(cluster, 0.2)
    commands = [start(cluster, node) for node in (0, 1)]
    until_noted(cluster, commands, world=2, step=2 * EVERY + 2)
    assert {note["world"] for note in notes(cluster.folder)} == {2}
    for i, port in cluster.listening():
        assert port.address in ("127.0.0.1", "::1", cluster.nodes[i].address), port
    return commands


def until_noted(cluster: Cluster, commands: list[Command], world: int, step: int = 1) -> None:
    """Wait until a rank, in a world of this size, finishes this step or a later one."""
    before = len(notes(cluster.folder))

    def come() -> bool:
        for command in commands:
            assert command.process.poll() is None, command.output
        return any(
            note["step"] >= step and note["world"] == world
            for note in notes(cluster.folder)[before:]
        )

    until(come, f"step {step} in a world of {world}")


def check_as_undisturbed(cluster: Cluster, undisturbed: Path) -> None:
    """Check that the finished run has each example of a step once, shared by the ranks.

    Its losses are those of the undisturbed run, also where a step was repeated.
    """
    ours, reference = by_step(notes(cluster.folder)), by_step(notes(undisturbed))
    assert sorted(ours) == sorted(reference) == list(range(1, STEPS + 1))
    for step, found in ours.items():
        last = found[-found[-1]["world"] :]  # the ranks that did it last
        assert sorted(note["rank"] for note in last) == list(range(found[-1]["world"])), step
        examples = [example for note in last for example in note["examples"]]
        assert sorted(examples) == sorted(reference[step][0]["examples"]), step
    steps = {step["step"]: step for step in metrics(undisturbed / "runs/base")}
    done = metrics(cluster.run)
    assert {step["step"] for step in done} == set(steps)
    for step in done:
        for key in ("loss_mlm", "loss_nsp"):
            assert step[key] == pytest.approx(steps[step["step"]][key], rel=ROUNDING), (
                key,
                step["step"],
            )


def by_step(found: list[dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
    return {
        step: [note for note in found if note["step"] == step]
        for step in {note["step"] for note in found}
    }


def resumes(cluster: Cluster) -> list[int]:
    return [event["step"] for event in metrics(cluster.run, "resume")]


def both_again(cluster: Cluster, commands: list[Command], undisturbed: Path) -> None:
    """Wait for the end of a run whose lost node is back.

    The node that trains alone saves at once. Both resume from there and finish.
    """
    until_noted(cluster, commands, world=2)
    pace(cluster, 0)
    assert [command.wait() for command in commands] == [0, 0], "\n".join(
        command.output for command in commands
    )
    alone, together = resumes(cluster)
    # An asynchronous save may be lost with the node.
    assert alone in (EVERY, 2 * EVERY) and together > alone
    assert f"stopped at step {together}: interrupted by SIGTERM" in commands[0].output
    check_as_undisturbed(cluster, undisturbed)
    assert {note["host"] for note in notes(cluster.folder) if note["step"] == STEPS} == {
        "node0",
        "node1",
    }


def test_a_node_is_killed_and_started_again(cluster, undisturbed):
    other, lost = start_both(cluster)
    cluster.nodes[1].kill()
    pace(cluster, ALONE_S)
    assert lost.wait() == -signal.SIGKILL
    until_noted(cluster, [other], world=1)
    both_again(cluster, [other, start(cluster, 1)], undisturbed)


def test_a_node_is_cut_off_and_comes_back(cluster, undisturbed):
    """Its torchrun has waited for the cable, so no command is needed."""
    other, lost = start_both(cluster)
    cluster.nodes.cut(1)
    pace(cluster, ALONE_S)
    until_noted(cluster, [other], world=1)
    cluster.nodes.reconnect(1)
    both_again(cluster, [other, lost], undisturbed)


def test_the_node_with_the_rendezvous_is_lost(cluster, undisturbed):
    """No node can resume alone; the same command with another endpoint works."""
    lost, other = start_both(cluster)
    cluster.nodes[0].kill()
    pace(cluster, 0)
    assert [lost.wait(), other.wait()] == [-signal.SIGKILL, 1]
    again = start(cluster, 1, endpoint="node1")
    assert again.wait() == 0, again.output
    assert len(resumes(cluster)) == 1
    check_as_undisturbed(cluster, undisturbed)
