"""The time of a training step on a CPU, alone and beside a busy process on each core.

Three ways to use all cores are compared: packs in processes, as fastbert computes them
(fastbert/training/parallel_model.py); torch's OpenMP threads with their defaults, which spin while
they wait; and the same with OMP_WAIT_POLICY=PASSIVE, which sleep. The last row is one thread. A
time is that of 2,500 tokens in milliseconds: forward, backward, clipping and AdamW.

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
    "packs in processes": ("processes", {}),
    "OpenMP, default": ("openmp", {}),
    "OpenMP, PASSIVE": ("openmp", {"OMP_WAIT_POLICY": "PASSIVE"}),
    "one thread": ("openmp", {"OMP_NUM_THREADS": "1"}),
}


def measure(way: str, given: argparse.Namespace) -> list[float]:
    """Return the seconds per TOKENS of each step in this process, without the first five."""
    import torch

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
    model = build_model(config.model, dataset.vocab_size).train()
    model.operands = torch.bfloat16 if given.precision == "bf16" else None
    optimizer = build_optimizer(model, config.optimizer)
    packs = [batches.step(i, at_once=at_once) for i in range(20)]
    run = ParallelModel(model, at_once)
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < given.steps + 5 and (
        len(times) < 8 or time.perf_counter() < began + LONGEST_S
    ):
        step = packs[len(times) % len(packs)]
        start = time.perf_counter()
        train_step(run, step, at_once, optimizer, config.optimizer.max_grad_norm)
        used = time.perf_counter() - start
        times.append(used * TOKENS / sum(pack.tokens for pack in step))
    run.close()
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
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--way", choices=("processes", "openmp"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.way:
        print(json.dumps(measure(given.way, given)))
        return
    import torch

    cores = len(os.sched_getaffinity(0))
    print(
        header_line(header(torch.device("cpu"))),
        f"recipe {given.recipe} in {given.precision}:\n",
        sep=", ",
    )
    rows = []
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
