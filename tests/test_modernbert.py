"""The encoder is ModernBERT.

transformers' ModernBertForMaskedLM gives the same states, logits, losses and gradients from the
same weights. Bounds are twice the error of transformers in fp32 against itself in fp64, plus one
rounding of the largest value.
"""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from fastbert.checkpoints.weight_names import from_hugging_face, shapes
from fastbert.models.heads import losses
from tests.modern_bert import CONFIGS, SMALL, new_model, padded, twin_of
from tests.random_batch import VOCAB, make_batch

LENGTHS = [9, 70, 33]  # one within the window of a local layer, two beyond it
DROPOUT = dataclasses.replace(SMALL, embedding_dropout=0.1, attention_dropout=0.2, mlp_dropout=0.3)


def check(found, plain, exact):
    """Compare with transformers in fp32 (`plain`) and fp64 (`exact`)."""
    allowed = 2 * (plain - exact).abs().max() + torch.finfo(torch.float32).eps * exact.abs().max()
    assert (found - exact).abs().max() <= allowed


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
    gradients = []
    for theirs in (twin, copy.deepcopy(twin).double()):
        theirs(**arguments).loss.backward()
        found = {name: p.grad for name, p in theirs.named_parameters()}
        gradients.append(
            {ours: found[theirs] for theirs in found for ours in [their_name(theirs, model)]}
        )
    losses(model(batch)).loss.backward()
    for name, parameter in model.named_parameters():
        plain, exact = (found[name] for found in gradients)
        if name == "embeddings.word":  # transformers gives the padding token no gradient
            assert not (batch.input_ids == 0).any()
        check(parameter.grad, plain, exact)


def their_name(theirs, model):
    from fastbert.checkpoints.weight_names import table_of

    return {e.theirs[0]: ours for ours, e in table_of(model.config).entries.items()}[theirs]


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

    Dropout is on, so its masks are compared too. A row computed alone and one among others may
    round differently, so the bound is that of fp64: there, both are the same to 1e-12.
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
