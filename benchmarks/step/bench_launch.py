"""CPU time of launching kernels: Python, Triton's launcher and torch's autograd, without a GPU.

    python -m benchmarks.step.bench_launch [--out FOLDER] [--seconds 60]

Triton's driver is replaced by one that launches nothing (`no_launch`). Everything else is real:
the public functions with their checks, autograd, the binding of arguments and the look-up of
compiled kernels. The measure is the CPU time of this process, in bf16, with dropout 0.1. As on a
GPU, values of index tensors are not checked.

An operation is called on tensors of a few rows. Its row gives microseconds of one forward and of
one backward call.

A micro-batch is one forward and backward pass of the model. The cost of a launch does not depend
on sizes, so the model is a narrow version of BERT-base (or mini, or small): it has as many layers,
but all sizes are 16, with one head, two sequences of two tokens, and a vocabulary of 64. Torch's
own operations, such as matrix products, then do almost no arithmetic, but still cost their
dispatch. For comparison the same model is measured with torch's products and with autograd
functions that do nothing: column `bare` of the table.

There is no GPU, so the time of the real driver is not included (about 3 microseconds for each
launch, ours and torch's), nor is DeepSpeed's.

Both models and all operations take turns. The minimum over all rounds counts, because other load
on the machine only ever adds time.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import fastbert.models.bert
import fastbert.models.heads
from benchmarks.compiled.no_launch import no_launch
from benchmarks.harness.machine import header, header_line
from benchmarks.harness.record import Record, Row
from benchmarks.harness.tables_and_plots import table
from fastbert.config import PRESETS, BertConfig
from fastbert.data.packing import PackedBatch
from fastbert.models.bert import BertForPreTraining
from fastbert.models.heads import losses
from fastbert_kernels._spec import Shape
from fastbert_kernels.specs import SPECS

DROPOUT = 0.1
VOCABULARY = 64
SEQUENCES, LENGTH = 2, 2  # sequences of the micro-batch, tokens of each
# The maximum length that the attention kernels are given decides which of them run.
LONGEST = {
    "one tile": 128,
    "general": 512,
}
MODELS = ("base", "mini")
CALLS = 20  # calls of an operation between two readings of the clock
ROUNDS = (5, 200)  # minimum and maximum
OPERATIONS: dict[str, tuple[str, Shape]] = {
    "attention, one tile": ("attention", {"lengths": [8, 8], "H": 2, "K": 64}),
    "attention, general": ("attention", {"lengths": [8, 130], "H": 2, "K": 64}),
    "norm": ("norm", {"T": 16, "D": 64}),
    "gelu": ("gelu", {"T": 16, "F": 64}),
    "embedding": ("embedding", {"T": 16, "V": 64, "P": 16, "D": 64}),
    "mlm_loss": ("mlm_loss", {"T": 16, "M": 8, "D": 64, "V": VOCABULARY}),
}


# ------------------------------------------------------------------------------------ the stand-ins


class _Nothing(torch.autograd.Function):
    """An autograd operation that only allocates its result and its gradients."""

    @staticmethod
    def forward(ctx: Any, shape: tuple[int, ...], *tensors: Tensor | None) -> Tensor:
        ctx.save_for_backward(*tensors)
        first = next(x for x in tensors if x is not None)
        return first.new_empty(shape)

    @staticmethod
    def backward(ctx: Any, _dy: Tensor) -> Any:  # type: ignore[override]
        return None, *(
            torch.empty_like(x) if x is not None and x.is_floating_point() else None
            for x in ctx.saved_tensors
        )


def _attention(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Tensor:
    return _Nothing.apply(q.shape, q, k, v)  # type: ignore[no-any-return]


def _norm(
    x: Tensor, bias: Tensor, residual: Tensor, norm_weight: Tensor, norm_bias: Tensor, **_: Any
) -> Tensor:
    return _Nothing.apply(  # type: ignore[no-any-return]
        x.shape, x, bias, residual, norm_weight, norm_bias
    )


def _layer_norm(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, **_: Any) -> Tensor:
    return _Nothing.apply(x.shape, x, norm_weight, norm_bias)  # type: ignore[no-any-return]


def _gelu(x: Tensor, bias: Tensor, **_: Any) -> Tensor:
    return _Nothing.apply(x.shape, x, bias)  # type: ignore[no-any-return]


def _embedding(
    input_ids: Tensor, _positions: Tensor, _token_types: Tensor, *tables: Tensor, **_: Any
) -> Tensor:
    return _Nothing.apply(  # type: ignore[no-any-return]
        (len(input_ids), tables[0].shape[1]), *tables
    )


def _loss(
    hidden: Tensor, weight: Tensor, bias: Tensor, _positions: Any, labels: Tensor, **_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        _Nothing.apply((), hidden, weight, bias),
        hidden.new_empty(labels.shape),
        labels.new_empty(labels.shape, dtype=torch.bool),
    )


NOTHING = {
    "fused": lambda *_: False,
    "varlen_attention": _attention,
    "dropout_add_layer_norm": _norm,
    "bias_gelu": _gelu,
    "embedding_layer_norm": _embedding,
}
IN_HEADS = {
    "layer_norm": _layer_norm,
    "bias_gelu": _gelu,
    "masked_cross_entropy": _loss,
    "attention_tile_schedule": lambda cu_seqlens, _total: cu_seqlens,
    "row_seeds": lambda seeds, _cu_seqlens, total: seeds.new_empty(total),
}


@contextlib.contextmanager
def nothing() -> Iterator[None]:
    """Let the model call kernels that do nothing."""
    with (
        mock.patch.multiple(fastbert.models.bert, **NOTHING),
        mock.patch.multiple(fastbert.models.heads, **IN_HEADS),
    ):
        yield


# ------------------------------------------------------------------------------------ what is timed


def twin(preset: str) -> BertForPreTraining:
    """A model with as many layers as the preset and minimal sizes, in bf16, on Triton kernels."""
    narrow = {
        "hidden_size": 16,
        "num_attention_heads": 1,
        "intermediate_size": 16,
        "num_hidden_layers": PRESETS[preset]["num_hidden_layers"],
    }
    config = BertConfig(
        preset=preset,
        **narrow,  # type: ignore[arg-type]
        hidden_dropout_prob=DROPOUT,
        attention_probs_dropout_prob=DROPOUT,
    )
    model = BertForPreTraining(config, VOCABULARY, "reference").to(torch.bfloat16)
    model.impl = "triton"  # which the constructor would refuse on a CPU
    return model


def micro_batch(longest: int) -> PackedBatch:
    tokens = SEQUENCES * LENGTH
    position = torch.arange(LENGTH).repeat(SEQUENCES)
    masked = torch.arange(1, tokens, LENGTH)
    return PackedBatch(
        input_ids=torch.arange(tokens) % VOCABULARY,
        token_type_ids=(position > LENGTH // 2).long(),
        position_ids=position,
        cu_seqlens=torch.arange(0, tokens + 1, LENGTH, dtype=torch.int32),
        max_seqlen=longest,
        masked_positions=masked,
        labels=masked % VOCABULARY,
        next_sentence_labels=torch.arange(SEQUENCES) % 2,
        dropout_seeds=torch.arange(SEQUENCES),
        examples=torch.arange(SEQUENCES),
        masked_total=len(masked),
        pairs_total=SEQUENCES,
    )


def step(model: BertForPreTraining, parameters: list[Tensor], batch: PackedBatch) -> None:
    for parameter in parameters:
        parameter.grad = None
    losses(model(batch)).loss.backward()


def operation(name: str, shape: Shape) -> tuple[Callable[[], Tensor], Callable[[Tensor], object]]:
    """The forward call, and the backward call, which takes the forward result."""
    spec = SPECS[name]
    arguments = spec.inputs(shape, torch.bfloat16, DROPOUT)
    leaves = [arguments[key].detach().requires_grad_() for key in spec.differentiable]
    call = functools.partial(
        spec.function,
        **{**arguments, **dict(zip(spec.differentiable, leaves, strict=True))},
        impl="triton",
    )

    def forward() -> Tensor:
        result = call()
        return result[0] if isinstance(result, tuple) else result

    upstream = torch.ones_like(forward())
    return forward, lambda result: torch.autograd.grad(result, leaves, upstream, retain_graph=True)


@contextlib.contextmanager
def as_on_gpu() -> Iterator[None]:
    """Launch no kernels, and skip the checks of index values that run only on a CPU."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(no_launch("sm_90"))
        for spec in SPECS.values():
            module = sys.modules[spec.function.__module__]
            if hasattr(module, "values_checked"):
                stack.enter_context(mock.patch.object(module, "values_checked", lambda *_: False))
        yield


def cpu_time(call: Callable[[], object], calls: int = 1) -> float:
    """Mean CPU seconds of this process per call."""
    start = time.process_time()
    for _ in range(calls):
        call()
    return (time.process_time() - start) / calls


def measure(seconds: float) -> list[Row]:
    """A row for each operation, in microseconds, and for each micro-batch, in milliseconds."""
    operations = {name: operation(*what) for name, what in OPERATIONS.items()}
    models = {preset: twin(preset) for preset in MODELS}
    steps = {
        (preset, kind): functools.partial(
            step, model, list(model.parameters()), micro_batch(longest)
        )
        for preset, model in models.items()
        for kind, longest in LONGEST.items()
    }
    times: dict[Any, list[float]] = {}

    def note(key: Any, found: float) -> None:
        times.setdefault(key, []).append(found)

    end = time.monotonic() + seconds
    for number in range(-1, ROUNDS[1]):  # the first round compiles and is discarded
        if number >= ROUNDS[0] and time.monotonic() > end:
            break
        for name, (forward, backward) in operations.items():
            note((name, "forward"), cpu_time(forward, CALLS))
            note((name, "backward"), cpu_time(functools.partial(backward, forward()), CALLS))
        for name, run in steps.items():
            note((*name, "all"), cpu_time(run))
            with nothing():
                note((*name, "bare"), cpu_time(run))
        if number < 0:
            times = {}
    least = {key: min(found) for key, found in times.items()}
    rows: list[Row] = [
        {
            "what": "operation",
            "name": name,
            **{f"{way}_us": 1e6 * least[name, way] for way in ("forward", "backward")},
        }
        for name in operations
    ]
    for preset, kind in steps:
        milliseconds = {
            "ms": 1e3 * least[preset, kind, "all"],
            "bare_ms": 1e3 * least[preset, kind, "bare"],
        }
        rows.append({"what": "micro-batch", "model": preset, "attention": kind, **milliseconds})
    return rows


def report(rows: list[Row]) -> str:
    operations = [row for row in rows if row["what"] == "operation"]
    batches = [row for row in rows if row["what"] == "micro-batch"]
    return "\n\n".join(
        [
            "CPU time of launching",
            "Time of the process, nothing launched; "
            "see benchmarks/step/bench_launch.py for what is counted.",
            table(
                ["operation", "forward, us", "backward, us"],
                [
                    [row["name"], f"{row['forward_us']:.0f}", f"{row['backward_us']:.0f}"]
                    for row in operations
                ],
            ),
            table(
                ["micro-batch", "attention", "ms", "bare, ms"],
                [
                    [
                        f"BERT-{row['model']}",
                        row["attention"],
                        f"{row['ms']:.2f}",
                        f"{row['bare_ms']:.2f}",
                    ]
                    for row in batches
                ],
            ),
        ]
    )


def ratios(rows: list[Row]) -> dict[str, float]:
    """The bare model's time over ours; above 1 if our layers cost less than the bare products."""
    return {
        f"BERT-{row['model']}, {row['attention']}, bare over ours": row["bare_ms"] / row["ms"]
        for row in rows
        if row["what"] == "micro-batch"
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="folder for launch.json and launch.md")
    parser.add_argument("--seconds", type=float, default=60, help="approximate duration (60)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with as_on_gpu():
        rows = measure(options.seconds)
    facts, text = header(torch.device("cpu")), report(rows)
    print(f"{header_line(facts)}\n\n{text}")
    if options.out:
        Record(facts, rows, ratios(rows)).write(options.out, "launch", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
