"""Runs that others have timed, and what `fastbert plan` predicts for the same.

The prediction is for the same model, lengths, batch and GPUs. The plan is for fastbert, which pads
nothing and computes the last layer only for the rows that a loss reads; most published programs do
neither.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from benchmarks.harness.machine import ROOT
from benchmarks.harness.record import Row
from fastbert.planning.plan import Device, Hardware, plan
from fastbert.recipe import parse_config


class Published(NamedTuple):
    """A run that others have timed.

    The published figure is sequences per second over all GPUs, or hours for given numbers of
    sequences of one length and then another.
    """

    what: str
    source: str
    gpu: str
    gpus: int
    sequences: int  # per step, over all GPUs
    micro_batch: int  # sequences of the first length
    lengths: tuple[int, ...]  # tokens, including padding where the run has it
    per_second: float = 0.0
    amounts: tuple[float, ...] = ()  # number of sequences of each length
    hours: float = 0.0
    model: str = 'preset = "large"'  # lines of [model]
    vocab_size: int = 30522
    mask_rate: float = 0.15  # 1 if the program computes the head for all tokens
    stage: int = 0  # of ZeRO, or its equivalent


# fp16 with tensor cores, which plan does not offer, because a V100 has no bf16. NVIDIA data sheet,
# SXM2; a DGX-2 has 8 adapters of 100 Gbit/s.
V100 = Device(125e12, 15.7e12, 32e9, 900e9, 150e9, 100e9)

NVIDIA_2022 = (
    "NVIDIA/DeepLearningExamples, PyTorch/LanguageModeling/BERT/README.md of January 2022, "
    "training performance, mixed precision"
)
NVIDIA_2020 = "the same README of July 2020"
DEEPSPEED = "deepspeed.ai/news/2020/05/27/fastest-bert-training.html"
BING = "microsoft/DeepSpeed, docs/_tutorials/bert-pretraining.md of 2020, sample counts and hours"
MOSAIC = "mosaicml/examples, benchmarks/bert/README.md and hf-bert-base-uncased.yaml, 2023"
FOUNDRY = "mosaicml/llm-foundry, scripts/train/benchmarking/README.md, 2023"
PHASES = (402_679_081.0, 34_464_170.0)  # sequences of 128 and of 512 tokens
BASE = 'preset = "base"'
WIDE = 'preset = "large"\nhidden_size = 1536\nintermediate_size = 6144'
# Decoders, which compute the head for all tokens, with fully sharded weights.
MPT: dict[str, Any] = {"vocab_size": 50368, "mask_rate": 1.0, "stage": 3}

FUSED = [  # programs with fused operations, as plan assumes
    Published(
        "BERT-large, TorchScript and fused kernels", NVIDIA_2022, "a100", 1, 8192, 256, (128,), 580
    ),
    Published("BERT-large, the same", NVIDIA_2022, "a100", 8, 65536, 256, (128,), 4591),
    Published(
        "BERT-large, the same, 32 nodes", NVIDIA_2022, "a100", 256, 65536, 256, (128,), 138294
    ),
    Published("BERT-large, the same", NVIDIA_2022, "v100", 1, 4096, 64, (128,), 224),
    Published(
        "BERT-large, DeepSpeed's transformer kernels", DEEPSPEED, "v100", 1, 640, 64, (128,), 272
    ),
    Published(
        "BERT-large, DeepSpeed's transformer kernels", DEEPSPEED, "v100", 1, 80, 8, (512,), 52
    ),
    Published(
        "MPT-125M, a decoder of BERT-base's size",
        FOUNDRY,
        "a100-40gb",
        8,
        2496,
        104,
        (512,),
        2448,
        model=BASE,
        **MPT,
    ),
    Published(
        "MPT-350M, a decoder of BERT-large's size",
        FOUNDRY,
        "a100-40gb",
        8,
        2048,
        64,
        (512,),
        1035,
        **MPT,
    ),
    Published(
        "MPT-760M, a wider decoder",
        FOUNDRY,
        "h100",
        8,
        1536,
        96,
        (512,),
        1308,
        model=WIDE,
        **MPT,
    ),
]
UNFUSED = [  # programs without them, which take longer than the plan
    Published(
        "BERT-large, before the fusions", NVIDIA_2020, "a100-40gb", 1, 65536, 64, (128,), 415
    ),
    Published("BERT-large, before the fusions", NVIDIA_2020, "a100-40gb", 1, 32768, 16, (512,), 78),
    Published("BERT-large, before the fusions", NVIDIA_2020, "v100", 1, 65536, 16, (128,), 173),
    Published(
        "BERT-large, DeepSpeed before its kernels, the whole run",
        BING,
        "v100",
        64,
        16384,
        64,
        (128, 512),
        hours=14,
        amounts=PHASES,
    ),
    Published(
        "BERT-large, DeepSpeed before its kernels, the whole run",
        BING,
        "v100",
        256,
        16384,
        64,
        (128, 512),
        hours=3.7,
        amounts=PHASES,
    ),
    Published(
        "BERT-base, Hugging Face's, eager, head on all tokens, the whole run",
        MOSAIC,
        "a100",
        8,
        4096,
        128,
        (128,),
        amounts=(286_720_000,),
        hours=11.5,
        model=BASE,
        mask_rate=1.0,
    ),
]


def published_row(run: Published) -> Row:
    """Hours, or sequences per second, predicted and published; the difference is in time."""

    def seconds(length: int, sequences: float) -> float:
        config = parse_config(
            f'data = "none"\n[model]\n{run.model}\n'
            f'[objective]\nkind = "mlm"\nmask_rate = {run.mask_rate}\n'
            f"[batch]\nsequences = {run.sequences}\nmax_length = {length}\n"
            f"micro_batch_tokens = {run.micro_batch * run.lengths[0]}\n"
            '[runtime]\nprecision = "bf16"\n'
            f'deepspeed = "{ROOT / "fastbert/recipes/ds_config.json"}"\n',
            run.what,
        )
        found = plan(
            config,
            run.what,
            Hardware(run.gpu, run.gpus, V100 if run.gpu == "v100" else None),
            stage=run.stage,
            vocab_size=run.vocab_size,
            mean_length=length,
        )
        return sequences / run.sequences * found.step_s

    row: Row = {
        "run": run.what,
        "source": run.source,
        "gpus": f"{run.gpus} x {run.gpu}",
        "tokens": ", then ".join(map(str, run.lengths)),
    }
    if run.hours:
        hours = sum(map(seconds, run.lengths, run.amounts)) / 3600
        return row | {
            "predicted_hours": hours,
            "published_hours": run.hours,
            "difference": hours / run.hours - 1,
        }
    rate = 1 / seconds(run.lengths[0], 1)
    return row | {
        "predicted_per_s": rate,
        "published_per_s": run.per_second,
        "difference": run.per_second / rate - 1,
    }
