"""BERT: embeddings, L post-norm blocks over packed sequences, and the two heads that pre-training needs.

With fused_layer.py the only caller of the kernels. Axes: B sequences, T packed tokens, M masked tokens, R rows that a loss reads (M + B),
H heads, K head size, D hidden, F feed-forward, V vocabulary.

Each module owns the parameters that its own forward reads, since ZeRO stage 3 gathers weights module by module; the one exception,
the tied vocabulary matrix, is an argument of the head.

Source: Devlin et al., 2019; the same function as transformers' BertForPreTraining, so that weights go both ways.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastbert.config import ModelConfig
from fastbert.data.batches import PackedBatch
from fastbert.errors import InputError
from fastbert.models.fused_layer import Call, Parameters, fused_layer
from fastbert.models.initial_weights import initialise
from fastbert_kernels import (
    attention_worklist,
    bias_gelu,
    dropout_add_layer_norm,
    embedding_layer_norm,
    layer_norm,
    linear,
    masked_cross_entropy,
    row_keys,
    varlen_attention,
)
from fastbert_kernels._worklist import ITEM


def resolve_kernels(name: str, device: str) -> str:
    """Which implementation "auto" means on "cpu" or "cuda"; raises InputError where the asked one cannot run."""
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
            'runtime.kernels = "triton" needs a GPU; use auto or cpu, or set TRITON_INTERPRET=1 to run the kernels in Triton\'s interpreter (slow)'
        )
    return name


class Pack(NamedTuple):
    """What every layer needs to know of the batch besides the hidden states."""

    cu_seqlens: Tensor  # int32 [B + 1]
    max_seqlen: int  # tokens
    sequence_keys: Tensor | None  # int64 [B]; None where nothing is dropped
    token_keys: Tensor | None  # int64 [T]
    worklist: (
        Tensor | None
    )  # int32 [items, 2]; what the programs of the Triton attention do, the same in every layer
    checked: bool = False  # whether a layer has been called with it


class Dropout(NamedTuple):
    """Probabilities in force: those of the config in training, zero otherwise."""

    attention: float
    hidden: float


def matrix(rows: int, columns: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(rows, columns))


def vector(size: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(size))


def select(x: Tensor | None, rows: Tensor | None) -> Any:
    """The named rows of x, or all of it."""
    return x if x is None or rows is None else x[rows]


def fused(x: Tensor, impl: str) -> bool:
    """Whether a layer runs as one function (fused_layer.py): on the Triton kernels, but not under autocast, nor where torch.compile looks in."""
    return (
        impl == "triton"
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled(x.device.type)
    )


class Embeddings(nn.Module):
    def __init__(self, config: ModelConfig, vocab_size: int):
        super().__init__()
        self.eps = config.layer_norm_eps
        self.word = matrix(vocab_size, config.hidden_size)
        self.position = matrix(config.max_position_embeddings, config.hidden_size)
        self.token_type = matrix(2, config.hidden_size)
        self.norm_weight, self.norm_bias = vector(config.hidden_size), vector(config.hidden_size)

    def forward(self, batch: PackedBatch, pack: Pack, dropout: Dropout, impl: str) -> Tensor:
        return embedding_layer_norm(
            batch.input_ids,
            batch.position_ids,
            batch.token_type_ids,
            self.word,
            self.position,
            self.token_type,
            self.norm_weight,
            self.norm_bias,
            eps=self.eps,
            dropout_p=dropout.hidden,
            keys=pack.token_keys,
            impl=impl,
        )


class SublayerOutput(nn.Module):
    """The end of a sublayer: its last matrix, then LN(residual + dropout(...))."""

    def __init__(self, config: ModelConfig, inner_size: int):
        super().__init__()
        self.eps = config.layer_norm_eps
        self.weight, self.bias = matrix(config.hidden_size, inner_size), vector(config.hidden_size)
        self.norm_weight, self.norm_bias = vector(config.hidden_size), vector(config.hidden_size)

    def forward(
        self,
        inner: Tensor,
        residual: Tensor,
        keys: Tensor | None,
        site: int,
        dropout: Dropout,
        impl: str,
    ) -> Tensor:
        return dropout_add_layer_norm(
            linear(inner, self.weight, impl=impl),
            self.bias,
            residual,
            self.norm_weight,
            self.norm_bias,
            eps=self.eps,
            dropout_p=dropout.hidden,
            keys=keys,
            site=site,
            impl=impl,
        )


class Attention(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.heads, self.head_size = config.num_attention_heads, config.head_size
        self.qkv_weight = matrix(3 * config.hidden_size, config.hidden_size)  # q over k over v
        self.qkv_bias = vector(3 * config.hidden_size)
        self.output = SublayerOutput(config, config.hidden_size)

    def forward(
        self, x: Tensor, pack: Pack, rows: Tensor | None, site: int, dropout: Dropout, impl: str
    ) -> Tensor:
        """Every token attends; with `rows` (int64 [R], ascending) only their outputs are computed, [R, D]."""
        q, k, v = self.project(x, rows, impl)
        context = varlen_attention(
            q,
            k,
            v,
            pack.cu_seqlens,
            pack.max_seqlen,
            dropout_p=dropout.attention,
            keys=pack.sequence_keys,
            site=site,
            queries=rows,
            worklist=pack.worklist,
            impl=impl,
        )
        return self.output(
            context.flatten(1),
            select(x, rows),
            select(pack.token_keys, rows),
            site + 1,
            dropout,
            impl,
        )

    def project(self, x: Tensor, rows: Tensor | None, impl: str) -> tuple[Tensor, Tensor, Tensor]:
        """q of the wanted rows, k and v of all: [R or T, H, K]."""
        heads = (self.heads, self.head_size)
        if rows is None:
            return (
                linear(x, self.qkv_weight, self.qkv_bias, impl=impl).view(-1, 3, *heads).unbind(1)
            )  # type: ignore[return-value]
        size = x.shape[1]
        q = linear(x[rows], self.qkv_weight[:size], self.qkv_bias[:size], impl=impl).view(
            -1, *heads
        )
        k, v = (
            linear(x, self.qkv_weight[size:], self.qkv_bias[size:], impl=impl)
            .view(-1, 2, *heads)
            .unbind(1)
        )
        return q, k, v


class FeedForward(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.weight, self.bias = (
            matrix(config.intermediate_size, config.hidden_size),
            vector(config.intermediate_size),
        )
        self.output = SublayerOutput(config, config.intermediate_size)

    def forward(
        self, x: Tensor, keys: Tensor | None, site: int, dropout: Dropout, impl: str
    ) -> Tensor:
        inner = bias_gelu(linear(x, self.weight, impl=impl), self.bias, impl=impl)
        return self.output(inner, x, keys, site, dropout, impl)


class Layer(nn.Module):
    # Operations of a layer that drop: the attention weights, and the end of each sublayer.
    SITES = 3

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)
        self.heads, self.eps = config.num_attention_heads, config.layer_norm_eps

    def forward(
        self, x: Tensor, pack: Pack, rows: Tensor | None, site: int, dropout: Dropout, impl: str
    ) -> Tensor:
        if fused(x, impl):
            call = Call(
                self.heads,
                pack.cu_seqlens,
                pack.max_seqlen,
                pack.worklist,
                pack.sequence_keys,
                select(pack.token_keys, rows),
                rows,
                dropout.attention,
                dropout.hidden,
                site,
                self.eps,
                pack.checked and rows is None,
            )
            return fused_layer(x, self.fused_parameters(), call)
        x = self.attention(x, pack, rows, site, dropout, impl)
        return self.feed_forward(x, select(pack.token_keys, rows), site + 2, dropout, impl)

    def fused_parameters(self) -> Parameters:
        """From the modules' own tables, in the order in which their constructors filled them: an
        attribute of a module costs 1 us."""
        attention, feed_forward = self.attention, self.feed_forward
        modules = (attention, attention.output, feed_forward, feed_forward.output)
        return Parameters(
            *(parameter for module in modules for parameter in module._parameters.values())  # type: ignore[arg-type]
        )


class MaskedTokenHead(nn.Module):
    """Dense, GELU, LayerNorm, and the vocabulary matrix: the table of word embeddings, which comes as an argument, or `decoder`."""

    def __init__(self, config: ModelConfig, vocab_size: int, tied: bool):
        super().__init__()
        self.eps = config.layer_norm_eps
        self.weight, self.bias = (
            matrix(config.hidden_size, config.hidden_size),
            vector(config.hidden_size),
        )
        self.norm_weight, self.norm_bias = vector(config.hidden_size), vector(config.hidden_size)
        self.vocabulary_bias = vector(vocab_size)
        self.decoder = None if tied else matrix(vocab_size, config.hidden_size)

    def forward(
        self, hidden: Tensor, words: Tensor, labels: Tensor, total: int, impl: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states of the masked tokens [M, D] and their labels [M] to loss (divided by `total`), losses and hits."""
        table = words if self.decoder is None else self.decoder
        return masked_cross_entropy(
            self.transform(hidden, impl),
            table,
            self.vocabulary_bias,
            None,
            labels,
            total=total,
            impl=impl,
        )

    def transform(self, hidden: Tensor, impl: str) -> Tensor:
        inner = bias_gelu(linear(hidden, self.weight, impl=impl), self.bias, impl=impl)
        return layer_norm(inner, self.norm_weight, self.norm_bias, eps=self.eps, impl=impl)


class NextSentenceHead(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.pooler = nn.Linear(config.hidden_size, config.hidden_size)
        self.classifier = nn.Linear(config.hidden_size, 2)

    def forward(self, hidden: Tensor) -> Tensor:
        """[CLS] states [B, D] to logits [B, 2]: IsNext, NotNext."""
        return self.classifier(torch.tanh(self.pooler(hidden)))


@dataclass(frozen=True)
class Losses:
    """Loss = MLM + NSP: the mean over the masked tokens of the global batch plus the mean over its pairs, from one forward pass.

    These are what one packed batch adds to the step. Summed over the step's batches, `mlm` and `nsp` are the means of the whole.
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
    """Name what `BertForPreTraining.forward` returns."""
    return Losses(*outputs)


class BertForPreTraining(nn.Module):
    """The encoder with the MLM and NSP heads.

    Args:
        config: sizes and dropout probabilities.
        vocab_size: V, the tokenizer's.
        kernels: "auto", "triton", "cpu" or "reference".
        device: "cpu" or "cuda", where the model will run; decides what "auto" means.
        tied: the vocabulary matrix is the table of word embeddings, as in BERT; only models that others made may differ.
    """

    def __init__(
        self,
        config: ModelConfig,
        vocab_size: int,
        kernels: str = "auto",
        device: str = "cpu",
        tied: bool = True,
    ):
        super().__init__()
        self.config, self.vocab_size, self.impl = (
            config,
            vocab_size,
            resolve_kernels(kernels, device),
        )
        self.embeddings = Embeddings(config, vocab_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.mlm_head = MaskedTokenHead(config, vocab_size, tied)
        self.nsp_head = NextSentenceHead(config)
        initialise(dict(self.named_parameters()), config)

    def _pack(self, batch: PackedBatch) -> tuple[Pack, Dropout]:
        dropout = (
            Dropout(self.config.attention_probs_dropout_prob, self.config.hidden_dropout_prob)
            if self.training
            else Dropout(0.0, 0.0)
        )
        # Shorter sequences need no list, but for fp32, where each layer then makes its own.
        long = self.impl == "triton" and batch.max_seqlen > ITEM
        worklist = attention_worklist(batch.cu_seqlens, len(batch.input_ids)) if long else None
        if not any(dropout):
            return Pack(batch.cu_seqlens, batch.max_seqlen, None, None, worklist), dropout
        keys = row_keys(batch.dropout_keys, batch.cu_seqlens, len(batch.input_ids))
        return Pack(batch.cu_seqlens, batch.max_seqlen, batch.dropout_keys, keys, worklist), dropout

    def forward(self, batch: PackedBatch) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Both losses in one pass, of the rows that they read (exact, not approximate).

        Returns a plain tuple (ZeRO stage 3 rebuilds containers), which `losses` names:
            mlm, nsp: scalars with gradient, this batch's share of the means over the whole global batch.
            token_losses fp32 [M], token_correct bool [M], pair_losses fp32 [B], pair_correct bool [B]: detached.
        """
        masked, first = self.loss_rows(batch)
        mlm, token_losses, token_correct = self.mlm_head(
            masked, self.embeddings.word, batch.labels, max(batch.masked_total, 1), self.impl
        )
        pair_logits = self.nsp_head(first).float()
        pair_losses = nn.functional.cross_entropy(
            pair_logits, batch.next_sentence_labels, reduction="none", ignore_index=-100
        )
        pair_correct = pair_logits.argmax(-1) == batch.next_sentence_labels
        return (
            mlm,
            pair_losses.sum() / max(batch.pairs_total, 1),
            token_losses,
            token_correct,
            pair_losses.detach(),
            pair_correct,
        )

    def loss_rows(self, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        """What the last layer gives for the masked tokens [M, D] and for the first tokens [B, D]; its other rows are not computed."""
        pack, dropout = self._pack(batch)
        first_tokens = batch.cu_seqlens[:-1].long()
        rows = torch.cat((batch.masked_positions, first_tokens)).sort().values
        x = self.embeddings(batch, pack, dropout, self.impl)
        for index, layer in enumerate(self.layers):
            wanted = rows if index == len(self.layers) - 1 else None
            x = layer(x, pack, wanted, 1 + Layer.SITES * index, dropout, self.impl)
            if index == 0:
                pack = pack._replace(checked=True)

        masked, first = (
            x.index_select(0, torch.searchsorted(rows, wanted))
            for wanted in (batch.masked_positions, first_tokens)
        )
        return masked, first

    def hidden_states(self, batch: PackedBatch) -> list[Tensor]:
        """L + 1 tensors [T, D]: what the embeddings give, then what each layer gives."""
        pack, dropout = self._pack(batch)
        states = [self.embeddings(batch, pack, dropout, self.impl)]
        for index, layer in enumerate(self.layers):
            states.append(
                layer(states[-1], pack, None, 1 + Layer.SITES * index, dropout, self.impl)
            )
        return states

    def token_logits(self, hidden: Tensor) -> Tensor:
        """Vocabulary logits [N, V] of last-layer rows [N, D]."""
        table = self.embeddings.word if self.mlm_head.decoder is None else self.mlm_head.decoder
        return linear(
            self.mlm_head.transform(hidden, self.impl),
            table,
            self.mlm_head.vocabulary_bias,
            impl=self.impl,
        )

    def pair_logits(self, hidden: Tensor) -> Tensor:
        """IsNext and NotNext logits [B, 2] of the last layer's [CLS] rows [B, D]."""
        return self.nsp_head(hidden)
