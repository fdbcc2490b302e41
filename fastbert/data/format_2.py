"""Format 2 of a dataset: three files a shard. It is read, and no longer written.

    DIR/manifest.json   counts, sizes, SHA-256 of every file and of itself, special ids, options;
                        written last
    DIR/tokenizer/      tokenizer.json, tokenizer_config.json, and BERT's vocab.txt
    DIR/{train,heldout}/
        shard-00000.tokens      token ids, uint16 where the vocabulary allows it, else uint32
        shard-00000.sentences   int64 [sentences + 1], token offsets within the shard
        shard-00000.documents   int64 [documents + 1], sentence offsets within the shard
        shard-00000.words       a bit for each token, the highest of a byte first: whether a word
                                begins there; not with BERT's tokenizer, where the token says so
    DIR/baselines.json  DIR/report.json  DIR/report.md

Numbers are little-endian. Every document has at least one sentence, and every sentence at least one
token. A document never crosses a shard boundary.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from fastbert.data.manifest import (
    SPLITS,
    Counts,
    is_count,
    token_dtype,
    tokenizer_files,
    vocabulary_problem,
)
from fastbert.data.shard_split import OFFSETS, ShardSplit, shard_name
from fastbert.data.verify import Claim, NumberCheck, ids_below, offsets_to

FORMAT = 2


def other_files(has_words: bool) -> list[str]:
    """Return the files of a dataset besides its shards; `has_words` as in TokenDataset."""
    return [*tokenizer_files(has_words), "baselines.json", "report.json", "report.md"]


def open_split(path: Path, manifest: dict[str, Any], name: str) -> ShardSplit:
    """Map a split of the dataset at `path`."""
    shards = [Counts(**shard) for shard in manifest["splits"][name]["shards"]]
    return ShardSplit(
        path / name, shards, token_dtype(manifest["vocab_size"]), "tokenizer" in manifest
    )


def claims(manifest: dict[str, Any]) -> list[Claim]:
    """Return what the manifest claims about its files."""
    vocab_size = manifest["vocab_size"]
    checks: dict[str, tuple[np.dtype, NumberCheck | None]] = {}
    for split in SPLITS:
        for i, shard in enumerate(manifest["splits"][split]["shards"]):
            name, counts = f"{split}/{shard_name(i)}", Counts(**shard)
            checks[f"{name}.tokens"] = token_dtype(vocab_size), ids_below(vocab_size)
            checks[f"{name}.sentences"] = (
                OFFSETS,
                offsets_to(counts.tokens, counts.sentences + 1),
            )
            checks[f"{name}.documents"] = (
                OFFSETS,
                offsets_to(counts.sentences, counts.documents + 1),
            )
    text = np.dtype("u1"), None
    return [
        Claim(name, entry["size"], entry["sha256"], *checks.get(name, text))
        for name, entry in manifest["files"].items()
    ]


def manifest_problem(manifest: Any) -> str | None:
    """Return what is wrong with a manifest of the right format, or None."""
    try:
        if wrong := vocabulary_problem(manifest):
            return wrong
        vocab_size, has_words = manifest["vocab_size"], "tokenizer" in manifest
        width = token_dtype(vocab_size).itemsize
        sizes: dict[str, int | None] = dict.fromkeys(other_files(has_words))
        for split in SPLITS:
            shards = [Counts(**shard) for shard in manifest["splits"][split]["shards"]]
            totals = Counts(
                *(manifest["splits"][split][k] for k in ("documents", "sentences", "tokens"))
            )
            if not all(
                is_count(c) and c > 0 for s in [*shards, totals] for c in asdict(s).values()
            ):
                return f"counts of the split '{split}' are not whole numbers above 0"
            if totals != Counts(
                *(sum(getattr(s, k) for s in shards) for k in ("documents", "sentences", "tokens"))
            ):
                return f"counts of the split '{split}' are not the sum of its shards"
            for i, shard in enumerate(shards):
                name = f"{split}/{shard_name(i)}"
                sizes[f"{name}.tokens"] = shard.tokens * width
                sizes[f"{name}.sentences"] = (shard.sentences + 1) * 8
                sizes[f"{name}.documents"] = (shard.documents + 1) * 8
                if has_words:
                    sizes[f"{name}.words"] = -(-shard.tokens // 8)
        files = manifest["files"]
        if set(files) != set(sizes):
            odd = ", ".join(sorted(set(files) ^ set(sizes))[:3])
            return f"its list of files is not that of a dataset: {odd}"
        for name, entry in files.items():
            if (
                not is_count(entry["size"])
                or not isinstance(entry["sha256"], str)
                or sizes[name] not in (None, entry["size"])
            ):
                return f"the entry of {name} contradicts the counts"
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        return f"a part is missing or of the wrong kind ({type(error).__name__}: {error})"
    return None
