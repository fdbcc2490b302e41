"""The time of a training step on a CPU, alone and beside a busy process on each core.

Three ways to use all cores are compared, each in a process of its own: packs on threads, as
fastbert computes them (fastbert/training/threads.py); torch's OpenMP threads with their defaults,
which spin while they wait; and the same with OMP_WAIT_POLICY=PASSIVE, which sleep. The last row is
one thread. A time is that of 2,500 tokens in milliseconds: forward, backward, clipping and AdamW.

    python -m benchmarks.step.bench_threads data/wiki
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median, quantiles

from benchmarks.harness.children import environment, module
from benchmarks.harness.machine import header, header_line
from benchmarks.harness.tables_and_plots import table

TOKENS = 2500
LONGEST_S = 30.0  # of a measurement; beside busy processes a step of OpenMP's may take seconds
WAYS = {
    "packs on threads": ("threads", {}),
    "OpenMP, default": ("openmp", {}),
    "OpenMP, PASSIVE": ("openmp", {"OMP_WAIT_POLICY": "PASSIVE"}),
    "one thread": ("openmp", {"OMP_NUM_THREADS": "1"}),
}


def measure(way: str, recipe: str, data: str, steps: int) -> list[float]:
    """Return the seconds per TOKENS of each step in this process, without the first five."""
    import torch

    from fastbert.config import load_config
    from fastbert.data.batches import Batches
    from fastbert.data.dataset import open_dataset
    from fastbert.heap import keep_heap
    from fastbert.models.bert import BertForPreTraining
    from fastbert.planning.step_speed import train_step
    from fastbert.training.optimizer import build_optimizer
    from fastbert.training.threads import ThreadedModel

    keep_heap()
    config, dataset = load_config(recipe, {"data": data}), open_dataset(data, verify=False)
    threads = torch.get_num_threads() if way == "threads" else 1
    batches = Batches(dataset, config)
    model = BertForPreTraining(config.model, dataset.vocab_size).train()
    optimizer = build_optimizer(model, config.optimizer)
    packs = [batches.step(i, threads=threads) for i in range(20)]
    run = ThreadedModel(model, threads) if threads > 1 else lambda packs: list(map(model, packs))
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < steps + 5 and (len(times) < 8 or time.perf_counter() < began + LONGEST_S):
        step = packs[len(times) % len(packs)]
        start = time.perf_counter()
        train_step(run, step, threads, optimizer, config.optimizer.max_grad_norm)
        used = time.perf_counter() - start
        times.append(used * TOKENS / sum(pack.tokens for pack in step))
    return times[5:]


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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", help="a dataset made by fastbert prepare")
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--way", choices=("threads", "openmp"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.way:
        print(json.dumps(measure(given.way, given.recipe, given.data, given.steps)))
        return
    import torch

    cores = len(os.sched_getaffinity(0))
    print(header_line(header(torch.device("cpu"))), f"recipe {given.recipe}:\n", sep=", ")
    rows = []
    for name, (way, settings) in WAYS.items():
        command = module(
            "step.bench_threads",
            *(str(Path(given.data).resolve()), "--recipe", given.recipe),
            *("--steps", str(given.steps), "--way", way),
        )
        found = []
        for number in (0, cores):
            with neighbours(number):
                ended = subprocess.run(
                    command, env=environment() | settings, check=True, stdout=subprocess.PIPE
                )
            found.append([1e3 * x for x in json.loads(ended.stdout.splitlines()[-1])])
        alone, beside = found
        rows.append(
            [
                name,
                f"{median(alone):.0f}",
                f"{quantiles(alone, n=10)[-1]:.0f}",
                f"{median(beside):.0f}",
                f"{quantiles(beside, n=10)[-1]:.0f}",
                f"{median(beside) / median(alone):.1f}",
            ]
        )
    columns = ("", "alone", "90 %", f"beside {cores} busy processes", "90 %", "times as long")
    print(table(columns, rows))


if __name__ == "__main__":
    main()
