"""`fastbert init`: look at a dataset, choose a recipe for it (advise.py), and write it as TOML."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from fastbert.config import BertConfig, ObjectiveConfig
from fastbert.data.dataset import TokenDataset, open_dataset
from fastbert.data.examples import Examples
from fastbert.data.manifest import SPLITS
from fastbert.durable import write_new
from fastbert.errors import InputError
from fastbert.machine import measure_bandwidth, measure_gemm_rate, probe_bf16
from fastbert.planning.advise import (
    LENGTH,
    MASK_RATE,
    PASSES,
    TOKENS_PER_PARAMETER,
    Advice,
    Corpus,
    advise,
    check_minutes,
)
from fastbert.planning.parameters import count_hidden, count_parameters
from fastbert.planning.plan import CPU, Device, Hardware, plan, this_machine
from fastbert.planning.step_speed import measure_speed
from fastbert.recipe import load_config, packaged_recipes, toml_value
from fastbert.storage import place

# After as many steps of 2,000 tokens on the demo's text, the demo's model has a loss on [MASK] of
# 4.93. That of the left bigram is 5.06.
FEW_STEPS = 1250
# The keys of a recipe that are written, by section; the others keep their defaults.
SHOWN = {
    "": ["data", "run"],
    "model": [
        "num_hidden_layers",
        "hidden_size",
        "num_attention_heads",
        "intermediate_size",
        "hidden_dropout_prob",
        "attention_probs_dropout_prob",
        "max_position_embeddings",
        "initial_attention",
    ],
    "objective": ["kind", "mask_rate", "segments"],
    "batch": ["sequences", "max_length"],
    "optimizer": ["name", "lr", "betas"],
    "schedule": ["over", "warmup", "decay", "cooldown"],
    "stop": ["seconds"],
    "evaluate": ["every", "sequences"],
    "checkpoint": ["every", "keep"],
}


@dataclass(frozen=True)
class NewRecipe:
    """What `fastbert init` prints.

    Attributes:
        choice: name and value of each line on the run.
        hours: what each packaged recipe would take here, by its name; None where that is not known.
        notes: sentences on what the choice rests on.
    """

    choice: list[tuple[str, str]]
    hours: dict[str, float | None]
    notes: list[str]


def new_recipe(data: str | Path, minutes: float, out: Path) -> NewRecipe:
    """Write a recipe that fits this dataset, this machine and a training time.

    Args:
        data: the folder of the dataset, or its URL.
        minutes: for the whole training.
        out: the file to write; it must be new.

    Raises:
        InputError: the dataset, the minutes or the file is wrong; nothing is written then.
    """
    check_minutes(minutes)
    taken = f"{out}: exists already; remove it or choose another --out"
    if os.path.lexists(out):
        raise InputError(taken)
    if not out.parent.is_dir():
        raise InputError(f"{out}: there is no folder {out.parent}; make it or choose another --out")
    dataset = open_dataset(data)
    corpus = replace(look_at(dataset), path=str(place(data)))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rounds = device.type == "cpu" and probe_bf16().pays  # as runtime.precision = "auto" does
    operands = torch.bfloat16 if rounds else None
    advice = advise(
        corpus,
        minutes,
        f"runs/{out.stem}",
        lambda config: measure_speed(config, dataset, device, operands),
    )
    found = NewRecipe(_choice(corpus, advice), _hours(dataset, advice, device), _notes(advice))
    try:
        write_new(out, recipe_text(corpus, advice, minutes))
    except FileExistsError:
        raise InputError(taken) from None
    except OSError as error:
        raise InputError(f"{out}: cannot be written: {error.strerror}") from None
    return found


def look_at(dataset: TokenDataset) -> Corpus:
    """Collect what the choice needs to know of a dataset."""
    report = json.loads(dataset.reports[0].read_text(encoding="utf-8"))
    train = dataset.counts("train")
    return Corpus(
        path=str(dataset.path),
        documents=train.documents,
        tokens=train.tokens,
        vocab_size=dataset.vocab_size,
        single_sentence_share=report["single_sentence_share"],
        median_sentence=report["sentence_tokens"]["0.5"],
        can_pair=_can_pair(dataset),
    )


def _can_pair(dataset: TokenDataset) -> bool:
    try:
        for split in SPLITS:
            for segments in ("single", "fill"):
                objective = ObjectiveConfig(segments=segments)
                Examples(dataset.split(split), objective, LENGTH, 0, split)
    except InputError:
        return False
    return True


def recipe_text(corpus: Corpus, advice: Advice, minutes: float) -> str:
    """Return the recipe as TOML, with comments on where its numbers come from."""
    config, size = advice.config, advice.size_of
    example_tokens = advice.speed.example_tokens
    per_parameter = advice.tokens / count_hidden(config.model)
    above = {  # comments that stand on lines of their own
        "model": [
            f"The sizes of {size}.toml. They see {per_parameter:,.1f} tokens for each parameter of",
            f"the layers; a larger size is taken where it sees {TOKENS_PER_PARAMETER} or more.",
        ],
        "objective": _on_the_objective(advice),
        "batch": [
            f"An example has {example_tokens:,.0f} tokens on average, so a step has about "
            f"{config.batch.sequences * example_tokens:,.0f}.",
        ],
        "optimizer": [
            "Muon learns more from few tokens than AdamW.",
            f"The learning rate is that of {size}.toml.",
        ],
        "schedule": ["That of demo.toml: shares of stop.seconds."],
        "stop": [
            f"{minutes:g} minutes without the start, the last evaluation and the last checkpoint.",
            f"About {steps_of(advice):,.0f} steps.",
        ],
    }
    beside = {
        "model.hidden_dropout_prob": f"the text is read {advice.passes:,.1f} times; "
        f"beyond {PASSES} times there is dropout",
        "model.initial_attention": "no plateau at the start; see models/initial_weights.py",
        "batch.max_length": f"half of the sentences have {corpus.median_sentence} tokens or fewer",
    }
    lines = [
        f"# {minutes:g} minutes of training, for the machine on which `fastbert init` wrote this:",
        f"# {advice.speed.tokens_per_s:,.0f} tokens/s there, {_millions(advice.tokens)} tokens "
        "in all.",
    ]
    for section, keys in SHOWN.items():
        values = getattr(config, section) if section else config
        lines += ["", f"[{section}]"] if section else []
        lines += [f"# {line}" for line in above.get(section, ())]
        for key in keys:
            line = f"{key} = {toml_value(getattr(values, key))}"
            comment = beside.get(f"{section}.{key}")
            lines.append(f"{line:<36}# {comment}" if comment else line)
    return "\n".join(lines) + "\n"


def _on_the_objective(advice: Advice) -> list[str]:
    lines = ["Masked tokens and next sentences, as in demo.toml."]
    if advice.why_alone:
        lines = [f"Masked tokens alone: {advice.why_alone}."]
    if advice.config.objective.mask_rate == MASK_RATE:
        lines += [
            "A short run learns more from more masks than BERT's 15 %, which held-out text has.",
        ]
    return lines


def steps_of(advice: Advice) -> float:
    """Return the steps that the run is expected to make."""
    return advice.tokens / (advice.config.batch.sequences * advice.speed.example_tokens)


def _choice(corpus: Corpus, advice: Advice) -> list[tuple[str, str]]:
    model, batch = advice.config.model, advice.config.batch
    return [
        ("text", f"{corpus.tokens:,} tokens, {corpus.documents:,} documents"),
        (
            "model",
            f"{model.num_hidden_layers} layers of {model.hidden_size}, "
            f"{_millions(count_parameters(model, corpus.vocab_size))} parameters with "
            f"{corpus.vocab_size:,} tokens of vocabulary",
        ),
        ("objective", advice.config.objective.kind),
        ("speed", f"{advice.speed.tokens_per_s:,.0f} tokens/s, measured"),
        (
            "run",
            f"{_millions(advice.tokens)} tokens in {steps_of(advice):,.0f} steps of "
            f"{batch.sequences} examples; the text is read {advice.passes:,.1f} times",
        ),
    ]


def _notes(advice: Advice) -> list[str]:
    others = list(advice.tried)
    following = others[others.index(advice.size_of) + 1 :]
    rests_on = (
        f"a size needs {TOKENS_PER_PARAMETER} tokens for each parameter of its layers; "
        f"{advice.size_of} sees "
        f"{advice.tokens / count_hidden(advice.config.model):,.1f} in this time"
    )
    if following:
        model = load_config(following[0]).model
        seconds = advice.tokens / advice.speed.tokens_per_s
        seen = advice.tried[following[0]] * seconds / count_hidden(model)
        rests_on += f", and the next one, {following[0]}, would see {seen:,.1f}"
    notes = [rests_on]
    if advice.why_alone:
        notes.append(f"masked tokens alone, without next sentences: {advice.why_alone}")
    if steps_of(advice) < FEW_STEPS:
        notes.append(
            f"{steps_of(advice):,.0f} steps are few: the demo needs {FEW_STEPS:,} to predict a "
            "word better than the word before it does; give more minutes"
        )
    if advice.passes > PASSES:
        notes.append(
            f"the text is read {advice.passes:,.0f} times, so the model has dropout; "
            "more text would help more than more time"
        )
    return notes


def _hours(dataset: TokenDataset, advice: Advice, device: torch.device) -> dict[str, float | None]:
    """Estimate how long each packaged recipe takes here with this text, in hours."""
    here = _this_device(device)
    hours = dict[str, float | None]()
    for name in packaged_recipes():
        # A mixture is counted as if all of it were this text.
        config = replace(load_config(name), data=str(dataset.path), weights=None)
        if isinstance(config.model, BertConfig):  # a ModernBERT has one kind of objective
            kind = advice.config.objective.kind
            config = replace(config, objective=replace(config.objective, kind=kind))
        total_s = plan(config, name, here, dataset=dataset).total_s
        hours[name] = None if total_s is None else total_s / 3600
    return dict(sorted(hours.items(), key=lambda item: item[1] or math.inf))


def _this_device(device: torch.device) -> Hardware:
    """Return the device that a run would compute on, with its measured rates."""
    if device.type == "cpu":
        return Hardware(CPU, device=this_machine())
    rate = measure_gemm_rate(torch.bfloat16, device="cuda")
    bandwidth = measure_bandwidth(device="cuda")
    memory = torch.cuda.get_device_properties(device).total_memory
    measured = Device(rate, rate, memory, bandwidth, math.inf, math.inf)
    return Hardware("this GPU", device=measured)


def _millions(count: float) -> str:
    return f"{count / 1e6:,.{1 if count >= 1e7 else 2}f} M"
