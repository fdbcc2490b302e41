"""Bytes that each rank sends in a training step, by ZeRO stage and number of ranks; needs no GPU.

    python -m benchmarks.step.communication         print a table, and the reasons for its figures
    python -m benchmarks.step.communication --json  print one JSON object per line

Each rank is a process in its own network namespace; virtual cables connect them
(tests/namespaces.py). The measured quantity is the bytes that a rank's interface sends from one
step to a later one, including headers and acknowledgements, excluding start-up. The model is
BERT-mini in fp32 on made-up batches, with the settings of ds_config.json.

P parameters, N ranks, m micro-batches per step. A *pass* is P (N - 1) / N values sent by each rank:
what a ring sends to reduce-scatter or to all-gather P values, and the minimum for either. An
all-reduce is one of each. Four columns count passes:

- least: the minimum. It is 2 at stages 0 and 1. It is m + 1 at stage 2, where no rank keeps all
  gradients, so each micro-batch is reduced. It is 3 m at stage 3, where no rank keeps all weights
  either, so they are gathered for each forward and each backward pass.
- asked: the operations that DeepSpeed requests, done with rings, as NCCL does them.
- gloo: the same operations, as gloo does them.
- sent: what the interfaces counted. The exit code is 1 if it differs from gloo's column by more
  than 2 %.

Source: Patarasuk and Yuan, 2009, "Bandwidth optimal all-reduce algorithms for clusters of
workstations", for the rings; Rajbhandari et al., 2020, "ZeRO", section 7, for the stages.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.harness.machine import ROOT, header, header_line
from benchmarks.step.made_up_training import Sizes, made_up_batch, model_config
from fastbert.config import RunConfig, RuntimeConfig
from fastbert.models.build import build_model
from fastbert.planning.parameters import count_parameters
from tests.namespaces import Nodes, Unavailable

SIZES = Sizes("mini", 8192, 512, 64)  # preset, V, tokens of a micro-batch, longest sequence
WIDTH = 4  # bytes of a gradient or a weight
WARM_UP, STEPS = 2, 3  # in the first steps stage 3 records its prefetch order
PATIENCE_S = 600.0  # time limit for all cases of one world size; not reached in normal operation

UNEXPLAINED = 0.02  # share of gloo's bytes: headers, acknowledgements, sums of losses and norms
SEGMENT = 1 << 20  # bytes; gloo's kMaxSegmentSize


class Operation(NamedTuple):
    """An operation of torch.distributed.

    The functions give the mean bytes that each of N ranks sends for a whole tensor of B bytes.
    """

    name: str
    ring: Callable[[int, int], float]
    gloo: Callable[[int, int], float]


def one_pass(B: int, N: int) -> float:
    return B * (N - 1) / N


def two_passes(B: int, N: int) -> float:
    return 2 * one_pass(B, N)


def gloo_reduce(B: int, N: int) -> float:
    """A reduce-scatter and a gather.

    In the reduce-scatter a rank's own share goes around the ring once more, except its last two
    segments. Then the shares are sent to the root. Source: gloo/reduce.cc.
    """
    segment = min(math.ceil(B / (2 * N)), SEGMENT)
    of_share = max(math.ceil(math.ceil(B / segment) / N), 2)
    lengths = [min(max(B - i * segment, 0), segment) for i in range(N * of_share)]
    skipped = lengths[of_share - 1 :: of_share] + lengths[of_share - 2 :: of_share]
    return B - sum(skipped) / N + one_pass(B, N) / N


# Keys are the names in c10d. gloo's reduce-scatter is an all-reduce of which each rank keeps its
# share: ProcessGroupGloo.cpp of torch.
OPERATIONS = {
    "allreduce_": Operation("all-reduce", two_passes, two_passes),
    "_allgather_base_": Operation("all-gather", one_pass, one_pass),
    "allgather_": Operation("all-gather", one_pass, one_pass),
    "_reduce_scatter_base_": Operation("reduce-scatter", one_pass, two_passes),
    "alltoall_base_": Operation("all-to-all", one_pass, one_pass),
    "reduce_": Operation("reduce", one_pass, gloo_reduce),
    "broadcast_": Operation("broadcast", one_pass, one_pass),
}

CAUSES = """\
Why DeepSpeed requests more than the minimum. Stages 1 and 2 sum a bucket of gradients for all
ranks, although each rank needs only its share: one all-reduce per bucket instead of one reduction
for each owner. With zero_optimization.use_multi_rank_bucket_allreduce = false ("owners") each
share is reduced to its owner, which is the minimum. With many ranks this means many small messages.

Why it requests less. Stage 3 keeps weights that it needs again soon (stage3_max_reuse_distance and
stage3_max_live_parameters, a billion each). A model of BERT's size keeps all weights from the
forward to the backward pass, and small ones permanently (stage3_param_persistence_threshold). With
these three at 0 ("dropped") it gathers them twice, which is the minimum for a stage 3 that saves
their memory.

Why gloo sends more than is requested. Its reduce-scatter is an all-reduce: one extra pass for each
micro-batch at stage 3. Its reduce sends the data almost once more around the ring than necessary,
and then to the owner: 1.3 extra passes on 2 ranks, 0.25 on 4. NCCL does neither."""


class Case(NamedTuple):
    """One way to train."""

    stage: int
    micro_batches: int
    variant: str = ""  # a key of VARIANTS


# By name: the stages of a variant, and its changes to zero_optimization of ds_config.json.
VARIANTS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "": ((0, 1, 2, 3), {}),
    "owners": ((1, 2), {"use_multi_rank_bucket_allreduce": False}),
    "dropped": (
        (3,),
        {
            "stage3_max_reuse_distance": 0,
            "stage3_max_live_parameters": 0,
            "stage3_param_persistence_threshold": 0,
        },
    ),
}


class Measured(NamedTuple):
    """Mean bytes per step and rank."""

    world: int
    case: Case
    least: float
    asked: dict[str, float]  # by operation, as rings do it
    gloo: float
    sent: float
    sent_by_rank: list[float]

    def passes(self, count: float) -> float:
        return count / one_pass(parameters() * WIDTH, self.world)


def cases(stages: Sequence[int], world: int) -> list[Case]:
    if world == 1:  # nothing is sent
        return [Case(stage, 1) for stage in stages]
    return [
        Case(stage, m, name)
        for stage in stages
        for name, (fitting, _) in VARIANTS.items()
        if stage in fitting
        for m in (1, 2)
    ]


def parameters() -> int:
    return count_parameters(model_config(SIZES.preset, 0.0), SIZES.vocab_size)


def least_bytes(world: int, stage: int, micro_batches: int) -> float:
    passes = (2, 2, micro_batches + 1, 3 * micro_batches)[stage]
    return passes * one_pass(parameters() * WIDTH, world)


# A rank.


class Asked(TorchDispatchMode):
    """Records every operation of torch.distributed: its name, and the bytes of the whole tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        namespace, _, name = func._schema.name.partition("::")
        if namespace == "c10d" and name != "barrier":
            self.calls.append((name, max(map(size, args))))
        return func(*args, **(kwargs or {}))


def size(argument: Any) -> int:
    """Bytes of a tensor, or of all tensors in a list."""
    if isinstance(argument, torch.Tensor):
        return argument.nbytes
    return sum(map(size, argument)) if isinstance(argument, (list, tuple)) else 0


def sent_bytes(interface: str = "eth0") -> int:
    """Bytes that the interface has sent since it was created, in this process's network."""
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        name, _, counts = line.partition(":")
        if name.strip() == interface:
            return int(counts.split()[8])
    return 0


def train(wanted: Sequence[Case], ds_config: str) -> None:
    """Run one rank; prints a line of JSON for each case."""
    from fastbert.cluster.group import join
    from fastbert.training.ds_config import DeepSpeedSettings, read_ds_config
    from fastbert.training.engine import Engine

    config = RunConfig(
        data="none",
        model=model_config(SIZES.preset, 0.1),
        runtime=RuntimeConfig(deepspeed=ds_config),
    )
    own = read_ds_config(config, "benchmarks.step.communication").values
    with join(PATIENCE_S) as group:
        for case in wanted:
            zero = {**own["zero_optimization"], "stage": case.stage, **VARIANTS[case.variant][1]}
            settings = DeepSpeedSettings(ds_config, {**own, "zero_optimization": zero})
            batches = [
                made_up_batch(SIZES, case.micro_batches * group.rank + i, group.device)
                for i in range(case.micro_batches)
            ]
            torch.manual_seed(0)
            with Engine(
                build_model(config.model, SIZES.vocab_size), config, settings, "fp32", group
            ) as engine:
                for _ in range(WARM_UP):
                    engine.step(batches, 1e-3)
                group.barrier()
                before = sent_bytes()
                with Asked() as asked:
                    for _ in range(STEPS):
                        engine.step(batches, 1e-3)
                group.barrier()
                sent = sent_bytes() - before
            print(json.dumps({"sent": sent, "calls": asked.calls}), flush=True)


# The launcher.


def measure(
    world: int,
    wanted: Sequence[Case],
    ds_config: str = str(ROOT / "fastbert/recipes/ds_config.json"),
) -> list[Measured]:
    """Train on `world` ranks, each in its own network.

    Raises:
        Unavailable: this machine or this user's rights do not allow such networks.
    """
    with Nodes(world) as nodes:
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
            "OMP_NUM_THREADS": "1",
        }
        environment |= {
            "WORLD_SIZE": str(world),
            "LOCAL_RANK": "0",
            "MASTER_ADDR": nodes[0].address,
            "MASTER_PORT": "29500",
        }
        command = [
            sys.executable,
            "-m",
            "benchmarks.step.communication",
            "--rank",
            json.dumps([ds_config, *wanted]),
        ]
        pipes: Any = {
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
            "text": True,
            "cwd": ROOT,
        }
        ranks = [
            nodes[rank].popen(command, env={**environment, "RANK": str(rank)}, **pipes)
            for rank in range(world)
        ]
        said = [rank.communicate(timeout=PATIENCE_S) for rank in ranks]
    for rank, (process, (_, errors)) in enumerate(zip(ranks, said, strict=True)):
        if process.returncode:
            raise RuntimeError(f"rank {rank} of {world} ended with {process.returncode}: {errors}")
    rows = [
        [json.loads(line) for line in out.splitlines() if line.startswith("{")] for out, _ in said
    ]
    return [counted(world, case, of_ranks) for case, *of_ranks in zip(wanted, *rows, strict=True)]


def counted(world: int, case: Case, of_ranks: Sequence[Mapping[str, Any]]) -> Measured:
    """Combine what the ranks have printed for a case; all ranks request the same operations."""
    asked: dict[str, float] = {}
    gloo = 0.0
    for name, whole in of_ranks[0]["calls"]:
        operation = OPERATIONS[name]
        asked[operation.name] = (
            asked.get(operation.name, 0.0) + operation.ring(whole, world) / STEPS
        )
        gloo += operation.gloo(whole, world) / STEPS
    sent = [rank["sent"] / STEPS for rank in of_ranks]
    return Measured(
        world,
        case,
        least_bytes(world, case.stage, case.micro_batches),
        asked,
        gloo,
        sum(sent) / world,
        sent,
    )


def fault(row: Measured) -> str | None:
    if abs(row.sent - row.gloo) <= UNEXPLAINED * row.gloo:
        return None
    name = f"stage {row.case.stage} {row.case.variant}".strip()
    case = f"{name}, {row.world} ranks, {row.case.micro_batches} micro-batches"
    return f"{case}: {row.sent:,.0f} bytes a rank and step; gloo should send {row.gloo:,.0f}"


def table(rows: Iterable[Measured]) -> str:
    """The table as text."""
    lines = [
        f"{'':25}{'micro-':>8}{'MB a rank and step':>22}{'passes':^36}",
        f"{'stage':17}{'ranks':>8}{'batches':>8}{'least':>11}{'sent':>11}"
        f"{'least':>9}{'asked':>9}{'gloo':>9}{'sent':>9}   asked for",
    ]
    for row in rows:
        case = row.case
        line = (
            f"{case.stage} {case.variant:15}{row.world:>8}{case.micro_batches:>8}"
            f"{row.least / 1e6:>11.2f}{row.sent / 1e6:>11.2f}"
        )
        if row.world > 1:
            counts = [
                row.passes(count)
                for count in (row.least, sum(row.asked.values()), row.gloo, row.sent)
            ]
            operations = [
                f"{name} {row.passes(count):.2f}"
                for name, count in row.asked.items()
                if row.passes(count) > 0.005
            ]
            line += "".join(f"{count:>9.2f}" for count in counts) + "   " + ", ".join(operations)
        lines.append(line)
    return "\n".join(line.rstrip() for line in lines)


def record(row: Measured) -> dict[str, Any]:
    """The row as JSON."""
    return {**row._asdict(), "case": row.case._asdict(), "parameters": parameters(), "width": WIDTH}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object per line")
    parser.add_argument(
        "--stages",
        type=int,
        nargs="+",
        choices=range(4),
        default=list(range(4)),
        help="ZeRO stages (all)",
    )
    parser.add_argument(
        "--ranks", type=int, nargs="+", default=[1, 2, 4], help="numbers of ranks (1 2 4)"
    )
    parser.add_argument(
        "--ds-config",
        default=str(ROOT / "fastbert/recipes/ds_config.json"),
        help="DeepSpeed's settings (the project's ds_config.json)",
    )
    # Internal: act as one rank; a JSON list of the settings file and the cases.
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        ds_config, *wanted = json.loads(options.rank)
        train([Case(*case) for case in wanted], ds_config)
        return 0
    try:
        rows = [
            row
            for world in options.ranks
            for row in measure(world, cases(options.stages, world), options.ds_config)
        ]
    except Unavailable as error:
        print(f"communication: {error}", file=sys.stderr)
        return 2
    if options.json:
        print("\n".join(json.dumps(record(row)) for row in rows))
    else:
        model = (
            f"BERT-{SIZES.preset}, {parameters():,} parameters, fp32: "
            f"{parameters() * WIDTH / 1e6:.2f} MB of gradients, as of weights"
        )
        print(
            f"{header_line(header(torch.device('cpu')))}\n"
            f"{model}; a pass is (N - 1) / N of that\n\n{table(rows)}\n\n{CAUSES}"
        )
    wrong = [line for line in map(fault, rows) if line]
    for line in wrong:
        print(f"FAULT {line}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
