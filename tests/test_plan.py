"""The estimates against real models, torch's FLOP counter and published figures."""

from __future__ import annotations

import importlib
import json
import math
import re
from contextlib import nullcontext
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastbert.config import BertConfig, ModelConfig, ModernBertConfig, OptimizerConfig, RunConfig
from fastbert.data.batches import Batches
from fastbert.data.manifest import SpecialIds
from fastbert.data.packing import PackedBatch, pack_texts
from fastbert.errors import InputError
from fastbert.models.bert import BertForPreTraining
from fastbert.models.build import Model, build_model
from fastbert.planning import activations, memory
from fastbert.planning.activations import MicroBatchSize, activation_bytes
from fastbert.planning.flops import (
    executed_flops,
    muon_flops,
    training_flops,
    visible_pairs,
)
from fastbert.planning.memory import Sharding, memory_by_part
from fastbert.planning.parameters import count_hidden, count_parameters
from fastbert.planning.plan import (
    EFFICIENCY,
    GPUS,
    Device,
    Hardware,
    Plan,
    communication_per_step,
    compute_seconds,
    describe,
    plan,
)
from fastbert.recipe import load_config, parse_config
from fastbert.training.muon import Muon, is_hidden
from fastbert_kernels.checker.sanitizer import sanitize
from tests.modern_bert import CONFIGS
from tests.tiers import slow

MODEL = BertConfig(
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=48,
    max_position_embeddings=40,
)
VOCABULARY = 90
GB = 1e9


def recipe(text: str = "", preset: str = "base") -> RunConfig:
    return parse_config(
        f'data = "no dataset here"\n{text}\n[model]\npreset = "{preset}"\n', "test.toml"
    )


def batch(lengths: list[int], masked_each: int) -> PackedBatch:
    """Sequences of these lengths, all in pairs; the first `masked_each` of each are masked."""
    pack = pack_texts([[5] * (n - 2) for n in lengths], None, SpecialIds(0, 1, 2, 3, 4))
    positions = (pack.cu_seqlens[:-1, None].long() + torch.arange(1, masked_each + 1)).flatten()
    zeros = torch.zeros(len(lengths), dtype=torch.int64)
    totals = {"masked_total": len(positions), "pairs_total": len(lengths)}
    return replace(
        pack,
        masked_positions=positions,
        labels=torch.zeros_like(positions),
        next_sentence_labels=zeros,
        **totals,
    )


def model(config: ModelConfig) -> Model:
    return build_model(config, VOCABULARY, kernels="reference").eval()


@pytest.mark.parametrize(
    "config", [recipe(preset=preset).model for preset in ("tiny", "base")] + [*CONFIGS.values()]
)
def test_parameters_are_those_of_the_model(config):
    with torch.device("meta"):
        real = build_model(config, 30522)
    named = dict(real.named_parameters())
    assert count_parameters(config, 30522) == sum(p.numel() for p in named.values())
    assert count_hidden(config) == sum(p.numel() for n, p in named.items() if is_hidden(n, p.shape))


def test_bert_base_has_110_million():
    # This is the size of transformers' BertForPreTraining.
    assert count_parameters(recipe().model, 30522) == 110_106_428


# Windows wider than the sequences: the reference also multiplies where a window hides a key.
WIDE = replace(CONFIGS["modernbert"], local_attention=128)


@pytest.mark.parametrize("config", [MODEL, WIDE])
def test_useful_flops_are_what_torch_counts(config):
    lengths, masked = [40, 17, 9], 3
    pack, pairs = batch(lengths, masked), 3 if config is MODEL else 0
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        m = model(config)
        last = m.hidden_states(pack)[-1]
        m.token_logits(last[pack.masked_positions])
        if isinstance(m, BertForPreTraining):
            m.pair_logits(last[pack.cu_seqlens[:-1].long()])
    found = training_flops(config, VOCABULARY, lengths, masked * 3, pairs)
    assert found == 3 * counter.get_total_flops()


@pytest.mark.parametrize("config", [MODEL, WIDE])
def test_executed_flops_are_what_torch_counts_in_a_step(config):
    # With one length the masked tokens are distributed as the formula assumes.
    lengths, masked = ([24] * 4, 5)
    pack, pairs = batch(lengths, masked), 4 if config is MODEL else 0
    with FlopCounterMode(display=False) as counter:
        mlm, nsp, *_ = model(config)(pack)
        (mlm + nsp).backward()
    executed = executed_flops(config, VOCABULARY, lengths, masked * 4, pairs)
    assert executed == counter.get_total_flops()
    assert executed < training_flops(config, VOCABULARY, lengths, masked * 4, pairs)


@pytest.mark.parametrize(("n", "window"), [(1, 0), (5, 8), (9, 8), (10, 8), (40, 8), (7, 0)])
def test_pairs_within_a_window_are_those_of_its_mask(n, window):
    distance = (torch.arange(n)[:, None] - torch.arange(n)).abs()
    assert visible_pairs(n, window) == (distance <= window).sum()
    assert visible_pairs(n, None) == n * n


SHORT = MicroBatchSize([100] * 10, 150, 10)
STATES = ("weights", "gradients", "master weights", "moments")


def test_memory_by_stage_is_that_of_the_zero_paper():
    """Figure 1 of Rajbhandari et al., 2020, for 7.5 B parameters on 64 GPUs, per parameter.

    The figures are 120, 31.4, 16.6 and 1.9 GB. Stage 3 does not include the weights that DeepSpeed
    keeps gathered at BERT's sizes. There are many micro-batches, so that gradients exist at all
    times.
    """
    config = recipe()
    P = count_parameters(config.model, 30522)
    for stage, published in enumerate([120, 31.4, 16.6, 1.9]):
        sharding = Sharding(stage, 64, {"stage3_max_live_parameters": 0})
        parts = memory_by_part(config, 30522, [SHORT] * 4, sharding)
        states = sum(parts[name] for name in STATES)
        if stage == 0:
            # The paper's table has master weights here. torch's own optimizer, which runs at
            # stage 0, has none.
            states += 4 * P
        assert states / P * 7.5 == pytest.approx(published, abs=0.06)


def test_stage_3_holds_all_weights_where_it_keeps_them_gathered():
    P = count_parameters(recipe().model, 30522)
    kept, dropped = (
        memory_by_part(recipe(), 30522, [SHORT], Sharding(3, 8, zero))
        for zero in ({}, {"stage3_max_reuse_distance": 0})
    )
    assert (kept["weights"], kept["gathered weights"], dropped["gathered weights"]) == (
        2 * P / 8,
        2 * P,
        0,
    )
    assert memory_by_part(recipe(), 30522, [SHORT], Sharding(3))["gathered weights"] == 0


def test_fp32_has_no_masters_at_stage_0_and_sgd_one_moment():
    def states(config: RunConfig, stage: int) -> list[float]:
        parts = memory_by_part(config, 30522, [SHORT] * 2, Sharding(stage), bf16=False)
        return [parts[name] for name in STATES]

    P = count_parameters(recipe().model, 30522)
    assert states(recipe(), 0) == [4 * P, 4 * P, 0, 8 * P]
    # A flat copy of the weights, which the optimizer updates.
    assert states(recipe(), 1) == [4 * P, 4 * P, 4 * P, 8 * P]
    sgd = parse_config('data = "x"\n[optimizer]\nname = "sgd"\n', "x")
    assert states(sgd, 0)[3] == 4 * P
    assert states(replace(sgd, optimizer=replace(sgd.optimizer, momentum=0.0)), 0)[3] == 0


def test_muon_has_one_moment_for_the_matrices_of_the_layers():
    muon = recipe('[optimizer]\nname = "muon"')
    P, hidden = count_parameters(muon.model, 30522), 12 * (4 * 768 * 768 + 2 * 768 * 3072)
    assert count_hidden(muon.model) == hidden
    for stage, gpus in ((0, 8), (1, 1), (1, 8)):
        parts = memory_by_part(muon, 30522, [SHORT], Sharding(stage, gpus))
        assert parts["moments"] == pytest.approx(4 * (2 * P - hidden) / (gpus if stage else 1))


@pytest.mark.parametrize("config", [MODEL, CONFIGS["biases"]])
@pytest.mark.parametrize("bf16", [True, False])
def test_operations_of_muon_are_those_that_torch_counts(bf16, config):
    named = build_model(config, VOCABULARY).named_parameters()
    hidden = {name: p for name, p in named if is_hidden(name, p.shape)}
    dtype = torch.bfloat16 if bf16 else torch.float32
    optimizer = Muon(hidden, [], OptimizerConfig(name="muon"), dtype)
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    with FlopCounterMode(display=False) as counter:
        optimizer.step()
    assert counter.get_total_flops() == muon_flops(config, bf16)


def test_muon_gathers_its_updates_at_stages_1_and_2():
    for stage, updates in ((0, 0), (1, 5), (2, 5)):
        plain, muon = (communication_per_step(100, Sharding(stage, 4), 1, 2, n) for n in (0, 5))
        more = updates * 2 * 3 / 4
        assert muon == (plain[0] + more, plain[1])


def kept_bytes(model: Model, pack: PackedBatch) -> int:
    """Return the bytes that autograd keeps of a forward pass, without weights and batch."""
    kept = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = model(pack)
    not_counted = [
        *model.parameters(),
        *(t for t in vars(pack).values() if isinstance(t, torch.Tensor)),
    ]
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    for t in not_counted:
        sizes.pop(t.untyped_storage().data_ptr(), None)
    assert result[0].requires_grad
    return sum(sizes.values())


ON_CPU = [
    ("cpu", longest, dtype, dropout)
    for longest in (128, 300)
    for dtype in (torch.float32, torch.bfloat16)
    for dropout in (0.0, 0.1)
]
# Interpreted, so few: where sequences fit one tile, and where they do not.
INTERPRETED = [
    ("triton", 32, torch.bfloat16, 0.1),
    ("triton", 32, torch.float32, 0.0),
    ("triton", 140, torch.bfloat16, 0.1),
]


@pytest.mark.parametrize(("kernels", "longest", "dtype", "dropout"), [*ON_CPU, *INTERPRETED])
def test_activations_are_what_autograd_keeps(kernels, longest, dtype, dropout):
    config = replace(
        MODEL,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=512,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    lengths = [longest, longest - 3, 2 * longest // 3, 12] if kernels == "cpu" else [longest, 12]
    pack = batch(lengths, 4)
    model = BertForPreTraining(config, VOCABULARY, kernels).to(dtype).train()
    predicted = activation_bytes(
        config,
        VOCABULARY,
        MicroBatchSize(lengths, 4 * len(lengths), len(lengths)),
        dtype == torch.bfloat16,
        kernels,
    )
    with sanitize() if kernels == "triton" else nullcontext():  # which computes bf16 as a GPU does
        kept = kept_bytes(model, pack)
    assert predicted == pytest.approx(kept, rel=0.02)


@pytest.mark.parametrize(
    ("kernels", "longest", "dtype", "dropout"), [*ON_CPU, *(slow(*case) for case in INTERPRETED)]
)
def test_activations_of_modernbert_are_what_autograd_keeps(kernels, longest, dtype, dropout):
    config = ModernBertConfig(
        hidden_size=32,
        num_hidden_layers=4,  # a global one, two local ones, and a global one that is cut
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=512,
        local_attention=64,
        embedding_dropout=dropout,
        attention_dropout=dropout,
        mlp_dropout=dropout,
    )
    lengths = [longest, longest - 3, 2 * longest // 3, 12] if kernels == "cpu" else [longest, 12]
    pack = batch(lengths, 4)
    model = build_model(config, VOCABULARY, kernels).to(dtype).train()
    size = MicroBatchSize(lengths, 4 * len(lengths), 0)
    predicted = activation_bytes(config, VOCABULARY, size, dtype == torch.bfloat16, kernels)
    with sanitize() if kernels == "triton" else nullcontext():  # which computes bf16 as a GPU does
        kept = kept_bytes(model, pack)
    assert predicted == pytest.approx(kept, rel=0.02)


def test_constants_are_those_of_the_kernels():
    loss = importlib.import_module("fastbert_kernels.mlm_loss.cpu")
    triton = importlib.import_module("fastbert_kernels.mlm_loss.kernel")
    assert memory.CPU_SLAB == loss._SLAB
    windowed = importlib.import_module("fastbert_kernels.attention.windowed_cpu")
    assert activations.CPU_BLOCK == windowed._BLOCK
    assert (memory.TRITON_SLAB, memory.TRITON_WORDS) == (triton._SLAB_NUMBERS, triton._SLAB_WORDS)


def test_activations_grow_with_the_square_of_the_length_on_a_cpu_alone():
    def each(n: int, kernels: str) -> float:
        return activation_bytes(
            recipe().model, 30522, MicroBatchSize([n] * (4096 // n), 0, 0), True, kernels
        )

    assert each(512, "triton") < 1.05 * each(64, "triton")
    assert each(512, "cpu") > 1.5 * each(64, "cpu")


def test_one_gpu_sends_nothing():
    for stage in range(4):
        assert communication_per_step(1000, Sharding(stage), 3, 2) == (0, 0)


def test_a_plan_adds_up():
    p = plan(
        recipe("[stop]\nsteps = 1000\n"),
        "test.toml",
        Hardware("H100", 8, efficiency=0.5, price=2.5),
        stage=1,
        mean_length=100,
    )
    assert p.tokens_per_step == 256 * 100
    assert p.memory_total == sum(p.memory.values()) and p.memory_of_gpu == 80 * GB
    # A little less than the useful work, because the last of 12 layers computes only the rows of a
    # loss.
    assert 0.9 < p.products_s / (p.flops_per_token * p.tokens_per_step / 8 / (989e12 * 0.5)) < 1
    assert p.step_s == max(p.products_s + p.traffic_s, p.launch_s) + p.communication_s
    assert p.steps == 1000 and p.total_s == pytest.approx(1000 * p.step_s)
    assert p.cost == pytest.approx(1000 * p.step_s / 3600 * 8 * 2.5)
    assert p.tokens_per_s == pytest.approx(25600 / p.step_s)
    assert p.mfu == pytest.approx(p.tokens_per_s * p.flops_per_token / (8 * 989e12))
    assert any("50% of 989 TFLOP/s" in line for line in p.assumptions) and any(
        "30,522" in line for line in p.assumptions
    )


def test_stage_3_hides_its_communication():
    p = plan(recipe(), "test.toml", Hardware("l4", 8), stage=3)
    assert p.step_s == max(p.products_s + p.traffic_s, p.launch_s, p.communication_s)


def test_a_price_is_the_listed_one_unless_given_or_unknown():
    prices = [
        plan(recipe("[stop]\nsteps = 10\n"), "x", Hardware(gpu, 8, price=given), stage=1)
        for gpu, given in (("h100", None), ("h100", 1.0), ("l4", None))
    ]
    assert [p.price_per_gpu_hour for p in prices] == [GPUS["h100"].price, 1.0, None]
    assert prices[2].cost is None and not any("dollars" in line for line in prices[2].assumptions)


def test_twice_the_machine_takes_half_the_time():
    """Of a wider model, matrix products take a larger share of the time."""
    device = Device(100e12, 10e12, 80 * GB, 1e12, 1e11, 1e11)
    fast = replace(device, bf16=200e12, bandwidth=2e12)
    narrow, wide = recipe(preset="small"), recipe(preset="large")
    products, traffic, _ = compute_seconds(narrow, 30522, [SHORT], device, Sharding())
    halves = compute_seconds(narrow, 30522, [SHORT], fast, Sharding())[:2]
    assert halves == (products / 2, traffic / 2)
    longer, *_ = compute_seconds(
        narrow, 30522, [SHORT], device, Sharding(), efficiency=EFFICIENCY / 2
    )
    assert longer == 2 * products
    more_products, more_traffic, _ = compute_seconds(wide, 30522, [SHORT], device, Sharding())
    assert more_products / more_traffic > products / traffic


def test_flops_per_token_of_bert_base_are_six_times_its_matrices():
    """Kaplan et al.: 6 FLOPs per token and layer parameter; attention and head add a little."""
    p = plan(recipe(), "test.toml", Hardware("a100"), stage=1, mean_length=128)
    layers = 12 * (4 * 768**2 + 2 * 768 * 3072)
    assert 1 < p.flops_per_token / (6 * layers) < 1.3


@pytest.mark.parametrize(
    ("text", "gpus", "gpu", "stage", "limit"),
    [
        (
            "[batch]\nmicro_batch_tokens = 786431\nsequences = 10000\n",
            1,
            "l4",
            1,
            "memory: .* activations: lower batch.micro_batch_tokens to ",
        ),
        ("[batch]\nsequences = 256\n", 64, "l4", 1, "communication: "),
        ("[batch]\nsequences = 8\n", 1, "h100", 1, "too little work: .* fewer GPUs"),
        ("[batch]\nsequences = 4096\n", 1, "h100", 1, "computation"),
        (
            "[batch]\nsequences = 4096\n[model]\nhidden_size = 128\nnum_attention_heads = 2\n"
            "intermediate_size = 512\n",
            1,
            "l4",
            1,
            "memory bandwidth",
        ),
    ],
)
def test_what_limits_a_run(text, gpus, gpu, stage, limit):
    config = parse_config(f'data = "no dataset here"\n{text}', "test.toml")
    assert re.match(limit, plan(config, "test.toml", Hardware(gpu, gpus), stage=stage).limit)


def test_the_micro_batch_that_is_advised_fits():
    def at(tokens: int) -> Plan:
        return plan(
            recipe(f"[batch]\nsequences = 4096\nmicro_batch_tokens = {tokens}\n"),
            "x",
            Hardware("l4"),
            stage=1,
            mean_length=128,
        )

    found = re.search(r"micro_batch_tokens to ([\d,]+) or below", at(400_000).limit)
    advised = int(found[1].replace(",", "")) if found else 0
    assert at(advised).memory_total <= at(advised).memory_of_gpu < at(2 * advised).memory_total


@pytest.mark.parametrize(
    ("tokens", "more", "advised"),
    [
        (100_000, "", True),
        (100_000, "recompute = true\n", False),
        (100_000, "cuda_graphs = true\n", False),  # the two do not go together
        (400_000, "", False),
    ],
)
def test_recomputing_is_advised_where_it_makes_the_run_fit(tokens, more, advised):
    def at(more: str) -> Plan:
        text = f"[batch]\nsequences = 50000\nmicro_batch_tokens = {tokens}\n[runtime]\n{more}"
        return plan(recipe(text), "x", Hardware("l4"), stage=1, mean_length=128)

    p = at(more)
    assert ("runtime.recompute = true" in p.limit) == advised
    if advised:
        assert at("recompute = true\n").memory_total <= p.memory_of_gpu < p.memory_total


def test_the_end_of_the_run_is_the_first_condition_reached():
    def steps(stop: str, over: str = "steps") -> int | None:
        config = recipe(f'[schedule]\nover = "{over}"\n[stop]\n{stop}\n')
        return plan(config, "test.toml", Hardware("h100"), stage=0, mean_length=100).steps

    assert steps("steps = 500\ntokens = 2560000") == 100
    assert steps("tokens = 2560001", "tokens") == 101
    assert steps("steps = 50\ntokens = 2560000") == 50
    assert steps("epochs = 3") is None  # the length of an epoch is unknown without the dataset
    assert (steps("seconds = 100", "seconds") or 0) > 1


@pytest.mark.parametrize(
    ("preset", "gpu", "tokens", "fits"), [("base", "h100", 8192, 1), ("large", "l4", 32768, 4)]
)
def test_the_gpus_that_pay_cost_at_most_twice_the_least_for_a_token(preset, gpu, tokens, fits):
    """By a plan for each number. The large model does not fit on two of the smaller GPUs."""
    text = f"[batch]\nsequences = 512\nmicro_batch_tokens = {tokens}\nmax_length = 512\n"
    config = recipe(text, preset)
    plans = {
        n: plan(config, "test.toml", Hardware(gpu, n), stage=1, mean_length=400)
        for n in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
    }
    cost = {n: n * p.step_s for n, p in plans.items() if p.memory_total <= p.memory_of_gpu}
    assert min(cost) == fits
    assert plans[8].relative_cost == pytest.approx(
        {n: found / min(cost.values()) for n, found in cost.items()}
    )
    most = max(n for n, found in cost.items() if found <= 2 * min(cost.values()))
    assert 8 < most < 512
    assert re.fullmatch(
        rf"up to {most}, where a token costs 1\.\d times as much as on \d; "
        rf"on {2 * most} a token costs [2-9]\.\d times as much",
        dict(describe(plans[8]))["GPUs that pay"],
    )


def test_a_batch_that_all_gpus_share_well_and_one_that_none_can_share():
    config = recipe(
        "[batch]\nsequences = 8\nmicro_batch_tokens = 4096\nmax_length = 512\n", "large"
    )
    shown = dict(describe(plan(config, "test.toml", Hardware("l4"), stage=3, mean_length=512)))
    assert shown["GPUs that pay"].endswith("; more would need more batch.sequences")
    config = recipe("[batch]\nsequences = 8\nmicro_batch_tokens = 409600\nmax_length = 512\n")
    tiny = replace(GPUS["l4"], memory=1e9)
    none = plan(config, "test.toml", Hardware("l4", device=tiny), stage=0, mean_length=512)
    assert none.relative_cost == {} and "GPUs that pay" not in dict(describe(none))


def test_the_tokens_of_the_run_beside_those_of_the_dataset(small_dataset):
    """Ten times the examples of an epoch are ten epochs."""
    text = "[stop]\nepochs = 10\n[batch]\nsequences = 8\nmax_length = 64\n"
    config = replace(recipe(text), data=str(small_dataset.path))
    p = plan(config, "test.toml", Hardware("h100"), stage=0)
    assert p.epochs is not None and 10 <= p.epochs < 10.1 and p.steps is not None
    assert p.dataset_tokens == small_dataset.counts("train").tokens
    seen, there = (
        f"{n / 1e6:,.1f} M" if n >= 1e6 else f"{n:,.0f}"
        for n in (p.steps * p.tokens_per_step, p.dataset_tokens)
    )
    shown = f"{seen} tokens in the run, {there} in the dataset: 10 epochs"
    assert dict(describe(p))["text"] == shown
    away = plan(recipe("[stop]\nsteps = 1000\n"), "x", Hardware("h100"), stage=0, mean_length=100)
    assert away.epochs is None and dict(describe(away))["text"] == "25.6 M tokens in the run"


@pytest.mark.parametrize(("epochs", "refused"), [(9, True), (0.5, False)])
def test_a_plan_says_that_a_source_would_be_used_too_often(two_sources, epochs, refused):
    """What training refuses, in its words."""
    sources = ", ".join(f'{{path = "{dataset.path}", epochs = 2}}' for dataset in two_sources)
    config = parse_config(
        f"data = [{sources}]\nweights = [1, 1]\n[stop]\nepochs = {epochs}\n"
        "[batch]\nsequences = 8\n",
        "test.toml",
    )
    limit = plan(config, "test.toml", Hardware("h100"), stage=1).limit
    if not refused:
        Batches(two_sources, config)
        assert "epochs" not in limit
        return
    with pytest.raises(InputError) as error:
        Batches(two_sources, config)
    assert limit == str(error.value) and "epochs, and it may be used for epochs = 2" in limit


def test_the_stage_comes_from_the_deepspeed_file(tmp_path):
    (tmp_path / "ds.json").write_text(
        json.dumps({"zero_optimization": {"stage": 2, "reduce_bucket_size": 1000}})
    )
    config = recipe(f'[runtime]\ndeepspeed = "{tmp_path / "ds.json"}"\n')
    p = plan(config, "test.toml", Hardware("h100", 8))
    assert p.zero_stage == 2
    assert plan(config, "test.toml", Hardware("h100", 8), stage=3).zero_stage == 3
    assert p.memory["buckets"] == 2 * 1000
    # These are the buckets of the packaged ds_config.json.
    packaged = plan(recipe(), "test.toml", Hardware("h100", 8), stage=2)
    assert packaged.memory["buckets"] == 2 * 16_000_000


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"gpu": "h1000"}, "--gpu h1000: unknown; did you mean h100.* known: a100, "),
        ({"gpu": "tpu"}, "--gpu tpu: unknown; .*known: a100, "),
        ({"gpus": 0}, "--gpus 0: must be 1 or more"),
        ({"gpus": 257}, "--gpus 257: the batch.sequences = 256 of test.toml .* multiple of 257"),
        (
            {"gpus": 2, "gpu": "cpu", "device": Device(1, 1, 1, 1, 1, 1)},
            "--gpus 2: .* this machine alone",
        ),
        ({"efficiency": 1.5}, "--efficiency 1.5"),
        ({"efficiency": math.nan}, "--efficiency nan"),
        ({"price": -1.0}, "--price -1.0"),
        ({"price": math.inf}, "--price inf"),
        ({"price": math.nan}, "--price nan"),
        ({"mean_length": 129.0}, "--mean-length 129: is above the batch.max_length = 128"),
        ({"mean_length": math.inf}, "--mean-length inf: is above"),
        ({"stage": 4}, "--stage 4"),
        ({"stage": 1, "optimizer": "lamb"}, '--stage 1 does not go with optimizer.name = "lamb"'),
        ({"stage": 3, "optimizer": "muon"}, "--stage 3 does not go .* set it to 0, 1, 2 or auto"),
        ({"stage": None}, "nowhere.json"),
    ],
)
def test_wrong_arguments(arguments, words):
    optimizer = arguments.pop("optimizer", "adamw")
    of_hardware = {field.name for field in fields(Hardware)} & set(arguments)
    hardware = {"gpu": "h100", **{name: arguments.pop(name) for name in of_hardware}}
    config = recipe(
        f'[optimizer]\nname = "{optimizer}"\n'
        + '[runtime]\ndeepspeed = "nowhere.json"\n' * (arguments == {"stage": None})
    )
    with pytest.raises(InputError, match=words):
        plan(config, "test.toml", Hardware(**hardware), **{"stage": 1, **arguments})


def test_a_batch_too_large_to_plan():
    with pytest.raises(InputError, match=r"test.toml: batch.sequences = 1,000,000,000: .*131,072"):
        plan(recipe("[batch]\nsequences = 1000000000\n"), "test.toml", Hardware("h100", 8), stage=1)


def test_peaks_are_dense_and_in_plain_units():
    for kind in GPUS.values():
        assert 1e13 < kind.fp32 < kind.bf16 < 1e16
        assert (
            1e10 < kind.memory < 1e12
            and 1e10 < kind.link < 1e12
            and 1e10 < kind.network < 1e12
            and 1e11 < kind.bandwidth < 1e13
        )


def test_a_plan_from_the_recipes_that_come_along():
    for path in (Path(__file__).parents[1] / "fastbert/recipes").glob("*.toml"):
        rows = dict(describe(plan(load_config(path), str(path), Hardware("h100", 8), stage=1)))
        assert "M, " in rows["parameters"] and rows["limited by"]


def test_a_plan_says_what_measures_the_time_to_make_the_dataset(small_dataset, tmp_path):
    def said(data: Path) -> bool:
        found = plan(load_config("mini", {"data": str(data)}), "mini", Hardware("h100")).assumptions
        return any("`fastbert prepare SOURCE --estimate` measures" in line for line in found)

    assert said(tmp_path / "none") and not said(small_dataset.path)
    (text := tmp_path / "a.txt").write_text("One.\n\nTwo.\n")
    words = rf"{text}: a file, and no dataset; .*`fastbert prepare {text} --out DIR`.*--estimate"
    with pytest.raises(InputError, match=words):
        said(text)
