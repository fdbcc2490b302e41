"""Compile the kernels of all parts in advance, on all cores and without the GPU.

    python -m benchmarks.gpu.warm_up --out folder [--dry-run]

A kernel takes up to a second, and during the run kernels are compiled one after the other. Triton's
real launcher runs here with a driver that launches nothing (`benchmarks.compiled.no_launch`), so
Triton's cache then contains what the launches on the GPU need. Nothing depends on this step: a
missing kernel is compiled when it is needed.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from triton.backends.nvidia import driver as nvidia

from benchmarks.compiled.no_launch import SHARED_MEMORY, no_launch
from benchmarks.gpu import attention, operations, smoke
from benchmarks.gpu.items import in_one_line
from benchmarks.gpu.measure import DTYPE
from benchmarks.gpu.place import DRY_ARCHITECTURE, DRY_TOKENS, DRY_VOCABULARY, Place
from benchmarks.gpu.proposals import Proposal, read_proposals
from benchmarks.gpu.results import Results
from benchmarks.harness import children
from benchmarks.kernels.cases import Case, arguments, call, leaves
from benchmarks.kernels.tune import asked, replacing
from benchmarks.step.made_up_training import Sizes, made_up_batch
from fastbert.models.bert import BertForPreTraining
from fastbert.models.heads import losses

CPU = torch.device("cpu")


class Job(NamedTuple):
    name: str
    run: Callable[[], Any]


class Compiled(NamedTuple):
    """The result of a job: the number of kernels, the duration, and the error if there was one."""

    name: str
    kernels: int
    seconds: float
    why: str | None


def architecture_here() -> str | None:
    """The GPU's architecture according to nvidia-smi.

    torch is not used, because CUDA must not be initialised in a process that forks.
    """
    if not shutil.which("nvidia-smi"):
        return None
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    said = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.splitlines()
    return f"sm_{said[0].strip().replace('.', '')}" if said else None


def jobs(architecture: str) -> Iterator[Job]:
    """The jobs: each operation with the present tiles, then with proposed ones, then model steps.

    The steps come last, because by then most of their kernels are compiled.
    """
    try:
        proposals = read_proposals(architecture)
    except ValueError:  # the parts report it
        proposals = []
    place = Place(CPU, True, architecture)
    cases = {
        str(case): case
        for case in [
            *operations.cases(place),
            *attention.cases(place, proposals),
            *smoke.cases(place.tokens, place.vocabulary),
        ]
    }
    for name, case in cases.items():
        yield Job(name, lambda case=case: run_case(case, []))
    for number, proposal in enumerate(proposals):
        yield Job(
            f"proposal {number}: {proposal.key}",
            lambda proposal=proposal: run_proposal(proposal, list(cases.values())),
        )
    for longest in (128, 512):
        yield Job(f"step up to {longest}", lambda longest=longest: run_step(longest))


def run_case(case: Case, replaced: list[Proposal]) -> None:
    given = arguments(case, DTYPE, CPU)
    with replacing({proposal.key: proposal.row for proposal in replaced}):
        result = call(case, given, "triton")
        torch.autograd.grad(result, leaves(case, given), torch.ones_like(result))


def run_proposal(proposal: Proposal, cases: list[Case]) -> None:
    """Run every case that uses the row."""
    name = proposal.key.kernel
    for case in cases:
        if name.startswith(case.operation) and proposal.key in asked(
            case, arguments(case, DTYPE, CPU)
        ):
            run_case(case, [proposal])


def run_step(longest: int) -> None:
    """Training and evaluation of two layers of BERT-base."""
    batch = made_up_batch(Sizes("base", DRY_VOCABULARY, DRY_TOKENS, longest), 0, CPU)
    for training in (True, False):
        model = (
            BertForPreTraining(smoke.base(dry=True), DRY_VOCABULARY, "triton", "cuda")
            .to(DTYPE)
            .train(training)
        )
        with torch.set_grad_enabled(training):
            loss = losses(model(batch)).loss
        if training:
            loss.backward()


def compile_one(index: int) -> Compiled:
    """Run the job of this number in a forked process."""
    architecture, job = _of_the_parent["architecture"], _of_the_parent["jobs"][index]
    start, why = time.monotonic(), None
    with no_launch(architecture) as seen:
        try:
            job.run()
        except Exception as failure:  # its part reports a kernel that does not compile
            why = in_one_line(failure)
        for source, metadata in seen.compiled:
            build_launcher(source, metadata)
    return Compiled(job.name, len(seen.loaded), time.monotonic() - start, why)


def build_launcher(source: Any, metadata: Any) -> None:
    """Compile the launcher in C, which Triton before 3.7 needs for each signature.

    It takes as long as a kernel.
    """
    if not launchers_can_be_built():
        return
    try:
        nvidia.CudaLauncher(source, metadata)
    except Exception as failure:  # then the launch on the GPU reports the error
        print(f"no launcher in advance: {in_one_line(failure)}", flush=True)


@functools.cache
def launchers_can_be_built() -> bool:
    """Whether launchers can be linked: they need the driver's library, which comes with a GPU."""
    try:
        return hasattr(nvidia, "make_launcher") and bool(nvidia.libcuda_dirs())
    except Exception as failure:
        print(f"no launchers in advance: {in_one_line(failure)}", flush=True)
        return False


_of_the_parent: dict[str, Any] = {}  # inherited by forked processes, because jobs are not picklable


def prepare_worker() -> None:
    children.end_with_parent()
    torch.set_num_threads(1)


def main() -> int:
    children.end_with_parent()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of results.jsonl")
    parser.add_argument("--dry-run", action="store_true", help="for sm_90, without a GPU")
    options = parser.parse_args()
    results = Results(options.out, "environment", options.dry_run)
    architecture = DRY_ARCHITECTURE if options.dry_run else architecture_here()
    if architecture is None or int(architecture.removeprefix("sm_")) not in SHARED_MEMORY:
        results.add("warm-up", kernels=0, why=f"nothing is compiled in advance for {architecture}")
        return 0
    # A GPU that is initialised here could not be used in a forked process, and is not needed.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    start = time.monotonic()
    _of_the_parent.update(architecture=architecture, jobs=list(jobs(architecture)))
    count, kernels, failed = len(_of_the_parent["jobs"]), 0, 0
    cores = len(os.sched_getaffinity(0))
    with multiprocessing.get_context("fork").Pool(cores, prepare_worker) as pool:
        for compiled in pool.imap_unordered(compile_one, range(count)):
            kernels += compiled.kernels
            print(
                f"{compiled.name}: {compiled.kernels} kernels, {compiled.seconds:.1f} s "
                f"{compiled.why or ''}",
                flush=True,
            )
            if compiled.why:
                failed += 1
                results.add("warm-up", job=compiled.name, why=compiled.why)
    results.add(
        "warm-up",
        jobs=count,
        failed=failed,
        kernels=kernels,
        seconds=round(time.monotonic() - start, 1),
        cores=cores,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
