"""ModernBERT trains as BERT does: at every ZeRO stage, on any ranks, in processes, resumed."""

from __future__ import annotations

import dataclasses
from contextlib import closing

import pytest
import torch

from fastbert.config import BatchConfig, ModernBertConfig
from fastbert.data.batches import Batches
from fastbert.models.build import build_model
from fastbert.models.heads import losses
from fastbert.recipe import load_config
from fastbert.training.muon import matrices
from fastbert.training.optimizer import build_optimizer
from fastbert.training.parallel_model import ParallelModel
from fastbert.training.schedule import factor
from tests.test_engine import CONFIG, engine, new_model, sgd, state_of
from tests.test_rounded_operands import BF16, distance, step
from tests.tiers import typical
from tests.trials import Laboratory

MODEL = ModernBertConfig(
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=2,
    intermediate_size=48,
    max_position_embeddings=64,
    local_attention=16,
    embedding_dropout=0.1,
    attention_dropout=0.1,
    mlp_dropout=0.1,
    initializer_range=0.1,
)
MLM = dataclasses.replace(CONFIG.objective, kind="mlm")
UNTIED = dataclasses.replace(MODEL, tie_word_embeddings=False, norm_bias=True, attention_bias=True)


@pytest.mark.parametrize("model", [MODEL, UNTIED], ids=["tied", "untied"])
@pytest.mark.parametrize("stage", typical([0, 1, 2, 3], 0, 3))
def test_a_step_is_the_gradient_of_the_whole_batch(small_dataset, stage, model):
    config = dataclasses.replace(sgd(), model=model, objective=MLM)
    packs = Batches(small_dataset, config).step(0)
    assert len(packs) > 1
    alone = new_model(small_dataset, config).train()
    found = [losses(alone(pack)) for pack in packs]
    sum(f.loss for f in found).backward()
    with engine(small_dataset, stage, config) as built:
        before = state_of(built)["weight"]
        result = built.step(packs, lr=1.0)
        after = state_of(built)["weight"]
    for name, p in alone.named_parameters():
        torch.testing.assert_close(before[name] - after[name], p.grad, rtol=1e-3, atol=1e-6)
    assert result.loss == pytest.approx(float(sum(f.loss.detach() for f in found)), rel=1e-6)
    assert result.loss_nsp is None and result.accuracy_nsp is None


@pytest.mark.slow
def test_so_is_a_step_on_the_triton_kernels(small_dataset, monkeypatch):
    """At stage 3 the weights of each module are gathered for its own forward pass."""
    model = dataclasses.replace(MODEL, num_hidden_layers=2)
    batch = BatchConfig(sequences=1, max_length=16, micro_batch_tokens=40)
    config = dataclasses.replace(sgd(), model=model, objective=MLM, batch=batch)
    (pack,) = Batches(small_dataset, config).step(0)
    alone = new_model(small_dataset, config).train()
    losses(alone(pack)).loss.backward()
    monkeypatch.setattr(build_model, "__defaults__", ("triton", "cpu", True))
    with engine(small_dataset, 3, config) as built:
        assert built.model.impl == "triton"
        before = state_of(built)["weight"]
        built.step([pack], lr=1.0)
        # By then DeepSpeed prefetches parameters in the order that it has recorded.
        built.step([pack], lr=0.0)
        after = state_of(built)["weight"]
    for name, p in alone.named_parameters():
        torch.testing.assert_close(before[name] - after[name], p.grad, rtol=1e-3, atol=2e-6)


@pytest.mark.slow
def test_packs_in_processes_have_the_losses_and_gradients_of_packs_in_turn(small_dataset):
    config = dataclasses.replace(CONFIG, model=UNTIED, objective=MLM)
    packs = Batches(small_dataset, config).step(0, at_once=2)[:2]
    with closing(ParallelModel(new_model(small_dataset, config).train(), 2)) as parallel:
        model = parallel.model
        expected, found = [model(pack) for pack in packs], parallel(packs)
        for outputs, same in zip(found, expected, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(outputs, same, strict=True))
        parameters = list(model.parameters())
        both = [torch.autograd.grad(outputs[0], parameters) for outputs in expected]
        together = torch.autograd.grad(sum(sum(x[:2]) for x in found), parameters)
        for got, *parts in zip(together, *both, strict=True):
            assert torch.equal(got, sum(parts))


@pytest.mark.usefixtures("bf16_products")
def test_both_implementations_round_their_operands_alike():
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "max_position_embeddings": 128}
    config = dataclasses.replace(MODEL, mlp_dropout=0.0, initializer_range=0.02, **sizes)
    model = build_model(config, 1000).train()
    plain = step(model, "reference", None)
    fast, reference = (step(model, impl, torch.bfloat16) for impl in ("cpu", "reference"))
    assert {x.dtype for x in fast.values()} == {torch.float32}
    assert distance(fast, reference) < 0.5 * distance(reference, plain)
    assert BF16 / 8 < distance(reference, plain) < 16 * BF16


def test_matrices_for_muon():
    """q, k and v are three, and the input and the gate two, by their rows."""
    named = build_model(MODEL, 100).layers[1].named_parameters()
    found = {name: [tuple(m) for m in matrices(name, p.shape)] for name, p in named if p.dim() == 2}
    assert found == {
        "attention.qkv_weight": [(0, 32, 32), (1024, 32, 32), (2048, 32, 32)],
        "attention.output_weight": [(0, 32, 32)],
        "feed_forward.input_gate_weight": [(0, 48, 32), (1536, 48, 32)],
        "feed_forward.output_weight": [(0, 32, 48)],
    }


# ---------------------------------------------------------------------------------- whole runs

MODERN = (
    "model.type=modernbert",
    "model.num_hidden_layers=3",
    "model.local_attention=16",
    "model.attention_dropout=0.1",
    "model.embedding_dropout=0.1",
    "schedule.warmup=0",
    "schedule.decay=constant",
    "evaluate.every=1000",
)
STEPS = 8


@pytest.fixture(scope="module")
def lab(tmp_path_factory, small_dataset) -> Laboratory:
    return Laboratory(tmp_path_factory.mktemp("modernbert"), small_dataset.path)


@pytest.fixture(scope="module")
def alone(lab) -> list[dict]:
    trial = lab.trial(*MODERN, steps=STEPS)
    trial.resume(1)
    return trial.steps


def by_torch(lab: Laboratory, dataset, dtype: torch.dtype) -> list[float]:
    """The losses of the same run by plain torch."""
    config = load_config(lab.trial(*MODERN, steps=STEPS).recipe, list(MODERN))
    torch.manual_seed(config.seed)
    model = build_model(config.model, dataset.vocab_size, "reference").to(dtype).train()
    optimizer, found = build_optimizer(model, config.optimizer), list[float]()
    for number in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = config.optimizer.lr * factor(config.schedule, number / STEPS)
        total = sum(losses(model(p)).loss for p in Batches(dataset, config).step(number))
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(total.detach()))
    return found


@pytest.fixture(scope="module")
def rounding(lab, small_dataset) -> float:
    """The relative difference of a loss that is caused by rounding alone."""
    single, double = (by_torch(lab, small_dataset, d) for d in (torch.float32, torch.float64))
    return 4 * max(abs(a - b) / b for a, b in zip(single, double, strict=True))


def test_a_run_is_what_plain_torch_makes_of_it(lab, alone, small_dataset, rounding):
    for ours, expected in zip(alone, by_torch(lab, small_dataset, torch.float64), strict=True):
        assert abs(ours["loss"] - expected) < rounding * expected
    assert alone[-1]["loss"] < alone[0]["loss"]


PLACES = [(2, 0), (2, 1), (2, 2), (2, 3), (4, 0), (4, 2)]


@pytest.mark.parametrize("world, stage", typical(PLACES, (2, 3)))
def test_ranks_and_stages_train_the_same(lab, alone, rounding, world, stage):
    trial = lab.trial(*MODERN, stage=stage, steps=STEPS)
    trial.resume(world)
    for ours, expected in zip(trial.steps, alone, strict=True):
        assert abs(ours["loss"] - expected["loss"]) < rounding * expected["loss"]


def test_a_resumed_run_is_the_same_to_the_last_digit(lab, alone):
    trial = lab.trial(*MODERN, steps=STEPS)
    trial.resume(1, "stop.steps=4")
    trial.resume(1)
    assert trial.steps == alone
