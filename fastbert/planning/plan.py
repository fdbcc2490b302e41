"""Estimate a run on given GPUs: memory, step time, communication, total time, cost, bottleneck.

The estimate comes from formulas, not from measurements, and lists its assumptions. docs/plan.md
compares it with counted tensors, with the bytes that ranks have actually sent, and with published
runs. Letters as in memory.py; m is the number of micro-batches per step.
"""

from __future__ import annotations

import difflib
import math
import operator
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastbert import storage
from fastbert.config import BertConfig, ModelConfig, RunConfig
from fastbert.data.batches import share_out
from fastbert.data.dataset import TokenDataset, open_dataset
from fastbert.data.manifest import MANIFEST
from fastbert.data.masking import selected_counts
from fastbert.data.mixture import BLOCK, source_seed
from fastbert.data.phases import Timetable
from fastbert.data.streams import Streams
from fastbert.errors import InputError
from fastbert.machine import (
    WORTH_IT,
    measure_bandwidth,
    measure_gemm_rate,
    probe_bf16,
    processes_for,
    usable_cores,
)
from fastbert.planning.activations import MicroBatchSize
from fastbert.planning.flops import executed_flops, muon_flops, training_flops
from fastbert.planning.memory import Sharding, memory_by_part
from fastbert.planning.parameters import count_hidden, count_parameters
from fastbert.planning.reading import Reading, reading, sample
from fastbert.presence import status
from fastbert.storage import place
from fastbert.training.ds_config import check_optimizer, read_ds_config

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass(frozen=True)
class Device:
    """Rates and sizes of one GPU.

    Attributes:
        bf16, fp32: FLOP/s of dense (not sparse) matrix products.
        memory: bytes.
        bandwidth: bytes/s of its memory.
        link: bytes/s between the GPUs of a node, in one direction.
        network: bytes/s of all adapters of a node to other nodes, in one direction.
        price: US dollars per hour; None where it is not known.
    """

    bf16: float
    fp32: float
    memory: float
    bandwidth: float
    link: float
    network: float
    price: float | None = None


@dataclass(frozen=True)
class Hardware:
    """The GPUs that a run is planned for.

    Attributes:
        gpu: a name in gpus.toml, in any case, or "cpu" for this machine.
        gpus: how many; 1 for "cpu".
        device: rates and sizes of a GPU that is not in gpus.toml, under the name `gpu`. For "cpu",
            this machine, as the caller has measured it.
        efficiency: share of the peak that matrix products reach. The default is EFFICIENCY, and 1
            for a CPU, whose rate is measured.
        price: US dollars per GPU hour; by default the one in gpus.toml.
    """

    gpu: str
    gpus: int = 1
    device: Device | None = None
    efficiency: float | None = None
    price: float | None = None

    @property
    def name(self) -> str:
        return self.gpu.lower()

    @property
    def on_cpu(self) -> bool:
        return self.name == CPU

    def one_device(self) -> Device:
        """Return the rates and sizes of one GPU.

        Raises:
            InputError: its name is unknown.
        """
        device = self.device or GPUS.get(self.name)
        if device is None:
            known = [*GPUS, CPU]
            near = difflib.get_close_matches(self.name, known, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}? " if near else ""
            raise InputError(f"--gpu {self.gpu}: unknown; {hint}known: {', '.join(known)}")
        return device


_FACTS = tomllib.loads((Path(__file__).parent / "gpus.toml").read_text(encoding="utf-8"))
GPUS = {name: Device(**facts) for name, facts in _FACTS["gpus"].items()}
CPU = "cpu"  # the name of this machine's CPU, see `this_machine`
GPUS_PER_NODE = 8
LARGEST_BATCH = 1 << 17  # sequences; such a plan takes some seconds longer

# The share of the peak that matrix products reach. It is chosen so that the estimate of one
# published run is right (docs/plan.md, first row).
EFFICIENCY = 0.5
# How much more than the least a token may cost on more GPUs, which finish earlier.
PAYS = 2.0
# The share of the memory bandwidth that all other kernels reach; usual for single-pass kernels.
BANDWIDTH_SHARE = 0.75
# Time the host takes to launch a layer's operations forward and backward: about 50 operations of
# 10 microseconds each; not measured.
LAYER_S = 0.5e-3
# The CPU kernels move this many times the bytes of the fused kernels, because they run one
# operation after another; fitted to the steps in docs/plan.md.
CPU_PASSES = 6.0


def this_machine(seconds: float = 0.3) -> Device:
    """Measure the rates of this machine's CPU now, each for `seconds`; it has no network."""
    import psutil  # imported here because the GPU benchmarks read GPUS where psutil is missing

    rate, bandwidth = measure_gemm_rate(seconds=seconds), measure_bandwidth(seconds=seconds)
    probe = probe_bf16()
    bf16 = rate * probe.gain if probe.right else 0.0
    return Device(bf16, rate, psutil.virtual_memory().total, bandwidth, math.inf, math.inf)


@dataclass(frozen=True)
class Plan:
    """The estimate.

    The names give the units: bytes, seconds, FLOPs, tokens and US dollars. Memory, communication
    and times are those of one GPU. None means not known.

    `dataset_tokens` are those of the part to train on, and `epochs` how often a run uses them.
    `relative_cost` is what a token costs on 1, 2, 4, ... GPUs, where the run fits, over what it
    costs on the cheapest of these numbers.

    `flops_per_token` counts useful work, with all layers whole. The step time counts what is
    actually computed, with the last layer only for the rows that a loss reads. A step takes the
    time of the matrix products, of the memory traffic, and of the update, or the time that the host
    needs to launch them, whichever is longer. Communication is added to it, or overlaps with it at
    stage 3.
    """

    parameters: int
    vocab_size: int
    gpus: int
    gpu: str
    precision: str
    kernels: str
    zero_stage: int
    memory: dict[str, float]
    memory_total: float
    memory_of_gpu: float
    tokens_per_step: float
    micro_batches: int
    flops_per_token: float
    communication_bytes: float
    communication_least_bytes: float
    products_s: float
    traffic_s: float
    launch_s: float
    communication_s: float
    step_s: float
    tokens_per_s: float
    mfu: float
    steps: int | None
    dataset_tokens: int | None
    epochs: float | None
    relative_cost: dict[int, float]
    total_s: float | None
    price_per_gpu_hour: float | None
    cost: float | None
    limit: str
    assumptions: list[str]
    reading: list[Reading]


# ----------------------------------------------------------------------------- communication


def communication_per_step(
    parameters: int, sharding: Sharding, micro_batches: int, width: int, updates: int = 0
) -> tuple[float, float]:
    """Return the bytes that one GPU sends in one step, with ring algorithms.

    A reduce-scatter or an all-gather of P values is one pass and sends P (N - 1) / N of them. An
    all-reduce is two passes. The passes of a step:

    | stage | minimum | DeepSpeed |
    |---|---|---|
    | 0 | 2 | 2 |
    | 1 | 2 | 3 |
    | 2 | m + 1 | 2 m + 1 |
    | 3 | 3 m | 2 m |

    At stages 1 and 2 DeepSpeed all-reduces its buckets, although a GPU needs its own share only.
    With use_multi_rank_bucket_allreduce = false it needs the minimum. At stage 3, weights that were
    gathered for the forward pass stay for the backward pass. Where they do not, it takes 3 m.

    Args:
        parameters: P.
        sharding: the ZeRO stage, and N GPUs.
        micro_batches: m.
        width: w, bytes of a value.
        updates: values that Muon gathers at stages 1 and 2.

    Returns:
        The bytes that DeepSpeed and Muon send, and the minimum for the stage.

    Source: Rajbhandari et al., 2020, section 7, for the minimum;
    benchmarks/results/communication.txt, measured, for DeepSpeed.
    """
    stage, gpus, m = sharding.stage, sharding.gpus, micro_batches
    reduced = 2 if sharding.zero.get("use_multi_rank_bucket_allreduce", True) else 1
    gathered = 1 if sharding.stays_gathered(parameters) else 2
    least = (2, 2, m + 1, 3 * m)[stage]
    asked = (2, reduced + 1, reduced * m + 1, (1 + gathered) * m)[stage]
    one_value = width * (gpus - 1) / gpus
    gathered = updates if stage else 0
    return (asked * parameters + gathered) * one_value, least * parameters * one_value


# ----------------------------------------------------------------------------- time


def traffic_bytes(model: ModelConfig, vocab_size: int, pack: MicroBatchSize, w: int) -> float:
    """Return the bytes that fused kernels other than matrix products move, forward and backward.

    For each token of a layer, in values: two LayerNorms 6 D forward (they read x and the residual,
    and write y) and 10 D backward, GELU 2 F and 3 F, attention 4 D and 10 D, and the gradients of
    the two residuals 6 D. ModernBERT's two norms return sums as well, 9 D each, and so contain the
    residuals; GeGLU moves 8 F, and the rotary embedding 10 D. The embedding moves 10 D per token.
    The slabs of logits are written once and read twice.
    """
    D, F = model.hidden_size, model.intermediate_size
    layer = 36 * D + 5 * F if isinstance(model, BertConfig) else 42 * D + 8 * F
    # The last layer has R rows, the others have T.
    tokens = (model.num_hidden_layers - 1) * pack.tokens + pack.rows
    return float(w * (tokens * layer + 10 * D * pack.tokens + 3 * pack.masked * vocab_size))


def update_bytes(parameters: int, sharding: Sharding, w: int) -> float:
    """Return the bytes that the update moves.

    Gradients are copied into buckets (2 w), converted to fp32 and clipped (2 w + 12). AdamW reads
    four tensors and writes three (28). The weights are written out (4 + w).
    """
    share = parameters / sharding.gpus if sharding.stage else parameters
    return 2.0 * w * parameters + share * (3 * w + 44)


def compute_seconds(
    config: RunConfig,
    vocab_size: int,
    packs: Sequence[MicroBatchSize],
    device: Device,
    sharding: Sharding,
    *,
    bf16: bool = True,
    on_cpu: bool = False,
    efficiency: float | None = None,
) -> tuple[float, float, float]:
    """Return the seconds of a step: matrix products, memory traffic, and launches by the host.

    Communication is not included. With `runtime.recompute`, traffic and launches of the layers grow
    by a third, for a second forward pass.
    """
    model, recompute = config.model, config.runtime.recompute
    w, share = 2 if bf16 and not on_cpu else 4, 1.0 if on_cpu else BANDWIDTH_SHARE
    rate = (device.bf16 if bf16 else device.fp32) * (efficiency or (1.0 if on_cpu else EFFICIENCY))
    products = sum(executed_flops(model, vocab_size, *pack, recompute) for pack in packs)
    again = 4 / 3 if recompute else 1.0
    if config.optimizer.name == "muon":
        products += muon_flops(model, bf16) / (sharding.gpus if sharding.stage else 1)
    moved = sum(traffic_bytes(model, vocab_size, pack, w) for pack in packs) * (
        again * (CPU_PASSES if on_cpu else 1)
    )
    moved += update_bytes(count_parameters(model, vocab_size), sharding, w)
    launches = 0.0 if on_cpu else again * len(packs) * model.num_hidden_layers * LAYER_S
    return products / rate, moved / (device.bandwidth * share), launches


# ----------------------------------------------------------------------------- the plan


def _is_there(path: str) -> bool:
    """Whether there is a dataset, or anything else, at a path or URL.

    Raises:
        InputError: it is not known.
    """
    at = place(path)
    if isinstance(at, Path):
        return status(at) is not None
    with storage.answering(at):
        return storage.size(at / MANIFEST) is not None


class _Step(NamedTuple):
    """A step on some number of GPUs, in bytes and seconds; `hidden` is communication meanwhile."""

    packs: list[MicroBatchSize]
    memory: dict[str, float]
    recomputed: float | None
    products_s: float
    traffic_s: float
    launch_s: float
    sent: float
    least: float
    link: float
    hidden: bool

    @property
    def communication_s(self) -> float:
        return self.sent / self.link

    @property
    def busy_s(self) -> float:
        return max(self.products_s + self.traffic_s, self.launch_s)

    @property
    def seconds(self) -> float:
        return (max if self.hidden else operator.add)(self.busy_s, self.communication_s)


def plan(
    config: RunConfig,
    recipe: str,
    hardware: Hardware,
    *,
    stage: int | None = None,
    vocab_size: int | None = None,
    mean_length: float | None = None,
    dataset: TokenDataset | None = None,
) -> Plan:
    """Estimate a run of `config`.

    Args:
        config: the recipe's settings.
        recipe: the file that `config` came from, named in errors.
        hardware: the GPUs, or this machine.
        stage: the ZeRO stage; by default that of the recipe's DeepSpeed file. This file may be
            missing if `stage` is given.
        vocab_size, mean_length: V, and tokens per example; by default those of the recipe's
            dataset, if it exists.
        dataset: the recipe's dataset, where the caller has opened it.

    Raises:
        InputError: an unknown GPU, a number out of range, more GPUs than sequences, or an invalid
            DeepSpeed file or dataset.
    """
    device, gpus, on_cpu = hardware.one_device(), hardware.gpus, hardware.on_cpu
    phases, whole, config = len(config.phase), config, config.largest
    _check(config, recipe, hardware, stage, mean_length)
    bf16 = config.runtime.precision == "bf16" or (
        config.runtime.precision == "auto" and (not on_cpu or device.bf16 >= WORTH_IT * device.fp32)
    )
    kernels = "cpu" if on_cpu else "triton"
    weights, w = ("bf16", 2) if bf16 and not on_cpu else ("fp32", 4)
    efficiency = hardware.efficiency or (1.0 if on_cpu else EFFICIENCY)
    zero: dict[str, Any] = {}
    if stage is not None:
        check_optimizer(f"--stage {stage}", stage, config.optimizer.name)
    file = config.runtime.deepspeed
    if stage is None or file is None or status(Path(file)) is not None:
        settings = read_ds_config(config, recipe)
        zero = settings.values["zero_optimization"]
        if stage is None:
            stage = settings.stage(precision=weights, world=gpus, optimizer=config.optimizer.name)
    datasets = [dataset] if dataset else []
    if not datasets and all(_is_there(source.path) for source in config.sources):
        datasets = [open_dataset(source.path, verify=False) for source in config.sources]
    vocab_size, lengths, epoch, assumptions = _examples(config, vocab_size, mean_length, datasets)
    if phases:
        assumptions.append(
            f"all steps are like those of the largest of its {phases} phases, in tokens a step"
        )

    P, tokens = count_parameters(config.model, vocab_size), float(lengths.sum())
    peak = device.bf16 if bf16 else device.fp32
    hidden = bool(zero.get("overlap_comm", stage == 3))

    def step_on(gpus: int) -> _Step:
        packs = _packs(config, lengths, gpus)
        sharding = Sharding(stage, gpus, zero)
        needed = partial(
            memory_by_part,
            vocab_size=vocab_size,
            packs=packs,
            sharding=sharding,
            bf16=weights == "bf16",
            kernels=kernels,
            processes=processes_for(config.batch.sequences, usable_cores()) if on_cpu else 1,
        )
        recomputed = None
        if not (config.runtime.recompute or config.runtime.cuda_graphs):
            runtime = replace(config.runtime, recompute=True)
            recomputed = sum(needed(replace(config, runtime=runtime)).values())
        busy = compute_seconds(
            config,
            vocab_size,
            packs,
            device,
            sharding,
            bf16=bf16,
            on_cpu=on_cpu,
            efficiency=efficiency,
        )
        updates = count_hidden(config.model) if config.optimizer.name == "muon" else 0
        sent = communication_per_step(P, sharding, len(packs), w, updates)
        link = device.link if gpus <= GPUS_PER_NODE else min(device.link, device.network)
        return _Step(packs, needed(config), recomputed, *busy, *sent, link, hidden)

    step = step_on(gpus)
    step_s = step.seconds
    steps = _steps(config, tokens, epoch, step_s)
    total_s = None if steps is None else steps * step_s
    price = device.price if hardware.price is None else hardware.price
    flops = training_flops(config.model, vocab_size, lengths.tolist(), *_counts(config, lengths))
    assumptions += [
        f"matrix products at {efficiency:.0%} of {peak / 1e12:,.{2 if on_cpu else 0}f} TFLOP/s, "
        f"the rest at {1 if on_cpu else BANDWIDTH_SHARE:.0%} of "
        f"{device.bandwidth / 1e9:,.0f} GB/s of memory bandwidth",
    ]
    if gpus > 1:
        assumptions.append(
            f"{step.link / 1e9:,.0f} GB/s between GPUs, {'during' if hidden else 'after'} the "
            "computation, as DeepSpeed does at this stage"
        )
    if config.runtime.kernels not in ("auto", kernels):
        assumptions.append(
            f"kernels = {kernels}: memory and time of {config.runtime.kernels} are not known"
        )
    if price is not None:
        listed = (
            f"; listed {_FACTS['prices_of']}, see docs/plan.md" if price == device.price else ""
        )
        assumptions.append(f"{price:,.2f} dollars per GPU hour{listed}")
    return Plan(
        parameters=P,
        vocab_size=vocab_size,
        gpus=gpus,
        gpu=hardware.name,
        precision="bf16" if bf16 else "fp32",
        kernels=kernels,
        zero_stage=stage,
        memory=step.memory,
        memory_total=sum(step.memory.values()),
        memory_of_gpu=device.memory,
        tokens_per_step=tokens,
        micro_batches=len(step.packs),
        flops_per_token=flops / tokens,
        communication_bytes=step.sent,
        communication_least_bytes=step.least,
        products_s=step.products_s,
        traffic_s=step.traffic_s,
        launch_s=step.launch_s,
        communication_s=step.communication_s,
        step_s=step_s,
        tokens_per_s=tokens / step_s,
        mfu=flops / gpus / (peak * step_s),
        steps=steps,
        dataset_tokens=sum(one.counts("train").tokens for one in datasets) or None,
        epochs=steps * config.batch.sequences / epoch if steps and epoch else None,
        relative_cost={} if on_cpu else _relative_cost(config, step_on, device.memory),
        total_s=total_s,
        price_per_gpu_hour=price,
        cost=None if total_s is None or price is None else total_s / 3600 * gpus * price,
        limit=_too_often(whole, datasets) or _bottleneck(step, device.memory),
        assumptions=assumptions,
        reading=[reading(each, config.order.window) for each in datasets],
    )


def describe(p: Plan) -> list[tuple[str, str]]:
    """Return the rows of the printed table: name and value."""
    rows = [("parameters", f"{p.parameters / 1e6:,.1f} M, {p.vocab_size:,} tokens of vocabulary")]
    rows += [(f"memory: {part}", _size(size)) for part, size in p.memory.items() if size]
    rows += [
        (
            "memory: sum",
            f"{_size(p.memory_total)} of {_size(p.memory_of_gpu)}, at the peak of a step",
        ),
        (
            "step",
            f"{_time(p.step_s)}: {p.tokens_per_step:,.0f} tokens, "
            f"{p.micro_batches} micro-batch{'es' * (p.micro_batches > 1)} per GPU",
        ),
        (
            "  matrix products",
            f"{_time(p.products_s)}, {p.flops_per_token / 1e9:.3f} GFLOPs per token",
        ),
        ("  other kernels", f"{_time(p.traffic_s)}, limited by memory bandwidth"),
    ]
    if p.launch_s:
        rows.append(("  kernel launches", f"{_time(p.launch_s)}, at the same time"))
    if p.gpus > 1:
        least = f"{p.communication_least_bytes / 1e9:,.3f} in the ZeRO paper"
        sent = f"{p.communication_bytes / 1e9:,.3f} GB sent by each GPU ({least})"
        rows.append(("  communication", f"{_time(p.communication_s)}, {sent}"))
    unknown = "unknown: the run is limited in epochs, and the dataset is not here"
    cost = "" if p.cost is None else f", {p.cost:,.{0 if p.cost >= 100 else 2}f} dollars"
    for i, one in enumerate(p.reading):
        rows += [("" if i else "data", _read(one)), ("  from a bucket", _requests(one))]
    rows += [
        ("tokens/s", f"{p.tokens_per_s:,.0f}, {p.mfu:.0%} of the peak"),
        (
            "the run",
            unknown if p.total_s is None else f"{p.steps:,} steps, {_duration(p.total_s)}{cost}",
        ),
    ]
    if p.steps is not None:
        text = f"{_count(p.steps * p.tokens_per_step)} tokens in the run"
        if p.dataset_tokens is not None and p.epochs is not None:
            text += f", {_count(p.dataset_tokens)} in the dataset: {p.epochs:,.2g} epochs"
        rows.append(("text", text))
    if p.relative_cost:
        rows.append(("GPUs that pay", _paying(p.relative_cost)))
    return [*rows, ("limited by", p.limit)]


def _paying(cost: Mapping[int, float]) -> str:
    """The largest number of GPUs on which a token costs at most PAYS times the least, in words."""
    most = max(gpus for gpus, ratio in cost.items() if ratio <= PAYS)
    cheapest = min(cost, key=lambda gpus: cost[gpus])
    text = f"up to {most:,}"
    if most != cheapest:
        text += f", where a token costs {cost[most]:.1f} times as much as on {cheapest:,}"
    more = [gpus for gpus in cost if gpus > most]
    if not more:
        return f"{text}; more would need more batch.sequences"
    return f"{text}; on {more[0]:,} a token costs {cost[more[0]]:.1f} times as much"


def _read(data: Reading) -> str:
    """What a run reads of its dataset, in words."""
    windows = (
        f"in windows of {_size(data.window)}, {data.windows:,} an epoch"
        if data.windows > 1
        else "shuffled as a whole"
    )
    return (
        f"{_size(data.total)}, {windows}; {_size(data.first)} read before the first step, "
        f"{_size(data.cache)} of page cache a machine"
    )


def _requests(data: Reading) -> str:
    """How often a machine asks an object store, in words."""
    epoch = f", {data.gets_per_epoch:,} an epoch" if data.gets_per_epoch else ""
    return f"{data.gets:,} GET requests by each machine before the first step{epoch}"


def _count(number: float) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6)):
        if number >= size:
            return f"{number / size:,.1f} {unit}"
    return f"{number:,.0f}"


def _size(size: float) -> str:
    return (
        f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.{0 if size >= 1e7 else 1}f} MB"
    )


def _time(seconds: float) -> str:
    return f"{seconds:,.2f} s" if seconds >= 1 else f"{1e3 * seconds:,.1f} ms"


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:,.0f} seconds"


def _check(
    config: RunConfig,
    recipe: str,
    hardware: Hardware,
    stage: int | None,
    mean_length: float | None,
) -> None:
    gpus, efficiency, price = hardware.gpus, hardware.efficiency, hardware.price
    if gpus < 1:
        raise InputError(f"--gpus {gpus}: must be 1 or more")
    if hardware.on_cpu and gpus > 1:
        raise InputError(f"--gpus {gpus}: --gpu cpu is this machine alone; leave --gpus out")
    batch = config.batch
    if batch.sequences > LARGEST_BATCH:
        raise InputError(
            f"{recipe}: batch.sequences = {batch.sequences:,}: a plan draws the length of each; "
            f"it can be {LARGEST_BATCH:,} at most here"
        )
    if not _divides(config, gpus):
        raise InputError(
            f"--gpus {gpus}: the batch.sequences = {batch.sequences} of {recipe} cannot be split "
            f"over {gpus} GPUs in packs of batch.micro_batch_tokens = {batch.micro_batch_tokens}; "
            f"make it a multiple of {gpus}"
        )
    if efficiency is not None and not 0 < efficiency <= 1:
        raise InputError(
            f"--efficiency {efficiency}: must be above 0 and at most 1; the default is {EFFICIENCY}"
        )
    if stage not in (None, 0, 1, 2, 3):
        raise InputError(f"--stage {stage}: must be 0, 1, 2 or 3")
    if mean_length is not None and not mean_length <= batch.max_length:
        raise InputError(
            f"--mean-length {mean_length:g}: is above the batch.max_length = {batch.max_length} of "
            f"{recipe}, the tokens of the longest example"
        )
    if price is not None and not 0 <= price < math.inf:
        raise InputError(f"--price {price}: must be 0 or more, in dollars per GPU hour")


def _divides(config: RunConfig, gpus: int) -> bool:
    """Whether the batch can be shared among these GPUs; training has the same condition.

    A remainder can be split only if two examples fit in a pack.
    """
    batch = config.batch
    even = batch.sequences % gpus == 0
    return gpus <= batch.sequences and (even or batch.micro_batch_tokens >= 2 * batch.max_length)


def _too_often(config: RunConfig, datasets: Sequence[TokenDataset]) -> str | None:
    """Return which source the run would use more often than it may: training refuses that."""
    if not datasets or not any(source.epochs for source in config.sources):
        return None
    return Timetable(config, Streams(datasets, config)).epochs_problem()


def _relative_cost(
    config: RunConfig, step_on: Callable[[int], _Step], memory: float
) -> dict[int, float]:
    """Return GPU seconds of a step on 1, 2, 4, ... GPUs, over the least of them.

    Numbers that cannot share the batch, or on which the run does not fit, are left out.
    """
    powers = [2**i for i in range(config.batch.sequences.bit_length())]
    steps = {n: step_on(n) for n in powers if _divides(config, n)}
    seconds = {n: n * s.seconds for n, s in steps.items() if sum(s.memory.values()) <= memory}
    return {n: found / min(seconds.values()) for n, found in seconds.items()}


def _bottleneck(step: _Step, memory: float) -> str:
    """Return what limits the speed or makes the run impossible, and what to change."""
    tokens, recomputed, parts = step.packs[0].tokens, step.recomputed, step.memory
    over = sum(parts.values()) - memory
    if over > 0:
        part = max(parts, key=lambda name: parts[name])
        advice = "raise the ZeRO stage, or use more GPUs"
        if part in ("activations", "temporaries"):
            growing = parts["activations"] + parts["temporaries"]
            most = int(tokens * max(growing - over, 0) / growing)
            advice = f"lower batch.micro_batch_tokens to {most:,} or below"
        if recomputed is not None and recomputed <= memory:
            advice += (
                f"; or set runtime.recompute = true, which needs {recomputed / 1e9:,.1f} GB and "
                "makes a step about a third longer"
            )
        size = f"{sum(parts.values()) / 1e9:,.1f} GB do not fit in {memory / 1e9:,.0f} GB"
        return f"memory: {size}; the largest part is {part}: {advice}"
    if step.communication_s > step.busy_s:
        ratio = step.communication_s / step.busy_s
        return (
            f"communication: {ratio:.1f} times the computation; "
            "raise batch.sequences, or use fewer GPUs"
        )
    if step.launch_s > step.products_s + step.traffic_s:
        return (
            f"too little work: the GPU computes a micro-batch of {tokens:,} tokens faster than the "
            "host launches it; use fewer GPUs, or raise batch.sequences"
        )
    if step.traffic_s > step.products_s:
        return (
            "memory bandwidth: LayerNorms, GELUs and the update take longer than the matrix "
            "products; a wider model loses less"
        )
    return "computation: a faster device, or more of them, shortens the run"


def _steps(config: RunConfig, tokens: float, epoch: int | None, step_s: float) -> int | None:
    """Return the steps until the first stop condition known in advance; None where none is."""
    stop = config.stop
    epochs = stop.epochs or (None if stop.steps or stop.tokens or stop.seconds else 1)
    ends = [
        stop.steps,
        stop.tokens and math.ceil(stop.tokens / tokens),
        stop.seconds and math.ceil(stop.seconds / step_s),
        epochs and epoch and math.ceil(epochs * epoch / config.batch.sequences),
    ]
    return min((end for end in ends if end), default=None)


def _counts(config: RunConfig, lengths: np.ndarray) -> tuple[int, int]:
    """Return the numbers of masked tokens and of pairs for sequences of these lengths."""
    special = 3 if config.objective.pairs else 2
    masked = selected_counts(np.maximum(lengths - special, 1), config.objective).sum()
    return int(masked), len(lengths) if config.objective.pairs else 0


def _packs(config: RunConfig, lengths: np.ndarray, gpus: int) -> list[MicroBatchSize]:
    """Return the micro-batches of rank 0, the one with the most tokens first.

    No other rank has more tokens than rank 0.
    """
    shared = share_out(lengths, gpus, config.batch.micro_batch_tokens)[::gpus]
    packs = []
    for members in shared:
        own = lengths[members]
        packs.append(MicroBatchSize(own.tolist(), *_counts(config, own)))
    return sorted(packs, key=lambda pack: -pack.tokens)


def _examples(
    config: RunConfig,
    vocab_size: int | None,
    mean_length: float | None,
    datasets: Sequence[TokenDataset],
) -> tuple[int, np.ndarray, int | None, list[str]]:
    """Return the data that a plan needs.

    Returns:
        V; int64 [sequences], tokens of each example of a step; examples per epoch, or None where
        this is unknown; and what had to be assumed.
    """
    epoch, assumptions, wanted = None, [], config.batch.sequences
    lengths = None
    if mean_length is not None:
        lengths = np.full(wanted, round(mean_length))
    if datasets:
        quotas = Streams(datasets, config).quotas(config)
        found = [sample(d, config, source_seed(config.seed, i)) for i, d in enumerate(datasets)]
        epoch = sum(examples for examples, _ in found)
        vocab_size = vocab_size or datasets[0].vocab_size
        if lengths is None:
            # As many of each source as in the mixture, rounded up; the last ones are left out.
            shares = (-(-wanted * quota // BLOCK) for quota in quotas)
            parts = [drawn[:share] for (_, drawn), share in zip(found, shares, strict=True)]
            lengths = np.concatenate(parts)[:wanted]
    if not vocab_size:
        vocab_size = 30522
        assumptions.append(
            f"{config.shown_data} is not here: a vocabulary of {vocab_size:,} tokens, as BERT's"
        )
    if lengths is None:
        mean = (0.5 if config.objective.segments == "single" else 0.95) * config.batch.max_length
        lengths = np.full(wanted, round(mean))
        assumptions.append(f"{config.shown_data} is not here: {mean:.0f} tokens per example")
    if not datasets:
        assumptions.append(
            f"{config.shown_data} is made already; `fastbert prepare SOURCE --estimate` measures "
            "the hours that it takes"
        )
    return vocab_size, lengths, epoch, assumptions
