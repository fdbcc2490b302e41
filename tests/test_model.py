"""The encoder is BERT.

transformers' BertForPreTraining gives the same states, losses and gradients from the same weights.
"""

import dataclasses
import itertools
import math

import pytest
import torch
import transformers

from fastbert.checkpoints.weight_names import from_hugging_face, to_hugging_face
from fastbert.config import BertConfig
from fastbert.data.packing import PackedBatch
from fastbert.errors import InputError
from fastbert.models.bert import Attention, BertForPreTraining, Mode
from fastbert.models.heads import losses, resolve_kernels
from tests.random_batch import VOCAB, make_batch

CONFIG = BertConfig(
    hidden_size=48,
    num_hidden_layers=3,
    num_attention_heads=3,
    intermediate_size=96,
    max_position_embeddings=64,
)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = BertForPreTraining(CONFIG, VOCAB)
    with torch.no_grad():
        for (
            parameter
        ) in model.parameters():  # biases and norms away from 0 and 1, so that a swapped one shows
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


@pytest.fixture(scope="module")
def twin(model):
    words = (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "max_position_embeddings",
    )
    config = transformers.BertConfig(vocab_size=VOCAB, **{w: getattr(CONFIG, w) for w in words})
    twin = transformers.BertForPreTraining(config).eval()
    missing, unexpected = twin.load_state_dict(
        to_hugging_face(model.state_dict(), CONFIG), strict=False
    )
    assert not unexpected and all("decoder" in name for name in missing)
    return twin


def test_states_and_losses_are_those_of_transformers(model, twin):
    batch = make_batch([9, 30, 17])
    mask = torch.zeros(3, 30, dtype=torch.long)
    padded = {
        name: torch.zeros(3, 30, dtype=torch.long) for name in ("input_ids", "token_type_ids")
    }
    labels = torch.full((3, 30), -100)
    flat_labels = torch.full_like(batch.input_ids, -100).index_copy_(
        0, batch.masked_positions, batch.labels
    )
    for row, (start, end) in enumerate(itertools.pairwise(batch.cu_seqlens.tolist())):
        mask[row, : end - start] = 1
        labels[row, : end - start] = flat_labels[start:end]
        for name, rows in padded.items():
            rows[row, : end - start] = getattr(batch, name)[start:end]
    theirs = twin(
        **padded,
        attention_mask=mask,
        labels=labels,
        next_sentence_label=batch.next_sentence_labels,
        output_hidden_states=True,
    )
    states = model.hidden_states(batch)
    assert len(states) == CONFIG.num_hidden_layers + 1
    for ours, other in zip(states, theirs.hidden_states, strict=True):
        torch.testing.assert_close(ours, other[mask.bool()], rtol=0, atol=1e-5)
    torch.testing.assert_close(
        model.token_logits(states[-1]), theirs.prediction_logits[mask.bool()], rtol=0, atol=1e-5
    )
    torch.testing.assert_close(
        model.pair_logits(states[-1][batch.cu_seqlens[:-1].long()]),
        theirs.seq_relationship_logits,
        rtol=0,
        atol=1e-5,
    )

    model.zero_grad()
    loss = losses(model(batch)).loss
    torch.testing.assert_close(loss, theirs.loss, rtol=0, atol=1e-5)
    loss.backward()
    theirs.loss.backward()
    reference = from_hugging_face(
        {name: p.grad for name, p in twin.named_parameters()},
        CONFIG,
        VOCAB,
        "the gradients of transformers",
    )
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter.grad,
            reference[name],
            rtol=1e-4,
            atol=1e-5,
            msg=lambda m, name=name: f"{name}: {m}",
        )


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_cutting_the_last_layer_changes_nothing(model, impl):
    """Compare the training pass, whose last layer is cut, with all rows of all layers.

    Dropout is on, so its masks are compared too.
    """
    batch = make_batch([12, 40, 5, 23])
    model.train()
    model.impl = impl
    cut = losses(model(batch))
    hidden = model.hidden_states(batch)[-1]
    tokens = torch.nn.functional.cross_entropy(
        model.token_logits(hidden[batch.masked_positions]), batch.labels, reduction="none"
    )
    pairs = torch.nn.functional.cross_entropy(
        model.pair_logits(hidden[batch.cu_seqlens[:-1].long()]),
        batch.next_sentence_labels,
        reduction="none",
    )
    model.eval()
    torch.testing.assert_close(cut.token_losses, tokens, rtol=0, atol=1e-5)
    torch.testing.assert_close(cut.pair_losses, pairs, rtol=0, atol=1e-5)
    torch.testing.assert_close(cut.loss, tokens.mean() + pairs.mean(), rtol=0, atol=1e-5)


def test_implementations_agree_with_dropout(model):
    batch = make_batch([33, 8, 21])
    model.train()
    outcome = {}
    for impl in ("cpu", "reference"):
        model.impl = impl
        model.zero_grad()
        loss = losses(model(batch)).loss
        loss.backward()
        outcome[impl] = (loss.detach(), [p.grad.clone() for p in model.parameters()])
    model.eval()
    torch.testing.assert_close(outcome["cpu"], outcome["reference"], rtol=1e-4, atol=1e-6)


def test_packs_add_up_to_the_step(model):
    """The same examples in one pack or in two have the same loss and gradient, with dropout."""
    lengths = [20, 31, 9, 14]
    whole = make_batch(lengths)
    starts = whole.cu_seqlens.tolist()

    def part(order: list[int]) -> PackedBatch:
        tokens = torch.cat([torch.arange(starts[i], starts[i + 1]) for i in order])
        place = torch.full((starts[-1],), -1).index_copy_(0, tokens, torch.arange(len(tokens)))
        positions = place[whole.masked_positions]
        kept = positions >= 0
        by_place = positions[kept].argsort()
        cut = torch.tensor([0, *itertools.accumulate(lengths[i] for i in order)], dtype=torch.int32)
        rows = {
            name: getattr(whole, name)[tokens]
            for name in ("input_ids", "token_type_ids", "position_ids")
        }
        heads = {
            name: getattr(whole, name)[torch.tensor(order)]
            for name in ("next_sentence_labels", "dropout_seeds", "examples")
        }
        masks = {
            "masked_positions": positions[kept][by_place],
            "labels": whole.labels[kept][by_place],
        }
        return dataclasses.replace(
            whole,
            cu_seqlens=cut,
            max_seqlen=max(lengths[i] for i in order),
            **rows,
            **heads,
            **masks,
        )

    model.train()
    outcome = []
    for packs in ([whole], [part([2, 0]), part([3, 1])]):
        model.zero_grad()
        parts = [losses(model(pack)).loss for pack in packs]
        for loss in parts:
            loss.backward()
        outcome.append(
            (
                sum(float(loss.detach()) for loss in parts),
                [p.grad.clone() for p in model.parameters()],
            )
        )
    model.eval()
    assert outcome[0][0] == pytest.approx(outcome[1][0], abs=1e-5)
    torch.testing.assert_close(outcome[0][1], outcome[1][1], rtol=1e-4, atol=1e-6)


def test_loss_is_the_sum_of_both(model):
    found = losses(model(make_batch([16, 16])))
    torch.testing.assert_close(found.loss, found.mlm + found.nsp)
    torch.testing.assert_close(found.mlm, found.token_losses.mean())
    torch.testing.assert_close(found.nsp, found.pair_losses.mean())


def test_examples_without_a_pair_add_nothing(model):
    batch = make_batch([16, 16])
    without = dataclasses.replace(batch, next_sentence_labels=torch.full((2,), -100), pairs_total=0)
    assert losses(model(without)).nsp.item() == 0


@pytest.mark.parametrize(("initial_attention", "slack"), [("uniform", 0.02), ("adjacent", 0.2)])
def test_first_loss_of_a_fresh_model_is_that_of_guessing(initial_attention, slack):
    torch.manual_seed(3)
    fresh = BertForPreTraining(
        dataclasses.replace(CONFIG, initial_attention=initial_attention), VOCAB
    ).eval()
    found = losses(fresh(make_batch([30] * 20)))
    assert found.mlm.item() == pytest.approx(math.log(VOCAB), abs=slack)
    assert found.nsp.item() == pytest.approx(math.log(2), abs=slack)


def test_kernels_are_resolved_by_device():
    assert resolve_kernels("auto", "cpu") == "cpu"
    assert resolve_kernels("auto", "cuda") == "triton"
    assert resolve_kernels("triton", "cuda") == "triton"
    with pytest.raises(InputError, match=r'runtime.kernels = "cpu" cannot run on cuda'):
        resolve_kernels("cpu", "cuda")


def test_triton_on_a_cpu_is_for_the_interpreter_alone(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert resolve_kernels("triton", "cpu") == "triton"
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(
        InputError, match=r'runtime.kernels = "triton" needs a GPU; .*TRITON_INTERPRET=1'
    ):
        resolve_kernels("triton", "cpu")


def test_neighbouring_heads_look_at_the_token_before_and_after():
    """At the start, head 0 of the first layer attends to the previous token, head 1 to the next.

    They may be off by one position, and do not depend on the words.
    """
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=64,
        initial_attention="adjacent",
    )
    model = BertForPreTraining(config, VOCAB).eval()
    batch = make_batch([60])
    x = model.hidden_states(batch)[0]
    attention = model.get_submodule("layers.0.attention")
    assert isinstance(attention, Attention)
    q, k, _ = attention.project(x, None, Mode(0.0, 0.0, "cpu", None))
    scores = torch.einsum("ihk,jhk->hij", q, k) / config.head_size**0.5
    best = scores.argmax(-1)
    place = torch.arange(60)
    assert ((best[0] - (place - 1)).abs() <= 1).float().mean() > 0.9
    assert ((best[1] - (place + 1)).abs() <= 1).float().mean() > 0.9
    weights = scores.softmax(-1)
    assert weights[0].diagonal(-1).mean() > 4 * weights[0].diagonal(1).mean()
    assert weights[1].diagonal(1).mean() > 4 * weights[1].diagonal(-1).mean()
    assert weights[2:].max() < 0.05  # the other heads start as they always do, near 1 / 60
