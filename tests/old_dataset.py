"""Writes datasets of format 2, which `prepare` no longer does, so that tests can read them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np

from fastbert.data.dataset import TokenDataset, open_dataset
from fastbert.data.format_2 import FORMAT, other_files
from fastbert.data.manifest import SPLITS, token_dtype
from fastbert.durable import sealed, sha256_of
from tests.block_dataset import text_of
from tests.shard_writer import ShardWriter


def in_format_2(dataset: TokenDataset, out: Path) -> TokenDataset:
    """Copy a dataset of one part into format 2, and open the copy."""
    shutil.copytree(dataset.tokenizer_dir, out / "tokenizer")
    for report in ("report.json", "report.md"):
        shutil.copy(dataset.reports[0].with_name(report), out / report)
    (out / "baselines.json").write_text(json.dumps(dataset.baselines, indent=1) + "\n")
    files = {
        name: {"size": (out / name).stat().st_size, "sha256": sha256_of(out / name)}
        for name in other_files(dataset.has_words)
    }
    summaries = {}
    for name in SPLITS:
        split = dataset.split(name)
        writer = ShardWriter(out / name, token_dtype(dataset.vocab_size))
        tokens, sentences, documents, words = text_of(split, 0, split.documents, dataset.has_words)
        writer.add(tokens, np.asarray(sentences), np.asarray(documents), words)
        writer.close()
        files |= writer.files
        summaries[name] = writer.summary()
    kept = ("tokenizer", "vocab_size", "special", "tokenizer_sha256")
    manifest = {
        "format": FORMAT,
        **{key: dataset.manifest[key] for key in kept if key in dataset.manifest},
        "options": dataset.manifest["parts"][0]["options"],
        "splits": summaries,
        "files": files,
    }
    (out / "manifest.json").write_bytes(sealed(manifest))
    return open_dataset(out, verify=False)
