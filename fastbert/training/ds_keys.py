"""The keys that DeepSpeed 0.19.8 accepts in a ds_config.json.

For each it lists which values are valid, and which do not work with fastbert, and why. DeepSpeed
accepts most keys and values in silence. Sections that it checks by itself are left to it: engine.py
runs those checks before anything is written.
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

# Keys whose values are in the recipe: they agree with it, or are an error. DeepSpeed does not get
# them.
RECIPE = {
    "train_batch_size": WHOLE, "train_micro_batch_size_per_gpu": WHOLE,
    "gradient_accumulation_steps": WHOLE, "gradient_clipping": NUMBER, "optimizer": OBJECT,
    "scheduler": OBJECT, "bf16": OBJECT, "bfloat16": OBJECT, "fp16": OBJECT,
    "zero_allow_untested_optimizer": BOOL, "zero_force_ds_cpu_optimizer": BOOL,
}  # fmt: skip
# DeepSpeed's own keys, which it gets.
OWN = {
    "aio": OBJECT, "comet": OBJECT, "comms_logger": OBJECT, "communication_data_type": TEXT,
    "csv_monitor": OBJECT, "data_types": OBJECT, "disable_python_gc": BOOL, "dump_state": BOOL,
    "flops_profiler": OBJECT, "log_level": TEXT, "memory_breakdown": BOOL,
    "steps_per_print": COUNT, "tensorboard": OBJECT, "timers": OBJECT,
    "wall_clock_breakdown": BOOL, "wandb": OBJECT, "zero_optimization": OBJECT,
}  # fmt: skip
# Keys that other programs and older releases use. They are accepted where they ask for nothing, and
# DeepSpeed does not get them.
IDLE = {
    "activation_checkpointing", "amp", "autotuning", "checkpoint", "compile",
    "compression_training", "curriculum_learning", "data_efficiency", "data_parallel_size",
    "dataloader_drop_last", "datastates_ckpt", "disable_allgather", "eigenvalue", "elasticity",
    "expert_parallel", "gradient_allreduce_op", "gradient_predivide_factor", "graph_harvesting",
    "hybrid_engine", "managed_gradient_accumulation", "nebula", "pipeline", "prescale_gradients",
    "progressive_layer_drop", "quantize_training", "seq_parallel_communication_data_type",
    "sequence_parallel_size", "sparse_attention", "sparse_gradients", "tensor_parallel",
    "torch_autocast", "use_data_before_expert_parallelism", "vocabulary_size",
    "weight_quantization",
}  # fmt: skip
# Values by which a key of IDLE asks for nothing, besides false, null, {} and {"enabled": false}.
NOTHING: dict[str, Any] = {
    "data_parallel_size": 1, "gradient_allreduce_op": "mean", "gradient_predivide_factor": 1,
    "managed_gradient_accumulation": True, "sequence_parallel_size": 1,
}  # fmt: skip

# The keys of sections that DeepSpeed does not check by itself.
SECTIONS: dict[str, dict[str, Kind]] = {
    "aio": {
        "block_size": COUNT, "queue_depth": COUNT, "thread_count": COUNT,
        "intra_op_parallelism": COUNT, "single_submit": BOOL, "overlap_events": BOOL,
        "use_gds": BOOL,
    },
    "bf16": {
        "enabled": BOOL, "immediate_grad_update": BOOL, "check_grad_overflow": BOOL,
        "bf16_master_weights_and_grads": BOOL, "bf16_optimizer_states": BOOL,
    },
    "data_types": {
        "grad_accum_dtype": TEXT, "param_dtype": TEXT, "buffer_dtype": TEXT,
        "keep_in_fp32_modules": LIST,
    },
    "flops_profiler": {
        "enabled": BOOL, "recompute_fwd_factor": NUMBER, "profile_step": COUNT,
        "module_depth": WHOLE, "top_modules": COUNT, "detailed": BOOL, "output_file": TEXT,
    },
    "fp16": {
        "enabled": BOOL, "auto_cast": BOOL, "loss_scale": NUMBER, "initial_scale_power": WHOLE,
        "loss_scale_window": WHOLE, "hysteresis": WHOLE, "consecutive_hysteresis": BOOL,
        "min_loss_scale": NUMBER, "fp16_master_weights_and_grads": BOOL,
    },
    "optimizer": {"type": TEXT, "params": OBJECT, "legacy_fusion": BOOL},
    "optimizer.params": {
        "lr": NUMBER, "betas": LIST, "eps": NUMBER, "weight_decay": NUMBER, "momentum": NUMBER,
        "max_grad_norm": NUMBER, "adam_w_mode": BOOL, "bias_correction": BOOL, "amsgrad": BOOL,
        "nesterov": BOOL, "dampening": NUMBER, "torch_adam": BOOL, "max_coeff": NUMBER,
        "min_coeff": NUMBER,
    },
    "scheduler": {"type": TEXT, "params": OBJECT},
    "scheduler.params": {
        "warmup_max_lr": NUMBER, "warmup_min_lr": NUMBER, "warmup_min_ratio": NUMBER,
        "warmup_num_steps": WHOLE, "warmup_type": TEXT, "total_num_steps": WHOLE,
        "cos_min_ratio": NUMBER, "last_batch_iteration": WHOLE,
    },
    "timers": {"throughput": OBJECT},
}  # fmt: skip
SECTIONS["bfloat16"] = SECTIONS["bf16"]  # an older name

# The only values that work with fastbert, and why. Each was tried on 2 ranks at every stage where
# the key applies, with checkpoints saved and resumed: tests/test_ds_config.py.
PLAIN = "fastbert's optimizers do without"
TREE = (
    "stage 3 gathers weights by modules that own them, "
    "and the vocabulary matrix is used outside of its own"
)
QUANTIZED = "fastbert has no quantised communication"
ONLY: dict[str, tuple[tuple[Any, ...], str]] = {
    "communication_data_type": (("fp32", "bf16"), "in fp16 small gradients would become zero"),
    "data_types.grad_accum_dtype": (("fp32", "bf16"), "in fp16 small gradients would become zero"),
    "data_types.param_dtype": (("fp32", "bf16"), "fastbert trains in these"),
    "fp16.enabled": (
        (False,),
        'fastbert trains in fp32 or bf16: runtime.precision = "bf16" in the recipe',
    ),
    "fp16.fp16_master_weights_and_grads": ((False,), "checkpoints hold fp32"),
    "log_level": (("debug", "info", "warning", "error", "critical"), "DeepSpeed knows these"),
    "optimizer.legacy_fusion": ((False,), PLAIN),
    "optimizer.params.adam_w_mode": (
        (True,),
        "weight decay is apart from the gradient, as AdamW has it",
    ),
    "optimizer.params.amsgrad": ((False,), PLAIN),
    "optimizer.params.bias_correction": ((True,), "fastbert's optimizers correct it"),
    "optimizer.params.dampening": ((0,), PLAIN),
    "optimizer.params.nesterov": ((False,), PLAIN),
    "scheduler.params.cos_min_ratio": ((0,), "the decay ends at 0"),
    "scheduler.params.last_batch_iteration": ((-1,), "fastbert's checkpoints know the step"),
    "scheduler.params.warmup_min_lr": ((0,), "the warm-up begins at 0"),
    "scheduler.params.warmup_min_ratio": ((0,), "the warm-up begins at 0"),
    "scheduler.params.warmup_type": (("linear",), "the warm-up is linear"),
    "zero_force_ds_cpu_optimizer": ((False,), "the optimizer is torch's, wherever it runs"),
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
} | {
    f"{section}.{key}": ((good,), why)
    for section in ("bf16", "bfloat16")
    for key, good, why in (
        ("immediate_grad_update", False, "fastbert does not hand it on"),
        ("check_grad_overflow", True, "a step whose gradient is not finite must not be applied"),
        ("bf16_master_weights_and_grads", False, "checkpoints hold fp32"),
        ("bf16_optimizer_states", False, "checkpoints hold fp32"),
    )
}
# Keys that work with no value.
NEVER = {
    "optimizer.params.max_coeff": "fastbert's LAMB takes the ratio of norms as it is",
    "optimizer.params.min_coeff": "fastbert's LAMB takes the ratio of norms as it is",
    "zero_optimization.leaf_module": TREE,
    "zero_optimization.zenflow": (
        "it takes the model's matrices apart in another way than fastbert's kernels do"
    ),
}

# Switches that need a package which fastbert does not install.
NEEDS = {"comet.enabled": "comet_ml", "wandb.enabled": "wandb"}

# DeepSpeed's names. Its Adam is AdamW.
OPTIMIZERS = {
    "adamw": ("AdamW", "adamw", "Adam", "adam"),
    "lamb": ("Lamb", "lamb"),
    "sgd": ("SGD", "sgd"),
}
SCHEDULERS = {
    "linear": "WarmupDecayLR",
    "constant": "WarmupLR",
    "cosine": "WarmupCosineLR",
    "wsd": "",
}
