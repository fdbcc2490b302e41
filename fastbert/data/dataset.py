"""The dataset: the folder that `fastbert prepare` writes and everything else reads.

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
    DIR/.verified-UID   not part of the dataset: when this user last verified it; see verify.py

Numbers are little-endian. Every document has at least one sentence, and every sentence at least one
token. A document never crosses a shard boundary.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fastbert.data.mapped_file import map_file
from fastbert.data.remote_dataset import fetch_dataset
from fastbert.data.verify import AGAIN, Claim, NumberCheck, ids_below, offsets_to, verify_files
from fastbert.durable import unsealed
from fastbert.errors import InputError
from fastbert.presence import is_folder
from fastbert.regular_file import read_bytes, read_text
from fastbert.storage import Url, is_url

FORMAT = 2
SPLITS = ("train", "heldout")
MANIFEST = "manifest.json"
OTHER_FILES = (
    "tokenizer/tokenizer.json",
    "tokenizer/vocab.txt",
    "tokenizer/tokenizer_config.json",
    "baselines.json",
    "report.json",
    "report.md",
)
BERT_FILES = ("tokenizer/vocab.txt",)  # those of OTHER_FILES that other tokenizers do not have
OFFSETS = np.dtype("<i8")


@dataclass(frozen=True)
class SpecialIds:
    """Ids of the special tokens.

    A tokenizer that knows every byte needs no token for what it does not know, so `unk` may be
    None. `cls` and `sep` may be the same.
    """

    pad: int
    unk: int | None
    cls: int
    sep: int
    mask: int

    @property
    def all(self) -> list[int]:
        """The distinct ids, ascending."""
        found = (self.pad, self.unk, self.cls, self.sep, self.mask)
        return sorted({number for number in found if number is not None})


@dataclass(frozen=True)
class Counts:
    """The size of a split or a shard."""

    documents: int
    sentences: int
    tokens: int


def other_files(has_words: bool) -> list[str]:
    """Return the files of a dataset besides its shards; `has_words` as in TokenDataset."""
    return [name for name in OTHER_FILES if not (has_words and name in BERT_FILES)]


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the type of token ids on disk."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


class Split:
    """One split as three long arrays over all its shards, memory-mapped.

    All indices and results are int64.

    Args:
        folder: holds the shards.
        shards: counts of each shard, in order.
        dtype: of the token ids on disk.
        words: whether the shards say where words begin.
    """

    def __init__(
        self, folder: Path, shards: Sequence[Counts], dtype: np.dtype, words: bool = False
    ):
        names = [folder / shard_name(i) for i in range(len(shards))]
        sizes = list(zip(names, shards, strict=True))
        self._tokens = [map_file(f"{name}.tokens", dtype, c.tokens) for name, c in sizes]
        self._sentences = [
            map_file(f"{name}.sentences", OFFSETS, c.sentences + 1) for name, c in sizes
        ]
        self._documents = [
            map_file(f"{name}.documents", OFFSETS, c.documents + 1) for name, c in sizes
        ]
        self._words = [
            map_file(f"{name}.words", np.dtype("u1"), -(-c.tokens // 8))
            for name, c in sizes
            if words
        ]
        # Where each shard begins in the global numbering; the last entry is the total.
        self._document_base = _running_total([c.documents for c in shards])
        self._sentence_base = _running_total([c.sentences for c in shards])
        self._token_base = _running_total([c.tokens for c in shards])
        self.documents = int(self._document_base[-1])
        self.sentences = int(self._sentence_base[-1])
        self.tokens = int(self._token_base[-1])

    def first_sentence(self, documents: np.ndarray) -> np.ndarray:
        """Return the global index of each document's first sentence.

        Index `self.documents` gives `self.sentences`.
        """
        return _look_up(self._documents, self._document_base, self._sentence_base, documents)

    def first_token(self, sentences: np.ndarray) -> np.ndarray:
        """Return the global offset of each sentence's first token.

        Index `self.sentences` gives `self.tokens`.
        """
        return _look_up(self._sentences, self._sentence_base, self._token_base, sentences)

    def document_of(self, sentences: np.ndarray) -> np.ndarray:
        """Return the global index of the document that each sentence belongs to."""
        sentences = np.asarray(sentences, np.int64)
        assert sentences.size == 0 or (sentences.min() >= 0 and sentences.max() < self.sentences)
        result = np.empty_like(sentences)
        shards = np.searchsorted(self._sentence_base, sentences, "right") - 1
        for shard, chosen in _by_shard(shards):
            local = sentences[chosen] - self._sentence_base[shard]
            local_documents = np.searchsorted(self._documents[shard], local, "right") - 1
            result[chosen] = local_documents + self._document_base[shard]
        return result

    def gather(self, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Return the token ids of many spans, one span after another.

        Args:
            starts: int64 [N], global token offsets; a span lies within one document.
            lengths: int64 [N], tokens.

        Returns:
            int64 [sum(lengths)].
        """
        positions = self._positions(starts, lengths)
        if len(self._tokens) == 1:
            return self._tokens[0][positions].astype(np.int64)
        shards = np.searchsorted(self._token_base, positions, "right") - 1
        result = np.empty(len(positions), np.int64)
        for shard, chosen in _by_shard(shards):
            result[chosen] = self._tokens[shard][positions[chosen] - self._token_base[shard]]
        return result

    def begins_word(self, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Return whether the tokens of `gather(starts, lengths)` begin a word, bool [T]."""
        positions = self._positions(starts, lengths)
        shards = np.searchsorted(self._token_base, positions, "right") - 1
        result = np.empty(len(positions), bool)
        for shard, chosen in _by_shard(shards):
            at = positions[chosen] - self._token_base[shard]
            result[chosen] = self._words[shard][at >> 3] >> (7 - (at & 7)).astype(np.uint8) & 1
        return result

    def _positions(self, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Return the global offsets of the tokens of many spans, one span after another."""
        starts, lengths = np.asarray(starts, np.int64), np.asarray(lengths, np.int64)
        ends = np.cumsum(lengths)
        total = int(ends[-1]) if len(ends) else 0
        # Position p of the result belongs to span s and holds token
        # starts[s] + (p - first position of s).
        positions = np.arange(total) + np.repeat(starts - (ends - lengths), lengths)
        assert total == 0 or (positions.min() >= 0 and positions.max() < self.tokens)
        return positions


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

    def split(self, name: str) -> Split:
        """Open the split "train" or "heldout"."""
        shards = [Counts(**shard) for shard in self.manifest["splits"][name]["shards"]]
        return Split(self.path / name, shards, token_dtype(self.vocab_size), self.has_words)

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

    def verify(self) -> Generator[tuple[int, int]]:
        """Check every byte of the dataset; see verify.py.

        Yields:
            From time to time, the bytes checked so far and the bytes in all.

        Raises:
            InputError: a file that is damaged or changed, or holds impossible numbers.
        """
        if (yield from verify_files(self.path, self.sha256, self._claims())):
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

    def _claims(self) -> list[Claim]:
        """Return what the manifest claims about its files."""
        checks: dict[str, tuple[np.dtype, NumberCheck | None]] = {}
        for split in SPLITS:
            for i, shard in enumerate(self.manifest["splits"][split]["shards"]):
                name, counts = f"{split}/{shard_name(i)}", Counts(**shard)
                checks[f"{name}.tokens"] = token_dtype(self.vocab_size), ids_below(self.vocab_size)
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
            for name, entry in self.manifest["files"].items()
        ]


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
    path = fetch_dataset(Url(str(path))) if is_url(path) else Path(path)
    again = "make it again with `fastbert prepare`"
    if not is_folder(path):
        raise InputError(
            f"{path}: no such dataset; make one with `fastbert prepare SOURCE --out {path}`"
        )
    try:
        data = read_bytes(path / MANIFEST)
    except FileNotFoundError:
        raise InputError(f"{path}: not a complete dataset: it has no {MANIFEST}; {again}") from None
    except OSError as error:
        raise InputError(f"{path / MANIFEST}: cannot be read: {error.strerror}") from None
    try:
        version = json.loads(data)["format"]
        manifest = unsealed(data) if version == FORMAT else {}
    except (ValueError, TypeError, KeyError, RecursionError):
        raise InputError(f"{path / MANIFEST}: not the manifest of a dataset; {again}") from None
    if version != FORMAT:
        raise InputError(
            f"{path / MANIFEST}: format = {version!r}, this fastbert reads format {FORMAT}; {again}"
        )
    if manifest is None:
        raise InputError(
            f"{path / MANIFEST}: it does not have its own SHA-256: damaged or changed; {AGAIN}"
        )
    if problem := _problem(manifest):
        raise InputError(f"{path / MANIFEST}: {problem}; {again}")
    for name, entry in manifest["files"].items():
        file = path / name
        try:
            size = file.stat().st_size
        except OSError as error:
            raise InputError(
                f"{file}: part of the dataset, but cannot be read ({error.strerror}); {AGAIN}"
            ) from None
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


def shard_name(index: int) -> str:
    return f"shard-{index:05d}"


def _running_total(counts: Sequence[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


def _by_shard(shards: np.ndarray) -> Iterator[tuple[int, tuple[np.ndarray, ...]]]:
    """Yield each shard that occurs in an array of any shape, and the indices where it does.

    A sort takes the same time for any number of shards, where a comparison for each would not.
    """
    flat = shards.ravel()
    order = np.argsort(flat, kind="stable")
    bounds = np.flatnonzero(np.diff(flat[order])) + 1
    for places in np.split(order, bounds) if len(order) else ():
        yield int(flat[places[0]]), np.unravel_index(places, shards.shape)


def _look_up(
    offsets: list[np.ndarray], base: np.ndarray, target_base: np.ndarray, indices: np.ndarray
) -> np.ndarray:
    """Return global offsets for global indices, from the offsets within the shards.

    The index one past the end gives the end of the last shard.
    """
    indices = np.asarray(indices, np.int64)
    assert indices.size == 0 or (indices.min() >= 0 and indices.max() <= base[-1])
    if len(offsets) == 1:
        return offsets[0][indices].astype(np.int64)
    result = np.empty_like(indices)
    shards = np.minimum(np.searchsorted(base, indices, "right") - 1, len(offsets) - 1)
    for shard, chosen in _by_shard(shards):
        result[chosen] = offsets[shard][indices[chosen] - base[shard]] + target_base[shard]
    return result


def _problem(manifest: Any) -> str | None:
    """Return what is wrong with a manifest of the right format, or None."""
    try:
        vocab_size, special = manifest["vocab_size"], SpecialIds(**manifest["special"])
        has_words = "tokenizer" in manifest
        if (
            not _count(vocab_size)
            or not all(_count(i) and i < vocab_size for i in special.all)
            or special.mask in (special.pad, special.unk, special.cls, special.sep)
            or (len(special.all) != 5 and not has_words)
        ):
            return "vocab_size and special ids do not agree"
        width = token_dtype(vocab_size).itemsize
        sizes: dict[str, int | None] = dict.fromkeys(other_files(has_words))
        for split in SPLITS:
            shards = [Counts(**shard) for shard in manifest["splits"][split]["shards"]]
            totals = Counts(
                *(manifest["splits"][split][k] for k in ("documents", "sentences", "tokens"))
            )
            if not all(_count(c) and c > 0 for s in [*shards, totals] for c in asdict(s).values()):
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
                not _count(entry["size"])
                or not isinstance(entry["sha256"], str)
                or sizes[name] not in (None, entry["size"])
            ):
                return f"the entry of {name} contradicts the counts"
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        return f"a part is missing or of the wrong kind ({type(error).__name__}: {error})"
    return None


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
