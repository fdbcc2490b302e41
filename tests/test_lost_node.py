"""A node of two is lost: the other one goes on from the newest checkpoint, and what is learned is what an undisturbed run learns."""

from __future__ import annotations

import json
import signal
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster import Cluster, Command, block, metrics, until
from tests.namespaces import why_not

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

STEPS, EVERY = 120, 5
TIMEOUT_S = 15  # to build an engine on a busy machine takes several seconds
ROUNDING = 1e-3  # relative: sums of another order, over STEPS steps at a high learning rate
QUICK = "--rdzv-conf last_call_timeout=1,keep_alive_interval=1,keep_alive_max_attempt=3"


def recorded(path: Path) -> dict[int, list[dict[str, Any]]]:
    """What the ranks noted, by step, in the order in which they did."""
    found = defaultdict(list)
    for line in path.read_text().splitlines():
        note = json.loads(line)
        found[note["step"]].append(note)
    return found


@pytest.fixture(scope="module")
def undisturbed(small_store, tmp_path_factory) -> Path:
    """The folder of a run of one process that nothing has disturbed."""
    cluster = Cluster(tmp_path_factory.mktemp("undisturbed"), small_store.path, steps=STEPS, every=EVERY)
    environment = {**cluster.environment, "RECORD": str(cluster.folder / "record.jsonl"), "RANK": "0", "WORLD_SIZE": "1"}
    command = ["python", "-m", "tests.recorded", "pretrain", "recipes/base.toml"]
    done = subprocess.run(command, cwd=cluster.folder, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return cluster.folder


@pytest.fixture
def cluster(small_store, tmp_path) -> Iterator[Cluster]:
    with Cluster(tmp_path, small_store.path, steps=STEPS, every=EVERY) as cluster:
        cluster.environment |= {"RECORD": str(tmp_path / "record.jsonl"), "PACE_S": "0.1"}
        yield cluster


def start(cluster: Cluster, node: int, endpoint: str = "node0") -> Command:
    """The command of the document, in a hurry, and with a record."""
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
    """Both nodes, until they have a checkpoint behind them and steps after it."""
    commands = [start(cluster, node) for node in (0, 1)]
    until_step(cluster, 2 * EVERY + 2, commands)
    assert {note["world"] for notes in recorded(cluster.folder / "record.jsonl").values() for note in notes} == {2}
    for i, port in cluster.listening():
        assert port.address in ("127.0.0.1", "::1", cluster.nodes[i].address), port
    return commands


def until_step(cluster: Cluster, step: int, commands: list[Command], world: int | None = None) -> None:
    """Return when a rank has finished this step, or a later one, in a world of this size."""

    def come() -> bool:
        for command in commands:
            assert command.process.poll() is None, command.output
        path = cluster.folder / "record.jsonl"
        notes = [note for notes in (recorded(path) if path.exists() else {}).values() for note in notes]
        return any(note["step"] >= step and world in (None, note["world"]) for note in notes)

    until(come, f"step {step} in a world of {world or 'any size'}")


def check_as_undisturbed(cluster: Cluster, undisturbed: Path) -> None:
    """In what became of the run each step has its examples once, shared by the ranks; its losses, also when redone, are the same."""
    ours, reference = recorded(cluster.folder / "record.jsonl"), recorded(undisturbed / "record.jsonl")
    assert sorted(ours) == sorted(reference) == list(range(1, STEPS + 1))
    for step, notes in ours.items():
        last = notes[-notes[-1]["world"] :]  # the ranks that did it last
        assert sorted(note["rank"] for note in last) == list(range(notes[-1]["world"])), step
        examples = [example for note in last for example in note["examples"]]
        assert sorted(examples) == sorted(reference[step][0]["examples"]), step
    steps = {step["step"]: step for step in metrics(undisturbed / "runs/base")}
    done = metrics(cluster.run)
    assert {step["step"] for step in done} == set(steps)
    for step in done:
        for key in ("loss_mlm", "loss_nsp"):
            assert step[key] == pytest.approx(steps[step["step"]][key], rel=ROUNDING), (key, step["step"])


def resumes(cluster: Cluster) -> list[int]:
    return [event["step"] for event in metrics(cluster.run, "resume")]


def test_a_killed_node(cluster, undisturbed):
    other, lost = start_both(cluster)
    cluster.nodes[1].kill()
    assert lost.wait() == -signal.SIGKILL
    assert other.wait() == 0, other.output
    (resumed,) = resumes(cluster)
    assert resumed % EVERY == 0 and resumed >= EVERY
    check_as_undisturbed(cluster, undisturbed)
    assert {note["host"] for note in recorded(cluster.folder / "record.jsonl")[STEPS]} == {"node0"}


def test_a_node_that_is_cut_off_and_comes_back(cluster, undisturbed):
    other, lost = start_both(cluster)
    cluster.nodes.cut(1)
    until_step(cluster, 3 * EVERY, [other], world=1)
    assert lost.wait() == 1
    cluster.nodes.mend(1)
    again = start(cluster, 1)
    assert [other.wait(), again.wait()] == [0, 0], other.output + again.output
    alone, together = resumes(cluster)
    assert alone % EVERY == 0 and together > alone
    check_as_undisturbed(cluster, undisturbed)
    record = recorded(cluster.folder / "record.jsonl")
    assert len(record[together + 1]) >= 2 and {note["host"] for note in record[STEPS]} == {"node0", "node1"}


def test_the_node_with_the_rendezvous_is_lost(cluster, undisturbed):
    """Nobody can go on by himself; the same command with another place to meet does."""
    lost, other = start_both(cluster)
    cluster.nodes[0].kill()
    assert [lost.wait(), other.wait()] == [-signal.SIGKILL, 1]
    again = start(cluster, 1, endpoint="node1")
    assert again.wait() == 0, again.output
    assert len(resumes(cluster)) == 1
    check_as_undisturbed(cluster, undisturbed)
