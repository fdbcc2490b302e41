"""Benchmark the data path: text to token ids, the loader, and memory as the corpus grows.

    python -m benchmarks.data.bench_data data/wiki.jsonl data/wiki --out FOLDER [--quick]

The second path is a dataset prepared from that text. Both sides use its tokenizer, and the loader
reads it.

Prepare. The rival is datasets + tokenizers, doing the same work. Each run is a separate process
(`data_jobs`), and the sides take turns. Both read the text, split it into sentences by the same
rules, encode them with the same WordPiece vocabulary and save the ids. Before anything is timed,
every document must have the same ids on both sides. The clock runs from the end of the imports to
the moment when the ids are saved; only ours are also flushed to the disk. `fastbert prepare` also
computes n-gram baselines, which the rival does not, so a row gives the seconds without and with
them. Hashes, manifest and report are included in both figures. On one core, each side has one
process. On two cores, each has two processes, and the rival also runs as one process whose
tokenizer has two threads; the ratio is against the faster of these two.

Growth. The text is repeated, and each copy of a document is made distinct. Copies add no new
words: a real corpus of that size has a few, the text itself (x 1) has many. Training a vocabulary
runs the same Rust code on both sides and is timed separately.

Loader. One process with one thread on one core; the loaders take turns. Ours yields packed batches
with sentence pairs and masks; the unit is real tokens per second. For reference there is also
datasets + DataLoader + transformers' DataCollatorForLanguageModeling. It does less: it makes no
pairs, and it pads (padding is not counted).

Memory. The peak of the largest process of `prepare`, without and with baselines, which count at
most 8 million tokens; and the loader's own memory.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.harness.machine import ROOT, header
from benchmarks.harness.record import Record, Row
from benchmarks.harness.tables_and_plots import OURS, colour, figure_of, save, table
from fastbert.data.batches import Batches
from fastbert.data.dataset import TokenDataset, open_dataset
from fastbert.data.prefetch import Prefetch
from fastbert.data.vocabulary import train_tokenizer
from fastbert.recipe import parse_config
from fastbert.training.picture import INK, MUTED

# Sequences of a step: the default, and the setting of fastbert/recipes/demo.toml.
SEQUENCES, DEMO_SEQUENCES = 256, 28
LENGTHS = (128, 512)


class Side(NamedTuple):
    """One way to prepare a corpus, as arguments of `data_jobs`."""

    name: str
    job: str
    processes: int
    cores: int
    threads: bool = False  # whether the tokenizer uses threads


SIDES = [
    Side("fastbert, 1 worker", "fastbert", 1, 1),
    Side("datasets, 1 process", "datasets", 1, 1),
    Side("fastbert, 2 workers", "fastbert", 2, 2),
    Side("datasets, 2 processes", "datasets", 2, 2),
    Side("datasets, 1 process of 2 threads", "datasets", 1, 2, threads=True),
]


def job(*arguments: object, threads: bool = False) -> dict[str, float]:
    """Run one job of `data_jobs` in a new process."""
    environment = {
        **os.environ,
        "TOKENIZERS_PARALLELISM": str(threads).lower(),
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-m", "benchmarks.data.data_jobs", *map(str, arguments)]
    result = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, check=True)
    return json.loads(result.stdout)


def repeat(text: Path, target: Path, times: int, documents: int | None) -> Path:
    """Write the first documents of a JSON lines file several times.

    A last line that differs makes each copy a different document.
    """
    texts = texts_of(text)[:documents]
    with target.open("w", encoding="utf-8") as file:
        for copy, document in itertools.product(range(times), texts):
            record = {"text": f"{document}\n{copy}" if copy else document}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    return target


def texts_of(path: Path) -> list[str]:
    """The documents of a JSON lines file."""
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line)["text"] for line in lines if line]


def check_same_ids(dataset: TokenDataset, rival: Path) -> int:
    """Check that both sides have the same documents, in any order; return their number."""
    import datasets  # pyright: ignore[reportMissingImports]

    splits = [_documents(dataset, name) for name in ("train", "heldout")]
    ours = Counter(_digest(ids) for split in splits for ids in split)
    rows: Any = datasets.load_from_disk(str(rival))
    theirs = Counter[bytes]()
    for number, row in enumerate(rows):
        ids = [token for sentence in row["input_ids"] for token in sentence]
        if not ids:
            continue
        theirs[key := _digest(ids)] += 1
        if theirs[key] > ours[key]:
            raise SystemExit(
                f"bench_data: document {number} of {rival} has different ids in {dataset.path}; "
                "the two sides cannot be compared"
            )
    if theirs != ours:
        raise SystemExit(
            f"bench_data: {dataset.path} has documents that are missing in {rival}; "
            "the two sides cannot be compared"
        )
    return sum(theirs.values())


def _digest(ids: list[int]) -> bytes:
    return hashlib.blake2b(np.array(ids, np.int64).tobytes(), digest_size=16).digest()


def _documents(dataset: TokenDataset, name: str) -> Iterator[list[int]]:
    split = dataset.split(name)
    bounds = split.first_token(split.first_sentence(np.arange(split.documents + 1)))
    for begin, end in itertools.pairwise(bounds):
        yield split.gather(np.array([begin]), np.array([end - begin])).tolist()


def bench_prepare(
    text: Path, tokenizer: Path, label: str, sides: list[Side], rounds: int, work: Path
) -> tuple[list[Row], dict[str, float]]:
    """A row for each side, and the ratios to the fastest rival with the same number of cores."""
    size = text.stat().st_size / 1e6
    runs: dict[Side, list[dict[str, float]]] = {side: [] for side in sides}
    for number in range(rounds + 1):
        folders = {side: work / f"{label}-{number}-{place}" for place, side in enumerate(sides)}
        for side, out in folders.items():
            found = job(
                side.job, text, tokenizer, out, side.processes, side.cores, threads=side.threads
            )
            if number:  # the first round warms the page cache; its ids are compared
                runs[side].append(found)
        if number == 0:
            ours = [open_dataset(out) for side, out in folders.items() if side.job == "fastbert"]
            documents = check_same_ids(ours[0], folders[sides[1]])
            if len({dataset.sha256 for dataset in ours}) > 1:
                raise SystemExit("bench_data: the dataset depends on the number of workers")
            print(
                f"{label}: {size:.1f} MB, {documents:,} documents, the same ids on both sides",
                flush=True,
            )
    tokens = runs[sides[0]][0]["tokens"]
    whole = {side: [run["seconds"] for run in runs[side]] for side in sides}
    same = {
        side: [run["seconds"] - run.get("baselines_s", 0.0) for run in runs[side]] for side in sides
    }
    rows: list[Row] = []
    ratios: dict[str, float] = {}
    for side in sides:
        seconds = statistics.median(same[side])
        row: Row = {
            "part": "prepare",
            "text": label,
            "mb": size,
            "side": side.name,
            "cores": side.cores,
            "seconds": seconds,
            "mb_per_s": size / seconds,
            "tokens_per_s": tokens / seconds,
            "with_baselines_s": statistics.median(whole[side]),
            "imports_s": statistics.median(run["imports_s"] for run in runs[side]),
        }
        if side.job == "fastbert":
            rivals = [
                other for other in sides if other.job != side.job and other.cores == side.cores
            ]
            rival = min(rivals, key=lambda other: statistics.median(whole[other]))
            quotients = [b / a for a, b in zip(same[side], whole[rival], strict=True)]
            row["ratio_low"], row["ratio"], row["ratio_high"] = statistics.quantiles(
                quotients, n=4, method="inclusive"
            )
            row["ratio_with_baselines"] = statistics.median(
                b / a for a, b in zip(whole[side], whole[rival], strict=True)
            )
            ratios[f"prepare, {label}, {side.processes} of {side.cores}"] = row["ratio"]
        rows.append(row)
        print(_prepare_line(row), flush=True)
    return rows, ratios


def _prepare_line(row: Row) -> str:
    ratio = (
        f"{row['ratio']:.2f}x ({row['ratio_low']:.2f} to {row['ratio_high']:.2f})"
        if "ratio" in row
        else ""
    )
    return (
        f"  {row['side']:34} {row['seconds']:6.2f} s {row['mb_per_s']:6.2f} MB/s "
        f"{row['tokens_per_s'] / 1e6:5.2f} M tokens/s  {ratio}"
    )


def bench_vocabulary(text: Path, rounds: int) -> Row:
    """Time our vocabulary training, which is deterministic, and that of tokenizers, in turns."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    texts = texts_of(text)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]

    def plain() -> None:
        made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        made.normalizer = normalizers.BertNormalizer(lowercase=True)
        made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        made.train_from_iterator(
            texts,
            trainers.WordPieceTrainer(vocab_size=8192, show_progress=False, special_tokens=special),
        )

    seconds: dict[str, list[float]] = {"seconds": [], "tokenizers_s": []}
    for _ in range(rounds):
        for name, train in (
            ("seconds", lambda: train_tokenizer(texts, 8192)),
            ("tokenizers_s", plain),
        ):
            began = time.perf_counter()
            train()
            seconds[name].append(time.perf_counter() - began)
    return {
        "part": "vocabulary",
        **{name: statistics.median(values) for name, values in seconds.items()},
    }


@contextmanager
def one_core() -> Iterator[None]:
    """Pin this process and the threads that it starts to one core; torch uses one thread."""
    cores, threads = os.sched_getaffinity(0), torch.get_num_threads()
    os.sched_setaffinity(0, sorted(cores)[:1])
    torch.set_num_threads(1)
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)
        torch.set_num_threads(threads)


def bench_loader(
    dataset: TokenDataset, rounds: int, slice_s: float
) -> tuple[list[Row], dict[str, float]]:
    """Real tokens per second of each loader; they run in turns for `slice_s` seconds each."""
    cases = {"fastbert, pairs of single sentences": _packed(dataset, "single", 128, DEMO_SEQUENCES)}
    for n in LENGTHS:
        cases[f"fastbert, pairs that fill {n}"] = _packed(dataset, "fill", n, SEQUENCES)
    for n in LENGTHS:
        cases[f"datasets + collator, windows of {n}"] = _collated(dataset, n, SEQUENCES)
    speeds: dict[str, list[float]] = {name: [] for name in cases}
    with one_core():
        for number in range(rounds + 1):
            for name, draw in cases.items():
                tokens, began, batches = 0, time.perf_counter(), draw(number)
                while (seconds := time.perf_counter() - began) < slice_s:
                    tokens += next(batches)
                batches.close()
                if number:
                    speeds[name].append(tokens / seconds)
    rows: list[Row] = []
    for name, values in speeds.items():
        low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
        rows.append(
            {"part": "loader", "loader": name, "tokens_per_s": middle, "low": low, "high": high}
        )
        print(
            f"  {name:40} {middle / 1e6:5.2f} M tokens/s ({low / 1e6:.2f} to {high / 1e6:.2f})",
            flush=True,
        )
    speed = {row["loader"]: row["tokens_per_s"] for row in rows}
    fill = {
        n: speed[f"fastbert, pairs that fill {n}"] / speed[f"datasets + collator, windows of {n}"]
        for n in LENGTHS
    }
    return rows, {f"loader, {n} tokens": ratio for n, ratio in fill.items()}


def _packed(
    dataset: TokenDataset, segments: str, length: int, sequences: int
) -> Callable[[int], Generator[int]]:
    """Our loader with its thread, restarted at each call; yields the real tokens of a step."""
    keys = (
        f'[objective]\nsegments = "{segments}"\n'
        f"[batch]\nmax_length = {length}\nsequences = {sequences}\n"
    )
    config = parse_config(
        f'data = "{dataset.path}"\n{keys}[model]\nmax_position_embeddings = 512\n', "bench_data"
    )
    batches = Batches(dataset, config)

    def draw(number: int) -> Generator[int]:
        with Prefetch(batches, number * 1000) as steps:
            for _, packs, _ in steps:
                yield sum(pack.tokens for pack in packs)

    return draw


def _collated(
    dataset: TokenDataset, length: int, sequences: int
) -> Callable[[int], Generator[int]]:
    """Windows of each document, shuffled, masked and padded; yields the real tokens of a batch.

    The windows are cut before the clock starts.
    """
    import datasets  # pyright: ignore[reportMissingImports]
    from transformers import AutoTokenizer, DataCollatorForLanguageModeling

    cls, sep, room = dataset.special.cls, dataset.special.sep, length - 2
    windows = [
        [cls, *ids[i : i + room], sep]
        for ids in _documents(dataset, "train")
        for i in range(0, len(ids), room)
    ]
    rows: Any = datasets.Dataset.from_dict({"input_ids": windows})
    collate = DataCollatorForLanguageModeling(
        AutoTokenizer.from_pretrained(dataset.tokenizer_dir), mlm_probability=0.15
    )

    def draw(number: int) -> Generator[int]:
        order = torch.Generator().manual_seed(number)
        while True:
            for batch in torch.utils.data.DataLoader(
                rows, sequences, shuffle=True, generator=order, collate_fn=collate
            ):
                yield int(batch["attention_mask"].sum())

    return draw


def bench_memory(
    text: Path, tokenizer: Path, sizes: tuple[int, ...], documents: int | None, work: Path
) -> list[Row]:
    """Megabytes of `prepare` with one worker, and of the loader, by the size of the text."""
    rows: list[Row] = []
    for times in sizes:
        source, out = repeat(text, work / "grown.jsonl", times, documents), work / f"grown-{times}"
        made = job("fastbert", source, tokenizer, out, 1, 1)
        row: Row = {
            "part": "memory",
            "text": f"x {times}",
            "mb": source.stat().st_size / 1e6,
            "tokens": made["tokens"],
            "prepare_mb": made["peak_before_baselines_mb"],
            "with_baselines_mb": made["peak_mb"],
            **{f"loader_{name}": value for name, value in job("loader", out).items()},
        }
        rows.append(row)
        sizes_of = ", ".join(f"{k} {v:.0f}" for k, v in row.items() if k.endswith("_mb"))
        print(f"  {row['text']:5} {row['mb']:7.1f} MB of text: {sizes_of}")
    return rows


def draw_memory(rows: list[Row], path: Path) -> None:
    figure, axes = figure_of(1, 1)
    ax = axes[0, 0]
    x = [row["mb"] for row in rows]
    baselines = "prepare, with baselines (of 8 M tokens at most)"
    for name, key, shade, marker in (
        (baselines, "with_baselines_mb", colour("transformers"), "o"),
        ("prepare, text to ids", "prepare_mb", OURS, "o"),
        ("loader (its own memory)", "loader_own_mb", MUTED, "s"),
    ):
        ax.plot(
            x,
            [row[key] for row in rows],
            color=shade,
            marker=marker,
            markersize=4,
            linewidth=1.4,
            label=name,
        )
    ax.set(
        xscale="log",
        xticks=x,
        xticklabels=[f"{value:.0f}" for value in x],
        xlabel="text (MB)",
        ylabel="peak memory of the process (MB)",
    )
    ax.minorticks_off()
    ax.set_ylim(bottom=0)
    ax.set_title(
        "Memory as the corpus grows", loc="left", color=INK, fontsize=10, fontweight="bold"
    )
    ax.legend(frameon=False, labelcolor=INK, fontsize=8)
    save(figure, path)


def report(rows: list[Row]) -> str:
    """The report in Markdown, starting with its title."""
    parts: dict[str, list[Row]] = {}
    for row in rows:
        parts.setdefault(row["part"], []).append(row)
    prepare = [
        [
            r["text"],
            r["side"],
            f"{r['cores']}",
            f"{r['seconds']:.2f}",
            f"{r['mb_per_s']:.2f}",
            f"{r['tokens_per_s'] / 1e6:.2f}",
        ]
        + (
            [
                f"**{r['ratio']:.2f}x** ({r['ratio_low']:.2f} to {r['ratio_high']:.2f})",
                f"{r['with_baselines_s']:.2f} s, {r['ratio_with_baselines']:.2f}x",
            ]
            if "ratio" in r
            else ["", ""]
        )
        for r in parts["prepare"]
    ]
    loaders = [
        [
            r["loader"],
            f"{r['tokens_per_s'] / 1e6:.2f} ({r['low'] / 1e6:.2f} to {r['high'] / 1e6:.2f})",
        ]
        for r in parts["loader"]
    ]
    keys = ("mb", "prepare_mb", "with_baselines_mb", "loader_own_mb", "loader_mapped_mb")
    memory = [[r["text"], *(f"{r[key]:.0f}" for key in keys)] for r in parts["memory"]]
    vocabulary = parts["vocabulary"][0]
    columns = (
        "text",
        "side",
        "cores",
        "s",
        "MB/s",
        "M tokens/s",
        "ratio (quartiles)",
        "with baselines",
    )
    grown = (
        "text",
        "MB",
        "prepare (MB)",
        "with baselines (MB)",
        "loader, its own (MB)",
        "loader, mapped pages (MB)",
    )
    return "\n\n".join(
        [
            "Data: text to ids, the loader, memory\n",
            "Text to token ids on disk, the same ids on both sides; "
            "seconds of work, after imports, median.\n\n" + table(columns, prepare),
            f"Training a vocabulary of 8,192 on the text: {vocabulary['seconds']:.2f} s; "
            f"tokenizers alone {vocabulary['tokenizers_s']:.2f} s.",
            "Loader on one core, million real tokens per second, median (quartiles).\n\n"
            + table(("loader", "M tokens/s"), loaders),
            "Memory as the text grows.\n\n" + table(grown, memory),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "text", type=Path, help="JSON lines with a field text, such as data/wiki.jsonl"
    )
    parser.add_argument(
        "dataset", type=Path, help="the dataset that fastbert prepare made from that text"
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for data.json, data.md and data.png"
    )
    parser.add_argument(
        "--quick", action="store_true", help="few documents and rounds, to check that it works"
    )
    given = parser.parse_args()
    dataset = open_dataset(given.dataset)
    tokenizer = dataset.tokenizer_dir.resolve()
    # Documents, sides, rounds by how often the text is repeated, repetitions for the memory, and
    # seconds of a loader's turn.
    documents, sides, rounds, sizes, slice_s = None, SIDES, {1: 3, 4: 2}, (1, 4, 16), 0.5
    if given.quick:
        documents, sides, rounds, sizes, slice_s = 100, SIDES[:2], {1: 2}, (1, 2), 0.05
    rows: list[Row] = []
    ratios: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for times in rounds:
            source = repeat(given.text, work / f"{times}.jsonl", times, documents)
            found, gained = bench_prepare(
                source, tokenizer, f"x {times}", sides, rounds[times], work
            )
            rows, ratios = rows + found, ratios | gained
        rows.append(bench_vocabulary(work / "1.jsonl", 2))
        print(
            f"vocabulary of 8,192: {rows[-1]['seconds']:.2f} s, "
            f"by tokenizers alone {rows[-1]['tokenizers_s']:.2f} s",
            flush=True,
        )
        print("loader, on one core:", flush=True)
        found, gained = bench_loader(dataset, rounds[1], slice_s)
        rows, ratios = rows + found, ratios | gained
        print("memory:", flush=True)
        rows += bench_memory(given.text, tokenizer, sizes, documents, work)
    Record(header(torch.device("cpu")), rows, ratios).write(given.out, "data", report(rows))
    draw_memory([row for row in rows if row["part"] == "memory"], given.out / "data.png")


if __name__ == "__main__":
    main()
