"""Choose a recipe that fits a text, a machine and a time. Pure: numbers in, a recipe out.

The rule, with the source of each number:

- Size. The sizes are those of the packaged recipes in LADDER, the smallest first. The largest one
  is taken that sees at least TOKENS_PER_PARAMETER tokens for each parameter of its layers. A small
  model that sees many tokens is better than a large one that sees few: 2 layers of 128 that saw
  100 tokens for each parameter in an hour of one core were 0.18 nats better on [MASK] than 3 layers
  of 192 that saw 14 in 53 minutes (docs/results.md). library.toml sees 49. Between 14 and 49
  nothing was measured.
- Text. Tokens count at most PASSES times, so a small text gets a small model. Where the text is
  read more often than that, the model has dropout. PASSES was not measured.
- Batch. STEP_TOKENS tokens a step, as in the demo: with twice as many, its loss after the same
  number of tokens was 0.29 nats higher (docs/demo.md). A run of more than MOST_STEPS steps, about
  as many as `make library` makes, gets larger steps, up to MOST_STEP_TOKENS.
- Optimizer. Muon, at the learning rate of the packaged recipe of the size. With the demo's recipe
  the loss after 2.4 M tokens was 4.50 in place of AdamW's 4.86, for 8 % more time of the processor
  (docs/how-to/muon.md). Muon was not measured on larger sizes.
- Objective. Masked tokens and next sentences, in pairs of single sentences, as in the demo. Where
  most documents have one sentence, or pairs cannot be drawn, masked tokens alone.
- Masks. MASK_RATE of the tokens where this makes a step at most MASK_COST times as long as with
  BERT's 15 %, else these. More predictions teach a short run more: a model of the demo's size had a
  loss on [MASK] of 4.73 in place of 4.93 after 2.5 M tokens, both evaluated with 15 %. At the
  demo's pace that is worth about a third more tokens. The cost grows with the vocabulary: a fifth
  with 4,096 tokens, and a half with 30,522. Longer runs and other sizes were not measured.
- Length. LENGTH tokens, as in the demo, or twice as many where half of the pairs would be cut.
- Schedule. That of the demo, over the seconds of the run.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from fastbert.config import (
    MUON_MOMENTUM,
    BatchConfig,
    CheckpointConfig,
    EvaluateConfig,
    ModelConfig,
    ObjectiveConfig,
    RunConfig,
    StopConfig,
)
from fastbert.errors import InputError
from fastbert.planning.flops import executed_flops
from fastbert.planning.parameters import count_hidden
from fastbert.recipe import load_config

LADDER = ("demo", "library", "mini", "small", "base", "large")
TOKENS_PER_PARAMETER = 40
PASSES = 40
DROPOUT = 0.1  # BERT's; only for a text that is read more than PASSES times
STEP_TOKENS, MOST_STEP_TOKENS = 2000, 65_536
MOST_STEPS = 40_000
LENGTH = 128
MASK_RATE, MASK_COST = 0.25, 1.25
# The last evaluation and the last checkpoint come after stop.seconds; a start takes 5 seconds. Each
# is a few seconds on two cores.
RESERVE_S, RESERVE_SHARE = 15.0, 0.1
PARTS, LONGEST_PART_S = 10, 600.0  # evaluations and checkpoints of a run; the time between two
# An evaluation costs a third of the operations of as many training tokens. All of them together may
# take this share of the time.
EVALUATION_SHARE, FEWEST_EVALUATED, MOST_EVALUATED = 0.02, 128, 1024


@dataclass(frozen=True)
class Corpus:
    """What the choice needs to know of a dataset.

    Attributes:
        path: the folder, for the recipe and for messages.
        documents, tokens: of the training part.
        vocab_size: V.
        single_sentence_share: documents of one sentence, as a fraction of all documents.
        median_sentence: tokens.
        can_pair: whether pairs can be drawn from both parts.
    """

    path: str
    documents: int
    tokens: int
    vocab_size: int
    single_sentence_share: float
    median_sentence: int
    can_pair: bool


@dataclass(frozen=True)
class Speed:
    """What was measured of one size, or computed from it.

    Attributes:
        tokens_per_s: tokens of training per second.
        example_tokens: mean tokens of an example, including [CLS] and [SEP].
    """

    tokens_per_s: float
    example_tokens: float


@dataclass(frozen=True)
class Advice:
    """A recipe and what it is expected to do.

    Attributes:
        config: the recipe.
        size_of: the packaged recipe that its model and learning rate come from.
        speed: of the chosen size.
        tried: tokens per second of each size that was looked at, by the packaged recipe's name.
        tokens: of training, in the whole run.
        passes: how often the run reads each token of the text. A sentence is in two pairs.
        why_alone: why the objective has no pairs; "" where it has.
    """

    config: RunConfig
    size_of: str
    speed: Speed
    tried: dict[str, float]
    tokens: float
    passes: float
    why_alone: str


def advise(
    corpus: Corpus, minutes: float, run: str, measure: Callable[[RunConfig], Speed]
) -> Advice:
    """Choose the recipe.

    Args:
        corpus: the dataset.
        minutes: for the whole training, with its evaluations and checkpoints; above 0.
        run: the folder of the run.
        measure: the speed of a recipe's model on this dataset. It is called for one size after
            another, until one is too large.

    Raises:
        InputError: the text is too small.
    """
    if corpus.tokens < 10 * STEP_TOKENS:
        raise InputError(
            f"{corpus.path}: {corpus.tokens:,} tokens to train on; the least is "
            f"{10 * STEP_TOKENS:,}, ten steps; prepare more text"
        )
    seconds = 60 * minutes - min(RESERVE_S, RESERVE_SHARE * 60 * minutes)
    objective, why_alone = _objective(corpus)
    chosen: tuple[str, RunConfig, Speed] | None = None
    tried = dict[str, float]()
    for name in LADDER:
        config = _sized(name, corpus, objective, run)
        speed = measure(config)
        tried[name] = speed.tokens_per_s
        useful = min(speed.tokens_per_s * seconds, PASSES * float(corpus.tokens))
        if chosen and useful < TOKENS_PER_PARAMETER * count_hidden(config.model):
            break
        chosen = name, config, speed
    assert chosen is not None
    name, config, speed = chosen
    tokens = speed.tokens_per_s * seconds
    passes = tokens / corpus.tokens
    return Advice(
        config=_timed(config, speed, seconds, passes),
        size_of=name,
        speed=speed,
        tried=tried,
        tokens=tokens,
        passes=passes,
        why_alone=why_alone,
    )


def check_minutes(minutes: float) -> None:
    """Raise InputError where this is no time."""
    if not (math.isfinite(minutes) and minutes > 0):
        raise InputError(f"--minutes {minutes:g}: must be a number above 0, for example 30")


def _objective(corpus: Corpus) -> tuple[ObjectiveConfig, str]:
    """Return the objective, and why it has no pairs."""
    alone = ObjectiveConfig(kind="mlm")
    if corpus.single_sentence_share > 0.5:
        share = f"{corpus.single_sentence_share:.0%}"
        return alone, f"{share} of the documents are a single sentence"
    if not corpus.can_pair:
        return alone, "too few documents of several sentences to draw pairs from"
    return ObjectiveConfig(segments="single"), ""


def _sized(name: str, corpus: Corpus, objective: ObjectiveConfig, run: str) -> RunConfig:
    """Return the recipe with the size and learning rate of a packaged one, before its time."""
    packaged, demo = load_config(name), load_config("demo")
    # A pair is two sentences and three special tokens.
    length = 2 * LENGTH if objective.pairs and 2 * corpus.median_sentence + 3 > LENGTH else LENGTH
    model = replace(
        packaged.model,
        preset=demo.model.preset,  # none: the recipe writes the sizes out
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        max_position_embeddings=length,
        initial_attention="adjacent",
    )
    return RunConfig(
        data=corpus.path,
        run=run,
        model=model,
        objective=replace(
            objective, mask_rate=_mask_rate(model, corpus, objective.mask_rate, length)
        ),
        batch=BatchConfig(sequences=demo.batch.sequences, max_length=length),
        optimizer=replace(
            demo.optimizer, name="muon", momentum=MUON_MOMENTUM, lr=packaged.optimizer.lr
        ),
        schedule=demo.schedule,
    )


def _mask_rate(model: ModelConfig, corpus: Corpus, usual: float, length: int) -> float:
    """Return MASK_RATE if its steps are not much longer than those of the usual rate."""
    tokens = min(2 * corpus.median_sentence + 3, length)
    more, less = (
        executed_flops(model, corpus.vocab_size, [tokens] * 100, round(100 * rate * tokens), 0)
        for rate in (MASK_RATE, usual)
    )
    return MASK_RATE if more <= MASK_COST * less else usual


def _timed(config: RunConfig, speed: Speed, seconds: float, passes: float) -> RunConfig:
    """Return the recipe with what depends on its time: batch, dropout, intervals and the stop."""
    tokens = speed.tokens_per_s * seconds
    step_tokens = min(max(STEP_TOKENS, tokens / MOST_STEPS), MOST_STEP_TOKENS)
    sequences = max(1, round(step_tokens / speed.example_tokens))
    steps = tokens / (sequences * speed.example_tokens)
    every = _round(max(1.0, steps / max(PARTS, seconds / LONGEST_PART_S)))
    evaluated = 3 * EVALUATION_SHARE * tokens / (steps / every) / speed.example_tokens
    dropout = DROPOUT if passes > PASSES else 0.0
    return replace(
        config,
        model=replace(
            config.model, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout
        ),
        batch=replace(config.batch, sequences=sequences),
        stop=StopConfig(seconds=float(f"{seconds:.4g}")),
        evaluate=EvaluateConfig(
            every=every,
            sequences=_round(min(max(evaluated, FEWEST_EVALUATED), MOST_EVALUATED)),
        ),
        checkpoint=CheckpointConfig(every=every, keep=2),
    )


def _round(value: float) -> int:
    """Round to two digits, as a person would write it."""
    digits = max(0, math.floor(math.log10(value)) - 1)
    return int(round(value / 10**digits) * 10**digits)
