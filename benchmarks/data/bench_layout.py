"""Benchmark how a dataset lies on the disk: look-ups by number of files, and opening.

    python -m benchmarks.data.bench_layout [--tokens 40000000] [--rounds 9]

Look-ups. The same random documents lie in 1, 46 and 843 files of format 2 (three files each) and in
as many blocks of format 3, each in a file of its own. A step draws examples and gathers their
tokens; both layouts take turns on the same steps, and must give the same tokens.

Opening. A dataset of 10,000 shards of one small block each is opened in a new process, and the
order by windows is set up. Files opened are counted by an audit hook.

Windows. The CPU time to verify a window, map it and count its examples.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from fastbert.config import ObjectiveConfig
from fastbert.data import blocks
from fastbert.data.block_split import BlockSplit
from fastbert.data.block_table import Blocks, shard_name
from fastbert.data.examples import Examples
from fastbert.data.manifest import Counts
from fastbert.data.shard_split import ShardSplit
from fastbert.data.split import Split
from fastbert.data.stream import Epochs
from fastbert.data.window_order import Windows
from fastbert.durable import sealed, sha256_of

FILES = (1, 46, 843)
STEPS = ((256, 128), (4096, 512))  # sequences, max_length
SHARDS = 10_000
U2 = np.dtype("<u2")
# The shape of encyclopedia text: 28 tokens a sentence, 313 a document.
SENTENCE_TOKENS, DOCUMENT_SENTENCES = 28, 11

Text = tuple[np.ndarray, np.ndarray, np.ndarray]


def random_text(tokens: int) -> Text:
    """Return token ids, tokens of each sentence, and sentences of each document."""
    draw = np.random.default_rng(0)
    documents = 1 + draw.poisson(DOCUMENT_SENTENCES - 1, tokens // 313)
    sentences = np.minimum(1 + draw.poisson(SENTENCE_TOKENS - 1, documents.sum()), 254)
    return draw.integers(0, 30_000, sentences.sum()).astype(U2), sentences, documents


def pieces(text: Text, count: int) -> list[Text]:
    """Cut a text into parts of as many documents."""
    tokens, sentences, documents = text
    first_sentence = np.concatenate([[0], np.cumsum(documents)])
    first_token = np.concatenate([[0], np.cumsum(sentences)])
    bounds = np.linspace(0, len(documents), count + 1).astype(int)
    found = []
    for begin, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        s = slice(first_sentence[begin], first_sentence[end])
        t = slice(first_token[s.start], first_token[s.stop])
        found.append((tokens[t], sentences[s], documents[begin:end]))
    return found


def format_2(folder: Path, parts: list[Text]) -> ShardSplit:
    """Write each part as a shard of format 2."""
    folder.mkdir()
    for i, (tokens, sentences, documents) in enumerate(parts):
        name = f"{folder}/shard-{i:05d}"
        tokens.tofile(f"{name}.tokens")
        for kind, lengths in (("sentences", sentences), ("documents", documents)):
            np.concatenate([[0], np.cumsum(lengths)]).astype("<i8").tofile(f"{name}.{kind}")
    counts = [Counts(len(d), len(s), len(t)) for t, s, d in parts]
    return ShardSplit(folder, counts, U2)


def format_3(folder: Path, parts: list[Text]) -> Blocks:
    """Write each part as a block in a file of its own."""
    (folder / "part-00000").mkdir(parents=True)
    entries = np.zeros(len(parts), blocks.BLOCK)
    for i, part in enumerate(parts):
        data, entries[i] = blocks.encode(*part, None, U2)
        entries[i]["shard"] = i
        (folder / shard_name(0, 0, i)).write_bytes(data.tobytes())
    return Blocks(folder, entries, np.zeros(len(parts), np.int64), 2, False, 30_000)


def look_ups(text: Text, folder: Path, rounds: int) -> None:
    """Print milliseconds a step for both layouts."""
    print(f"{len(text[0]):,} tokens, {len(text[2]):,} documents; ms a step, median of {rounds}")
    for count in FILES:
        parts = pieces(text, count)
        splits: dict[str, Split] = {
            "format 2": format_2(folder / f"shards-{count}", parts),
            "format 3": BlockSplit(format_3(folder / f"blocks-{count}", parts)),
        }
        for sequences, length in STEPS:
            streams = {
                name: Epochs(Examples(split, ObjectiveConfig(), length, 1, name))
                for name, split in splits.items()
            }
            times: dict[str, list[float]] = {name: [] for name in splits}
            for step in range(rounds + 1):
                numbers = np.arange(step * sequences, (step + 1) * sequences)
                found = []
                for name, stream in streams.items():
                    began = time.process_time()
                    found.append(stream.tokens(stream.draw(numbers)))
                    if step:
                        times[name].append(time.process_time() - began)
                assert np.array_equal(*found)
            middle = {name: statistics.median(values) * 1e3 for name, values in times.items()}
            print(
                f"  {count:4} files, {sequences:5} x {length}: "
                + ", ".join(f"{name} {ms:6.1f} ms" for name, ms in middle.items())
                + f", {middle['format 2'] / middle['format 3']:.2f} times as fast"
            )


def windows(text: Text, folder: Path) -> None:
    """Print the CPU time to verify, map and count a window, and to draw from it."""
    own = format_3(folder / "windows", pieces(text, 8))
    stream = Windows(own, ObjectiveConfig(kind="mlm"), 128, 1, 4 * blocks.BLOCK_BYTES, "text")
    began = time.process_time()
    opened = stream._open_window(0, 1)
    seconds = time.process_time() - began
    size = int(stream.blocks_of(0).layout.size.sum())
    print(
        f"a window of {size / 1e6:.0f} MB, {opened.split.documents:,} documents: opened in "
        f"{seconds:.2f} s of CPU time, {seconds / size * 2**30:.1f} s per GiB"
    )


def many_shards(folder: Path) -> None:
    """Write a dataset of SHARDS shards of one block each."""
    text = random_text(SHARDS * 400)
    own = format_3(folder, pieces(text, SHARDS))
    held = folder / shard_name(0, 1, 0)
    held.write_bytes((folder / shard_name(0, 0, 0)).read_bytes())
    entries = np.concatenate([own.entries, own.entries[:1]])
    entries["split"][-1] = 1
    entries.tofile(folder / "part-00000/blocks")
    others = ["tokenizer/tokenizer.json", "tokenizer/vocab.txt", "tokenizer/tokenizer_config.json"]
    others += ["part-00000/report.json", "part-00000/report.md"]
    (folder / "tokenizer").mkdir()
    for name in others:
        (folder / name).write_text("")
    sizes = own.layout.size.tolist()
    splits = {
        name: {
            **{key: int(rows[key].sum()) for key in ("documents", "sentences", "tokens")},
            "shards": shards,
        }
        for name, rows, shards in (
            ("train", own.entries, sizes),
            ("heldout", own.entries[:1], sizes[:1]),
        )
    }
    manifest = {
        "format": 3,
        "vocab_size": 30_000,
        "special": {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4},
        "baselines": {"unigram": 1.0},
        "files": {
            name: {"size": (folder / name).stat().st_size, "sha256": sha256_of(folder / name)}
            for name in [*others, "part-00000/blocks"]
        },
        "parts": [{"splits": splits}],
    }
    (folder / "manifest.json").write_bytes(sealed(manifest))


OPEN = """
import json, sys, time
from pathlib import Path
from fastbert.config import ObjectiveConfig
from fastbert.data.dataset import open_dataset
from fastbert.data.window_order import open_stream

def memory():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))

opened, folder, before = [], sys.argv[1], memory()
sys.addaudithook(
    lambda event, args: opened.append(str(args[0]))
    if event == "open" and str(args[0]).startswith(folder) else None
)
began = time.perf_counter()
dataset = open_dataset(folder, verify=False)
stream = open_stream(dataset, ObjectiveConfig(), 128, 1, 4 << 30)
seconds, files = time.perf_counter() - began, len(opened)
mb = memory() - before
read = sum(Path(name).stat().st_size for name in opened)
import numpy as np
stream.draw(np.arange(256))
print(json.dumps({"seconds": seconds, "files": files, "read_mb": read / 1e6, "mb": mb,
    "windows": stream.windows, "files_with_a_window": len(set(opened)),
    "seconds_with_a_window": time.perf_counter() - began}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=40_000_000)
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fastbert-layout-") as name:
        folder = Path(name)
        many_shards(folder / "many")
        run = subprocess.run(
            [sys.executable, "-c", OPEN, str(folder / "many")],
            check=True,
            capture_output=True,
            text=True,
        )
        print(f"{SHARDS:,} shards: {json.loads(run.stdout)}", flush=True)
        text = random_text(given.tokens)
        windows(text, folder)
        look_ups(text, folder, given.rounds)


if __name__ == "__main__":
    main()
