"""The report on the data that `prepare` ends with: figures, and a line on what to do where one looks wrong."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from fastbert.data.encode import LONGEST_SENTENCE, EncodedChunk

if TYPE_CHECKING:
    from rich.table import Table

LENGTHS = (128, 512)  # max_length of the two usual phases of pre-training
_LONGEST_COUNTED = 1 << 16  # tokens of a document; quantiles do not tell longer ones apart
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_HASHES = 1 << 22  # kept at most: 32 MiB


class CorpusStats:
    """What is counted while the text goes by; its size does not depend on the text's."""

    def __init__(self) -> None:
        self.documents = self.sentences = self.tokens = self.heldout_documents = (
            self.heldout_tokens
        ) = 0
        self.empty_documents = self.single_sentence_documents = self.cut_sentences = (
            self.unknown_tokens
        ) = 0
        self.document_lengths = np.zeros(
            _LONGEST_COUNTED + 1, np.int64
        )  # how many documents have so many tokens
        self.sentence_lengths = np.zeros(LONGEST_SENTENCE + 1, np.int64)
        self.sequences = dict.fromkeys(LENGTHS, 0)
        self.kept_tokens = dict.fromkeys(LENGTHS, 0)
        self.document_hashes, self.sentence_hashes = DuplicateEstimator(), DuplicateEstimator()

    def add(self, chunk: EncodedChunk) -> None:
        for part in (chunk.train, chunk.heldout):
            self.documents += len(part.documents)
            self.sentences += len(part.sentences)
            self.tokens += len(part.tokens)
            self.single_sentence_documents += int((part.documents == 1).sum())
            self.sentence_lengths += np.bincount(
                part.sentences, minlength=len(self.sentence_lengths)
            )
            if len(part.documents):
                lengths = np.add.reduceat(
                    part.sentences, np.cumsum(part.documents) - part.documents
                )
                self.document_lengths += np.bincount(
                    lengths.clip(max=_LONGEST_COUNTED), minlength=len(self.document_lengths)
                )
                for length in LENGTHS:
                    self.sequences[length] += int((-(-lengths // (length - 3))).sum())
                    self.kept_tokens[length] += int(lengths.clip(max=length - 2).sum())
        self.heldout_documents += len(chunk.heldout.documents)
        self.heldout_tokens += len(chunk.heldout.tokens)
        self.empty_documents += chunk.empty_documents
        self.cut_sentences += chunk.cut_sentences
        self.unknown_tokens += chunk.unknown_tokens
        self.document_hashes.add(chunk.document_hashes)
        self.sentence_hashes.add(chunk.sentence_hashes)


class DuplicateEstimator:
    """The share of copies in a stream of hashes, from those that end in a growing number of zero bits.

    All copies of a thing share its hash, so they are kept or left out together and the share is not biased.
    """

    def __init__(self, most: int = _HASHES):
        self._most, self._bits, self._size = most, 0, 0
        self._kept: list[np.ndarray] = []

    def add(self, hashes: np.ndarray) -> None:
        """uint64 [N]; with copies."""
        self._kept.append(self._chosen(hashes))
        self._size += len(self._kept[-1])
        while self._size > self._most and self._bits < 32:
            self._bits += 1
            self._kept = [self._chosen(np.concatenate(self._kept))]
            self._size = len(self._kept[0])

    def _chosen(self, hashes: np.ndarray) -> np.ndarray:
        return hashes[hashes & np.uint64((1 << self._bits) - 1) == 0]

    @property
    def sampled(self) -> bool:
        return self._bits > 0

    def duplicates(self) -> float:
        """Share of the things that came before already."""
        kept = np.concatenate([np.zeros(0, np.uint64), *self._kept])
        return 1 - len(np.unique(kept)) / len(kept) if len(kept) else 0.0


@dataclass(frozen=True)
class Row:
    """One line of the report: what, how much, and what to do if that looks wrong."""

    name: str
    value: str
    advice: str = ""


@dataclass(frozen=True)
class Report:
    """What `prepare` found: `figures` for programs, `rows` for people."""

    figures: dict[str, Any]
    rows: list[Row] = field(repr=False)

    def json(self) -> str:
        advice = {row.name: row.advice for row in self.rows if row.advice}
        return json.dumps({**self.figures, "advice": advice}, indent=2, ensure_ascii=False) + "\n"

    def markdown(self) -> str:
        lines = [
            "| | | what to do |",
            "|---|---:|---|",
            *(f"| {row.name} | {row.value} | {row.advice} |" for row in self.rows),
        ]
        return "\n".join(lines) + "\n"

    def table(self) -> Table:
        """For a terminal."""
        from rich.table import Table

        table = Table("data", "", "what to do", title_justify="left")
        table.columns[1].justify = "right"
        for row in self.rows:
            table.add_row(row.name, row.value, row.advice, style="yellow" if row.advice else None)
        return table


def make_report(
    stats: CorpusStats, vocab_size: int, asked_vocab_size: int | None, baselines: dict[str, float]
) -> Report:
    """Put the counts into figures and words; `asked_vocab_size` is None where the tokenizer was given."""
    documents, sentences, tokens = stats.documents, stats.sentences, stats.tokens
    document_lengths, sentence_lengths = (
        _quantiles(stats.document_lengths),
        _quantiles(stats.sentence_lengths),
    )
    fill = {n: (tokens + 3 * count) / (n * count) for n, count in stats.sequences.items()}
    figures: dict[str, Any] = {
        "documents": documents,
        "sentences": sentences,
        "tokens": tokens,
        "heldout_documents": stats.heldout_documents,
        "heldout_tokens": stats.heldout_tokens,
        "vocab_size": vocab_size,
        "unknown_share": _round(stats.unknown_tokens / tokens),
        "empty_documents": stats.empty_documents,
        "single_sentence_share": _round(stats.single_sentence_documents / documents),
        "duplicate_document_share": _round(stats.document_hashes.duplicates()),
        "duplicate_sentence_share": _round(stats.sentence_hashes.duplicates()),
        "duplicates_sampled": stats.document_hashes.sampled or stats.sentence_hashes.sampled,
        "cut_sentences": stats.cut_sentences,
        "document_tokens": document_lengths,
        "sentence_tokens": sentence_lengths,
        "truncated_share": {
            str(n): _round(1 - kept / tokens) for n, kept in stats.kept_tokens.items()
        },
        "padding_share": {str(n): _round(1 - share) for n, share in fill.items()},
        "baselines": baselines,
    }
    sampled = " (sampled)" if figures["duplicates_sampled"] else ""

    def row(name: str, value: str, wrong: bool = False, advice: str = "") -> Row:
        return Row(name, value, advice if wrong else "")

    rows = [
        row(
            "documents",
            f"{documents:,}",
            documents < 1000 and tokens / documents > 10_000,
            "few and very long: if these are whole files, put a blank line between documents, or use --format lines",
        ),
        row("empty documents, left out", f"{stats.empty_documents:,}"),
        row("sentences", f"{sentences:,}"),
        row(
            "tokens",
            f"{tokens:,}",
            tokens < 1_000_000,
            "enough to try things; a useful model wants 100 million and more",
        ),
        row(
            "vocabulary",
            f"{vocab_size:,}",
            asked_vocab_size is not None and vocab_size < asked_vocab_size,
            f"the text has too few words that occur twice for the {asked_vocab_size or 0:,} asked for; fine, or add text",
        ),
        row(
            "[UNK]",
            _percent(figures["unknown_share"]),
            figures["unknown_share"] > 0.01,
            "the vocabulary does not fit the text; "
            + (
                "raise --vocab-size"
                if asked_vocab_size
                else "train one on the text: leave out --tokenizer"
            ),
        ),
        row(
            "copies of documents" + sampled,
            _percent(figures["duplicate_document_share"]),
            figures["duplicate_document_share"] > 0.01,
            "the model learns copies by heart; remove them from the sources",
        ),
        row(
            "copies of sentences" + sampled,
            _percent(figures["duplicate_sentence_share"]),
            figures["duplicate_sentence_share"] > 0.1,
            "menus, footers or licences? remove such lines from the sources",
        ),
        row(
            "documents of one sentence",
            _percent(figures["single_sentence_share"]),
            figures["single_sentence_share"] > 0.2,
            'they have no true next sentence; join what belongs together, or train with objective.kind = "mlm"',
        ),
        row(
            f"sentences cut at {LONGEST_SENTENCE} tokens",
            f"{stats.cut_sentences:,}",
            stats.cut_sentences > 0.01 * sentences,
            "text without sentence marks, such as tables? nothing is lost, but their parts count as sentences",
        ),
        row("tokens in a sentence, " + _NAMES, _spread(sentence_lengths)),
        row("tokens in a document, " + _NAMES, _spread(document_lengths)),
        *(
            row(
                f"lost if documents were cut at {n} tokens",
                _percent(figures["truncated_share"][str(n)]) + "; here: none",
            )
            for n in LENGTHS
        ),
        *(
            row(
                f"padding at {n} tokens",
                _percent(figures["padding_share"][str(n)]) + "; packed: none",
            )
            for n in LENGTHS
        ),
        row(
            "held out for evaluation",
            f"{stats.heldout_documents:,} documents, {stats.heldout_tokens:,} tokens",
            stats.heldout_tokens < 20_000,
            "the held-out loss will be known to a tenth of a nat only; raise --heldout or add text",
        ),
        *(
            row(f"baseline: {name.replace('_', ' ')}", f"{value:.2f} nats")
            for name, value in baselines.items()
            if not name.endswith("tokens")
        ),
    ]
    return Report(figures, rows)


_NAMES = ", ".join(f"{100 * q:.0f} %" for q in _QUANTILES) + " and longest"


def _quantiles(histogram: np.ndarray) -> dict[str, int]:
    """The lengths that these shares of all do not exceed, and the longest; `histogram[n]` counts those of length n."""
    running = np.cumsum(histogram)
    values = {f"{q:g}": int(np.searchsorted(running, q * running[-1])) for q in _QUANTILES}
    return values | {"longest": int(np.flatnonzero(histogram)[-1])}


def _spread(quantiles: dict[str, int]) -> str:
    *values, longest = quantiles.values()
    return (
        ", ".join(f"{value:,}" for value in values)
        + f"; {longest:,}"
        + ("+" if longest == _LONGEST_COUNTED else "")
    )


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _round(share: float) -> float:
    return round(share, 6)
