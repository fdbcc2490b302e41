"""Does pre-training pay? Fine-tune a pre-trained model, the same model from scratch, and others.

    python -m benchmarks.quality.bench_downstream data/labelled --data data/library-8192 \\
        --out FOLDER [--beside RUN] [--quick]
    python -m benchmarks.quality.bench_downstream data/labelled --record downstream.json \\
        --beside RUN --out FOLDER

`examples/labelled_texts.py` made the folder of texts: topics of encyclopedia articles and
sentiments of film reviews. The dataset for pre-training contains none of their test texts. Three
sides learn from the same examples: 500, 2,000 and all of them.

    bag of words    logistic regression on TF-IDF of words and word pairs (scikit-learn), which
                    takes seconds
    from scratch    the demo's model with the weights that its pre-training began with
    pre-trained     the model of `--model`, or one that is pre-trained here on the dataset with the
                    demo's recipe, in half an hour
    (any other)     each model of `--beside`, named after its folder; with `--record` only these
                    are measured and added to that record

A tenth of the training examples is held out. It selects each side's learning rate, on all
examples and with a seed that is not measured later (the bag of words selects its C, for every
seed); and it selects the best epoch. The test file is evaluated once, with the selected model.
There are five seeds; a seed changes the examples (where not all are taken), the new layer, dropout
and order, and for the model from scratch all weights. All models train for the same number of
steps. As many trials run at a time as there are cores. A finished trial is kept in
FOLDER/downstream-trials.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import math
import multiprocessing
import os
import subprocess
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks.harness.children import pretraining
from benchmarks.harness.machine import ROOT, header
from benchmarks.harness.record import Record, Row, once, read_record
from benchmarks.harness.tables_and_plots import OURS, figure_of, save, table
from fastbert import load
from fastbert.heap import keep_heap
from fastbert.models.build import build_model
from fastbert.tasks.finetune import Settings, finetune, spread
from fastbert.tasks.labelled import Examples, read_examples
from fastbert.tasks.scores import accuracy, f1
from fastbert.training.picture import INK, MUTED

RECIPE = ROOT / "fastbert/recipes/demo.toml"
# Half an hour on two cores. It is counted in tokens, so that a slow machine makes the same model.
PRETRAINING_TOKENS = 40_000_000
WORDS, SCRATCH, PRETRAINED = "bag of words", "from scratch", "pre-trained"
COLORS = {WORDS: "#9ca3af", SCRATCH: "#d97706", PRETRAINED: OURS}
BESIDE_COLORS = ("#059669", "#7c3aed", "#db2777")
TASKS = {"topics": "encyclopedia topics", "films": "film reviews"}
STRENGTHS = (1.0, 10.0, 100.0)  # values of C that the logistic regression tries
SEARCH_SEED = 0
BATCH, MAX_LENGTH, HELD_OUT = 32, 64, 0.1
LEAST_EPOCHS = 5


@dataclass(frozen=True)
class Extent:
    """How much is measured.

    Args:
        examples: numbers of training examples; None for all.
        seeds: seeds of the measured trials.
        rates: learning rates that are tried.
        steps: steps of one training.
    """

    examples: tuple[int | None, ...]
    seeds: tuple[int, ...]
    rates: tuple[float, ...]
    steps: int


FULL = Extent((500, 2000, None), (1, 2, 3, 4, 5), (5e-4, 1e-3, 2e-3), 1000)
QUICK = Extent((100,), (1,), (5e-4,), 20)


@dataclass(frozen=True)
class Job:
    """One training.

    Args:
        texts: folder with the labelled texts.
        model: the model's folder; None for the bag of words.
        task: a key of TASKS.
        side: what is trained.
        examples: number of training examples; None for all.
    """

    texts: Path
    model: Path | None
    task: str
    side: str
    examples: int | None
    seed: int
    lr: float = 0.0
    steps: int = FULL.steps

    @property
    def name(self) -> str:
        examples = "all" if self.examples is None else self.examples
        return f"{self.task:7} {examples:>5} {self.side:12} seed {self.seed}"


def read(job: Job) -> tuple[Examples, Examples]:
    """The training examples, which include the held-out part, and the test examples."""
    training, test = (
        read_examples(job.texts / f"{job.task}-{part}.jsonl") for part in ("train", "test")
    )
    order = torch.randperm(
        len(training), generator=torch.Generator().manual_seed(job.seed)
    ).tolist()
    return training.take(order[: job.examples]), test


def run(job: Job, folder: Path) -> Row:
    """The result of the trial, computed once and kept in the folder."""
    return once(file_of(job, folder), lambda: trial(job))


def file_of(job: Job, folder: Path) -> Path:
    return folder / f"{hashlib.sha256(repr(job).encode()).hexdigest()[:12]}.json"


def trial(job: Job) -> Row:
    """Train, and return the scores on the held-out part, used for selection, and on the test."""
    began = time.perf_counter()
    found = fine_tuned(job, job.model) if job.model else bag_of_words(job)
    facts = {key: value for key, value in asdict(job).items() if key not in ("texts", "model")}
    return {"part": "trial", **facts, **found, "seconds": time.perf_counter() - began}


def fine_tuned(job: Job, model: Path) -> Row:
    torch.set_num_threads(1)
    keep_heap()
    training, test = read(job)
    pretrained = load(model, device="cpu")
    if job.side == SCRATCH:
        torch.manual_seed(job.seed)
        begun = pretrained.config if pretrained.recipe is None else pretrained.recipe.model
        fresh = build_model(begun, pretrained.model.vocab_size)
        pretrained.model.load_state_dict(fresh.state_dict())
    epochs = max(LEAST_EPOCHS, math.ceil(job.steps * BATCH / len(training)))
    max_length = min(MAX_LENGTH, pretrained.max_length)
    settings = Settings(
        epochs=epochs,
        lr=job.lr,
        batch=BATCH,
        max_length=max_length,
        seed=job.seed,
        patience=epochs,
        heldout=HELD_OUT,
    )
    [trial] = finetune(pretrained, training, test, settings=settings).trials
    kept = max(trial.epochs, key=lambda epoch: epoch.score)
    return {
        "heldout": kept.score,
        "epoch": kept.epoch,
        "epochs": epochs,
        "test_accuracy": trial.scores["accuracy"],
        "test_f1": trial.scores["f1"],
    }


def bag_of_words(job: Job) -> Row:
    from sklearn.feature_extraction.text import TfidfVectorizer  # pyright: ignore[reportMissingImports]
    from sklearn.linear_model import LogisticRegression  # pyright: ignore[reportMissingImports]
    from sklearn.pipeline import make_pipeline  # pyright: ignore[reportMissingImports]

    training, test = read(job)
    count = round(HELD_OUT * len(training))
    held_out, rest = training.take(range(count)), training.take(range(count, len(training)))

    def fit(strength: float):
        words = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2), min_df=2)
        return make_pipeline(words, LogisticRegression(C=strength, max_iter=1000)).fit(
            rest.first, rest.labels
        )

    fitted = {strength: fit(strength) for strength in STRENGTHS}
    scores = {
        strength: model.score(held_out.first, held_out.labels) for strength, model in fitted.items()
    }
    best = max(scores, key=lambda strength: scores[strength])
    places = {label: i for i, label in enumerate(sorted(set(training.labels)))}
    answers, truth = (
        np.array([places[x] for x in of]) for of in (fitted[best].predict(test.first), test.labels)
    )
    return {
        "heldout": scores[best],
        "C": best,
        "test_accuracy": accuracy(answers, truth),
        "test_f1": f1(answers, truth, classes=2),
    }


def pretrain(dataset: Path, folder: Path) -> Path:
    """The run of the demo's recipe on the dataset, with more tokens; reused once it is finished."""
    made, finished = folder / "run", folder / "finished"
    if not finished.exists():
        resume = ["--resume"] if made.exists() else []
        settings = {
            "data": dataset,
            "run": made,
            "schedule.over": "tokens",
            "stop.tokens": PRETRAINING_TOKENS,
            "stop.seconds": 1e6,
        }
        subprocess.run([*pretraining(RECIPE, settings), *resume], check=True)
        finished.touch()
    return made


def searched(rows: Sequence[Row]) -> dict[tuple[str, str], float]:
    """For each task and side, the learning rate with the best score on the held-out part."""
    best: dict[tuple[str, str], Row] = {}
    for row in rows:
        key = (row["task"], row["side"])
        if key not in best or row["heldout"] > best[key]["heldout"]:
            best[key] = row
    return {key: row["lr"] for key, row in best.items()}


@contextlib.contextmanager
def workers() -> Iterator[Executor]:
    """Processes for `results`, at most one for each core; each starts when it is needed."""
    os.environ["OMP_NUM_THREADS"] = "1"  # for the processes
    with ProcessPoolExecutor(
        len(os.sched_getaffinity(0)), multiprocessing.get_context("spawn")
    ) as pool:
        yield pool


def results(jobs: Sequence[Job], kept: Path, pool: Executor) -> list[Row]:
    """The results in the order of the jobs; those that are not kept yet run in the pool."""
    missing = [job for job in jobs if not file_of(job, kept).exists()]
    made, rows = pool.map(run, missing, itertools.repeat(kept)), []
    for job in jobs:
        row = next(made) if job in missing else run(job, kept)
        print(
            f"{job.name}  lr {job.lr:g}  held out {row['heldout']:.1%}  {row['seconds']:.0f} s",
            flush=True,
        )
        rows.append(row)
    return rows


def search(
    texts: Path, models: Mapping[str, Path], extent: Extent, kept: Path, pool: Executor
) -> tuple[list[Row], dict[tuple[str, str], float]]:
    """Try every learning rate on each task and side; the rows, and the best rates."""
    jobs = [
        Job(texts, model, task, side, extent.examples[-1], SEARCH_SEED, lr, extent.steps)
        for task, (side, model), lr in itertools.product(TASKS, models.items(), extent.rates)
    ]
    rows = results(jobs, kept, pool)
    return rows, searched(rows)


def sides(rows: Iterable[Row]) -> list[str]:
    """The sides in the order of the table: the bag of words, then the models."""
    return [WORDS, *dict.fromkeys(row["side"] for row in rows if row["part"] == "model")]


def measured(rows: Iterable[Row]) -> list[Row]:
    """The trials without those of the search for a learning rate."""
    return [row for row in rows if row["part"] == "trial" and row["seed"] != SEARCH_SEED]


def groups(rows: Sequence[Row]) -> Iterator[tuple[str, int | None, dict[str, list[Row]]]]:
    """The measured trials, grouped by task, number of examples and side."""
    found: dict[tuple[str, int | None], dict[str, list[Row]]] = {}
    for row in measured(rows):
        group = found.setdefault((row["task"], row["examples"]), {s: [] for s in sides(rows)})
        group[row["side"]].append(row)
    for (task, examples), trials in found.items():
        yield task, examples, trials


def downstream_table(rows: Sequence[Row]) -> str:
    """Markdown table: accuracy on the test by task, number of examples and side."""
    facts = {row["task"]: row for row in rows if row["part"] == "task"}
    lines = []
    for task, examples, trials in groups(rows):
        cells = [spread([row["test_accuracy"] for row in of]) for of in trials.values()]
        gain = spread(
            [
                a["test_accuracy"] - b["test_accuracy"]
                for a, b in zip(trials[PRETRAINED], trials[SCRATCH], strict=True)
            ]
        )
        lines.append(
            [
                TASKS[task],
                f"{examples or facts[task]['training']:,}",
                f"{facts[task]['majority']:.1%}",
                *(f"{cell.mean:.1%} ± {cell.std:.1%}" for cell in cells),
                f"**{100 * gain.mean:+.1f}** ± {100 * gain.std:.1f}",
            ]
        )
    return table(
        [
            "task",
            "examples",
            "most frequent label",
            *sides(rows),
            "pre-trained - from scratch, points",
        ],
        lines,
    )


def draw(rows: Sequence[Row], path: Path) -> None:
    """Plot accuracy over the number of labelled examples, one panel per task."""
    facts = {row["task"]: row for row in rows if row["part"] == "task"}
    names = sides(rows)
    colors = dict(zip(names, (*COLORS.values(), *BESIDE_COLORS), strict=False))
    figure, axes = figure_of(1, len(TASKS))
    for ax, (task, title) in zip(axes[0], TASKS.items(), strict=True):
        found = [
            (examples or facts[task]["training"], trials)
            for of, examples, trials in groups(rows)
            if of == task
        ]
        sizes = [size for size, _ in found]
        for side in names:
            cells = [
                spread([100 * row["test_accuracy"] for row in trials[side]]) for _, trials in found
            ]
            means, stds = [cell.mean for cell in cells], [cell.std for cell in cells]
            ax.errorbar(
                sizes,
                means,
                stds,
                color=colors[side],
                label=side,
                linewidth=2,
                marker="o",
                markersize=4,
                capsize=3,
            )
        most = 100 * facts[task]["majority"]
        ax.axhline(most, color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)), zorder=0)
        ax.annotate(
            "most frequent label",
            (1, most),
            xycoords=("axes fraction", "data"),
            xytext=(0, 3),
            textcoords="offset points",
            ha="right",
            color=MUTED,
            fontsize=8,
        )
        ax.set_xscale("log")
        ax.set_xticks(sizes, [f"{size:,}" for size in sizes])
        ax.minorticks_off()
        ax.set_title(title, color=INK, fontsize=10, loc="left")
        ax.set_xlabel("labelled examples", color=MUTED)
    axes[0][0].set_ylabel("accuracy on the test, %", color=MUTED)
    legend = figure.legend(
        *axes[0][0].get_legend_handles_labels(),
        loc="outside upper center",
        ncols=4,
        frameon=False,
        labelcolor=INK,
        fontsize=9,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)  # a side is named after a folder, which may contain a $
    save(figure, path)


def describe_task(texts: Path, task: str) -> Row:
    training, test = read(Job(texts, None, task, WORDS, None, SEARCH_SEED))
    most = max(Counter(test.labels).values()) / len(test)
    return {
        "part": "task",
        "task": task,
        "training": len(training),
        "test": len(test),
        "labels": len(set(test.labels)),
        "majority": most,
    }


def describe_model(side: str, path: Path, commit: str) -> Row:
    model = load(path, device="cpu")
    sizes = {name: getattr(model.config, name) for name in ("num_hidden_layers", "hidden_size")}
    parameters = sum(p.numel() for p in model.model.parameters())
    return {
        "part": "model",
        "side": side,
        "parameters": parameters,
        **sizes,
        "vocab_size": model.model.vocab_size,
        "commit": commit,
    }


def recorded_rows(path: Path) -> list[Row]:
    """The rows of a record; each model gets the commit at which it was measured."""
    record = read_record(path)
    return [
        {"commit": record.header["commit"], **row} if row["part"] == "model" else row
        for row in record.rows
    ]


def comparable(recorded: Sequence[Row], texts: Path, extent: Extent) -> bool:
    """Whether the record's trials have the settings and texts of this run."""
    trials = {(row["examples"], row["seed"], row["steps"]) for row in measured(recorded)}
    wanted = set(itertools.product(extent.examples, extent.seeds, (extent.steps,)))
    tasks = [row for row in recorded if row["part"] == "task"]
    return trials == wanted and tasks == [describe_task(texts, task) for task in TASKS]


def models_table(rows: Sequence[Row]) -> str:
    """Markdown table of the models, each with the commit at which it was measured.

    The bag of words has no row; it was measured at the first model's commit.
    """
    sizes = ("num_hidden_layers", "hidden_size", "vocab_size")
    models = [row for row in rows if row["part"] == "model"]
    lines = [
        [
            row["side"],
            *(f"{row[size]:,}" for size in sizes),
            f"{row['parameters'] / 1e6:.2f} M",
            row["commit"],
        ]
        for row in models
    ]
    return table(
        ["model", "layers", "hidden size", "vocabulary", "parameters", "measured at commit"], lines
    )


def report(rows: Sequence[Row]) -> str:
    """The report in Markdown, starting with its title."""
    rates = {
        (row["task"], row["side"]): row["lr"]
        for row in rows
        if row["part"] == "trial" and row["side"] != WORDS
    }
    tasks = "; ".join(
        f"{TASKS[row['task']]}: {row['labels']} labels, {row['test']:,} examples in the test"
        for row in rows
        if row["part"] == "task"
    )
    return "\n\n".join(
        [
            "Does pre-training pay? Fine-tuning against training from scratch",
            f"Accuracy on the test, mean and standard deviation of seeds; {tasks}.",
            downstream_table(rows),
            "![accuracy over labelled examples](downstream.png)",
            models_table(rows),
            "Learning rates, chosen on a held-out part of the training examples:",
            table(
                ["task", "side", "learning rate"],
                [[TASKS[task], side, f"{lr:g}"] for (task, side), lr in rates.items()],
            ),
        ]
    )


def check_texts(parser: argparse.ArgumentParser, texts: Path) -> None:
    """End with an error if the folder does not contain the two tasks."""
    if not (texts / "pretrain.jsonl").is_file():
        parser.error(
            f"{texts}: not a folder made by examples/labelled_texts.py; "
            "run make data/labelled/pretrain.jsonl to make one"
        )


def arguments() -> tuple[argparse.Namespace, list[Row]]:
    """The parsed command line, and the rows of `--record`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("texts", type=Path, help="the folder that examples/labelled_texts.py made")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path, help="the dataset to pre-train on")
    parser.add_argument(
        "--model",
        type=Path,
        help="use this run or exported folder instead; it must not have seen the test texts",
    )
    parser.add_argument(
        "--beside",
        type=Path,
        action="append",
        default=[],
        help="a further model, under the same condition; may be repeated",
    )
    parser.add_argument(
        "--record",
        type=Path,
        help="an existing downstream.json; adds the models of --beside to it, with its settings",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="100 examples, one seed, no search, to check that it works",
    )
    given = parser.parse_args()
    check_texts(parser, given.texts)
    for path in filter(None, (given.model, *given.beside)):
        if not path.is_dir():
            parser.error(f"{path}: no such model folder")
    if given.record and (given.model or given.data or not given.beside):
        parser.error(
            "--record measures only the models of --beside; "
            "give it with --beside, and without --data and --model"
        )
    if given.record and not given.record.is_file():
        parser.error(
            f"--record {given.record}: no such file; recorded ones are in benchmarks/results/"
        )
    there = given.data and (given.data / "manifest.json").is_file()
    if not (given.record or given.model or there):
        parser.error(
            f"--data {given.data}: no dataset to pre-train on; "
            "run make data/library-8192/manifest.json to make one, or choose a model with --model"
        )
    names, recorded = list(COLORS), []
    if given.record:
        try:
            recorded = recorded_rows(given.record)
            same = comparable(recorded, given.texts, QUICK if given.quick else FULL)
        except (ValueError, TypeError, KeyError):  # not JSON, or JSON of another kind
            parser.error(
                f"--record {given.record}: not a downstream.json written by this benchmark"
            )
        if not same:
            parser.error(
                f"--record {given.record}: was measured with other settings, or with other texts "
                f"than {given.texts}, so a new side cannot be compared with it"
            )
        names = sides(recorded)
    for path in given.beside:
        if path.name in names:
            parser.error(
                f"--beside {path}: there is already a side named {path.name!r}; rename the folder"
            )
        names.append(path.name)
    if len(names) > (most := len(COLORS) + len(BESIDE_COLORS)):
        parser.error(
            f"--beside {given.beside[-1]}: {len(names)} sides, but the figure can show at most "
            f"{most}; leave some out"
        )
    return given, recorded


def main() -> None:
    given, recorded = arguments()
    extent = QUICK if given.quick else FULL
    kept = given.out / "downstream-trials"
    kept.mkdir(parents=True, exist_ok=True)
    words = () if recorded else (WORDS,)
    models = {path.name: path for path in given.beside}
    if not recorded:
        model = given.model or pretrain(given.data, given.out / "downstream-model")
        models = {SCRATCH: model, PRETRAINED: model} | models
    with workers() as pool:
        tried, best = search(given.texts, models, extent, kept, pool)
        jobs = [
            Job(
                given.texts,
                models.get(side),
                task,
                side,
                examples,
                seed,
                best.get((task, side), 0.0),
                extent.steps,
            )
            for task, examples, side, seed in itertools.product(
                TASKS, extent.examples, (*words, *models), extent.seeds
            )
        ]
        trials = results(jobs, kept, pool)
    machine = header(torch.device("cpu"))
    described = [describe_model(side, path, machine["commit"]) for side, path in models.items()]
    tasks = [] if recorded else [describe_task(given.texts, task) for task in TASKS]
    rows = [*recorded, *described, *tasks, *tried, *trials]
    text = report(rows)
    draw(rows, given.out / "downstream.png")
    Record(machine, rows).write(given.out, "downstream", text)
    print(text)


if __name__ == "__main__":
    main()
