"""Does pre-training pay? Fine-tuning our model against the same model from scratch, and against a bag of words.

    python -m benchmarks.bench_downstream data/labelled --out FOLDER [--model RUN] [--quick]

`examples/labelled_texts.py` made the folder of texts: topics of encyclopedia articles, and verdicts of film reviews, which the model has
never read anything like. Three sides learn from the same examples, 500, 2,000 and all of them:

    bag of words    logistic regression on TF-IDF of words and pairs of words (scikit-learn), which needs seconds
    from scratch    our model with the weights that its pre-training began with
    pre-trained     the model itself: that of `--model`, or one made here by the demo's recipe from pretrain.jsonl, in four minutes

A tenth of the training examples is held out. By it, with a seed that is not measured later and all examples, each side gets its learning
rate (the bag of words its C, for every seed); and by it the best epoch is chosen. The test file is looked at once, by the model that came
out. Five seeds: other examples (where not all are taken), another new layer, other dropout and order; from scratch all weights. Both
models get the same number of steps. Two runs go side by side, on a core each. 30 to 60 minutes on two cores.
"""

from __future__ import annotations

import argparse
import itertools
import math
import multiprocessing
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from benchmarks.machine import ROOT, header
from benchmarks.pictures import OURS, figure_of, save
from benchmarks.record import Record, Row, table
from fastbert import load
from fastbert.initial_weights import initialise
from fastbert.tasks.finetune import Settings, finetune, spread
from fastbert.tasks.labelled import Examples, read_examples
from fastbert.tasks.scores import accuracy, f1
from fastbert.training.picture import INK, MUTED

RECIPE = ROOT / "recipes/demo.toml"
WORDS, SCRATCH, PRETRAINED = "bag of words", "from scratch", "pre-trained"
COLORS = {WORDS: "#9ca3af", SCRATCH: "#d97706", PRETRAINED: OURS}
TASKS = {"topics": "encyclopedia topics", "films": "film reviews"}
EXAMPLES = (500, 2000, None)  # None for all
RATES = (3e-4, 1e-3, 3e-3)
STRENGTHS = (1.0, 10.0, 100.0)  # C of the logistic regression
SEARCH_SEED, SEEDS = 0, (1, 2, 3, 4, 5)
BATCH, MAX_LENGTH, HELD_OUT = 32, 64, 0.1
STEPS, LEAST_EPOCHS = 600, 4


@dataclass(frozen=True)
class Job:
    """One training: `task` out of `texts`, on `examples` of it (None for all), by `side`, with the model at `model`."""

    texts: Path
    model: Path
    task: str
    side: str
    examples: int | None
    seed: int
    lr: float = 0.0
    steps: int = STEPS

    @property
    def name(self) -> str:
        return f"{self.task:7} {'all' if self.examples is None else self.examples:>5} {self.side:12} seed {self.seed}"


def read(job: Job) -> tuple[Examples, Examples]:
    """What is trained on, the held-out part with it, and the test."""
    training, test = (read_examples(job.texts / f"{job.task}-{part}.jsonl") for part in ("train", "test"))
    order = torch.randperm(len(training), generator=torch.Generator().manual_seed(job.seed)).tolist()
    return training.take(order[: job.examples]), test


def run(job: Job) -> Row:
    """Train; scores on the held-out part, by which things are chosen, and on the test."""
    began = time.perf_counter()
    found = bag_of_words(job) if job.side == WORDS else fine_tuned(job)
    facts = {key: value for key, value in asdict(job).items() if key not in ("texts", "model")}
    return {"part": "trial", **facts, **found, "seconds": time.perf_counter() - began}


def fine_tuned(job: Job) -> Row:
    torch.set_num_threads(1)
    training, test = read(job)
    pretrained = load(job.model, device="cpu")
    if job.side == SCRATCH:
        torch.manual_seed(job.seed)
        begun = pretrained.config if pretrained.recipe is None else pretrained.recipe.model
        initialise(dict(pretrained.model.named_parameters()), begun)
    epochs = max(LEAST_EPOCHS, math.ceil(job.steps * BATCH / len(training)))
    max_length = min(MAX_LENGTH, pretrained.config.max_position_embeddings)
    settings = Settings(epochs=epochs, lr=job.lr, batch=BATCH, max_length=max_length, seed=job.seed, patience=epochs, heldout=HELD_OUT)
    [trial] = finetune(pretrained, training, test, settings=settings).trials
    kept = max(trial.epochs, key=lambda epoch: epoch.score)
    return {"heldout": kept.score, "epoch": kept.epoch, "epochs": epochs, **test_scores(trial.scores["accuracy"], trial.scores["f1"])}


def bag_of_words(job: Job) -> Row:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    training, test = read(job)
    count = round(HELD_OUT * len(training))
    held_out, rest = training.take(range(count)), training.take(range(count, len(training)))

    def fit(strength: float):
        words = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2), min_df=2)
        return make_pipeline(words, LogisticRegression(C=strength, max_iter=1000)).fit(rest.first, rest.labels)

    fitted = {strength: fit(strength) for strength in STRENGTHS}
    scores = {strength: model.score(held_out.first, held_out.labels) for strength, model in fitted.items()}
    best = max(scores, key=lambda strength: scores[strength])
    places = {label: i for i, label in enumerate(sorted(set(training.labels)))}
    answers, truth = (torch.tensor([places[x] for x in of]).numpy() for of in (fitted[best].predict(test.first), test.labels))
    return {"heldout": scores[best], "C": best, **test_scores(accuracy(answers, truth), f1(answers, truth))}


def test_scores(right: float, mean_f1: float) -> Row:
    return {"test_accuracy": right, "test_f1": mean_f1}


def pretrain(texts: Path, folder: Path) -> Path:
    """The run of the demo's recipe on the text without that of the tests; not made again where it is finished."""
    store, made, finished = folder / "store", folder / "run", folder / "finished"
    fastbert = [sys.executable, "-m", "fastbert"]
    if not (store / "manifest.json").exists():
        prepare = ["prepare", texts / "pretrain.jsonl", "--out", store, "--vocab-size", 4096, "--heldout", 0.05]
        subprocess.run([*fastbert, *map(str, prepare)], check=True)
    if not finished.exists():
        resume = ["--resume"] if (made / "checkpoints").exists() else []
        subprocess.run([*fastbert, "pretrain", str(RECIPE), f"data={store}", f"run={made}", *resume], check=True)
        finished.touch()
    return made


def searched(jobs: Sequence[Job], rows: Sequence[Row]) -> dict[tuple[str, str], float]:
    """The learning rate of each task and side that was best on the held-out part."""
    best: dict[tuple[str, str], Row] = {}
    for job, row in zip(jobs, rows, strict=True):
        key = (job.task, job.side)
        if key not in best or row["heldout"] > best[key]["heldout"]:
            best[key] = row
    return {key: row["lr"] for key, row in best.items()}


def groups(rows: Iterable[Row]) -> Iterator[tuple[str, int | None, dict[str, list[Row]]]]:
    """Measured trials by task, number of examples and side."""
    measured = [row for row in rows if row["part"] == "trial" and row["seed"] != SEARCH_SEED]
    for task, examples in dict.fromkeys((row["task"], row["examples"]) for row in measured):
        yield task, examples, {s: [r for r in measured if (r["task"], r["examples"], r["side"]) == (task, examples, s)] for s in COLORS}


def downstream_table(rows: Sequence[Row]) -> str:
    """Markdown: accuracy on the test by task, number of examples and side."""
    counts = {row["task"]: row for row in rows if row["part"] == "task"}
    lines = []
    for task, examples, sides in groups(rows):
        cells = {side: spread([row["test_accuracy"] for row in trials]) for side, trials in sides.items()}
        gain = spread([a["test_accuracy"] - b["test_accuracy"] for a, b in zip(sides[PRETRAINED], sides[SCRATCH], strict=True)])
        facts = counts[task]
        lines.append(
            [
                TASKS[task],
                f"{examples or facts['training']:,}",
                f"{facts['majority']:.1%}",
                *(f"{cell.mean:.1%} ± {cell.std:.1%}" for cell in cells.values()),
                f"**{100 * gain.mean:+.1f}** ± {100 * gain.std:.1f}",
            ]
        )
    return table(["task", "examples", "most frequent label", *COLORS, "pre-training's gain, points"], lines)


def draw(rows: Sequence[Row], path: Path) -> None:
    """Accuracy over the number of labelled examples, a panel a task."""
    counts = {row["task"]: row for row in rows if row["part"] == "task"}
    figure, axes = figure_of(1, len(TASKS))
    for ax, (task, title) in zip(axes[0], TASKS.items(), strict=True):
        found = [(examples or counts[task]["training"], sides) for of, examples, sides in groups(rows) if of == task]
        for side, color in COLORS.items():
            cells = [spread([100 * row["test_accuracy"] for row in sides[side]]) for _, sides in found]
            sizes = [size for size, _ in found]
            means, stds = [cell.mean for cell in cells], [cell.std for cell in cells]
            ax.errorbar(sizes, means, stds, color=color, label=side, linewidth=2, marker="o", markersize=4, capsize=3)
        most = 100 * counts[task]["majority"]
        ax.axhline(most, color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)), zorder=0)
        ax.annotate("most frequent label", (1, most), xycoords=("axes fraction", "data"), xytext=(0, 3), textcoords="offset points",
                    ha="right", color=MUTED, fontsize=8)  # fmt: skip
        ax.set_xscale("log")
        ax.set_xticks([size for size, _ in found], [f"{size:,}" for size, _ in found])
        ax.minorticks_off()
        ax.set_title(title, color=INK, fontsize=10, loc="left")
        ax.set_xlabel("labelled examples", color=MUTED)
    axes[0][0].set_ylabel("accuracy on the test, %", color=MUTED)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False, labelcolor=INK, fontsize=9)
    save(figure, path)


def describe_task(job: Job) -> Row:
    training, test = read(replace(job, examples=None))
    most = max(Counter(test.labels).values()) / len(test)
    return {
        "part": "task",
        "task": job.task,
        "training": len(training),
        "test": len(test),
        "labels": len(set(test.labels)),
        "majority": most,
    }


def describe_model(path: Path) -> Row:
    model = load(path, device="cpu")
    sizes = {name: getattr(model.config, name) for name in ("num_hidden_layers", "hidden_size")}
    return {"part": "model", "parameters": sum(p.numel() for p in model.model.parameters()), **sizes, "vocab_size": model.model.vocab_size}


def report(rows: Sequence[Row]) -> str:
    """The text of downstream.md."""
    [model] = (row for row in rows if row["part"] == "model")
    rates = {(row["task"], row["side"]): row["lr"] for row in rows if row["part"] == "trial" and row["side"] != WORDS}
    size = f"{model['num_hidden_layers']} layers of {model['hidden_size']}, {model['parameters'] / 1e6:.2f} M parameters"
    tasks = "; ".join(
        f"{TASKS[row['task']]}: {row['labels']} labels, {row['test']:,} examples in the test" for row in rows if row["part"] == "task"
    )
    return "\n\n".join(
        [
            "Does pre-training pay? Fine-tuning against a start from scratch",
            f"{size}, V = {model['vocab_size']:,}. Accuracy on the test, mean and standard deviation of seeds; {tasks}.",
            downstream_table(rows),
            "![accuracy over labelled examples](downstream.png)",
            "Learning rates, chosen on a held-out part of the training examples:",
            table(["task", "side", "learning rate"], [[TASKS[task], side, f"{lr:g}"] for (task, side), lr in rates.items()]),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path, help="the folder that examples/labelled_texts.py made")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", type=Path, help="a run or an exported folder; it must not have read the tests' texts")
    parser.add_argument("--quick", action="store_true", help="200 examples, one seed, no search: only to see that it works")
    given = parser.parse_args()
    if not (given.texts / "pretrain.jsonl").is_file():
        parser.error(f"{given.texts}: not a folder that examples/labelled_texts.py made; make data/labelled/pretrain.jsonl makes one")
    if given.model and not given.model.is_dir():
        parser.error(f"--model {given.model}: no such folder")
    sizes, seeds, rates = ((200,), SEEDS[:1], RATES[:1]) if given.quick else (EXAMPLES, SEEDS, RATES)
    given.out.mkdir(parents=True, exist_ok=True)
    model = given.model or pretrain(given.texts, given.out / "downstream-model")
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes below

    first = Job(given.texts, model, "topics", PRETRAINED, sizes[-1], SEARCH_SEED, steps=STEPS // 20 if given.quick else STEPS)
    search = [replace(first, task=task, side=side, lr=lr) for task, side, lr in itertools.product(TASKS, (SCRATCH, PRETRAINED), rates)]
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), multiprocessing.get_context("spawn")) as pool:

        def every(jobs: Sequence[Job]) -> list[Row]:
            rows = []
            for job, row in zip(jobs, pool.map(run, jobs), strict=True):
                print(f"{job.name}  lr {job.lr:g}  held out {row['heldout']:.1%}  {row['seconds']:.0f} s", flush=True)
                rows.append(row)
            return rows

        tried = every(search)
        best = searched(search, tried)
        measured = every(
            [
                replace(first, task=task, side=side, examples=examples, seed=seed, lr=best.get((task, side), 0.0))
                for task, examples, side, seed in itertools.product(TASKS, sizes, COLORS, seeds)
            ]
        )
    rows = [describe_model(model), *(describe_task(replace(first, task=task)) for task in TASKS), *tried, *measured]
    text = report(rows)
    draw(rows, given.out / "downstream.png")
    Record(header(torch.device("cpu")), rows).write(given.out, "downstream", text)
    print(text)


if __name__ == "__main__":
    main()
