"""Is everything right? If not, the other results are meaningless.

Each operation runs forward and backward at a size of training, in bf16. It is compared with the
reference in fp32, with the error bound of the tests (`cases.truth`).

A whole step of BERT-base runs with Triton's kernels and with the reference, with the same weights
and dropout masks. Both are compared with the reference in fp32 on the same (rounded) weights. The
Euclidean error of the token losses and of each parameter's gradient must be at most twice that of
the reference in bf16 plus one unit in the last place.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math

import torch
from torch import Tensor

from benchmarks.gpu.items import Item, Part, program
from benchmarks.gpu.measure import DTYPE, compare
from benchmarks.kernels.cases import Case, arguments, mixed_lengths
from benchmarks.step.made_up_training import Sizes, made_up_batch, model_config
from fastbert.config import BertConfig
from fastbert.data.packing import PackedBatch
from fastbert.models.bert import BertForPreTraining
from fastbert.models.heads import losses

STEP_TOKENS = 4096
PATIENCE_S = 90  # a hang is an error and ends the whole run; a slow compiler is not


def cases(tokens: int, vocabulary: int) -> list[Case]:
    """The cases of every kernel, with and without dropout.

    Attention has short, long and mixed sequences, each for all queries and for those that a loss
    reads.
    """
    heads, rows = {"H": 12, "K": 64}, {"T": tokens}
    found = []
    for p in (0.0, 0.1):
        for n in (128, 512):
            lengths = [n] * (tokens // n)
            cut = round(0.15 * tokens) + len(lengths)
            found += [
                Case("attention", f"n={n}", {"lengths": lengths, **heads}, p),
                Case("attention", f"n={n} cut", {"lengths": lengths, **heads, "R": cut}, p),
            ]
        found += [
            Case("attention", "mixed", {"lengths": mixed_lengths(tokens), **heads}, p),
            Case("norm", "D=768", {**rows, "D": 768}, p),
            Case("embedding", "D=768", {**rows, "V": vocabulary, "P": 512, "D": 768}, p),
        ]
    return [
        *found,
        Case("norm", "alone D=768", {**rows, "D": 768, "bare": 1}),
        Case("gelu", "F=3072", {**rows, "F": 3072}),
        Case("mlm_loss", "D=768", {**rows, "M": tokens // 2, "D": 768, "V": vocabulary}),
    ]


def items(part: Part) -> list[Item]:
    tokens = part.place.tokens
    steps = [(longest, training) for longest in (128, 512) for training in (True, False)]
    return [
        *(
            Item(str(case), functools.partial(check, part, case), patience_s=PATIENCE_S)
            for case in cases(tokens, part.place.vocabulary)
        ),
        *(
            Item(
                f"{'training' if training else 'evaluation'} step up to {n}",
                functools.partial(check_step, part, n, training),
                2,
                PATIENCE_S,
            )
            for n, training in steps
        ),
    ]


def check(part: Part, case: Case, _seconds: float) -> None:
    compare(part, case, arguments(case, DTYPE, part.place.device))


def base(dry: bool, dropout: float = 0.1) -> BertConfig:
    """BERT-base; in a dry run two of its layers, which need the same kernels."""
    config = model_config("base", dropout)
    return dataclasses.replace(config, num_hidden_layers=2) if dry else config


def check_step(part: Part, longest: int, training: bool, _seconds: float) -> None:
    where = part.place
    tokens = where.tokens if where.dry else STEP_TOKENS
    batch = made_up_batch(Sizes("base", where.vocabulary, tokens, longest), 0, where.device)
    torch.manual_seed(0)
    model = (
        BertForPreTraining(base(where.dry), where.vocabulary, "reference", where.device.type)
        .to(where.device, DTYPE)
        .train(training)
    )
    exact = outcome_of(copy.deepcopy(model).float(), "reference", batch, training)
    plain, ours = (outcome_of(model, impl, batch, training) for impl in ("reference", "triton"))
    shares = {
        name: share_of_allowed(ours[name], plain[name], value) for name, value in exact.items()
    }
    worst = max(shares, key=lambda name: shares[name])
    part.results.add(
        "check",
        case=f"BERT {'training' if training else 'evaluation'} step up to {longest}",
        operation="step",
        shape={"T": batch.tokens, "sequences": batch.sequences, "longest": longest},
        dropout_p=0.1 if training else 0.0,
        dtype="bf16",
        error_over_allowed=shares[worst],
        worst=worst,
        loss=float(ours["loss"]),
        loss_of_reference=float(exact["loss"]),
        verdict=part.verdict(shares[worst] <= 1),
    )


def outcome_of(
    model: BertForPreTraining, impl: str, batch: PackedBatch, training: bool
) -> dict[str, Tensor]:
    """The loss, the loss of each token and pair, and in training the gradient of each parameter."""
    model.impl = impl
    model.zero_grad()
    with torch.set_grad_enabled(training):
        found = losses(model(batch))
    values = {
        "loss": found.loss.detach(),
        "token losses": found.token_losses,
        "pair losses": found.pair_losses,
    }
    if training:
        found.loss.backward()
        values |= {
            name: parameter.grad
            for name, parameter in model.named_parameters()
            if parameter.grad is not None
        }
        model.zero_grad(set_to_none=True)
    return values


def share_of_allowed(ours: Tensor, plain: Tensor, exact: Tensor) -> float:
    """Euclidean error as a share of the allowed one; infinite if any value is not finite.

    Allowed are twice the error of `plain` plus one unit in the last place of bf16.
    """
    exact = exact.double()
    error, other = (float((x.double() - exact).norm()) for x in (ours, plain))
    allowed = 2 * other + torch.finfo(DTYPE).eps * max(float(exact.norm()), 1e-30)
    share = error / allowed
    return share if math.isfinite(share) and math.isfinite(allowed) else math.inf


if __name__ == "__main__":
    program("smoke", items)
