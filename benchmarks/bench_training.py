"""A short training run in bf16: whether the kernels train the same model, and how fast.

    python -m benchmarks.bench_training --out folder [--seconds 90] [--dry-run]

Curves. A model of four layers trains on made-up text (words after Zipf) for 100 steps, with and without dropout: on the reference in fp32, on
the reference in bf16, and on the kernels in bf16, from the same weights and, with dropout, under the same masks. The loss must fall, and
the kernels' curve must be at most three times as far from the fp32 curve as the reference's in bf16 is, in the mean over the steps: both
differ from it by rounding, the kernels in a few places more (the weights of attention are bf16 before they meet the values).

Speed. Steps of BERT-base, forward, backward and AdamW, on packs of 16,384 tokens with dropout 0.1, in turns: kernels, reference, and the
same model built of torch.nn on the same examples, padded, with SDPA. Tokens are real ones; padding does not count.

Weights and gradients are bf16, masters and AdamW fp32, as in DeepSpeed's bf16 mode. `--dry-run`: tiny sizes on a CPU, `cpu` in place of the
kernels. Exit code 1 if the loss does not fall or the curves do not agree.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.cases import VOCABULARY, mixed_lengths
from benchmarks.machine import PEAKS, device_name, header, header_line
from benchmarks.padded_bert import PaddedBert, pad
from benchmarks.record import Record
from fastbert.config import PRESETS, ModelConfig
from fastbert.data.packing import PackedBatch
from fastbert.flops import training_flops
from fastbert.model import BertForPreTraining
from fastbert.objective import losses

CLS, SEP, MASK, ORDINARY = 2, 3, 4, 5  # ids; ordinary words begin at the last
CURVES_SHARE = 0.5  # of the time
FALL = 0.97  # the last tenth of a curve over its first tenth, at the most
NOISE = 3  # distance of the kernels' curve from the fp32 curve over that of the reference in bf16, at the most
WARM_UP_STEPS = 2
ROUNDS = (3, 30)  # of the speed comparison, at the least and at the most


class Sizes(NamedTuple):
    """What is trained: a model's preset, V, T, the longest sequence in tokens."""

    preset: str
    vocab_size: int
    tokens: int
    longest: int


CURVES = Sizes("mini", 8192, 4096, 256)  # lengths on both sides of 128, where attention changes its kernels
SPEED = [Sizes("base", VOCABULARY, 16384, 128), Sizes("base", VOCABULARY, 16384, 512)]
DRY_CURVES, DRY_SPEED, DRY_STEPS = Sizes("tiny", 200, 256, 32), [Sizes("tiny", 200, 256, 32)], 24
STEPS = 100
PADDED = "torch.nn, padded, SDPA"


def model_config(preset: str, dropout: float) -> ModelConfig:
    return ModelConfig(preset=preset, **PRESETS[preset], hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)  # type: ignore[arg-type]


def made_up_batch(sizes: Sizes, seed: int, device: torch.device) -> PackedBatch:
    """Words drawn after Zipf, 15 % of them selected, 80 % of these replaced by [MASK]; pairs with labels by chance."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.tensor(mixed_lengths(sizes.tokens, sizes.longest, seed))
    ends = lengths.cumsum(0)
    starts, total = ends - lengths, int(ends[-1])
    frequencies = 1 / (10.0 + torch.arange(sizes.vocab_size - ORDINARY))
    ids = ORDINARY + torch.multinomial(frequencies, total, replacement=True, generator=draw)
    ids[starts], ids[ends - 1] = CLS, SEP
    masked = ((torch.rand(total, generator=draw) < 0.15) & (ids >= ORDINARY)).nonzero()[:, 0]
    labels = ids[masked]
    ids[masked[torch.rand(len(masked), generator=draw) < 0.8]] = MASK
    positions = torch.arange(total) - starts.repeat_interleave(lengths)
    return PackedBatch(
        input_ids=ids,
        token_type_ids=(positions > lengths.repeat_interleave(lengths) // 2).long(),
        position_ids=positions,
        cu_seqlens=torch.cat((torch.zeros(1, dtype=torch.int64), ends)).int(),
        max_seqlen=int(lengths.max()),
        masked_positions=masked,
        labels=labels,
        next_sentence_labels=torch.randint(2, (len(lengths),), generator=draw),
        dropout_keys=torch.randint(2**62, (len(lengths),), generator=draw),
        examples=torch.arange(len(lengths)),
        masked_total=len(masked),
        pairs_total=len(lengths),
    ).to(device)


class Trainer:
    """A model in `dtype` with fp32 masters under AdamW and clipping at norm 1."""

    def __init__(self, model: nn.Module, loss: Callable[[nn.Module, PackedBatch], Tensor], dtype: torch.dtype, lr: float = 1e-3):
        self.model, self.loss = model, loss
        self.masters = [p.detach().clone() for p in model.parameters()]
        self.model.to(dtype)
        self.optimizer = torch.optim.AdamW(self.masters, lr=lr, weight_decay=0.01, fused=True)

    def step(self, batch) -> Tensor:
        """The loss before the step, scalar, detached."""
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


def ours(sizes: Sizes, impl: str, dropout: float, device: torch.device, dtype: torch.dtype) -> Trainer:
    torch.manual_seed(0)
    model = BertForPreTraining(model_config(sizes.preset, dropout), sizes.vocab_size, impl, device.type).to(device)
    return Trainer(model, lambda model, batch: losses(model(batch)).loss, dtype)


def padded(sizes: Sizes, dropout: float, device: torch.device, dtype: torch.dtype) -> Trainer:
    torch.manual_seed(0)
    model = PaddedBert(model_config(sizes.preset, dropout), sizes.vocab_size).to(device)
    return Trainer(model, lambda model, batch: model(batch), dtype)


# ------------------------------------------------------------------------------------------------------------- curves


class Curves(NamedTuple):
    """Losses of the same steps, in nats."""

    dropout: float
    exact: list[float]  # the reference in fp32
    reference: list[float]
    kernels: list[float]

    @property
    def falls(self) -> bool:
        tenth = max(1, len(self.kernels) // 10)
        return statistics.mean(self.kernels[-tenth:]) < FALL * statistics.mean(self.kernels[:tenth])

    @property
    def distances(self) -> tuple[float, float]:
        """Of the kernels' and of the reference's curve from the fp32 curve, the mean over the steps."""
        return tuple(
            statistics.mean(abs(a - b) for a, b in zip(curve, self.exact, strict=True)) for curve in (self.kernels, self.reference)
        )  # type: ignore[return-value]

    @property
    def agree(self) -> bool:
        kernels, reference = self.distances
        return kernels <= NOISE * reference


def curve(trainer: Trainer, batches: list[PackedBatch], seconds: float) -> list[float]:
    """Losses of a step on each batch, for so many seconds after the first, in which all kinds of things are loaded."""
    found = [float(trainer.step(batches[0]))]
    end = time.monotonic() + seconds
    for batch in batches[1:]:
        if time.monotonic() > end:
            break
        found.append(float(trainer.step(batch)))
    return found


def train_curves(sizes: Sizes, steps: int, impl: str, dropout: float, device: torch.device, seconds: float) -> Curves:
    """Three runs; the first, which is the slowest, takes a third of the time at the most, and the others as many steps."""
    batches = [made_up_batch(sizes, seed, device) for seed in range(steps)]
    exact = curve(ours(sizes, "reference", dropout, device, torch.float32), batches, seconds / 3)
    batches = batches[: len(exact)]
    curves = [curve(ours(sizes, name, dropout, device, torch.bfloat16), batches, float("inf")) for name in ("reference", impl)]
    return Curves(dropout, exact, *curves)


# ------------------------------------------------------------------------------------------------------------- speed


def speed(sizes: Sizes, impl: str, device: torch.device, seconds: float) -> list[dict]:
    """A row for each model: milliseconds of a step and real tokens a second; wall time, the device awaited."""
    batch = made_up_batch(sizes, 0, device)
    padding = pad(batch)
    contenders = {
        impl: (ours(sizes, impl, 0.1, device, torch.bfloat16), batch),
        "reference": (ours(sizes, "reference", 0.1, device, torch.bfloat16), batch),
        PADDED: (padded(sizes, 0.1, device, torch.bfloat16), padding),
    }
    times: dict[str, list[float]] = {name: [] for name in contenders}
    end = time.monotonic() + seconds
    for number in range(WARM_UP_STEPS + ROUNDS[1]):
        if number >= WARM_UP_STEPS + ROUNDS[0] and time.monotonic() > end:
            break
        for name, (trainer, examples) in contenders.items():
            start = time.perf_counter()
            float(trainer.step(examples))  # the step's updates are still to come: wait for them too
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if number >= WARM_UP_STEPS:
                times[name].append(1e3 * (time.perf_counter() - start))
    lengths = batch.cu_seqlens.diff().tolist()
    useful = training_flops(model_config(sizes.preset, 0.1), sizes.vocab_size, lengths, len(batch.labels), batch.sequences)
    peak = PEAKS.get(device_name(device))
    rows = []
    for name, ms in times.items():
        low, median, high = statistics.quantiles(ms, n=4, method="inclusive")
        rows.append(
            {
                "preset": sizes.preset,
                "longest": sizes.longest,
                "fill": batch.tokens / padding.input_ids.numel(),
                "model": name,
                "ms": median,
                "quartiles": [low, high],
                "tokens_per_s": 1e3 * batch.tokens / median,
                "mfu": 1e3 * useful / median / peak.flops if peak else None,
            }
        )
    return rows


# ------------------------------------------------------------------------------------------------------------- report


def ratios(rows: list[dict], impl: str) -> dict[str, float]:
    """Tokens a second of ours over the padded model's."""
    rate = {(row["preset"], row["longest"], row["model"]): row["tokens_per_s"] for row in rows}
    return {
        f"{preset} up to {longest}, tokens/s over {PADDED}": value / rate[preset, longest, PADDED]
        for (preset, longest, model), value in rate.items()
        if model == impl
    }


def report(curves: list[Curves], rows: list[dict], impl: str) -> str:
    lines = [
        "Training",
        "",
        f"| dropout | steps | first loss | last loss | falls | {impl} from fp32, nats | reference in bf16 from fp32, nats | agree |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for c in curves:
        near, far = c.distances
        verdicts = ["yes" if good else "**NO**" for good in (c.falls, c.agree)]
        lines.append(
            f"| {c.dropout:g} | {len(c.kernels)} | {c.kernels[0]:.3f} | {c.kernels[-1]:.3f} | {verdicts[0]} | {near:.5f} | {far:.5f} | {verdicts[1]} |"
        )
    lines += ["", "| BERT | longest | fill | model | ms a step (quartiles) | tokens/s | MFU |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        low, high = row["quartiles"]
        mfu = "-" if row["mfu"] is None else f"{100 * row['mfu']:.0f} %"
        lines.append(
            f"| {row['preset']} | {row['longest']} | {row['fill']:.2f} | {row['model']} | {row['ms']:.1f} ({low:.1f} to {high:.1f}) "
            f"| {row['tokens_per_s']:,.0f} | {mfu} |"
        )
    return "\n".join([*lines, ""])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for training.json and training.md")
    parser.add_argument("--seconds", type=float, default=120, help="what it may take, about (120)")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on a CPU")
    options = parser.parse_args()
    if not options.dry_run and not torch.cuda.is_available():
        print("bench_training: no GPU here; --dry-run shows the way of working without one")
        return 2

    device, impl = (torch.device("cpu"), "cpu") if options.dry_run else (torch.device("cuda"), "triton")
    sizes, speeds, steps = (DRY_CURVES, DRY_SPEED, DRY_STEPS) if options.dry_run else (CURVES, SPEED, STEPS)
    facts = header(device)
    curves: list[Curves] = []
    rows: list[dict] = []
    options.out.mkdir(parents=True, exist_ok=True)

    def write() -> None:
        found = [{"what": "curve", **c._asdict()} for c in curves] + [{"what": "speed", **row} for row in rows]
        Record(facts, found, ratios(rows, impl)).write(options.out, "training", report(curves, rows, impl))

    print(header_line(facts), flush=True)
    # The dry run's work is fixed, so that its outcome does not depend on how busy the machine is.
    curve_s, speed_s = options.seconds * CURVES_SHARE / 2, options.seconds * (1 - CURVES_SHARE) / len(speeds)
    curve_s, speed_s = (float("inf"), 0.0) if options.dry_run else (curve_s, speed_s)
    for dropout in (0.0, 0.1):
        curves.append(train_curves(sizes, steps, impl, dropout, device, curve_s))
        c = curves[-1]
        print(
            f"dropout {dropout:g}: {len(c.kernels)} steps, loss {c.kernels[0]:.3f} to {c.kernels[-1]:.3f}, from the fp32 curve: "
            f"{impl} {c.distances[0]:.5f}, reference in bf16 {c.distances[1]:.5f} nats",
            flush=True,
        )
        write()
    for case in speeds:
        rows += speed(case, impl, device, speed_s)
        for row in rows[-3:]:
            print(
                f"{row['preset']} up to {row['longest']}: {row['model']:24} {row['ms']:9.1f} ms {row['tokens_per_s']:12,.0f} tokens/s",
                flush=True,
            )
        write()
    return 0 if all(c.falls and c.agree for c in curves) else 1


if __name__ == "__main__":
    sys.exit(main())
