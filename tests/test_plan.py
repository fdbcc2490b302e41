"""The estimates against real models, torch's own FLOP counter and figures that others published."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastbert.config import ModelConfig, RunConfig, load_config, parse_config
from fastbert.data.packing import PackedBatch, pack_texts
from fastbert.data.store import SpecialIds
from fastbert.errors import InputError
from fastbert.flops import executed_flops, training_flops
from fastbert.model import BertForPreTraining
from fastbert.plan import GPUS, communication_per_step, count_parameters, describe, memory_by_part, plan

MODEL = ModelConfig(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48, max_position_embeddings=40)
VOCABULARY = 90
GB = 1e9


def recipe(text: str = "", preset: str = "base") -> RunConfig:
    return parse_config(f'data = "no store here"\n{text}\n[model]\npreset = "{preset}"\n', "test.toml")


def batch(lengths: list[int], masked_each: int) -> PackedBatch:
    """Sequences of these lengths, the first `masked_each` tokens of each selected, each labelled as a pair."""
    pack = pack_texts([[5] * (n - 2) for n in lengths], None, SpecialIds(0, 1, 2, 3, 4))
    positions = (pack.cu_seqlens[:-1, None].long() + torch.arange(1, masked_each + 1)).flatten()
    zeros = torch.zeros(len(lengths), dtype=torch.int64)
    totals = {"masked_total": len(positions), "pairs_total": len(lengths)}
    return replace(pack, masked_positions=positions, labels=torch.zeros_like(positions), next_sentence_labels=zeros, **totals)


def model() -> BertForPreTraining:
    return BertForPreTraining(MODEL, VOCABULARY, kernels="reference").eval()


@pytest.mark.parametrize("preset", ["tiny", "base"])
def test_parameters_are_those_of_the_model(preset):
    config = recipe(preset=preset).model
    with torch.device("meta"):
        real = BertForPreTraining(config, 30522)
    assert count_parameters(config, 30522) == sum(p.numel() for p in real.parameters())


def test_bert_base_has_110_million():
    assert count_parameters(recipe().model, 30522) == 110_106_428  # transformers' BertForPreTraining


def test_useful_flops_are_what_torch_counts():
    lengths, masked = [40, 17, 9], 3
    pack = batch(lengths, masked)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        m = model()
        last = m.hidden_states(pack)[-1]
        m.token_logits(last[pack.masked_positions])
        m.pair_logits(last[pack.cu_seqlens[:-1].long()])
    assert training_flops(MODEL, VOCABULARY, lengths, masked * 3, 3) == 3 * counter.get_total_flops()


def test_executed_flops_are_what_torch_counts_in_a_step():
    lengths, masked = [24] * 4, 5  # of one length: then the masked tokens are spread as the formula takes them to be
    pack = batch(lengths, masked)
    with FlopCounterMode(display=False) as counter:
        mlm, nsp, *_ = model()(pack)
        (mlm + nsp).backward()
    assert executed_flops(MODEL, VOCABULARY, lengths, masked * 4, 4) == counter.get_total_flops()
    assert executed_flops(MODEL, VOCABULARY, lengths, masked * 4, 4) < training_flops(MODEL, VOCABULARY, lengths, masked * 4, 4)


def test_memory_by_stage_is_that_of_the_zero_paper():
    """Figure 1 of Rajbhandari et al., 2020, for 7.5 B parameters on 64 GPUs (120, 31.4, 16.6, 1.9 GB), per parameter."""
    config = recipe()
    P = count_parameters(config.model, 30522)
    for stage, published in enumerate([120, 31.4, 16.6, 1.9]):
        parts = memory_by_part(config, 30522, 64, stage, bf16=True)
        states = sum(parts[name] for name in ("weights", "gradients", "master weights", "moments"))
        assert states / P * 7.5 == pytest.approx(published, abs=0.06)


def test_fp32_has_no_masters_and_sgd_one_moment():
    adam = memory_by_part(recipe(), 30522, 1, 0, bf16=False)
    P = count_parameters(recipe().model, 30522)
    assert [adam[name] for name in ("weights", "gradients", "master weights", "moments")] == [4 * P, 4 * P, 0, 8 * P]
    sgd = memory_by_part(parse_config('data = "x"\n[optimizer]\nname = "sgd"\n', "x"), 30522, 1, 0, bf16=False)
    assert sgd["moments"] == 4 * P


def test_activations_of_fused_kernels():
    """Counted by hand for one layer of BERT-base in bf16: q, k, v 3 D, context D, two LayerNorms 4 D, GELU 2 F; lse 4 bytes a head."""
    config = parse_config('data = "x"\n[model]\nnum_hidden_layers = 1\n[batch]\nmicro_batch_tokens = 1000\n', "x")
    parts = memory_by_part(config, 30522, 1, 0, bf16=True)
    assert parts["activations"] == 1000 * ((8 * 768 + 2 * 3072) * 2 + 12 * 4 + 768 * 2)


def test_communication_by_stage():
    assert [communication_per_step(1000, 1, stage, 3, 2) for stage in range(4)] == [0, 0, 0, 0]
    # 4 GPUs: each pass sends three quarters of 1,000 values of 2 bytes; 2, 2, 3 + 1 and 3 x 3 passes.
    assert [communication_per_step(1000, 4, stage, 3, 2) for stage in range(4)] == [3000, 3000, 6000, 13500]


def test_a_plan_adds_up():
    p = plan(recipe("[stop]\nsteps = 1000\n"), "test.toml", 8, "H100", stage=1, efficiency=0.5, mean_length=100)
    assert p.tokens_per_step == 256 * 100
    assert p.memory_total == sum(p.memory.values()) and p.memory_of_gpu == 80 * GB
    # A little less than the useful work: of the last of 12 layers only the rows of a loss are computed.
    assert 0.9 < p.compute_s / (p.flops_per_token * p.tokens_per_step / 8 / (989e12 * 0.5)) < 1
    assert p.step_s == max(p.compute_s, p.communication_s)
    assert p.steps == 1000 and p.total_s == pytest.approx(1000 * p.step_s)
    assert p.tokens_per_s == pytest.approx(25600 / p.step_s)
    assert any("50% of the peak" in line for line in p.assumptions) and any("30,522" in line for line in p.assumptions)


def test_flops_per_token_of_bert_base_are_six_times_its_matrices():
    """The rule of thumb of Kaplan et al.: 6 FLOPs a token and parameter of the layers; attention and head add a little."""
    p = plan(recipe(), "test.toml", 1, "a100", stage=1, mean_length=128)
    layers = 12 * (4 * 768**2 + 2 * 768 * 3072)
    assert 1 < p.flops_per_token / (6 * layers) < 1.3


@pytest.mark.parametrize(
    ("text", "gpus", "gpu", "stage", "limit"),
    [
        (
            "[batch]\nmicro_batch_tokens = 1000000\nsequences = 100000\n",
            1,
            "l4",
            1,
            "memory: .* activations: lower batch.micro_batch_tokens",
        ),
        ("[batch]\nsequences = 256\n", 64, "h100", 3, "communication: "),
        ("[batch]\nsequences = 8\n", 1, "h100", 1, "too little work: .* fewer GPUs"),
        ("[batch]\nsequences = 4096\n", 1, "h100", 1, "computation"),
    ],
)
def test_what_limits_a_run(text, gpus, gpu, stage, limit):
    assert re.match(limit, plan(recipe(text), "test.toml", gpus, gpu, stage=stage).limit)


def test_the_end_of_the_run_is_the_first_condition_reached():
    def steps(stop: str, over: str = "steps") -> int | None:
        config = recipe(f'[schedule]\nover = "{over}"\n[stop]\n{stop}\n')
        return plan(config, "test.toml", 1, "h100", stage=0, mean_length=100).steps

    assert steps("steps = 500\ntokens = 2560000") == 100
    assert steps("tokens = 2560001", "tokens") == 101
    assert steps("steps = 50\ntokens = 2560000") == 50
    assert steps("epochs = 3") is None  # nobody knows how long an epoch is without the store
    assert (steps("seconds = 100", "seconds") or 0) > 1


def test_the_stage_comes_from_the_deepspeed_file(tmp_path):
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 2, "reduce_bucket_size": 1000}}))
    config = recipe(f'[runtime]\ndeepspeed = "{tmp_path / "ds.json"}"\n')
    p = plan(config, "test.toml", 8, "h100")
    assert p.zero_stage == 2
    assert plan(config, "test.toml", 8, "h100", stage=3).zero_stage == 3
    assert p.memory["workspace"] < plan(config, "test.toml", 8, "h100", stage=2).memory["workspace"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"gpu": "h1000"}, "--gpu h1000: unknown; known: a100, "),
        ({"gpus": 0}, "--gpus 0: must be 1 or more"),
        ({"efficiency": 1.5}, "--efficiency 1.5"),
        ({"stage": 4}, "--stage 4"),
        ({"stage": None}, "nowhere.json"),
    ],
)
def test_wrong_arguments(arguments, words):
    config = recipe('[runtime]\ndeepspeed = "nowhere.json"\n')
    with pytest.raises(InputError, match=words):
        plan(config, "test.toml", **{"gpus": 1, "gpu": "h100", "stage": 1, **arguments})


def test_peaks_are_dense_and_in_plain_units():
    for kind in GPUS.values():
        assert 1e13 < kind.fp32 < kind.bf16 < 1e16
        assert 1e10 < kind.memory < 1e12 and 1e10 < kind.link < 1e12


def test_a_plan_from_the_recipes_that_come_along():
    for path in (Path(__file__).parents[1] / "recipes").glob("*.toml"):
        rows = dict(describe(plan(load_config(path), str(path), 8, "h100", stage=1)))
        assert "M, " in rows["parameters"] and rows["limited by"]
