"""The operations at the sizes of training, for timing and tuning, and the check of results."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastbert_kernels import attention_tile_schedule
from fastbert_kernels._spec import Shape
from fastbert_kernels.specs import SPECS

TOKENS = 16384  # T of a micro-batch: `batch.micro_batch_tokens`
VOCABULARY = 30522


class Case(NamedTuple):
    operation: str
    label: str
    shape: Shape
    dropout_p: float = 0.0

    @property
    def tokens(self) -> int:
        return sum(self.shape["lengths"]) if "lengths" in self.shape else self.shape["T"]

    def __str__(self) -> str:
        return f"{self.operation} {self.label}" + (
            f" p={self.dropout_p:g}" if SPECS[self.operation].dropout else ""
        )


def production(tokens: int = TOKENS, large: bool = True) -> list[Case]:
    """BERT and ModernBERT on packs of `tokens` tokens, the most important cases first.

    `large` is whether to add the sizes of the large models to those of base.

    Attention has the sequence lengths up to `tokens`.
    """

    def attention(label: str, lengths: list[int]) -> list[Case]:
        return [
            Case("attention", label, {"lengths": lengths, "H": 12, "K": 64}, p) for p in (0.0, 0.1)
        ]

    def rows(hidden_size: int) -> list[Case]:
        size = f"D={hidden_size}"
        return [
            Case("norm", f"alone {size}", {"T": tokens, "D": hidden_size, "bare": 1}),
            Case("norm", size, {"T": tokens, "D": hidden_size}, 0.0),
            Case("norm", size, {"T": tokens, "D": hidden_size}, 0.1),
            Case("gelu", f"F={4 * hidden_size}", {"T": tokens, "F": 4 * hidden_size}),
            Case(
                "embedding", size, {"T": tokens, "V": VOCABULARY, "P": 512, "D": hidden_size}, 0.1
            ),
        ]

    of_length = {
        n: attention(f"n={n}", [n] * (tokens // n))
        for n in (512, 128, 1024, 2048, 4096)
        if n <= tokens
    }
    return [
        Case("mlm_loss", "D=768", {"T": tokens, "M": tokens // 2, "D": 768, "V": VOCABULARY}),
        *of_length.pop(512, []),
        *rows(768),
        Case("add_norm", "D=768", {"T": tokens, "D": 768, "bare": 1}, 0.0),
        Case("geglu", "F=1152", {"T": tokens, "F": 1152, "bare": 1}),
        Case("rotary", "H=12 K=64", {"lengths": [512] * (tokens // 512), "H": 12, "K": 64}),
        *attention("mixed", mixed_lengths(tokens, min(512, tokens))),
        *itertools.chain(*of_length.values()),
        *(rows(1024) if large else []),
    ]


def sweep(sizes: Sequence[int], length: int = 128) -> list[Case]:
    """Each operation of BERT-base for each size of a pack, with sequences of `length` tokens.

    Operations with dropout use it.
    """
    found = []
    for T in sizes:
        found += [
            Case(
                "attention",
                f"n={length} T={T}",
                {"lengths": [length] * (T // length), "H": 12, "K": 64},
                0.1,
            ),
            Case(
                "mlm_loss",
                f"D=768 T={T}",
                {"T": T, "M": round(0.15 * T), "D": 768, "V": VOCABULARY},
            ),
            Case("norm", f"D=768 T={T}", {"T": T, "D": 768}, 0.1),
            Case("gelu", f"F=3072 T={T}", {"T": T, "F": 3072}),
            Case("embedding", f"D=768 T={T}", {"T": T, "V": VOCABULARY, "P": 512, "D": 768}, 0.1),
        ]
    return sorted(found, key=lambda case: case.operation)


def mixed_lengths(tokens: int, longest: int = 512, seed: int = 0) -> list[int]:
    """Lengths distributed as in text: lognormal around half of `longest`, and cut there.

    Their sum is at most `tokens`.
    """
    draw = random.Random(seed)
    lengths = [longest // 2]
    while True:
        length = min(longest, max(8, round(draw.lognormvariate(math.log(longest / 2), 0.6))))
        if sum(lengths) + length > tokens:
            return lengths
        lengths.append(length)


def arguments(case: Case, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """The spec's inputs on a device; those with a gradient are leaf tensors."""
    spec = SPECS[case.operation]
    drawn = spec.inputs(case.shape, dtype, case.dropout_p)
    placed = {
        name: _place(value, device) if torch.is_tensor(value) else value
        for name, value in drawn.items()
    }
    if case.operation == "attention":
        # A batch needs one schedule for all layers, so it is not part of the timed work.
        placed["tile_schedule"] = attention_tile_schedule(placed["cu_seqlens"], len(placed["k"]))
    return {
        name: value.requires_grad_() if name in spec.differentiable and value is not None else value
        for name, value in placed.items()
    }


def _place(x: Tensor, device: torch.device) -> Tensor:
    # `to` alone would make q, k and v, slices of one projection, contiguous.
    whole = x if x._base is None else x._base
    return whole.to(device).as_strided(x.size(), x.stride(), x.storage_offset())


def leaves(case: Case, arguments: dict[str, Any]) -> list[Tensor]:
    return [
        arguments[name]
        for name in SPECS[case.operation].differentiable
        if arguments[name] is not None
    ]


def call(case: Case, arguments: dict[str, Any], impl: str) -> Tensor:
    """The result of the operation; the first one if there are several."""
    result = SPECS[case.operation].function(**arguments, impl=impl)
    return result[0] if isinstance(result, tuple) else result


class Truth(NamedTuple):
    """The results of a case in higher precision, and the allowed error.

    The allowed error follows from that of the reference in the case's own dtype.
    """

    values: list[Tensor]  # the result and each gradient
    allowed: list[float]

    def share(self, values: list[Tensor]) -> float:
        """The largest error of a result or gradient as a share of the allowed one.

        A result is right if the share is at most 1; a NaN makes it infinite.
        """
        errors = [
            _largest(ours.to(truth) - truth)
            for ours, truth in zip(values, self.values, strict=True)
        ]
        shares = [
            error / allowed
            for error, allowed in zip(errors, self.allowed, strict=True)
            if math.isfinite(allowed)
        ]
        comparable = len(shares) == len(errors) and not any(math.isnan(share) for share in shares)
        return max(shares) if comparable else math.inf


def upstream_of(result: Tensor) -> Tensor:
    """A gradient to start the backward pass with, the same at every call."""
    return torch.randn(result.shape, generator=torch.Generator().manual_seed(5)).to(result)


def outcome(case: Case, arguments: dict[str, Any], impl: str, upstream: Tensor) -> list[Tensor]:
    """The result and every gradient."""
    result = call(case, arguments, impl)
    return [
        result.detach(),
        *torch.autograd.grad(result, leaves(case, arguments), upstream.to(result.dtype)),
    ]


def truth(
    case: Case, arguments: dict[str, Any], upstream: Tensor, wide: torch.dtype | None = None
) -> Truth:
    """The values and the allowed errors, by the rule of the tests.

    The allowed error is 2 err(reference in this dtype) + 1 ulp, where err is the largest
    difference and 1 ulp is eps * max|truth|. The truth is computed in `wide`: by default fp64 for
    fp32 inputs, and for the others fp32, in which the large cases fit into memory.
    """
    dtype = leaves(case, arguments)[0].dtype
    wide = wide or (torch.float64 if dtype == torch.float32 else torch.float32)
    promoted = {
        name: value.detach().to(wide).requires_grad_()
        if torch.is_tensor(value) and value.is_floating_point()
        else value
        for name, value in arguments.items()
    }
    exact = outcome(case, promoted, "reference", upstream)
    plain = outcome(case, arguments, "reference", upstream)
    eps = torch.finfo(dtype).eps
    return Truth(
        exact,
        [
            2 * _largest(p.to(e) - e) + eps * max(_largest(e), 1e-3)
            for p, e in zip(plain, exact, strict=True)
        ],
    )


def _largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0
