"""Muon against its definition in fp64, torch's own Muon, and itself at other stages."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from fastbert.config import OptimizerConfig
from fastbert.data.batches import Batches
from fastbert.training.engine import NotFinite
from fastbert.training.muon import Muon, is_hidden
from fastbert.training.newton_schulz import orthogonalise
from tests.test_engine import CONFIG, engine, state_of
from tests.tiers import slow

STEPS = 4
MUON = OptimizerConfig(name="muon", lr=0.02, momentum=0.95, weight_decay=0.1)
SHAPES = {"tall": (48, 32), "wide": (32, 80), "square": (32, 32), "odd": (7, 5)}
RECIPE = dataclasses.replace(CONFIG, optimizer=MUON)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gradients(shape: tuple[int, int], step: int) -> Tensor:
    """Singular values from 1 down to 1e-4, since those of real gradients also differ so much."""
    q, _, v = torch.linalg.svd(randn(*shape, seed=100 + step), full_matrices=False)
    return q @ torch.diag(torch.logspace(0, -4, min(shape))) @ v


def train(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor], steps: int = STEPS
) -> dict[str, Tensor]:
    """Return how far each parameter has moved."""
    before = {name: p.detach().clone() for name, p in parameters.items()}
    for step in range(steps):
        for p in parameters.values():
            p.grad = gradients((p.shape[0], p.shape[1]), step)
        optimizer.step()
    return {name: p.detach() - before[name] for name, p in parameters.items()}


def hidden(shapes: Mapping[str, tuple[int, int]] = SHAPES) -> dict[str, Tensor]:
    return {f"layers.0.{name}": nn.Parameter(randn(*shape)) for name, shape in shapes.items()}


def by_definition(shape: tuple[int, int]) -> Tensor:
    """The movement in fp64, by the formulas of the paper."""
    x = start = randn(*shape).double()
    m = torch.zeros_like(x)
    for step in range(STEPS):
        g = gradients(shape, step).double()
        m = 0.95 * m + g
        o = g + 0.95 * m
        o = o / o.norm()
        for _ in range(5):
            square = o @ o.T
            o = 3.4445 * o + (-4.7750 * square + 2.0315 * square @ square) @ o
        x = x - 0.02 * (0.1 * x + 0.2 * math.sqrt(max(shape)) * o)
    return x - start


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_as_near_to_the_definition_as_torchs_own(dtype):
    """torch's Muon multiplies in bf16. In fp32 we must be much nearer."""
    ours, theirs = hidden(), hidden()
    moved = train(Muon(ours, [], MUON, dtype), ours)
    of_torch = train(
        torch.optim.Muon(
            theirs.values(),
            lr=0.02,
            momentum=0.95,
            weight_decay=0.1,
            adjust_lr_fn="match_rms_adamw",
        ),
        theirs,
    )
    for name, shape in SHAPES.items():
        expected = by_definition(shape)
        error, error_of_torch = (
            float((found[f"layers.0.{name}"].double() - expected).norm())
            for found in (moved, of_torch)
        )
        assert error < error_of_torch * (2 if dtype == torch.bfloat16 else 0.1), name


def test_query_key_and_value_are_orthogonalised_one_by_one():
    whole, gradient = randn(96, 32), randn(96, 32, seed=1)
    joined = {"layers.0.attention.qkv_weight": nn.Parameter(whole.clone())}
    apart = {f"layers.0.{i}": nn.Parameter(part.clone()) for i, part in enumerate(whole.chunk(3))}
    joined["layers.0.attention.qkv_weight"].grad = gradient
    for p, part in zip(apart.values(), gradient.chunk(3), strict=True):
        p.grad = part.clone()
    for parameters in (joined, apart):
        Muon(parameters, [], MUON).step()
    (found,) = joined.values()
    torch.testing.assert_close(found, torch.cat(list(apart.values())))


@pytest.mark.parametrize("shape", [(64, 64), (64, 256), (256, 64)])
def test_singular_values_of_an_update_are_near_1(shape):
    found = torch.linalg.svdvals(orthogonalise(randn(2, *shape)))
    # Gaussian matrices of 64 x 64 have a few singular values below 0.01 of their norm.
    assert float(found.quantile(0.1)) > 0.6 and float(found.max()) < 1.3


def test_zero_gradients_move_nothing_but_the_decay():
    parameters = hidden({"square": (8, 8)})
    (p,) = parameters.values()
    before = p.detach().clone()
    p.grad = torch.zeros_like(p)
    Muon(parameters, [], MUON).step()
    torch.testing.assert_close(p.detach(), before * (1 - 0.02 * 0.1))


@pytest.fixture(scope="module")
def packs(small_dataset):
    batches = Batches(small_dataset, RECIPE)
    return [batches.step(i) for i in range(5)]


@pytest.fixture(scope="module")
def at_stage_0(small_dataset, packs):
    """The losses of five steps, and the state after three of them."""
    with engine(small_dataset, 0, RECIPE) as built:
        losses = [built.step(packs[i], lr=1e-2).loss for i in range(3)]
        state = state_of(built)
        return losses + [built.step(packs[i], lr=1e-2).loss for i in (3, 4)], state


def test_what_a_checkpoint_holds(at_stage_0):
    """Hidden matrices have one slot, and the other parameters AdamW's two."""
    state = at_stage_0[1]
    ours = {name for name, tensor in state["weight"].items() if is_hidden(name, tensor.shape)}
    assert len(ours) == 4 * CONFIG.model.num_hidden_layers
    assert {slot: set(state[slot]) for slot in state} == {
        "weight": set(state["weight"]),
        "momentum_buffer": ours,
        "exp_avg": set(state["weight"]) - ours,
        "exp_avg_sq": set(state["weight"]) - ours,
    }
    assert all(tensor.any() for named in state.values() for tensor in named.values())


@pytest.mark.parametrize("stage", [1, 2])
def test_a_higher_stage_makes_the_same_steps(small_dataset, packs, at_stage_0, stage):
    with engine(small_dataset, stage, RECIPE) as built:
        losses = [built.step(packs[i], lr=1e-2).loss for i in range(3)]
        state = state_of(built)
    assert losses == pytest.approx(at_stage_0[0][:3], rel=1e-5)
    assert {slot: set(state[slot]) for slot in state} == {
        slot: set(named) for slot, named in at_stage_0[1].items()
    }


@pytest.mark.parametrize("stage", [0, 1, slow(2)])
def test_a_state_of_stage_0_continues_at_any_stage(small_dataset, packs, at_stage_0, stage):
    losses, state = at_stage_0
    with engine(small_dataset, stage, RECIPE, state=state, step=3) as built:
        loaded = state_of(built)
        for slot, tensors in state.items():
            assert all(torch.equal(tensor, loaded[slot][name]) for name, tensor in tensors.items())
        found = [built.step(packs[i], lr=1e-2).loss for i in (3, 4)]
    assert found == (losses[3:] if stage == 0 else pytest.approx(losses[3:], rel=1e-5))


@pytest.mark.parametrize("stage, precision", [(1, "fp32"), (1, "bf16"), slow(2, "fp32")])
def test_resuming_gives_the_same_to_the_last_digit(small_dataset, packs, stage, precision, request):
    if precision == "bf16":
        request.getfixturevalue("bf16_products")
    with engine(small_dataset, stage, RECIPE, precision) as built:
        for i in range(3):
            built.step(packs[i], lr=1e-2)
        state = state_of(built)
        expected = [built.step(packs[i], lr=1e-2) for i in (3, 4)]
    with engine(small_dataset, stage, RECIPE, precision, state=state, step=3) as built:
        assert [built.step(packs[i], lr=1e-2) for i in (3, 4)] == expected


@pytest.mark.parametrize("stage", [0, 1, slow(2)])
def test_a_skipped_step_changes_nothing(small_dataset, packs, stage):
    with engine(small_dataset, stage, RECIPE) as built:
        built.step(packs[0], lr=1e-2)
        before = state_of(built)
        weight = built.model.get_parameter("layers.0.attention.qkv_weight")
        poison = weight.register_hook(lambda grad: grad * math.inf)
        with pytest.raises(NotFinite):
            built.step(packs[1], lr=1e-2)
        poison.remove()
        after = state_of(built)
        for slot, tensors in before.items():
            assert all(torch.equal(tensor, after[slot][name]) for name, tensor in tensors.items())
        assert math.isfinite(built.step(packs[2], lr=1e-2).grad_norm)
