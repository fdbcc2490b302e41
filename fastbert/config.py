"""A run's settings as a frozen `RunConfig`; recipe.py reads it from a file.

This module imports only the standard library, so that `fastbert --help` appears at once.
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

PRESETS: dict[str, dict[str, int]] = {
    # tiny to medium: Turc et al., 2019, "Well-Read Students Learn Better", with the names of
    # google-research/bert. base and large: Devlin et al., 2019, section 3.
    name: {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": hidden // 64,
        "intermediate_size": 4 * hidden,
    }
    for name, layers, hidden in [
        ("tiny", 2, 128),
        ("mini", 4, 256),
        ("small", 4, 512),
        ("medium", 8, 512),
        ("base", 12, 768),
        ("large", 24, 1024),
    ]
}

MODERNBERT_PRESETS: dict[str, dict[str, int]] = {
    # base and large: Warner et al., 2024, as in config.json of answerdotai/ModernBERT-base and
    # -large. tiny, mini and small: the encoders of 17, 32 and 68 M parameters of Weller et al.,
    # 2025 (Ettin), as in pretraining/ of JHU-CLSP/ettin-encoder-vs-decoder.
    name: {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": hidden // 64,
        "intermediate_size": intermediate,
    }
    for name, layers, hidden, intermediate in [
        ("tiny", 7, 256, 384),
        ("mini", 10, 384, 576),
        ("small", 19, 512, 768),
        ("base", 22, 768, 1152),
        ("large", 28, 1024, 2624),
    ]
}


def number(
    default: float | int | None,
    low: float,
    high: float = math.inf,
    *,
    above: bool = False,
    unit: str = "",
) -> Any:
    """A field for a number in [low, high], or in (low, high] if `above` is set."""
    return field(default=default, metadata={"low": low, "high": high, "above": above, "unit": unit})


SIZE_UNITS = {"KiB": 10, "MiB": 20, "GiB": 30, "TiB": 40}


def size(default: str, *, low: str) -> Any:
    """A field for a number of bytes, which a recipe may give with a unit: "4 GiB"."""
    bounds = {"low": size_of(low), "high": math.inf, "above": False, "unit": "bytes"}
    return field(default=size_of(default), metadata=bounds | {"is_size": True})


def size_of(text: str) -> int | None:
    """The bytes that a text like "4 GiB" or "4GiB" means; None where it is no such text."""
    found = re.fullmatch(r"\s*([0-9]+)\s*([A-Za-z]+)\s*", text)
    if found is None or found[2] not in SIZE_UNITS:
        return None
    return int(found[1]) << SIZE_UNITS[found[2]]


def choice(default: str, *options: str) -> Any:
    """A field for one of the given words."""
    return field(default=default, metadata={"options": options})


@dataclass(frozen=True)
class BertConfig:
    """BERT, with the names of transformers' BertConfig.

    The size of the vocabulary comes from the dataset.
    """

    type: str = choice("bert", "bert")
    preset: str = choice("base", *PRESETS)
    hidden_size: int = number(768, 16)
    num_hidden_layers: int = number(12, 1)
    num_attention_heads: int = number(12, 1)
    intermediate_size: int = number(3072, 1)
    hidden_dropout_prob: float = number(0.1, 0, 0.9)
    attention_probs_dropout_prob: float = number(0.1, 0, 0.9)
    max_position_embeddings: int = number(512, 8, unit="tokens")
    layer_norm_eps: float = number(1e-12, 0, 0.1)
    initializer_range: float = number(0.02, 0, 1, above=True)
    initial_attention: str = choice("uniform", "uniform", "adjacent")  # models/initial_weights.py

    presets: ClassVar[dict[str, dict[str, int]]] = PRESETS
    feed_forward_matrices: ClassVar[int] = 2  # of D x F in a layer
    # The keys that say how a model is trained. The others define what it computes.
    of_training: ClassVar[tuple[str, ...]] = (
        "preset",
        "hidden_dropout_prob",
        "attention_probs_dropout_prob",
        "initializer_range",
        "initial_attention",
    )
    of_positions: ClassVar[tuple[str, ...]] = ()

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_attention_heads

    def window_of(self, layer: int) -> int | None:
        """None: every layer attends to the whole sequence."""
        return None

    @property
    def classifier_dropout(self) -> float:
        """Dropout of what a classifier reads, where transformers' key of this name is null."""
        return self.hidden_dropout_prob


@dataclass(frozen=True)
class ModernBertConfig:
    """ModernBERT, with the names and defaults of transformers' ModernBertConfig.

    The size of the vocabulary comes from the dataset.
    """

    type: str = choice("modernbert", "modernbert")
    preset: str = choice("base", *MODERNBERT_PRESETS)
    hidden_size: int = number(768, 16)
    num_hidden_layers: int = number(22, 1)
    num_attention_heads: int = number(12, 1)
    intermediate_size: int = number(1152, 1)
    max_position_embeddings: int = number(8192, 8, unit="tokens")
    # Layer 0 and every n-th after it attend to the whole sequence, the others to a window.
    global_attn_every_n_layers: int = number(3, 1)
    local_attention: int = number(128, 2, unit="tokens; half of them on each side")
    global_rope_theta: float = number(160_000.0, 1)
    local_rope_theta: float = number(10_000.0, 1)
    norm_eps: float = number(1e-5, 0, 0.1)
    norm_bias: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    decoder_bias: bool = True
    tie_word_embeddings: bool = True
    embedding_dropout: float = number(0.0, 0, 0.9)
    attention_dropout: float = number(0.0, 0, 0.9)
    mlp_dropout: float = number(0.0, 0, 0.9)
    initializer_range: float = number(0.02, 0, 1, above=True)
    initializer_cutoff_factor: float = number(2.0, 0, above=True)
    classifier_bias: bool = False  # of the prediction head too, as in transformers
    # These two matter to fine-tuning alone, and the next two to transformers alone.
    classifier_pooling: str = choice("cls", "cls", "mean")
    classifier_dropout: float = number(0.0, 0, 0.9)
    sparse_prediction: bool = False
    sparse_pred_ignore_index: int = number(-100, -math.inf)

    presets: ClassVar[dict[str, dict[str, int]]] = MODERNBERT_PRESETS
    feed_forward_matrices: ClassVar[int] = 3  # input, gate and output
    of_training: ClassVar[tuple[str, ...]] = (
        "preset",
        "embedding_dropout",
        "attention_dropout",
        "mlp_dropout",
        "initializer_range",
        "initializer_cutoff_factor",
    )
    # No weight has their shape, so a run that starts from a model may change them: longer contexts
    # are trained with a larger theta (Warner et al., 2024, section 3.2).
    of_positions: ClassVar[tuple[str, ...]] = (
        "max_position_embeddings",
        "global_rope_theta",
        "local_rope_theta",
    )

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_attention_heads

    def window_of(self, layer: int) -> int | None:
        """How many tokens on each side a layer attends to; None: to the whole sequence."""
        return self.local_attention // 2 if layer % self.global_attn_every_n_layers else None


ModelConfig = BertConfig | ModernBertConfig
# The classes of [model] by its key `type`.
MODELS: dict[str, type[ModelConfig]] = {"bert": BertConfig, "modernbert": ModernBertConfig}


OBJECTIVES = ("mlm+nsp", "mlm")
# The losses that are summed. Each has loss_NAME and accuracy_NAME in metrics.jsonl.
LOSSES = tuple(dict.fromkeys(name for kind in OBJECTIVES for name in kind.split("+")))


@dataclass(frozen=True)
class ObjectiveConfig:
    """The pre-training tasks: masked tokens and next-sentence prediction.

    Source: Devlin et al., 2019, section 3.1.
    """

    kind: str = choice("mlm+nsp", *OBJECTIVES)
    mask_rate: float = number(0.15, 0, 1, above=True)
    mask_token: float = number(0.8, 0, 1)
    random_token: float = number(0.1, 0, 1)
    whole_word: bool = False
    segments: str = choice("fill", "fill", "single", "windows")

    @property
    def pairs(self) -> bool:
        return self.kind == "mlm+nsp"


@dataclass(frozen=True)
class BatchConfig:
    """One optimizer step has `sequences` examples over all ranks.

    Each rank computes them in packs of at most `micro_batch_tokens` tokens.
    """

    sequences: int = number(256, 1)
    # data/masking.py numbers the tokens of an example, and the examples of a pack, in 18 bits. An
    # example has three tokens or more.
    max_length: int = number(128, 8, 2**18 - 1, unit="tokens, including [CLS] and [SEP]")
    micro_batch_tokens: int = number(16384, 8, 3 * 2**18 - 1, unit="tokens")


MUON_MOMENTUM = 0.95  # where a recipe names muon and no momentum; Jordan et al., 2024


@dataclass(frozen=True)
class OrderConfig:
    """The order of examples in an epoch.

    A dataset whose token ids fit one window is shuffled as a whole. A larger one is read window by
    window: its blocks of 16 MiB are shuffled, and then the examples of each window.
    """

    window: int = size("4 GiB", low="16 MiB")


@dataclass(frozen=True)
class OptimizerConfig:
    name: str = choice("adamw", "adamw", "lamb", "muon", "sgd", "stable_adamw")
    lr: float = number(1e-4, 0, 100, above=True)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = number(1e-6, 0, 1, above=True)
    weight_decay: float = number(0.01, 0, 1)
    momentum: float = number(0.9, 0, 1)  # sgd and muon; a recipe with muon has MUON_MOMENTUM
    max_grad_norm: float = number(1.0, 0)  # gradients are clipped to this norm; 0: no clipping


@dataclass(frozen=True)
class RateConfig:
    """The learning rate from the beginning to the end of a period; shares are of the period."""

    warmup: float = number(0.1, 0, 1)
    decay: str = choice("linear", "linear", "constant", "cosine", "wsd")
    # The last share of the period, in which the rate falls to zero; for decay = "wsd" only.
    cooldown: float = number(0.25, 0, 1)
    cooldown_shape: str = choice("linear", "linear", "1-sqrt")


@dataclass(frozen=True)
class ScheduleConfig(RateConfig):
    """The learning rate over the run. Shares are of its horizon, which `over` chooses.

    The horizon is `stop.steps` (or `stop.epochs`), `stop.tokens` or `stop.seconds`.
    """

    over: str = choice("steps", "steps", "tokens", "seconds")


@dataclass(frozen=True)
class StopConfig:
    """The condition that is reached first ends the run.

    A run without steps, epochs, tokens and seconds ends after one epoch.
    """

    steps: int | None = number(None, 1)
    epochs: float | None = number(None, 0, above=True)
    tokens: int | None = number(None, 1)
    seconds: float | None = number(None, 0, above=True)
    loss: float | None = number(None, 0, above=True)  # held-out loss
    # Evaluations in a row without an improvement of at least min_delta.
    patience: int | None = number(None, 1)
    min_delta: float = number(0.0, 0)
    # Steps whose loss or gradient is not finite are skipped. More than this many in a row end the
    # run.
    skipped: int = number(5, 0)


@dataclass(frozen=True)
class EvaluateConfig:
    every: int = number(500, 1, unit="steps")
    sequences: int = number(1024, 1)


@dataclass(frozen=True)
class CheckpointConfig:
    every: int = number(1000, 1, unit="steps")
    keep: int = number(3, 1)


@dataclass(frozen=True)
class RuntimeConfig:
    kernels: str = choice("auto", "auto", "triton", "cpu", "reference")
    precision: str = choice("auto", "auto", "fp32", "bf16")
    deepspeed: str | None = None  # a file of DeepSpeed's settings; None: the packaged DEEPSPEED
    # The run is aborted if a rank is unresponsive for this long.
    timeout_s: float = number(600, 1, 1e7, unit="seconds")
    # Replay captured micro-batches instead of launching each kernel (training/graphs.py). This has
    # not run on a GPU yet.
    cuda_graphs: bool = False
    # Keep only the inputs of layers for the backward pass, and compute the rest again there.
    recompute: bool = False


@dataclass(frozen=True)
class SourceConfig:
    """One dataset of a mixture."""

    path: str
    weight: float | None = number(None, 0)  # its share of the examples is weight / sum of weights
    epochs: float | None = number(None, 0, above=True)  # the run may not use it more often


# "size^0.7": proportional to this power of the tokens of each source; or a number for each source.
Weights = str | tuple[float, ...]


@dataclass(frozen=True)
class PhaseObjectiveConfig:
    mask_rate: float | None = number(None, 0, 1, above=True)


@dataclass(frozen=True)
class PhaseBatchConfig:
    max_length: int | None = number(None, 8, 2**18 - 1, unit="tokens, including [CLS] and [SEP]")
    sequences: int | None = number(None, 1)
    # While these tokens are trained on, the size grows from that of the phase before.
    warmup_tokens: int | None = number(None, 1)


@dataclass(frozen=True)
class PhaseScheduleConfig(RateConfig):
    """The learning rate over the phase. Nothing is taken from the recipe's [schedule]."""

    warmup: float = number(0.0, 0, 1)


@dataclass(frozen=True)
class PhaseConfig:
    """A part of the run, up to its end, and what is different in it.

    A phase begins where the one before it ends. What it does not set is as in the rest of the
    recipe, which also holds after the end of the last phase.
    """

    steps: int | None = number(None, 1)
    tokens: int | None = number(None, 1)
    weights: Weights | None = None
    objective: PhaseObjectiveConfig = PhaseObjectiveConfig()
    batch: PhaseBatchConfig = PhaseBatchConfig()
    schedule: PhaseScheduleConfig | None = None

    @property
    def has_end(self) -> bool:
        return bool(self.steps or self.tokens)


@dataclass(frozen=True)
class LogConfig:
    """Trackers that get what the run measures; each key names a project there."""

    wandb: str | None = None
    mlflow: str | None = None
    trackio: str | None = None


@dataclass(frozen=True)
class RunConfig:
    """All settings of a run. Relative paths start at the working directory."""

    data: str | tuple[SourceConfig, ...]
    weights: Weights | None = None
    run: str = "runs/bert"
    seed: int = number(1, 0, 2**63 - 1)
    # A run, a checkpoint or a Hugging Face folder to start from. The model's sizes come from it.
    init: str | None = None
    # RUN@STEP: a checkpoint of another run, whose weights, moments, counters and position in the
    # data this run begins with.
    branch_from: str | None = None
    model: ModelConfig = BertConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    batch: BatchConfig = BatchConfig()
    order: OrderConfig = OrderConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    stop: StopConfig = StopConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    runtime: RuntimeConfig = RuntimeConfig()
    phase: tuple[PhaseConfig, ...] = ()
    # No setting: the keys of [model] that a recipe, its preset or an override gives.
    given: frozenset[str] = field(default=frozenset(), compare=False, repr=False)

    @property
    def sources(self) -> tuple[SourceConfig, ...]:
        """The datasets: one, or those of a mixture."""
        return (SourceConfig(self.data),) if isinstance(self.data, str) else self.data

    @property
    def shown_data(self) -> str:
        """The paths of the datasets, for messages."""
        return ", ".join(source.path for source in self.sources)

    @property
    def source_names(self) -> tuple[str, ...]:
        """A short name of each dataset for the log: its folder's, where these differ."""
        paths = [source.path for source in self.sources]
        names = [path.rstrip("/").rpartition("/")[2] for path in paths]
        return tuple(names if len(set(names)) == len(names) else paths)

    @property
    def largest(self) -> RunConfig:
        """The settings of the phase with the largest steps, and the highest mask rate of any."""
        phases = self._phases

        def size(config: RunConfig) -> tuple[int, int]:
            return config.batch.sequences * config.batch.max_length, config.batch.max_length

        most = max(phases, key=size)
        rate = max(of.objective.mask_rate for of in phases)
        return replace(most, objective=replace(self.objective, mask_rate=rate))

    @property
    def longest(self) -> int:
        """The longest max_length of any phase, in tokens."""
        return max(of.batch.max_length for of in self._phases)

    @property
    def _phases(self) -> list[RunConfig]:
        """The settings of each phase, and those after the last one."""
        rest = [] if self.phase and not self.phase[-1].has_end else [replace(self, phase=())]
        return [*map(self.in_phase, self.phase), *rest]

    def in_phase(self, phase: PhaseConfig) -> RunConfig:
        """The settings while a phase lasts; its end, warm-up and schedule are not among them."""
        changes = {"weights": phase.weights} if phase.weights is not None else {}
        objective, batch = _given(phase.objective), _given(phase.batch)
        batch.pop("warmup_tokens", None)
        return replace(
            self,
            **changes,
            objective=replace(self.objective, **objective),
            batch=replace(self.batch, **batch),
            phase=(),
        )


def _given(section: Any) -> dict[str, Any]:
    """The keys of a section that are set."""
    values = {f.name: getattr(section, f.name) for f in dataclasses.fields(section)}
    return {name: value for name, value in values.items() if value is not None}


def settings_of(config: Any) -> list[dataclasses.Field[Any]]:
    """The fields of a RunConfig, or of one of its sections, that are keys of a recipe."""
    return [item for item in dataclasses.fields(config) if item.name != "given"]


def by_key(config: RunConfig) -> dict[str, Any]:
    """The recipe's values by dotted key; phases are numbered from 1: phase.1.batch.sequences."""
    values = _by_key(config, "")
    own = tuple(source.weight for source in config.sources)
    values["weights"] = own if any(own) and len(own) > 1 else config.weights
    values["data"] = config.shown_data
    for number, phase in enumerate(values.pop("phase"), 1):
        values |= _by_key(phase, f"phase.{number}.")
    return values


def _by_key(section: Any, prefix: str) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for item in settings_of(section):
        value, key = getattr(section, item.name), f"{prefix}{item.name}"
        if dataclasses.is_dataclass(value):
            values |= _by_key(value, f"{key}.")
        else:
            values[key] = value
    return values
