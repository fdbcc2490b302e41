"""The dataset: the folder that `fastbert prepare` writes and everything else reads.

There are two formats: format_3.py and format_2.py say what lies where, and what must be true of it.
Both have a manifest and the tokenizer's files, and may have

    DIR/.verified-UID   not part of the dataset: when this user last verified it; see verify.py
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Generator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fastbert.data import format_2, format_3
from fastbert.data.block_split import BlockSplit
from fastbert.data.block_table import COUNTS, Blocks
from fastbert.data.manifest import MANIFEST, Counts, SpecialIds
from fastbert.data.remote_dataset import fetch_dataset
from fastbert.data.split import Split
from fastbert.data.verify import AGAIN, Claim, reading_part, verify_files
from fastbert.durable import unsealed
from fastbert.errors import InputError
from fastbert.presence import is_file, is_folder
from fastbert.regular_file import read_bytes, read_text
from fastbert.storage import Url, place

FORMATS = {module.FORMAT: module for module in (format_2, format_3)}


class TokenDataset:
    """A complete dataset, open for reading; `open_dataset` returns it."""

    def __init__(self, path: Path, manifest: dict[str, Any], sha256: str):
        self.path = path
        self.manifest = manifest
        # The SHA-256 of manifest.json. As this holds the SHA-256 of all other files, it identifies
        # the dataset.
        self.sha256 = sha256
        self.vocab_size: int = manifest["vocab_size"]
        self.special = SpecialIds(**manifest["special"])
        self.tokenizer_dir = path / "tokenizer"
        # BERT's tokens say themselves whether they begin a word; of others the shards say it.
        self.has_words = "tokenizer" in manifest
        # The blocks of each split; empty in format 2.
        self.blocks: dict[str, Blocks] = {}
        if manifest["format"] == format_3.FORMAT:
            self.blocks = format_3.read_tables(path, manifest)

    def split(self, name: str) -> Split:
        """Open the split "train" or "heldout" as a whole."""
        if self.blocks:
            return BlockSplit(self.blocks[name])
        return format_2.open_split(self.path, self.manifest, name)

    def counts(self, name: str) -> Counts:
        """Return the size of a split, without opening its shards."""
        if self.blocks:
            return Counts(*(self.blocks[name].total(column) for column in COUNTS))
        found = self.manifest["splits"][name]
        return Counts(*(found[column] for column in COUNTS))

    def windows(self, size: int) -> int:
        """Return how many windows of `size` bytes an epoch of training has; 1 in format 2."""
        return self.blocks["train"].windows(size) if self.blocks else 1

    @property
    def reports(self) -> list[Path]:
        """The reports on the text, as JSON: one of each part, in order."""
        if self.blocks:
            parts = range(len(self.manifest["parts"]))
            return [self.path / format_3.part_name(i) / "report.json" for i in parts]
        return [self.path / "report.json"]

    @cached_property
    def ordinary_ids(self) -> np.ndarray:
        """int64, ascending: every id except the special ones."""
        return np.setdiff1d(np.arange(self.vocab_size), self.special.all)

    @cached_property
    def continues_word(self) -> np.ndarray:
        """bool [V]: whether the token of BERT's vocabulary continues a word ("##ing")."""
        # The text is split at "\n" only. splitlines would also split at other characters, which a
        # token may contain.
        file = self.tokenizer_dir / "vocab.txt"
        tokens = read_text(file).removesuffix("\n").split("\n")
        if len(tokens) != self.vocab_size:
            raise InputError(
                f"{file}: {len(tokens):,} tokens, the manifest says {self.vocab_size:,}; {AGAIN}"
            )
        return np.array([token.startswith("##") for token in tokens])

    @cached_property
    def baselines(self) -> dict[str, float]:
        """The losses of simple count models on the held-out text, nats per token; see baselines.py.

        Raises:
            InputError: baselines.json is damaged.
        """
        if self.blocks:
            return self.manifest["baselines"]
        file = self.path / "baselines.json"
        try:
            values = json.loads(read_text(file))
            finite = (type(v) in (int, float) and math.isfinite(v) for v in values.values())
            valid = all(finite) and "unigram" in values
        except (OSError, ValueError, AttributeError, RecursionError):
            valid = False
        if not valid:
            raise InputError(f'{file}: not an object of numbers with "unigram"; {AGAIN}')
        return values

    def verify(self, window: int | None = None) -> Generator[tuple[int, int]]:
        """Check every byte of the dataset; see verify.py.

        Args:
            window: in bytes. Text to train on that is larger is left to those who open its windows;
                see window_order.py.

        Yields:
            From time to time, the bytes checked so far and the bytes in all.

        Raises:
            InputError: a file that is damaged or changed, or holds impossible numbers.
        """
        if (yield from verify_files(self.path, self.sha256, self._claims(window))):
            self._check_tokenizer()
        # Reading them raises where they are wrong.
        for _ in (self.baselines, None if self.has_words else self.continues_word):
            pass

    def _check_tokenizer(self) -> None:
        """Check the tokenizer's ids against the manifest: a model has one embedding for each."""
        from fastbert.data.tokenizer import load_tokenizer, special_ids

        tokenizer = load_tokenizer(self.tokenizer_dir)
        if (size := tokenizer.get_vocab_size()) != self.vocab_size:
            raise InputError(
                f"{self.tokenizer_dir}: {size:,} tokens, "
                f"the manifest says {self.vocab_size:,}; {AGAIN}"
            )
        if (special := special_ids(tokenizer, self.tokenizer_dir)) != self.special:
            raise InputError(
                f"{self.tokenizer_dir}: {special}, the manifest says {self.special}; {AGAIN}"
            )

    def _claims(self, window: int | None) -> list[Claim]:
        """Return what the manifest and the tables claim about the files."""
        found = FORMATS[self.manifest["format"]].claims(self.manifest)
        for split, blocks in self.blocks.items():
            if window is None or split != "train" or self.windows(window) == 1:
                found += blocks.claims()
        return found


def open_dataset(path: str | Path, verify: bool = True) -> TokenDataset:
    """Open the dataset at `path`.

    Args:
        path: the folder, or its URL: then it is copied to this machine.
        verify: read every byte, as `TokenDataset.verify` does. Without it only the sizes are
            checked, for callers that verify separately.

    Raises:
        InputError: no such folder, no manifest, another format, or a file that is missing, cut
            short or changed.
    """
    at = place(path)
    path = fetch_dataset(at) if isinstance(at, Url) else at
    again = "make it again with `fastbert prepare`"
    if is_file(path):
        raise InputError(
            f"{path}: a file, and no dataset; make one with `fastbert prepare {path} --out DIR`, "
            "which measures with --estimate how long it takes"
        )
    if not is_folder(path):
        below = "" if path.is_absolute() else f" below {Path.cwd()}"
        raise InputError(
            f"{path}: no such dataset{below}; make one with `fastbert prepare SOURCE --out {path}`"
        )
    try:
        data = read_bytes(path / MANIFEST)
    except FileNotFoundError:
        raise InputError(f"{path}: not a complete dataset: it has no {MANIFEST}; {again}") from None
    except OSError as error:
        raise InputError(f"{path / MANIFEST}: cannot be read: {error.strerror}") from None
    try:
        version = json.loads(data)["format"]
        form = FORMATS.get(version)
        manifest = unsealed(data) if form else {}
    except (ValueError, TypeError, KeyError, RecursionError):
        raise InputError(f"{path / MANIFEST}: not the manifest of a dataset; {again}") from None
    if form is None:
        raise InputError(
            f"{path / MANIFEST}: format = {version!r}, this fastbert reads formats "
            f"{' and '.join(map(str, FORMATS))}; {again}"
        )
    if manifest is None:
        raise InputError(
            f"{path / MANIFEST}: it does not have its own SHA-256: damaged or changed; {AGAIN}"
        )
    if problem := form.manifest_problem(manifest):
        raise InputError(f"{path / MANIFEST}: {problem}; {again}")
    for name, entry in manifest["files"].items():
        file = path / name
        with reading_part(file):
            size = file.stat().st_size
        if size != entry["size"]:
            raise InputError(
                f"{file}: {size:,} bytes, the manifest says {entry['size']:,}: "
                f"cut short or changed; {AGAIN}"
            )
    dataset = TokenDataset(path, manifest, hashlib.sha256(data).hexdigest())
    if verify:
        for _ in dataset.verify():
            pass
    return dataset
