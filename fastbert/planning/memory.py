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
from typing import Any, NamedTuple

from fastbert.config import ModelConfig, RunConfig

# bytes: CUDA's context, NCCL's buffers, and what the allocator holds back; not measured
CONTEXT = 1.5 * 1024**3
BUCKET = 500_000_000  # elements; DeepSpeed's default for zero_optimization.reduce_bucket_size
# parameters; DeepSpeed's default for stage3_max_live_parameters and stage3_max_reuse_distance
KEPT = 1_000_000_000
CPU_SLAB = 1 << 24  # logits that mlm_loss/cpu.py computes at a time
CPU_SHRINK = 0.85  # attention/cpu.py starts a new group below this share of the group's longest
# dlogits that mlm_loss/kernel.py computes at a time, for at most TRITON_WORDS columns
TRITON_SLAB = 1 << 26
TRITON_WORDS = 1 << 14
TRITON_ROWS = 128  # tokens of a program there, at least


class MicroBatchSize(NamedTuple):
    """The sizes of a micro-batch, which are known before its examples are drawn."""

    lengths: Sequence[int]  # tokens of each sequence, including [CLS] and [SEP]
    masked: int
    pairs: int

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def rows(self) -> int:
        """R, the rows of the last layer that a loss reads."""
        return self.masked + len(self.lengths)


def count_parameters(model: ModelConfig, vocab_size: int) -> int:
    """Return the number of parameters of BertForPreTraining with a tied decoder.

    - Embeddings: (V + positions + 2 token types) D, and a LayerNorm of 2 D.
    - Each layer: qkv and output 4 (D^2 + D), up F (D + 1), down D (F + 1), two LayerNorms 4 D.
    - MLM head: D^2 + D, a LayerNorm of 2 D, V biases.
    - NSP head: D^2 + D, and 2 (D + 1).
    """
    D = model.hidden_size
    embeddings = (vocab_size + model.max_position_embeddings + 2) * D + 2 * D
    mlm = D * D + D + 2 * D + vocab_size
    nsp = D * D + D + 2 * (D + 1)
    return embeddings + model.num_hidden_layers * _layer_parameters(model) + mlm + nsp


def _layer_parameters(model: ModelConfig) -> int:
    D, F = model.hidden_size, model.intermediate_size
    return 4 * (D * D + D) + F * (D + 1) + D * (F + 1) + 4 * D


def count_hidden(model: ModelConfig) -> int:
    """Return the number of parameters in the layers' matrices, which Muon updates."""
    D, F = model.hidden_size, model.intermediate_size
    return model.num_hidden_layers * (4 * D * D + 2 * D * F)


def memory_by_part(
    config: RunConfig,
    vocab_size: int,
    pack: MicroBatchSize,
    *,
    micro_batches: int = 1,
    gpus: int = 1,
    stage: int = 1,
    bf16: bool = True,
    kernels: str = "triton",
    zero: Mapping[str, Any] | None = None,
    processes: int = 1,
) -> dict[str, float]:
    """Return the bytes of tensors on one GPU, by part, at the moment of a step when they peak.

    Args:
        vocab_size: V.
        pack: the largest micro-batch.
        micro_batches: micro-batches per step on each GPU.
        gpus: N.
        stage: the ZeRO stage, 0 to 3.
        bf16: whether weights and activations are bf16; else fp32.
        kernels: "triton" or "cpu".
        zero: the section `zero_optimization` of DeepSpeed's configuration.
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

    The peak is at one of four moments:

    - The MLM loss is computed. All activations, the gradients of earlier micro-batches, and the
      workspace of the loss are in memory. On a CPU this is in the forward pass.
    - The backward pass reaches the last layer's attention, with the gradients computed so far.
      It holds dk, dv, and the two joined.
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
    zero, model, optimizer = zero or {}, config.model, config.optimizer
    P, D, w = count_parameters(model, vocab_size), model.hidden_size, 2 if bf16 else 4
    own = 4.0 * P / gpus if stage else 4.0 * P
    slots = (1 if optimizer.momentum else 0) if optimizer.name == "sgd" else 2
    single = count_hidden(model) if optimizer.name == "muon" else 0
    gathered = stage == 3 and gpus > 1 and stay_gathered(zero, P)
    always = {
        "weights": w * P / (gpus if stage == 3 else 1),
        "gathered weights": float(gathered * w * P),
        "master weights": own if stage else 0.0,
        "moments": (slots - single / P) * own,
        "shared copies": 4.0 * P * processes if processes > 1 else 0.0,
    }
    gradients = w * P / (gpus if stage >= 2 else 1)
    earlier = gradients if micro_batches > 1 or stage == 3 else 0.0
    bucket = float(w * int(zero.get("reduce_bucket_size", BUCKET))) if stage else 0.0
    if stage in (1, 2) and zero.get("overlap_comm"):
        bucket *= 2  # one fills while the other is sent
    in_forward = bucket if stage == 3 or (stage == 1 and micro_batches > 1) else 0.0
    flat = float(w * min(P, BUCKET)) if stage == 0 and gpus > 1 else 0.0
    kept = activation_bytes(model, vocab_size, pack, bf16, kernels)
    # Each tuple is in the order of `names` below.
    loss = (
        earlier,
        kept,
        _loss_workspace(model, vocab_size, pack, w, kernels),
        in_forward if kernels == "cpu" else bucket,
    )
    last_layer = (
        earlier or float(w * (_layer_parameters(model) + 2 * D * D)),
        kept,
        4.0 * w * D * pack.tokens,
        bucket,
    )
    end = (gradients, 5.0 * D * pack.tokens, 2.0 * w * vocab_size * D, bucket)
    update = (
        gradients,
        0.0,
        _update_workspace(optimizer.name, model, P, gpus, stage, w),
        bucket if stage == 3 else flat,
    )
    names = ("gradients", "activations", "temporaries", "buckets")
    peak = dict(zip(names, max((loss, last_layer, end, update), key=sum), strict=True))
    return always | peak | {"context": 0.0 if kernels == "cpu" else CONTEXT}


def _update_workspace(
    optimizer: str, model: ModelConfig, P: int, gpus: int, stage: int, w: int
) -> float:
    """Return the bytes that the optimizer's step allocates.

    LAMB, which runs at stage 0 alone, computes the update and its denominator for all parameters at
    once, 8 P bytes; of 50 million parameters the peak was 7.99 bytes each. StableAdamW has the
    denominators of all parameters, and those of a group with its gradients divided by them. Muon
    computes the update of the matrices, and multiplies those of one shape at once, with six
    temporaries. Stages 1 to 3 copy the gradients into a flat buffer, and convert it to fp32. There
    Muon gathers the update.
    """
    share = gpus if stage else 1
    flat = (w + 4.0 * (w == 2)) * P / share if stage else 0.0
    if optimizer == "lamb":
        return 8.0 * P
    if optimizer == "stable_adamw":
        return flat + 12.0 * P / share
    if optimizer == "muon":
        D, F, hidden = model.hidden_size, model.intermediate_size, count_hidden(model)
        largest = model.num_hidden_layers * D * max(4 * D, F)
        gathered = w * hidden if stage and gpus > 1 else 0
        return flat + 4.0 * hidden / share + gathered + 6.0 * w * largest / share
    return flat


def stay_gathered(zero: Mapping[str, Any], P: int) -> bool:
    """Whether stage 3 keeps all P weights from the forward to the backward pass.

    With DeepSpeed's defaults it does so at the sizes of BERT.
    """
    return all(
        int(zero.get(key, KEPT)) >= P
        for key in ("stage3_max_live_parameters", "stage3_max_reuse_distance")
    )


def activation_bytes(
    model: ModelConfig, vocab_size: int, pack: MicroBatchSize, bf16: bool, kernels: str
) -> float:
    """Return the bytes that the forward pass keeps for the backward pass.

    Weights and the batch itself are not counted. The table is for each token of a layer, in values
    of w bytes. The last layer keeps them for its R rows only, but keys and values for all T.

    | kept | "triton" | "cpu" |
    |---|---|---|
    | x, the input of qkv and the residual | D | D |
    | q, k, v | 3 D | 3 D, padded to groups of similar length |
    | attention | 8 H bytes of statistics | weights, fp32, before and after dropout: H n each |
    | output of the attention | D | D |
    | input and output of the first LayerNorm | 2 D, 8 bytes | 2 D, 8 bytes, mask of D bytes |
    | input and output of the GELU | 2 F | 2 F |
    | input of the second LayerNorm | D, 8 bytes | D, 8 bytes, mask of D bytes |

    The Triton attention keeps no statistics where 128 tokens of 16 bits fit into one tile.

    The last layer gathers its rows: R D for the queries, and with "triton" R D as the residual. The
    embedding keeps its sum and a mask with "cpu", 5 D bytes, and statistics alone with "triton".
    The MLM head keeps 4 M D. With "cpu" the fourth of these is a gradient, and the gradients of the
    word embeddings and their biases, V (D + 1), exist too. The NSP head keeps 2 B D.
    """
    D, F, H = model.hidden_size, model.intermediate_size, model.num_attention_heads
    L = model.num_hidden_layers
    T, R, w = pack.tokens, pack.rows, 2 if bf16 else 4
    head = w * D * (4 * pack.masked + 2 * len(pack.lengths))
    if kernels != "cpu":
        tile = bf16 and max(pack.lengths) <= 128
        each = w * (5 * D + 2 * F) + 16 + (0 if tile else 8 * H)  # without x, k and v
        # Bytes of the tables for each row: dropout needs a key of 8 bytes.
        tables = 24 if model.hidden_dropout_prob + model.attention_probs_dropout_prob > 0 else 16
        full, last = T * (each + 3 * w * D), R * (each + 2 * w * D + tables) + 3 * T * w * D
        return (L - 1) * full + last + tables * T + head
    hidden, attention = model.hidden_dropout_prob > 0, model.attention_probs_dropout_prob > 0
    score = 4 * H * (1 + attention)
    each = w * (4 * D + 2 * F) + 2 * D * hidden + 16  # without x, q, k and v
    full = last = 0.0
    for longest, sequences in _groups(pack.lengths):
        rows = 1 + pack.masked * longest / max(T, 1)
        full += sequences * longest * (3 * w * D + score * longest)
        last += sequences * (longest * 2 * w * D + rows * w * D + rows * score * longest)
    full += T * (each + w * D)
    last += R * (each + w * D) + T * w * D
    return (L - 1) * full + last + T * (D * (4 + hidden) + 8) + head + w * vocab_size * (D + 1)


def _groups(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Return the longest length and the number of sequences of each group of attention/cpu.py."""
    groups: list[tuple[int, int]] = []
    for n in sorted(lengths, reverse=True):
        longest, count = groups[-1] if groups else (0, 0)
        if n >= CPU_SHRINK * longest > 0:
            groups[-1] = (longest, count + 1)
        else:
            groups.append((n, 1))
    return groups


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
