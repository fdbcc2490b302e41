"""Benchmark `fastbert prepare` on a text of 200 MB: MB/s of a core, and what a second worker gives.

    python -m benchmarks.data.bench_prepare data/wiki.jsonl data/wiki --out FOLDER [--mb 200]

The text is made of the sentences of the first argument, in a random order. Long words are exchanged
for made-up ones, whose frequencies follow a power law, so that the vocabulary of the text grows as
that of a real one. The tokenizer is that of the second argument, a dataset.

Runs with one and two workers take turns, each in a process of its own with as many cores. The
clock runs from the end of the imports until the dataset is published. Seconds are given with and
without the n-gram baselines, which take the same time for any text. CPU seconds are those of all
processes of a run, with imports. The datasets must be the same, byte for byte.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import random
import re
import resource
import statistics
import tempfile
from pathlib import Path

from benchmarks.data.bench_data import job

# The share of long words that are exchanged, and the exponent of their frequencies.
EXCHANGED, LONG, EXPONENT = 0.25, 6, 0.7
SYLLABLES = [consonant + vowel for consonant in "bdklmnrst" for vowel in "aeiou"]


def write_text(source: Path, target: Path, size: int) -> None:
    """Write at least `size` bytes of JSON lines, always the same."""
    draw = random.Random(7)
    texts = (json.loads(line)["text"] for line in source.read_text("utf-8").splitlines())
    sentences = [s for text in texts for s in re.split(r"(?<=[.!?])\s+", text) if 20 < len(s) < 400]
    written = 0
    with target.open("wb") as file:
        while written < size:
            chosen = draw.choices(sentences, k=draw.randint(4, 20))
            words = " ".join(chosen).split(" ")
            for i, word in enumerate(words):
                if len(word) > LONG and draw.random() < EXCHANGED:
                    words[i] = _made_up(int(draw.paretovariate(EXPONENT)))
            line = json.dumps({"text": " ".join(words)}, ensure_ascii=False).encode() + b"\n"
            written += file.write(line)


def _made_up(number: int) -> str:
    """Return the word of a number: its digits as syllables."""
    number, word = number % 2_000_000, ""
    while number or not word:
        number, digit = divmod(number, len(SYLLABLES))
        word += SYLLABLES[digit]
    return word


def measure(text: Path, tokenizer: Path, out: Path, workers: int) -> dict[str, float]:
    """Prepare once; return wall seconds with and without baselines, and CPU seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    found = job("fastbert", text, tokenizer, out, workers, workers)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "seconds": found["seconds"],
        "without_baselines": found["seconds"] - found["baselines_s"],
        "cpu_s": cpu,
        "peak_mb": found["peak_mb"],
    }


def same(left: Path, right: Path) -> bool:
    """Whether two folders have the same files."""
    names = [sorted(p.relative_to(d) for p in d.rglob("*") if p.is_file()) for d in (left, right)]
    return names[0] == names[1] and all(
        filecmp.cmp(left / name, right / name, shallow=False) for name in names[0]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("text", type=Path)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--mb", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    runs: dict[int, list[dict[str, float]]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory(dir=options.out) as folder:
        text = Path(folder) / "text.jsonl"
        write_text(options.text, text, options.mb * 10**6)
        size = text.stat().st_size / 1e6
        for number in range(options.rounds):
            for workers, found in runs.items():
                out = Path(folder) / f"{number}-{workers}"
                tokenizer = options.dataset.absolute() / "tokenizer"
                found.append(measure(text.absolute(), tokenizer, out.absolute(), workers))
                assert same(Path(folder) / "0-1", out), "other bytes with other workers"
    result: dict[str, float] = {"mb": round(size, 1)}
    for name in ("seconds", "without_baselines", "cpu_s", "peak_mb"):
        medians = {n: statistics.median(run[name] for run in found) for n, found in runs.items()}
        result |= {f"{name}_{n}": round(value, 2) for n, value in medians.items()}
        # Of runs that follow one another, so that a change of the machine's load falls out.
        pairs = zip(runs[1], runs[2], strict=True)
        ratio = statistics.median(one[name] / two[name] for one, two in pairs)
        result[f"{name}_ratio"] = round(ratio, 3)
    result["mb_per_s_of_a_core"] = round(size / result["without_baselines_1"], 2)
    (options.out / "prepare.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
