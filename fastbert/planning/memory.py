"""Formulas for the memory of a training step, by part. Pure Python: numbers in, bytes out.

Each formula names its source: what the operations of fastbert_kernels save for their backward
passes, or what DeepSpeed allocates. docs/plan.md compares the results with counted tensors.
Letters: T tokens of a micro-batch, B sequences, M masked, R = M + B rows of the last layer,
L layers, D hidden, F feed-forward, V vocabulary, H heads; P parameters, N GPUs, w bytes of a
weight.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastbert.config import ModelConfig, RunConfig
from fastbert.planning.activations import (
    MicroBatchSize,
    activation_bytes,
    joined_gradients,
    recomputed_bytes,
)
from fastbert.planning.parameters import count_hidden, count_parameters, layer_parameters

# bytes: CUDA's context, NCCL's buffers, and what the allocator holds back; not measured
CONTEXT = 1.5 * 1024**3
BUCKET = 500_000_000  # elements; DeepSpeed's default for zero_optimization.reduce_bucket_size
# parameters; DeepSpeed's default for stage3_max_live_parameters and stage3_max_reuse_distance
KEPT = 1_000_000_000
CPU_SLAB = 1 << 24  # logits that mlm_loss/cpu.py computes at a time
# dlogits that mlm_loss/kernel.py computes at a time, for at most TRITON_WORDS columns
TRITON_SLAB = 1 << 26
TRITON_WORDS = 1 << 14
TRITON_ROWS = 128  # tokens of a program there, at least


@dataclass(frozen=True)
class Sharding:
    """How ZeRO divides weights, gradients and the optimizer's state over GPUs.

    Attributes:
        stage: the ZeRO stage, 0 to 3.
        gpus: N.
        zero: the section `zero_optimization` of DeepSpeed's configuration.
    """

    stage: int = 1
    gpus: int = 1
    zero: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def stays_gathered(self, P: int) -> bool:
        """Whether stage 3 keeps all P weights from the forward to the backward pass.

        With DeepSpeed's defaults it does so at the sizes of BERT.
        """
        return all(
            int(self.zero.get(key, KEPT)) >= P
            for key in ("stage3_max_live_parameters", "stage3_max_reuse_distance")
        )


def memory_by_part(
    config: RunConfig,
    vocab_size: int,
    packs: Sequence[MicroBatchSize],
    sharding: Sharding,
    *,
    bf16: bool = True,
    kernels: str = "triton",
    processes: int = 1,
) -> dict[str, float]:
    """Return the bytes of tensors on one GPU, by part, at the moment of a step when they peak.

    Args:
        vocab_size: V.
        packs: the micro-batches of a step on each GPU, the largest first.
        sharding: the ZeRO stage and the GPUs.
        bf16: whether weights and activations are bf16; else fp32.
        kernels: "triton" or "cpu".
        processes: how many packs are computed at once on a CPU. They share a copy of the weights,
            and each but the first has one of the gradients.

    These parts exist at all times:

    | part | stage 0 | 1 | 2 | 3 |
    |---|---|---|---|---|
    | weights | w P | w P | w P | w P / N |
    | gathered weights | - | - | - | w P |
    | master weights | - | 4 P / N, in fp32 too | 4 P / N | 4 P / N |
    | moments | 4 P each | 4 P / N each | 4 P / N each | 4 P / N each |

    AdamW, StableAdamW and LAMB have two moments, SGD one, and Muon one for the matrices of the
    layers.

    The gathered weights count only where they stay from the forward to the backward pass.

    The peak is at one of these moments:

    - The MLM loss is computed. All activations, the gradients of earlier micro-batches, and the
      workspace of the loss are in memory. On a CPU this is in the forward pass.
    - The backward pass reaches the last layer's attention, with the gradients computed so far.
      It holds dk, dv, and the two joined; of ModernBERT dq too.
    - With `runtime.recompute`, the backward pass reaches the layer before the last.
    - The backward pass ends. All gradients are in memory, and two of the word embeddings, because
      two operations read these.
    - The update runs. All gradients are in memory, and at stages 1 to 3 a flat fp32 copy of them.

    At stage 1, DeepSpeed's bucket for gradients exists from the first gradient of the first
    micro-batch to the last gradient of the last. At stage 2 this holds for each micro-batch, and
    at stage 3 the bucket always exists. Stage 0 has no bucket, but with more than one GPU it
    flattens the gradients before the update.

    Source: Rajbhandari et al., 2020, "ZeRO", section 3.1, for the shares; DeepSpeed's code for the
    copies and buckets.
    """
    stage, gpus, zero = sharding.stage, sharding.gpus, sharding.zero
    model, optimizer, pack = config.model, config.optimizer, packs[0]
    P, D, w = count_parameters(model, vocab_size), model.hidden_size, 2 if bf16 else 4
    own = 4.0 * P / gpus if stage else 4.0 * P
    slots = (1 if optimizer.momentum else 0) if optimizer.name == "sgd" else 2
    single = count_hidden(model) if optimizer.name == "muon" else 0
    gathered = stage == 3 and gpus > 1 and sharding.stays_gathered(P)
    always = {
        "weights": w * P / (gpus if stage == 3 else 1),
        "gathered weights": float(gathered * w * P),
        "master weights": own if stage else 0.0,
        "moments": (slots - single / P) * own,
        "shared copies": 4.0 * P * processes if processes > 1 else 0.0,
    }
    gradients = w * P / (gpus if stage >= 2 else 1)
    earlier = gradients if len(packs) > 1 or stage == 3 else 0.0
    bucket = float(w * int(zero.get("reduce_bucket_size", BUCKET))) if stage else 0.0
    if stage in (1, 2) and zero.get("overlap_comm"):
        bucket *= 2  # one fills while the other is sent
    in_forward = bucket if stage == 3 or (stage == 1 and len(packs) > 1) else 0.0
    flat = float(w * min(P, BUCKET)) if stage == 0 and gpus > 1 else 0.0
    kept, again = activation_bytes(model, vocab_size, pack, bf16, kernels), 0.0
    if config.runtime.recompute and model.num_hidden_layers > 1:
        kept, again = recomputed_bytes(model, vocab_size, pack, bf16, kernels)
    # Each tuple is in the order of `names` below.
    loss = (
        earlier,
        kept,
        _loss_workspace(model, vocab_size, pack, w, kernels),
        in_forward if kernels == "cpu" else bucket,
    )
    last_layer = (
        earlier or float(w * (layer_parameters(model) + 2 * D * D)),
        kept,
        joined_gradients(model) * w * pack.tokens,
        bucket,
    )
    # With `runtime.recompute`. What the last layer kept is gone by then, but counted: it is small.
    recomputed = (
        earlier or 2.0 * w * layer_parameters(model),
        kept + again,
        joined_gradients(model) * w * pack.tokens,
        bucket,
    )
    end = (gradients, 5.0 * D * pack.tokens, 2.0 * w * vocab_size * D, bucket)
    update = (
        gradients,
        0.0,
        _update_workspace(optimizer.name, model, P, sharding, w),
        bucket if stage == 3 else flat,
    )
    names = ("gradients", "activations", "temporaries", "buckets")
    peak = dict(zip(names, max((loss, last_layer, recomputed, end, update), key=sum), strict=True))
    return always | peak | {"context": 0.0 if kernels == "cpu" else CONTEXT}


def _update_workspace(
    optimizer: str, model: ModelConfig, P: int, sharding: Sharding, w: int
) -> float:
    """Return the bytes that the optimizer's step allocates.

    LAMB, which runs at stage 0 alone, computes the update and its denominator for all parameters at
    once, 8 P bytes; of 50 million parameters the peak was 7.99 bytes each. StableAdamW has the
    denominators of all parameters, and those of a group with its gradients divided by them. Muon
    computes the update of the matrices, and multiplies those of one shape at once, with six
    temporaries. Stages 1 to 3 copy the gradients into a flat buffer, and convert it to fp32. There
    Muon gathers the update.
    """
    stage, gpus = sharding.stage, sharding.gpus
    share = gpus if stage else 1
    flat = (w + 4.0 * (w == 2)) * P / share if stage else 0.0
    if optimizer == "lamb":
        return 8.0 * P
    if optimizer == "stable_adamw":
        return flat + 12.0 * P / share
    if optimizer == "muon":
        D, F, hidden = model.hidden_size, model.intermediate_size, count_hidden(model)
        largest = model.num_hidden_layers * D * max(4 * D, (model.feed_forward_matrices - 1) * F)
        gathered = w * hidden if stage and gpus > 1 else 0
        return flat + 4.0 * hidden / share + gathered + 6.0 * w * largest / share
    return flat


def _loss_workspace(
    model: ModelConfig, vocab_size: int, pack: MicroBatchSize, w: int, kernels: str
) -> float:
    """Return the bytes that the MLM loss allocates while it runs.

    "cpu": a slab of logits and the one before it. In bf16 also an fp32 copy of these, and the
    gradient of the word embeddings with its fp32 sum.
    "triton": a slab of dlogits, fp32 sums for rows, words and biases, and the gradients of the word
    embeddings and of the rows.
    """
    D, V, M = model.hidden_size, vocab_size, pack.masked
    if kernels == "cpu":
        logits = min(M, 2 * max(1, CPU_SLAB // V)) * V
        return 4.0 * logits if w == 4 else 6.0 * logits + 8.0 * V * D
    width = min(TRITON_SLAB // max(M, 1), TRITON_WORDS, V)
    return float(
        M * width * w
        + (M + width) * D * 4
        + math.ceil(M / TRITON_ROWS) * V * 4
        + (V + 2 * M) * D * w
    )
