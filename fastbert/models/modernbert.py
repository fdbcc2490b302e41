"""ModernBERT: embeddings of words, L pre-norm layers over packed sequences, and the MLM head.

Positions enter the attention alone, as rotations of queries and keys. Every third layer is global:
its tokens attend to their whole sequence. In the others, a token attends to those at most 64 places
away. The feed-forward network is gated (GeGLU). By default no linear layer and no norm has a bias,
except for the product with the vocabulary matrix.

A sublayer's result is added to its input in the kernel that also computes the next norm. So a layer
takes and returns two tensors: the residual stream, and the result that is still to be added to it.
Axes: B sequences, T packed tokens, M masked tokens, R rows that a loss reads, H heads, K head size,
D hidden, F feed-forward, V vocabulary. Each module owns the parameters that its own forward reads,
as in `bert.py`.

Source: Warner et al., 2024, "Smarter, Better, Faster, Longer". The model computes the same function
as transformers' ModernBertForMaskedLM, so weights can be converted in both directions.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastbert.config import ModernBertConfig
from fastbert.data.packing import PackedBatch
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
from fastbert_kernels import (
    add_layer_norm,
    bias_geglu,
    dropout_add_layer_norm,
    embedding_layer_norm,
    rotary_embedding,
    rotary_table,
    varlen_attention,
)
from fastbert_kernels._dropout import row_multiplier


class Mode(NamedTuple):
    """How a pass is computed."""

    embedding_dropout: float  # probability: that of the config in training, 0 in evaluation
    attention_dropout: float  # of the attention weights, and of the attention's output
    mlp_dropout: float
    impl: str  # of the kernels: "triton", "cpu" or "reference"
    operands: torch.dtype | None  # of large matrix products, as in fastbert_kernels.linear


class Positions(NamedTuple):
    """The rotations of queries and keys."""

    ids: Tensor  # int64 [T], positions within the sequences
    of_global_layers: Tensor  # fp32 [max_position_embeddings, K], as from `rotary_table`
    of_local_layers: Tensor


class Embeddings(nn.Module):
    """LN(word), then dropout."""

    def __init__(self, config: ModernBertConfig, vocab_size: int):
        super().__init__()
        self.eps = config.norm_eps
        self.word = matrix(vocab_size, config.hidden_size)
        self.norm_weight = vector(config.hidden_size)
        self.norm_bias = vector(config.hidden_size) if config.norm_bias else None

    def forward(self, batch: PackedBatch, tables: MicroBatchTables, mode: Mode) -> Tensor:
        return embedding_layer_norm(
            batch.input_ids,
            None,
            None,
            self.word,
            None,
            None,
            self.norm_weight,
            self.norm_bias,
            eps=self.eps,
            dropout_p=mode.embedding_dropout,
            dropout_seeds=tables.token_seeds,
            impl=mode.impl,
        )


class Norm(nn.Module):
    """The parameters of a LayerNorm over the residual stream."""

    def __init__(self, config: ModernBertConfig):
        super().__init__()
        self.eps = config.norm_eps
        self.weight = vector(config.hidden_size)
        self.bias = vector(config.hidden_size) if config.norm_bias else None


class SublayerNorm(Norm):
    """The norm before a sublayer."""

    def forward(
        self,
        x: Tensor,
        residual: Tensor,
        mode: Mode,
        dropout: float = 0.0,
        token_seeds: Tensor | None = None,
        stream: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """Return LN(s) and s = residual + dropout(x), [T, D] each."""
        return add_layer_norm(
            x,
            None,
            residual,
            self.weight,
            self.bias,
            eps=self.eps,
            dropout_p=dropout,
            dropout_seeds=token_seeds,
            dropout_stream=stream,
            impl=mode.impl,
        )


class FinalNorm(Norm):
    """The norm after the last layer: LN(residual + x)."""

    def forward(self, x: Tensor, residual: Tensor, mode: Mode) -> Tensor:
        return dropout_add_layer_norm(
            x, None, residual, self.weight, self.bias, eps=self.eps, impl=mode.impl
        )


class Attention(nn.Module):
    """Multi-head self-attention with rotary positions, within each sequence or a window of it."""

    def __init__(self, config: ModernBertConfig, window: int | None):
        super().__init__()
        size, bias = config.hidden_size, config.attention_bias
        self.heads, self.head_size = config.num_attention_heads, config.head_size
        self.window = window
        # One matrix for all three: the rows of q, then of k, then of v.
        self.qkv_weight = matrix(3 * size, size)
        self.qkv_bias = vector(3 * size) if bias else None
        self.output_weight = matrix(size, size)
        self.output_bias = vector(size) if bias else None

    def forward(
        self,
        x: Tensor,
        tables: MicroBatchTables,
        positions: Positions,
        rows: Tensor | None,
        stream: int,
        mode: Mode,
    ) -> Tensor:
        """Return the output [T, D], or [R, D] where `rows` (int64 [R], ascending) selects tokens.

        Queries of all tokens are computed even then, since one pass rotates them with the keys.
        """
        qkv = product(x, self.qkv_weight, self.qkv_bias, mode, keep_rounded=True)
        angles = positions.of_global_layers if self.window is None else positions.of_local_layers
        q, k, v = rotary_embedding(
            qkv.view(-1, 3, self.heads, self.head_size), positions.ids, angles, impl=mode.impl
        )
        context = varlen_attention(
            select(q, rows),
            k,
            v,
            tables.cu_seqlens,
            tables.max_seqlen,
            dropout_p=mode.attention_dropout,
            dropout_seeds=tables.sequence_seeds,
            dropout_stream=stream,
            query_indices=rows,
            window=self.window,
            tile_schedule=tables.tile_schedule,
            impl=mode.impl,
        )
        return product(context.flatten(1), self.output_weight, self.output_bias, mode)


class FeedForward(nn.Module):
    """(GELU(x W' + b) * (x V' + c)) U' + d, with W and V joined along their rows."""

    def __init__(self, config: ModernBertConfig):
        super().__init__()
        size, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.input_gate_weight = matrix(2 * inner, size)
        self.input_gate_bias = vector(2 * inner) if bias else None
        self.output_weight = matrix(size, inner)
        self.output_bias = vector(size) if bias else None

    def forward(self, x: Tensor, token_seeds: Tensor | None, stream: int, mode: Mode) -> Tensor:
        weight, bias = self.input_gate_weight, self.input_gate_bias
        if mode.operands is None:
            inner = bias_geglu(product(x, weight, None, mode), bias, impl=mode.impl)
        else:  # a rounded product adds the bias before it rounds
            inner = bias_geglu(product(x, weight, bias, mode, keep_rounded=True), impl=mode.impl)
        if mode.mlp_dropout > 0:
            # No published model drops anything here, so this has no kernel.
            assert token_seeds is not None
            factors = row_multiplier(
                token_seeds, stream, inner.shape[1], mode.mlp_dropout, torch.float32
            )
            inner = (inner * factors).to(inner.dtype)
        return product(inner, self.output_weight, self.output_bias, mode)


class Layer(nn.Module):
    """One pre-norm Transformer layer: self-attention, then the feed-forward network.

    Layer 0 has no norm before its attention, since the embeddings are normed.
    """

    # Dropout is applied at three places, each with its own random stream: to the attention
    # weights, to the attention's output, and to the inside of the feed-forward network.
    STREAMS = 3

    def __init__(self, config: ModernBertConfig, index: int):
        super().__init__()
        self.attention_norm = SublayerNorm(config) if index else None
        self.attention = Attention(config, config.window_of(index))
        self.feed_forward_norm = SublayerNorm(config)
        self.feed_forward = FeedForward(config)

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None,
        tables: MicroBatchTables,
        positions: Positions,
        rows: Tensor | None,
        stream: int,
        mode: Mode,
    ) -> tuple[Tensor, Tensor]:
        """Compute the layer for all tokens, or for selected ones.

        Args:
            x: [T, D], what is still to be added to the residual stream.
            residual: [T, D]; None in layer 0, whose residual stream is x.
            rows: int64 [R], ascending; None for all T.

        Returns:
            x and residual, [T, D] each, or [R, D].
        """
        if self.attention_norm is None:
            normed, total = x, x
        else:
            normed, total = self.attention_norm(x, residual, mode)
        x = self.attention(normed, tables, positions, rows, stream, mode)
        seeds = select(tables.token_seeds, rows)
        normed, total = self.feed_forward_norm(
            x, select(total, rows), mode, mode.attention_dropout, seeds, stream + 1
        )
        return self.feed_forward(normed, seeds, stream + 2, mode), total


class ModernBertForMaskedLM(nn.Module):
    """The encoder with the MLM head.

    Args:
        config: sizes and dropout probabilities.
        vocab_size: V, the size of the tokenizer's vocabulary.
        kernels: "auto", "triton", "cpu" or "reference".
        device: "cpu" or "cuda", where the model will run; it decides what "auto" means.
    """

    def __init__(
        self,
        config: ModernBertConfig,
        vocab_size: int,
        kernels: str = "auto",
        device: str = "cpu",
    ):
        super().__init__()
        self.config, self.vocab_size = config, vocab_size
        self.impl = resolve_kernels(kernels, device)
        # bf16 where training rounds the operands of its large products; see precision.py.
        self.operands: torch.dtype | None = None
        self.recompute = False  # whether the backward pass computes layers again; see heads.py
        check_head_size(config, self.impl)
        self.embeddings = Embeddings(config, vocab_size)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.final_norm = FinalNorm(config)
        self.mlm_head = MaskedTokenHead(
            config.hidden_size,
            vocab_size,
            config.norm_eps,
            config.tie_word_embeddings,
            bias=config.classifier_bias,
            norm_bias=config.norm_bias,
            vocabulary_bias=config.decoder_bias,
        )
        self._angles: dict[torch.device, tuple[Tensor, Tensor]] = {}
        initialise(dict(self.named_parameters()), config)

    def _mode(self) -> Mode:
        if not self.training:
            return Mode(0.0, 0.0, 0.0, self.impl, None)
        c = self.config
        probabilities = c.embedding_dropout, c.attention_dropout, c.mlp_dropout
        return Mode(*probabilities, self.impl, self.operands)

    def _positions(self, batch: PackedBatch) -> Positions:
        """Return the rotations of a batch.

        The tables of angles are no buffers, because these would be converted to bf16 with the
        weights. Inference must not make them either: autograd cannot save its tensors.
        """
        device = batch.input_ids.device
        if device not in self._angles:
            c = self.config
            with torch.inference_mode(False):
                globally, locally = (
                    rotary_table(c.max_position_embeddings, c.head_size, theta, device)
                    for theta in (c.global_rope_theta, c.local_rope_theta)
                )
            self._angles[device] = globally, locally
        return Positions(batch.position_ids, *self._angles[device])

    def forward(self, batch: PackedBatch) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Compute the loss.

        The last layer is computed only for the masked tokens. This is exact, not an approximation:
        no other row of it reaches the loss.

        Returns:
            What `BertForPreTraining.forward` returns. The values on pairs are zeros, and nsp has no
            gradient.
        """
        mode = self._mode()
        masked = self._last_states(batch, batch.masked_positions, mode)
        mlm, token_losses, token_correct = self.mlm_head(
            masked, self.embeddings.word, batch.labels, max(batch.masked_total, 1), mode
        )
        pair_losses = token_losses.new_zeros(len(batch.examples))
        return (
            mlm,
            mlm.new_zeros(()),
            token_losses,
            token_correct,
            pair_losses,
            pair_losses.bool(),
        )

    def loss_rows(self, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        """Return the last hidden states of the masked tokens [M, D] and of [CLS] [B, D].

        The last layer is not computed for other tokens.
        """
        wanted = torch.cat((batch.masked_positions, batch.cu_seqlens[:-1].long()))
        states = self._last_states(batch, wanted, self._mode())
        masked, first = states.split([len(batch.masked_positions), len(states) - len(batch.labels)])
        return masked, first

    def _last_states(self, batch: PackedBatch, wanted: Tensor, mode: Mode) -> Tensor:
        """Return the last hidden states [R, D] of the tokens `wanted`, int64 [R]."""
        rows = wanted.sort().values
        (last,) = deque(self._through_layers(batch, rows, mode), maxlen=1)
        return self.final_norm(*last, mode).index_select(0, torch.searchsorted(rows, wanted))

    def hidden_states(self, batch: PackedBatch) -> list[Tensor]:
        """Return L + 1 tensors [T, D]: the output of the embeddings, then that of each layer.

        The last one has passed the final norm, as in transformers.
        """
        mode = self._mode()
        (embedded, _), *inner, last = self._through_layers(batch, None, mode)
        states = [x + residual for x, residual in inner if residual is not None]
        return [embedded, *states, self.final_norm(*last, mode)]

    def _through_layers(
        self, batch: PackedBatch, rows: Tensor | None, mode: Mode
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield x and residual after the embeddings and after each layer.

        After the last layer they are those of the given rows. None of them is kept here: most are
        not needed for the backward pass.
        """
        dropout = mode.embedding_dropout + mode.attention_dropout + mode.mlp_dropout > 0
        tables, positions = tables_of(batch, mode.impl, dropout), self._positions(batch)
        x, residual = self.embeddings(batch, tables, mode), None
        yield x, residual
        for index, layer in enumerate(self.layers):
            last = index == len(self.layers) - 1  # the backward pass begins with it
            stream = 1 + Layer.STREAMS * index
            inputs = x, residual, tables, positions, rows if last else None, stream, mode
            again = self.recompute and not last
            x, residual = recomputed(layer, *inputs) if again else layer(*inputs)
            yield x, residual

    def token_logits(self, hidden: Tensor) -> Tensor:
        """Return vocabulary logits [N, V] for last hidden states [N, D]."""
        return self.mlm_head.logits(hidden, self.embeddings.word, self._mode())

    # Prefixes of the parameters that `classifier_input` does not read.
    NOT_FOR_CLASSIFIERS = ("mlm_head.vocabulary_bias", "mlm_head.decoder")

    def classifier_input(self, batch: PackedBatch) -> Tensor:
        """Return what a classifier of whole sequences reads, [B, D].

        It is the last hidden state of [CLS], or the mean of all with `classifier_pooling = "mean"`,
        through the dense layer and the norm of the MLM head, as in transformers.
        """
        if self.config.classifier_pooling == "cls":
            _, pooled = self.loss_rows(batch)
        else:
            lengths = batch.cu_seqlens.diff().long()
            pooled = torch.segment_reduce(self.hidden_states(batch)[-1], "mean", lengths=lengths)
        return self.mlm_head.transform(pooled, self._mode())


@torch.no_grad()
def initialise(parameters: Mapping[str, Tensor], config: ModernBertConfig) -> None:
    """Initialise all parameters of a ModernBertForMaskedLM in place.

    Matrices are drawn from a normal distribution that is cut off. Those whose results are added to
    the residual stream, and those of the head, have a smaller spread, by 1 / sqrt(2 L), so that
    the stream's variance does not grow with the number of layers. Biases are zero, and LayerNorm
    is the identity.

    Args:
        parameters: every parameter by its name in the model.

    Source: Shoeybi et al., 2019 (Megatron-LM), section 4; Warner et al., 2024, section 2.2.
    """
    wide = config.initializer_range
    narrow = wide / math.sqrt(2 * config.num_hidden_layers)
    for name, parameter in parameters.items():
        if parameter.dim() == 2:
            std = narrow if name.endswith("output_weight") or name.startswith("mlm_head.") else wide
            limit = config.initializer_cutoff_factor * std
            torch.nn.init.trunc_normal_(parameter, std=std, a=-limit, b=limit)
        else:
            is_norm = name.endswith(("norm.weight", "norm_weight"))
            torch.nn.init.constant_(parameter, 1.0 if is_norm else 0.0)
