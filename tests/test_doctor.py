"""Measurements of the machine and advice; the tests must pass on every machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastbert import machine
from fastbert.cluster.group import join
from fastbert.contention import wait_policy
from fastbert.doctor import PACKAGES, Diagnosis, Gpu, advise, describe
from fastbert.machine import (
    Bf16Probe,
    judge_bf16,
    measure_bandwidth,
    measure_gemm_rate,
    processes_for,
)
from fastbert.training.precision import resolve_precision

ROOT = Path(__file__).parents[1]
HEALTHY = {
    "versions": dict.fromkeys(PACKAGES, "1.0"),
    "tools": {"g++": "/usr/bin/g++", "ninja": "/usr/bin/ninja", "nvidia-smi": None},
    "cores": 2,
    "threads": 2,
    "memory_free": 1 << 40,
    "disk_free": 1 << 40,
    "bf16": Bf16Probe(True, 2.0, ""),
    "gpus": [],
}


@pytest.fixture(scope="module")
def found() -> Diagnosis:
    """The output of `fastbert doctor --json` in a separate process."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    command = [sys.executable, "-m", "fastbert", "doctor", "--json"]
    result = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=120
    )
    assert (result.returncode, result.stderr) == (0, "")
    values = json.loads(result.stdout)
    return Diagnosis(
        **{
            **values,
            "bf16": Bf16Probe(**values["bf16"]),
            "gpus": [Gpu(**gpu) for gpu in values["gpus"]],
        }
    )


def test_rates_are_those_of_a_processor():
    assert 1e8 < measure_gemm_rate(torch.float32, seconds=0.02) < 1e14
    assert 1e8 < measure_bandwidth(seconds=0.02) < 1e13


@pytest.mark.parametrize("seconds", [0.0, 0.2])
def test_the_rate_counts_every_operation(seconds, monkeypatch):
    """The best round is at least as fast as the mean of all rounds of as many rows.

    The mean is the operations that torch counts over the time that they took.
    """

    def of_linear(x, weight, *_, **__):
        return 2 * x[0] * x[1] * weight[0]

    series: list[tuple[float, float]] = []  # operations and seconds of the rounds of each size
    counted = machine._best

    def counting(work, seconds, device, clock):
        start, before = time.perf_counter(), counter.get_total_flops()
        best = counted(work, seconds, device, clock)
        series.append((counter.get_total_flops() - before, time.perf_counter() - start))
        return best

    monkeypatch.setattr(machine, "_best", counting)
    onednn = (
        {torch.ops.mkldnn._linear_pointwise: of_linear}
        if torch.backends.mkldnn.is_available()
        else {}
    )  # torch counts MKL's alone
    with FlopCounterMode(display=False, custom_mapping=onednn) as counter:
        rate = measure_gemm_rate(seconds=seconds)
    operations, elapsed = series[-1]
    once = series[-2][0] / 2  # a warm-up and a round, as many rows as the last series
    assert operations % once == 0 and once in [
        6 * rows * 512 * 2048 for rows in (32, 128, 512, 2048)
    ]
    assert rate >= (operations - once) / elapsed


def test_the_probe_gives_an_answer_and_survives(found):
    assert found.bf16.why and found.bf16.gain >= 0
    assert found.bf16.right or found.bf16.gain == 0


def test_how_the_child_ended_is_the_answer():
    assert judge_bf16(0, "a warning\n[true, 1e11, 3e11]\n", "") == Bf16Probe(
        True, 3.0, "bf16 products run at 3.0 times the fp32 rate"
    )
    assert judge_bf16(0, "[true, 2e11, 1e11]", "") == Bf16Probe(
        True, 0.5, "bf16 products run at 0.5 times the fp32 rate"
    )
    wrong = judge_bf16(0, "[false, 1e11, 3e11]", "")
    assert wrong == Bf16Probe(False, 0.0, "bf16 products have wrong values here")
    failed = judge_bf16(1, "", "Traceback\nRuntimeError: no bf16")
    assert not failed.right and "RuntimeError: no bf16" in failed.why


@pytest.mark.parametrize("ratio", [0.5, 1.4, 1.5, 3.0])
def test_what_is_said_of_bf16_is_what_a_run_does(found, ratio):
    probe = judge_bf16(0, json.dumps([True, 1e11, ratio * 1e11]), "")
    with join(10) as group:
        chosen = resolve_precision("auto", "auto", "cpu", 1 << 40, group, "x", lambda: probe)
    row = dict(describe(replace(found, bf16=probe)))["bf16 on the CPU"]
    assert row.endswith(f'runtime.precision = "auto" takes {chosen.name}')
    assert chosen.name == ("bf16" if ratio >= 1.5 else "fp32")
    assert not any("bf16" in line for line in advise(**HEALTHY | {"bf16": probe}))


@pytest.mark.usefixtures("bf16_products")
def test_wrong_values_are_noticed(monkeypatch, capsys):
    """A product that is wrong in one entry of the gradient of the weight."""
    right = torch.nn.functional.linear

    def wrong(a, b, c=None):
        y = right(a, b, c)
        if a.dtype == torch.bfloat16 and not a.is_contiguous():
            y[-1, -1] += 1
        return y

    monkeypatch.setattr(torch.nn.functional, "linear", wrong)
    machine.try_bf16()
    assert json.loads(capsys.readouterr().out)[0] is False


def test_a_child_killed_by_its_instruction():
    child = subprocess.run(
        [sys.executable, "-c", f"import os; os.kill(os.getpid(), {int(signal.SIGILL)})"]
    )
    probe = judge_bf16(child.returncode, "", "")
    assert not probe.right and not probe.gain and "ONEDNN_MAX_CPU_ISA" in probe.why


def test_diagnosis_is_whole(found):
    assert found.cores >= 1 and 0 < found.memory_free <= found.memory and found.disk_free > 0
    assert found.versions["torch"] == torch.__version__ and found.python == sys.version.split()[0]
    assert found.gemm_fp32 and found.gemm_fp32 > 1e8 and found.bandwidth and found.bandwidth > 1e8
    assert len(found.gpus) == torch.cuda.device_count()
    labels = [label for label, _ in describe(found)]
    assert {"processor", "bf16 on the CPU", "matrix products"} <= set(labels) and labels.count(
        "GPU"
    ) == len(found.gpus)


def test_what_is_said_of_threads_is_what_a_run_does(found):
    """The fixture's process has one, as OMP_NUM_THREADS of the tests says."""
    assert (found.threads, found.processes) == (1, processes_for(1000, 1))
    assert found.wait_policy == wait_policy()
    assert dict(describe(found))["threads"] == "torch uses 1"
    four = replace(found, threads=4, processes=processes_for(1000, 4))
    assert dict(describe(four))["threads"] == (
        "torch uses 4; training computes in up to 4 processes; threads wait " + wait_policy()
    )


def test_a_healthy_machine_needs_no_advice():
    assert advise(**HEALTHY) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"versions": {**HEALTHY["versions"], "deepspeed": None}},
            "deepspeed is not installed: pip install deepspeed",
        ),
        ({"tools": {**HEALTHY["tools"], "g++": None}}, "g++ is missing: apt-get install g++"),
        ({"tools": {**HEALTHY["tools"], "ninja": None}}, "ninja is missing: pip install ninja"),
        (
            {"tools": {**HEALTHY["tools"], "nvidia-smi": "/usr/bin/nvidia-smi"}},
            "install a torch built for CUDA",
        ),
        ({"threads": 1}, "torch uses 1 of 2 cores: unset OMP_NUM_THREADS"),
        ({"bf16": Bf16Probe(False, 0.0, "it dies")}, "bf16 products do not work here: it dies"),
        ({"memory_free": 1 << 30}, "1.0 GiB of memory are free"),
        ({"disk_free": 1 << 30}, "1.0 GiB of disk are free"),
    ],
)
def test_each_lack_has_its_line(change, words):
    (line,) = advise(**{**HEALTHY, **change})
    assert words in line


def test_triton_is_missed_only_beside_a_gpu(found):
    without = {**HEALTHY, "versions": {**HEALTHY["versions"], "triton": None}}
    assert advise(**without) == []
    assert any("pip install triton" in line for line in advise(**{**without, "gpus": [object()]}))
