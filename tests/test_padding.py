"""A padded pack has the losses, correct tokens, counts and gradients of the unpadded pack.

There are few padded shapes.
"""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from fastbert.config import BatchConfig, BertConfig, RunConfig, RuntimeConfig
from fastbert.data.batches import Batches
from fastbert.data.packing import PackedBatch
from fastbert.data.padding import SEQUENCE_DIGITS, TOKEN_DIGITS, pad, round_up
from fastbert.models.bert import BertForPreTraining
from fastbert.models.heads import Losses, losses
from fastbert_kernels import masked_cross_entropy
from tests.random_batch import VOCAB, make_batch
from tests.test_kernels import watched
from tests.tiers import typical

IMPLEMENTATIONS = ["triton", "cpu", "reference"]
MASK_RATE = 0.3  # make_batch selects three tokens of each sequence, and one of the shortest
LENGTHS = [9, 5, 20, 3, 4, 7, 6, 3, 5]
MODEL = BertConfig(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=48,
    max_position_embeddings=160,
)
BATCH = BatchConfig(sequences=50, max_length=48, micro_batch_tokens=400)


def test_sizes_are_rounded_up_to_few_digits():
    for size, digits in itertools.product(range(1, 300), (3, 5)):
        # This is the definition.
        rounded = next(n for n in itertools.count(size) if len(f"{n:b}".rstrip("0")) <= digits)
        assert round_up(size, digits) == rounded, (size, digits)


def test_what_a_padded_pack_holds():
    batch = make_batch(LENGTHS)
    padded = pad(batch, MASK_RATE, 200)
    assert (padded.tokens, padded.sequences) == (batch.tokens, batch.sequences)
    assert (padded.masked_total, padded.pairs_total, padded.max_seqlen) == (
        batch.masked_total,
        batch.pairs_total,
        200,
    )
    for name in (
        "input_ids",
        "token_type_ids",
        "position_ids",
        "cu_seqlens",
        "next_sentence_labels",
        "dropout_seeds",
        "examples",
    ):
        assert getattr(padded, name)[: len(getattr(batch, name))].equal(getattr(batch, name)), name
        assert getattr(padded, name).dtype == getattr(batch, name).dtype, name
    asked = padded.labels != -100
    assert padded.masked_positions[asked].equal(batch.masked_positions)
    assert padded.labels[asked].equal(batch.labels)
    # Queries of the attention must ascend. So no row may occur twice, and the first token of a
    # sequence is already a query.
    rows = torch.cat((padded.masked_positions, padded.cu_seqlens[:-1])).tolist()
    assert len(set(rows)) == len(rows) and max(rows) < len(padded.input_ids)
    assert padded.masked_positions.equal(padded.masked_positions.sort().values)
    assert padded.cu_seqlens.diff()[batch.sequences :].eq(1).all()


def computed(
    batch, impl: str, dtype: torch.dtype = torch.float32
) -> tuple[Losses, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    model = BertForPreTraining(MODEL, VOCAB, impl).to(dtype).train()
    with watched(impl):
        found = losses(model(batch))
        found.loss.backward()
    return found, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(scope="module")
def truth() -> tuple[Losses, dict[str, torch.Tensor]]:
    return computed(make_batch(LENGTHS), "reference", torch.float64)


def check_same(found: Losses, padded: PackedBatch, truth: Losses, dtype: torch.dtype) -> None:
    """Check that the losses are those of the pack, to torch's tolerance of the model's dtype.

    The padding itself contributes exactly nothing.
    """
    asked, sequences = padded.labels != -100, padded.sequences
    pairs = (
        (found.mlm, truth.mlm),
        (found.nsp, truth.nsp),
        (found.token_losses[asked], truth.token_losses),
    )
    for ours, expected in (*pairs, (found.pair_losses[:sequences], truth.pair_losses)):
        torch.testing.assert_close(ours.to(dtype), expected.to(dtype))
    assert found.token_losses[~asked].eq(0).all() and found.pair_losses[sequences:].eq(0).all()
    assert not found.token_correct[~asked].any() and not found.pair_correct[sequences:].any()


@pytest.mark.parametrize(
    ("impl", "dtype"),
    typical(
        [*((impl, torch.float32) for impl in IMPLEMENTATIONS), ("triton", torch.bfloat16)],
        *((impl, torch.float32) for impl in IMPLEMENTATIONS if impl != "triton"),
    ),
)
def test_losses_and_gradients_are_those_of_the_pack(impl, dtype, truth):
    """This includes dropout.

    A gradient's error is at most twice that of the pack plus a rounding of the largest gradient.
    bf16 uses the kernels for short sequences, as the pack does.
    """
    batch = make_batch(LENGTHS)
    padded = pad(batch, MASK_RATE, 130 if dtype == torch.float32 else 64)
    assert padded.padding_tokens > padded.padding_sequences > 0 and len(padded.labels) > len(
        batch.labels
    )
    (_, plain), (found, gradients) = computed(batch, impl, dtype), computed(padded, impl, dtype)
    check_same(found, padded, truth[0], dtype)
    assert gradients.keys() == plain.keys() == truth[1].keys()
    for name, exact in truth[1].items():
        error, error_of_plain = (float((x[name] - exact).abs().max()) for x in (gradients, plain))
        assert error <= 2 * error_of_plain + torch.finfo(dtype).eps * float(exact.abs().max()), name


def test_in_fp64_padding_moves_nothing(truth):
    """In fp64 no rounding hides an error."""
    padded = pad(make_batch(LENGTHS), MASK_RATE, 130)
    found, gradients = computed(padded, "reference", torch.float64)
    check_same(found, padded, truth[0], torch.float64)
    torch.testing.assert_close(gradients, truth[1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_an_ignored_token_counts_for_nothing(impl):
    """The results are those without this token."""
    draw = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(*shape, generator=draw) for shape in ((40, 16), (100, 16), (100,))
    )
    labels = torch.randint(0, 100, (40,), generator=draw)
    ignored = torch.arange(40) % 3 == 0
    results = []
    for rows, chosen in (
        (hidden[~ignored], labels[~ignored]),
        (hidden, labels.masked_fill(ignored, -100)),
    ):
        inputs = [x.clone().requires_grad_() for x in (rows, weight, bias)]
        loss, token_losses, correct = masked_cross_entropy(
            inputs[0], inputs[1], inputs[2], None, chosen, total=27, impl=impl
        )
        results.append((loss, token_losses, correct, *torch.autograd.grad(loss, inputs)))
    (
        (loss, token_losses, correct, dhidden, *others),
        (loss_all, losses_all, correct_all, dhidden_all, *others_all),
    ) = results
    torch.testing.assert_close(loss_all, loss)
    torch.testing.assert_close(losses_all[~ignored], token_losses)
    assert (
        losses_all[ignored].eq(0).all()
        and not correct_all[ignored].any()
        and correct_all[~ignored].equal(correct)
    )
    torch.testing.assert_close(dhidden_all[~ignored], dhidden)
    assert dhidden_all[ignored].eq(0).all()
    torch.testing.assert_close(others_all, others)
    with pytest.raises(ValueError, match="labels span -99 to"):
        masked_cross_entropy(
            hidden, weight, bias, None, labels.masked_fill(ignored, -99), impl=impl
        )


@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_step_has_the_same_examples_in_the_same_packs(small_dataset, world):
    plain = RunConfig(data="dataset", batch=BATCH)
    graphs = dataclasses.replace(plain, runtime=RuntimeConfig(cuda_graphs=True))
    for rank in range(world):
        packs, padded = (
            Batches(small_dataset, config).step(3, rank, world) for config in (plain, graphs)
        )
        assert len(packs) == len(padded)
        for pack, other in zip(packs, padded, strict=True):
            assert other.examples[: pack.sequences].equal(pack.examples)
            assert other.input_ids[: pack.tokens].equal(pack.input_ids)
            assert (other.tokens, other.sequences) == (pack.tokens, pack.sequences)
            assert (other.masked_total, other.pairs_total) == (pack.masked_total, pack.pairs_total)


@pytest.mark.parametrize("kind, mask_rate", [("mlm+nsp", 0.15), ("mlm", 0.15), ("mlm", 0.9)])
def test_there_are_few_shapes(small_dataset, kind, mask_rate):
    """M follows from T and B; T and B double in 2^(digits - 1) steps; little is padding."""
    plain = RunConfig(data="dataset", batch=BATCH)
    objective = dataclasses.replace(plain.objective, kind=kind, mask_rate=mask_rate)
    batches = Batches(
        small_dataset,
        dataclasses.replace(plain, objective=objective, runtime=RuntimeConfig(cuda_graphs=True)),
    )
    packs = [pack for step in range(40) for pack in batches.step(step)]
    sizes = np.array(
        [
            (len(pack.input_ids), len(pack.examples), len(pack.labels), pack.max_seqlen)
            for pack in packs
        ]
    )
    shapes = np.unique(sizes, axis=0)
    assert len(shapes) == len(np.unique(sizes[:, :2], axis=0))
    for column, digits in ((0, TOKEN_DIGITS), (1, SEQUENCE_DIGITS)):
        doublings = np.log2(sizes[:, column].max() / sizes[:, column].min())
        assert len(np.unique(sizes[:, column])) <= 1 + np.ceil(doublings * 2 ** (digits - 1) * 2)
    for pack in packs:
        assert pack.padding_tokens - pack.padding_sequences < len(pack.input_ids) / 2 ** (
            TOKEN_DIGITS - 1
        )
        assert pack.padding_sequences <= len(pack.examples) / 2 ** (SEQUENCE_DIGITS - 1)
