"""Format 3 of a dataset: blocks with their own counts and SHA-256, in a table for each part.

    DIR/manifest.json           splits and options of each part, SHA-256 of all files but the shards
                                and of itself, special ids, baselines; written last
    DIR/tokenizer/              tokenizer.json, tokenizer_config.json, and BERT's vocab.txt
    DIR/part-00000/blocks       the table: `blocks.BLOCK` of each block, train before held-out
    DIR/part-00000/train-00000  the shards: blocks, each at a multiple of blocks.ALIGNMENT, and
    DIR/part-00000/heldout-00000    zeros between them
    DIR/part-00000/report.json, report.md, heldout-hashes.npy
    DIR/part-00001/...          text that was added later

The SHA-256 of a block is in the table, and the table's is in the manifest. So the SHA-256 of the
manifest identifies the dataset, and a block can be verified alone. blocks.py has its layout.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import numpy as np

from fastbert.data.block_table import COUNTS, Blocks, read_table, table_problem
from fastbert.data.blocks import BLOCK
from fastbert.data.manifest import (
    SPLITS,
    is_count,
    token_dtype,
    tokenizer_files,
    vocabulary_problem,
)
from fastbert.data.verify import AGAIN, Claim, reading_part
from fastbert.errors import InputError
from fastbert.regular_file import read_bytes

FORMAT = 3
TABLE = "blocks"
REPORTS = ("report.json", "report.md")
# uint64, ascending: hashes of the held-out documents of a part, so that text which is added later
# has no copy of them in its training part. A dataset without it can be read all the same.
HELDOUT_HASHES = "heldout-hashes.npy"


def part_name(part: int) -> str:
    return f"part-{part:05d}"


def manifest_problem(manifest: Any) -> str | None:
    """Return what is wrong with a manifest of the right format, or None."""
    try:
        if wrong := vocabulary_problem(manifest):
            return wrong
        nats = manifest["baselines"]
        if "unigram" not in nats or not all(_is_finite(value) for value in nats.values()):
            return 'baselines are not numbers with "unigram"'
        parts = manifest["parts"]
        names = set(tokenizer_files("tokenizer" in manifest))
        for number, part in enumerate(parts):
            names |= {f"{part_name(number)}/{name}" for name in (TABLE, *REPORTS)}
            for split in SPLITS:
                found = part["splits"][split]
                numbers = [*(found[name] for name in COUNTS), *found["shards"]]
                if not all(is_count(value) and value < 1 << 60 for value in numbers):
                    return f"counts of the split '{split}' are not whole numbers"
        for split in SPLITS:
            if sum(part["splits"][split]["tokens"] for part in parts) == 0:
                return f"the split '{split}' has no text"
        files = manifest["files"]
        optional = {f"{part_name(number)}/{HELDOUT_HASHES}" for number in range(len(parts))}
        names |= optional & set(files)
        if set(files) != names:
            odd = ", ".join(sorted(set(files) ^ names)[:3])
            return f"its list of files is not that of a dataset: {odd}"
        for name, entry in files.items():
            if not is_count(entry["size"]) or not isinstance(entry["sha256"], str):
                return f"the entry of {name} has no size and SHA-256"
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        return f"a part is missing or of the wrong kind ({type(error).__name__}: {error})"
    return None


def read_tables(path: Path, manifest: dict[str, Any]) -> dict[str, Blocks]:
    """Read and check the tables of all parts, and return the blocks of each split.

    Raises:
        InputError: a table is damaged, or contradicts the manifest.
    """
    width = token_dtype(manifest["vocab_size"]).itemsize
    words = "tokenizer" in manifest
    tables = list[np.ndarray]()
    for number, part in enumerate(manifest["parts"]):
        name = f"{part_name(number)}/{TABLE}"
        with reading_part(path / name):
            data = read_bytes(path / name)
        if hashlib.sha256(data).hexdigest() != manifest["files"][name]["sha256"]:
            raise InputError(
                f"{path / name}: its SHA-256 differs from the manifest's: damaged or changed; "
                f"{AGAIN}"
            )
        problem = f"{len(data):,} bytes are no whole number of entries of {BLOCK.itemsize}"
        if len(data) % BLOCK.itemsize == 0:
            table = read_table(data)
            tables.append(table)
            problem = _contradiction(table, part["splits"]) or table_problem(
                table,
                [np.array(part["splits"][split]["shards"], np.int64) for split in SPLITS],
                width,
                words,
            )
        if problem:
            raise InputError(f"{path / name}: {problem}; {AGAIN}")
    entries = np.concatenate(tables)
    parts = np.repeat(np.arange(len(tables)), [len(table) for table in tables])
    return {
        split: Blocks(path, entries[chosen], parts[chosen], width, words, manifest["vocab_size"])
        for number, split in enumerate(SPLITS)
        for chosen in [entries["split"] == number]
    }


def claims(manifest: dict[str, Any]) -> list[Claim]:
    """Return what the manifest claims about its files; those of blocks are in the tables."""
    return [
        Claim(name, entry["size"], entry["sha256"], np.dtype("u1"), None)
        for name, entry in manifest["files"].items()
    ]


def _contradiction(table: np.ndarray, splits: dict[str, Any]) -> str:
    """Return where the table has other counts than the manifest, or ""."""
    for number, split in enumerate(SPLITS):
        rows = table[table["split"] == number]
        for name in COUNTS:
            if (found := int(rows[name].sum(dtype=np.int64))) != splits[split][name]:
                return (
                    f"{found:,} {name} in the split '{split}', "
                    f"the manifest says {splits[split][name]:,}"
                )
    return ""


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)
