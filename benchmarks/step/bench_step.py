"""A training step against transformers, doing the same work: BertForPreTraining, ModernBERT.

    python -m benchmarks.step.bench_step data/wiki [--steps 9] [--seconds 300] \\
        [--lengths single fill full] [--compile] [--out folder]

All sides have the same weights, examples, masks and optimizer (fused AdamW), dropout 0.1 in BERT
and none in ModernBERT, and forward + backward + update. All have the same heap setting
(`fastbert.heap`); without it transformers' large temporaries would cost it up to twice as much
time, which would be unfair.

transformers runs as its documentation sets it up for this processor: padded to the longest
sequence of the batch, with SDPA attention, in fp32 and under `torch.autocast("cpu",
torch.bfloat16)`; with --compile also through `torch.compile(dynamic=True)`. BERT projects all
positions onto the vocabulary; ModernBERT has `sparse_prediction`, which projects masked tokens
alone, and is given it. The rival is the fastest of these. Ours runs as `fastbert pretrain`
runs it, with a pack in each process, in fp32 and with the operands of large products in bf16. Where
the processor has no bf16 instructions, there are no sides in bf16.

There are three kinds of lengths for BERT: the demo's own pairs of single sentences ("single"),
pairs that fill max_length as far as their document allows ("fill"), and full sequences ("full").
ModernBERT has parts of documents of up to 512 tokens ("long"), and full sequences ("long full").
transformers packs no sequences for SDPA; it would do so for FlashAttention, which needs a GPU.

Before anything is timed, the losses without dropout must agree: to 1e-4 in fp32, and to the
rounding of bf16 otherwise. Steps run in turns, each one twice, and the second is timed: oneDNN
compiles operations for the shapes of a batch, which a long run does only while it begins. Each
ratio is taken step by step; reported are its median and quartiles.

The share of the ideal is the time that the full useful FLOPs (no padding, head only at masked
positions, every layer complete) would take at the GEMM rate measured in the same process, over our
time in fp32. Ours computes the last layer only for the rows that a loss reads, so the share can
exceed 100 %.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers

from benchmarks.harness.machine import header, header_line
from benchmarks.harness.record import Record
from benchmarks.harness.tables_and_plots import table
from fastbert.checkpoints.hugging_face_config import written
from fastbert.checkpoints.weight_names import to_hugging_face
from fastbert.config import BatchConfig, ModelConfig, ObjectiveConfig, RunConfig
from fastbert.data.batches import Batches
from fastbert.data.dataset import TokenDataset, open_dataset
from fastbert.data.manifest import SpecialIds
from fastbert.data.packing import PackedBatch
from fastbert.heap import keep_heap
from fastbert.machine import measure_gemm_rate, probe_bf16, processes_for
from fastbert.models.build import build_model
from fastbert.models.heads import losses
from fastbert.planning.flops import training_flops
from fastbert.recipe import parse_config
from fastbert.training.parallel_model import ParallelModel

CASES = [("mini", 8192), ("small", 8192), ("small", 30522)]  # preset, vocabulary; of BERT
MODERNBERT_CASES = [("mini", 8192)]
SEQUENCES, MAX_LENGTH = 32, 128
LONG_SEQUENCES, LONG = 16, 512  # of "long" and "long full"
# What transformers' models take; ModernBERT takes the first three.
PADDED = ("input_ids", "attention_mask", "labels", "token_type_ids", "next_sentence_label")
WARM_UP, LEAST = 2, 3  # steps of each side: not counted, and counted however slow they are
BF16 = 2.0**-8  # its rounding, relative

Packs = list[PackedBatch]  # those of a step, one for each process


def draw(dataset: TokenDataset, lengths: str, steps: int, at_once: int = 1) -> list[Packs]:
    """Real batches, at least four; the first two warm up the heap and the optimizers."""
    if lengths == "long":
        objective, sequences, longest = ObjectiveConfig(kind="mlm"), LONG_SEQUENCES, LONG
    else:
        objective, sequences, longest = ObjectiveConfig(segments=lengths), SEQUENCES, MAX_LENGTH
    batch = BatchConfig(sequences=sequences, max_length=longest)
    config = RunConfig(data=str(dataset.path), objective=objective, batch=batch)
    source = Batches(dataset, config)
    return [source.step(step, at_once=at_once) for step in range(max(steps, 4))]


def pad(packs: Packs) -> dict[str, torch.Tensor]:
    """The same examples as transformers' collator pads them: [B, longest], ignored labels -100."""

    def rows(of_pack: Callable[[PackedBatch], torch.Tensor], fill: int) -> torch.Tensor:
        sequences = [
            x for pack in packs for x in of_pack(pack).split(pack.cu_seqlens.diff().tolist())
        ]
        return torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=fill)

    def labels(pack: PackedBatch) -> torch.Tensor:
        ignored = torch.full_like(pack.input_ids, -100)
        return ignored.index_copy_(0, pack.masked_positions, pack.labels)

    return {
        "input_ids": rows(lambda pack: pack.input_ids, 0),
        "token_type_ids": rows(lambda pack: pack.token_type_ids, 0),
        "attention_mask": rows(lambda pack: torch.ones_like(pack.input_ids), 0),
        "labels": rows(labels, -100),
        "next_sentence_label": torch.cat([pack.next_sentence_labels for pack in packs]),
    }


def fill_up(packs: Packs, length: int = MAX_LENGTH) -> Packs:
    """As many sequences, all of this length, 15 % of their tokens masked.

    A corpus of long documents gives such batches.
    """
    filled = [_fill_up(pack, length) for pack in packs]
    total = sum(len(pack.labels) for pack in filled)
    return [dataclasses.replace(pack, masked_total=total) for pack in filled]


def _fill_up(batch: PackedBatch, length: int) -> PackedBatch:
    draw = torch.Generator().manual_seed(int(batch.examples[0]))
    sequences = batch.sequences
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
    )


@dataclass(frozen=True)
class Side:
    """One way to do a step.

    Attributes:
        name: ours or transformers', with its precision, as in the table.
        model: with dropout, as a run has it.
        loss: the loss of a step, from `Packs` for ours and from `pad` of them for theirs.
        optimizer: of the model.
        threads: torch's, of the main thread; a run has one where packs are in processes.
    """

    name: str
    model: torch.nn.Module
    loss: Callable[[Any], torch.Tensor]
    optimizer: torch.optim.Optimizer
    threads: int

    @property
    def is_ours(self) -> bool:
        return self.name.startswith("fastbert")

    def time(self, batch: Any) -> float:
        torch.set_num_threads(self.threads)
        start = time.perf_counter()
        self.loss(batch).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - start


class Case(NamedTuple):
    """A row of the table."""

    lengths: str
    type: str  # of the model
    preset: str
    vocab_size: int

    @property
    def config(self) -> ModelConfig:
        model = f'[model]\ntype = "{self.type}"\npreset = "{self.preset}"\n'
        kind = "mlm" if self.type == "modernbert" else "mlm+nsp"
        return parse_config(f'data = "x"\n{model}[objective]\nkind = "{kind}"', "case").model


def their_model(config: ModelConfig, vocab_size: int) -> torch.nn.Module:
    """The model of transformers, with the settings that its documentation gives for training."""
    settings: dict[str, Any] = written(config, SpecialIds(pad=0, unk=1, cls=2, sep=3, mask=4))
    settings["vocab_size"] = vocab_size
    if config.type == "modernbert":
        settings["sparse_prediction"] = True
        return transformers.ModernBertForMaskedLM(transformers.ModernBertConfig(**settings))
    return transformers.BertForPreTraining(transformers.BertConfig(**settings))


def sides(
    config: ModelConfig,
    vocab_size: int,
    at_once: int,
    bf16: bool,
    compiled: bool,
    ends: ExitStack,
) -> list[Side]:
    """All sides of a comparison; they have the same weights. `ends` closes what they start."""
    torch.manual_seed(0)
    first = build_model(config, vocab_size)
    kept = PADDED if config.type == "bert" else PADDED[:3]
    found, every = list[Side](), torch.get_num_threads()

    def add(name: str, model: torch.nn.Module, loss: Callable[[Any], torch.Tensor]) -> None:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01, fused=True)
        found.append(Side(name, model, loss, optimizer, torch.get_num_threads()))
        torch.set_num_threads(every)

    for precision in ("fp32", "bf16") if bf16 else ("fp32",):
        for how in ("", " compiled") if compiled else ("",):
            theirs = their_model(config, vocab_size)
            missing, unexpected = theirs.load_state_dict(
                to_hugging_face(first.state_dict(), config), strict=False
            )
            assert not unexpected and all("decoder" in n for n in missing), (missing, unexpected)
            call = torch.compile(theirs, dynamic=True) if how else theirs

            def their_loss(padded: Any, call: Any = call, low: bool = precision == "bf16"):
                with torch.autocast("cpu", torch.bfloat16, enabled=low):
                    return call(**{name: padded[name] for name in kept}).loss.float()

            add(f"transformers {precision}{how}", theirs, their_loss)
        ours = build_model(config, vocab_size)
        ours.load_state_dict(first.state_dict())
        ours.operands = torch.bfloat16 if precision == "bf16" else None
        parallel = ParallelModel(ours, at_once)

        def our_loss(packs: Packs, call: Any = parallel) -> torch.Tensor:
            return torch.stack([losses(outputs).loss for outputs in call(packs)]).sum()

        add(f"fastbert {precision}", ours, our_loss)
        ends.callback(parallel.close)
    return found


def check(found: list[Side], packs: Packs) -> None:
    """Check that the losses without dropout agree.

    Ours evaluates in fp32 whatever it trains in; tests/test_rounded_operands.py checks its bf16.

    Raises:
        SystemExit: they do not.
    """
    first, padded = None, pad(packs)
    for side in found:
        side.model.eval()
        with torch.no_grad():
            value = float(side.loss(packs if side.is_ours else padded))
        side.model.train()
        first = value if first is None else first
        tolerance = BF16 * first if "bf16" in side.name else 1e-4
        if not abs(value - first) <= tolerance:
            raise SystemExit(f"losses differ before timing: {side.name} {value}, not {first}")


def compare(
    case: Case,
    batches: list[Packs],
    bf16: bool,
    compiled: bool,
    seconds: float,
    ends: ExitStack,
) -> dict[str, Any]:
    """Time all sides on the same batches in turns; use fewer batches if `seconds` are used up."""
    end = time.monotonic() + seconds
    config, vocab_size = case.config, case.vocab_size
    rate = measure_gemm_rate(seconds=1.0)
    found = sides(config, vocab_size, len(batches[0]), bf16, compiled, ends)
    check(found, batches[0])
    times: dict[str, list[float]] = {side.name: [] for side in found}
    padded = [pad(packs) for packs in batches]
    for index in range(len(batches)):
        for side in found:
            batch = batches[index] if side.is_ours else padded[index]
            side.time(batch)
            taken = side.time(batch)
            if index >= WARM_UP:
                times[side.name].append(taken)
        if index - WARM_UP + 1 >= LEAST and time.monotonic() > end:
            break
    torch.set_num_threads(found[0].threads)
    # The rate is measured twice, because other load may have slowed one measurement.
    rate = max(rate, measure_gemm_rate(seconds=1.0))
    medians = {name: statistics.median(values) for name, values in times.items()}
    steps = len(times["fastbert fp32"])
    useful = statistics.mean(
        training_flops(
            config,
            vocab_size,
            [n for pack in packs for n in pack.cu_seqlens.diff().tolist()],
            sum(len(pack.labels) for pack in packs),
            sum(pack.sequences for pack in packs),
        )
        for packs in batches[WARM_UP : WARM_UP + steps]
    )
    tokens = sum(pack.tokens for packs in batches for pack in packs)

    def ratio(theirs: str, ours: str) -> list[float]:
        """Return the median and both quartiles."""
        values = [t / o for t, o in zip(times[theirs], times[ours], strict=True)]
        low, _, high = statistics.quantiles(values, n=4)
        return [statistics.median(values), low, high]

    best = min(
        (name for name in medians if name.startswith("transformers")),
        key=lambda name: medians[name],
    )
    mine = f"fastbert {'bf16' if bf16 else 'fp32'}"
    return {
        "lengths": case.lengths,
        "model": case.preset if case.type == "bert" else f"{case.type} {case.preset}",
        "vocab_size": vocab_size,
        "fill": tokens / sum(p["input_ids"].numel() for p in padded),
        "steps": steps,
        "ms": {name: 1e3 * value for name, value in medians.items()},
        "best_rival": best,
        "ours": mine,
        "to_best": ratio(best, mine),
        "to_fp32": ratio("transformers fp32", mine),
        "fp32_to_fp32": ratio("transformers fp32", "fastbert fp32"),
        "gemm_gflops": rate / 1e9,
        "share_of_ideal": useful / rate / medians["fastbert fp32"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "dataset", help="a folder made by `fastbert prepare`; its sequence lengths are timed"
    )
    parser.add_argument(
        "--steps", type=int, default=9, help="steps of each side, two to warm up (9)"
    )
    parser.add_argument(
        "--lengths",
        nargs="+",
        choices=["single", "fill", "full", "long", "long full"],
        default=["single", "full", "long", "long full"],
        help="which lengths to time",
    )
    parser.add_argument(
        "--compile", action="store_true", help="also transformers through torch.compile"
    )
    parser.add_argument("--out", type=Path, help="folder for step.json and step.md")
    parser.add_argument(
        "--seconds",
        type=float,
        default=math.inf,
        help="approximate duration; rows then have fewer steps",
    )
    given = parser.parse_args()
    keep_heap()
    end = time.monotonic() + given.seconds
    transformers.logging.set_verbosity_error()
    dataset, probe = open_dataset(given.dataset), probe_bf16()
    at_once = processes_for(SEQUENCES, torch.get_num_threads())
    processes = {"long": processes_for(LONG_SEQUENCES, torch.get_num_threads())}
    batches = {
        name: draw(dataset, name, given.steps, processes.get(name, at_once))
        for name in ("single", "fill", "long")
    }
    batches["full"] = [fill_up(packs) for packs in batches["fill"]]
    batches["long full"] = [fill_up(packs, LONG) for packs in batches["long"]]

    facts = header(torch.device("cpu")) | {"transformers": transformers.__version__}
    print(
        f"{SEQUENCES} sequences a step, {LONG_SEQUENCES} of the long ones; BERT's dropout 0.1; "
        f"{probe.why}; {header_line(facts)}"
    )
    rows = []
    cases = [
        Case(lengths, kind, *case)
        for lengths in given.lengths
        for kind, some in (("bert", CASES), ("modernbert", MODERNBERT_CASES))
        if (kind == "modernbert") == lengths.startswith("long")
        for case in some
    ]
    for case in cases:
        seconds = (end - time.monotonic()) / (len(cases) - len(rows))
        with ExitStack() as ends:
            rows.append(
                compare(case, batches[case.lengths], probe.gain > 0, given.compile, seconds, ends)
            )
        print(step_line(rows[-1]), flush=True)
    if given.out:
        ratios = {
            f"{row['model']}, V = {row['vocab_size']:,}, lengths {row['lengths']}, {what}": row[
                key
            ][0]
            for row in rows
            for key, what in (
                ("fp32_to_fp32", "transformers' time over ours, both in fp32"),
                ("to_best", "transformers' best time over ours"),
            )
        }
        Record(facts, rows, ratios).write(
            given.out, "step", "A training step against transformers\n\n" + step_table(rows)
        )


def step_line(row: dict[str, Any]) -> str:
    """A row as a line of text."""
    times = ", ".join(f"{name} {ms:,.0f} ms" for name, ms in row["ms"].items())
    ratios = ", ".join(
        f"{row[key][0]:.2f}x ({row[key][1]:.2f} to {row[key][2]:.2f}) {what}"
        for key, what in (
            ("to_best", f"of {row['best_rival']}"),
            ("to_fp32", "of transformers fp32"),
            ("fp32_to_fp32", "both fp32"),
        )
    )
    return (
        f"{row['lengths']} {row['model']} V={row['vocab_size']} fill {row['fill']:.2f}: "
        f"{times}\n    {ratios}, {100 * row['share_of_ideal']:.0f} % of the ideal in fp32"
    )


def step_table(rows: list[dict[str, Any]]) -> str:
    """The report's table in Markdown."""
    words = {
        "single": "the demo's pairs",
        "fill": "pairs that fill up",
        "full": f"all {MAX_LENGTH}",
        "long": f"parts of documents, up to {LONG}",
        "long full": f"all {LONG}",
    }

    def times(row: dict[str, Any], whose: str) -> str:
        values = {n.removeprefix(whose): t for n, t in row["ms"].items() if n.startswith(whose)}
        return " / ".join(f"{ms:,.0f}" for ms in values.values()) + " ms"

    def ratio(values: list[float]) -> str:
        return f"**{values[0]:.2f}x** ({values[1]:.2f} to {values[2]:.2f})"

    return table(
        (
            "lengths",
            "model",
            "V",
            "real tokens",
            "transformers fp32 / bf16",
            "fastbert fp32 / bf16",
            "its best over our bf16 (quartiles)",
            "its fp32 over our bf16",
            "both fp32",
            "share of the ideal in fp32",
        ),
        [
            (
                words[row["lengths"]],
                row["model"],
                f"{row['vocab_size']:,}",
                f"{100 * row['fill']:.0f} %",
                times(row, "transformers "),
                times(row, "fastbert "),
                ratio(row["to_best"]),
                f"{row['to_fp32'][0]:.2f}x",
                f"{row['fp32_to_fp32'][0]:.2f}x",
                f"{100 * row['share_of_ideal']:.0f} %",
            )
            for row in rows
        ],
    )


if __name__ == "__main__":
    main()
