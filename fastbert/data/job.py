"""One call of `prepare` as a value: all that its results depend on, and where they lie.

Every task gets the job and a number, and nothing else. A result is named by a hash of what it
depends on, so a changed file or option makes only what depends on it again.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.metadata import version
from pathlib import Path

from fastbert.data.blocks import BLOCK, BLOCK_BYTES
from fastbert.data.corpus_plan import Part, Plan
from fastbert.data.documents import WIKI
from fastbert.data.results import key_of, read_json
from fastbert.data.segments import File
from fastbert.errors import InputError

# Grows when a task computes something else from the same input.
_VERSION = 2


@dataclass(frozen=True)
class Vocabulary:
    """The vocabulary to train; see `train_tokenizer` and `train_byte_level`."""

    algorithm: str
    size: int
    lowercase: bool
    keep_accents: bool


@dataclass(frozen=True)
class Base:
    """The dataset that a part is added to."""

    manifest_sha256: str  # of its manifest.json
    parts: int  # how many it has
    heldout_below: int  # the smallest bound of its parts


@dataclass(frozen=True)
class Job:
    """What `prepare` is to make."""

    out: Path  # the dataset
    plan: Plan  # the text, divided
    text_field: str  # see documents.py
    # A tokenizer as `Tokenizer.to_str` returns it, or what to train.
    tokenizer_or_vocabulary: str | Vocabulary
    heldout: float  # share of the documents
    drop_copies: bool = False  # leave out documents that are copies of an earlier one
    without: Sequence[File] = ()  # evaluation sets
    # How many bad records may be skipped; None: any number. No result depends on it.
    bad_allowed: int | None = 0
    base: Base | None = None  # the dataset that a part is added to

    @property
    def blank_lines(self) -> bool:
        """Whether a blank line ends a document in some file."""
        return any(file.source.format in ("txt", WIKI) for file in self.plan.files)

    @property
    def work(self) -> Path:
        """The folder of the results."""
        return work_of(self.out)

    @property
    def part_number(self) -> int:
        """The number of the part that is made."""
        return self.base.parts if self.base else 0

    @property
    def part_name(self) -> str:
        """The name of its folder."""
        return f"part-{self.part_number:05d}"

    @property
    def has_vocabulary(self) -> bool:
        """Whether the tokenizer is there: given, or trained."""
        given = isinstance(self.tokenizer_or_vocabulary, str)
        return given or read_json(self.vocabulary_path) is not None

    @cached_property
    def vocabulary_path(self) -> Path:
        """The result of training the vocabulary."""
        assert isinstance(self.tokenizer_or_vocabulary, Vocabulary)
        sample = [[*self._identity(part), limit] for part, limit in self.plan.sample()]
        options = vars(self.tokenizer_or_vocabulary)
        return self.work / f"vocabulary-{self._key(sample, options, self.text_field)}.json"

    @cached_property
    def tokenizer(self) -> str:
        """The tokenizer as `Tokenizer.to_str` returns it; a vocabulary must have been trained."""
        if isinstance(self.tokenizer_or_vocabulary, str):
            return self.tokenizer_or_vocabulary
        found = read_json(self.vocabulary_path)
        assert found is not None, f"{self.vocabulary_path}: the vocabulary is not there"
        return found["tokenizer"]

    @cached_property
    def grams_path(self) -> Path:
        """The result of reading the evaluation sets."""
        files = [self._identity_of(file) for file in self.without]
        return self.work / f"evaluation-{self._key(self.tokenizer, files)}.npz"

    @cached_property
    def piece_keys(self) -> list[str]:
        """The name of each piece's result."""
        common = key_of(
            self._key(self.tokenizer, self.text_field),
            self.grams_path.name if self.without else "",
        )
        return [
            key_of(common, [self._identity(part) for part in self.plan.piece(number)])
            for number in range(self.plan.pieces)
        ]

    def piece_path(self, number: int) -> Path:
        """The documents of a piece; its counts are beside it, with the suffix .npz."""
        return self.work / f"piece-{self.piece_keys[number]}.arrays"

    @cached_property
    def settled_key(self) -> str:
        """The name of all that depends on all pieces."""
        base = vars(self.base) if self.base else None
        blocks = [repr(BLOCK.descr), BLOCK_BYTES]
        return self._key(self.piece_keys, self.heldout, self.drop_copies, base, blocks)

    @property
    def settled_path(self) -> Path:
        """What is decided once all pieces are there."""
        return self.work / f"settled-{self.settled_key}.npz"

    @property
    def dropped_path(self) -> Path:
        """Which documents are left out, bool of all documents in the order of the pieces."""
        return self.work / f"dropped-{self.settled_key}.npy"

    def shard_path(self, number: int) -> Path:
        """The table and the counts of a shard."""
        return self.work / f"shard-{self.settled_key}-{number:05d}.npz"

    @property
    def dataset(self) -> Path:
        """The folder that becomes `out`, or receives what is added to it."""
        return self.work / f"dataset-{self.settled_key}"

    @property
    def part(self) -> Path:
        """The folder of the part that is made, in `dataset`."""
        return self.dataset / self.part_name

    @staticmethod
    def _key(*values: object) -> str:
        return key_of(_VERSION, _release(), *values)

    def _identity(self, part: Part) -> list[object]:
        """Return what the documents of a segment depend on."""
        file = self.plan.files[part.file]
        return [*self._identity_of(file), part.segment, *file.bounds(part.segment)]

    @staticmethod
    def _identity_of(file: File) -> list[object]:
        source = file.source
        at = source.path
        path = os.path.abspath(at) if isinstance(at, Path) else str(at)
        return [path, source.format, source.compression, file.size, file.stamp, file.step]


@cache
def _release() -> str:
    return version("fastbert-pretrain")


def work_of(out: Path) -> Path:
    """Return the folder of the results for a dataset.

    Raises:
        InputError: `out` is the root of the file system.
    """
    named = out if out.name not in ("", "..") else Path(os.path.abspath(out))  # "." has no name
    if not named.name:
        raise InputError(f"--out {out}: the root of the file system; give a folder in it")
    return named.with_name(f"{named.name}.work")
