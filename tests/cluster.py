"""Two nodes on which the commands of docs/multi-node.md can be run unchanged.

The nodes have the commands of a cluster and a shared folder. SMALLER lists what is smaller here
than in the document: the number of GPUs per node. The recipe is a tiny one, under the name that the
document uses.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from tests import stand_ins
from tests.namespaces import Listener, Nodes, Process
from tests.ranks import environment
from tests.trials import CLOCK

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs/multi-node.md"
EXAMPLES = ("hostfile", "slurm.sh", "kubernetes.yaml")
PATIENCE_S = 300.0  # a guard that a working run never reaches
SMALLER = {
    "--nproc-per-node 8": "--nproc-per-node {gpus}",
    "--num_gpus 8": "--num_gpus {gpus}",
    "slots=8": "slots={gpus}",
    "--ntasks-per-node=8": "--ntasks-per-node={gpus}",
    "[0, 1, 2, 3, 4, 5, 6, 7]": "[0]",
}

RECIPE = """
data = "data/wiki"
run = "runs/base"
[model]
num_hidden_layers = 2
hidden_size = 32
num_attention_heads = 2
intermediate_size = 48
max_position_embeddings = 64
[batch]
sequences = 8
max_length = 64
micro_batch_tokens = 200
[optimizer]
lr = 3e-3
[schedule]
warmup = 0
decay = "constant"
[stop]
steps = {steps}
[evaluate]
every = 1000
sequences = 16
[checkpoint]
every = {every}
keep = 99
[runtime]
precision = "fp32"
deepspeed = "{deepspeed}"
timeout_s = 60
"""


@dataclass(frozen=True)
class Block:
    """Commands of the document that make one run.

    Attributes:
        heading: the heading above them.
        commands: each with the numbers of the nodes that run it.
    """

    heading: str
    commands: list[tuple[tuple[int, ...], str]]


def blocks() -> list[Block]:
    """Return every block of commands of the document.

    A comment in a block says on which node the commands after it run; without a comment it is
    node0.
    """
    text = DOCUMENT.read_text(encoding="utf-8").replace("\\\n", " ")
    found, heading = [], ""
    for title, commands in re.findall(
        r"^#+ ([^\n]+)$|^```sh\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL
    ):
        heading = title or heading
        if not title:
            found.append(Block(heading, _commands(commands)))
    return found


def _commands(text: str) -> list[tuple[tuple[int, ...], str]]:
    where, found = (0,), []
    for line in text.splitlines():
        if comment := re.fullmatch(r"# on (every node|node(\d))", line):
            where = (int(comment[2]),) if comment[2] else (0, 1)
        else:
            found.append((where, line))
    return found


def block(heading: str) -> Block:
    (found,) = (block for block in blocks() if block.heading == heading)
    return found


def metrics(run: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """Return the steps in metrics.jsonl, or its events of one kind, without timings."""
    try:
        lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    found = [json.loads(line) for line in lines if line.endswith("\n")]
    return [
        {k: v for k, v in line.items() if k not in CLOCK}
        for line in found
        if line.get("event") == kind
    ]


def until(come: Callable[[], Any], what: str, patience_s: float = PATIENCE_S) -> None:
    """Return when `come()` is true."""
    deadline = time.monotonic() + patience_s
    while not come():
        if time.monotonic() > deadline:
            raise TimeoutError(f"after {patience_s:g} s still not: {what}")
        time.sleep(0.05)


class Command:
    """A command that runs on a node; its output goes to a file."""

    def __init__(self, process: Process, output: Path):
        self.process, self._output = process, output

    @property
    def output(self) -> str:
        return self._output.read_text(errors="replace")

    def wait(self, patience_s: float = PATIENCE_S) -> int:
        """Wait for the exit code."""
        try:
            return self.process.wait(patience_s)
        except subprocess.TimeoutExpired:
            raise TimeoutError(
                f"{self.process.args}: runs on; so far it said: {self.output}"
            ) from None


class Cluster:
    """Context manager for a cluster of two nodes.

    `nodes` are the nodes, `folder` is where commands run, and `run` is the run folder in it.

    Args:
        folder: an empty folder.
        dataset: the output of `fastbert prepare`.
        gpus: processes per node.
        steps: stop.steps of the recipe.
        every: steps between its checkpoints.
    """

    def __init__(
        self, folder: Path, dataset: Path, gpus: int = 1, steps: int = 20, every: int = 1000
    ):
        self.folder, self.run, self._gpus = folder, folder / "runs/base", gpus
        for name in ("data", "bin", "examples/cluster"):
            (folder / name).mkdir(parents=True)
        recipe = RECIPE.format(
            steps=steps, every=every, deepspeed=ROOT / "fastbert/recipes/ds_config.json"
        )
        (folder / "base.toml").write_text(recipe, encoding="utf-8")
        (folder / "data/wiki").symlink_to(dataset)
        for name in EXAMPLES:
            (folder / "examples/cluster" / name).write_text(
                self._smaller((ROOT / "examples/cluster" / name).read_text())
            )
        stand_ins.install(folder / "bin")
        self.environment = environment(
            PATH=os.pathsep.join(
                [str(folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]]
            )
        )
        self.nodes = Nodes(2)
        self._said = 0

    def __enter__(self) -> Cluster:
        self.nodes.__enter__()
        for node in self.nodes:
            sshd = [sys.executable, stand_ins.__file__, "sshd", node.address]
            server = node.popen(
                sshd, env=self.environment, cwd=self.folder, stdout=subprocess.PIPE, text=True
            )
            assert server.stdout and server.stdout.readline() == "ready\n"
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.nodes.__exit__(kind, error, trace)

    def start(self, command: str, node: int) -> Command:
        """Start a command line on a node."""
        self._said += 1
        output = self.folder / f"said-{self._said}-by-node{node}.txt"
        with open(output, "w") as file:
            line = ["bash", "-c", f"exec {self._smaller(command)}"]
            options: Any = {
                "stdin": subprocess.DEVNULL,
                "stdout": file,
                "stderr": subprocess.STDOUT,
            }
            return Command(
                self.nodes[node].popen(line, env=self.environment, cwd=self.folder, **options),
                output,
            )

    def start_block(self, block: Block) -> list[Command]:
        """Start the commands of a block, each on its nodes."""
        return [self.start(command, node) for where, command in block.commands for node in where]

    def listening(self) -> list[tuple[int, Listener]]:
        """Return every open port of the run's processes, with its node."""
        return [
            (i, port)
            for i, node in enumerate(self.nodes)
            for port in node.listening()
            if stand_ins.__file__ not in port.command
        ]

    def ranks(self, node: int) -> list[psutil.Process]:
        """Return the processes that train on a node, without their launchers."""
        return [process for process in self.nodes[node].processes() if _is_rank(process.cmdline())]

    def _smaller(self, text: str) -> str:
        for of, by in SMALLER.items():
            text = text.replace(of, by.format(gpus=self._gpus))
        return text


def _is_rank(words: list[str]) -> bool:
    """Tell a rank's command line from that of a launcher that has a rank's as arguments.

    A rank's is `python -u -m fastbert pretrain ...` or `python .../bin/fastbert pretrain ...`.
    """
    before = words[: words.index("pretrain")] if "pretrain" in words else []
    return (
        2 <= len(before) <= 4
        and Path(before[0]).name.startswith("python")
        and Path(before[-1]).name in ("fastbert", "tests.recorded")
    )
