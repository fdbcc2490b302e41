"""The time of a training step on a CPU, alone and beside a busy process on each core.

Ways to use all cores are compared: packs in processes, as fastbert trains
(fastbert/training/parallel_model.py); torch's OpenMP threads, which spin while they wait, but sleep
beside other programs, as fastbert computes all else (fastbert/contention.py); these threads without
that; and with OMP_WAIT_POLICY=PASSIVE, where they always sleep. The last row is one thread. A time
is that of 2,500 tokens in milliseconds: forward, backward, clipping and AdamW, and forward alone.

    python -m benchmarks.step.bench_threads data/wiki --precision bf16 --out runs/bench-threads
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import TYPE_CHECKING

from benchmarks.harness.children import environment, module
from benchmarks.harness.machine import header
from benchmarks.harness.record import Record, Row
from benchmarks.harness.tables_and_plots import table

if TYPE_CHECKING:
    from fastbert.data.packing import PackedBatch

TOKENS = 2500
WARM_UP = 5  # steps, in which the neighbours are noticed too
LONGEST_S = 30.0  # of a measurement; beside busy processes a step of OpenMP's may take seconds
WORKS = {"step": "a training step", "forward": "a forward pass, as in evaluate and embed"}
WAYS = {
    "packs in processes": ("processes", {}),
    "OpenMP, asleep beside others": ("watched", {}),
    "OpenMP, default": ("openmp", {}),
    "OpenMP, `OMP_WAIT_POLICY=PASSIVE`": ("openmp", {"OMP_WAIT_POLICY": "PASSIVE"}),
    "one thread": ("openmp", {"OMP_NUM_THREADS": "1"}),
}


def measure(way: str, given: argparse.Namespace) -> dict[str, list[float]]:
    """Return the seconds per TOKENS of each step in this process, by work, without a warm-up."""
    import torch

    from fastbert.contention import watch_contention
    from fastbert.data.batches import Batches
    from fastbert.data.dataset import open_dataset
    from fastbert.heap import keep_heap
    from fastbert.models.build import build_model
    from fastbert.planning.step_speed import train_step
    from fastbert.recipe import load_config
    from fastbert.training.optimizer import build_optimizer
    from fastbert.training.parallel_model import ParallelModel

    keep_heap()
    config = load_config(given.recipe, {"data": given.data})
    dataset = open_dataset(given.data, verify=False)
    at_once = torch.get_num_threads() if way == "processes" else 1
    batches = Batches(dataset, config)
    model = build_model(config.model, dataset.vocab_size)
    model.operands = torch.bfloat16 if given.precision == "bf16" else None
    optimizer = build_optimizer(model, config.optimizer)
    packs = [batches.step(i, at_once=at_once) for i in range(20)]
    run = ParallelModel(model, at_once)
    if way == "watched":
        watch_contention()

    def step(packs: Sequence[PackedBatch]) -> None:
        train_step(run, packs, at_once, optimizer, config.optimizer.max_grad_norm)

    @torch.no_grad()
    def forward(packs: Sequence[PackedBatch]) -> None:
        for first in range(0, len(packs), at_once):
            run(packs[first : first + at_once])

    found = dict[str, list[float]]()
    for work, mode in ((step, True), (forward, False)):
        model.train(mode)
        times: list[float] = []
        began = time.perf_counter()
        while len(times) < given.steps + WARM_UP and (
            len(times) < WARM_UP + 3 or time.perf_counter() < began + LONGEST_S
        ):
            own = packs[len(times) % len(packs)]
            start = time.perf_counter()
            work(own)
            used = time.perf_counter() - start
            times.append(used * TOKENS / sum(pack.tokens for pack in own))
        found[work.__name__] = times[WARM_UP:]
    run.close()
    return found


@contextlib.contextmanager
def neighbours(number: int) -> Iterator[None]:
    """Keep a number of processes busy inside the block."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(number)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def rows_of(given: argparse.Namespace) -> Iterator[Row]:
    """Measure every way, alone and beside a busy process on each core."""
    cores = len(os.sched_getaffinity(0))
    for name, (way, settings) in WAYS.items():
        command = module(
            "step.bench_threads",
            *(str(Path(given.data).resolve()), "--recipe", given.recipe),
            *("--steps", str(given.steps), "--precision", given.precision, "--way", way),
        )
        found = []
        for number in (0, cores):
            with neighbours(number):
                ended = subprocess.run(
                    command, env=environment() | settings, check=True, stdout=subprocess.PIPE
                )
            found.append(json.loads(ended.stdout.splitlines()[-1]))
        for work in WORKS:
            row: Row = {"work": work, "way": name, "recipe": given.recipe}
            row |= {"precision": given.precision, "busy": cores}
            for where, times in zip(("alone", "beside"), found, strict=True):
                row[f"{where}_ms"] = 1e3 * median(times[work])
                row[f"{where}_p90_ms"] = 1e3 * quantiles(times[work], n=10)[-1]
            yield row


def threads_table(rows: Sequence[Row]) -> str:
    """A table in Markdown for each work, in milliseconds."""
    texts = []
    for work, name in WORKS.items():
        own = [row for row in rows if row["work"] == work]
        beside = f"beside {own[0]['busy']} busy processes"
        cells = [
            [
                row["way"],
                *(f"{row[f'{when}_ms']:,.0f}" for when in ("alone", "alone_p90")),
                *(f"{row[f'{when}_ms']:,.0f}" for when in ("beside", "beside_p90")),
                f"{row['beside_ms'] / row['alone_ms']:.1f}",
            ]
            for row in own
        ]
        columns = (name, "alone", "90 %", beside, "90 %", "times as long")
        texts.append(table(columns, cells))
    return "\n\n".join(texts)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", help="a dataset made by fastbert prepare")
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--out", type=Path, help="folder for threads.json and threads.md")
    parser.add_argument("--way", choices=("processes", "watched", "openmp"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.way:
        print(json.dumps(measure(given.way, given)))
        return
    import torch

    rows = list(rows_of(given))
    text = f"Threads of a CPU beside busy processes\n\n{threads_table(rows)}"
    if given.out:
        Record(header(torch.device("cpu")), rows).write(given.out, "threads", text)
    print(text)


if __name__ == "__main__":
    main()
