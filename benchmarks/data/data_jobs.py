"""The jobs that `bench_data` measures, each in its own process: preparation and the loader.

    python -m benchmarks.data.data_jobs fastbert|datasets TEXT.jsonl TOKENIZER OUT WORKERS CORES
    python -m benchmarks.data.data_jobs loader DATASET

Each job prints one JSON object. Both sides of preparation (fastbert, and datasets + tokenizers)
read the text, split it into sentences by the same rules, encode these with the same WordPiece
tokenizer and save the ids to disk. The import of the libraries is timed separately. The rival
follows its documentation: `load_dataset`, a batched `map` over the fast tokenizer, `save_to_disk`.
It uses `tokenizers` directly, which is faster than through transformers, and the variant without
offsets.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

LOADER_STEPS = 200


def by_fastbert(text: str, tokenizer: str, out: str, workers: int) -> dict[str, float]:
    """Prepare as `fastbert prepare` does.

    The n-gram baselines, which the rival does not compute, are timed and weighed separately.
    """
    began = time.perf_counter()
    from fastbert.data import baselines as baselines
    from fastbert.data import prepare

    measure, found = baselines.measure, {}

    def timed(*arguments: Any) -> dict[str, float]:
        found["peak_before_baselines_mb"] = _status_mb("VmHWM")
        start = time.perf_counter()
        result = measure(*arguments)
        found["baselines_s"] = time.perf_counter() - start
        return result

    baselines.measure = timed
    ready = time.perf_counter()
    report = prepare.prepare([text], out, tokenizer=tokenizer, workers=workers, progress=False)
    seconds = time.perf_counter() - ready
    tokens = report.figures["tokens"]
    return {
        "imports_s": ready - began,
        "seconds": seconds,
        "tokens": tokens,
        "peak_mb": _status_mb("VmHWM"),
        **found,
    }


def by_datasets(text: str, tokenizer: str, out: str, processes: int) -> dict[str, float]:
    """Prepare with datasets and tokenizers.

    A row is a document; its `input_ids` are a list of ids for each sentence.
    """
    began = time.perf_counter()
    import datasets  # pyright: ignore[reportMissingImports]
    from tokenizers import Tokenizer

    from fastbert.data.sentences import split_sentences

    ready = time.perf_counter()
    datasets.disable_progress_bars()
    wordpiece = Tokenizer.from_file(str(Path(tokenizer) / "tokenizer.json"))
    wordpiece.encode_special_tokens = True  # as ours: "[MASK]" in a text is ordinary text

    def encode(rows: dict[str, list[str]]) -> dict[str, list[list[list[int]]]]:
        documents = [split_sentences(row) for row in rows["text"]]
        sentences = [sentence for document in documents for sentence in document]
        encoded = iter(wordpiece.encode_batch_fast(sentences, add_special_tokens=False))
        return {"input_ids": [[next(encoded).ids for _ in document] for document in documents]}

    raw: Any = datasets.load_dataset(
        "json", data_files=text, split="train", cache_dir=f"{out}.cache"
    )
    made = raw.map(
        encode,
        batched=True,
        num_proc=processes if processes > 1 else None,
        remove_columns=raw.column_names,
    )
    made.save_to_disk(out)
    return {"imports_s": ready - began, "seconds": time.perf_counter() - ready}


def loader(dataset: str) -> dict[str, float]:
    """Memory of a loader that has drawn batches from all parts of a dataset.

    Returns its own memory, and the pages of the dataset that are currently mapped.
    """
    from fastbert.config import RunConfig
    from fastbert.data.batches import Batches
    from fastbert.data.dataset import open_dataset

    batches = Batches(open_dataset(dataset, verify=False), RunConfig(data=dataset))
    for step in range(LOADER_STEPS):
        batches.step(step)
    return {"own_mb": _status_mb("RssAnon"), "mapped_mb": _status_mb("RssFile")}


def _status_mb(name: str) -> float:
    """A value of this process's status file.

    getrusage is not used, because its maximum is inherited from the parent process.
    """
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:"))


def main() -> None:
    job, *arguments = sys.argv[1:]
    if job == "loader":
        found = loader(*arguments)
    else:
        text, tokenizer, out, workers, cores = arguments
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(cores)])
        found = {"fastbert": by_fastbert, "datasets": by_datasets}[job](
            text, tokenizer, out, int(workers)
        )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
