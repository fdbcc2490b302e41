"""ds_config.json: DeepSpeed's own settings, checked. What the recipe says is not said twice.

DeepSpeed takes any key in silence, so a misspelt one would do nothing; here it is an error. Files written for transformers are
accepted: "auto" there means what it means here, from the recipe (or, for one of DeepSpeed's own numbers, its default).
"""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastbert.config import RunConfig
from fastbert.errors import InputError

# DeepSpeed 0.19's top-level keys. First those whose values are written in the recipe, with their place there.
RECIPE = {
    "train_batch_size": "batch.sequences",
    "train_micro_batch_size_per_gpu": "batch.micro_batch_tokens",
    "gradient_accumulation_steps": "batch.micro_batch_tokens",
    "gradient_clipping": "optimizer.clip",
    "optimizer": "optimizer.name",
    "scheduler": "schedule.decay",
    "bf16": "runtime.precision",
    "bfloat16": "runtime.precision",
    "fp16": "runtime.precision",
    "amp": "runtime.precision",
    "torch_autocast": "runtime.precision",
    "zero_allow_untested_optimizer": "optimizer.name",
}
# Then those that are handed on as they are.
OWN = {
    "activation_checkpointing", "aio", "checkpoint", "comet", "comms_logger", "communication_data_type", "compile", "csv_monitor",
    "data_types", "disable_allgather", "disable_python_gc", "dump_state", "flops_profiler", "log_level", "memory_breakdown",
    "steps_per_print", "tensorboard", "timers", "wandb", "wall_clock_breakdown", "zero_force_ds_cpu_optimizer", "zero_optimization",
}  # fmt: skip
# And those that would change what is trained behind the recipe's back, or how gradients are summed (see engine.py).
REFUSED = {
    "autotuning", "compression_training", "curriculum_learning", "data_efficiency", "data_parallel_size", "dataloader_drop_last",
    "elasticity", "expert_parallel", "gradient_allreduce_op", "gradient_predivide_factor", "hybrid_engine",
    "managed_gradient_accumulation", "pipeline", "prescale_gradients", "seq_parallel_communication_data_type", "sequence_parallel_size",
    "tensor_parallel", "use_data_before_expert_parallelism", "vocabulary_size", "weight_quantization",
}  # fmt: skip
AUTO = "auto"


@dataclass(frozen=True)
class DeepSpeedSettings:
    """What the file says: DeepSpeed's own keys, ready to be handed on, without those that are "auto"."""

    path: str
    values: dict[str, Any]

    def stage(self, *, precision: str, world: int, optimizer: str) -> int:
        """The ZeRO stage, 0 to 3. "auto" is 0 where nothing is gained by more: in fp32 on one process, or for LAMB; else 1.

        On one CPU process stage 0 costs a model of 1M parameters 0.7 ms a step over plain torch, stages 1 and 2 about 5, stage 3
        about 13 (see engine.py).

        Raises:
            InputError: bf16 with stage 0, which DeepSpeed trains wrongly (it steps on zero gradients); LAMB with
                stages 1 to 3, whose flat partitions hide the single matrices that LAMB takes norms of.
        """
        stage = self.values["zero_optimization"].get("stage", AUTO)
        if stage == AUTO:
            stage = 0 if optimizer == "lamb" or (precision == "fp32" and world == 1) else 1
        if stage == 0 and precision == "bf16":
            what = 'optimizer.name = "lamb" needs it, or runtime.precision = "fp32"' if optimizer == "lamb" else "set it to 1, 2, 3 or auto"
            raise InputError(f"{self.path}: zero_optimization.stage = 0 does not train in bf16; {what}")
        if stage > 0 and optimizer == "lamb":
            raise InputError(
                f'{self.path}: zero_optimization.stage = {stage} does not go with optimizer.name = "lamb"; set it to 0 or auto'
            )
        return stage


def read_ds_config(config: RunConfig, recipe: str) -> DeepSpeedSettings:
    """Read and check the file that runtime.deepspeed names; `recipe` is the recipe's path, for messages.

    Raises:
        InputError: no such file, not JSON, an unknown key (the near ones are listed), a key that belongs to the recipe
            (both places are named), a ZeRO stage that does not exist.
    """
    path = config.runtime.deepspeed
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(
            f"{recipe}: runtime.deepspeed = {path!r}: no such file; the one that comes with fastbert is ds_config.json"
        ) from None
    except OSError as error:
        raise InputError(f"{recipe}: runtime.deepspeed = {path!r}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: must be a JSON object, such as {{}}")
    for key, value in values.items():
        if key in RECIPE:
            _check_recipe_key(path, key, value, config, recipe)
        elif key in REFUSED:
            raise InputError(
                f"{path}: {key} = {json.dumps(value)} is not for fastbert, whose data order and sums do not pass through it; remove it"
            )
        elif key not in OWN:
            near = difflib.get_close_matches(key, [*OWN, *RECIPE], n=3, cutoff=0.6)
            known = "did you mean " + " or ".join(near) if near else "known: " + ", ".join(sorted(OWN))
            raise InputError(f"{path}: unknown key '{key}'; {known}?" if near else f"{path}: unknown key '{key}'; {known}")
    zero = values.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise InputError(f"{path}: zero_optimization = {json.dumps(zero)}; must be an object")
    if (stage := zero.get("stage", AUTO)) not in (0, 1, 2, 3, AUTO) or isinstance(stage, bool):
        raise InputError(f'{path}: zero_optimization.stage = {json.dumps(stage)}; must be 0, 1, 2, 3 or "auto"')
    own = {key: _without_auto(value) for key, value in values.items() if key in OWN and value != AUTO}
    return DeepSpeedSettings(path, {"zero_optimization": {}, **own})


def _check_recipe_key(path: str, key: str, value: Any, config: RunConfig, recipe: str) -> None:
    """A key of the recipe may be there as "auto", also inside its section; anything else says a thing twice."""
    place = RECIPE[key]
    if value == AUTO:
        return
    if isinstance(value, dict):
        if key in ("bf16", "bfloat16", "fp16") and (value.get("enabled") == AUTO or (key == "fp16" and value.get("enabled") is False)):
            return
        params = value.get("params", {})
        left_open = isinstance(params, dict) and params and all(v == AUTO for v in params.values())
        if key == "scheduler" and left_open:
            return
        if key == "optimizer" and left_open and str(value.get("type", AUTO)).lower() in (AUTO, config.optimizer.name):
            return
    section, _, name = place.partition(".")
    there = getattr(getattr(config, section), name)
    raise InputError(
        f'{path}: {key} = {json.dumps(value)} belongs to the recipe: {place} in {recipe} (now {there!r}); remove it from {path} or write "auto"'
    )


def _without_auto(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_auto(v) for k, v in value.items() if v != AUTO}
    return value
