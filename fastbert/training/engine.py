"""One optimizer step, evaluation and state by name: the only file that knows DeepSpeed.

The loop sees the same at every ZeRO stage, precision and world size. `step` applies the gradient of
the whole global batch. `tensors` gives weights and optimizer slots in fp32 by parameter name, and
the constructor takes them back.

- The losses are divided by global counts (models/bert.py), so gradients add up over micro-batches
  and ranks. DeepSpeed would divide them by the number of micro-batches, which
  `scale_wrt_gas=False` prevents, and by the number of ranks, which a factor on the loss undoes. The
  number of micro-batches differs from step to step, so `set_gradient_accumulation_boundary` marks
  the last one.
- At stage 0 DeepSpeed clips one parameter at a time and does not report the norm. Here torch clips
  all parameters at once, and nothing is reduced on a single rank. On one core, a step of 457 tokens
  of a model of 1M (11M) parameters takes: plain torch 24.9 (284) ms, stage 0 25.6 (286), stage 1
  29.6 (319), stage 2 30.0 (324), stage 3 38.3 (362). DeepSpeed's own way adds about 2 ms at stage 0
  too; the other stages copy gradients.
- At stage 0 in bf16 DeepSpeed applies zero gradients, so ds_config.py refuses it.
- A step whose gradient is not finite is not applied, at any stage. Stages 1 to 3 check the norm
  themselves and drop the step. A loss that is not finite makes this rank's gradient NaN. All ranks
  share the norm, so checking the norm is enough.
"""

from __future__ import annotations

import difflib
import gc
import logging
import math
import os
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch._dynamo
from torch import Tensor, nn

# torch's optimizers load torch._dynamo when the first one is made, which takes seconds. The import
# above does so now, when no rank waits for another.

# DeepSpeed chooses its accelerator while it is imported. Without a GPU it would warn before it
# chooses the CPU.
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
import deepspeed
from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.monitor.config import DeepSpeedMonitorConfig
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.config_utils import DeepSpeedConfigModel
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from deepspeed.utils.config import DeepSpeedThroughputTimerConfig
from pydantic import ValidationError  # a dependency of DeepSpeed, which raises it

from fastbert.checkpoints.checkpoint import WEIGHT
from fastbert.cluster.group import Group
from fastbert.config import RunConfig
from fastbert.contention import watch_contention
from fastbert.data.packing import PackedBatch
from fastbert.errors import InputError
from fastbert.models.bert import Layer
from fastbert.models.build import Model
from fastbert.models.heads import Losses, losses
from fastbert.training.ds_config import DeepSpeedSettings, in_one_line
from fastbert.training.graphs import GraphedModel
from fastbert.training.heldout import HELDOUT_SUMS, HeldOut, heldout_means, heldout_sums
from fastbert.training.muon import Muon
from fastbert.training.optimizer import build_optimizer, slots
from fastbert.training.parallel_model import ParallelModel
from fastbert.training.stable_adamw import StableAdamW

# For sums between processes of one machine DeepSpeed would compile a shared-memory operation, which
# takes 33 s and which training never calls.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

# DeepSpeed logs to the terminal. From here on it logs to fastbert's log. The two loggers share one
# list of handlers, so handlers that are added later count too. With no handler at all, Python would
# print warnings to the terminal.
logging.getLogger("fastbert").addHandler(logging.NullHandler())
deepspeed.utils.logger.handlers = logging.getLogger("fastbert").handlers


@dataclass(frozen=True)
class StepResult:
    """The measurements of one optimizer step, over all ranks.

    Attributes:
        loss, loss_mlm: nats, means over the global batch.
        loss_nsp: nats; None where the objective has no pairs.
        accuracy_mlm, accuracy_nsp: fractions; the latter None where the objective has no pairs.
        grad_norm: Euclidean norm before clipping.
        tokens, masked, sequences: counts.
    """

    loss: float
    loss_mlm: float
    loss_nsp: float | None
    accuracy_mlm: float
    accuracy_nsp: float | None
    grad_norm: float
    tokens: int
    masked: int
    sequences: int


class NotFinite(ArithmeticError):
    """The loss or the gradient of a step is not finite.

    The step was not applied, and every rank raises this.

    Attributes:
        examples: indices within the epoch of those of this rank's examples whose own loss is not
            finite.
    """

    def __init__(self, what: str, examples: list[int]):
        super().__init__(what)
        self.examples = examples


class Engine:
    """A model and its optimizer, run by DeepSpeed on this process's device.

    All ranks must call every method together.

    Args:
        model: on the CPU, in fp32, the same on every rank.
        config: the recipe.
        settings: the checked ds_config.json.
        precision: "fp32" or "bf16", of the working copies of the weights.
        group: the run's processes.
        state: slots by name as `checkpoint.read_all` returns them, or None for a new run.
        step: how many updates led to `state`.
        at_once: how many packs are computed at once (parallel_model.py).
    """

    def __init__(
        self,
        model: Model,
        config: RunConfig,
        settings: DeepSpeedSettings,
        precision: str,
        group: Group,
        state: Mapping[str, Mapping[str, Tensor]] | None = None,
        step: int = 0,
        at_once: int = 1,
    ):
        self.group, self.device = group, group.device
        self._at_once = at_once
        self.stage = settings.stage(
            precision=precision, world=group.world, optimizer=config.optimizer.name
        )
        self._clip = config.optimizer.max_grad_norm
        if state:
            # Before `initialize`, since stage 3 would not refresh its working copies until a step.
            model.load_state_dict(dict(state[WEIGHT]))
        self.model = model.to(self.device)
        rounded = precision == "bf16" or self.model.operands is not None
        self._optimizer = build_optimizer(
            self.model, config.optimizer, "bf16" if rounded else "fp32"
        )
        self._parameters = dict(self.model.named_parameters())
        # Before `initialize`, since stage 3 takes the shapes away.
        self._slots = {
            name: slots(config.optimizer, name, p.shape) for name, p in self._parameters.items()
        }
        slots_of = {p: self._slots[name] for name, p in self._parameters.items()}
        self._group_slots = [slots_of[g["params"][0]] for g in self._optimizer.param_groups]
        handed_over = {
            # DeepSpeed only multiplies by it. data/batches.py makes the batches.
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": config.optimizer.max_grad_norm if self.stage else 0.0,
            "bf16": {"enabled": precision == "bf16"},
            "zero_allow_untested_optimizer": True,
            # Offloaded or not, the optimizer is torch's.
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": None,
            # It would wait for the GPU at every micro-batch and after every step.
            "timers": {"throughput": {"enabled": False}},
        }
        values = {
            **handed_over,
            **settings.values,
            "zero_optimization": {**settings.values["zero_optimization"], "stage": self.stage},
        }
        if self.stage == 3 and self.model.impl == "triton":
            # With Triton kernels a layer of BERT reads the parameters of the modules inside it,
            # whose own forward is never called. So they are gathered with the layer.
            for layer in self.model.layers:
                if isinstance(layer, Layer):
                    for parameter in layer.fused_parameters():
                        deepspeed.zero.register_external_parameter(layer, parameter)
        self._graphs = config.runtime.cuda_graphs
        module: nn.Module = GraphedModel(self.model) if self._graphs else self.model
        if at_once > 1:
            module = ParallelModel(self.model, at_once)
        if group.device.type == "cpu":
            watch_contention()
        self._engine, *_ = deepspeed.initialize(
            model=module, optimizer=self._optimizer, config=values
        )
        if isinstance(module, ParallelModel):
            module.wait_until_ready()
        if self.stage == 0 and group.world == 1:
            self._engine.enable_backward_allreduce = False
        if self.stage in (1, 2):
            # In bf16 DeepSpeed searches every gradient for NaN and infinity, with 13 operations
            # each. It then checks their norm, which finds the same.
            cast(Any, self._engine.optimizer).check_overflow = lambda **_: None
        self._norm: float | None = None  # of the gradient that is about to be applied
        self._optimizer.register_step_pre_hook(self._read_norm)
        self._allocate_slots(step)
        if self.stage and isinstance(self._optimizer, (Muon, StableAdamW)):
            self._optimizer.use_shares(self._starts(), group)
        if state:
            self._restore(state)

    def step(self, micro_batches: Sequence[PackedBatch], lr: float) -> StepResult:
        """Make one optimizer step.

        Args:
            micro_batches: this rank's part of a global batch; every rank has the same number, a
                multiple of `at_once`.
            lr: the learning rate.

        Returns:
            The step's losses and counts over all ranks.

        Raises:
            NotFinite: the loss or the gradient of the global batch is not finite; nothing has
                changed.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        means, correct = [], []
        self.model.train()
        rounds = list(self._rounds(micro_batches))
        for index, packs in enumerate(rounds):
            self._engine.set_gradient_accumulation_boundary(index == len(rounds) - 1)
            found = self._losses(packs)
            loss = sum((x.loss for x in found[1:]), start=found[0].loss)
            # The factor undoes DeepSpeed's division by the number of ranks. 0 x loss is 0, or NaN
            # where the loss is not finite.
            self._engine.backward(
                loss * (self.group.world + 0 * loss.detach()), scale_wrt_gas=False
            )
            means += [torch.stack((x.mlm.detach(), x.nsp.detach())) for x in found]
            correct += [torch.stack((x.token_correct.sum(), x.pair_correct.sum())) for x in found]
        counts = torch.tensor(
            [
                sum(batch.tokens for batch in micro_batches),
                sum(batch.sequences for batch in micro_batches),
            ]
        )
        parts = (
            torch.stack(means).double().sum(0),
            torch.stack(correct).sum(0),
            counts.to(self.device),
        )
        # Read before the update is queued. Applying a gradient has to wait for its norm anyway, but
        # not for the update.
        mlm, nsp, token_correct, pair_correct, tokens, sequences = self.group.sum(
            torch.cat([part.double() for part in parts])
        ).tolist()
        grad_norm = self._update()
        if not math.isfinite(grad_norm):
            what = "the norm of the gradient" if math.isfinite(mlm + nsp) else "the loss"
            raise NotFinite(f"{what} is not finite", self._bad_examples(micro_batches))
        masked, pairs = micro_batches[0].masked_total, micro_batches[0].pairs_total
        return StepResult(
            loss=mlm + nsp,
            loss_mlm=mlm,
            loss_nsp=nsp if pairs else None,
            accuracy_mlm=token_correct / max(masked, 1),
            accuracy_nsp=pair_correct / pairs if pairs else None,
            grad_norm=grad_norm,
            tokens=int(tokens),
            masked=masked,
            sequences=int(sequences),
        )

    def _update(self) -> float:
        """Apply the gradient if its norm is finite, else drop it.

        Returns:
            The norm before clipping.
        """
        if self.stage:
            self._norm = None
            self._engine.step()
            # Where the step was dropped, the hook has not run.
            if self._norm is None:
                return float(self._engine.get_global_grad_norm() or 0.0)
            return self._norm
        norm = float(
            torch.nn.utils.clip_grad_norm_(self._parameters.values(), self._clip or math.inf)
        )
        if math.isfinite(norm):
            self._engine.step()
        else:
            self._optimizer.zero_grad()
        return norm

    def _read_norm(self, *_: object) -> None:
        """Read the norm of the gradient, which is finite: DeepSpeed has dropped any other.

        torch calls this before the optimizer takes a step; a later read would wait until the step
        is done.
        """
        if self.stage and self._norm is None:
            self._norm = float(cast(Any, self._engine.optimizer)._global_grad_norm)

    @torch.no_grad()
    def evaluate(self, batches: Sequence[PackedBatch], mask_id: int) -> HeldOut:
        """Compute the held-out losses without dropout, with the batches divided over the ranks.

        Args:
            batches: all held-out batches, the same on every rank.
            mask_id: the id of [MASK].
        """
        self.model.eval()
        sums = torch.zeros(HELDOUT_SUMS, dtype=torch.float64, device=self.device)
        # Stage 3 gathers weights in every forward pass, so all ranks run the same number. A rank
        # that has no batch left runs the last one, with weight 0.
        rounds = -(-len(batches) // self.group.world)
        mine = [i * self.group.world + self.group.rank for i in range(rounds)]
        packs = [batches[min(i, len(batches) - 1)].to(self.device) for i in mine]
        found = [x for some in self._rounds(packs) for x in self._losses(some)]
        for i, pack, result in zip(mine, packs, found, strict=True):
            sums += heldout_sums(result, pack, mask_id) * (i < len(batches))
        return heldout_means(self.group.sum(sums))

    def _rounds(self, packs: Sequence[PackedBatch]) -> Iterator[Sequence[PackedBatch]]:
        """Divide packs into those that are computed at once."""
        for start in range(0, len(packs), self._at_once):
            yield packs[start : start + self._at_once]

    def _losses(self, packs: Sequence[PackedBatch]) -> list[Losses]:
        """Run the model on packs that are computed at once."""
        if not self._graphs:  # a captured graph copies the pack into its own buffer
            packs = [pack.to(self.device) for pack in packs]
        if self._at_once > 1:
            return [losses(outputs) for outputs in self._engine(packs)]
        return [losses(self._engine(pack)) for pack in packs]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield ("weight/NAME", fp32 tensor), ("exp_avg/NAME", fp32 tensor), ...

        Every rank must iterate over all of them, since stages 1 to 3 gather.
        """
        self._link_slots()
        for name, parameter in self._parameters.items():
            for slot in (WEIGHT, *self._slots[name]):
                yield f"{slot}/{name}", self._get(parameter, slot)

    def close(self) -> None:
        """Release everything, before the process group is closed.

        A gloo process can abort at its exit if DeepSpeed's hooks outlive the group.
        """
        if isinstance(self._engine.module, ParallelModel):
            self._engine.module.close()
        self._engine.destroy()
        del self._engine, self._optimizer, self._parameters, self.model
        gc.collect()
        # DeepSpeed would keep its copy of the process group for the next engine. It makes no other
        # group here, and only its newest releases have a function that drops all of them.
        deepspeed.utils.groups._WORLD_GROUP = None

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @torch.no_grad()
    def _bad_examples(self, micro_batches: Sequence[PackedBatch]) -> list[int]:
        """Indices, within the epoch, of this rank's examples whose loss is not finite.

        Dropout is the same as in the step, since the batch holds its seeds.
        """
        found: list[int] = []
        for batch in micro_batches:
            batch = batch.to(self.device)
            (result,) = self._losses([batch])
            bad = ~result.pair_losses.isfinite()
            masked = batch.masked_positions[~result.token_losses.isfinite()]
            sequences = torch.searchsorted(
                batch.cu_seqlens, masked.to(batch.cu_seqlens.dtype), right=True
            )
            bad[sequences - 1] = True
            found += batch.examples[bad].tolist()
        return found

    # The methods below know how each ZeRO stage holds weights and optimizer slots.

    def _updated(self) -> list[tuple[Tensor, tuple[str, ...]]]:
        """The tensors that the optimizer updates, with the names of their slots.

        At stage 0 these are the parameters. In stages 1 to 3 each is all parameters of a group, or
        this rank's share of them, concatenated.
        """
        if self.stage == 3:  # it divides groups further; all of them have the same slots
            zero: Any = self._engine.optimizer
            return [(flat, self._group_slots[0]) for flat in zero.fp32_partitioned_groups_flat]
        groups = zip(self._optimizer.param_groups, self._group_slots, strict=True)
        return [(tensor, names) for group, names in groups for tensor in group["params"]]

    def _starts(self) -> dict[Tensor, int]:
        """Where each parameter begins in this rank's share of its group, in stages 1 and 2.

        It is counted from the share's first element, and negative where the parameter begins in the
        share of an earlier rank. Parameters without elements in the share are left out.
        """
        return {
            parameter: link.hp_fragment_address.start - link.lp_fragment_address.start
            for parameter in self._parameters.values()
            if (link := getattr(parameter, "_hp_mapping", None)) is not None
        }

    def _link_slots(self) -> None:
        """Let DeepSpeed find every parameter's slots in stages 1 and 2.

        DeepSpeed makes this link after the first group's step, for that group alone.
        """
        if self.stage in (1, 2):
            for parameter in self._parameters.values():
                link: Any = getattr(parameter, "_hp_mapping", None)
                if link is not None:
                    flat = self._optimizer.param_groups[link.param_group_index]["params"][0]
                    link.set_optim_state_fragment(flat, self._optimizer.state[flat])

    def _allocate_slots(self, step: int) -> None:
        """Allocate zero slots, as torch's optimizers do at their first step.

        A run may have to be saved before its first step.
        """
        for tensor, names in self._updated():
            self._optimizer.state[tensor] = {name: torch.zeros_like(tensor) for name in names}
            if "exp_avg" in names:
                self._optimizer.state[tensor]["step"] = torch.tensor(
                    float(step), device=tensor.device
                )

    @torch.no_grad()
    def _restore(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Put fp32 weights and slots where the stage keeps them.

        The low-precision working copies already have the weights, rounded the same way.
        """
        self._link_slots()
        for name, parameter in self._parameters.items():
            for slot in (WEIGHT, *self._slots[name]):
                self._put(parameter, slot, state[slot][name].to(self.device))

    def _get(self, parameter: Tensor, slot: str) -> Tensor:
        """Gather a weight or slot as a full fp32 tensor."""
        if self.stage == 0:
            return parameter.detach() if slot == WEIGHT else self._optimizer.state[parameter][slot]
        found = (
            safe_get_full_fp32_param(parameter)
            if slot == WEIGHT
            else safe_get_full_optimizer_state(parameter, slot)
        )
        assert found is not None, f"DeepSpeed holds no {slot} of a parameter"
        return found

    def _put(self, parameter: Tensor, slot: str, value: Tensor) -> None:
        """Write a full fp32 tensor to where the stage keeps the weight or slot."""
        if self.stage == 0:
            (parameter if slot == WEIGHT else self._optimizer.state[parameter][slot]).copy_(value)
        elif self.stage < 3 and slot == WEIGHT:
            safe_set_full_fp32_param(parameter, value)
        elif self.stage < 3:
            safe_set_full_optimizer_state(parameter, value, slot)
        else:
            # This rank's slice of the padded flat tensor. The setters of full tensors fail where
            # the size is not a multiple of the world size.
            size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
            flat = torch.zeros(size * self.group.world, device=self.device)
            flat[: value.numel()] = value.flatten()
            mine = flat[size * self.group.rank : size * (self.group.rank + 1)]
            if slot == WEIGHT:
                safe_set_local_fp32_param(parameter, mine)
            else:
                safe_set_local_optimizer_state(parameter, mine, slot)


# The classes by which DeepSpeed checks its own settings, by section.
MODELS: dict[str, type[DeepSpeedConfigModel]] = {
    "zero_optimization": DeepSpeedZeroConfig,
    "comms_logger": CommsLoggerConfig,
    "timers.throughput": DeepSpeedThroughputTimerConfig,
    "": DeepSpeedMonitorConfig,  # tensorboard, csv_monitor, wandb, comet
}


def check_settings(settings: DeepSpeedSettings) -> None:
    """Let DeepSpeed check its own part of ds_config.json before anything is written.

    Raises:
        InputError: with DeepSpeed's objections.
    """
    if found := objections(settings):
        raise InputError(f"{settings.path}: {in_one_line(found)}")


def objections(settings: DeepSpeedSettings) -> dict[str, str]:
    """What DeepSpeed has against each key of its own part of ds_config.json."""
    values, found = dict(settings.values), dict[str, str]()
    for _ in range(len(values) + 1):  # an error is about one section; the others are tried again
        try:
            DeepSpeedConfig({**values, "train_micro_batch_size_per_gpu": 1})
        except ValidationError as error:
            section, model = next(
                (section, model)
                for section, model in MODELS.items()
                if model.__name__ == error.title
            )
            for one in error.errors():
                inside = [str(part) for part in one["loc"]]
                place = ".".join(filter(None, [section, *inside]))
                found[place] = _objection(place, inside, model, one)
                values.pop(place.partition(".")[0], None)
        except Exception as error:  # DeepSpeed raises many kinds, AssertionError among them
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            return found or {"": f"DeepSpeed refuses it: {reason}"}
        else:
            break
    return found


def _objection(place: str, inside: list[str], model: Any, error: Any) -> str:
    """One of DeepSpeed's objections to a section, in words."""
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(inside[-1], _keys(model, inside[:-1]), n=3, cutoff=0.6)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        return f"unknown key '{place}'{hint}"
    # An error without a key concerns the whole section.
    value = f" = {error['input']!r}" if inside else ""
    return f"{place}{value}: {error['msg']}, says DeepSpeed"


def _keys(model: Any, inside: list[str]) -> list[str]:
    """The keys that a section may hold, or a section inside it."""
    for key in inside:
        kinds = model.model_fields[key].annotation
        model = next(
            kind for kind in (kinds, *typing.get_args(kinds)) if hasattr(kind, "model_fields")
        )
    return [field.alias or name for name, field in model.model_fields.items()]
