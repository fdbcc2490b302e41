"""The command line: `fastbert VERB ...`.

Every command imports its implementation when it is called, so that `--help` and the message on a
wrong argument appear at once. Bad input gives one line on stderr and exit code 2. A model whose
outputs are not finite gives one line and exit code 1. With --json a command prints one JSON object
on stdout and nothing else there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from fastbert import __version__, command_line
from fastbert.command_line import DONE, FAILED, say
from fastbert.data.sources import FORMATS
from fastbert.durable import write_new
from fastbert.errors import InputError
from fastbert.presence import hub_hint
from fastbert.printing import (
    console,
    format_hours,
    format_percent,
    print_json,
    print_table,
    print_text,
)
from fastbert.progress import Progress
from fastbert.storage import Place, Url, place, stamp
from fastbert.terminal import safe

EVALUATE_S = 600.0  # how long the ranks of `evaluate` wait for each other

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Pre-train a BERT of your own, from raw text to a model that Hugging Face loads.",
    epilog="Start: fastbert prepare text.txt --out data/my && "
    "fastbert init data/my --minutes 30 --out my.toml && fastbert pretrain my.toml",
)


def _existing_folder(text: str) -> str:
    """Check that a folder exists, before anything heavy is imported; a URL is checked later."""
    at = place(text)
    if isinstance(at, Path):
        if not os.path.exists(at):
            raise typer.BadParameter(f"Directory '{text}' does not exist{hub_hint(text)}.")
        if not os.path.isdir(at):
            raise typer.BadParameter(f"Directory '{text}' is a file.")
    return str(at)


Model = Annotated[
    str,
    typer.Argument(
        metavar="RUN|DIR",
        help="A run (also by its URL), one of its checkpoints, or a Hugging Face folder.",
        parser=_existing_folder,
    ),
]
Recipe = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE",
        help="A TOML file, or a packaged recipe such as mini; `fastbert recipes` lists them.",
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="key=value", help="Settings that override the recipe's."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]


def _check_alone(verb: str) -> None:
    """Raise InputError where a launcher has started several processes for one process's work."""
    from fastbert.cluster.launch_env import launched

    if launched():
        raise InputError(
            f"{verb} runs in one process, and WORLD_SIZE = {os.environ['WORLD_SIZE']} says that a "
            "launcher has started more; start it without the launcher, or unset WORLD_SIZE"
        )


def _check_stays(key: str, at: Place) -> None:
    """Raise InputError for a URL whose objects are gone when this process ends."""
    if isinstance(at, Url) and at.scheme == "memory":
        raise InputError(
            f"{key} {at}: what is kept in memory is gone when the command ends; "
            "give a folder, or the URL of a store"
        )


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit with its code."""
    command_line.set_up()
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: Sequence[str]) -> int:
    """Run the command line; returns the exit code."""
    return command_line.run(app, arguments)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"fastbert {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version and exit.", is_eager=True, callback=_version
        ),
    ] = False,
    # DeepSpeed's launcher adds this option; fastbert reads LOCAL_RANK, which is always set too.
    local_rank: Annotated[int | None, typer.Option("--local_rank", hidden=True)] = None,
) -> None:
    pass


@app.command(
    epilog="Example: fastbert prepare wiki.jsonl.gz more/ --out data/wiki --vocab-size 30522"
)
def prepare(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE",
            help="Text files or folders, or URLs of such (s3://bucket/folder/*.jsonl.gz): "
            "txt, jsonl, json, csv, tsv, parquet, arrow (also of save_to_disk); with .gz, .zst, "
            ".xz, .bz2.",
        ),
    ],
    out: Annotated[
        str,
        typer.Option(
            help="The folder to write the dataset to, or its URL. Work in progress lies in "
            "OUT.work; the same command run again continues it."
        ),
    ],
    vocab_size: Annotated[
        int, typer.Option(help="Size of the vocabulary to train; of bpe a multiple of 64.")
    ] = 30522,
    algorithm: Annotated[
        str,
        typer.Option(
            help="Of the vocabulary to train: wordpiece, as BERT, or bpe, byte-level as ModernBERT."
        ),
    ] = "wordpiece",
    cased: Annotated[bool, typer.Option("--cased", help="Train a cased vocabulary.")] = False,
    keep_accents: Annotated[
        bool,
        typer.Option(
            "--keep-accents",
            help="Lower-case, but keep accents and vowel signs, which BERT drops.",
        ),
    ] = False,
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            help="Use this tokenizer (a folder with any tokenizer.json, or BERT's vocab.txt) "
            "instead of training one."
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(help="Number of processes, at most 4 per core.  \\[default: one per core]"),
    ] = None,
    heldout: Annotated[
        float, typer.Option(help="Fraction of the documents held out for evaluation.")
    ] = 0.01,
    text_format: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="txt: a blank line ends a document; lines: each line is one; file: each file is "
            "one; jsonl, csv, tsv, parquet or arrow: each record; json: each object of an array.  "
            "\\[default: by suffix; .txt is txt]",
        ),
    ] = None,
    text_field: Annotated[
        str,
        typer.Option(
            help="Field of jsonl (doc.text: of an object in it), or column, with the text."
        ),
    ] = "text",
    bad_records: Annotated[
        str,
        typer.Option(
            help="What to do with a record that cannot be read: error, skip, or how many to skip."
        ),
    ] = "error",
    drop_copies: Annotated[
        bool,
        typer.Option("--drop-copies", help="Leave out documents that are copies of another one."),
    ] = False,
    without: Annotated[
        list[Path] | None,
        typer.Option(
            help="Evaluation sets: leave out documents that share 13 tokens in a row with these "
            "files. May be given several times."
        ),
    ] = None,
    add: Annotated[
        bool, typer.Option("--add", help="Add the text to the dataset that is there, as a part.")
    ] = False,
    engine: Annotated[
        str,
        typer.Option(help="Who runs the tasks: local, or ray, on a cluster that shares the disk."),
    ] = "local",
    ray_address: Annotated[
        str | None, typer.Option(help="Address of the Ray cluster, such as 10.0.0.1:6379.")
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            metavar="I/N",
            help="Run only share I of N of the tasks, from 0 to N - 1, for a scheduler such as "
            "Slurm; the command without it finishes.",
        ),
    ] = None,
    estimate: Annotated[
        bool,
        typer.Option(
            "--estimate",
            help="Make nothing: measure a sample of the text, and print how long it would take.",
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Make a dataset from text: tokenizer, token ids, a held-out part and a report on the data."""
    from fastbert.data.prepare import prepare, prepare_share
    from fastbert.data.remote_dataset import uploading

    options: dict[str, Any] = {
        "vocab_size": vocab_size,
        "algorithm": algorithm,
        "tokenizer": tokenizer,
        "lowercase": not cased,
        "keep_accents": keep_accents,
        "workers": workers,
        "heldout": heldout,
        "text_format": text_format,
        "text_field": text_field,
        "bad_records": bad_records,
        "drop_copies": drop_copies,
        "without": tuple(without or ()),
        "add": add,
        "engine": engine,
        "ray_address": ray_address,
    }
    at = place(out)
    if estimate:
        from fastbert.planning import preparing

        with tempfile.TemporaryDirectory() as folder:
            local = Path(folder) / at.name if isinstance(at, Url) else at
            found = preparing.estimate(sources, local, **options)
        if as_json:
            return print_json(dataclasses.asdict(found))
        return print_table("an estimate", ("", ""), preparing.describe(found))
    if task is not None:
        if isinstance(at, Url):
            raise InputError(
                f"--task {task}: --out {out} is a URL; tasks share a folder, which is uploaded "
                "when it is complete"
            )
        print_text(prepare_share(sources, at, task, **options))
        return
    _check_stays("--out", at)
    if isinstance(at, Url):
        target = uploading(at, sources, options, add=add)
    else:
        target = contextlib.nullcontext(at)
    with target as made:
        report = prepare(sources, made, **options)
    if as_json:
        print(report.json(), end="")
        return
    console().print(report.table())
    # An absolute path, so that the command works from any directory.
    data = shlex.quote(str(at if isinstance(at, Url) else at.absolute()))
    name = at.name if isinstance(at, Url) else at.resolve().name
    recipe = shlex.quote(f"{name}.toml")
    print_text(f"{out}: ready; next: fastbert init {data} --minutes 30 --out {recipe}")


@app.command(epilog="Example: fastbert init data/wiki --minutes 30 --out wiki.toml")
def init(
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATASET", help="A folder that `fastbert prepare` made, or its URL."
        ),
    ],
    minutes: Annotated[
        float, typer.Option(help="How long the training may take, with its evaluations.")
    ],
    out: Annotated[Path, typer.Option(help="The recipe to write; it must be a new file.")],
) -> None:
    """Write a recipe that fits a dataset, this machine and a time. Takes about ten seconds."""
    from fastbert.planning.advise import check_minutes

    check_minutes(minutes)  # before torch is imported
    from fastbert.planning.new_recipe import new_recipe

    made = new_recipe(data, minutes, out)
    print_table(f"{data} in {minutes:g} minutes on this machine", ("", ""), made.choice)
    print_table(
        "the packaged recipes with this text, here",
        ("recipe", "hours"),
        [(name, format_hours(hours)) for name, hours in made.hours.items()],
    )
    for note in made.notes:
        print_text(f"- {note}")
    print_text(f"{out}: ready; next: fastbert pretrain {shlex.quote(str(out))}")


@app.command(
    epilog="Example: fastbert pretrain base data=data/wiki run=runs/base optimizer.lr=2e-4"
)
def pretrain(
    recipe: Recipe,
    overrides: Overrides = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Resume from the newest valid checkpoint of the run.")
    ] = False,
    branch_from: Annotated[
        str | None,
        typer.Option(
            metavar="RUN@STEP",
            help="Begin a new run at a checkpoint of another one, with its weights and moments.",
        ),
    ] = None,
) -> int:
    """Train a model from a dataset. Exit code 75: interrupted, a checkpoint is saved."""
    from fastbert.cluster.signals import StopRequest
    from fastbert.recipe import load_config

    with StopRequest() as stop_request:  # from here on a signal means: stop after this step
        config = load_config(recipe, overrides or (), branch_from)
        _check_stays("run =", place(config.run))
        from fastbert.training.loop import pretrain  # this takes seconds

        return pretrain(config, recipe, resume, stop_request).exit_code


@app.command(epilog="Example: fastbert recipes mini --out my.toml")
def recipes(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME", help="Print this recipe; ds_config.json: DeepSpeed's default settings."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Copy it to this file, which must be new.")
    ] = None,
) -> None:
    """List the recipes that come with fastbert, or print or copy one of them."""
    from fastbert.recipe import DEEPSPEED, PACKAGED, packaged_recipes

    files = {path.stem: path for path in (PACKAGED / f"{n}.toml" for n in packaged_recipes())}
    if name is None:
        if out is not None:
            raise InputError("--out: name the recipe to copy, for example: fastbert recipes mini")
        firsts = {
            n: path.read_text(encoding="utf-8").partition("\n")[0] for n, path in files.items()
        }
        return print_table("", ("", ""), [(n, line.lstrip("# ")) for n, line in firsts.items()])
    file = {**files, DEEPSPEED.name: DEEPSPEED}.get(name.removesuffix(".toml"))
    if file is None:
        known = ", ".join([*files, DEEPSPEED.name])
        raise InputError(f"{name}: no such packaged recipe; known: {known}")
    text = file.read_text(encoding="utf-8")
    if out is None:
        print(text, end="")
        return
    try:
        write_new(out, text)
    except FileExistsError:
        raise InputError(f"{out}: exists already; remove it or choose another --out") from None
    except OSError as error:
        raise InputError(f"{out}: cannot be written: {error.strerror}") from None
    print_text(f"{out}: a copy of {file.name}")


@app.command(epilog="Example: fastbert evaluate runs/base")
def evaluate(
    model: Model,
    data: Annotated[
        str | None,
        typer.Option(help="Another dataset with the same tokenizer.  \\[default: the run's own]"),
    ] = None,
    sequences: Annotated[
        int | None,
        typer.Option(min=1, help="Number of held-out examples.  \\[default: evaluate.sequences]"),
    ] = None,
    as_json: Json = False,
) -> int:
    """Measure held-out losses and accuracies, and those of simple count models for comparison.

    The ranks of a launcher share the work.
    """
    from fastbert.cluster.group import RankLost, join
    from fastbert.cluster.launch_env import launched
    from fastbert.machine import share_cores
    from fastbert.tasks.evaluate import MASKED, evaluate
    from fastbert.tasks.load import load
    from fastbert.training.diagnosis import compare

    try:
        with join(EVALUATE_S) if launched() else contextlib.nullcontext() as group:
            share_cores(group.local_world if group else 1)
            opened = load(model)
            with Progress("evaluate", show=group is None or group.is_main) as progress:
                result = evaluate(opened, data, sequences, group, progress.follow)
            if group is not None and not group.is_main:
                return DONE
    except RankLost as end:
        return say(end, FAILED)
    if as_json:
        print_json(
            {**result.flat(), "model": str(opened.path), "step": opened.metadata.get("step")}
        )
        return DONE
    sections = [
        ("", {"masked tokens": result.masked}),
        ("  ", result.by_corruption),
        (
            "  in sequences of ",
            {f"{name} tokens": found for name, found in result.by_length.items()},
        ),
        (
            "  of frequency ",
            {f"{name} in a million": found for name, found in result.by_frequency.items()},
        ),
        ("source ", {name: found.masked for name, found in result.sources.items()}),
    ]
    cells = [
        (
            prefix + name,
            f"{f.count:,}",
            f"{f.loss:.3f}",
            format_percent(f.accuracy),
            format_percent(f.accuracy_of_5),
            f"{f.unigram:.3f}",
            f"{f.left_bigram:.3f}",
        )
        for prefix, rows in sections
        for name, f in rows.items()
    ]
    if (pairs := result.pairs) is not None:
        cells.append(
            (
                "next sentence",
                f"{pairs.count:,}",
                f"{pairs.loss:.3f}",
                format_percent(pairs.accuracy),
                "",
                f"{math.log(2):.3f}",
                "",
            )
        )
    step = opened.metadata.get("step")
    at = "" if step is None else f", step {step:,}"
    title = (
        f"{opened.path}{at}: {result.sequences:,} held-out sequences of {result.tokens:,} tokens: "
        f"loss {result.loss:.3f}, perplexity {result.masked.perplexity:,.1f}"
        + (" (mean over the sources by their shares)" if result.sources else "")
    )
    columns = (
        "",
        "positions",
        "loss (nats)",
        "accuracy",
        "in first 5",
        "frequencies alone",
        "left neighbour",
    )
    print_table(title, columns, cells)
    if (shown := result.by_corruption.get(MASKED)) is not None:
        print_text(f"where [MASK] shows: {compare(shown.loss, result.baselines)}")
    return DONE


@app.command(epilog="Example: fastbert export runs/base --out my-bert")
def export(
    model: Model,
    out: Annotated[Path, typer.Option(help="The folder to write; it must be new.")],
    text: Annotated[
        list[str] | None,
        typer.Option(help="Text for the check; repeatable.  \\[default: held-out sentences]"),
    ] = None,
    encoder: Annotated[
        bool,
        typer.Option(
            "--encoder",
            help="Leave out the heads, so that AutoModel reports no unexpected weights.",
        ),
    ] = False,
    as_json: Json = False,
) -> int:
    """Write a folder that transformers loads, and check it against our own outputs.

    The check compares the hidden states of every layer, and the logits. SentenceTransformer loads
    the folder too.
    """
    from fastbert.checkpoints.hugging_face import check_new

    _check_alone("export")
    check_new(out)
    from fastbert.tasks.export import ExportError, export
    from fastbert.tasks.load import load

    try:
        result = export(load(model, "cpu"), out, text, encoder)
    except ExportError as error:
        return say(error, FAILED)
    if as_json:
        print_json(dataclasses.asdict(result))
    else:
        print_text(f"{result.out}: {result.architecture}, loaded by transformers without complaint")
        names = {"BertModel": "pooled values", "ModernBertModel": "values of the last layer"}
        what = names.get(result.architecture, "logits")
        print_text(
            f"largest difference of {result.compared:,} {what}: {result.difference:.1e}; "
            f"of every layer: {result.hidden_difference:.1e}"
        )
    return DONE


@app.command(epilog='Example: fastbert fill-mask runs/base "The capital of France is [MASK]."')
def fill_mask(
    model: Model,
    text: Annotated[
        str,
        typer.Argument(
            metavar="TEXT",
            help="A text with one or more [MASK], or what the model's tokenizer has for it.",
        ),
    ],
    k: Annotated[int, typer.Option("--k", help="How many tokens to show for each [MASK].")] = 5,
    as_json: Json = False,
) -> None:
    """Predict the tokens at [MASK]."""
    from fastbert.tasks.load import load

    masks = load(model).fill_mask(text, k)
    if as_json:
        return print_json(
            {
                "text": text,
                "masks": [
                    [{"token": token, "probability": p} for token, p in best] for best in masks
                ],
            }
        )
    print_text(text)
    for i, best in enumerate(masks, 1):
        title = f"[MASK] {i} of {len(masks)}" if len(masks) > 1 else ""
        print_table(
            title, ("token", "probability"), [(token, f"{100 * p:.1f} %") for token, p in best]
        )


@app.command(epilog='Example: fastbert nsp runs/base "She opened the door." "Nobody was there."')
def nsp(
    model: Model,
    first: Annotated[str, typer.Argument(metavar="FIRST", help="A text.")],
    second: Annotated[str, typer.Argument(metavar="SECOND", help="The text that may follow it.")],
    as_json: Json = False,
) -> None:
    """Print the probability that the second text follows the first."""
    from fastbert.tasks.load import load

    probability = load(model).next_sentence(first, second)
    if as_json:
        return print_json({"first": first, "second": second, "probability": probability})
    print_text(f"A  {first}\nB  {second}\n   {100 * probability:.1f} % that B follows A")


@app.command(epilog="Example: fastbert embed runs/base texts.txt --pool mean --out texts.npy")
def embed(
    model: Model,
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            help="One text per line, or jsonl, csv, tsv, parquet; also .gz, .zst, .xz, .bz2.",
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(help="x.npy: float32, one row per text; x.jsonl or x.parquet: with texts."),
    ],
    pool: Annotated[
        str | None,
        typer.Option(
            help="Pooling: mean or max over the tokens, or cls.  \\[default: the folder's, or mean]"
        ),
    ] = None,
    layer: Annotated[
        list[int] | None,
        typer.Option(help="0: embeddings; -1: last layer. Repeated: their mean.  \\[default: -1]"),
    ] = None,
    normalize: Annotated[
        bool | None,
        typer.Option(
            "--normalize/--no-normalize",
            help="Scale vectors to length 1, or not.  \\[default: the folder's, or not]",
        ),
    ] = None,
    text_format: Annotated[
        str | None,
        typer.Option(
            "--format", help=f"{', '.join(FORMATS)}.  \\[default: by suffix; .txt is lines]"
        ),
    ] = None,
    text_field: Annotated[
        str,
        typer.Option(
            help="Field of jsonl (doc.text: of an object in it), or column, with the text."
        ),
    ] = "text",
    as_json: Json = False,
) -> None:
    """Compute one vector for each text of a file."""
    from fastbert.tasks.embed import check_out, embed, source_of

    _check_alone("embed")
    source = source_of(file, text_format)
    writer = check_out(out, source)
    from fastbert.tasks.load import load

    layers, opened = layer or [-1], load(model)
    with Progress("embed") as progress, progress.count("vectors", stamp(file)[0]) as advance:
        rows, size = embed(
            opened, source, text_field, writer, pool, layers, normalize, advance=advance
        )
    if as_json:
        settings = {
            "pool": pool or opened.vectors.pool,
            "layer": layers,
            "normalize": opened.vectors.normalize if normalize is None else normalize,
        }
        return print_json({"out": str(out), "rows": rows, "hidden_size": size, **settings})
    print_text(f"{out}: {rows:,} x {size}, float32")


@app.command(
    epilog="Example: fastbert finetune runs/base --train train.csv --eval test.csv --out my-model"
)
def finetune(
    model: Model,
    train: Annotated[
        Path,
        typer.Option(
            help="csv, tsv, jsonl or parquet with text (text_b) and label, or a GLUE file.",
            exists=True,
            dir_okay=False,
        ),
    ],
    evaluation: Annotated[
        Path,
        typer.Option(
            "--eval",
            help="Evaluation data in the same form; no choice depends on it.",
            exists=True,
            dir_okay=False,
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="Save the model in this new folder, for transformers."),
    ] = None,
    epochs: Annotated[int, typer.Option(help="Number of passes over the training file.")] = 3,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 5e-5,
    batch: Annotated[int, typer.Option(help="Examples per step.")] = 32,
    max_length: Annotated[
        int | None,
        typer.Option(help="Tokens per example, including [CLS] and [SEP].  \\[default: 128]"),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=2**62, help="Seed for data order, dropout and the new layer.")
    ] = 1,
    seeds: Annotated[
        int, typer.Option(help="Number of seeds, starting at --seed; reports mean and std.")
    ] = 1,
    patience: Annotated[
        int | None,
        typer.Option(help="Stop after this many epochs without improvement on a held-out part."),
    ] = None,
    heldout: Annotated[
        float, typer.Option(help="That held-out part, as a fraction of the training file.")
    ] = 0.1,
    metric: Annotated[
        str | None,
        typer.Option(
            help="accuracy, f1, matthews; for regression spearman, pearson.  \\[default: the first]"
        ),
    ] = None,
    regression: Annotated[
        bool | None,
        typer.Option(
            "--regression/--classes",
            help="Treat labels as numbers or as classes.  \\[default: by file]",
        ),
    ] = None,
    layer_decay: Annotated[
        float, typer.Option(help="Ratio of a layer's learning rate to that of the layer above.")
    ] = 1.0,
    freeze: Annotated[int, typer.Option(help="Freeze the embeddings and this many layers.")] = 0,
    text: Annotated[
        str | None, typer.Option(help="Column of the text, if it is not named text.")
    ] = None,
    pair: Annotated[str | None, typer.Option(help="Column of the second text.")] = None,
    label: Annotated[str | None, typer.Option(help="Column of the label.")] = None,
    as_json: Json = False,
) -> None:
    """Train a classifier or a regression on texts or pairs of texts."""
    from fastbert.machine import check_threads, usable_cores
    from fastbert.tasks.labelled import read_examples

    _check_alone("finetune")
    check_threads("finetune", usable_cores() + 8)  # pyarrow takes a lack for a damaged file
    training, test = (read_examples(file, text, pair, label) for file in (train, evaluation))
    from fastbert.tasks.finetune import Epoch, Settings, architecture, finetune
    from fastbert.tasks.load import load

    settings = Settings(
        epochs=epochs,
        lr=lr,
        batch=batch,
        max_length=max_length,
        seed=seed,
        seeds=seeds,
        patience=patience,
        heldout=heldout,
        metric=metric,
        regression=regression,
        layer_decay=layer_decay,
        freeze=freeze,
    )
    where = "held out" if patience else str(evaluation)

    def report(epoch: Epoch) -> None:
        line = f"loss {epoch.loss:.3f}, {epoch.score:.3f} on {where}"
        print(f"seed {epoch.seed}, epoch {epoch.epoch} of {epochs}: {safe(line)}", file=sys.stderr)

    opened = load(model)
    with Progress("finetune") as progress:
        result = finetune(
            opened, training, test, out, settings, report=report, follow=progress.follow
        )
    if as_json:
        return print_json(dataclasses.asdict(result))
    spread = f" over {seeds} seeds" if seeds > 1 else ""
    rows = [
        (name, f"{s.mean:.4f}", f"{s.std:.4f}" if seeds > 1 else "")
        for name, s in result.scores.items()
    ]
    if result.majority is not None:
        rows.append(("accuracy of the most frequent label", f"{result.majority:.4f}", ""))
    print_table(
        f"{evaluation}: {len(test):,} examples{spread}",
        ("", "mean" if spread else "", "std" if spread else ""),
        rows,
    )
    if out is not None:
        print_text(
            f"{out}: {architecture(opened.config)}"
            + (", confusion.png" if (out / "confusion.png").exists() else "")
        )


@app.command(epilog="Example: fastbert report runs/base")
def report(
    run: Annotated[
        str,
        typer.Argument(
            metavar="RUN", help="The folder of a run, or its URL.", parser=_existing_folder
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            help="The page to write.  \\[default: RUN/report.html; of a URL NAME-report.html here]"
        ),
    ] = None,
    sequences: Annotated[
        int | None,
        typer.Option(min=1, help="Number of held-out examples.  \\[default: evaluate.sequences]"),
    ] = None,
) -> None:
    """Write one HTML page on a run: curves, time spent, held-out results, samples, recipe."""
    from fastbert.tasks.run_report import report

    print_text(f"{report(run, out, sequences)}: open it in a browser")


@app.command(epilog="Example: fastbert doctor")
def doctor(
    deepspeed: Annotated[
        Path | None,
        typer.Option(
            help="Check this file of DeepSpeed's settings instead.  `fastbert plan` compares it "
            "with a recipe.",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    as_json: Json = False,
) -> int:
    """Show what this machine can do, and how to install what is missing. Takes five seconds."""
    if deepspeed is not None:
        return _check_deepspeed(str(deepspeed), as_json)
    from fastbert.doctor import describe, diagnose

    found = diagnose()
    if as_json:
        print_json(dataclasses.asdict(found))
        return DONE
    print_table("this machine", ("", ""), describe(found))
    for line in found.advice or ["nothing is missing"]:
        print_text(f"- {line}")
    return DONE


def _check_deepspeed(path: str, as_json: bool) -> int:
    """Print everything that is wrong with a file of DeepSpeed's settings."""
    from fastbert.training.ds_config import find_problems
    from fastbert.training.engine import objections

    settings, problems = find_problems(path, "the recipe")
    for key, objection in objections(settings).items():
        if key or not problems:  # without a key, it may follow from one of our own problems
            problems.setdefault(key, objection)
    if as_json:
        print_json({"file": path, "problems": list(problems.values())})
    else:
        print_text(f"{path}: {len(problems) or 'no'} problem{'s' * (len(problems) != 1)}")
        for problem in problems.values():
            print_text(f"- {problem}")
    return command_line.BAD_INPUT if problems else DONE


@app.command(epilog="Example: fastbert plan base --gpus 64 --gpu h100")
def plan(
    recipe: Recipe,
    overrides: Overrides = None,
    gpus: Annotated[
        int | None, typer.Option(help="Number of GPUs, 8 per node.  \\[default: 8, or 1 for cpu]")
    ] = None,
    gpu: Annotated[
        str,
        typer.Option(
            help="a100, a100-40gb, l4, l40s, h100, h200, b200, mi300x; cpu: this machine."
        ),
    ] = "h100",
    stage: Annotated[
        int | None,
        typer.Option(help="ZeRO stage, 0 to 3.  \\[default: that of the recipe's DeepSpeed file]"),
    ] = None,
    efficiency: Annotated[
        float | None,
        typer.Option(help="Fraction of peak that matrix products reach.  \\[default: 0.5]"),
    ] = None,
    vocab_size: Annotated[
        int | None,
        typer.Option(
            min=1, help="Vocabulary size.  \\[default: the dataset's, or 30522 without one]"
        ),
    ] = None,
    mean_length: Annotated[
        float | None,
        typer.Option(min=4, help="Mean tokens per example.  \\[default: measured in the dataset]"),
    ] = None,
    price: Annotated[
        float | None,
        typer.Option(help="US dollars per GPU-hour.  \\[default: a list price, if known]"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Estimate memory, step time, communication, duration and cost of a run from formulas."""
    from fastbert.planning.plan import CPU, Hardware, describe, plan, this_machine
    from fastbert.recipe import load_config

    config, on_cpu = load_config(recipe, overrides or ()), gpu.lower() == CPU
    if config.init is not None:
        from fastbert.training.initial import open_initial, with_sizes

        config = with_sizes(config, open_initial(config.init).config, recipe)
    hardware = Hardware(
        gpu,
        gpus if gpus is not None else 1 if on_cpu else 8,
        this_machine() if on_cpu else None,
        efficiency,
        price,
    )
    p = plan(config, recipe, hardware, stage=stage, vocab_size=vocab_size, mean_length=mean_length)
    if as_json:
        return print_json(dataclasses.asdict(p))
    print_table(
        f"{p.gpus} x {p.gpu}, {p.precision}, ZeRO stage {p.zero_stage}: an estimate",
        ("", ""),
        describe(p),
    )
    for line in p.assumptions:
        print_text(f"- assumed: {line}")
