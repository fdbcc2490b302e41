"""A run as a frozen `RunConfig`: a TOML recipe, `key=value` overrides that win, and every check on them.

Standard library only, so that `fastbert --help` and a wrong recipe answer at once.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import sys
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastbert.errors import InputError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PRESETS: dict[str, dict[str, int]] = {
    # Turc et al., 2019, "Well-Read Students Learn Better", table 1; base and large: Devlin et al., 2019, section 3.
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


def number(
    default: float | int | None,
    low: float,
    high: float = math.inf,
    *,
    above: bool = False,
    unit: str = "",
) -> Any:
    """A field that holds a number in [low, high], or in (low, high] where `above` is set."""
    return field(default=default, metadata={"low": low, "high": high, "above": above, "unit": unit})


def choice(default: str, *options: str) -> Any:
    """A field that holds one of a few words."""
    return field(default=default, metadata={"options": options})


@dataclass(frozen=True)
class ModelConfig:
    """The encoder, in the words of transformers' BertConfig; the vocabulary's size comes from the dataset."""

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
    initial_attention: str = choice("uniform", "uniform", "adjacent")  # see initial_weights.py

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_attention_heads


@dataclass(frozen=True)
class ObjectiveConfig:
    """What is learned: masked tokens, and whether B follows A (Devlin et al., 2019, section 3.1)."""

    kind: str = choice("mlm+nsp", "mlm+nsp", "mlm")
    mask_rate: float = number(0.15, 0, 1, above=True)
    mask_token: float = number(0.8, 0, 1)
    random_token: float = number(0.1, 0, 1)
    whole_word: bool = False
    segments: str = choice("fill", "fill", "single")

    @property
    def pairs(self) -> bool:
        return self.kind == "mlm+nsp"


@dataclass(frozen=True)
class BatchConfig:
    """One optimizer step: `sequences` examples over all ranks, in packs of at most `micro_batch_tokens`."""

    sequences: int = number(256, 1)
    max_length: int = number(128, 8, unit="tokens, [CLS] and [SEP] counted")
    micro_batch_tokens: int = number(16384, 8, unit="tokens")


@dataclass(frozen=True)
class OptimizerConfig:
    name: str = choice("adamw", "adamw", "lamb", "sgd")
    lr: float = number(1e-4, 0, 100, above=True)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = number(1e-6, 0, 1, above=True)
    weight_decay: float = number(0.01, 0, 1)
    momentum: float = number(0.9, 0, 1)  # sgd only
    max_grad_norm: float = number(1.0, 0)  # largest norm of the gradient; 0 does not clip


@dataclass(frozen=True)
class ScheduleConfig:
    """The learning rate over the run, as a share of its horizon: `stop.steps` (or epochs), `stop.tokens` or `stop.seconds`."""

    warmup: float = number(0.1, 0, 1)
    decay: str = choice("linear", "linear", "constant", "cosine", "wsd")
    cooldown: float = number(
        0.25, 0, 1
    )  # decay = "wsd" only: the last share of the run, linear to zero
    over: str = choice("steps", "steps", "tokens", "seconds")


@dataclass(frozen=True)
class StopConfig:
    """Whichever is reached first ends the run; with none of steps, epochs, tokens and seconds, one epoch does."""

    steps: int | None = number(None, 1)
    epochs: float | None = number(None, 0, above=True)
    tokens: int | None = number(None, 1)
    seconds: float | None = number(None, 0, above=True)
    loss: float | None = number(None, 0, above=True)  # held-out loss
    patience: int | None = number(
        None, 1
    )  # evaluations without an improvement of at least min_delta
    min_delta: float = number(0.0, 0)
    skipped: int = number(
        5, 0
    )  # steps in a row that are skipped because their loss or gradient is not finite; one more ends the run


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
    deepspeed: str = "ds_config.json"
    timeout_s: float = number(
        600, 1, unit="seconds"
    )  # a rank that does not answer for so long ends the run
    cuda_graphs: bool = False  # replay captured micro-batches instead of launching each kernel (training/graphs.py); never run on a GPU yet


@dataclass(frozen=True)
class RunConfig:
    """A whole run. Paths are as written: relative ones start at the working directory."""

    data: str
    run: str = "runs/bert"
    seed: int = number(1, 0, 2**63 - 1)
    init: str | None = (
        None  # a model to start from: a run, a checkpoint or a Hugging Face folder; sizes are taken from there
    )
    model: ModelConfig = ModelConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    batch: BatchConfig = BatchConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    stop: StopConfig = StopConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    runtime: RuntimeConfig = RuntimeConfig()


def load_config(path: str | Path, overrides: typing.Sequence[str] = ()) -> RunConfig:
    """Read a TOML recipe and apply `section.key=value` overrides, which win.

    Raises:
        InputError: a file that cannot be read, TOML that cannot be parsed, an unknown key (the near ones are
            listed), a value of the wrong type or out of range, or values that contradict each other.
    """
    path = Path(path)
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(
            f"{path}: no such recipe; the ones that come with fastbert are in recipes/"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as a recipe: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path}: not valid TOML: {error}") from None
    sources: dict[str, str] = {}
    for override in overrides:
        _apply(values, override, sources)
    return _build(values, str(path), sources)


def parse_config(text: str, source: str) -> RunConfig:
    """The same from a string, for a recipe that is stored inside another file; `source` names it in errors."""
    try:
        return _build(tomllib.loads(text), source, {})
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{source}: not valid TOML: {error}") from None


def dump_config(config: RunConfig) -> str:
    """The resolved recipe as TOML; `parse_config` gives the same RunConfig back."""
    lines, sections = [], []
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            rows = [
                f"{f.name} = {_toml(getattr(value, f.name))}"
                for f in dataclasses.fields(value)
                if getattr(value, f.name) is not None
            ]
            sections.append("\n".join([f"[{item.name}]", *rows]))
        elif value is not None:
            lines.append(f"{item.name} = {_toml(value)}")
    return "\n\n".join(["\n".join(lines), *sections]) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # TOML's basic strings take JSON's escapes for the control characters, the quote and the backslash.
        escaped = "".join(
            c if c >= " " and c not in '"\\\x7f' else f"\\u{ord(c):04x}" for c in value
        )
        return f'"{escaped}"'
    if isinstance(value, tuple):
        return "[" + ", ".join(_toml(v) for v in value) + "]"
    return repr(value)


def _apply(values: dict[str, Any], override: str, sources: dict[str, str]) -> None:
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key:
        raise InputError(
            f"command line: '{override}' is not key=value; write for example batch.sequences=64"
        )
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()  # a bare word: run=runs/demo needs no quotes
    *parents, last = key.split(".")
    table = values
    for parent in parents:
        table = table.setdefault(parent, {})
        if not isinstance(table, dict):
            raise InputError(f"command line: {key}: '{parent}' is not a section")
    table[last] = value
    sources[key] = "command line"


def _build(values: dict[str, Any], source: str, sources: dict[str, str]) -> RunConfig:
    if "data" not in values:
        raise InputError(
            f'{source}: data is missing; write data = "the folder that fastbert prepare made"'
        )
    model = values.get("model")
    if (
        isinstance(model, dict)
        and isinstance(preset := model.get("preset", "base"), str)
        and preset in PRESETS
    ):
        values = {**values, "model": {**PRESETS[preset], **model}}
    config = _section(RunConfig, values, "", source, sources)
    check_config(config, source, sources)
    return config


def _section(
    cls: type, values: dict[str, Any], prefix: str, source: str, sources: dict[str, str]
) -> Any:
    fields = {f.name: f for f in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    given: dict[str, Any] = {}
    for name, value in values.items():
        key = prefix + name
        where = sources.get(key, source)
        if name not in fields:
            raise InputError(f"{where}: unknown key '{key}'; {_near(name, prefix, list(fields))}")
        hint = hints[name]
        if dataclasses.is_dataclass(hint):
            if not isinstance(value, dict):
                raise InputError(f"{where}: {key} = {value!r}; must be a section, [{key}]")
            given[name] = _section(typing.cast(type, hint), value, key + ".", source, sources)
        else:
            given[name] = _value(fields[name], hint, value, key, where)
    return cls(**given)


def _near(name: str, prefix: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    if near:
        return "did you mean " + " or ".join(prefix + n for n in near) + "?"
    return "known " + (f"in [{prefix[:-1]}]" if prefix else "at the top") + ": " + ", ".join(known)


def _value(spec: dataclasses.Field, hint: Any, value: Any, key: str, where: str) -> Any:
    def wrong(what: str) -> InputError:
        return InputError(f"{where}: {key} = {value!r}; must be {what}")

    if isinstance(
        hint, types.UnionType
    ):  # `int | None`: TOML has no null, so a value that is there is never None
        hint = next(t for t in typing.get_args(hint) if t is not types.NoneType)
    if hint is bool:
        if not isinstance(value, bool):
            raise wrong("true or false")
        return value
    if hint is str:
        if not isinstance(value, str) or not value:
            raise wrong("a string that is not empty")
        options = spec.metadata.get("options")
        if options and value not in options:
            raise wrong("one of " + ", ".join(options))
        return value
    if typing.get_origin(hint) is tuple:
        if (
            not isinstance(value, (list, tuple))
            or len(value) != 2
            or not all(_is_number(v) and 0 <= v < 1 for v in value)
        ):
            raise wrong("two numbers of at least 0 and below 1")
        return tuple(float(v) for v in value)
    if hint is int and (not isinstance(value, int) or isinstance(value, bool)):
        raise wrong("a whole number")
    if not _is_number(value) or not math.isfinite(value):
        raise wrong("a number")
    low, high, above, unit = (spec.metadata[k] for k in ("low", "high", "above", "unit"))
    if value < low or value > high or (above and value == low):
        bound = f"above {low}" if above else f"{low} or more"
        bound += f" and {high} at most" if high != math.inf else ""
        raise wrong(bound + (f" ({unit})" if unit else ""))
    return hint(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_config(
    config: RunConfig, source: str, sources: typing.Mapping[str, str] = types.MappingProxyType({})
) -> None:
    """What no single value shows: raise InputError for values that contradict each other. `sources`: of keys that are not from `source`."""

    def where(key: str) -> str:
        return sources.get(key, source)

    model, objective, batch = config.model, config.objective, config.batch
    if model.hidden_size % model.num_attention_heads:
        raise InputError(
            f"{where('model.num_attention_heads')}: model.num_attention_heads = {model.num_attention_heads} "
            f"does not divide model.hidden_size = {model.hidden_size}"
        )
    if model.head_size % 8:
        raise InputError(
            f"{where('model.num_attention_heads')}: model.hidden_size / model.num_attention_heads = {model.head_size}; must be a multiple of 8"
        )
    if batch.max_length > model.max_position_embeddings:
        raise InputError(
            f"{where('batch.max_length')}: batch.max_length = {batch.max_length} is more than "
            f"model.max_position_embeddings = {model.max_position_embeddings}; lower the one or raise the other"
        )
    if batch.micro_batch_tokens < batch.max_length:
        raise InputError(
            f"{where('batch.micro_batch_tokens')}: batch.micro_batch_tokens = {batch.micro_batch_tokens} is less than "
            f"batch.max_length = {batch.max_length}; the longest sequence must fit"
        )
    if objective.mask_token + objective.random_token > 1:
        raise InputError(
            f"{where('objective.random_token')}: objective.mask_token + objective.random_token = "
            f"{objective.mask_token + objective.random_token:g}; must be 1 at most"
        )
    horizon = {
        "steps": config.stop.steps or config.stop.epochs,
        "tokens": config.stop.tokens,
        "seconds": config.stop.seconds,
    }
    others = any(horizon[k] for k in horizon if k != config.schedule.over)
    flat = config.schedule.decay == "constant" and config.schedule.warmup == 0
    if (
        not horizon[config.schedule.over]
        and not flat
        and (others or config.schedule.over != "steps")
    ):
        key = (
            "stop.steps or stop.epochs"
            if config.schedule.over == "steps"
            else f"stop.{config.schedule.over}"
        )
        raise InputError(
            f'{where("schedule.over")}: schedule.over = "{config.schedule.over}" needs {key}: the learning rate follows it to the end of the run'
        )
    if config.schedule.decay == "wsd" and config.schedule.warmup + config.schedule.cooldown > 1:
        raise InputError(
            f"{where('schedule.cooldown')}: schedule.warmup + schedule.cooldown = "
            f"{config.schedule.warmup + config.schedule.cooldown:g}; must be 1 at most"
        )
    if config.stop.min_delta and not config.stop.patience:
        raise InputError(
            f"{where('stop.min_delta')}: stop.min_delta = {config.stop.min_delta} needs stop.patience"
        )
