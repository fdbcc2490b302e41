"""A training step against transformers' BertForPreTraining, doing the same work.

    python -m benchmarks.step.bench_step data/wiki [--steps 13] [--seconds 300] \\
        [--lengths single fill full] [--out folder]

Both sides have the same weights, examples, masks and optimizer (fused AdamW), fp32, dropout 0.1,
and forward + backward + update. Both have the same heap setting (`fastbert.heap`); without it
transformers' large temporaries would cost it up to twice as much time, which would be unfair.
transformers runs in the usual way: padded to the longest sequence of the batch, with SDPA
attention, and with all positions projected onto the vocabulary. There are three kinds of lengths:
the demo's own pairs of single sentences ("single"), pairs that fill max_length as far as their
document allows ("fill"), and full sequences ("full"). Before anything is timed, both losses
without dropout must agree to 1e-4. Steps run in turns. The ratio is taken pair by pair; reported
are its median and quartiles.

The share of the ideal is the time that the full useful FLOPs (no padding, head only at masked
positions, every layer complete) would take at the GEMM rate measured in the same process, over
our time. Ours computes the last layer only for the rows that a loss reads, so the share can
exceed 100 %.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
import time
from pathlib import Path

import torch
import transformers

from benchmarks.harness.machine import header, header_line
from benchmarks.harness.record import Record
from benchmarks.harness.tables_and_plots import table
from fastbert.checkpoints.weight_names import to_hugging_face
from fastbert.config import ObjectiveConfig, RunConfig, parse_config
from fastbert.data.batches import Batches
from fastbert.data.dataset import TokenDataset, open_dataset
from fastbert.data.packing import PackedBatch
from fastbert.heap import keep_heap
from fastbert.machine import measure_gemm_rate
from fastbert.models.bert import BertForPreTraining, losses
from fastbert.planning.flops import training_flops

CASES = [("mini", 8192), ("small", 8192), ("small", 30522)]  # preset, vocabulary
SEQUENCES, MAX_LENGTH = 32, 128
WARM_UP, LEAST = 2, 3  # pairs of steps: not counted, and counted however slow they are


def draw(dataset: TokenDataset, segments: str, steps: int) -> list[PackedBatch]:
    """Real batches, at least four; the first two warm up the heap and the optimizers."""
    config = RunConfig(data=str(dataset.path), objective=ObjectiveConfig(segments=segments))
    config = dataclasses.replace(
        config, batch=dataclasses.replace(config.batch, sequences=SEQUENCES, max_length=MAX_LENGTH)
    )
    source = Batches(dataset, config)
    return [source.step(step)[0] for step in range(max(steps, 4))]


def pad(batch: PackedBatch) -> dict[str, torch.Tensor]:
    """The same examples as transformers' collator pads them: [B, longest], ignored labels -100."""
    lengths = batch.cu_seqlens.diff().tolist()

    def rows(x: torch.Tensor, fill: int) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence(
            list(x.split(lengths)), batch_first=True, padding_value=fill
        )

    labels = torch.full_like(batch.input_ids, -100).index_copy_(
        0, batch.masked_positions, batch.labels
    )
    return {
        "input_ids": rows(batch.input_ids, 0),
        "token_type_ids": rows(batch.token_type_ids, 0),
        "attention_mask": rows(torch.ones_like(batch.input_ids), 0),
        "labels": rows(labels, -100),
        "next_sentence_label": batch.next_sentence_labels,
    }


def fill_up(batch: PackedBatch) -> PackedBatch:
    """A batch with as many sequences, all of MAX_LENGTH tokens, 15 % of them masked.

    A corpus of long documents gives such batches.
    """
    draw = torch.Generator().manual_seed(int(batch.examples[0]))
    sequences, length = batch.sequences, MAX_LENGTH
    ids = batch.input_ids[torch.randint(batch.tokens, (sequences * length,), generator=draw)]
    chosen = (
        torch.rand(sequences, length - 2, generator=draw).argsort(1)[
            :, : round(0.15 * (length - 3))
        ]
        + 1
    )
    positions = (chosen.sort(1).values + torch.arange(sequences)[:, None] * length).flatten()
    return dataclasses.replace(
        batch,
        input_ids=ids,
        token_type_ids=(torch.arange(length) >= length // 2).long().repeat(sequences),
        position_ids=torch.arange(length).repeat(sequences),
        cu_seqlens=torch.arange(0, (sequences + 1) * length, length, dtype=torch.int32),
        max_seqlen=length,
        masked_positions=positions,
        labels=ids[positions],
        masked_total=len(positions),
    )


def compare(preset: str, vocab_size: int, batches: list[PackedBatch], seconds: float) -> dict:
    """Time both sides on the same batches in turns; use fewer batches if `seconds` are used up."""
    end = time.monotonic() + seconds
    torch.manual_seed(0)
    config = parse_config(f'data = "none"\n[model]\npreset = "{preset}"', "bench_step").model
    ours = BertForPreTraining(config, vocab_size)
    words = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    theirs = transformers.BertForPreTraining(
        transformers.BertConfig(vocab_size=vocab_size, **{w: getattr(config, w) for w in words})
    )
    missing, unexpected = theirs.load_state_dict(to_hugging_face(ours.state_dict()), strict=False)
    assert not unexpected and all("decoder" in name for name in missing), (missing, unexpected)

    def our_step(batch: PackedBatch) -> torch.Tensor:
        return losses(ours(batch)).loss

    def their_step(padded: dict[str, torch.Tensor]) -> torch.Tensor:
        return theirs(**padded).loss

    padded = [pad(batch) for batch in batches]
    for model in (ours, theirs):
        model.eval()
    with torch.no_grad():
        a, b = float(our_step(batches[0])), float(their_step(padded[0]))
    if abs(a - b) > 1e-4:
        raise SystemExit(
            f"{preset}, V = {vocab_size}: losses differ before timing: {a} against {b}"
        )
    for model in (ours, theirs):
        model.train()
    optimizers = {
        m: torch.optim.AdamW(m.parameters(), lr=1e-4, weight_decay=0.01, fused=True)
        for m in (ours, theirs)
    }

    def timed(model, step, batch) -> float:
        start = time.perf_counter()
        step(batch).backward()
        optimizers[model].step()
        optimizers[model].zero_grad(set_to_none=True)
        return time.perf_counter() - start

    pairs, rate = [], measure_gemm_rate(seconds=1.0)
    for index, (batch, padding) in enumerate(zip(batches, padded, strict=True)):
        pair = (timed(theirs, their_step, padding), timed(ours, our_step, batch))
        if index >= WARM_UP:
            pairs.append(pair)
        if len(pairs) >= LEAST and time.monotonic() > end:
            break
    # The rate is measured twice, because other load may have slowed one measurement.
    rate = max(rate, measure_gemm_rate(seconds=1.0))
    useful = statistics.mean(
        training_flops(config, vocab_size, b.cu_seqlens.diff().tolist(), len(b.labels), b.sequences)
        for b in batches[WARM_UP : WARM_UP + len(pairs)]
    )
    ratios = sorted(t / o for t, o in pairs)
    quartiles = statistics.quantiles(ratios, n=4)
    our_time = statistics.median(o for _, o in pairs)
    return {
        "model": preset,
        "vocab_size": vocab_size,
        "fill": sum(b.tokens for b in batches) / sum(p["input_ids"].numel() for p in padded),
        "pairs": len(pairs),
        "transformers_ms": 1e3 * statistics.median(t for t, _ in pairs),
        "fastbert_ms": 1e3 * our_time,
        "ratio": statistics.median(ratios),
        "quartiles": [quartiles[0], quartiles[2]],
        "gemm_gflops": rate / 1e9,
        "share_of_ideal": useful / rate / our_time,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "dataset", help="a folder made by `fastbert prepare`; its sequence lengths are timed"
    )
    parser.add_argument(
        "--steps", type=int, default=13, help="pairs of steps per row, two to warm up (13)"
    )
    parser.add_argument(
        "--lengths",
        nargs="+",
        choices=["single", "fill", "full"],
        default=["single", "full"],
        help="which lengths to time",
    )
    parser.add_argument("--out", type=Path, help="folder for step.json and step.md")
    parser.add_argument(
        "--seconds",
        type=float,
        default=math.inf,
        help="approximate duration; rows then have fewer steps",
    )
    arguments = parser.parse_args()
    keep_heap()
    end = time.monotonic() + arguments.seconds
    transformers.logging.set_verbosity_error()
    dataset = open_dataset(arguments.dataset)
    batches = {
        "single": draw(dataset, "single", arguments.steps),
        "fill": draw(dataset, "fill", arguments.steps),
    }
    batches["full"] = [fill_up(batch) for batch in batches["fill"]]

    facts = header(torch.device("cpu")) | {"transformers": transformers.__version__}
    print(f"{SEQUENCES} sequences a step, fp32, dropout 0.1; {header_line(facts)}")
    print(
        f"{'lengths':>7} {'model':>6} {'V':>6} {'fill':>5} {'transformers':>13} "
        f"{'fastbert':>9} {'ratio':>6} {'quartiles':>12} {'of ideal':>9}"
    )
    rows = []
    cases = [(lengths, *case) for lengths in arguments.lengths for case in CASES]
    for lengths, preset, vocab_size in cases:
        seconds = (end - time.monotonic()) / (len(cases) - len(rows))
        row = {"lengths": lengths, **compare(preset, vocab_size, batches[lengths], seconds)}
        rows.append(row)
        low, high = row["quartiles"]
        print(
            f"{lengths:>7} {preset:>6} {vocab_size:>6} {row['fill']:>5.2f} "
            f"{row['transformers_ms']:>10.0f} ms {row['fastbert_ms']:>6.0f} ms "
            f"{row['ratio']:>5.2f}x {low:>5.2f}-{high:<5.2f} {100 * row['share_of_ideal']:>7.0f} %",
            flush=True,
        )
    if arguments.out:
        ratios = {
            f"{r['model']}, V = {r['vocab_size']:,}, lengths {r['lengths']}, "
            "transformers' time over ours": r["ratio"]
            for r in rows
        }
        Record(facts, rows, ratios).write(
            arguments.out, "step", "A training step against transformers\n\n" + step_table(rows)
        )


def step_table(rows: list[dict]) -> str:
    """The report's table in Markdown."""
    words = {
        "single": "the demo's pairs",
        "fill": "pairs that fill up",
        "full": f"all {MAX_LENGTH}",
    }
    return table(
        (
            "lengths",
            "model",
            "V",
            "real tokens",
            "transformers",
            "fastbert",
            "ratio (quartiles)",
            "share of the ideal",
        ),
        [
            (
                words[row["lengths"]],
                row["model"],
                f"{row['vocab_size']:,}",
                f"{100 * row['fill']:.0f} %",
                f"{row['transformers_ms']:,.0f} ms",
                f"{row['fastbert_ms']:,.0f} ms",
                f"**{row['ratio']:.2f}x** ({row['quartiles'][0]:.2f} to {row['quartiles'][1]:.2f})",
                f"{100 * row['share_of_ideal']:.0f} %",
            )
            for row in rows
        ],
    )


if __name__ == "__main__":
    main()
