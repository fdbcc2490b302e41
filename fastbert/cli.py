"""The command line: `fastbert VERB ...`.

Every verb imports its work when it is called, so that `--help` and a wrong argument answer at once. Bad input is one line on stderr
and exit code 2; what a verb prints with --json is one JSON object on stdout, and nothing else goes there.
"""

from __future__ import annotations

import dataclasses
import errno
import faulthandler
import json
import math
import os
import sys
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from fastbert import __version__
from fastbert.errors import InputError
from fastbert.heap import keep_heap

DONE, FAILED, BAD_INPUT = 0, 1, 2

# What the system says when it is the user's disk or rights that are in the way, not a bug.
SYSTEM_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ENOTDIR}

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Pre-train a BERT of your own, from raw text to a model that Hugging Face loads.",
    epilog="Start: fastbert prepare text.txt --out data/my && fastbert pretrain recipes/mini.toml data=data/my run=runs/my",
)

# Paths that must be there are checked before anything heavy is imported.
Model = Annotated[
    Path,
    typer.Argument(metavar="RUN|DIR", help="A run, one of its checkpoints, or a Hugging Face BERT folder.", exists=True, file_okay=False),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit with its code."""
    keep_heap()
    if sys.stderr is not None:
        faulthandler.enable(all_threads=False)  # a mapped file that is cut short while it is read: the line of Python that read it
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # or a connection that breaks shows a page of C++ frames before our own line
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: Sequence[str]) -> int:
    """Run the command line; returns the exit code."""
    warnings.showwarning = _show_warning
    try:
        for argument in arguments:
            if any("\udc80" <= c <= "\udcff" for c in argument):  # how Python shows bytes that are no text
                raise InputError(f"argument {argument!r} is not UTF-8; give text and names in UTF-8")
        # Outside its standalone mode typer returns what the verb returned, or the code of typer.Exit.
        result = app(args=list(arguments) or ["--help"], prog_name="fastbert", standalone_mode=False)
        return result if isinstance(result, int) else DONE
    except InputError as error:
        return _say(error, BAD_INPUT)
    except OSError as error:
        if error.errno not in SYSTEM_ERRORS:
            raise
        place = f"{error.filename}: " if error.filename else ""
        return _say(f"{place}{error.strerror}; make room there, or choose another place", BAD_INPUT)
    except KeyboardInterrupt:
        return _say("interrupted", 130)
    except Exception as error:
        # typer's usage errors: their class is private, and an older typer takes them from click.
        message, context = getattr(error, "format_message", None), getattr(error, "ctx", None)
        if message is None:
            raise
        return _say(f"{message().rstrip('.')}; see {context.command_path if context else 'fastbert'} --help", BAD_INPUT)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"fastbert {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_version)] = False,
    local_rank: Annotated[int | None, typer.Option("--local_rank", hidden=True)] = None,  # DeepSpeed's launcher adds it; so does LOCAL_RANK
) -> None:
    pass


@app.command(epilog="Example: fastbert prepare wiki.jsonl.gz more/ --out data/wiki --vocab-size 30522")
def prepare(
    sources: Annotated[list[Path], typer.Argument(metavar="SOURCE", help="Text files or folders: txt, jsonl, parquet; also .gz, .zst.")],
    out: Annotated[Path, typer.Option(help="The store, a new folder.")],
    vocab_size: Annotated[int, typer.Option(help="Tokens of the WordPiece vocabulary to train.")] = 30522,
    cased: Annotated[bool, typer.Option("--cased", help="Train a vocabulary that keeps capital letters.")] = False,
    tokenizer: Annotated[Path | None, typer.Option(help="Use this BERT tokenizer (folder or vocab.txt) and train none.")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes; by default one a core.")] = None,
    heldout: Annotated[float, typer.Option(help="Share of the documents that is set aside for evaluation.")] = 0.01,
    text_format: Annotated[str | None, typer.Option("--format", help="txt, lines, jsonl or parquet; by default by suffix.")] = None,
    text_field: Annotated[str, typer.Option(help="Field of jsonl, or column of parquet, that holds the text.")] = "text",
    as_json: Json = False,
) -> None:
    """Turn text into a store: tokenizer, token ids, a held-out part, and a report on the data."""
    from fastbert.data.prepare import prepare

    report = prepare(
        sources,
        out,
        vocab_size=vocab_size,
        tokenizer=tokenizer,
        lowercase=not cased,
        workers=workers,
        heldout=heldout,
        text_format=text_format,
        text_field=text_field,
        progress=sys.stderr.isatty(),
    )
    if as_json:
        print(report.json(), end="")
        return
    _console().print(report.table())
    print(f"{out}: ready; next: fastbert pretrain recipes/mini.toml data={out}")


@app.command(epilog="Example: fastbert pretrain recipes/base.toml data=data/wiki run=runs/base optimizer.lr=2e-4")
def pretrain(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.toml", help="The run's settings; see recipes/.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="key=value", help="Settings that win over the recipe's.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest sound checkpoint of the run.")] = False,
) -> int:
    """Train a model from a store, as a recipe says. Exit code 75: interrupted, a checkpoint is saved."""
    from fastbert.config import load_config
    from fastbert.training.interruption import Interruption

    with Interruption() as interruption:  # from here on a signal means: stop at the next step
        config = load_config(recipe, overrides or ())
        from fastbert.training.loop import pretrain  # takes seconds

        return pretrain(config, str(recipe), resume, interruption)


@app.command(epilog="Example: fastbert evaluate runs/base")
def evaluate(
    model: Model,
    data: Annotated[Path | None, typer.Option(help="Another store made with the same tokenizer; by default the run's own.")] = None,
    sequences: Annotated[int | None, typer.Option(min=1, help="Held-out examples; by default the recipe's evaluate.sequences.")] = None,
    as_json: Json = False,
) -> None:
    """Held-out loss, perplexity and accuracy, next to what simple count models reach on the same text."""
    from fastbert.tasks.evaluate import evaluate
    from fastbert.tasks.load import load
    from fastbert.training.diagnosis import compare

    result = evaluate(load(model), data, sequences)
    if as_json:
        return _print_json(result.flat())
    found = result.heldout
    rows = [("masked tokens", found.loss_mlm, found.accuracy_mlm, f"perplexity {result.perplexity:,.1f}")]
    if found.loss_mask_token is not None and found.accuracy_mask_token is not None:
        note = compare(found.loss_mask_token, result.yardsticks)
        rows.append(("  those that show [MASK]", found.loss_mask_token, found.accuracy_mask_token, note))
    if found.loss_nsp is not None and found.accuracy_nsp is not None:
        rows.append(("next sentence", found.loss_nsp, found.accuracy_nsp, "a coin: 0.693 and 50 %"))
    title = f"{result.sequences:,} held-out sequences, {result.tokens:,} tokens, {result.masked:,} masked; loss {found.loss:.3f}"
    cells = [(name, f"{loss:.3f}", f"{100 * hits:.1f} %", note) for name, loss, hits, note in rows]
    _print_table(title, ("", "loss (nats)", "accuracy", ""), cells)


@app.command(epilog="Example: fastbert export runs/base --out my-bert")
def export(
    model: Model,
    out: Annotated[Path, typer.Option(help="The Hugging Face folder, new.")],
    text: Annotated[list[str] | None, typer.Option(help="Text for the check; may be repeated. By default held-out sentences.")] = None,
    as_json: Json = False,
) -> int:
    """Write a folder that transformers and sentence-transformers load, and check that it gives the same logits."""
    from fastbert.tasks.hugging_face import check_new

    check_new(out)
    from fastbert.tasks.export import ExportError, export
    from fastbert.tasks.load import load

    try:
        result = export(load(model, "cpu"), out, text)
    except ExportError as error:
        return _say(error, FAILED)
    if as_json:
        _print_json(dataclasses.asdict(result))
    else:
        print(f"{result.out}: {result.architecture}, loaded by transformers without complaint")
        print(f"largest difference of {result.compared:,} logits: {result.difference:.1e}")
    return DONE


@app.command(epilog='Example: fastbert fill runs/base "The capital of France is [MASK]."')
def fill(
    model: Model,
    text: Annotated[str, typer.Argument(metavar="TEXT", help="A text with one or more [MASK].")],
    k: Annotated[int, typer.Option("--k", help="Tokens shown for each [MASK].")] = 5,
    as_json: Json = False,
) -> None:
    """Guess the words behind [MASK]."""
    from fastbert.tasks.load import load

    masks = load(model).fill(text, k)
    if as_json:
        return _print_json({"text": text, "masks": [[{"token": token, "probability": p} for token, p in best] for best in masks]})
    print(text)
    for i, best in enumerate(masks, 1):
        title = f"[MASK] {i} of {len(masks)}" if len(masks) > 1 else ""
        _print_table(title, ("token", "probability"), [(token, f"{100 * p:.1f} %") for token, p in best])


@app.command(epilog='Example: fastbert nsp runs/base "She opened the door." "Nobody was there."')
def nsp(
    model: Model,
    first: Annotated[str, typer.Argument(metavar="FIRST", help="A text.")],
    second: Annotated[str, typer.Argument(metavar="SECOND", help="The text that may follow it.")],
    as_json: Json = False,
) -> None:
    """How probable it is that the second text follows the first."""
    from fastbert.tasks.load import load

    probability = load(model).next_sentence(first, second)
    if as_json:
        return _print_json({"first": first, "second": second, "probability": probability})
    print(f"A  {first}\nB  {second}\n   {100 * probability:.1f} % that B follows A")


@app.command(epilog="Example: fastbert embed runs/base texts.txt --pool mean --out texts.npy")
def embed(
    model: Model,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="UTF-8 text, one text a line.", exists=True, dir_okay=False)],
    out: Annotated[Path, typer.Option(help="The .npy file: float32, one row a line.")],
    pool: Annotated[str, typer.Option(help="mean or max over the tokens, or cls.")] = "mean",
    layer: Annotated[int, typer.Option(help="0: the embeddings; 1: the first layer; -1: the last.")] = -1,
    as_json: Json = False,
) -> None:
    """One vector for each line of a text file."""
    from fastbert.tasks.embed import check_out, read_lines, write_vectors
    from fastbert.tasks.load import load

    lines, out = read_lines(file), check_out(out)
    vectors = load(model).encode(lines, pool, layer)
    write_vectors(out, vectors)
    if as_json:
        return _print_json({"out": str(out), "rows": len(vectors), "hidden_size": vectors.shape[1], "pool": pool, "layer": layer})
    print(f"{out}: {len(vectors):,} x {vectors.shape[1]}, float32")


@app.command(epilog="Example: fastbert finetune runs/base --train train.csv --eval test.csv --out my-classifier")
def finetune(
    model: Model,
    train: Annotated[Path, typer.Option(help="csv with the columns text,label or text,text_b,label.", exists=True, dir_okay=False)],
    evaluation: Annotated[Path, typer.Option("--eval", help="csv with the same columns, to measure on.", exists=True, dir_okay=False)],
    out: Annotated[Path | None, typer.Option(help="Save a BertForSequenceClassification here, a new folder; by default none.")] = None,
    epochs: Annotated[int, typer.Option(help="Passes over the training file.")] = 3,
    lr: Annotated[float, typer.Option(help="Highest learning rate.")] = 5e-5,
    batch: Annotated[int, typer.Option(help="Examples of a step.")] = 32,
    max_length: Annotated[int | None, typer.Option(help="Tokens of an example, [CLS] and [SEP] counted; by default 128.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of order, dropout and the new layer.")] = 1,
    as_json: Json = False,
) -> None:
    """Train a classifier of texts, or of pairs of texts, on a csv file."""
    from fastbert.tasks.finetune import Epoch, finetune
    from fastbert.tasks.load import load

    def report(epoch: Epoch) -> None:
        print(f"epoch {epoch.epoch} of {epochs}: loss {epoch.loss:.3f}, accuracy {100 * epoch.accuracy:.1f} %", file=sys.stderr)

    settings: dict[str, Any] = {"epochs": epochs, "lr": lr, "batch": batch, "max_length": max_length, "seed": seed}
    result = finetune(load(model), train, evaluation, out, **settings, report=report)
    if as_json:
        return _print_json(dataclasses.asdict(result))
    print(
        f"accuracy {100 * result.accuracy:.1f} % on {evaluation} ({len(result.labels)} labels; the most frequent one: {100 * result.majority:.1f} %)"
    )
    if out is not None:
        print(f"{out}: BertForSequenceClassification")


@app.command(epilog="Example: fastbert doctor")
def doctor(as_json: Json = False) -> None:
    """What this machine can do, and what to do where something is missing. Takes about five seconds."""
    from fastbert.doctor import describe, diagnose

    found = diagnose()
    if as_json:
        return _print_json(dataclasses.asdict(found))
    _print_table("this machine", ("", ""), describe(found))
    for line in found.advice or ["nothing is missing"]:
        print(f"- {line}")


@app.command(epilog="Example: fastbert plan recipes/base.toml --gpus 64 --gpu h100")
def plan(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.toml", help="The run's settings; see recipes/.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="key=value", help="Settings that win over the recipe's.")] = None,
    gpus: Annotated[int | None, typer.Option(help="How many, 8 a node.  [default: 8, or 1 for cpu]")] = None,
    gpu: Annotated[str, typer.Option(help="a100, a100-40gb, l4, l40s, h100, h200, b200, mi300x; or cpu: this machine.")] = "h100",
    stage: Annotated[int | None, typer.Option(help="ZeRO stage, 0 to 3; by default that of the recipe's DeepSpeed file.")] = None,
    efficiency: Annotated[float | None, typer.Option(help="Share of the peak that matrix products reach.  [default: 0.5]")] = None,
    vocab_size: Annotated[int | None, typer.Option(min=1, help="By default the store's, or 30522 where there is no store.")] = None,
    mean_length: Annotated[float | None, typer.Option(min=4, help="Tokens of an example; by default measured in the store.")] = None,
    price: Annotated[float | None, typer.Option(help="US dollars for a GPU and hour; by default a listed one, where known.")] = None,
    as_json: Json = False,
) -> None:
    """Estimate memory, step time, communication, and time and cost to the end of a run, from formulas."""
    from fastbert.config import load_config
    from fastbert.plan import CPU, describe, plan, this_machine

    config, on_cpu = load_config(recipe, overrides or ()), gpu.lower() == CPU
    p = plan(
        config,
        str(recipe),
        gpus if gpus is not None else 1 if on_cpu else 8,
        gpu,
        stage=stage,
        efficiency=efficiency,
        vocab_size=vocab_size,
        mean_length=mean_length,
        price=price,
        device=this_machine() if on_cpu else None,
    )
    if as_json:
        return _print_json(dataclasses.asdict(p))
    _print_table(f"{p.gpus} x {p.gpu}, {p.precision}, ZeRO stage {p.zero_stage}: an estimate", ("", ""), describe(p))
    for line in p.assumptions:
        print(f"- assumed: {line}")


def _say(message: object, code: int) -> int:
    """One line on stderr, whatever the message, by one process of a machine; returns the exit code."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print("fastbert: " + " ".join(str(message).split()), file=sys.stderr)
    return code


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: str | None = None
) -> None:
    """Our own warnings as one line; a library's as Python shows it."""
    if category.__module__.startswith("fastbert"):
        print(f"fastbert: {message}", file=sys.stderr)
    else:
        sys.stderr.write(warnings.formatwarning(message, category, filename, lineno, line))


def _print_json(value: Any) -> None:
    """NaN becomes null: JSON has no NaN."""

    def clean(v: Any) -> Any:
        if isinstance(v, dict):
            return {k: clean(x) for k, x in v.items()}
        if isinstance(v, (list, tuple)):
            return [clean(x) for x in v]
        return None if isinstance(v, float) and not math.isfinite(v) else v

    print(json.dumps(clean(value), ensure_ascii=False, indent=2))


def _print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title) if title else None, box=box.SIMPLE, show_header=any(columns), title_justify="left", title_style="bold")
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))  # Text: "[MASK]" is no markup
    _console().print(table)


def _console() -> Any:
    from rich.console import Console

    # A pipe or a file has no width: there a line may be as long as it needs.
    return Console(highlight=False, width=None if sys.stdout.isatty() else 140)
