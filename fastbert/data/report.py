"""The report of `prepare` on the data: figures, and advice where one of them looks wrong."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from fastbert.data import damage
from fastbert.data.damage import Damage
from fastbert.data.encode import LONGEST_SENTENCE, Documents, EncodedChunk, hash_spans
from fastbert.data.encoder import Losses

if TYPE_CHECKING:
    from rich.table import Table

LENGTHS = (128, 512)  # max_length of the two usual phases of pre-training
_LONGEST_COUNTED = 1 << 16  # tokens of a document; longer ones are counted as this long
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_HASHES = 1 << 22  # kept at most: 32 MiB
# With n stretches in a window, the number of examples that a step of S takes from one source has
# about 1 + S / n times the variance of a random choice. Here this is 1.5 for steps of 256.
LEAST_STRETCHES = 512
_BAD_SHOWN = 3  # bad records in the table; report.json lists more


@dataclass
class TextStats:
    """What is counted while text is read; `+` adds the counts of two texts."""

    documents: int = 0  # with text
    empty_documents: int = 0
    cut_sentences: int = 0
    losses: Losses = field(default_factory=Losses)
    damage: Damage = field(default_factory=Damage)
    bad_records: int = 0

    def add(self, chunk: EncodedChunk) -> None:
        self.documents += len(chunk.hashes)
        self.empty_documents += chunk.empty_documents
        self.cut_sentences += chunk.cut_sentences
        self.losses += chunk.losses
        self.damage += chunk.damage

    def __add__(self, other: TextStats) -> TextStats:
        return TextStats(
            **{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        )

    def to_json(self) -> dict[str, Any]:
        """Return it as values that JSON can hold."""
        return asdict(self)

    @staticmethod
    def from_json(value: dict[str, Any]) -> TextStats:
        """Return what `to_json` was made from."""
        losses, found = value["losses"], value["damage"]
        lists = {name: tuple(losses[name]) for name in ("examples", "removed")}
        examples = {name: tuple(quoted) for name, quoted in found["examples"].items()}
        made = {
            "losses": Losses(**{**losses, **lists}),
            "damage": Damage(found["documents"], examples),
        }
        return TextStats(**{**value, **made})


class CorpusStats:
    """What is counted of the documents of a dataset; the size does not depend on the text.

    Args:
        unknown: id of the token for what the tokenizer does not know, if there is one.
        bits: see DuplicateEstimator.
    """

    _SUMS = (
        "documents",
        "sentences",
        "tokens",
        "heldout_documents",
        "heldout_tokens",
        "single_sentence_documents",
        "unknown_tokens",
    )
    _ARRAYS = ("document_lengths", "sentence_lengths", "sequences", "kept_tokens")

    def __init__(self, unknown: int | None = None, bits: int = 0) -> None:
        self._unknown = unknown
        self.documents = self.sentences = self.tokens = 0
        self.heldout_documents = self.heldout_tokens = 0
        self.single_sentence_documents = self.unknown_tokens = 0
        # Histograms: how many documents, and sentences, have each number of tokens.
        self.document_lengths = np.zeros(_LONGEST_COUNTED + 1, np.int64)
        self.sentence_lengths = np.zeros(LONGEST_SENTENCE + 1, np.int64)
        self.sequences, self.kept_tokens = np.zeros((2, len(LENGTHS)), np.int64)
        self.sentence_hashes = DuplicateEstimator(bits=bits)

    def add(self, part: Documents, heldout: bool = False) -> None:
        """Count documents of one split."""
        self.documents += len(part.documents)
        self.sentences += len(part.sentences)
        self.tokens += len(part.tokens)
        if heldout:
            self.heldout_documents += len(part.documents)
            self.heldout_tokens += len(part.tokens)
        if not len(part.documents):
            return
        self.single_sentence_documents += int((part.documents == 1).sum())
        self.sentence_lengths += np.bincount(part.sentences, minlength=len(self.sentence_lengths))
        lengths = np.add.reduceat(part.sentences, np.cumsum(part.documents) - part.documents)
        self.document_lengths += np.bincount(
            lengths.clip(max=_LONGEST_COUNTED), minlength=len(self.document_lengths)
        )
        for i, length in enumerate(LENGTHS):
            self.sequences[i] += (-(-lengths // (length - 3))).sum()
            self.kept_tokens[i] += lengths.clip(max=length - 2).sum()
        if self._unknown is not None:
            self.unknown_tokens += int(np.count_nonzero(part.tokens == self._unknown))
        hashes = part.sentence_hashes
        if hashes is None:
            hashes = hash_spans(part.tokens, part.sentences)
        self.sentence_hashes.add(hashes)

    def to_arrays(self) -> tuple[dict[str, int], dict[str, np.ndarray]]:
        """Return the counts, and the arrays, for a file."""
        facts = {name: getattr(self, name) for name in self._SUMS}
        arrays = {name: getattr(self, name) for name in self._ARRAYS}
        arrays["sentence_hashes"] = self.sentence_hashes.sample()
        return {**facts, "bits": self.sentence_hashes.bits}, arrays

    def merge(self, facts: dict[str, int], arrays: dict[str, np.ndarray]) -> None:
        """Add what `to_arrays` returned for other documents."""
        for names, others in ((self._SUMS, facts), (self._ARRAYS, arrays)):
            for name in names:
                setattr(self, name, getattr(self, name) + others[name])
        self.sentence_hashes.add(arrays["sentence_hashes"], facts["bits"])


class DuplicateEstimator:
    """The share of duplicates in a stream of hashes, estimated from a sample.

    The sample holds the hashes that end in a number of zero bits, which grows with the stream. All
    copies of an item share its hash, so they are kept or dropped together and the estimate is not
    biased.

    Args:
        most: hashes that are kept.
        bits: that many zero bits at least, where it is known that the stream is long.
    """

    def __init__(self, most: int = _HASHES, bits: int = 0):
        self._most, self.bits, self._size = most, bits, 0
        self._kept: list[np.ndarray] = []

    @staticmethod
    def bits_for(items: int, most: int = _HASHES) -> int:
        """Return how many bits leave at most `most` of `items` distinct hashes, on average."""
        return max((max(items, 1) - 1) // most, 0).bit_length()

    def add(self, hashes: np.ndarray, bits: int = 0) -> None:
        """Add hashes, uint64 [N], including duplicates.

        Hashes that are a sample themselves end in `bits` zero bits.
        """
        if bits > self.bits:
            self.bits = bits
            self._kept = [self._chosen(self.sample())]
            self._size = len(self._kept[0])
        self._kept.append(self._chosen(hashes))
        self._size += len(self._kept[-1])
        while self._size > self._most and self.bits < 32:
            self.bits += 1
            self._kept = [self._chosen(self.sample())]
            self._size = len(self._kept[0])

    def sample(self) -> np.ndarray:
        """Return the hashes that are kept, uint64."""
        return np.concatenate([np.zeros(0, np.uint64), *self._kept])

    def _chosen(self, hashes: np.ndarray) -> np.ndarray:
        return hashes[hashes & np.uint64((1 << self.bits) - 1) == 0]

    @property
    def sampled(self) -> bool:
        """Whether some hashes were dropped."""
        return self.bits > 0

    def duplicates(self) -> float:
        """Return the share of items that are copies of an earlier one."""
        # np.unique is a hash table in numpy 2.4, which takes twenty times as long.
        kept = np.sort(self.sample())
        return np.count_nonzero(kept[1:] == kept[:-1]) / max(len(kept), 1)


@dataclass(frozen=True)
class Row:
    """One line of the report: name, value, and advice where the value looks wrong."""

    name: str
    value: str
    advice: str = ""


@dataclass(frozen=True, repr=False)
class Report:
    """The findings of `prepare`: `figures` for programs, `rows` for people.

    A notebook shows the rows as a table.
    """

    figures: dict[str, Any]
    rows: list[Row]

    def __repr__(self) -> str:
        names = ("documents", "sentences", "tokens")
        counts = [f"{self.figures[name]:,} {name}" for name in names]
        advice = sum(bool(row.advice) for row in self.rows)
        counts.append(f"vocabulary of {self.figures['vocab_size']:,}")
        return f"<report on a dataset: {', '.join(counts)}; advice on {advice} of its rows>"

    def _repr_html_(self) -> str:
        rows = [(row.name, row.value, row.advice) for row in self.rows]
        lines = [
            "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells)
            for tag, cells in (("th", ("data", "", "what to do")), *(("td", row) for row in rows))
        ]
        return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"

    def json(self) -> str:
        advice = {row.name: row.advice for row in self.rows if row.advice}
        return json.dumps({**self.figures, "advice": advice}, indent=2, ensure_ascii=False) + "\n"

    def markdown(self) -> str:
        rows = (
            [cell.replace("|", "\\|") for cell in (row.name, row.value, row.advice)]
            for row in self.rows
        )
        lines = ["| | | what to do |", "|---|---:|---|", *(f"| {' | '.join(r)} |" for r in rows)]
        return "\n".join(lines) + "\n"

    def table(self) -> Table:
        """Return a table for the terminal."""
        from rich.table import Table
        from rich.text import Text

        table = Table("data", "", "what to do", title_justify="left")
        table.columns[1].justify = "right"
        for row in self.rows:
            # Text, because rich takes brackets in a string, such as a quoted text, for markup.
            cells = (Text(cell) for cell in (row.name, row.value, row.advice))
            table.add_row(*cells, style="yellow" if row.advice else None)
        return table


@dataclass(frozen=True)
class About:
    """What a report says besides the counts."""

    vocab_size: int
    asked_vocab_size: int | None  # the size asked for; None where the tokenizer was given
    baselines: dict[str, float]  # in nats, by name
    files: int = 1  # how many were read
    blank_lines: bool = False  # whether a blank line ends a document in some of them
    unreachable: Sequence[str] = ()  # tokens that no text gives
    tokenizer: str | None = None  # its algorithm; None for BERT's
    # The share of documents that are copies, and whether it is from a sample.
    duplicates: tuple[float, bool] = (0.0, False)
    copies: int | None = None  # documents left out as copies; None where they are kept
    # Documents left out because evaluation sets share text with them; None where none were given.
    evaluated: int | None = None
    # The first records that were left out: "file", "line" (or "row"), "reason".
    bad_records: Sequence[dict[str, Any]] = ()
    # How many stretches of text a window mixes, each in the order of a source; None where all
    # examples are shuffled together.
    stretches: int | None = None


def make_report(stats: CorpusStats, text: TextStats, about: About) -> Report:
    """Turn the counts into figures and rows.

    Args:
        stats: the counts of the documents of both splits.
        text: the counts of the text that was read, with documents that were left out.
        about: what is known besides.
    """
    documents, sentences, tokens = stats.documents, stats.sentences, stats.tokens
    lost, files, blank_lines = text.losses, about.files, about.blank_lines
    vocab_size, asked_vocab_size = about.vocab_size, about.asked_vocab_size
    tokenizer, copies, baselines = about.tokenizer, about.copies, about.baselines
    sequences = dict(zip(LENGTHS, stats.sequences.tolist(), strict=True))
    kept_tokens = dict(zip(LENGTHS, stats.kept_tokens.tolist(), strict=True))
    document_lengths = _quantiles(stats.document_lengths)
    sentence_lengths = _quantiles(stats.sentence_lengths)
    fill = {n: (tokens + 3 * count) / (n * count) for n, count in sequences.items()}
    figures: dict[str, Any] = {
        "documents": documents,
        "files": files,
        "sentences": sentences,
        "tokens": tokens,
        "heldout_documents": stats.heldout_documents,
        "heldout_tokens": stats.heldout_tokens,
        "vocab_size": vocab_size,
        "unknown_share": _round(stats.unknown_tokens / tokens),
        "unknown_character_share": _share(lost.unknown_characters, lost.characters),
        "cut_character_share": _share(lost.cut_characters, lost.characters),
        "accents_lost": {
            "words": _share(lost.marked_words, lost.words),
            "characters": _share(lost.marks, lost.characters),
            "examples": list(lost.examples),
        },
        "inner_capitals_share": _share(lost.inner_capitals, lost.words),
        "characters_removed": {
            "words": _share(lost.removed_words, lost.words),
            "examples": list(lost.removed),
        },
        "damaged_documents": {
            kind.name: {
                "share": _share(text.damage.documents.get(kind.name, 0), text.documents),
                "examples": list(text.damage.examples.get(kind.name, ())),
            }
            for kind in damage.KINDS
        },
        "empty_documents": text.empty_documents,
        "bad_records": text.bad_records,
        "bad_records_listed": list(about.bad_records),
        "single_sentence_share": _round(stats.single_sentence_documents / documents),
        "duplicate_document_share": _round(about.duplicates[0]),
        "duplicate_sentence_share": _round(stats.sentence_hashes.duplicates()),
        "duplicates_sampled": about.duplicates[1] or stats.sentence_hashes.sampled,
        "cut_sentences": text.cut_sentences,
        "document_tokens": document_lengths,
        "sentence_tokens": sentence_lengths,
        "truncated_share": {str(n): _round(1 - kept / tokens) for n, kept in kept_tokens.items()},
        "padding_share": {str(n): _round(1 - share) for n, share in fill.items()},
        "baselines": baselines,
    }
    if copies is not None:
        figures["copies_left_out"] = copies
    if about.evaluated is not None:
        figures["evaluated_left_out"] = about.evaluated
    if tokenizer is not None:
        figures["tokenizer"] = tokenizer
    if about.stretches is not None:
        figures["stretches_per_window"] = about.stretches
    sampled = " (sampled)" if figures["duplicates_sampled"] else ""
    tokenizer_advice = "raise --vocab-size"
    keep_advice = "keep them with --keep-accents, or with --cased"
    if not asked_vocab_size:
        tokenizer_advice = "train one on the text: leave out --tokenizer"
        keep_advice = "train a tokenizer that keeps them: --keep-accents or --cased, no --tokenizer"
    examples = f": {', '.join(lost.examples)}" if lost.examples else ""

    def row(name: str, value: str, wrong: bool = False, advice: str = "") -> Row:
        return Row(name, value, advice if wrong else "")

    # None where there is nothing to say.
    rows: list[Row | None] = [
        row(
            "documents",
            f"{documents:,} in {files:,} file{'s' * (files > 1)}"
            + (
                "; a blank line ends a document (with --format file, the end of the file)"
                * blank_lines
            ),
            documents < 1000 and tokens / documents > 10_000,
            "few and very long: if these are whole files, put a blank line between documents, "
            "or use --format lines",
        ),
        row("empty documents, left out", f"{text.empty_documents:,}"),
        row(
            "bad records, left out",
            f"{text.bad_records:,}",
            text.bad_records > 0,
            "; ".join(map(_format_bad, about.bad_records[:_BAD_SHOWN])),
        ),
        row("sentences", f"{sentences:,}"),
        row(
            "tokens",
            f"{tokens:,}",
            tokens < 1_000_000,
            "enough for experiments; a useful model needs 100 million or more",
        ),
        row(
            "vocabulary",
            f"{vocab_size:,}",
            asked_vocab_size is not None and vocab_size < asked_vocab_size,
            "fewer words occur twice than needed for the "
            f"{asked_vocab_size or 0:,} tokens asked for; this is fine, or add text",
        ),
        row("tokenizer", tokenizer) if tokenizer is not None else None,
        row(
            "stretches of text that a window mixes",
            f"{about.stretches:,}",
            about.stretches < LEAST_STRETCHES,
            "steps will differ more than random ones do if the text changes along a file "
            "or from file to file: compressed files are not cut, so unpack them or "
            "compress smaller parts; or raise order.window",
        )
        if about.stretches is not None
        else None,
        row(
            "tokens that no text gives",
            f"{len(about.unreachable):,}",
            len(about.unreachable) > 0,
            f"{', '.join(about.unreachable[:5])}: BERT splits at punctuation and ideographs"
            " and may lower-case; if you wrote this vocabulary, correct them",
        )
        if not asked_vocab_size and tokenizer is None
        else None,
        row(
            "[UNK]" if tokenizer is None else "unknown tokens",
            f"{_percent(figures['unknown_share'])} of tokens, "
            f"{_percent(figures['unknown_character_share'])} of characters",
            max(figures["unknown_share"], figures["unknown_character_share"]) > 0.01,
            f"the vocabulary does not fit the text; {tokenizer_advice}",
        ),
        row(
            "words of more than 100 characters, cut",
            f"{_percent(figures['cut_character_share'])} of characters",
            figures["cut_character_share"] > 0.001,
            "transformers makes such a word one [UNK]; put spaces into the text, here and "
            "where the model is used",
        )
        if tokenizer is None
        else None,
        row(
            "accents and vowel signs dropped",
            f"{_percent(figures['accents_lost']['words'])} of words, "
            f"{_percent(figures['accents_lost']['characters'])} of characters{examples}",
            figures["accents_lost"]["words"] > 0.01,
            f"different words become the same; {keep_advice}",
        ),
        row(
            "capitals inside words, lower-cased",
            f"{_percent(figures['inner_capitals_share'])} of words",
            figures["inner_capitals_share"] > 0.02,
            "in code, chemistry and sequences case carries meaning; keep it with --cased",
        ),
        row(
            "characters removed inside words",
            f"in {_percent(figures['characters_removed']['words'])} of words"
            + (f": {', '.join(lost.removed)}" if lost.removed else ""),
            figures["characters_removed"]["words"] > 0.001,
            ("the" if tokenizer else "BERT's")
            + " tokenizer deletes them, and joins what they separate; replace them by spaces "
            "or by letters, here and where the model is used",
        ),
        *(_damage_row(kind.name, text.damage, text.documents) for kind in damage.KINDS),
        row(
            "copies of documents" + sampled,
            # The hash of a text decides on which side it is.
            f"{_percent(figures['duplicate_document_share'])}; none on both sides of the split",
            figures["duplicate_document_share"] > 0.01,
            "the model learns copies by heart; leave them out with --drop-copies",
        )
        if copies is None
        else row("copies of documents, left out", f"{copies:,}"),
        row("documents with text of evaluation sets, left out", f"{about.evaluated:,}")
        if about.evaluated is not None
        else None,
        row(
            "copies of sentences" + sampled,
            _percent(figures["duplicate_sentence_share"]),
            figures["duplicate_sentence_share"] > 0.1,
            "if these are menus, footers or licences, remove such lines from the sources",
        ),
        row(
            "documents of one sentence",
            _percent(figures["single_sentence_share"]),
            figures["single_sentence_share"] > 0.2,
            "they have no true next sentence; join what belongs together"
            + (" (--format file: a file is a document)" * blank_lines)
            + ', or train with objective.kind = "mlm"',
        ),
        row(
            f"sentences cut at {LONGEST_SENTENCE} tokens",
            f"{text.cut_sentences:,}",
            text.cut_sentences > 0.01 * sentences,
            "if this is text without punctuation, such as tables: nothing is lost, "
            "but the parts count as sentences",
        ),
        row("tokens in a sentence, " + _QUANTILE_NAMES, _format_quantiles(sentence_lengths)),
        row("tokens in a document, " + _QUANTILE_NAMES, _format_quantiles(document_lengths)),
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
            "the held-out loss will be precise to a tenth of a nat only; "
            "raise --heldout or add text",
        ),
        *(
            row(f"baseline: {name.replace('_', ' ')}", f"{value:.2f} nats")
            for name, value in baselines.items()
            if not name.endswith("tokens")
        ),
    ]
    return Report(figures, [row for row in rows if row is not None])


# What to do about damage, by kind.
_REPAIR = {
    damage.ENTITIES.name: "decode them, for example with Python's html.unescape",
    damage.TAGS.name: "take the text out of the markup, as BeautifulSoup's get_text does",
    damage.ESCAPES.name: "the text was escaped twice; decode it once more, as json.loads does",
    damage.JSON.name: "if the files are JSON lines, read them with --format jsonl",
    damage.HYPHENS.name: "join the halves, as pdftotext does without -layout",
    damage.LETTERS.name: "UTF-8 was read as Windows-1252 or Latin-1; export again, or use ftfy",
    damage.LIGATURES.name: "write them as letters, as unicodedata.normalize('NFKC', text) does",
    damage.DECOMPOSED.name: "where accents are kept, é in one character is another word; join them "
    "with unicodedata.normalize('NFC', text), here and where the model is used",
}


def _damage_row(kind: str, found: Damage, documents: int) -> Row:
    count = found.documents.get(kind, 0)
    examples = ", ".join(repr(example)[1:-1] for example in found.examples.get(kind, ()))
    return Row(
        f"documents with {kind}",
        f"{count:,}" + (f": {examples}" if examples else ""),
        f"{_REPAIR[kind]}, unless they are the subject of the text; nothing is changed here"
        if count > 0.001 * documents
        else "",
    )


def _format_bad(record: dict[str, Any]) -> str:
    place = next((f"{unit} {record[unit]}: " for unit in ("line", "row") if unit in record), "")
    return f"{record['file']}: {place}{record['reason']}"


_QUANTILE_NAMES = ", ".join(f"{100 * q:.0f} %" for q in _QUANTILES) + " and longest"


def _quantiles(histogram: np.ndarray) -> dict[str, int]:
    """Return the quantiles of the lengths, and the longest.

    `histogram[n]` is the number of items of length n.
    """
    running = np.cumsum(histogram)
    values = {f"{q:g}": int(np.searchsorted(running, q * running[-1])) for q in _QUANTILES}
    return values | {"longest": int(np.flatnonzero(histogram)[-1])}


def _format_quantiles(quantiles: dict[str, int]) -> str:
    *values, longest = quantiles.values()
    plus = "+" if longest == _LONGEST_COUNTED else ""
    return ", ".join(f"{value:,}" for value in values) + f"; {longest:,}{plus}"


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _share(part: int, whole: int) -> float:
    return _round(part / whole) if whole else 0.0


def _round(share: float) -> float:
    return round(share, 6)
