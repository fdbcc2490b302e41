"""Writes datasets of format 3 for tests, in small blocks and few of them in a shard."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastbert.data import blocks
from fastbert.data.block_table import COUNTS, Blocks, shard_name
from fastbert.data.dataset import TokenDataset, open_dataset
from fastbert.data.format_3 import REPORTS, TABLE, part_name
from fastbert.data.manifest import SPLITS, token_dtype, tokenizer_files
from fastbert.data.split import Split
from fastbert.durable import sealed, sha256_of

# Tokens, their number in each sentence, the number of sentences in each document, and where words
# begin.
Text = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]


def text_of(split: Split, begin: int, end: int, words: bool = False) -> Text:
    """Return the documents [begin, end) of a split."""
    first_sentence = split.first_sentence(np.arange(begin, end + 1))
    first_token = split.first_token(np.arange(first_sentence[0], first_sentence[-1] + 1))
    span = first_token[:-1], np.diff(first_token)
    return (
        split.gather(*span),
        np.diff(first_token),
        np.diff(first_sentence),
        split.begins_word(*span) if words else None,
    )


def write_shards(
    folder: Path,
    part: int,
    split: int,
    texts: Sequence[Text],
    dtype: np.dtype,
    blocks_per_shard: int = 3,
) -> tuple[np.ndarray, list[int]]:
    """Write a block for each text; return the entries of the table, and the sizes of the shards."""
    (folder / part_name(part)).mkdir(parents=True, exist_ok=True)
    entries, sizes = list[np.ndarray](), list[int]()
    for i, text in enumerate(texts):
        data, entry = blocks.encode(*text, dtype)
        if i % blocks_per_shard == 0:
            sizes.append(0)
        offset = -(-sizes[-1] // blocks.ALIGNMENT) * blocks.ALIGNMENT
        entry["split"], entry["shard"], entry["offset"] = split, len(sizes) - 1, offset
        with open(folder / shard_name(part, split, len(sizes) - 1), "ab") as file:
            file.truncate(offset)
            file.write(data)
        sizes[-1] = offset + len(data)
        entries.append(entry)
    return np.array(entries, blocks.BLOCK), sizes


def in_blocks(
    dataset: TokenDataset,
    out: Path,
    block_documents: int,
    blocks_per_shard: int = 3,
    parts: int = 1,
) -> TokenDataset:
    """Copy a dataset into blocks of so many documents each, and open the copy."""
    shutil.copytree(dataset.tokenizer_dir, out / "tokenizer")
    splits = {name: dataset.split(name) for name in SPLITS}
    bounds = {
        name: np.linspace(0, split.documents, parts + 1).astype(int).tolist()
        for name, split in splits.items()
    }
    names = tokenizer_files(dataset.has_words)
    described = list[dict[str, Any]]()
    for part in range(parts):
        tables, summary = list[np.ndarray](), dict[str, Any]()
        for number, (name, split) in enumerate(splits.items()):
            first, last = bounds[name][part], bounds[name][part + 1]
            texts = [
                text_of(split, begin, min(begin + block_documents, last), dataset.has_words)
                for begin in range(first, last, block_documents)
            ]
            entries, sizes = write_shards(
                out, part, number, texts, token_dtype(dataset.vocab_size), blocks_per_shard
            )
            tables.append(entries)
            summary[name] = {column: int(entries[column].sum()) for column in COUNTS}
            summary[name]["shards"] = sizes
        (out / part_name(part) / TABLE).write_bytes(np.concatenate(tables).tobytes())
        for report in REPORTS:
            shutil.copy(dataset.reports[0].with_name(report), out / part_name(part) / report)
        names += [f"{part_name(part)}/{name}" for name in (TABLE, *REPORTS)]
        described.append({"options": {}, "heldout_below": 0, "splits": summary})
    manifest = {
        "format": 3,
        **{
            key: dataset.manifest[key]
            for key in ("tokenizer", "vocab_size", "special", "tokenizer_sha256")
            if key in dataset.manifest
        },
        "baselines": dataset.baselines,
        "files": {
            name: {"size": (out / name).stat().st_size, "sha256": sha256_of(out / name)}
            for name in names
        },
        "parts": described,
    }
    (out / "manifest.json").write_bytes(sealed(manifest))
    return open_dataset(out, verify=False)


def blocks_of(folder: Path, texts: Sequence[Text], vocab_size: int, per_shard: int = 3) -> Blocks:
    """Write a block for each text, and return their table."""
    dtype = token_dtype(vocab_size)
    entries, _ = write_shards(folder, 0, 0, texts, dtype, per_shard)
    words = texts[0][3] is not None
    zeros = np.zeros(len(entries), np.int64)
    return Blocks(folder, entries, zeros, dtype.itemsize, words, vocab_size)
