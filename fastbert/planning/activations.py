"""What the forward pass of a model keeps for the backward pass. Pure Python: numbers in, bytes out.

Each formula follows what the operations of fastbert_kernels save. Letters: T tokens of a
micro-batch, B sequences, M masked, R rows of the last layer, L layers, D hidden, F feed-forward, V
vocabulary, H heads, K head size; w bytes of a value.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from fastbert.config import BertConfig, ModelConfig, ModernBertConfig
from fastbert_kernels.attention.groups_cpu import BIN, ROUND, arrange

CPU_BLOCK = 64  # queries of a block of attention/windowed_cpu.py, at least


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


def activation_bytes(
    model: ModelConfig, vocab_size: int, pack: MicroBatchSize, bf16: bool, kernels: str
) -> float:
    """Return the bytes that the forward pass keeps; weights and the batch are not counted."""
    if isinstance(model, ModernBertConfig):
        return _of_modernbert(model, vocab_size, pack, bf16, kernels)
    return _of_bert(model, vocab_size, pack, bf16, kernels)


class Recomputed(NamedTuple):
    """What is kept where the backward pass computes all layers but the last again, in bytes."""

    kept: float  # at the end of the forward pass: the inputs of layers, and all of the last one
    layer: float  # what one layer adds while the backward pass goes through it


def recomputed_bytes(
    model: ModelConfig, vocab_size: int, pack: MicroBatchSize, bf16: bool, kernels: str
) -> Recomputed:
    """Return the bytes with `runtime.recompute`.

    A layer's input is x, [T, D], and for ModernBERT the residual stream too, but in its layer 0.
    """
    modern = isinstance(model, ModernBertConfig)
    if modern:  # a layer that attends to whole sequences keeps most
        model = replace(model, global_attn_every_n_layers=1)

    def of_layers(count: int) -> float:
        fewer = replace(model, num_hidden_layers=count)
        return activation_bytes(fewer, vocab_size, pack, bf16, kernels)

    inputs = model.num_hidden_layers - 1 if not modern else 2 * model.num_hidden_layers - 3
    width = (2 if bf16 else 4) * model.hidden_size
    last = of_layers(1) + pack.tokens * (width + 8) * modern  # a single layer has no first norm
    return Recomputed(
        kept=max(inputs, 0) * width * pack.tokens + last, layer=of_layers(3) - of_layers(2)
    )


def joined_gradients(model: ModelConfig) -> float:
    """Return the values for each token that the backward pass of an attention holds at once.

    BERT's last layer joins dk and dv, and ModernBERT's rotation dq, dk and dv.
    """
    return (4.0 if isinstance(model, BertConfig) else 6.0) * model.hidden_size


def _of_bert(
    model: BertConfig, vocab_size: int, pack: MicroBatchSize, bf16: bool, kernels: str
) -> float:
    """Return the bytes that the forward pass keeps for the backward pass.

    The table is for each token of a layer, in values
    of w bytes. The last layer keeps them for its R rows only, but keys and values for all T.

    | kept | "triton" | "cpu" |
    |---|---|---|
    | x, the input of qkv and the residual | D | D |
    | q, k, v | 3 D | 3 D, padded to groups of similar length |
    | attention | 8 H bytes of statistics | weights, fp32, and dropout's mask: H n, and H n bytes |
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
    score = H * (4 + attention)
    each = w * (4 * D + 2 * F) + 2 * D * hidden + 16  # without x, q, k and v
    full = last = 0.0
    for longest, bins, sequences in _groups(pack.lengths, H, bf16, attention):
        rows = pack.masked * longest / max(T, 1) + sequences
        if sequences > 1:
            rows = -(-rows // ROUND) * ROUND
        full += bins * longest * (3 * w * D + score * longest)
        last += bins * (longest * 2 * w * D + rows * w * D + rows * score * longest)
    full += T * (each + w * D)
    last += R * (each + w * D) + T * w * D
    return (L - 1) * full + last + T * (D * (4 + hidden) + 8) + head + w * vocab_size * (D + 1)


def _of_modernbert(
    model: ModernBertConfig, vocab_size: int, pack: MicroBatchSize, bf16: bool, kernels: str
) -> float:
    """Return the bytes of ModernBERT.

    The table is for each token of a layer, in values of w bytes.

    | kept | "triton" | "cpu" |
    |---|---|---|
    | the sum and the norm before the attention | 2 D, 8 bytes | 2 D, 8 bytes |
    | q, k and the projection that v is a part of | 5 D | q, k, v: 3 D, padded |
    | attention | 8 H bytes of statistics | weights, fp32, and dropout's mask: H n, and H n bytes |
    | output of the attention | D | D |
    | the sum and the norm before the feed-forward network | 2 D, 8 bytes | 2 D, 8 bytes, mask |
    | input and output of GeGLU | 3 F | 3 F |

    The weights of a local layer are those of blocks of queries, with the keys that a block sees.
    Its q, k and v are not padded. The first layer has no norm before its attention. The last one
    keeps its queries, and all that follows them, for the M masked tokens only; the final norm keeps
    2 M D and the MLM head 4 M D. Dropout within the feed-forward network keeps its factors, in
    fp32. The tables of angles are 8 K bytes for each position.
    """
    D, F, H = model.hidden_size, model.intermediate_size, model.num_attention_heads
    T, M, w = pack.tokens, pack.masked, 2 if bf16 else 4
    dropped = model.attention_dropout > 0
    mlp = 4 * F if model.mlp_dropout > 0 else 0
    seeds = 8 * (dropped or mlp > 0 or model.embedding_dropout > 0)
    outer = w * (2 * D + 3 * F) + 8 + mlp  # the feed-forward network with its norm
    total = 8.0 * model.head_size * model.max_position_embeddings - T * (w * D + 8)
    for layer in range(model.num_hidden_layers):
        last = layer == model.num_hidden_layers - 1
        total += T * (w * 2 * D + 8) + (M if last else T) * (w * D + outer)
        if kernels == "cpu":
            total += (M if last else T) * D * dropped
            window = model.window_of(layer)
            if window is None or window >= max(pack.lengths, default=0) - 1:
                for longest, count, _ in _groups(pack.lengths, H, bf16, dropped):
                    queries = M / T * longest if last else longest
                    total += count * (queries + 2 * longest) * w * D
                    total += count * H * (4 + dropped) * queries * longest
            else:
                queries, more = _blocks(pack.lengths, window, dropped)
                total += (3 * queries + 2 * more) * w * D
                total += H * (4 + dropped) * queries * (max(more // 2, CPU_BLOCK) + more)
        else:
            tile = bf16 and max(pack.lengths) <= 128
            total += T * w * 4 * D + (M if last else T) * (w * D + (0 if tile else 8 * H))
    head = w * D * 6 * M + M * (16 + seeds)
    if kernels != "cpu":
        return total + T * (8 + seeds) + head
    return (
        total + T * (D * (4 + (model.embedding_dropout > 0)) + 8) + head + w * vocab_size * (D + 1)
    )


def _blocks(lengths: Sequence[int], window: int, dropped: bool) -> tuple[int, int]:
    """Return the queries of attention/windowed_cpu.py, and the keys of a block beyond its own."""
    reach = -(-window // 16) * 16
    size = max(reach, CPU_BLOCK)
    rows = sum(-(-n // 16) * 16 for n in lengths) if dropped else sum(lengths)
    return -(-rows // size) * size, 2 * reach


def _groups(
    lengths: Sequence[int], heads: int, bf16: bool, dropped: bool
) -> list[tuple[int, int, int]]:
    """Return the longest bin of each group of attention/cpu.py, its bins, and sequences of one."""
    found = arrange(sorted(lengths, reverse=True), heads, BIN if bf16 else 0, dropped)
    return [(longest, len(bins), max(map(len, bins))) for longest, bins in found]
