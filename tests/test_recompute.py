"""Layers that the backward pass computes again give the same to the last digit, in less memory."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastbert.config import BertConfig, ModelConfig, ModernBertConfig, RuntimeConfig
from fastbert.data.batches import Batches
from fastbert.errors import InputError
from fastbert.models.build import Model, build_model
from fastbert.models.heads import losses
from fastbert.planning.activations import MicroBatchSize, activation_bytes, recomputed_bytes
from fastbert.planning.flops import executed_flops
from fastbert.planning.memory import Sharding, memory_by_part
from fastbert.recipe import load_config
from fastbert.training.parallel_model import ParallelModel
from tests.random_batch import VOCAB, make_batch
from tests.test_engine import CONFIG, engine, state_of
from tests.tiers import slow, typical

CONFIGS: dict[str, ModelConfig] = {
    "bert": BertConfig(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=48
    ),
    "modernbert": ModernBertConfig(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=128,
        local_attention=16,
        embedding_dropout=0.1,
        attention_dropout=0.1,
        mlp_dropout=0.1,
    ),
}
LENGTHS = [60, 128, 90, 17]
FULL = [128] * 3  # sequences of one length, so that the CPU computes nothing on padding


@pytest.fixture(params=CONFIGS)
def model(request) -> Model:
    torch.manual_seed(0)
    return build_model(CONFIGS[request.param], VOCAB).train()


def step(model: Model, recompute: bool) -> list[torch.Tensor]:
    """Return the losses of the tokens and every gradient."""
    model = copy.deepcopy(model)
    model.recompute = recompute
    found = losses(model(make_batch(LENGTHS)))
    found.loss.backward()
    return [found.token_losses, *(p.grad for p in model.parameters() if p.grad is not None)]


def test_losses_and_gradients_are_the_same(model):
    plain, again = step(model, False), step(model, True)
    assert len(plain) > 20 and all(map(torch.equal, plain, again))


def kept_bytes(model: Model) -> int:
    """What autograd holds at the end of the forward pass, weights and batch aside."""
    pack, kept = make_batch(LENGTHS), dict[int, int]()

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = model(pack)
    ours = [*model.parameters(), *(t for t in vars(pack).values() if torch.is_tensor(t))]
    for tensor in ours:
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    assert result[0].requires_grad
    return sum(kept.values())


def test_what_is_kept_is_what_plan_says(model):
    model.recompute = True
    masked = len(make_batch(LENGTHS).labels)
    size = MicroBatchSize(LENGTHS, masked, len(LENGTHS) if model.config.type == "bert" else 0)
    whole = activation_bytes(model.config, VOCAB, size, False, "cpu")
    kept, layer = recomputed_bytes(model.config, VOCAB, size, False, "cpu")
    assert kept == pytest.approx(kept_bytes(model), rel=0.05)
    assert kept + layer < 0.65 * whole


def test_plan_counts_it():
    pack = MicroBatchSize([512] * 32, 2400, 32)

    def activations(recompute: str) -> float:
        config = load_config("base", ["data=x", f"runtime.recompute={recompute}"])
        return memory_by_part(config, 30522, [pack], Sharding())["activations"]

    assert activations("true") < 0.3 * activations("false")


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_operations_are_those_that_torch_counts(config):
    """A second forward pass of three of four layers.

    torch does not count oneDNN's products, and the reference computes what a window hides.
    """
    if isinstance(config, ModernBertConfig):
        config = dataclasses.replace(config, local_attention=2 * max(FULL))
    model, counted = build_model(config, VOCAB, "reference").train(), list[int]()
    for recompute in (False, True):
        model.recompute = recompute
        with FlopCounterMode(display=False) as counter:
            losses(model(make_batch(FULL))).loss.backward()
        counted.append(counter.get_total_flops())
    masked, pairs = len(make_batch(FULL).labels), len(FULL)
    sizes = model.config, VOCAB, FULL, masked, pairs if model.config.type == "bert" else 0
    plain, again = executed_flops(*sizes), executed_flops(*sizes, recompute=True)
    assert plain == counted[0]
    # torch stops before a layer's last product, if nothing needs its result.
    assert again == pytest.approx(counted[1], rel=0.03)


@pytest.mark.parametrize("model", typical(CONFIGS, "bert"), indirect=True)
def test_children_compute_again_too(model):
    model.recompute = True
    alone = [losses(model(make_batch(LENGTHS, seed))).token_losses for seed in (0, 1)]
    parallel = ParallelModel(model, 2)
    try:
        parallel.wait_until_ready()
        found = parallel([make_batch(LENGTHS, seed) for seed in (0, 1)])
        torch.stack([losses(outputs).loss for outputs in found]).sum().backward()
    finally:
        parallel.close()
    assert all(map(torch.equal, [losses(x).token_losses for x in found], alone))
    assert all(p.grad is not None for p in model.layers.parameters())


@pytest.mark.parametrize("stage", [slow(0), 1, slow(2), 3])
def test_every_stage_makes_the_same_steps(small_dataset, stage):
    packs = [Batches(small_dataset, CONFIG).step(i) for i in range(3)]

    def run(recompute: bool):
        config = dataclasses.replace(CONFIG, runtime=RuntimeConfig(recompute=recompute))
        with engine(small_dataset, stage, config) as built:
            built.model.recompute = recompute
            results = [built.step(pack, lr=1e-2) for pack in packs]
            return results, state_of(built)["weight"]

    (plain, weights), (again, same) = run(False), run(True)
    assert plain == again
    assert all(torch.equal(weights[name], same[name]) for name in weights)


def test_it_does_not_go_with_cuda_graphs():
    with pytest.raises(InputError, match=r"runtime.recompute = true does not go with runtime.cuda"):
        load_config("mini", ["data=x", "runtime.recompute=true", "runtime.cuda_graphs=true"])
