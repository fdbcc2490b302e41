"""Start-up time: whole processes, timed from their start, in turns.

    python -m benchmarks.step.bench_startup data/wiki --out FOLDER [--quick]

The first table has commands that answer and exit. `python -c pass` is the minimum for all of them.
`import torch` and `import transformers` show what a command would cost if it loaded these. The
second table has the time to the first optimizer step of the demo's recipe, that is, until
metrics.jsonl has its first line. Its phases are recognised by the files that a run writes:
config.toml when all imports and checks are done, log.txt when DeepSpeed's engine is built. The
rival is a minimal script with transformers' Trainer: a model of the same size and made-up tokens
that are already in memory, until the end of its first step. A first round, which is not counted,
warms the page cache.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from benchmarks.harness.children import pretraining
from benchmarks.harness.machine import ROOT, header
from benchmarks.harness.record import Record, Row
from benchmarks.harness.tables_and_plots import table

POLL_S = 0.002
COMMANDS: dict[str, Sequence[str]] = {
    "python -c pass": ("-c", "pass"),
    "fastbert --version": ("-m", "fastbert", "--version"),
    "fastbert --help": ("-m", "fastbert", "--help"),
    "fastbert pretrain --help": ("-m", "fastbert", "pretrain", "--help"),
    "import fastbert": ("-c", "import fastbert"),
    "import fastbert; fastbert.load": ("-c", "import fastbert; fastbert.load"),
    "import torch": ("-c", "import torch"),
    "from transformers import BertForPreTraining": (
        "-c",
        "from transformers import BertForPreTraining",
    ),
}

# The script prints each phase with the time; both processes read the same clock.
TRAINER = """
import sys, time
from transformers import (AutoTokenizer, BertConfig, BertForMaskedLM,
                          DataCollatorForLanguageModeling, Trainer, TrainerCallback,
                          TrainingArguments)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
config = BertConfig(vocab_size=len(tokenizer), hidden_size=128, num_hidden_layers=2,
                    num_attention_heads=4, intermediate_size=512, max_position_embeddings=128)
rows = [{"input_ids": [2, *range(5, 69), 3]}] * 280
class First(TrainerCallback):
    def on_train_begin(self, *_, **__):
        print("engine", time.time(), flush=True)
    def on_step_end(self, *_, **__):
        print("step", time.time(), flush=True)
arguments = TrainingArguments(sys.argv[2], per_device_train_batch_size=28, max_steps=1,
                              report_to=[], disable_tqdm=True, use_cpu=True, save_strategy="no")
trainer = Trainer(BertForMaskedLM(config), arguments, DataCollatorForLanguageModeling(tokenizer),
                  rows, callbacks=[First()])
print("setup", time.time(), flush=True)
trainer.train()
"""
PHASES = ("setup", "engine", "step")


def whole(arguments: Sequence[str]) -> float:
    """Seconds of `python arguments`, from its start to its end."""
    began = time.perf_counter()
    subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=True,
    )
    return time.perf_counter() - began


def first_step(dataset: Path, folder: Path) -> dict[str, float]:
    """Seconds from the start of `fastbert pretrain` to the end of each phase."""
    run = folder / "run"
    marks = {"setup": run / "config.toml", "engine": run / "log.txt", "step": run / "metrics.jsonl"}
    settings = {"data": dataset, "run": run, "stop.steps": 1, "evaluate.sequences": 1}
    command = pretraining(ROOT / "fastbert/recipes/demo.toml", settings)
    began, found = time.perf_counter(), {}
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while len(found) < len(marks) and process.poll() is None:
        time.sleep(POLL_S)
        for name, file in marks.items():
            if name not in found and file.exists() and file.stat().st_size:
                found[name] = time.perf_counter() - began
    if process.wait() or len(found) < len(marks):
        raise SystemExit(
            f"bench_startup: fastbert pretrain ended with code {process.returncode} "
            f"after the phases {list(found)}"
        )
    return found


def trainer_first_step(dataset: Path, folder: Path) -> dict[str, float]:
    """The same for the Trainer's script."""
    began = time.time()
    command = [sys.executable, "-c", TRAINER, dataset / "tokenizer", folder]
    result = subprocess.run(
        command,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        check=True,
    )
    lines = (line.split() for line in result.stdout.splitlines())
    return {line[0]: float(line[1]) - began for line in lines if line[:1] and line[0] in PHASES}


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def time_commands(
    commands: Mapping[str, Sequence[str]], rounds: int
) -> tuple[list[Row], dict[str, list[float]]]:
    """A row for each command, and its seconds in each round."""
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for number in range(rounds + 1):
        for name, arguments in commands.items():
            taken = whole(arguments)
            if number:
                seconds[name].append(taken)
    rows: list[Row] = []
    for name, values in seconds.items():
        low, middle, high = spread(values)
        rows.append(
            {"part": "command", "name": name, "seconds": middle, "low_s": low, "high_s": high}
        )
        print(f"{name:46} {middle:6.3f} s ({low:.3f} to {high:.3f})", flush=True)
    return rows, seconds


def time_first_steps(dataset: Path, rounds: int) -> tuple[list[Row], float]:
    """A row for each side, and how many times sooner our first step is done."""
    sides: dict[str, Callable[[Path, Path], dict[str, float]]] = {
        "fastbert pretrain": first_step,
        "transformers Trainer": trainer_first_step,
    }
    found: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, side in sides.items():
            with tempfile.TemporaryDirectory() as folder:
                marks = side(dataset, Path(folder))
            if number:
                found[name].append(marks)
    rows: list[Row] = []
    for name, runs in found.items():
        row: Row = {"part": "first step", "name": name}
        row |= {f"{phase}_s": statistics.median(run[phase] for run in runs) for phase in PHASES}
        row["low_s"], _, row["high_s"] = spread([run["step"] for run in runs])
        rows.append(row)
        print(
            f"{name:22} " + ", ".join(f"{phase} {row[f'{phase}_s']:.2f} s" for phase in PHASES),
            flush=True,
        )
    ours, theirs = found.values()
    return rows, statistics.median(b["step"] / a["step"] for a, b in zip(ours, theirs, strict=True))


def report(rows: Sequence[Row]) -> str:
    """The report in Markdown, starting with its title."""
    commands = [
        [f"`{r['name']}`", f"{r['seconds']:.3f}", f"{r['low_s']:.3f} to {r['high_s']:.3f}"]
        for r in rows
        if r["part"] == "command"
    ]
    first = [
        [
            r["name"],
            *(f"{r[f'{phase}_s']:.2f}" for phase in PHASES),
            f"{r['low_s']:.2f} to {r['high_s']:.2f}",
        ]
        for r in rows
        if r["part"] == "first step"
    ]
    columns = ("", "imported, checked, set up", "engine built", "first step done", "quartiles")
    return "\n\n".join(
        [
            "Start-up\n",
            "Whole processes, seconds, median.\n\n"
            + table(("command", "s", "quartiles"), commands),
            "Seconds from the start of the process, median; the demo's recipe.\n\n"
            + table(columns, first),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dataset", type=Path, help="a dataset made by fastbert prepare")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for startup.json and startup.md"
    )
    parser.add_argument(
        "--quick", action="store_true", help="two rounds of each, to check that it works"
    )
    given = parser.parse_args()
    light, heavy = (2, 2) if given.quick else (4, 2)
    rows, seconds = time_commands(COMMANDS, light)
    steps, sooner = time_first_steps(given.dataset.resolve(), heavy)

    def ratio(slow: str, fast: str) -> float:
        return statistics.median(a / b for a, b in zip(seconds[slow], seconds[fast], strict=True))

    ratios = {
        "fastbert --help, against import torch": ratio("import torch", "fastbert --help"),
        "fastbert.load, against transformers": ratio(
            "from transformers import BertForPreTraining", "import fastbert; fastbert.load"
        ),
        "first step, against the Trainer": sooner,
    }
    Record(header(torch.device("cpu")), [*rows, *steps], ratios).write(
        given.out, "startup", report([*rows, *steps])
    )


if __name__ == "__main__":
    main()
