"""What both architectures share: helpers of their modules, the MLM head, and the losses.

Axes are those of `bert.py` and `modernbert.py`: B sequences, T packed tokens, M masked tokens, R
rows that a loss reads, D hidden, F feed-forward, V vocabulary.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastbert.config import ModelConfig
from fastbert.data.packing import PackedBatch
from fastbert.errors import InputError
from fastbert_kernels import (
    attention_tile_schedule,
    bias_gelu,
    layer_norm,
    linear,
    masked_cross_entropy,
    row_seeds,
)
from fastbert_kernels._tile_schedule import ITEM
from fastbert_kernels.attention.op import HEAD_SIZES


def resolve_kernels(name: str, device: str) -> str:
    """Return the kernel implementation to use: "triton", "cpu" or "reference".

    Args:
        name: "auto" or one of the three.
        device: "cpu" or "cuda". "auto" means "cpu" on the one and "triton" on the other.

    Raises:
        InputError: the named implementation cannot run on this device.
    """
    if name == "cpu" and device != "cpu":
        raise InputError(
            f'runtime.kernels = "cpu" cannot run on {device}; use auto, triton or reference'
        )
    if name == "auto":
        name = "cpu" if device == "cpu" else "triton"
    if name == "triton" and importlib.util.find_spec("triton") is None:
        raise InputError(
            'runtime.kernels = "triton" needs Triton: pip install triton, or use reference'
        )
    if name == "triton" and device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise InputError(
            'runtime.kernels = "triton" needs a GPU; use auto or cpu, or set TRITON_INTERPRET=1 '
            "to run the kernels in Triton's interpreter (slow)"
        )
    return name


def check_head_size(config: ModelConfig, impl: str) -> None:
    """Check that the kernels can compute the attention of this model.

    Raises:
        InputError: they cannot.
    """
    if impl == "triton" and config.head_size not in HEAD_SIZES:
        raise InputError(
            f"model.hidden_size / model.num_attention_heads = {config.head_size}; "
            f'runtime.kernels = "triton" takes {", ".join(map(str, HEAD_SIZES))}; choose other '
            'sizes, or set runtime.kernels = "reference"'
        )


class MicroBatchTables(NamedTuple):
    """The tables of a micro-batch that every layer reads besides the hidden states."""

    cu_seqlens: Tensor  # int32 [B + 1]
    max_seqlen: int  # tokens
    sequence_seeds: Tensor | None  # int64 [B]; None where nothing is dropped
    token_seeds: Tensor | None  # int64 [T]; None where nothing is dropped
    # int32 [items, 2]: the tiles that each program of the Triton attention processes. They are the
    # same in every layer. None where the attention needs no list.
    tile_schedule: Tensor | None
    checked: bool = False  # whether a layer has already validated these tables


def tables_of(batch: PackedBatch, impl: str, dropout: bool) -> MicroBatchTables:
    """Return the tables of a micro-batch; those for dropout only where something is dropped."""
    # Sequences of up to ITEM tokens need no list, except in fp32: there each layer makes one.
    long = impl == "triton" and batch.max_seqlen > ITEM
    schedule = attention_tile_schedule(batch.cu_seqlens, len(batch.input_ids)) if long else None
    tables = MicroBatchTables(batch.cu_seqlens, batch.max_seqlen, None, None, schedule)
    if dropout:
        token_seeds = row_seeds(batch.dropout_seeds, batch.cu_seqlens, len(batch.input_ids))
        tables = tables._replace(sequence_seeds=batch.dropout_seeds, token_seeds=token_seeds)
    return tables


class Products(Protocol):
    """How matrix products are computed; each architecture's `Mode` says it."""

    @property
    def impl(self) -> str:
        """Of the kernels: "triton", "cpu" or "reference"."""
        ...

    @property
    def operands(self) -> torch.dtype | None:
        """Of large products, as in `fastbert_kernels.linear`."""
        ...


def matrix(rows: int, columns: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(rows, columns))


def vector(size: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(size))


def select(x: Tensor | None, rows: Tensor | None) -> Any:
    """Return the given rows of x, or x itself where `rows` or x is None."""
    return x if x is None or rows is None else x[rows]


def product(
    x: Tensor, weight: Tensor, bias: Tensor | None, mode: Products, keep_rounded: bool = False
) -> Tensor:
    """x W' + b: x [N, D], weight [F, D] and bias [F] to [N, F]; as in fastbert_kernels.linear."""
    return linear(
        x, weight, bias, operands=mode.operands, keep_rounded=keep_rounded, impl=mode.impl
    )


def recomputed(layer: nn.Module, *inputs: Any) -> Any:
    """Return layer(*inputs); only the inputs are kept, and the backward pass computes it again.

    Dropout is a function of seeds in the inputs, so the second pass gives the same to the last
    digit, without any state of a random generator.

    Source: Chen et al., 2016, "Training Deep Nets with Sublinear Memory Cost", section 3.
    """
    if not torch.is_grad_enabled():
        return layer(*inputs)
    return checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=False)


class MaskedTokenHead(nn.Module):
    """Dense layer, GELU, LayerNorm, then the product with the vocabulary matrix.

    The vocabulary matrix is the table of word embeddings, passed as an argument, or where the model
    is not tied this head's own `decoder`.

    Args:
        hidden_size, vocab_size: D and V.
        eps: of the LayerNorm.
        tied: whether the vocabulary matrix is the table of word embeddings.
        bias, norm_bias, vocabulary_bias: whether the dense layer, the LayerNorm and the product
            with the vocabulary matrix have one.
    """

    def __init__(
        self,
        hidden_size: int,
        vocab_size: int,
        eps: float,
        tied: bool,
        *,
        bias: bool = True,
        norm_bias: bool = True,
        vocabulary_bias: bool = True,
    ):
        super().__init__()
        self.eps = eps
        self.weight = matrix(hidden_size, hidden_size)
        self.bias = vector(hidden_size) if bias else None
        self.norm_weight = vector(hidden_size)
        self.norm_bias = vector(hidden_size) if norm_bias else None
        self.vocabulary_bias = vector(vocab_size) if vocabulary_bias else None
        self.decoder = None if tied else matrix(vocab_size, hidden_size)

    def forward(
        self, hidden: Tensor, word_embeddings: Tensor, labels: Tensor, total: int, mode: Products
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the loss, the loss of each token, and whether its prediction is correct.

        Args:
            hidden: [M, D], last hidden states of the masked tokens.
            word_embeddings: [V, D].
            labels: int64 [M], the original tokens.
            total: masked tokens of the global batch. The loss is the sum over M divided by it.

        Returns:
            loss (fp32 scalar, nats, with gradient), losses (fp32 [M], nats), correct (bool [M]).
        """
        table = word_embeddings if self.decoder is None else self.decoder
        return masked_cross_entropy(
            self.transform(hidden, mode),
            table,
            self.vocabulary_bias,
            None,
            labels,
            total=total,
            operands=mode.operands,
            impl=mode.impl,
        )

    def transform(self, hidden: Tensor, mode: Products) -> Tensor:
        inner = bias_gelu(product(hidden, self.weight, None, mode), self.bias, impl=mode.impl)
        return layer_norm(inner, self.norm_weight, self.norm_bias, eps=self.eps, impl=mode.impl)

    def logits(self, hidden: Tensor, word_embeddings: Tensor, mode: Products) -> Tensor:
        """Return vocabulary logits [N, V] for last hidden states [N, D]."""
        table = word_embeddings if self.decoder is None else self.decoder
        return product(self.transform(hidden, mode), table, self.vocabulary_bias, mode)


@dataclass(frozen=True)
class Losses:
    """Loss = MLM + NSP, from one forward pass.

    MLM is the mean over the masked tokens of the global batch, NSP the mean over its pairs. These
    values are the contribution of one packed batch: summed over the batches of a step, `mlm` and
    `nsp` are the means over the global batch.
    """

    mlm: Tensor  # scalar, fp32, nats, with gradient
    nsp: Tensor  # scalar, fp32, nats, with gradient; 0 where the objective has no pairs
    token_losses: Tensor  # fp32 [M], nats, detached
    token_correct: Tensor  # bool [M]
    pair_losses: Tensor  # fp32 [B], nats, detached; 0 where an example has no pair
    pair_correct: Tensor  # bool [B]

    @property
    def loss(self) -> Tensor:
        return self.mlm + self.nsp


def losses(outputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]) -> Losses:
    """Name the outputs of a model's `forward`."""
    return Losses(*outputs)
