"""The encoder is ModernBERT.

transformers' ModernBertForMaskedLM gives the same states, logits, losses and gradients from the
same weights. The error may be twice that of transformers in fp32 against itself in fp64, plus one
rounding of the values, as Euclidean norms.
"""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
import transformers

from fastbert.checkpoints.weight_names import (
    from_hugging_face,
    shapes,
    table_of,
    to_hugging_face,
)
from fastbert.models import modernbert
from fastbert.models.heads import losses
from fastbert.models.modernbert import ModernBertForMaskedLM
from fastbert_kernels._dropout import row_multiplier
from tests.modern_bert import CONFIGS, SMALL, new_model, padded, their_config, twin_of
from tests.random_batch import VOCAB, make_batch

LENGTHS = [9, 70, 33]  # one within the window of a local layer, two beyond it
DROPOUT = dataclasses.replace(SMALL, embedding_dropout=0.1, attention_dropout=0.2, mlp_dropout=0.3)


def check(found, plain, exact):
    """Compare with transformers in fp32 (`plain`) and fp64 (`exact`)."""
    allowed = 2 * (plain - exact).norm() + torch.finfo(torch.float32).eps * exact.norm()
    assert (found - exact).norm() <= allowed


@pytest.mark.parametrize("name", CONFIGS)
def test_states_logits_and_loss_are_those_of_transformers(name):
    model = new_model(CONFIGS[name]).eval()
    twin, batch = twin_of(model), make_batch(LENGTHS)
    arguments, real = padded(batch)
    with torch.no_grad():
        plain = twin(**arguments, output_hidden_states=True)
        exact = copy.deepcopy(twin).double()(**arguments, output_hidden_states=True)
        states = model.hidden_states(batch)
        assert len(states) == len(exact.hidden_states) == CONFIGS[name].num_hidden_layers + 1
        for ours, theirs, truth in zip(
            states, plain.hidden_states, exact.hidden_states, strict=True
        ):
            check(ours, theirs[real], truth[real])
        check(model.token_logits(states[-1]), plain.logits[real], exact.logits[real])
        check(losses(model(batch)).loss, plain.loss, exact.loss)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_gradients_are_those_of_transformers(impl):
    model = new_model(CONFIGS["biases"]).eval()
    model.impl = impl
    twin, batch = twin_of(model), make_batch(LENGTHS)
    arguments, _ = padded(batch)
    names = {entry.theirs[0]: ours for ours, entry in table_of(model.config).entries.items()}
    gradients = []
    for theirs in (twin, copy.deepcopy(twin).double()):
        theirs(**arguments).loss.backward()
        gradients.append({names[name]: p.grad for name, p in theirs.named_parameters()})
    losses(model(batch)).loss.backward()
    for name, parameter in model.named_parameters():
        plain, exact = (found[name] for found in gradients)
        check(parameter.grad, plain, exact)


@pytest.mark.parametrize("name", CONFIGS)
def test_names_and_shapes(name):
    config, model = CONFIGS[name], new_model(CONFIGS[name])
    state = model.state_dict()
    assert shapes(config, VOCAB) == {name: tuple(t.shape) for name, t in state.items()}
    theirs = twin_of(model).state_dict()
    again = from_hugging_face(theirs, config, VOCAB, "m", config.tie_word_embeddings)
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], state[name]) for name in state)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_cutting_the_last_layer_changes_nothing(impl):
    """Compare the training pass, whose last layer is cut, with all rows of all layers.

    Dropout is on, so its masks are compared too. It is in fp64, where rounding hardly shows.
    """
    model, batch = new_model(DROPOUT).double().train(), make_batch([12, 40, 5, 23])
    model.impl = impl
    cut = losses(model(batch))
    hidden = model.hidden_states(batch)[-1]
    tokens = torch.nn.functional.cross_entropy(
        model.token_logits(hidden[batch.masked_positions]), batch.labels, reduction="none"
    )
    torch.testing.assert_close(cut.token_losses, tokens)
    torch.testing.assert_close(cut.loss, tokens.mean())
    masked, first = model.loss_rows(batch)
    torch.testing.assert_close(masked, hidden[batch.masked_positions])
    torch.testing.assert_close(first, hidden[batch.cu_seqlens[:-1].long()])


def test_each_place_that_drops_has_a_stream_of_its_own(monkeypatch):
    """Two places with one stream would drop the same elements."""
    streams: list[int] = []

    def noted(function):
        def call(*arguments, **named):
            if function is row_multiplier:
                streams.append(arguments[1])
            elif named.get("dropout_p"):
                streams.append(named.get("dropout_stream", 0))
            return function(*arguments, **named)

        return call

    for name in ("embedding_layer_norm", "varlen_attention", "add_layer_norm", "row_multiplier"):
        monkeypatch.setattr(modernbert, name, noted(getattr(modernbert, name)))
    new_model(DROPOUT).train()(make_batch(LENGTHS))
    assert len(streams) == len(set(streams)) == 1 + 3 * DROPOUT.num_hidden_layers


def test_initial_weights_are_spread_as_in_transformers():
    """By standard deviation, within five standard errors of both, and by the cut-off."""
    config = dataclasses.replace(
        CONFIGS["untied"], norm_bias=True, attention_bias=True, mlp_bias=True, decoder_bias=True
    )
    torch.manual_seed(0)
    ours = to_hugging_face(ModernBertForMaskedLM(config, VOCAB).state_dict(), config)
    theirs = transformers.ModernBertForMaskedLM(their_config(config)).state_dict()
    assert ours.keys() == theirs.keys()
    wide = config.initializer_cutoff_factor * config.initializer_range
    eps = torch.finfo(torch.float32).eps
    limits = wide, wide / math.sqrt(2 * config.num_hidden_layers)
    for name, expected in theirs.items():
        found = ours[name]
        if expected.dim() == 1:
            assert torch.equal(found, expected), name
            continue
        if "embeddings" in name:  # transformers sets that of the padding to zero
            expected = expected[1:]
        std, error = expected.std(), 5 * expected.std() / math.sqrt(expected.numel())
        assert (found.std() - std).abs() < error, name
        # Both are cut off at the same value, which is the nearest above the largest of theirs.
        limit = min(x for x in limits if x >= expected.abs().max() - eps * wide)
        assert found.abs().max() <= limit + eps * wide, name


def test_first_loss_of_a_fresh_model_is_that_of_guessing():
    """Logits of variance v are as good as random, which costs v / 2 beyond ln V.

    They are the products of normed states, whose elements have a mean square of 1, with embeddings.
    """
    torch.manual_seed(3)
    fresh, batch = ModernBertForMaskedLM(SMALL, VOCAB).eval(), make_batch([30] * 20)
    v = SMALL.hidden_size * fresh.embeddings.word.square().mean().item()
    guessing, error = math.log(VOCAB) + v / 2, math.sqrt(v / len(batch.labels))
    assert abs(losses(fresh(batch)).mlm.item() - guessing) < 4 * error
