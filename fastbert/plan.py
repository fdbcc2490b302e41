"""What a run will need on given GPUs, before anybody rents them: memory, step time, communication, time to the end, what limits it.

An estimate from formulas, no measurement: peak rates come from data sheets and the share of the peak that a step reaches is assumed. Every
assumption is in the answer. Letters as everywhere: T tokens of a micro-batch, M masked, D hidden, F feed-forward, V vocabulary, H heads;
P parameters, N GPUs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from fastbert.config import ModelConfig, RunConfig
from fastbert.errors import InputError
from fastbert.flops import executed_flops, training_flops
from fastbert.training.ds_config import read_ds_config

GIB = 1024**3


@dataclass(frozen=True)
class GpuKind:
    """From the vendor's data sheet: dense (not sparse) peaks in FLOP/s, memory in bytes, link within a node in bytes/s and direction."""

    bf16: float
    fp32: float
    memory: float
    link: float


GPUS = {
    # NVIDIA data sheets: A100 80GB (2021), L4 and L40S (2023), H100 SXM and H200 SXM (2023, 2024), HGX B200 (2025; GB of one GPU);
    # AMD data sheet: Instinct MI300X (2023). Memory as sold, in units of 10^9 bytes. fp32 is the rate without tensor cores.
    # A PCIe 4.0 x16 link where there is no NVLink.
    "a100": GpuKind(312e12, 19.5e12, 80e9, 300e9),
    "a100-40gb": GpuKind(312e12, 19.5e12, 40e9, 300e9),
    "l4": GpuKind(121e12, 30.3e12, 24e9, 32e9),
    "l40s": GpuKind(362e12, 91.6e12, 48e9, 32e9),
    "h100": GpuKind(989e12, 67e12, 80e9, 450e9),
    "h200": GpuKind(989e12, 67e12, 141e9, 450e9),
    "b200": GpuKind(2250e12, 75e12, 180e9, 900e9),
    "mi300x": GpuKind(1307e12, 163.4e12, 192e9, 448e9),
}
GPUS_PER_NODE = 8
# Bytes/s and direction between nodes: 8 adapters of 400 Gbit/s, as in a DGX H100. Rings cross a node's border once, so that all of its
# adapters carry the traffic of each of its GPUs together.
NETWORK = 8 * 50e9
RESERVED = 1.5 * GIB  # CUDA context, NCCL's buffers, what the allocator holds back
BUCKET = 500_000_000  # elements; DeepSpeed's default for zero_optimization.reduce_bucket_size
SAMPLE = 4096  # examples drawn to learn their mean length


@dataclass(frozen=True)
class Plan:
    """The estimate. Bytes, seconds, FLOPs and tokens, as the names say; memory and communication are those of one GPU.

    `flops_per_token` is useful work, all layers whole; the step's time counts what is computed, the last layer cut to the rows that matter.
    """

    parameters: int
    vocab_size: int
    gpus: int
    gpu: str
    precision: str
    zero_stage: int
    memory: dict[str, float]
    memory_total: float
    memory_of_gpu: float
    tokens_per_step: float
    micro_batches: int
    flops_per_token: float
    communication_bytes: float
    compute_s: float
    communication_s: float
    step_s: float
    tokens_per_s: float
    steps: int | None
    total_s: float | None
    limit: str
    assumptions: list[str]


def count_parameters(model: ModelConfig, vocab_size: int) -> int:
    """Parameters of BertForPreTraining, the decoder tied.

    Embeddings: (V + positions + 2 segments) D and a LayerNorm of 2D. A layer: qkv and output 4 (D^2 + D), up F (D + 1), down D (F + 1),
    two LayerNorms 4D. MLM head: D^2 + D, a LayerNorm of 2D, V biases. NSP head: D^2 + D, and 2 (D + 1).
    """
    D, F = model.hidden_size, model.intermediate_size
    embeddings = (vocab_size + model.max_position_embeddings + 2) * D + 2 * D
    layer = 4 * (D * D + D) + F * (D + 1) + D * (F + 1) + 4 * D
    mlm = D * D + D + 2 * D + vocab_size
    nsp = D * D + D + 2 * (D + 1)
    return embeddings + model.num_hidden_layers * layer + mlm + nsp


def memory_by_part(config: RunConfig, vocab_size: int, gpus: int, stage: int, bf16: bool, bucket: int = BUCKET) -> dict[str, float]:
    """Bytes on one GPU.

    With P parameters: weights 2P in bf16 (4P in fp32), gradients the same, and in bf16 a master copy of 4P; AdamW and LAMB have two moments
    (8P), SGD one (4P). Stage 1 divides moments and masters by N, stage 2 the gradients too, stage 3 also the weights.

    Activations kept for the backward pass: T (L (8 D + 2 F) + D) values and the 4 H bytes of the attention's log-sum-exp. A layer keeps
    query, key, value (3D), the attention's output (D), the input and the output of both LayerNorms (4D), the input and the output of
    the GELU (2F). That is what fused kernels keep: attention that stores its weights, as the CPU's does, needs more.

    Workspace: what CUDA, NCCL and the allocator take, and two buckets of gradients under way where there is more than one GPU.

    Source: Rajbhandari et al., 2020, "ZeRO", section 3.1 and figure 1; Korthikanti et al., 2022, section 4.1, for the activations.
    """
    model, P, width = config.model, count_parameters(config.model, vocab_size), 2 if bf16 else 4
    D, F, T = model.hidden_size, model.intermediate_size, config.batch.micro_batch_tokens
    kept = model.num_hidden_layers * ((8 * D + 2 * F) * width + 4 * model.num_attention_heads) + D * width
    moments = 4 if config.optimizer.name == "sgd" else 8

    def share(first_stage: int) -> int:
        return gpus if stage >= first_stage else 1

    return {
        "weights": P * width / share(3),
        "gradients": P * width / share(2),
        "master weights": P * 4 / share(1) if bf16 else 0.0,
        "moments": P * moments / share(1),
        "activations": float(T * kept),
        "workspace": RESERVED + (2.0 * min(bucket, P) * width if gpus > 1 else 0.0),
    }


def communication_per_step(parameters: int, gpus: int, stage: int, micro_batches: int, width: int) -> float:
    """Bytes that one GPU sends in one step, by rings.

    A reduce-scatter or an all-gather of P values sends P (N - 1) / N of them. Stages 0 and 1 reduce and gather once a step; stage 2
    reduces for every micro-batch, since no GPU keeps all gradients; stage 3 also gathers the weights twice for every micro-batch.

    Source: Rajbhandari et al., 2020, section 7.
    """
    passes = {0: 2, 1: 2, 2: micro_batches + 1, 3: 3 * micro_batches}[stage]
    return passes * parameters * width * (gpus - 1) / gpus


def plan(
    config: RunConfig,
    recipe: str,
    gpus: int,
    gpu: str,
    *,
    stage: int | None = None,
    efficiency: float = 0.35,
    vocab_size: int | None = None,
    mean_length: float | None = None,
) -> Plan:
    """Estimate a run of `config` on `gpus` GPUs of the kind `gpu`.

    Args:
        recipe: the file that `config` came from, named in errors.
        stage: of ZeRO; by default the one in the recipe's DeepSpeed file.
        efficiency: share of the peak that the computation reaches.
        vocab_size, mean_length: V, and tokens of an example; by default those of the recipe's store, if it is there.

    Raises:
        InputError: an unknown GPU, a number out of range, a DeepSpeed file or a store that is wrong.
    """
    if gpu.lower() not in GPUS:
        raise InputError(f"--gpu {gpu}: unknown; known: {', '.join(GPUS)}")
    if gpus < 1:
        raise InputError(f"--gpus {gpus}: must be 1 or more")
    if not 0 < efficiency <= 1:
        raise InputError(f"--efficiency {efficiency}: must be above 0 and 1 at most; 0.35 is usual")
    if stage not in (None, 0, 1, 2, 3):
        raise InputError(f"--stage {stage}: must be 0, 1, 2 or 3")
    kind, bf16 = GPUS[gpu.lower()], config.runtime.precision != "fp32"
    precision = "bf16" if bf16 else "fp32"
    bucket = BUCKET
    if stage is None:
        settings = read_ds_config(config, recipe)
        stage = settings.stage(precision=precision, world=gpus, optimizer=config.optimizer.name)
        named = settings.values["zero_optimization"].get("reduce_bucket_size")
        bucket = int(named) if isinstance(named, (int, float)) else BUCKET
    vocab_size, length, epoch, assumptions = _examples(config, vocab_size, mean_length)

    P = count_parameters(config.model, vocab_size)
    tokens = config.batch.sequences * length
    micro_batches = max(1, math.ceil(tokens / gpus / config.batch.micro_batch_tokens))
    masked = round(config.objective.mask_rate * (length - 3) * config.batch.sequences)
    pairs = config.batch.sequences if config.objective.pairs else 0
    step = (config.model, vocab_size, [round(length)] * config.batch.sequences, masked, pairs)
    peak = kind.bf16 if bf16 else kind.fp32
    compute_s = executed_flops(*step) / gpus / (peak * efficiency)
    link = kind.link if gpus <= GPUS_PER_NODE else min(kind.link, NETWORK)
    sent = communication_per_step(P, gpus, stage, micro_batches, 2 if bf16 else 4)
    communication_s = sent / link
    step_s = max(compute_s, communication_s)
    memory = memory_by_part(config, vocab_size, gpus, stage, bf16, bucket)
    steps = _steps(config, tokens, epoch, step_s)
    assumptions += [
        f"the computation reaches {efficiency:.0%} of the peak of {peak / 1e12:,.0f} TFLOP/s",
        f"communication at {link / 1e9:,.0f} GB/s a GPU, hidden behind the computation where it is shorter",
        "memory: Triton kernels that keep no attention weights",
    ]
    return Plan(
        parameters=P,
        vocab_size=vocab_size,
        gpus=gpus,
        gpu=gpu.lower(),
        precision=precision,
        zero_stage=stage,
        memory=memory,
        memory_total=sum(memory.values()),
        memory_of_gpu=kind.memory,
        tokens_per_step=tokens,
        micro_batches=micro_batches,
        flops_per_token=training_flops(*step) / tokens,
        communication_bytes=sent,
        compute_s=compute_s,
        communication_s=communication_s,
        step_s=step_s,
        tokens_per_s=tokens / step_s,
        steps=steps,
        total_s=None if steps is None else steps * step_s,
        limit=_limit(config, memory, kind, tokens / gpus, compute_s, communication_s),
        assumptions=assumptions,
    )


def describe(p: Plan) -> list[tuple[str, str]]:
    """The rows of the table that a person reads."""
    rows = [("parameters", f"{p.parameters / 1e6:,.1f} M, {p.vocab_size:,} tokens of vocabulary")]
    rows += [(f"memory: {part}", f"{size / 1e9:,.2f} GB") for part, size in p.memory.items()]
    return [
        *rows,
        ("memory: sum", f"{p.memory_total / 1e9:,.2f} of {p.memory_of_gpu / 1e9:,.0f} GB a GPU"),
        ("step", f"{p.tokens_per_step:,.0f} tokens, {p.micro_batches} micro-batches a GPU, {p.flops_per_token / 1e9:.3f} GFLOPs a token"),
        ("  computation", f"{1e3 * p.compute_s:,.2f} ms"),
        ("  communication", f"{1e3 * p.communication_s:,.2f} ms, {p.communication_bytes / 1e9:,.3f} GB sent by each GPU"),
        ("tokens/s", f"{p.tokens_per_s:,.0f}"),
        (
            "the run",
            "unknown: its end is in epochs, and the store is not here"
            if p.total_s is None
            else f"{p.steps:,} steps, {_duration(p.total_s)}",
        ),
        ("limited by", p.limit),
    ]


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:,.0f} seconds"


def _limit(config: RunConfig, memory: dict[str, float], kind: GpuKind, tokens: float, compute_s: float, communication_s: float) -> str:
    total = sum(memory.values())
    if total > kind.memory:
        part = max(memory, key=lambda name: memory[name])
        cure = "lower batch.micro_batch_tokens" if part == "activations" else "raise the ZeRO stage"
        return f"memory: {total / 1e9:.0f} GB do not fit into {kind.memory / 1e9:.0f} GB; most of it is {part}: {cure}"
    if communication_s > compute_s:
        return f"communication: {communication_s / compute_s:.1f} times the computation; raise batch.sequences, or use fewer GPUs"
    if tokens < config.batch.micro_batch_tokens / 2:
        return f"too little work: {tokens:,.0f} tokens a GPU and step are less than half a micro-batch; fewer GPUs, or more batch.sequences"
    return "computation"


def _steps(config: RunConfig, tokens: float, epoch: int | None, step_s: float) -> int | None:
    """Steps until the first stop condition that is known beforehand; None where none is."""
    stop = config.stop
    epochs = stop.epochs or (None if stop.steps or stop.tokens or stop.seconds else 1)
    ends = [
        stop.steps,
        stop.tokens and math.ceil(stop.tokens / tokens),
        stop.seconds and math.ceil(stop.seconds / step_s),
        epochs and epoch and math.ceil(epochs * epoch / config.batch.sequences),
    ]
    return min((end for end in ends if end), default=None)


def _examples(config: RunConfig, vocab_size: int | None, mean_length: float | None) -> tuple[int, float, int | None, list[str]]:
    """V, mean tokens of an example and examples of an epoch (None: unknown), and what had to be assumed."""
    epoch, assumptions = None, []
    if Path(config.data).exists():
        import numpy as np

        from fastbert.data.examples import Examples
        from fastbert.data.store import open_store

        store = open_store(config.data)
        examples = Examples(store.split("train"), config.objective, config.batch.max_length, config.seed, config.data)
        epoch, vocab_size = len(examples), vocab_size or store.vocab_size
        mean_length = mean_length or float(examples.draw(0, np.arange(min(SAMPLE, epoch))).lengths.mean())
    if not vocab_size:
        vocab_size = 30522
        assumptions.append(f"{config.data} is not here: a vocabulary of {vocab_size:,}, as BERT's")
    if not mean_length:
        mean_length = (0.95 if config.objective.segments == "fill" else 0.5) * config.batch.max_length
        assumptions.append(f"{config.data} is not here: {mean_length:.0f} tokens an example")
    return vocab_size, mean_length, epoch, assumptions
