"""A step is the step of the whole batch, and checkpoints load as saved, at every ZeRO stage."""

from __future__ import annotations

import dataclasses
import math
import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastbert.cluster.group import join
from fastbert.config import BatchConfig, BertConfig, OptimizerConfig, RunConfig
from fastbert.data.batches import Batches, heldout_batches
from fastbert.data.dataset import TokenDataset
from fastbert.models.build import build_model
from fastbert.models.heads import losses
from fastbert.training.ds_config import DeepSpeedSettings
from fastbert.training.engine import Engine, NotFinite, deepspeed
from tests.tiers import slow, typical
from tests.toy_ranks import listening

ROOT = Path(__file__).parents[1]
STAGES = typical([0, 1, 2, 3], 0, 1, 3)
MODEL = BertConfig(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=48,
    max_position_embeddings=64,
    initializer_range=0.1,
)
# Two packs per step, so that sums over packs are tested.
CONFIG = RunConfig(
    data="dataset",
    model=MODEL,
    batch=BatchConfig(sequences=8, max_length=64, micro_batch_tokens=200),
    optimizer=OptimizerConfig(lr=1e-2, betas=(0.9, 0.98)),
)


def settings(stage: int) -> DeepSpeedSettings:
    return DeepSpeedSettings(
        "ds_config.json",
        {
            "zero_optimization": {
                "stage": stage,
                "reduce_bucket_size": 20_000,
                "allgather_bucket_size": 20_000,
            }
        },
    )


def new_model(dataset: TokenDataset, config: RunConfig = CONFIG) -> Any:
    torch.manual_seed(0)
    return build_model(config.model, dataset.vocab_size)


@contextmanager
def engine(
    dataset: TokenDataset,
    stage: int,
    config: RunConfig = CONFIG,
    precision: str = "fp32",
    state: Any = None,
    step: int = 0,
) -> Iterator[Engine]:
    with (
        join(60.0) as group,
        Engine(
            new_model(dataset, config), config, settings(stage), precision, group, state, step
        ) as built,
    ):
        yield built


def state_of(built: Engine) -> dict[str, dict[str, torch.Tensor]]:
    state: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in built.tensors():
        slot, _, name = key.partition("/")
        state.setdefault(slot, {})[name] = tensor.clone()
    return state


def sgd(**changes: Any) -> RunConfig:
    """Plain gradient descent with rate 1: the step is the gradient."""
    optimizer = OptimizerConfig(
        name="sgd", lr=1.0, momentum=0.0, weight_decay=0.0, **{"max_grad_norm": 0.0, **changes}
    )
    return dataclasses.replace(CONFIG, optimizer=optimizer)


@pytest.fixture(scope="module")
def packs(small_dataset):
    batches = Batches(small_dataset, CONFIG)
    return [batches.step(i) for i in range(5)]


@pytest.fixture(scope="module")
def gradient(small_dataset, packs):
    """The gradient of the first step's whole loss by plain torch, with dropout."""
    model = new_model(small_dataset).train()
    found = [losses(model(pack)) for pack in packs[0]]
    sum(f.loss for f in found).backward()
    return {name: p.grad for name, p in model.named_parameters()}, found


@pytest.mark.parametrize("stage", STAGES)
def test_a_step_is_the_gradient_of_the_whole_batch(small_dataset, packs, gradient, stage):
    assert len(packs[0]) > 1
    expected, found = gradient
    with engine(small_dataset, stage, sgd()) as built:
        before = state_of(built)["weight"]
        result = built.step(packs[0], lr=1.0)
        after = state_of(built)["weight"]
    for name, grad in expected.items():
        torch.testing.assert_close(
            before[name] - after[name],
            grad,
            rtol=1e-3,
            atol=1e-6,
            msg=lambda m, name=name: f"{name}: {m}",
        )
    assert result.loss == pytest.approx(float(sum(f.loss.detach() for f in found)), rel=1e-6)
    assert result.grad_norm == pytest.approx(
        math.sqrt(sum(float(g.double().square().sum()) for g in expected.values())), rel=1e-4
    )


@pytest.mark.parametrize("stage", [0, slow(3)])
def test_so_is_a_step_on_the_triton_kernels(small_dataset, stage, monkeypatch):
    """A layer is one function there (fused_layer.py).

    It reads its own parameters and those of the modules inside it.
    """
    config = dataclasses.replace(
        sgd(), batch=BatchConfig(sequences=1, max_length=16, micro_batch_tokens=40)
    )
    (pack,) = Batches(small_dataset, config).step(0)
    model = new_model(small_dataset).train()
    losses(model(pack)).loss.backward()
    monkeypatch.setattr(build_model, "__defaults__", ("triton", "cpu", True))
    with engine(small_dataset, stage, config) as built:
        assert built.model.impl == "triton"
        before = state_of(built)["weight"]
        built.step([pack], lr=1.0)
        if stage == 3:
            # By then DeepSpeed prefetches parameters in the order that it has recorded.
            built.step([pack], lr=0.0)
        after = state_of(built)["weight"]
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            before[name] - after[name],
            parameter.grad,
            rtol=1e-3,
            atol=2e-6,
            msg=lambda m, name=name: f"{name}: {m}",
        )


def test_what_a_step_reports(small_dataset, packs):
    """The bias makes the most frequent masked token the prediction, so that some are correct."""
    common = torch.cat([pack.labels for pack in packs[0]]).mode().values
    model = new_model(small_dataset).train()
    model.mlm_head.vocabulary_bias.data[common] = 10.0
    with torch.no_grad():
        found = [losses(model(pack)) for pack in packs[0]]
    with engine(small_dataset, 0) as built:
        built.model.mlm_head.vocabulary_bias.data[common] = 10.0
        result = built.step(packs[0], lr=0.0)
    masked, pairs = packs[0][0].masked_total, packs[0][0].pairs_total
    assert (result.tokens, result.sequences) == (
        sum(p.tokens for p in packs[0]),
        CONFIG.batch.sequences,
    )
    assert result.masked == masked == sum(len(p.labels) for p in packs[0])
    assert result.loss_mlm == pytest.approx(
        float(torch.cat([f.token_losses for f in found]).sum()) / masked, rel=1e-5
    )
    assert result.loss_nsp == pytest.approx(
        float(torch.cat([f.pair_losses for f in found]).sum()) / pairs, rel=1e-5
    )
    correct = int(torch.cat([f.token_correct for f in found]).sum())
    assert result.accuracy_mlm == correct / masked > 0
    assert result.accuracy_nsp == int(torch.cat([f.pair_correct for f in found]).sum()) / pairs


class Operations(TorchDispatchMode):
    """Count called operations by name."""

    def __init__(self):
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count[func.name()] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("stage", STAGES)
def test_a_step_does_not_wait_for_all_that_is_queued(small_dataset, packs, stage, monkeypatch):
    """Unless its throughput timer is off, DeepSpeed does wait from the third step on.

    It waits before each micro-batch and after the update.
    """
    waits: list[int] = []
    monkeypatch.setattr(
        deepspeed.accelerator.get_accelerator(), "synchronize", lambda *_: waits.append(1)
    )
    with engine(small_dataset, stage) as built:
        for pack in packs:
            built.step(pack, lr=1e-3)
        assert not waits


def test_gradients_are_not_searched_for_nan_one_by_one(small_dataset, packs, bf16):
    """The norm of all gradients is not finite if one of them is not."""
    with engine(small_dataset, 1, precision=bf16) as built, Operations() as seen:
        built.step(packs[0], lr=1e-3)
        parameters = len(list(built.model.parameters()))
    assert seen.count["aten::linalg_vector_norm"] >= parameters
    # DeepSpeed's search makes one for each; the MLM loss makes one for each slab.
    assert seen.count["aten::amax"] < parameters


def test_without_pairs_their_figures_are_none(small_dataset):
    config = dataclasses.replace(
        CONFIG, objective=dataclasses.replace(CONFIG.objective, kind="mlm")
    )
    with engine(small_dataset, 0, config) as built:
        result = built.step(Batches(small_dataset, config).step(0), lr=0.0)
        heldout = built.evaluate(
            heldout_batches(small_dataset, config, 8), small_dataset.special.mask
        )
    assert (
        result.loss_nsp is None and result.accuracy_nsp is None and result.loss == result.loss_mlm
    )
    assert (
        heldout.loss_nsp is None
        and heldout.accuracy_nsp is None
        and heldout.loss == heldout.loss_mlm
    )


@pytest.mark.parametrize("stage", [0, 1])
def test_clipping(small_dataset, packs, gradient, stage):
    clip = 0.05
    with engine(small_dataset, stage, sgd(max_grad_norm=clip)) as built:
        before = state_of(built)["weight"]
        result = built.step(packs[0], lr=1.0)
        after = state_of(built)["weight"]
    step = math.sqrt(sum(float((before[n] - after[n]).double().square().sum()) for n in before))
    assert result.grad_norm > 10 * clip  # reported before clipping
    assert step == pytest.approx(clip, rel=1e-3)


@pytest.fixture(scope="module")
def bf16(bf16_products) -> str:
    return "bf16"


@pytest.mark.parametrize("stage", STAGES)
def test_resuming_from_a_state_gives_the_same_to_the_last_digit(small_dataset, packs, stage):
    resume_from(small_dataset, packs, stage, "fp32")


@pytest.mark.parametrize("stage", [1, 3])
def test_resuming_in_bf16(small_dataset, packs, stage, bf16):
    """The state is still in fp32, which holds more than the working copies."""
    state = resume_from(small_dataset, packs, stage, bf16)
    assert not all(
        torch.equal(tensor, tensor.bfloat16().float()) for tensor in state["weight"].values()
    )


def resume_from(
    small_dataset, packs, stage: int, precision: str
) -> dict[str, dict[str, torch.Tensor]]:
    with engine(small_dataset, stage, precision=precision) as built:
        for i in range(3):
            built.step(packs[i], lr=1e-2)
        state = state_of(built)
        expected = [built.step(packs[i], lr=1e-2) for i in (3, 4)]
    assert set(state) == {"weight", "exp_avg", "exp_avg_sq"}
    assert all(t.dtype == torch.float32 for slot in state.values() for t in slot.values())
    with engine(small_dataset, stage, precision=precision, state=state, step=3) as built:
        assert [built.step(packs[i], lr=1e-2) for i in (3, 4)] == expected
    return state


@pytest.mark.parametrize(
    "optimizer, stage",
    typical(
        [("lamb", 0), *((name, stage) for name in ("adamw", "sgd") for stage in range(4))],
        ("lamb", 0),
        ("adamw", 0),
        ("adamw", 1),
        ("sgd", 3),
    ),
)
def test_a_state_from_before_the_first_step(small_dataset, packs, stage, optimizer):
    """This is the state where every step so far was skipped.

    Its moments are zero, and training from it is the same as training without a state.
    """
    config = dataclasses.replace(CONFIG, optimizer=OptimizerConfig(name=optimizer))
    with engine(small_dataset, stage, config) as built:
        state = state_of(built)
        expected = [built.step(packs[i], lr=1e-2) for i in (0, 1)]
    assert len(state) == (2 if optimizer == "sgd" else 3)
    assert all(state[slot].keys() == state["weight"].keys() for slot in state)
    assert all(
        not tensor.any()
        for slot, named in state.items()
        if slot != "weight"
        for tensor in named.values()
    )
    with engine(small_dataset, stage, config, state=state, step=0) as built:
        assert [built.step(packs[i], lr=1e-2) for i in (0, 1)] == expected


@pytest.mark.parametrize("optimizer", ["sgd", "lamb"])
def test_the_other_optimizers_resume_too(small_dataset, packs, optimizer):
    config = dataclasses.replace(CONFIG, optimizer=OptimizerConfig(name=optimizer))
    with engine(small_dataset, 0, config) as built:
        for i in range(3):
            built.step(packs[i], lr=1e-2)
        state = state_of(built)
        expected = built.step(packs[3], lr=1e-2)
    with engine(small_dataset, 0, config, state=state, step=3) as built:
        assert built.step(packs[3], lr=1e-2) == expected


@pytest.mark.parametrize("there", [1, 3])
def test_a_state_is_the_same_at_another_stage(small_dataset, packs, there):
    with engine(small_dataset, 0) as built:
        for i in range(3):
            built.step(packs[i], lr=1e-2)
        state = state_of(built)
        expected = [built.step(packs[i], lr=1e-2).loss for i in (3, 4)]
    with engine(small_dataset, there, state=state, step=3) as built:
        loaded = state_of(built)
        for slot, tensors in state.items():
            assert all(torch.equal(tensor, loaded[slot][name]) for name, tensor in tensors.items())
        assert [built.step(packs[i], lr=1e-2).loss for i in (3, 4)] == pytest.approx(
            expected, rel=1e-5
        )


def test_evaluation_is_without_dropout_and_changes_nothing(small_dataset, packs):
    heldout = heldout_batches(small_dataset, CONFIG, 24)
    with engine(small_dataset, 0) as built:
        before = state_of(built)["weight"] if built.step(packs[0], lr=1e-2) else {}
        found = built.evaluate(heldout, small_dataset.special.mask)
        assert built.evaluate(heldout, small_dataset.special.mask) == found
        assert all(torch.equal(t, state_of(built)["weight"][n]) for n, t in before.items())
        model = built.model.eval()
        with torch.no_grad():
            outputs = [losses(model(pack)) for pack in heldout]
        token_losses = torch.cat([o.token_losses for o in outputs]).double()
        shown = torch.cat(
            [p.input_ids[p.masked_positions] == small_dataset.special.mask for p in heldout]
        )
    assert 0.5 < float(shown.double().mean()) < 0.95
    assert found.loss_mlm == pytest.approx(float(token_losses.mean()), rel=1e-9)
    assert found.loss_mask_token == pytest.approx(float(token_losses[shown].mean()), rel=1e-9)
    assert found.loss_nsp == pytest.approx(
        float(torch.cat([o.pair_losses for o in outputs]).double().mean()), rel=1e-9
    )
    assert found.loss == found.loss_mlm + found.loss_nsp


@pytest.mark.parametrize("stage", STAGES)
def test_a_loss_that_is_not_finite_names_its_examples_and_changes_nothing(
    small_dataset, packs, stage
):
    """The embedding of the last positions is broken for a step; only the longest sequences use it.

    The next steps are the same as without the fault.
    """
    longest = max(pack.max_seqlen for pack in packs[1])
    bad_examples = [
        int(e)
        for pack in packs[1]
        for e, n in zip(pack.examples, pack.cu_seqlens.diff(), strict=True)
        if n == longest
    ]
    assert 0 < len(bad_examples) < CONFIG.batch.sequences
    with engine(small_dataset, stage) as built:
        built.step(packs[0], lr=1e-2)
        expected = built.step(packs[2], lr=1e-2)
    with engine(small_dataset, stage) as built:
        built.step(packs[0], lr=1e-2)
        before = state_of(built)
        with broken_position(built, longest - 1), pytest.raises(NotFinite) as trouble:
            built.step(packs[1], lr=1.0)
        assert sorted(trouble.value.examples) == sorted(bad_examples)
        assert str(trouble.value) == "the loss is not finite"
        after = state_of(built)
        for slot, tensors in before.items():
            assert all(torch.equal(tensor, after[slot][name]) for name, tensor in tensors.items())
        assert built.step(packs[2], lr=1e-2) == expected


@contextmanager
def broken_position(built: Engine, position: int) -> Iterator[None]:
    """Make one position's embedding NaN in the forward pass, in the stage's working copy.

    The master weights do not change.
    """
    module = built.model.embeddings

    def spoil(module: Any, inputs: Any) -> None:
        kept.append(module.position.data[position].clone())
        module.position.data[position] = math.nan

    def restore(module: Any, inputs: Any, output: Any) -> None:
        module.position.data[position] = kept.pop()

    kept: list[torch.Tensor] = []
    hooks = [
        module.register_forward_pre_hook(spoil),
        module.register_forward_hook(restore, prepend=True),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("stage", STAGES)
def test_a_gradient_that_is_not_finite_is_dropped_too(small_dataset, packs, stage):
    """The loss is finite, and its gradient overflows in the backward pass."""
    with engine(small_dataset, stage) as built:
        built.step(packs[0], lr=1e-2)
        before = state_of(built)
        poison = built.model.embeddings.norm_weight.register_hook(lambda grad: grad * math.inf)
        with pytest.raises(NotFinite, match="the norm of the gradient is not finite") as trouble:
            built.step(packs[1], lr=1e-2)
        poison.remove()
        assert trouble.value.examples == []
        after = state_of(built)
        assert all(
            torch.equal(tensor, after[slot][name])
            for slot, tensors in before.items()
            for name, tensor in tensors.items()
        )
        assert math.isfinite(built.step(packs[2], lr=1e-2).grad_norm)


@pytest.mark.parametrize("stage", [1, 3])
def test_so_it_is_where_the_optimizer_is_offloaded(small_dataset, packs, stage):
    """DeepSpeed keeps the memory of such gradients, so what was dropped must not be missing."""
    values = settings(stage).values
    values["zero_optimization"] |= {"offload_optimizer": {"device": "cpu"}}
    with (
        join(60.0) as group,
        Engine(
            new_model(small_dataset), CONFIG, DeepSpeedSettings("x", values), "fp32", group
        ) as built,
    ):
        built.step(packs[0], lr=1e-2)
        before = state_of(built)
        poison = built.model.embeddings.norm_weight.register_hook(lambda grad: grad * math.nan)
        with pytest.raises(NotFinite, match="the norm of the gradient is not finite"):
            built.step(packs[1], lr=1e-2)
        poison.remove()
        torch.testing.assert_close(state_of(built), before, rtol=0, atol=0)
        assert built.step(packs[2], lr=1e-2).grad_norm > 0
        assert all(
            not torch.equal(tensor, before["weight"][name])
            for name, tensor in state_of(built)["weight"].items()
        )


@pytest.mark.parametrize("stage", [1, 3])
def test_so_it_is_in_bf16(small_dataset, packs, stage, bf16):
    with engine(small_dataset, stage, precision=bf16) as built:
        built.step(packs[0], lr=1e-2)
        before = state_of(built)
        poison = built.model.embeddings.norm_weight.register_hook(lambda grad: grad * math.inf)
        with pytest.raises(NotFinite, match="the norm of the gradient is not finite"):
            built.step(packs[1], lr=1e-2)
        poison.remove()
        after = state_of(built)
        assert all(
            torch.equal(tensor, after[slot][name])
            for slot, tensors in before.items()
            for name, tensor in tensors.items()
        )
        assert math.isfinite(built.step(packs[2], lr=1e-2).grad_norm)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_single_process_listens_to_nobody_outside(small_dataset):
    with engine(small_dataset, 0):
        sockets = {
            os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()
        }
        rows = [
            line.split()
            for name in ("tcp", "tcp6")
            for line in Path(f"/proc/self/net/{name}").read_text().splitlines()[1:]
        ]
        listening = [row[1] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in sockets]
    loopback = ("0100007F:", "00000000000000000000000001000000:")  # 127.0.0.1, ::1
    assert all(address.startswith(loopback) for address in listening)


def test_a_process_listens_on_two_ports_of_this_machine_alone(small_dataset, packs):
    """SECURITY.md says so. gloo opens one for our process group, and one for DeepSpeed's."""
    before = listening(os.getpid())
    with engine(small_dataset, 1) as built:
        built.step(packs[0], 1e-2)
        opened = listening(os.getpid()) - before
    assert [address for _, address, _ in opened] == ["127.0.0.1", "127.0.0.1"]
