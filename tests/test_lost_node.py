"""One of two nodes is lost, and the other one resumes from the newest checkpoint.

It learns what an undisturbed run learns. A run loses nodes three times, since most of the time goes
to starting processes that import everything.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fastbert.data.batches import Batches
from fastbert.data.dataset import TokenDataset
from fastbert.recipe import load_config
from tests.cluster import Cluster, Command, block, metrics, until
from tests.namespaces import why_not
from tests.ranks import Ranks

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
]

STEPS, EVERY = 80, 5
TIMEOUT_S = 15  # to build an engine on a busy machine takes several seconds
BOTH_S = 0.2  # per step while both nodes train, so that one can be lost in the middle
ALONE_S = 3.0  # while one node is away, so that steps are left when it is back on a busy machine
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
    folder = make(tmp_path_factory.mktemp("undisturbed"), small_dataset.path).folder
    with Ranks(["pretrain", "base.toml"], folder / "said", workplace=folder) as ranks:
        assert ranks.wait() == [0], ranks.errors
    return folder / "runs/base"


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
    pace(cluster, BOTH_S)
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


def check_as_undisturbed(cluster: Cluster, dataset: TokenDataset, undisturbed: Path) -> None:
    """Check that the finished run has each example of a step once, shared by the ranks.

    Its losses are those of the undisturbed run, also where a step was repeated.
    """
    ours = by_step(notes(cluster.folder))
    batches = Batches(dataset, load_config(undisturbed / "config.toml"))
    assert sorted(ours) == list(range(1, STEPS + 1))
    for step, found in ours.items():
        last = found[-found[-1]["world"] :]  # the ranks that did it last
        assert sorted(note["rank"] for note in last) == list(range(found[-1]["world"])), step
        examples = [example for note in last for example in note["examples"]]
        expected = [one for pack in batches.step(step - 1) for one in pack.examples.tolist()]
        assert sorted(examples) == sorted(expected), step
    steps = {step["step"]: step for step in metrics(undisturbed)}
    done = metrics(cluster.run)
    assert {step["step"] for step in done} == set(steps) == set(ours)
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


def resumes(cluster: Cluster, count: int) -> list[int]:
    """Wait until a run has resumed so often, and return the steps from which it did."""
    until(lambda: len(metrics(cluster.run, "resume")) >= count, f"resume number {count}")
    found = [event["step"] for event in metrics(cluster.run, "resume")]
    assert len(found) == count, found
    return found


def together_again(cluster: Cluster, commands: list[Command], before: int) -> int:
    """Wait until a lost node is back, after `before` resumes, and return the step of the next one.

    The node that trains alone saves at once, and both resume from there.
    """
    until_noted(cluster, commands, world=2)
    pace(cluster, BOTH_S)
    *_, alone, together = resumes(cluster, before + 1)
    assert together > alone
    assert f"stopped at step {together}: interrupted by SIGTERM" in commands[0].output
    return together


def test_nodes_are_lost_and_come_back(cluster, small_dataset, undisturbed):
    first, second = start_both(cluster)

    # A node is cut off and comes back. Its torchrun has waited, so no command is needed.
    cluster.nodes.cut(1)
    pace(cluster, ALONE_S)
    until_noted(cluster, [first], world=1)
    # An asynchronous save may be lost with the node.
    assert resumes(cluster, 1)[0] in (EVERY, 2 * EVERY)
    cluster.nodes.reconnect(1)
    together = together_again(cluster, [first, second], 1)

    # It is killed, and started again.
    cluster.nodes[1].kill()
    pace(cluster, ALONE_S)
    assert second.wait() == -signal.SIGKILL
    until_noted(cluster, [first], world=1)
    assert resumes(cluster, 3)[2] >= together
    second = start(cluster, 1)
    together = together_again(cluster, [first, second], 3)

    # The node with the rendezvous is lost. No node can resume alone; the same command with another
    # endpoint works.
    cluster.nodes[0].kill()
    pace(cluster, 0)
    assert [first.wait(), second.wait()] == [-signal.SIGKILL, 1]
    again = start(cluster, 1, endpoint="node1")
    assert again.wait() == 0, again.output
    assert resumes(cluster, 5)[4] >= together
    check_as_undisturbed(cluster, small_dataset, undisturbed)
    hosts = {note["host"] for note in notes(cluster.folder) if note["step"] > together}
    assert hosts == {"node0", "node1"}
