"""Time of each part of a training step, against the ideal time at this machine's measured rates.

    python -m benchmarks.step.bench_parts data/wiki --out FOLDER [--steps 12] \\
        [--seconds 90] [--quick]

The step is that of `fastbert pretrain`: a batch is drawn, and `training.engine.Engine`, which
contains DeepSpeed, runs forward, backward and the update. Settings: fp32, dropout 0.1, 32 of the
demo's pairs, and the heap setting of `fastbert.heap`. Every batch runs twice: once without the
profiler for the step's time, and once under torch.profiler for the parts. All figures are medians.
A forward operation belongs to the module that it runs in. A backward operation belongs to the part
of the forward operation with the same sequence number. Each moment is counted once. The difference
between the step and the sum of its parts is the row "rest"; if negative, it is the overhead of the
profiler.

For a part with matrix products, the ideal time is its executed FLOPs over the GEMM rate. For a
part without, it is the bytes that it must read and write over the memory bandwidth; a cache can
make such a part faster than that. Both rates are measured in the same process. Both are the
machine's best, while the steps are medians.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

# Without this the profiler prints two messages per step.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.harness.machine import header
from benchmarks.harness.record import Record, Row
from benchmarks.harness.tables_and_plots import table
from benchmarks.step.bench_step import CASES, LEAST, MAX_LENGTH, SEQUENCES, WARM_UP
from fastbert.cluster.group import join
from fastbert.config import BertConfig, RunConfig
from fastbert.data.batches import Batches
from fastbert.data.dataset import TokenDataset, open_dataset
from fastbert.data.packing import PackedBatch
from fastbert.heap import keep_heap
from fastbert.machine import measure_bandwidth, measure_gemm_rate
from fastbert.models.bert import Attention, BertForPreTraining, Embeddings, FeedForward
from fastbert.planning.flops import BACKWARD
from fastbert.recipe import parse_config
from fastbert.training.ds_config import read_ds_config
from fastbert.training.engine import Engine

DATA = "data"
EMBEDDING = "embedding"
PROJECTIONS = "attention: q, k, v, output"
SCORES = "attention: scores, dropout"
PRODUCTS = "feed-forward: products"
GELU = "feed-forward: GELU"
NORM = "norm"
LOSS = "loss"
OPTIMIZER = "optimizer"
ENGINE = "engine, DeepSpeed"
PARTS = (DATA, EMBEDDING, PROJECTIONS, SCORES, PRODUCTS, GELU, NORM, LOSS, OPTIMIZER, ENGINE)

MODULES: dict[type, str] = {
    Embeddings: EMBEDDING,
    Attention: PROJECTIONS,
    FeedForward: PRODUCTS,
    BertForPreTraining: LOSS,  # its heads
}
# Operations that are a part of their own, within the part of a module or elsewhere.
OPERATIONS = {
    (PROJECTIONS, "_Attention"): SCORES,
    (PRODUCTS, "aten::gelu"): GELU,
    (PRODUCTS, "aten::add"): GELU,  # the bias of GELU
    (PROJECTIONS, "_DropoutAddLayerNorm"): NORM,
    (PRODUCTS, "_DropoutAddLayerNorm"): NORM,
    (ENGINE, "aten::_foreach_norm"): OPTIMIZER,  # clipping
    (ENGINE, "aten::_foreach_mul_"): OPTIMIZER,
}
BACKWARD_NODE, STEP, MARK, WORD = "autograd::engine::evaluate_function: ", "step", "part ", 4


def mark(model: torch.nn.Module) -> None:
    """Mark the modules of MODULES in the forward pass, so that the profiler records them."""
    for module in model.modules():
        if (part := MODULES.get(type(module))) is not None:
            ranges: list[Any] = []

            def enter(_module: Any, _inputs: Any, ranges: list = ranges, part: str = part) -> None:
                ranges.append(record_function(MARK + part))
                ranges[-1].__enter__()

            def leave(_module: Any, _inputs: Any, _output: Any, ranges: list = ranges) -> None:
                ranges.pop().__exit__(None, None, None)

            module.register_forward_pre_hook(enter)
            module.register_forward_hook(leave)


def split(events: Iterable[Any]) -> dict[str, float]:
    """Milliseconds of each part, from the profiler's events of one step."""
    times: dict[str, float] = defaultdict(float)
    part_of: dict[int, str] = {}  # by sequence number of the forward operation

    def walk(event: Any, part: str, backward: bool) -> None:
        name = event.name
        if name.startswith(MARK):
            part = name.removeprefix(MARK)
        elif name.startswith("Optimizer."):
            part = OPTIMIZER
        elif name.startswith(BACKWARD_NODE):
            part, backward = part_of.get(event.sequence_nr, part), True
        elif not backward:
            part = OPERATIONS.get((part, name), part)
            if event.sequence_nr >= 0:
                part_of[event.sequence_nr] = part
        times[part] += event.self_cpu_time_total / 1e3
        inside = part
        for child in sorted(event.cpu_children, key=lambda child: child.time_range.start):
            # A weight's gradient is handed over right after the node that made it.
            node = child.name.startswith(BACKWARD_NODE)
            walk(child, inside if node and child.sequence_nr < 0 else part, backward)
            if node and child.sequence_nr >= 0:
                inside = part_of.get(child.sequence_nr, part)

    (root,) = (event for event in events if event.name == STEP)
    walk(root, ENGINE, False)
    return dict(times)


def flops(
    model: BertConfig, vocab_size: int, lengths: Sequence[int], masked: int, pairs: int
) -> dict[str, float]:
    """`fastbert.planning.flops.executed_flops`, split by part."""
    D, F, L = model.hidden_size, model.intermediate_size, model.num_hidden_layers
    tokens, rows = sum(lengths), masked + pairs  # rows that the last layer computes
    squares = sum(n * n for n in lengths)
    scores = sum(n * (1 + masked * n / tokens) for n in lengths)
    forward = {
        PROJECTIONS: 2.0 * ((L - 1) * tokens * 4 * D * D + tokens * 2 * D * D + rows * 2 * D * D),
        SCORES: 2.0 * ((L - 1) * squares + scores) * 2 * D,
        PRODUCTS: 2.0 * ((L - 1) * tokens + rows) * 2 * D * F,
        LOSS: 2.0 * (masked * (D * D + D * vocab_size) + pairs * (D * D + 2 * D)),
    }
    return {part: (1 + BACKWARD) * count for part, count in forward.items()}


def least_bytes(
    model: BertConfig, vocab_size: int, parameters: int, tokens: int, rows: int
) -> dict[str, float]:
    """Bytes that the parts without matrix products must read and write, forward and backward."""
    D, F, L = model.hidden_size, model.intermediate_size, model.num_hidden_layers
    # A layer has two norms; in the last layer they run on `rows` alone. Forward: x, residual, z,
    # y; backward: dy, z, dx, dresidual.
    norm = 8 * 2 * D * ((L - 1) * tokens + rows)
    gelu = 5 * F * ((L - 1) * tokens + rows)  # x, y; dy, x, dx
    # Row, z, y; then dy, z, and the row of the gradient twice; and the gradient of the table.
    embedding = 7 * D * tokens + D * vocab_size
    update = 7 * parameters  # weight, gradient and two moments are read; three are written
    return {
        EMBEDDING: WORD * embedding,
        GELU: WORD * gelu,
        NORM: WORD * norm,
        OPTIMIZER: WORD * update,
    }


def measure(
    dataset: TokenDataset, preset: str, vocab_size: int, steps: int, seconds: float = math.inf
) -> tuple[float, dict[str, float], dict[str, float], dict[str, float]]:
    """Measure a step.

    Returns the milliseconds of a step and of its parts (medians), then the FLOPs and the least
    bytes of a step by part (means). There are fewer steps if `seconds` are used up.
    """
    end = time.monotonic() + seconds
    config: RunConfig = parse_config(
        f'data = "{dataset.path}"\n[model]\npreset = "{preset}"\n[objective]\nsegments = "single"\n'
        f"[batch]\nsequences = {SEQUENCES}\nmax_length = {MAX_LENGTH}",
        "bench_parts",
    )
    batches, batch_of = Batches(dataset, config), list[PackedBatch]()
    torch.manual_seed(0)
    assert isinstance(config.model, BertConfig)
    model = BertForPreTraining(config.model, vocab_size)
    parameters = sum(p.numel() for p in model.parameters())
    mark(model)
    walls, splits = [], []
    with (
        join(60.0) as group,
        Engine(model, config, read_ds_config(config, "bench_parts"), "fp32", group) as engine,
    ):

        def step(index: int) -> None:
            with record_function(STEP):
                with record_function(MARK + DATA):
                    packs = batches.step(index)
                engine.step(packs, lr=1e-4)

        for index in range(steps + WARM_UP):
            wall = _milliseconds(lambda index=index: step(index))
            with profile(activities=[ProfilerActivity.CPU]) as profiler:
                step(index)
            if index >= WARM_UP:  # the first steps warm up the heap
                walls.append(wall)
                splits.append(split(profiler.events() or []))
                batch_of += batches.step(index)
            if len(walls) >= LEAST and time.monotonic() > end:
                break
    shapes = [(b.cu_seqlens.diff().tolist(), len(b.labels), b.sequences) for b in batch_of]
    work = [flops(config.model, vocab_size, *shape) for shape in shapes]
    traffic = [
        least_bytes(config.model, vocab_size, parameters, sum(n), masked + pairs)
        for n, masked, pairs in shapes
    ]
    parts = {part: statistics.median(found.get(part, 0.0) for found in splits) for part in PARTS}
    mean = {key: sum(w.get(key, 0.0) for w in work) / len(walls) for key in PARTS}
    moved = {key: sum(t.get(key, 0.0) for t in traffic) / len(walls) for key in PARTS}
    return statistics.median(walls), parts, mean, moved


def _milliseconds(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


def rows_of(
    case: str,
    wall: float,
    parts: dict[str, float],
    work: dict[str, float],
    moved: dict[str, float],
    rate: float,
    bandwidth: float,
) -> list[Row]:
    """A row for each part, one for the rest, and one for the whole step."""
    rows = []
    for part in PARTS:
        ideal = 1e3 * (work[part] / rate or moved[part] / bandwidth)
        rows.append(
            {
                "case": case,
                "part": part,
                "ms": parts[part],
                "gflop": work[part] / 1e9,
                "ideal_ms": ideal,
            }
        )
    rest = {
        "case": case,
        "part": "rest",
        "ms": wall - sum(parts.values()),
        "gflop": 0.0,
        "ideal_ms": 0.0,
    }
    whole = {
        "case": case,
        "part": "step",
        "ms": wall,
        "gflop": sum(work.values()) / 1e9,
        "ideal_ms": sum(r["ideal_ms"] for r in rows),
    }
    return [row | {"share_of_step": row["ms"] / wall} for row in (*rows, rest, whole)]


def cells(row: Row) -> list[str]:
    ideal = (
        [f"{row['ideal_ms']:.1f}", f"{row['ideal_ms'] / row['ms']:.0%}"]
        if row["ideal_ms"] and row["ms"] > 0
        else ["-", "-"]
    )
    return [
        row["part"],
        f"{row['ms']:.1f}",
        f"{row['share_of_step']:.1%}",
        f"{row['gflop']:.1f}" if row["gflop"] else "-",
        *ideal,
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "dataset", help="a folder made by `fastbert prepare`; its sequence lengths are timed"
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=12, help="steps of each model (12)")
    parser.add_argument(
        "--seconds",
        type=float,
        default=math.inf,
        help="approximate duration; models then run fewer steps",
    )
    parser.add_argument("--quick", action="store_true", help="two steps of the smallest model")
    given = parser.parse_args()
    keep_heap()
    end = time.monotonic() + given.seconds
    dataset, facts = open_dataset(given.dataset), header(torch.device("cpu"))
    cases, steps = (CASES[:1], 2) if given.quick else (CASES, given.steps)
    columns = ["part", "ms", "share of the step", "GFLOP", "ideal ms", "share of the ideal"]
    rows, sections = [], []
    bandwidth = measure_bandwidth()
    for index, (preset, vocab_size) in enumerate(cases):
        before = measure_gemm_rate()
        found = measure(
            dataset, preset, vocab_size, steps, (end - time.monotonic()) / (len(cases) - index)
        )
        rate = max(before, measure_gemm_rate())
        case = f"{preset}, V = {vocab_size:,}"
        new = rows_of(case, *found, rate, bandwidth)
        rows += new
        title = f"## {case}: {rate / 1e9:.0f} GFLOP/s, {bandwidth / 1e9:.0f} GB/s"
        sections.append(f"{title}\n\n{table(columns, [cells(row) for row in new])}")
        print(f"\n{sections[-1]}", flush=True)
    intro = (
        f"Where a training step's time goes\n\n{SEQUENCES} of the demo's pairs per step, fp32, "
        f"dropout 0.1; medians of at most {steps} steps."
    )
    Record(facts, rows).write(given.out, "parts", "\n\n".join([intro, *sections]))


if __name__ == "__main__":
    main()
