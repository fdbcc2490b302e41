"""A model that trains in bf16 on made-up text, without DeepSpeed; shared by training benchmarks.

Weights and gradients are bf16, master weights and AdamW fp32, as in DeepSpeed's bf16 mode.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.kernels.cases import mixed_lengths
from benchmarks.step.padded_bert import PaddedBert
from fastbert.config import PRESETS, BertConfig
from fastbert.data.packing import PackedBatch
from fastbert.models.bert import BertForPreTraining
from fastbert.models.heads import losses

CLS, SEP, MASK, ORDINARY = 2, 3, 4, 5  # ids; ORDINARY is the first id of ordinary words


class Sizes(NamedTuple):
    """The sizes of a training: preset, V, T, and the tokens of the longest sequence."""

    preset: str
    vocab_size: int
    tokens: int
    longest: int


def model_config(preset: str, dropout: float) -> BertConfig:
    return BertConfig(
        preset=preset,
        **PRESETS[preset],  # type: ignore[arg-type]
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )


def made_up_batch(
    sizes: Sizes, seed: int, device: torch.device, lengths: Sequence[int] | None = None
) -> PackedBatch:
    """Words with frequencies after Zipf's law; 15 % are selected, 80 % of these become [MASK].

    Pairs have random labels. Sequences have the given lengths; by default mixed ones up to the
    longest.
    """
    draw = torch.Generator().manual_seed(seed)
    counts = torch.tensor(lengths or mixed_lengths(sizes.tokens, sizes.longest, seed))
    ends = counts.cumsum(0)
    starts, total = ends - counts, int(ends[-1])
    frequencies = 1 / (10.0 + torch.arange(sizes.vocab_size - ORDINARY))
    ids = ORDINARY + torch.multinomial(frequencies, total, replacement=True, generator=draw)
    ids[starts], ids[ends - 1] = CLS, SEP
    masked = ((torch.rand(total, generator=draw) < 0.15) & (ids >= ORDINARY)).nonzero()[:, 0]
    labels = ids[masked]
    ids[masked[torch.rand(len(masked), generator=draw) < 0.8]] = MASK
    positions = torch.arange(total) - starts.repeat_interleave(counts)
    return PackedBatch(
        input_ids=ids,
        token_type_ids=(positions > counts.repeat_interleave(counts) // 2).long(),
        position_ids=positions,
        cu_seqlens=torch.cat((torch.zeros(1, dtype=torch.int64), ends)).int(),
        max_seqlen=int(counts.max()),
        masked_positions=masked,
        labels=labels,
        next_sentence_labels=torch.randint(2, (len(counts),), generator=draw),
        dropout_seeds=torch.randint(2**62, (len(counts),), generator=draw),
        examples=torch.arange(len(counts)),
        masked_total=len(masked),
        pairs_total=len(counts),
    ).to(device)


class Trainer:
    """A model in `dtype` with fp32 master weights, AdamW, and clipping at norm 1."""

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[nn.Module, PackedBatch], Tensor],
        dtype: torch.dtype,
        lr: float = 1e-3,
    ):
        self.model, self.loss = model, loss
        self.masters = [p.detach().clone() for p in model.parameters()]
        self.model.to(dtype)
        self.optimizer = torch.optim.AdamW(self.masters, lr=lr, weight_decay=0.01, fused=True)

    def step(self, batch) -> Tensor:
        """The loss before the step, scalar, detached. The step does not wait for a GPU."""
        loss = self.loss(self.model, batch)
        loss.backward()
        parameters: list[Tensor] = list(self.model.parameters())
        for master, parameter in zip(self.masters, parameters, strict=True):
            assert parameter.grad is not None
            master.grad, parameter.grad = parameter.grad.float(), None
        nn.utils.clip_grad_norm_(self.masters, 1.0)
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(parameters, self.masters)
        return loss.detach()


def ours(
    config: BertConfig, vocab_size: int, impl: str, device: torch.device, dtype: torch.dtype
) -> Trainer:
    torch.manual_seed(0)
    # "cuda" permits "triton": the dry run of the benchmarks compiles the kernels on a CPU, and
    # launches none.
    model = BertForPreTraining(
        config, vocab_size, impl, "cuda" if impl == "triton" else device.type
    ).to(device)
    return Trainer(model, lambda model, batch: losses(model(batch)).loss, dtype)


def padded(
    config: BertConfig, vocab_size: int, device: torch.device, dtype: torch.dtype
) -> Trainer:
    """The same model built of torch's modules; its batches are those of `padded_bert.pad`."""
    torch.manual_seed(0)
    return Trainer(
        PaddedBert(config, vocab_size).to(device), lambda model, batch: model(batch), dtype
    )
