"""BERT: embeddings, L post-norm Transformer layers over packed sequences, and two heads.

The heads are those of pre-training: masked tokens (MLM) and next sentences (NSP). Only this file
and fused_layer.py call the kernels. Axes: B sequences, T packed tokens, M masked tokens, R rows
that a loss reads (M + B), H heads, K head size, D hidden, F feed-forward, V vocabulary.

Each module owns the parameters that its own forward reads, because ZeRO stage 3 gathers weights
module by module. The one exception is the tied vocabulary matrix, which the MLM head receives as
an argument.

Source: Devlin et al., 2019. The model computes the same function as transformers'
BertForPreTraining, so weights can be converted in both directions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastbert.config import BertConfig
from fastbert.data.packing import PackedBatch
from fastbert.models.fused_layer import Call, Parameters, fused_layer
from fastbert.models.heads import (
    MaskedTokenHead,
    MicroBatchTables,
    check_head_size,
    matrix,
    product,
    recomputed,
    resolve_kernels,
    select,
    tables_of,
    vector,
)
from fastbert.models.initial_weights import initialise
from fastbert_kernels import (
    bias_gelu,
    dropout_add_layer_norm,
    embedding_layer_norm,
    varlen_attention,
)


class Mode(NamedTuple):
    """How a pass is computed."""

    attention_dropout: float  # probability: that of the config in training, 0 in evaluation
    hidden_dropout: float
    impl: str  # of the kernels: "triton", "cpu" or "reference"
    operands: torch.dtype | None  # of large matrix products, as in fastbert_kernels.linear


def fused(x: Tensor, mode: Mode) -> bool:
    """Whether a layer runs as one autograd function (fused_layer.py).

    It does so on the Triton kernels, except under autocast, which must cast between the
    operations, and under torch.compile, which must see them.
    """
    return (
        mode.impl == "triton"
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled(x.device.type)
    )


class Embeddings(nn.Module):
    """LN(word + position + token type), then dropout."""

    def __init__(self, config: BertConfig, vocab_size: int):
        super().__init__()
        self.eps = config.layer_norm_eps
        self.word = matrix(vocab_size, config.hidden_size)
        self.position = matrix(config.max_position_embeddings, config.hidden_size)
        self.token_type = matrix(2, config.hidden_size)
        self.norm_weight, self.norm_bias = vector(config.hidden_size), vector(config.hidden_size)

    def forward(self, batch: PackedBatch, tables: MicroBatchTables, mode: Mode) -> Tensor:
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
            dropout_p=mode.hidden_dropout,
            dropout_seeds=tables.token_seeds,
            impl=mode.impl,
        )


class SublayerOutput(nn.Module):
    """The end of both sublayers: LN(residual + dropout(inner W' + b))."""

    def __init__(self, config: BertConfig, inner_size: int):
        super().__init__()
        self.eps = config.layer_norm_eps
        self.weight, self.bias = matrix(config.hidden_size, inner_size), vector(config.hidden_size)
        self.norm_weight, self.norm_bias = vector(config.hidden_size), vector(config.hidden_size)

    def forward(
        self,
        inner: Tensor,
        residual: Tensor,
        token_seeds: Tensor | None,
        stream: int,
        mode: Mode,
    ) -> Tensor:
        return dropout_add_layer_norm(
            product(inner, self.weight, None, mode),
            self.bias,
            residual,
            self.norm_weight,
            self.norm_bias,
            eps=self.eps,
            dropout_p=mode.hidden_dropout,
            dropout_seeds=token_seeds,
            dropout_stream=stream,
            impl=mode.impl,
        )


class Attention(nn.Module):
    """Multi-head self-attention within each sequence, and the end of its sublayer."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.heads, self.head_size = config.num_attention_heads, config.head_size
        # One matrix for all three: the rows of q, then of k, then of v.
        self.qkv_weight = matrix(3 * config.hidden_size, config.hidden_size)
        self.qkv_bias = vector(3 * config.hidden_size)
        self.output = SublayerOutput(config, config.hidden_size)

    def forward(
        self,
        x: Tensor,
        tables: MicroBatchTables,
        rows: Tensor | None,
        stream: int,
        mode: Mode,
    ) -> Tensor:
        """Return the output [T, D], or [R, D] where `rows` (int64 [R], ascending) selects tokens.

        Keys and values are those of every token; only the selected tokens are queries.
        """
        q, k, v = self.project(x, rows, mode)
        context = varlen_attention(
            q,
            k,
            v,
            tables.cu_seqlens,
            tables.max_seqlen,
            dropout_p=mode.attention_dropout,
            dropout_seeds=tables.sequence_seeds,
            dropout_stream=stream,
            query_indices=rows,
            tile_schedule=tables.tile_schedule,
            impl=mode.impl,
        )
        return self.output(
            context.flatten(1),
            select(x, rows),
            select(tables.token_seeds, rows),
            stream + 1,
            mode,
        )

    def project(self, x: Tensor, rows: Tensor | None, mode: Mode) -> tuple[Tensor, Tensor, Tensor]:
        """Return q of the selected tokens [R, H, K], and k and v of all tokens [T, H, K]."""
        heads = (self.heads, self.head_size)
        if rows is None:
            qkv = product(x, self.qkv_weight, self.qkv_bias, mode, keep_rounded=True)
            return qkv.view(-1, 3, *heads).unbind(1)  # type: ignore[return-value]
        size = x.shape[1]
        q = product(x[rows], self.qkv_weight[:size], self.qkv_bias[:size], mode, keep_rounded=True)
        kv = product(x, self.qkv_weight[size:], self.qkv_bias[size:], mode, keep_rounded=True)
        k, v = kv.view(-1, 2, *heads).unbind(1)
        return q.to(kv.dtype).view(-1, *heads), k, v  # with few rows, only k and v are rounded


class FeedForward(nn.Module):
    """GELU(x W' + b), and the end of its sublayer."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.weight = matrix(config.intermediate_size, config.hidden_size)
        self.bias = vector(config.intermediate_size)
        self.output = SublayerOutput(config, config.intermediate_size)

    def forward(self, x: Tensor, token_seeds: Tensor | None, stream: int, mode: Mode) -> Tensor:
        if mode.operands is None:
            inner = bias_gelu(product(x, self.weight, None, mode), self.bias, impl=mode.impl)
        else:  # a rounded product adds the bias before it rounds
            inner = product(x, self.weight, self.bias, mode, keep_rounded=True)
            inner = bias_gelu(inner, impl=mode.impl)
        return self.output(inner, x, token_seeds, stream, mode)


class Layer(nn.Module):
    """One post-norm Transformer layer: self-attention, then the feed-forward network."""

    # Dropout is applied at three places, each with its own random stream: to the attention
    # weights, and at the end of each of the two sublayers.
    STREAMS = 3

    def __init__(self, config: BertConfig):
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)
        self.heads, self.eps = config.num_attention_heads, config.layer_norm_eps

    def forward(
        self,
        x: Tensor,
        tables: MicroBatchTables,
        rows: Tensor | None,
        stream: int,
        mode: Mode,
    ) -> Tensor:
        """Return the output [T, D], or [R, D] where `rows` (int64 [R], ascending) picks tokens."""
        if fused(x, mode):
            call = Call(
                self.heads,
                tables.cu_seqlens,
                tables.max_seqlen,
                tables.tile_schedule,
                tables.sequence_seeds,
                select(tables.token_seeds, rows),
                rows,
                mode.attention_dropout,
                mode.hidden_dropout,
                stream,
                self.eps,
                tables.checked and rows is None,
            )
            return fused_layer(x, self.fused_parameters(), call)
        x = self.attention(x, tables, rows, stream, mode)
        return self.feed_forward(x, select(tables.token_seeds, rows), stream + 2, mode)

    def fused_parameters(self) -> Parameters:
        """Collect the parameters for `fused_layer`.

        They are read from the modules' own dictionaries, because looking up an attribute of a
        module costs 1 us. The constructors fill these in the order of `Parameters`.
        """
        attention, feed_forward = self.attention, self.feed_forward
        modules = (attention, attention.output, feed_forward, feed_forward.output)
        parameters = (p for module in modules for p in module._parameters.values())
        return Parameters(*parameters)  # type: ignore[arg-type]


class NextSentenceHead(nn.Module):
    """The pooler (dense, tanh) and a binary classifier."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.pooler = nn.Linear(config.hidden_size, config.hidden_size)
        self.classifier = nn.Linear(config.hidden_size, 2)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map the hidden states of [CLS], [B, D], to logits [B, 2] of IsNext and NotNext."""
        return self.classifier(torch.tanh(self.pooler(hidden)))


class BertForPreTraining(nn.Module):
    """The encoder with the MLM and NSP heads.

    Args:
        config: sizes and dropout probabilities.
        vocab_size: V, the size of the tokenizer's vocabulary.
        kernels: "auto", "triton", "cpu" or "reference".
        device: "cpu" or "cuda", where the model will run; it decides what "auto" means.
        tied: whether the vocabulary matrix is the table of word embeddings, as in BERT. Our own
            models are always tied; imported ones may not be.
    """

    def __init__(
        self,
        config: BertConfig,
        vocab_size: int,
        kernels: str = "auto",
        device: str = "cpu",
        tied: bool = True,
    ):
        super().__init__()
        self.config, self.vocab_size = config, vocab_size
        self.impl = resolve_kernels(kernels, device)
        # bf16 where training rounds the operands of its large products; see precision.py.
        self.operands: torch.dtype | None = None
        self.recompute = False  # whether the backward pass computes layers again; see heads.py
        check_head_size(config, self.impl)
        self.embeddings = Embeddings(config, vocab_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.mlm_head = MaskedTokenHead(config.hidden_size, vocab_size, config.layer_norm_eps, tied)
        self.nsp_head = NextSentenceHead(config)
        initialise(dict(self.named_parameters()), config)

    def _mode(self) -> Mode:
        if not self.training:
            return Mode(0.0, 0.0, self.impl, None)
        p = self.config.attention_probs_dropout_prob, self.config.hidden_dropout_prob
        return Mode(*p, self.impl, self.operands)

    def _tables(self, batch: PackedBatch, mode: Mode) -> MicroBatchTables:
        return tables_of(batch, mode.impl, mode.attention_dropout + mode.hidden_dropout > 0)

    def forward(self, batch: PackedBatch) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Compute both losses in one pass.

        The last layer is computed only for the rows that a loss reads. This is exact, not an
        approximation: no other row of it reaches a loss.

        Returns:
            A plain tuple, which `losses` names; ZeRO stage 3 would rebuild any other container.
            mlm, nsp: scalars with gradient, this batch's share of the means over the global batch.
            token_losses fp32 [M], token_correct bool [M], pair_losses fp32 [B] and pair_correct
            bool [B], all detached.
        """
        mode = self._mode()
        masked, first = self.loss_rows(batch)
        mlm, token_losses, token_correct = self.mlm_head(
            masked, self.embeddings.word, batch.labels, max(batch.masked_total, 1), mode
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
        """Return the last hidden states of the masked tokens [M, D] and of [CLS] [B, D].

        The last layer is not computed for other tokens.
        """
        mode = self._mode()
        tables = self._tables(batch, mode)
        first_tokens = batch.cu_seqlens[:-1].long()
        rows = torch.cat((batch.masked_positions, first_tokens)).sort().values
        x = self.embeddings(batch, tables, mode)
        for index, layer in enumerate(self.layers):
            last = index == len(self.layers) - 1  # the backward pass begins with it
            inputs = x, tables, rows if last else None, 1 + Layer.STREAMS * index, mode
            again = self.recompute and not last
            x = recomputed(layer, *inputs) if again else layer(*inputs)
            if index == 0:
                tables = tables._replace(checked=True)

        masked, first = (
            x.index_select(0, torch.searchsorted(rows, wanted))
            for wanted in (batch.masked_positions, first_tokens)
        )
        return masked, first

    def hidden_states(self, batch: PackedBatch) -> list[Tensor]:
        """Return L + 1 tensors [T, D]: the output of the embeddings, then that of each layer."""
        mode = self._mode()
        tables = self._tables(batch, mode)
        states = [self.embeddings(batch, tables, mode)]
        for index, layer in enumerate(self.layers):
            states.append(layer(states[-1], tables, None, 1 + Layer.STREAMS * index, mode))
        return states

    def token_logits(self, hidden: Tensor) -> Tensor:
        """Return vocabulary logits [N, V] for last hidden states [N, D]."""
        return self.mlm_head.logits(hidden, self.embeddings.word, self._mode())

    # Prefixes of the parameters that `classifier_input` does not read.
    NOT_FOR_CLASSIFIERS = ("mlm_head.", "nsp_head.classifier.")

    def classifier_input(self, batch: PackedBatch) -> Tensor:
        """Return what a classifier of whole sequences reads, [B, D]: [CLS], pooled."""
        _, first = self.loss_rows(batch)
        return torch.tanh(self.nsp_head.pooler(first))

    def pair_logits(self, hidden: Tensor) -> Tensor:
        """Return logits [B, 2] of IsNext and NotNext for last hidden states of [CLS] [B, D]."""
        return self.nsp_head(hidden)
