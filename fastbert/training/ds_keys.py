"""What a ds_config.json may set, which values do not work with fastbert, and why.

DeepSpeed silently accepts most keys and values. Sections that it checks itself are left to it:
engine.py runs those checks before anything is written.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Kind(NamedTuple):
    """A type of value.

    Attributes:
        words: completes "must be ...", for messages.
        types: the Python types of the parsed JSON.
        least: the smallest valid number; None where there is none.
    """

    words: str
    types: tuple[type, ...]
    least: float | None = None

    def fits(self, value: Any) -> bool:
        if isinstance(value, bool) and bool not in self.types:
            return False
        if self is not NUMBER and isinstance(value, float) and value.is_integer():
            value = int(value)  # people write 2e8, which JSON parses as a float
        return isinstance(value, self.types) and (self.least is None or value >= self.least)


BOOL = Kind("true or false", (bool,))
COUNT = Kind("a whole number of 1 or more", (int,), 1)
WHOLE = Kind("a whole number", (int,))
NUMBER = Kind("a number", (int, float))
TEXT = Kind("a string", (str,))
LIST = Kind("a list", (list,))
OBJECT = Kind("an object", (dict,))

# Keys that the recipe decides, and where it does. DeepSpeed does not get them.
RECIPE = {
    "train_batch_size": "batch.sequences",
    "train_micro_batch_size_per_gpu": "batch.micro_batch_tokens",
    "gradient_accumulation_steps": "batch.micro_batch_tokens",
    "gradient_clipping": "optimizer.max_grad_norm",
    "optimizer": "[optimizer]",
    "scheduler": "[schedule]",
    "bf16": "runtime.precision",
    "bfloat16": "runtime.precision",
    "fp16": "runtime.precision",
}
# DeepSpeed's own keys, which it gets.
OWN = {
    "aio": OBJECT, "comet": OBJECT, "comms_logger": OBJECT, "communication_data_type": TEXT,
    "csv_monitor": OBJECT, "data_types": OBJECT, "disable_python_gc": BOOL, "dump_state": BOOL,
    "flops_profiler": OBJECT, "log_level": TEXT, "memory_breakdown": BOOL,
    "steps_per_print": COUNT, "tensorboard": OBJECT, "timers": OBJECT,
    "wall_clock_breakdown": BOOL, "wandb": OBJECT, "zero_optimization": OBJECT,
}  # fmt: skip
# Values by which another key asks for nothing, besides false, null, {} and {"enabled": false}.
NOTHING: dict[str, Any] = {
    "data_parallel_size": 1, "gradient_allreduce_op": "mean", "gradient_predivide_factor": 1,
    "managed_gradient_accumulation": True, "sequence_parallel_size": 1,
    "zero_allow_untested_optimizer": True,
}  # fmt: skip

# The keys of sections that DeepSpeed does not check.
SECTIONS: dict[str, dict[str, Kind]] = {
    "aio": {
        "block_size": COUNT, "queue_depth": COUNT, "thread_count": COUNT,
        "intra_op_parallelism": COUNT, "single_submit": BOOL, "overlap_events": BOOL,
        "use_gds": BOOL,
    },
    "data_types": {
        "grad_accum_dtype": TEXT, "param_dtype": TEXT, "buffer_dtype": TEXT,
        "keep_in_fp32_modules": LIST,
    },
    "flops_profiler": {
        "enabled": BOOL, "recompute_fwd_factor": NUMBER, "profile_step": COUNT,
        "module_depth": WHOLE, "top_modules": COUNT, "detailed": BOOL, "output_file": TEXT,
    },
    "timers": {"throughput": OBJECT},
}  # fmt: skip

# The only values that work with fastbert, and why. Each was tried on 2 ranks at every stage where
# the key applies, with checkpoints saved and resumed: tests/test_ds_config.py.
TREE = (
    "stage 3 gathers weights by modules that own them, "
    "and the vocabulary matrix is used outside of its own"
)
QUANTIZED = "fastbert has no quantised communication"
ONLY: dict[str, tuple[tuple[Any, ...], str]] = {
    "communication_data_type": (("fp32", "bf16"), "in fp16 small gradients would become zero"),
    "data_types.grad_accum_dtype": (("fp32", "bf16"), "in fp16 small gradients would become zero"),
    "data_types.param_dtype": (("fp32", "bf16"), "fastbert trains in these"),
    "log_level": (("debug", "info", "warning", "error", "critical"), "DeepSpeed knows these"),
    "zero_optimization.compute_grad_norm": (
        (True,),
        "by the norm fastbert tells a step that must not be applied",
    ),
    "zero_optimization.legacy_stage1": ((False,), "DeepSpeed has it no more"),
    "zero_optimization.module_granularity_threshold": ((0,), TREE),
    "zero_optimization.offload_optimizer.device": (
        ("none", "cpu"),
        "fastbert's checkpoints do not read from NVMe",
    ),
    "zero_optimization.offload_optimizer.ratio": (
        (1,),
        "a part would need DeepSpeed's own Adam; the optimizer is torch's",
    ),
    "zero_optimization.offload_optimizer.super_offload": (
        (False,),
        "it would need DeepSpeed's own Adam; the optimizer is torch's",
    ),
    "zero_optimization.offload_param.device": (
        ("none", "cpu"),
        "fastbert's checkpoints do not read from NVMe",
    ),
    # Training looks right with it. But each parameter's state is then found at another parameter's
    # place, so checkpoints would be wrong.
    "zero_optimization.round_robin_gradients": (
        (False,),
        "DeepSpeed would give checkpoints the numbers of other parameters",
    ),
    "zero_optimization.stage3_module_granularity_threshold": ((0,), TREE),
    "zero_optimization.zero_quantized_gradients": ((False,), QUANTIZED),
    "zero_optimization.zero_quantized_nontrainable_weights": ((False,), QUANTIZED),
    "zero_optimization.zero_quantized_weights": ((False,), QUANTIZED),
}
# Keys that work with no value.
NEVER = {
    "zero_optimization.leaf_module": TREE,
    "zero_optimization.zenflow": (
        "it takes the model's matrices apart in another way than fastbert's kernels do"
    ),
}

# Switches that need a package which fastbert does not install.
NEEDS = {"comet.enabled": "comet_ml", "wandb.enabled": "wandb"}
