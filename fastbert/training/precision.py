"""Resolves runtime.precision to fp32 or bf16 on this machine.

The word bf16 means two things. On a GPU, DeepSpeed keeps working copies of the weights in bf16, and
activations are bf16; only the optimizer has fp32 weights. On a CPU, everything is fp32 but the
operands of large matrix products, which are rounded to bf16 in training (fastbert_kernels.linear).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from fastbert.cluster.group import Group
from fastbert.errors import InputError
from fastbert.machine import Bf16Probe, probe_bf16
from fastbert_kernels._linear import FEWEST_MULTIPLICATIONS


@dataclass(frozen=True)
class Precision:
    """What `runtime.precision` means in a run.

    Attributes:
        name: "fp32" or "bf16".
        why: the reason for the choice, for the log.
        parameters: "fp32" or "bf16", of the working copies of the weights.
    """

    name: str
    why: str
    parameters: str = "fp32"

    @property
    def operands(self) -> torch.dtype | None:
        """The dtype to which the operands of products in fp32 are rounded, if they are."""
        return torch.bfloat16 if self.name != self.parameters else None


def resolve_precision(
    asked: str,
    before: str,
    kernels: str,
    largest: int,
    group: Group,
    recipe: str,
    probe: Callable[[], Bf16Probe] = probe_bf16,
) -> Precision:
    """Choose fp32 or bf16, the same for all ranks, which must call this together.

    On a GPU "auto" is bf16 where the GPU has it. On a CPU it is bf16 where a child process finds
    that its products are right and at least 1.5 times as fast as in fp32 (see machine.py). This is
    a measurement, and a run must not change its precision with one: a run that is resumed keeps
    what was chosen, unless this machine's products are not right or not faster.

    Args:
        asked: the recipe's "fp32", "bf16" or "auto".
        before: the same of the checkpoint that the run resumes from, as resolved; "auto" for a new
            run.
        kernels: "triton", "cpu" or "reference".
        largest: how many multiplications the largest product of a step may have.
        group: the run's processes.
        recipe: its path, for messages.
        probe: tries bf16 on this CPU.

    Raises:
        InputError: on all ranks, where bf16 was asked for and one of them cannot have it.
    """
    with group.raise_on_all_ranks():
        if group.device.type == "cuda":
            own = _on_gpu(asked, recipe)
        else:
            own = _on_cpu(asked, before, kernels, largest, recipe, probe)
    for rank, (name, why) in enumerate(group.gather((own.name, own.why))):
        if name != own.name and name == "fp32":
            return Precision(name, f"rank {rank}: {why}")
    return own


def _on_gpu(asked: str, recipe: str) -> Precision:
    if asked == "fp32":
        return Precision("fp32", "the recipe says so")
    if torch.cuda.is_bf16_supported(including_emulation=False):
        why = "the GPU has bf16" if asked == "auto" else "the recipe says so"
        return Precision("bf16", why, parameters="bf16")
    why = "the GPU has no bf16"
    if asked == "bf16":
        raise _refused(recipe, why)
    return Precision("fp32", why)


def _on_cpu(
    asked: str,
    before: str,
    kernels: str,
    largest: int,
    recipe: str,
    probe: Callable[[], Bf16Probe],
) -> Precision:
    if asked == "fp32":
        return Precision("fp32", "the recipe says so")
    if kernels == "triton":
        why = "Triton's interpreter computes bf16 wrongly"
        if asked == "bf16":
            raise _refused(recipe, f'runtime.kernels = "triton" on a CPU: {why}')
        return Precision("fp32", why)
    if asked == "auto" and before == "fp32":
        return Precision("fp32", "as before")
    if asked == "auto" and largest < FEWEST_MULTIPLICATIONS:
        return Precision("fp32", "the model's products are too small to gain from bf16")
    found = probe()
    if asked == "bf16":
        if not found.right:
            raise _refused(recipe, found.why)
        return Precision("bf16", "the recipe says so")
    if before == "bf16" and found.right and found.gain > 1:
        return Precision("bf16", "as before")
    return Precision("bf16" if found.pays else "fp32", found.why)


def _refused(recipe: str, why: str) -> InputError:
    return InputError(f'{recipe}: runtime.precision = "bf16": {why}; use "fp32" or "auto"')
