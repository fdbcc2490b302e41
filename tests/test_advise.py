"""The recipe that is chosen for a text, a machine and a time; nothing is trained here."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from fastbert.config import RunConfig
from fastbert.errors import InputError
from fastbert.planning.advise import (
    PASSES,
    RESERVE_S,
    TOKENS_PER_PARAMETER,
    Advice,
    Corpus,
    Speed,
    advise,
)
from fastbert.planning.new_recipe import recipe_text, steps_of
from fastbert.planning.parameters import count_parameters
from fastbert.recipe import load_config, parse_config

LIBRARY = Corpus(
    path="data/library",
    documents=25_000,
    tokens=8_000_000,
    vocab_size=8192,
    single_sentence_share=0.1,
    median_sentence=20,
    can_pair=True,
)


def machine(flops: float):
    """A machine of this speed: it trains at 6 operations a parameter, without the vocabulary."""

    def measure(config: RunConfig) -> Speed:
        return Speed(flops / (6 * weights(config)), 50.0)

    return measure


def weights(config: RunConfig) -> int:
    """The parameters that a layer adds, times the layers, counted by another function."""
    with_one, with_two = (
        count_parameters(replace(config.model, num_hidden_layers=n), 8192) for n in (1, 2)
    )
    return config.model.num_hidden_layers * (with_two - with_one)


def chosen(minutes: float, flops: float = 5e10, corpus: Corpus = LIBRARY) -> Advice:
    return advise(corpus, minutes, "runs/x", machine(flops))


def test_the_size_grows_with_the_time_and_never_falls():
    sizes = [chosen(minutes) for minutes in (1, 5, 30, 90, 300, 1000, 10_000)]
    widths = [found.config.model.hidden_size for found in sizes]
    assert widths == sorted(widths) and widths[0] == 128 and widths[-1] > 128
    for found in sizes[1:]:
        if found.size_of != "demo":
            assert found.tokens / weights(found.config) > 0.98 * TOKENS_PER_PARAMETER


def test_a_small_text_gets_a_small_model_and_dropout():
    small = replace(LIBRARY, tokens=200_000)
    found = chosen(1000, corpus=small)
    assert found.size_of == "demo" and found.passes > PASSES
    assert found.config.model.hidden_dropout_prob == 0.1
    assert chosen(1000).size_of != "demo"
    assert chosen(30).config.model.hidden_dropout_prob == 0.0


def test_the_smallest_size_is_the_demos_recipe_apart_from_its_time():
    demo, ours = load_config("demo"), chosen(5).config
    assert ours.model == demo.model
    assert replace(ours.objective, mask_rate=demo.objective.mask_rate) == demo.objective
    assert ours.optimizer == replace(demo.optimizer, name="muon", momentum=0.95)
    assert ours.schedule == demo.schedule
    assert ours.batch.max_length == demo.batch.max_length
    assert ours.batch.sequences * 50.0 == 2000.0  # 28 pairs of the demo's text have as many


@pytest.mark.parametrize("minutes", [0.5, 5, 30, 600])
def test_the_run_fits_into_the_minutes(minutes):
    config = chosen(minutes).config
    assert config.stop.seconds is not None and config.schedule.over == "seconds"
    assert 0.9 * 60 * minutes <= config.stop.seconds <= 60 * minutes - min(RESERVE_S, 6 * minutes)


@pytest.mark.parametrize("minutes", [5, 90, 10_000])
def test_a_run_makes_thousands_of_steps_and_its_evaluations_are_cheap(minutes):
    found = chosen(minutes)
    config, steps = found.config, steps_of(found)
    assert 2000 < steps <= 40_100 or config.batch.sequences * 50 > 60_000
    evaluations = steps / config.evaluate.every
    assert evaluations >= 9.0 and config.checkpoint.every == config.evaluate.every
    evaluated = evaluations * config.evaluate.sequences * 50
    assert evaluated / 3 < 0.03 * found.tokens  # a forward pass is a third of a step
    pause = config.evaluate.every * config.batch.sequences * 50 / found.speed.tokens_per_s
    assert pause < 650  # seconds between two checkpoints


def test_where_no_pairs_can_be_drawn_only_masked_tokens_are_predicted():
    alone = chosen(5, corpus=replace(LIBRARY, single_sentence_share=0.7))
    assert alone.config.objective.kind == "mlm" and "70%" in alone.why_alone
    one = chosen(5, corpus=replace(LIBRARY, can_pair=False))
    assert one.config.objective.kind == "mlm" and "too few documents" in one.why_alone
    assert chosen(5).config.objective.kind == "mlm+nsp" and not chosen(5).why_alone


def test_long_sentences_get_a_longer_context():
    assert chosen(5).config.batch.max_length == 128
    long = chosen(5, corpus=replace(LIBRARY, median_sentence=70)).config
    assert long.batch.max_length == long.model.max_position_embeddings == 256


def test_more_masks_where_the_vocabulary_is_small():
    """They cost little beside the layers then: the products of the MLM head grow with V."""
    rates = [
        chosen(5, corpus=replace(LIBRARY, vocab_size=size)).config.objective.mask_rate
        for size in (1000, 4096, 16_384, 30_522)
    ]
    assert rates == [0.25, 0.25, 0.15, 0.15]


def test_sizes_that_are_much_too_large_are_not_measured():
    seen = []

    def measure(config: RunConfig) -> Speed:
        seen.append(config.model.hidden_size)
        return machine(5e10)(config)

    advise(LIBRARY, 5, "runs/x", measure)
    assert seen == [128, 192]


def test_too_small_a_text_is_refused():
    with pytest.raises(InputError) as error:
        chosen(5, corpus=replace(LIBRARY, tokens=3000))
    message = str(error.value)
    assert "data/library: 3,000 tokens" in message and "20,000" in message and "\n" not in message


@pytest.mark.parametrize("minutes", [1e-4, 0.5, 5, 1000, 1e7])
def test_the_file_says_the_same_as_the_recipe(minutes):
    corpus = replace(LIBRARY, path='my "data"\n[stop] é')
    found = chosen(minutes, corpus=corpus)
    text = recipe_text(corpus, found, minutes)
    assert parse_config(text, "new.toml") == found.config
    assert max(map(len, text.splitlines())) < 140
    assert math.isfinite(steps_of(found))
