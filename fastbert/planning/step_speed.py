"""Measure how many tokens this machine trains per second: real steps on batches of a dataset.

DeepSpeed is not involved, as its start takes seconds. A run of one process has little more to do
in a step than these steps do.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from fastbert.config import RunConfig
from fastbert.contention import watch_contention
from fastbert.data.batches import Batches
from fastbert.data.dataset import TokenDataset
from fastbert.data.packing import PackedBatch
from fastbert.machine import processes_for, share_cores
from fastbert.models.build import build_model
from fastbert.models.heads import losses
from fastbert.planning.advise import STEP_TOKENS, Speed
from fastbert.training.optimizer import build_optimizer
from fastbert.training.parallel_model import ParallelModel

SAMPLE = 256  # examples whose mean length is taken
BATCHES = 4  # which the timed steps use in turn
SECONDS = 0.5  # of timed steps; the first step does not count
FEWEST, MOST = 3, 50  # timed steps


def measure_speed(
    config: RunConfig,
    dataset: TokenDataset,
    device: torch.device,
    operands: torch.dtype | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Speed:
    """Train a new model for a second, in steps of about STEP_TOKENS tokens.

    The median step counts, because other programs slow some of them down. On a GPU the weights are
    bf16, as in a run there. The caller's random numbers are not disturbed.

    Args:
        config: its model, objective and lengths are used, and the optimizer's settings.
        dataset: the training part has examples for the objective.
        device: where the run would compute.
        operands: the dtype of the operands of large products on a CPU, if they are rounded.
        clock: seconds. `time.process_time` leaves out the time of other programs.

    Raises:
        InputError: the dataset has no example.
    """
    example_tokens = _mean_length(config, dataset)
    sequences = max(1, round(STEP_TOKENS / example_tokens))
    config = replace(config, batch=replace(config.batch, sequences=sequences))
    batches, at_once = Batches(dataset, config), 1
    if device.type == "cpu":
        at_once = processes_for(sequences, share_cores(1))
    steps = [batches.step(i, at_once=at_once) for i in range(BATCHES)]
    with torch.random.fork_rng():
        model = build_model(config.model, dataset.vocab_size, "auto", device.type)
    model.operands = operands
    model.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32).train()
    precision = "bf16" if operands or device.type == "cuda" else "fp32"
    optimizer = build_optimizer(model, config.optimizer, precision)
    parallel = ParallelModel(model, at_once)
    if device.type == "cpu":
        watch_contention()
    speeds = list[float]()
    begin = clock()
    for i in range(MOST + 1):
        start = clock()
        packs = [batch.to(device) for batch in steps[i % BATCHES]]
        train_step(parallel, packs, at_once, optimizer, config.optimizer.max_grad_norm)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        now = clock()
        if i == 0:
            begin = now
            continue
        speeds.append(sum(batch.tokens for batch in packs) / (now - start))
        if len(speeds) >= FEWEST and now - begin > SECONDS:
            break
    parallel.close()
    return Speed(statistics.median(speeds), example_tokens)


def train_step(
    run: Callable[[Sequence[PackedBatch]], Any],
    packs: Sequence[PackedBatch],
    at_once: int,
    optimizer: torch.optim.Optimizer,
    max_grad_norm: float,
) -> None:
    """Make one step: both passes of every pack, clipping, and the update.

    Args:
        run: returns the model's outputs for each of several packs, as a ParallelModel does.
        packs: of the step, on the device.
        at_once: how many packs `run` gets at once.
        optimizer: of the model's parameters.
        max_grad_norm: as in the recipe.
    """
    for first in range(0, len(packs), at_once):
        found = map(losses, run(packs[first : first + at_once]))
        torch.stack([one.loss for one in found]).sum().backward()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm or math.inf)
    optimizer.step()
    optimizer.zero_grad()


def _mean_length(config: RunConfig, dataset: TokenDataset) -> float:
    """Return the mean tokens of an example."""
    sample = replace(config, batch=replace(config.batch, sequences=SAMPLE))
    packs = Batches(dataset, sample).step(0)
    return sum(batch.tokens for batch in packs) / SAMPLE
