"""What a training step holds in memory, by part: formulas. Pure Python: numbers in, bytes out.

Each line says where the number comes from: what the operations of fastbert_kernels save for their backward passes, and what DeepSpeed
allocates. docs/plan.md compares them with counted tensors. Letters: T tokens of a micro-batch, B sequences, M masked, R = M + B rows of
the last layer, L layers, D hidden, F feed-forward, V vocabulary, H heads; P parameters, N GPUs, w bytes of a weight.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from fastbert.config import ModelConfig, RunConfig

CONTEXT = (
    1.5 * 1024**3
)  # bytes: CUDA's context, NCCL's buffers, what the allocator holds back; not measured
BUCKET = 500_000_000  # elements; DeepSpeed's default for zero_optimization.reduce_bucket_size
KEPT = 1_000_000_000  # parameters; its default for stage3_max_live_parameters and stage3_max_reuse_distance
CPU_SLAB = 1 << 24  # logits that mlm_loss/cpu.py holds at once
CPU_SHRINK = 0.85  # where attention/cpu.py ends a group of sequences
TRITON_SLAB = (
    1 << 26
)  # dlogits that mlm_loss/kernel.py holds at once, in slabs of at most so many words:
TRITON_WORDS = 1 << 14
TRITON_ROWS = 128  # tokens of a program there, at the least


class Pack(NamedTuple):
    """What is known of a micro-batch before it is drawn."""

    lengths: Sequence[int]  # tokens of each sequence, [CLS] and [SEP] counted
    masked: int
    pairs: int

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def rows(self) -> int:
        """Of the last layer: what a loss reads."""
        return self.masked + len(self.lengths)


def count_parameters(model: ModelConfig, vocab_size: int) -> int:
    """Parameters of BertForPreTraining, the decoder tied.

    Embeddings: (V + positions + 2 segments) D and a LayerNorm of 2D. A layer: qkv and output 4 (D^2 + D), up F (D + 1), down D (F + 1),
    two LayerNorms 4D. MLM head: D^2 + D, a LayerNorm of 2D, V biases. NSP head: D^2 + D, and 2 (D + 1).
    """
    D = model.hidden_size
    embeddings = (vocab_size + model.max_position_embeddings + 2) * D + 2 * D
    mlm = D * D + D + 2 * D + vocab_size
    nsp = D * D + D + 2 * (D + 1)
    return embeddings + model.num_hidden_layers * _layer_parameters(model) + mlm + nsp


def _layer_parameters(model: ModelConfig) -> int:
    D, F = model.hidden_size, model.intermediate_size
    return 4 * (D * D + D) + F * (D + 1) + D * (F + 1) + 4 * D


def memory_by_part(
    config: RunConfig,
    vocab_size: int,
    pack: Pack,
    *,
    micro_batches: int = 1,
    gpus: int = 1,
    stage: int = 1,
    bf16: bool = True,
    kernels: str = "triton",
    zero: Mapping[str, Any] | None = None,
) -> dict[str, float]:
    """Bytes of tensors on one GPU at the moment of a step when they are most, by part; `zero` is DeepSpeed's zero_optimization.

    At all times:

    | part | stage 0 | 1 | 2 | 3 |
    |---|---|---|---|---|
    | weights | w P | w P | w P | w P / N, and w P gathered, where these stay from the forward to the backward pass |
    | master weights | - | 4 P / N, in fp32 too | 4 P / N | 4 P / N |
    | moments | 4 P each | 4 P / N each | 4 P / N each | 4 P / N each |

    Beside them, at one of four moments:

    - the MLM loss, with all activations, the gradients of earlier micro-batches, and its own workspace; on a CPU it is in the forward pass;
    - the backward pass reaches the last layer's attention, with the gradients so far: dk, dv and both joined;
    - the backward pass ends: all gradients, and two of the word embeddings, since two operations read them;
    - the update: all gradients, and at stages 1 to 3 a flat copy of them, in fp32.

    DeepSpeed's bucket for gradients is there from the first gradient of the first micro-batch to the last of the last one, at stage 2 of
    each, at stage 3 always. Stage 0 has none, but between GPUs flattens the gradients before the update.

    Source: Rajbhandari et al., 2020, "ZeRO", section 3.1, for the shares; DeepSpeed's code for the copies and buckets.
    """
    zero, model, optimizer = zero or {}, config.model, config.optimizer
    P, D, w = count_parameters(model, vocab_size), model.hidden_size, 2 if bf16 else 4
    slots = (1 if optimizer.momentum else 0) if optimizer.name == "sgd" else 2
    own = 4.0 * P / gpus if stage else 4.0 * P
    gathered = stage == 3 and gpus > 1 and stay_gathered(zero, P)
    always = {
        "weights": w * P / (gpus if stage == 3 else 1),
        "gathered weights": float(gathered * w * P),
        "master weights": own if stage else 0.0,
        "moments": slots * own,
    }
    gradients = w * P / (gpus if stage >= 2 else 1)
    earlier = gradients if micro_batches > 1 or stage == 3 else 0.0
    bucket = (
        float(
            w
            * int(zero.get("reduce_bucket_size", BUCKET))
            * (2 if stage < 3 and zero.get("overlap_comm") else 1)
        )
        if stage
        else 0.0
    )
    in_forward = bucket if stage == 3 or (stage == 1 and micro_batches > 1) else 0.0
    flat = float(w * min(P, BUCKET)) if stage == 0 and gpus > 1 else 0.0
    kept = activation_bytes(model, vocab_size, pack, bf16, kernels)
    moments = [
        (
            earlier,
            kept,
            _loss_workspace(model, vocab_size, pack, w, kernels),
            in_forward if kernels == "cpu" else bucket,
        ),
        (
            earlier or float(w * (_layer_parameters(model) + 2 * D * D)),
            kept,
            4.0 * w * D * pack.tokens,
            bucket,
        ),
        (gradients, 5.0 * D * pack.tokens, 2.0 * w * vocab_size * D, bucket),
        (
            gradients,
            0.0,
            _update_workspace(optimizer.name, P, gpus, stage, w),
            bucket if stage == 3 else flat,
        ),
    ]
    fullest = dict(
        zip(
            ("gradients", "activations", "temporaries", "buckets"),
            max(moments, key=sum),
            strict=True,
        )
    )
    return always | fullest | {"context": 0.0 if kernels == "cpu" else CONTEXT}


def _update_workspace(optimizer: str, P: int, gpus: int, stage: int, w: int) -> float:
    """LAMB makes the update, and what it is divided by, for all parameters at once; stages 1 to 3 copy the gradients, flat and in fp32."""
    if stage == 0:
        return 8.0 * P if optimizer == "lamb" else 0.0
    return (w + 4.0 * (w == 2)) * P / gpus


def stay_gathered(zero: Mapping[str, Any], P: int) -> bool:
    """Whether stage 3 keeps all P weights from the forward to the backward pass, which at BERT's sizes is what DeepSpeed's defaults do."""
    return all(
        int(zero.get(key, KEPT)) >= P
        for key in ("stage3_max_live_parameters", "stage3_max_reuse_distance")
    )


def activation_bytes(
    model: ModelConfig, vocab_size: int, pack: Pack, bf16: bool, kernels: str
) -> float:
    """What the forward pass keeps for the backward pass, weights and the batch itself left out.

    For each token of a layer, in values of w bytes; the last layer keeps it for its R rows only, but for the keys and values of all T:

    | kept | "triton" | "cpu" |
    |---|---|---|
    | x, into qkv; also the residual | D | D |
    | q, k, v | 3 D | 3 D, fp32, padded to groups of similar length |
    | attention | 8 H bytes, statistics (none where 128 tokens of 16 bits are one tile) | weights, fp32, and the same after dropout, H n each |
    | its result, into the output matrix | D | D |
    | into and out of the first LayerNorm | 2 D, and 8 bytes | 2 D, 8 bytes, mask of D bytes |
    | into and out of the GELU | 2 F | 2 F |
    | into the second LayerNorm | D, and 8 bytes | D, 8 bytes, mask of D bytes |

    The rows are gathered for the last layer: R D for the queries, and with "triton" R D as the residual. The embedding keeps its sum and a
    mask with "cpu", 5 D bytes; statistics alone with "triton". The MLM head keeps 4 M D; with "cpu" the fourth of these is a gradient, and
    the gradients of the words and their biases, V (D + 1), are there, too. The NSP head: 2 B D.
    """
    D, F, H, L = (
        model.hidden_size,
        model.intermediate_size,
        model.num_attention_heads,
        model.num_hidden_layers,
    )
    T, R, w = pack.tokens, pack.rows, 2 if bf16 else 4
    head = w * D * (4 * pack.masked + 2 * len(pack.lengths))
    if kernels != "cpu":
        tile = bf16 and max(pack.lengths) <= 128
        each = w * (5 * D + 2 * F) + 16 + (0 if tile else 8 * H)  # without x, k and v
        tables = (
            24 if model.hidden_dropout_prob + model.attention_probs_dropout_prob > 0 else 16
        )  # bytes a row: dropout needs a key
        full, last = T * (each + 3 * w * D), R * (each + 2 * w * D + tables) + 3 * T * w * D
        return (L - 1) * full + last + tables * T + head
    hidden, attention = model.hidden_dropout_prob > 0, model.attention_probs_dropout_prob > 0
    score = 4 * H * (1 + attention)
    each = w * (4 * D + 2 * F) + 2 * D * hidden + 16  # without x, q, k and v
    full = last = 0.0
    for longest, sequences in _groups(pack.lengths):
        rows = 1 + pack.masked * longest / max(T, 1)
        full += sequences * longest * (12 * D + score * longest)
        last += sequences * (longest * 8 * D + rows * 4 * D + rows * score * longest)
    full += T * (each + w * D)
    last += R * (each + w * D) + T * w * D
    return (L - 1) * full + last + T * (D * (4 + hidden) + 8) + head + w * vocab_size * (D + 1)


def _groups(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Longest and count of the groups that attention/cpu.py pads to."""
    groups: list[tuple[int, int]] = []
    for n in sorted(lengths, reverse=True):
        longest, count = groups[-1] if groups else (0, 0)
        if n >= CPU_SHRINK * longest > 0:
            groups[-1] = (longest, count + 1)
        else:
            groups.append((n, 1))
    return groups


def _loss_workspace(model: ModelConfig, vocab_size: int, pack: Pack, w: int, kernels: str) -> float:
    """Of the MLM loss.

    "cpu": a slab of logits and the one before it, in bf16 with a copy in fp32, as the gradient of the words, which is then added up in fp32.
    "triton": a slab of dlogits, fp32 sums for rows, words and biases, and the gradients of words and rows.
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
