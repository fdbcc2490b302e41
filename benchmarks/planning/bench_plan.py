"""`fastbert plan` against reality: counted tensors, sent bytes, measured steps, published runs.

    python -m benchmarks.planning.bench_plan --out folder [--quick] [--docs docs/plan.md]

Memory. A real engine takes three steps; the third is measured. On a GPU torch itself counts
(`torch.cuda.max_memory_allocated`). On a CPU the count is the tensors that exist before the step,
plus every allocation during the step as recorded by torch's profiler. The profiler runs from the
start, because it must know what is released; it does not see releases by gloo's threads, so the
tensors are counted apart. Weights, master weights and moments are those that the engine holds.
Activations are the storages that autograd keeps of a forward pass, without weights and the batch.
The rest of the peak is compared with the sum of gradients, temporaries and buckets. CUDA's context
is not a tensor, so neither side includes it. The cases of two ranks are started by torchrun; the
first rank counts.

Communication. The prediction against what DeepSpeed requested, read from
benchmarks/results/communication.txt.

Step time. Steps of an engine against the prediction from the measured rates of this machine; only
on a CPU. The rates are measured before each step, with all of torch's threads. Other programs on
the machine slow both, not always equally; the quartiles show how much.

Published runs. The prediction against published sequences per second or hours (published_runs.py).

A difference is predicted over measured, minus one: a positive one means that too much memory or
too long a time was predicted. The heap is set as in a training run (fastbert/heap.py). `--quick`
runs fewer and smaller cases and no step times. `--docs` also replaces the tables in that page.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.harness.machine import ROOT, header, header_line
from benchmarks.harness.record import Record, Row
from benchmarks.harness.tables_and_plots import filled, table
from benchmarks.planning.published_runs import FUSED, UNFUSED, published_row
from benchmarks.step.communication import VARIANTS
from benchmarks.step.made_up_training import Sizes, made_up_batch, model_config
from fastbert.cluster.group import Group, join
from fastbert.config import BatchConfig, RunConfig
from fastbert.data.packing import PackedBatch
from fastbert.heap import keep_heap
from fastbert.models.build import build_model
from fastbert.models.heads import losses
from fastbert.planning.activations import MicroBatchSize, activation_bytes
from fastbert.planning.memory import Sharding, memory_by_part
from fastbert.planning.plan import communication_per_step, compute_seconds, this_machine
from fastbert.training.ds_config import DeepSpeedSettings
from fastbert.training.engine import Engine

BUCKETS = ("reduce_bucket_size", "allgather_bucket_size", "stage3_prefetch_bucket_size")
LR = 1e-3
COUNTED = "the counted step"


class Case(NamedTuple):
    """One engine: model and batch sizes, precision, ZeRO stage, and micro-batches per step."""

    sizes: Sizes
    precision: str = "fp32"
    stage: int = 0
    micro_batches: int = 1

    @property
    def name(self) -> str:
        preset, vocab_size, tokens, _ = self.sizes
        return (
            f"{preset}, V = {vocab_size:,}, {self.micro_batches} x {tokens:,} tokens, "
            f"{self.precision}, stage {self.stage}"
        )

    @property
    def bf16(self) -> bool:
        return self.precision == "bf16"

    @property
    def config(self) -> RunConfig:
        return RunConfig(
            data="none",
            model=model_config(self.sizes.preset, 0.1),
            batch=BatchConfig(micro_batch_tokens=self.sizes.tokens),
        )

    @property
    def zero(self) -> dict[str, Any]:
        return {**dict.fromkeys(BUCKETS, 16_000_000), "stage": self.stage}  # as ds_config.json

    def engine(self, group: Group) -> Engine:
        torch.manual_seed(0)
        model = build_model(self.config.model, self.sizes.vocab_size, device=group.device.type)
        settings = DeepSpeedSettings("ds_config.json", {"zero_optimization": self.zero})
        return Engine(model, self.config, settings, self.precision, group)

    def batches(self, device: torch.device) -> list[PackedBatch]:
        return [made_up_batch(self.sizes, seed, device) for seed in range(self.micro_batches)]


QUICK = [
    Case(Sizes("tiny", 4096, 1024, 128)),
    Case(Sizes("mini", 8192, 2048, 128)),
    Case(Sizes("small", 8192, 1024, 128)),
    Case(Sizes("tiny", 4096, 1024, 128), stage=1, micro_batches=2),
]
CASES = [
    Case(Sizes("tiny", 4096, 2048, 128)),
    Case(Sizes("tiny", 30522, 8192, 128)),
    Case(Sizes("mini", 8192, 512, 128)),
    Case(Sizes("mini", 8192, 4096, 128)),
    Case(Sizes("mini", 8192, 4096, 128), micro_batches=2),
    Case(Sizes("mini", 8192, 4096, 128), stage=1),
    Case(Sizes("mini", 8192, 4096, 128), "bf16", 1),
    Case(Sizes("mini", 8192, 1024, 128), "bf16", 1, 3),
    Case(Sizes("mini", 8192, 4096, 128), "bf16", 2, 2),
    Case(Sizes("mini", 8192, 4096, 128), "bf16", 3, 2),
    Case(Sizes("small", 8192, 2048, 128)),
    Case(Sizes("small", 30522, 4096, 512)),
    Case(Sizes("small", 30522, 2048, 512), "bf16", 1, 2),
]
RANK_CASES = [
    Case(Sizes("mini", 8192, 2048, 128)),
    Case(Sizes("mini", 8192, 2048, 128), "bf16", 1),
    Case(Sizes("mini", 8192, 2048, 128), "bf16", 2, 2),
    Case(Sizes("mini", 8192, 2048, 128), "bf16", 3),
]
GPU_CASES = [  # bf16, the usual precision; includes the sizes of the paper
    Case(Sizes(preset, 30522, tokens, longest), "bf16", stage, micro_batches)
    for preset, tokens, longest, stage, micro_batches in [
        ("mini", 16384, 128, 1, 1),
        ("small", 16384, 128, 1, 2),
        ("base", 16384, 128, 1, 1),
        ("base", 32768, 512, 1, 2),
        ("base", 32768, 512, 3, 1),
        ("large", 16384, 512, 1, 1),
        ("large", 16384, 512, 2, 2),
    ]
]
STEP_CASES = [
    Case(Sizes("tiny", 8192, 4096, 128)),
    Case(Sizes("mini", 8192, 4096, 128)),
    Case(Sizes("small", 8192, 2048, 128)),
    Case(Sizes("small", 30522, 2048, 128)),
]


def pack_of(batch: PackedBatch) -> MicroBatchSize:
    return MicroBatchSize(batch.cu_seqlens.diff().tolist(), len(batch.labels), batch.sequences)


# ------------------------------------------------------------------------------------------- memory


def storage_bytes(tensors: Iterable[Tensor], but: Iterable[Tensor] = ()) -> float:
    """Bytes of the storages behind the tensors, each counted once, without those of `but`."""
    found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    for t in but:
        found.pop(t.untyped_storage().data_ptr(), None)
    return float(sum(found.values()))


def saved_bytes(
    forward: Callable[[PackedBatch], Any], batch: PackedBatch, parameters: Iterable[Tensor]
) -> float:
    """Bytes that autograd keeps of a forward pass."""
    kept: list[Tensor] = []  # keeps the tensors alive, so that no storage address is reused

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    own = [value for value in vars(batch).values() if isinstance(value, Tensor)]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = forward(batch)
    size = storage_bytes(kept, but=[*parameters, *own])
    del result
    return size


def alive_bytes() -> float:
    """Bytes of all tensors that Python knows, gradients included."""
    tensors = [o for o in gc.get_objects() if issubclass(type(o), Tensor)]
    return storage_bytes([*tensors, *(t.grad for t in tensors if t.is_leaf and t.grad is not None)])


def growth(profiler: profile) -> float:
    """Peak in the counted step of what torch's CPU allocator holds, over its level at the start."""
    recorded: Any = profiler.profiler
    events = sorted(recorded.kineto_results.events(), key=lambda event: event.start_ns())
    begin = next(event.start_ns() for event in events if event.name() == COUNTED)
    live = most = 0
    for event in events:
        if event.name() == "[memory]" and event.start_ns() >= begin:
            live += event.nbytes()
            most = max(most, live)
    return float(most)


def count_memory(case: Case, device: torch.device) -> tuple[dict[str, float], MicroBatchSize, int]:
    """Measure the memory of a case.

    Returns bytes by part (weights, master weights, moments, activations, and the peak of a step),
    the size of the largest micro-batch, and the number of ranks.
    """
    gpu = device.type == "cuda"
    profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    gc.collect()
    before = torch.cuda.memory_allocated(device) if gpu else alive_bytes()
    if not gpu:
        profiler.start()
    with join(60.0) as group, case.engine(group) as engine:
        batches = case.batches(device)
        for _ in range(2):  # the first creates the optimizer's state
            engine.step(batches, LR)
        gc.collect()  # release objects that only a reference cycle keeps
        alive = alive_bytes()
        if gpu:
            torch.cuda.reset_peak_memory_stats(device)
        with record_function(COUNTED):
            engine.step(batches, LR)
        if not gpu:
            profiler.stop()
        weights: list[Tensor] = [getattr(p, "ds_tensor", p) for p in engine.model.parameters()]
        slots = [
            value
            for state in engine._optimizer.state.values()
            for value in state.values()
            if value.numel() > 1
        ]
        biggest = max(batches, key=lambda batch: batch.tokens)
        call = engine._engine
        counted = {
            "weights": storage_bytes(weights),
            "master weights": storage_bytes(
                [tensor for tensor, _ in engine._updated()] if case.stage else [], but=weights
            ),
            "moments": storage_bytes(slots),
            "activations": saved_bytes(
                lambda batch: losses(call(batch)), biggest, [*engine.model.parameters(), *weights]
            ),
            "all": float(torch.cuda.max_memory_allocated(device) - before)
            if gpu
            else alive - before + growth(profiler),
        }
    return counted, pack_of(biggest), group.world


def memory_row(case: Case, device: torch.device) -> Row:
    """Predicted and measured megabytes by part, and the difference of each."""
    kernels = "triton" if device.type == "cuda" else "cpu"
    counted, pack, world = count_memory(case, device)
    config, V, always = case.config, case.sizes.vocab_size, ("weights", "master weights", "moments")
    packs, sharding = [pack] * case.micro_batches, Sharding(case.stage, world, case.zero)
    said = memory_by_part(config, V, packs, sharding, bf16=case.bf16, kernels=kernels)
    said["context"] = 0.0
    # At the peak, which need not be a moment when all of them exist.
    kept = min(said["activations"], counted["activations"])
    rest = [
        sum(parts) - sum(states[part] for part in always) - kept
        for parts, states in ((said.values(), said), ([counted["all"]], counted))
    ]
    whole = activation_bytes(config.model, V, pack, case.bf16, kernels)
    pairs = {part: (said[part], counted[part]) for part in always}
    pairs |= {
        "activations": (whole, counted["activations"]),
        "rest": (rest[0], rest[1]),
        "all": (sum(said.values()), counted["all"]),
    }
    row: Row = {"case": case.name}
    for part, (predicted, measured) in pairs.items():
        row |= {f"{part}_predicted_mb": predicted / 1e6, f"{part}_measured_mb": measured / 1e6}
        row[f"{part}_difference"] = predicted / measured - 1 if measured > 0 else 0.0
    return row


def two_ranks(number: int) -> Row:
    """The row of RANK_CASES[number], counted by the first of two ranks, started by torchrun."""
    torchrun = "-m torch.distributed.run --standalone --nproc-per-node 2"
    case = f"-m benchmarks.planning.bench_plan --rank-case {number}"
    command = [sys.executable, *torchrun.split(), *case.split()]
    said = subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=300, cwd=ROOT
    ).stdout
    return json.loads(next(line for line in said.splitlines() if line.startswith("{")))


# ------------------------------------------------------------------------------------ communication


def recorded_communication(path: Path = ROOT / "benchmarks/results/communication.txt") -> list[Row]:
    """The rows of the record with any communication, and the passes that DeepSpeed requested."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        name, counts = line[:17].split(), line[17:].split()
        if name and name[0] in "0123" and len(counts) > 6:
            row = {
                "stage": int(name[0]),
                "variant": " ".join(name[1:]),
                "ranks": int(counts[0]),
                "micro_batches": int(counts[1]),
            }
            rows.append({**row, "asked": float(counts[5])})
    return rows


def communication_rows() -> list[Row]:
    """Rows in passes: multiples of what a ring sends to reduce-scatter all parameters."""
    rows = []
    for found in recorded_communication():
        P, N = 1_000_000, found["ranks"]
        _, zero = VARIANTS[found["variant"]]
        sharding = Sharding(found["stage"], N, zero)
        sent = communication_per_step(P, sharding, found["micro_batches"], 1)
        predicted, least = (count / (P * (N - 1) / N) for count in sent)
        rows.append(
            {
                **found,
                "least": least,
                "predicted": predicted,
                "difference": predicted / found["asked"] - 1,
            }
        )
    return rows


# ---------------------------------------------------------------------------------------- step time


def step_row(case: Case, steps: int) -> Row:
    """The median step of an engine on this CPU, and the prediction from rates measured just before.

    Args:
        steps: number of timed steps.
    """
    said, times = [], []
    with join(60.0) as group, case.engine(group) as engine:
        batches = case.batches(group.device)
        packs = [pack_of(batch) for batch in batches]
        for number in range(2 + steps):
            machine = this_machine(0.15)
            start = time.perf_counter()
            engine.step(batches, LR)
            if number >= 2:
                times.append(time.perf_counter() - start)
                parts = compute_seconds(
                    case.config,
                    case.sizes.vocab_size,
                    packs,
                    machine,
                    Sharding(case.stage),
                    bf16=case.bf16,
                    on_cpu=True,
                )
                said.append(sum(parts))
    low, median, high = statistics.quantiles([a / b for a, b in zip(said, times, strict=True)], n=4)
    row: Row = {
        "case": case.name,
        "predicted_ms": 1e3 * statistics.median(said),
        "measured_ms": 1e3 * statistics.median(times),
    }
    return row | {"difference": median - 1, "quartiles": [low - 1, high - 1]}


# ------------------------------------------------------------------------------------------- report

PARTS = ("weights", "master weights", "moments", "activations", "rest", "all")


def memory_table(rows: list[Row]) -> str:
    def cell(row: Row, part: str) -> str:
        predicted, measured, difference = (
            row[f"{part}_{key}"] for key in ("predicted_mb", "measured_mb", "difference")
        )
        return (
            "-"
            if predicted == measured == 0
            else f"{predicted:,.1f} / {measured:,.1f} ({difference:+.1%})"
        )

    return table(
        ["case", *PARTS], [[row["case"], *(cell(row, part) for part in PARTS)] for row in rows]
    )


def communication_table(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        passes = [f"{row[key]:.2f}" for key in ("least", "predicted", "asked")]
        lines.append(
            [
                f"{row['stage']} {row['variant']}".strip(),
                f"{row['ranks']}",
                f"{row['micro_batches']}",
                *passes,
                f"{row['difference']:+.1%}",
            ]
        )
    return table(
        [
            "stage",
            "ranks",
            "micro-batches",
            "least, passes",
            "predicted",
            "requested",
            "difference",
        ],
        lines,
    )


def step_table(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        low, high = row["quartiles"]
        difference = f"{row['difference']:+.0%} ({low:+.0%} to {high:+.0%})"
        lines.append(
            [row["case"], f"{row['predicted_ms']:,.0f}", f"{row['measured_ms']:,.0f}", difference]
        )
    return table(["case", "predicted, ms", "measured, ms", "difference (quartiles)"], lines)


def published_table(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        form, kind = ("{:,.1f} h", "hours") if "published_hours" in row else ("{:,.0f}/s", "per_s")
        figures = [form.format(row[f"{key}_{kind}"]) for key in ("predicted", "published")]
        lines.append(
            [
                row["run"],
                row["gpus"],
                row["tokens"],
                *figures,
                f"{row['difference']:+.0%}",
                row["source"],
            ]
        )
    return table(
        ["run", "GPUs", "tokens", "predicted", "published", "difference in time", "source"], lines
    )


DRAW = {
    "memory": memory_table,
    "ranks": memory_table,
    "communication": communication_table,
    "steps": step_table,
    "fused": published_table,
    "unfused": published_table,
}


def worst(rows: Iterable[Row], key: str = "difference") -> float:
    return max(abs(row[key]) for row in rows)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path(), help="folder for plan.json and plan.md")
    parser.add_argument("--docs", type=Path, help="a page whose tables are replaced")
    parser.add_argument(
        "--quick", action="store_true", help="fewer and smaller cases, no step times"
    )
    # Internal: act as one rank of this case of RANK_CASES.
    parser.add_argument("--rank-case", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, default=9, help="timed steps per case (9)")
    options = parser.parse_args()
    keep_heap()
    if options.rank_case is not None:
        row = memory_row(RANK_CASES[options.rank_case], torch.device("cpu"))
        if os.environ["RANK"] == "0":
            print(json.dumps(row))
        return 0
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cases = GPU_CASES if device.type == "cuda" else QUICK if options.quick else CASES
    rows: dict[str, list[Row]] = {"memory": []}
    for case in cases:
        rows["memory"].append(memory_row(case, device))
        print(f"{case.name}: {rows['memory'][-1]['all_difference']:+.1%}", flush=True)
    if device.type == "cpu" and not options.quick:
        rows["ranks"] = [two_ranks(number) for number in range(len(RANK_CASES))]
        rows["steps"] = [step_row(case, options.steps) for case in STEP_CASES]
    rows["communication"] = communication_rows()
    rows["fused"], rows["unfused"] = (
        [published_row(run) for run in runs] for runs in (FUSED, UNFUSED)
    )
    counted = rows["memory"] + rows.get("ranks", [])
    errors = {
        "memory": worst(counted, "all_difference"),
        "activations": worst(rows["memory"], "activations_difference"),
        "communication": worst(rows["communication"]),
        "published runs with fused operations": worst(rows["fused"]),
    }
    sections = {name: DRAW[name](found) for name, found in rows.items()}
    facts = header(device)
    summary = (
        "Largest differences: "
        + ", ".join(f"{name} {error:.1%}" for name, error in errors.items())
        + "."
    )
    for name, text in sections.items():
        print(f"\n{name}\n\n{text}")
    print(f"\n{summary}")
    text = "\n\n".join(
        [
            "`fastbert plan` against measurements",
            summary,
            *(f"## {name}\n\n{text}" for name, text in sections.items()),
        ]
    )
    ratios = {f"{name}, 1 - difference": 1 - error for name, error in errors.items()}
    Record(
        facts, [{"table": name, **row} for name, found in rows.items() for row in found], ratios
    ).write(options.out, "plan", text)
    if options.docs:
        page = options.docs.read_text(encoding="utf-8")
        page = filled(page, {"machine": header_line(facts), "summary": summary, **sections})
        options.docs.write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
