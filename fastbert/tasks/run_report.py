"""`fastbert report RUN`: a run as one self-contained HTML page.

It shows curves, where the time went, held-out results, samples, and the recipe. Curves are SVG
inside the page. Each is narrow enough for a phone, and on a wide screen they stand side by side.
"""

from __future__ import annotations

import html
import os
import platform
import re
import tempfile
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from fastbert import storage
from fastbert.data.dataset import open_dataset
from fastbert.data.tokenizer import token_text
from fastbert.durable import replaceable, replacing
from fastbert.errors import Diverged, InputError
from fastbert.presence import is_file, is_folder, unreadable
from fastbert.regular_file import read_text
from fastbert.storage import Place, Url, place
from fastbert.tasks.evaluate import Evaluation, Masked, evaluate
from fastbert.tasks.load import load
from fastbert.tasks.pretrained import Pretrained
from fastbert.training.history import History
from fastbert.training.metrics import LOSS_KEYS, read_metrics
from fastbert.training.picture import (
    GRID,
    HELDOUT,
    INK,
    MASKED,
    MUTED,
    NSP,
    TRAIN,
    draw_accuracy,
    draw_mlm,
    draw_nsp,
    svg,
)

SAMPLES = 8  # held-out sentences with a hidden word
SAMPLE_TOKENS = (8, 32)  # shortest and longest of these sentences
LOG_LINES = 12  # from the start and the end of log.txt

COLUMNS = (*LOSS_KEYS, "lr", "grad_norm", "tokens", "seconds", "tokens_per_s")


def read_history(run: Path) -> History:
    """Read the history of a run.

    Raises:
        InputError: metrics.jsonl cannot be read, or has no step to report on.
    """
    history = History(COLUMNS)
    try:
        history.read(read_metrics(run / "metrics.jsonl", history.bad))
    except OSError as error:
        raise unreadable(run / "metrics.jsonl", error) from None
    if not len(history):
        raise InputError(
            f"{run}: no step in metrics.jsonl; give the folder of a run that has started"
        )
    return history


def report(run: str | Path, out: str | Path | None = None, sequences: int | None = None) -> Path:
    """Write the page and return its path.

    Args:
        run: the folder of a run, finished or not; or its URL.
        out: the file, by default RUN/report.html, or NAME-report.html here for the URL of a run
            NAME; an earlier report is replaced.
        sequences: number of held-out examples to evaluate; by default the recipe's.

    Raises:
        InputError: no run, a run without a step, or a file that cannot be read.
    """
    at = place(run)
    if isinstance(at, Url):
        with tempfile.TemporaryDirectory() as folder:
            records = Path(folder) / at.name
            records.mkdir()
            _fetch_records(at, records)
            return _report(at, records, Path(out or f"{at.name}-report.html"), sequences)
    return _report(at, at, Path(out) if out else at / "report.html", sequences)


def _fetch_records(url: Url, folder: Path) -> None:
    """Copy what a page is made of, but the checkpoint."""
    with storage.answering(url):
        for name in ("config.toml", "metrics.jsonl", "log.txt"):
            if (length := storage.size(url / name)) is not None:
                for _ in storage.fetch(url / name, folder / name, length, None):
                    pass


def _report(at: Place, run: Path, out: Path, sequences: int | None) -> Path:
    """Write the page on the run at `at`, whose records are in the folder `run`."""
    if not is_file(run / "config.toml"):
        raise InputError(f"{at}: no config.toml; give the folder of a run")
    if out.suffix not in (".html", ".htm"):
        raise InputError(f"--out {out}: must end in .html")
    if not is_folder(out.parent):
        raise InputError(f"--out {out}: the folder {out.parent} does not exist; make it first")
    if problem := replaceable(out):
        raise InputError(f"--out {out}: {problem}")
    if not _is_report(out):
        raise InputError(
            f"--out {out}: exists, and is no report of fastbert; remove it or give another name"
        )
    history = read_history(run)
    page = _page(run, history, *_results(at, sequences))
    with replacing(out) as staging:
        staging.write_text(page, encoding="utf-8")
    return out


def _is_report(out: Path) -> bool:
    """Whether a file is empty, missing, or a page that `report` has written."""
    try:
        with open(out, "rb") as file:
            begin = file.read(1024)
    except FileNotFoundError:
        return True
    return not begin or _GENERATOR.encode() in begin


def _results(run: Place, sequences: int | None) -> tuple[Pretrained | None, Evaluation | None, str]:
    """Return the model of the newest checkpoint and its evaluation, or why there is none."""
    try:
        pretrained = load(str(run), "cpu")
        return pretrained, evaluate(pretrained, sequences=sequences), ""
    except (Diverged, InputError) as error:
        return None, None, str(error)


# ----------------------------------------------------------------------------- the page

_GENERATOR = '<meta name="generator" content="fastbert report">'
_STYLE = f"""
:root {{ color: {INK}; font: 16px/1.5 system-ui, sans-serif; }}
body {{ margin: 0 auto; max-width: 72rem; padding: 1rem; }}
h1 {{ font-size: 1.5rem; margin: 0; overflow-wrap: anywhere; }}
h2 {{ font-size: 1.15rem; margin: 2rem 0 .5rem; }}
p.note {{ color: {MUTED}; margin: .25rem 0; }}
.cards {{ display: grid; gap: .75rem; margin: 1rem 0;
  grid-template-columns: repeat(auto-fit, minmax(max(8.5rem, 22%), 1fr)); }} /* 4 and 4 */
.cards div {{ border: 1px solid {GRID}; border-radius: .5rem; padding: .5rem .75rem; }}
.cards b {{ display: block; font-size: 1.25rem; font-variant-numeric: tabular-nums; }}
.cards span {{ color: {MUTED}; font-size: .85rem; }}
.curves {{ display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)); }}
.curves svg {{ width: 100%; height: auto; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .25rem .75rem .25rem 0; text-align: right; white-space: nowrap;
  border-bottom: 1px solid {GRID}; }}
th:first-child, td:first-child {{ text-align: left; }}
th {{ color: {MUTED}; font-weight: 500; }}
.bar {{ display: flex; height: 1.25rem; border-radius: .25rem; overflow: hidden; }}
.sample {{ margin: .75rem 0; }}
.sample p {{ margin: 0; }}
.right {{ color: #15803d; font-weight: 600; }}
pre {{ background: #f9fafb; border: 1px solid {GRID}; border-radius: .5rem; padding: .75rem;
  overflow-x: auto; font-size: .8rem; }}
pre.log {{ white-space: pre-wrap; overflow-wrap: anywhere; }}
"""


def _page(
    run: Path,
    history: History,
    pretrained: Pretrained | None,
    found: Evaluation | None,
    why_not: str,
) -> str:
    recipe = read_text(run / "config.toml").strip()
    sections = [
        f"<h1>{_text(run.resolve().name)}</h1>",
        _cards(history, pretrained, found),
        _notes(run),
        f'<h2>Curves</h2><div class="curves">{"".join(_curves(history, found))}</div>',
        "<h2>Where the time went</h2>" + _times(history),
        "<h2>Held-out results</h2>"
        + (_held_out(found) if found else f'<p class="note">None: {_text(why_not)}</p>'),
    ]
    if pretrained is not None:
        sections.append("<h2>What it guesses</h2>" + _samples(pretrained))
    sections += [
        f"<h2>Recipe</h2><pre>{_text(recipe)}</pre>",
        "<h2>Machine and log</h2>" + _log(run),
    ]
    head = (
        f'<meta charset="utf-8">{_GENERATOR}'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(run.resolve().name)}</title>"
    )
    body = "\n".join(sections)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>{head}<style>{_STYLE}</style></head>\n'
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def _text(value: object) -> str:
    return html.escape(str(value))


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{_text(name)}</th>" for name in columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return (
        f'<div class="wide"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _cards(history: History, pretrained: Pretrained | None, found: Evaluation | None) -> str:
    seconds, speeds = np.nansum(history.column("seconds")), history.column("tokens_per_s")
    cards = [
        (f"{history.column('step')[-1]:,.0f}", "steps"),
        (f"{np.nansum(history.column('tokens')) / 1e6:,.1f} M", "tokens seen"),
        (_clock(seconds), "hours of steps" if seconds >= 3600 else "of steps"),
        (f"{np.nanmedian(speeds):,.0f}", "tokens/s, median"),
    ]
    if pretrained is not None:
        parameters = sum(p.numel() for p in pretrained.model.parameters())
        cards.insert(0, (f"{parameters / 1e6:,.1f} M", "parameters"))
    if found is not None and pretrained is not None:
        at = f"step {pretrained.metadata['step']:,}"
        cards += [
            (f"{found.masked.loss:.3f}", f"held-out MLM loss, {at}"),
            (f"{found.masked.accuracy:.1%}", f"masked tokens right, {at}"),
        ]
        if found.pairs:
            cards.append((f"{found.pairs.accuracy:.1%}", f"next sentences right, {at}"))
    note = f'<p class="note">{_text(_state(history))}</p>'
    if history.bad:
        bad = f"{len(history.bad):,} lines of metrics.jsonl cannot be read and are left out."
        note += f'<p class="note">{bad}</p>'
    shown = "".join(f"<div><b>{_text(value)}</b><span>{name}</span></div>" for value, name in cards)
    return f'{note}<div class="cards">{shown}</div>'


def _state(history: History) -> str:
    """Whether the run is still training, judging by its records: it may have been resumed."""
    last = [event for event in history.events if event["event"] in ("stop", "resume")][-1:]
    if last and last[0]["event"] == "stop":
        return f"Ended by: {last[0].get('reason') or 'a stop without a reason'}"
    since = f" since it was resumed after step {last[0]['step']:,}" if last else ""
    return f"Running: no end is on record{since}."


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _held_out(found: Evaluation) -> str:
    def row(name: str, masked: Masked) -> list[str]:
        losses = (f"{value:.3f}" for value in (masked.loss, masked.unigram, masked.left_bigram))
        shares = (f"{share:.1%}" for share in (masked.accuracy, masked.accuracy_of_5))
        return [name, *losses, *shares, f"{masked.count:,}"]

    rows = [
        row("all masked tokens", found.masked),
        *(row(name, masked) for name, masked in found.by_corruption.items()),
    ]
    rows += [row(f"sequences of {name} tokens", masked) for name, masked in found.by_length.items()]
    rows += [
        row(f"tokens {name} times in a million", masked)
        for name, masked in found.by_frequency.items()
    ]
    rows += [row(f"source {name}", one.masked) for name, one in found.sources.items()]
    columns = (
        "",
        "loss (nats)",
        "frequencies alone",
        "left neighbour",
        "right",
        "in first 5",
        "positions",
    )
    text = (
        f"{found.sequences:,} sequences, {found.tokens:,} tokens; "
        f"perplexity {found.masked.perplexity:,.1f}"
    )
    if found.sources:
        text = f"mean over the sources of the mixture by their shares: {text}"
    if (pairs := found.pairs) is not None:
        right = f"{pairs.accuracy:.1%} of {pairs.count:,} right"
        text += f"; next sentence: loss {pairs.loss:.3f}, {right}"
    return f'<p class="note">{_text(text)}</p>' + _table(columns, rows)


def _times(history: History) -> str:
    """Return how the run's time divides into steps, evaluations, saves and the rest.

    The rest is pictures and starts.
    """
    steps = float(np.nansum(history.column("seconds")))
    evaluations = float(np.nansum(history.evaluated("seconds")[1]))
    saves = sum(event.get("seconds") or 0.0 for event in history.events if event["event"] == "save")
    known = steps + evaluations + saves
    last = [found.get("training_seconds") or 0.0 for found in history.evaluations[-1:]]
    whole = max([known, *last])
    parts = [
        ("steps", steps, HELDOUT),
        ("evaluations", evaluations, NSP),
        ("waiting for saves", saves, MASKED),
        ("the rest", whole - known, TRAIN),
    ]
    bar = "".join(
        f'<div style="width:{100 * value / whole:.2f}%;background:{colour}"></div>'
        for _, value, colour in parts
    )
    rows = [(name, _clock(value), f"{value / whole:.2%}") for name, value, _ in parts]
    return f'<div class="bar">{bar}</div>' + _table(("", "time", "share"), rows)


def _notes(run: Path) -> str:
    """Return what the run's log says about its losses in words: the notes."""
    notes = [line.partition(" note: ")[2] for line in _log_lines(run)]
    return "".join(f"<p>{_text(note)}</p>" for note in dict.fromkeys(notes) if note)


def _log_lines(run: Path) -> list[str]:
    if not is_file(run / "log.txt"):
        return []
    return read_text(run / "log.txt", errors="replace").splitlines()


def _log(run: Path) -> str:
    lines = _log_lines(run)
    shown = lines
    if len(lines) > 2 * LOG_LINES:
        shown = [*lines[:LOG_LINES], "...", *lines[-LOG_LINES:]]
    made = (
        f"This page: fastbert {version('fastbert-pretrain')}, {platform.machine()}, "
        f"{os.cpu_count()} cores, Python {platform.python_version()}"
    )
    log = _text("\n".join(shown))
    return f'<pre class="log">{log}</pre><p class="note">{_text(made)}</p>'


# ----------------------------------------------------------------------------- samples


def _samples(pretrained: Pretrained) -> str:
    """Show held-out sentences with a hidden word, and the model's top predictions."""
    parts = []
    for before, word, after in _hidden_words(pretrained):
        (guesses,) = pretrained.fill_mask(f"{before}{pretrained.mask_token}{after}", 5)
        shown = ", ".join(
            f'<span class="right">{_text(token)} {share:.0%}</span>'
            if token == word
            else f"{_text(token)} {share:.0%}"
            for token, share in guesses
        )
        gap = " " * word.startswith(" ")
        sentence = f"{_text(before)}{gap}<b>[{_text(word.strip())}]</b>{_text(after)}"
        parts.append(f'<div class="sample"><p>{sentence}</p><p class="note">{shown}</p></div>')
    return "".join(parts) or '<p class="note">No dataset at hand to take sentences from.</p>'


def _hidden_words(pretrained: Pretrained) -> list[tuple[str, str, str]]:
    """Choose sentences spread evenly over the held-out split, and hide a word in each.

    Returns:
        The text before the word, the word, and the text after it. The word is the longest one that
        is a single token.
    """
    if pretrained.recipe is None:
        return []
    try:
        # The evaluation has just verified it.
        dataset = open_dataset(pretrained.recipe.sources[0].path, verify=False)
    except InputError:
        return []
    split, tokenizer = dataset.split("heldout"), pretrained.tokenizer
    low, high = SAMPLE_TOKENS
    bounds = split.first_token(np.arange(split.sentences + 1))
    lengths = np.diff(bounds)
    right = np.flatnonzero((lengths >= low) & (lengths <= min(high, pretrained.max_tokens)))
    found = []
    chosen = np.linspace(0, len(right) - 1, min(SAMPLES, len(right))).astype(np.int64)
    for sentence in right[chosen]:
        ids = split.gather(bounds[[sentence]], lengths[[sentence]])
        tokens = [token_text(tokenizer, int(i)) for i in ids]
        if dataset.has_words:
            begins = split.begins_word(bounds[[sentence]], lengths[[sentence]]).tolist()
        else:
            begins = (~dataset.continues_word[ids]).tolist()
        # A word is a single token if the next token begins another word.
        whole = [
            i
            for i, token in enumerate(tokens)
            if token.strip().isalpha() and begins[i] and all(begins[i + 1 : i + 2])
        ]
        if whole:
            at = max(whole, key=lambda i: len(tokens[i]))
            if dataset.has_words:
                before, after = (
                    tokenizer.decode(part.tolist()) for part in (ids[:at], ids[at + 1 :])
                )
            else:
                mask = pretrained.mask_token
                before, after = _words([*tokens[:at], mask, *tokens[at + 1 :]]).split(mask)
            found.append((before, tokens[at], after))
    return found


def _words(tokens: Sequence[str]) -> str:
    """Join tokens as text, with usual spacing around punctuation."""
    text = " ".join(tokens).replace(" ##", "")
    text = re.sub(r" (['’\-]) ", r"\1", text)
    text = re.sub(r"([(\[]) ", r"\1", text)
    return re.sub(r" ([.,;:?!)\]])", r"\1", text)


def _curves(history: History, found: Evaluation | None) -> Iterable[str]:
    def plain(key: str) -> Callable[[Any], Any]:
        return lambda ax: ax.plot(*history.smooth(key), color=HELDOUT)

    baselines = found.baselines if found else {}
    yield svg("MLM loss, nats", lambda ax: draw_mlm(ax, history, baselines))
    if history.smooth("loss_nsp")[0]:
        yield svg("NSP loss, nats", lambda ax: draw_nsp(ax, history))
    yield svg("held-out accuracy, %", lambda ax: draw_accuracy(ax, history))
    yield svg("tokens a second", plain("tokens_per_s"))
    yield svg("norm of the gradient", plain("grad_norm"))
    yield svg("learning rate", plain("lr"))
