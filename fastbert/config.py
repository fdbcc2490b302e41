"""A run's settings as a frozen `RunConfig`, read from a recipe and overrides, and checked.

A recipe is a TOML file, the name of a recipe that is packaged with fastbert, or a dict of its
tables. Overrides win over it. This module imports only the standard library, so that
`fastbert --help` and the message on a wrong recipe appear at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import math
import numbers
import os
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, cast

from fastbert.errors import InputError
from fastbert.regular_file import read_text
from fastbert.storage import Place, is_url, place, read

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PATHS = ("data", "run", "init", "runtime.deepspeed")  # keys that may begin with ~
PACKAGED = Path(__file__).parent / "recipes"  # the recipes that fastbert brings along
DEEPSPEED = PACKAGED / "ds_config.json"  # DeepSpeed's settings where a recipe names no file
COMMAND_LINE = "command line"  # in messages: where a value came from
OVERRIDES = "overrides"
LONGEST_VALUE = 80  # characters of a wrong value that a message shows
# What the parser raises, also for a number of 5,000 digits and for deeply nested brackets.
NOT_TOML = (ValueError, RecursionError)

PRESETS: dict[str, dict[str, int]] = {
    # Turc et al., 2019, "Well-Read Students Learn Better", table 1.
    # base and large: Devlin et al., 2019, section 3.
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
    # base and large: Warner et al., 2024, appendix A, table 4. tiny, mini and small are the
    # encoders of 17, 32 and 68 M parameters of Weller et al., 2025 (Ettin), table 1.
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
class OptimizerConfig:
    name: str = choice("adamw", "adamw", "lamb", "muon", "sgd", "stable_adamw")
    lr: float = number(1e-4, 0, 100, above=True)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = number(1e-6, 0, 1, above=True)
    weight_decay: float = number(0.01, 0, 1)
    momentum: float = number(0.9, 0, 1)  # sgd and muon; a recipe with muon has MUON_MOMENTUM
    max_grad_norm: float = number(1.0, 0)  # gradients are clipped to this norm; 0: no clipping


@dataclass(frozen=True)
class ScheduleConfig:
    """The learning rate over the run. Shares are of its horizon, which `over` chooses.

    The horizon is `stop.steps` (or `stop.epochs`), `stop.tokens` or `stop.seconds`.
    """

    warmup: float = number(0.1, 0, 1)
    decay: str = choice("linear", "linear", "constant", "cosine", "wsd")
    # The last share of the run, in which the rate falls to zero; for decay = "wsd" only.
    cooldown: float = number(0.25, 0, 1)
    cooldown_shape: str = choice("linear", "linear", "1-sqrt")
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
class LogConfig:
    """Trackers that get what the run measures; each key names a project there."""

    wandb: str | None = None
    mlflow: str | None = None
    trackio: str | None = None


@dataclass(frozen=True)
class RunConfig:
    """All settings of a run. Relative paths start at the working directory."""

    data: str
    run: str = "runs/bert"
    seed: int = number(1, 0, 2**63 - 1)
    # A run, a checkpoint or a Hugging Face folder to start from. The model's sizes come from it.
    init: str | None = None
    model: ModelConfig = BertConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    batch: BatchConfig = BatchConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    stop: StopConfig = StopConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    runtime: RuntimeConfig = RuntimeConfig()
    # No setting: the keys of [model] that a recipe, its preset or an override gives.
    given: frozenset[str] = field(default=frozenset(), compare=False, repr=False)


def settings_of(config: Any) -> list[dataclasses.Field[Any]]:
    """The fields of a RunConfig, or of one of its sections, that are keys of a recipe."""
    return [item for item in dataclasses.fields(config) if item.name != "given"]


def by_key(config: RunConfig) -> dict[str, Any]:
    """The settings of a recipe by dotted key."""
    values: dict[str, Any] = {}
    for item in settings_of(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            values |= {f"{item.name}.{f.name}": getattr(value, f.name) for f in settings_of(value)}
        else:
            values[item.name] = value
    return values


def packaged_recipes() -> list[str]:
    """The names of the recipes that come with fastbert, such as "mini", in alphabetical order."""
    return sorted(path.stem for path in PACKAGED.glob("*.toml"))


def find_recipe(name: str | Path) -> Path:
    """The file of a recipe.

    Args:
        name: a path; or the name of a packaged recipe ("mini", "mini.toml"), which is used if no
            file of that name exists.

    Raises:
        InputError: there is neither such a file nor such a packaged recipe.
    """
    path = Path(name)
    with contextlib.suppress(OSError, ValueError):  # no path: too long, or with a NUL
        if path.exists() and not path.is_dir():
            return path
    names = packaged_recipes()
    bare = os.fspath(name).removesuffix(".toml")
    if bare in names:
        return PACKAGED / f"{bare}.toml"
    near = difflib.get_close_matches(path.stem, names, n=1, cutoff=0.6)
    hint = f"did you mean {near[0]}? " if near else ""
    raise InputError(
        f"{path}: no such recipe; {hint}give a TOML file, or one that comes with fastbert: "
        + ", ".join(names)
    )


def load_config(
    recipe: str | Path | Mapping[str, Any],
    overrides: Sequence[str] | Mapping[str, Any] = (),
) -> RunConfig:
    """Read a recipe and apply overrides, which win.

    Args:
        recipe: a path, the name of a packaged recipe (see `find_recipe`), or the recipe's tables.
        overrides: `section.key=value` lines as on the command line, with values in TOML; or a
            mapping. Its keys may be dotted, its values may be tables, and None removes a key of the
            recipe, so that the default applies.

    Raises:
        InputError: a file that cannot be read, TOML that cannot be parsed, an unknown key (similar
            ones are listed), a value of the wrong type or out of range, or values that contradict
            each other.
    """
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    if isinstance(recipe, Mapping):
        source = "recipe"
        _merge(values, recipe, "", source, sources)
    else:
        source = str(recipe)
        values = _read(place(source) if is_url(source) else find_recipe(recipe), source)
    if isinstance(overrides, Mapping):
        _merge(values, overrides, "", OVERRIDES, sources)
    else:
        for override in overrides:
            _apply(values, override, sources)
    return _build(values, source, sources)


def _read(at: Place, name: str) -> dict[str, Any]:
    """The tables of a TOML file; `name` is the one to show in messages."""
    try:
        return tomllib.loads(read_text(at) if isinstance(at, Path) else read(at).decode())
    except OSError as error:
        raise InputError(f"{name}: cannot be read as a recipe: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{name}: not UTF-8 ({error}); save it as UTF-8") from None
    except NOT_TOML as error:
        raise InputError(f"{name}: not valid TOML: {error}") from None


def parse_config(text: str, source: str) -> RunConfig:
    """Read a recipe from a string; `source` is where it is from, for messages."""
    try:
        values = tomllib.loads(text)
    except NOT_TOML as error:
        raise InputError(f"{source}: not valid TOML: {error}") from None
    return _build(values, source, {})


def dump_config(config: RunConfig) -> str:
    """The settings as TOML. `parse_config` makes the same RunConfig of it again."""
    lines: list[str] = []
    sections: list[str] = []
    for item in settings_of(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            rows = [
                f"{f.name} = {toml_value(getattr(value, f.name))}"
                for f in dataclasses.fields(value)
                if getattr(value, f.name) is not None
            ]
            sections.append("\n".join([f"[{item.name}]", *rows]))
        elif value is not None:
            lines.append(f"{item.name} = {toml_value(value)}")
    return "\n\n".join(["\n".join(lines), *sections]) + "\n"


def toml_value(value: Any) -> str:
    """A setting as TOML."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # Control characters, the quote and the backslash are escaped as in JSON.
        escaped = "".join(
            c if c >= " " and c not in '"\\\x7f' else f"\\u{ord(c):04x}" for c in value
        )
        return f'"{escaped}"'
    if isinstance(value, tuple):
        return "[" + ", ".join(toml_value(v) for v in cast("tuple[Any, ...]", value)) + "]"
    return repr(value)


def _apply(values: dict[str, Any], override: str, sources: dict[str, str]) -> None:
    """Apply one `key=value` of the command line."""
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key:
        raise InputError(
            f"{COMMAND_LINE}: {_shown(override)} is not key=value; "
            "write for example batch.sequences=64"
        )
    try:
        value, *others = tomllib.loads(f"value = {text}").values()
    except NOT_TOML:
        value = text.strip()  # a bare word: run=runs/demo needs no quotes
        others = value.splitlines()[1:]
    if others:
        raise InputError(
            f"{COMMAND_LINE}: {_shown(override)} has several lines; give each setting as an "
            "argument of its own"
        )
    _set(values, key, value, COMMAND_LINE, sources)


def _merge(
    values: dict[str, Any],
    changes: Mapping[str, Any],
    prefix: str,
    origin: str,
    sources: dict[str, str],
) -> None:
    """Apply a mapping of values and tables; tables are merged key by key."""
    for name, value in changes.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping):
            _set(values, key, None, origin, sources, table=True)
            _merge(values, cast("Mapping[str, Any]", value), f"{key}.", origin, sources)
        else:
            _set(values, key, _plain(value), origin, sources)


def _plain(value: Any) -> Any:
    """The value as TOML would give it: paths as text, and numbers of NumPy as Python's own."""
    if isinstance(value, os.PathLike):
        return os.fspath(cast("os.PathLike[str]", value))
    if isinstance(value, bool):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in cast("Sequence[Any]", value)]
    return value


def _set(
    values: dict[str, Any],
    key: str,
    value: Any,
    origin: str,
    sources: dict[str, str],
    *,
    table: bool = False,
) -> None:
    """Set the value of a dotted key; None removes it. With `table` only make sure of the table."""
    names = key.split(".")
    for i, name in enumerate(names if table else names[:-1]):
        section: Any = values.setdefault(name, {})
        if not isinstance(section, dict):
            parent = ".".join(names[: i + 1])
            raise InputError(f"{origin}: {key}: '{parent}' is not a section")
        values = cast("dict[str, Any]", section)
    if table:
        return
    if value is None:
        _check_key(key, origin)
        values.pop(names[-1], None)
        return
    values[names[-1]] = value
    sources[key] = origin


def _check_key(key: str, origin: str) -> None:
    """Raise InputError where a recipe cannot have this dotted key."""
    classes, prefix = [RunConfig], ""
    for name in key.split("."):
        names = {f.name: cls for cls in classes for f in settings_of(cls)}
        if name not in names:
            raise InputError(f"{origin}: unknown key '{key}'; {_near(name, prefix, list(names))}")
        hint, prefix = typing.get_type_hints(names[name])[name], f"{prefix}{name}."
        classes = [cls for cls in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(cls)]


def _build(values: dict[str, Any], source: str, sources: dict[str, str]) -> RunConfig:
    if "data" not in values:
        raise InputError(
            f'{source}: data is missing; write data = "the folder that fastbert prepare made"'
        )
    given = set[str]()
    if isinstance(values.get("model"), dict):
        model: dict[str, Any] = values["model"]
        cls = _model_class(model, sources.get("model.type", source))
        preset = model.get("preset", "base")
        if isinstance(preset, str) and preset in cls.presets:
            values = {**values, "model": {**cls.presets[preset], **model}}
            given = {*model, *(cls.presets[preset] if "preset" in model else ())}
        objective = values.get("objective", {})
        if cls is ModernBertConfig and isinstance(objective, dict):
            values = {**values, "objective": {"kind": "mlm", **objective}}
    if isinstance(values.get("optimizer"), dict) and values["optimizer"].get("name") == "muon":
        values = {**values, "optimizer": {"momentum": MUON_MOMENTUM, **values["optimizer"]}}
    config = _section(RunConfig, values, "", source, sources)
    check_config(config, source, sources)
    return dataclasses.replace(config, given=frozenset(given))


def _model_class(model: Mapping[str, Any], where: str) -> type[ModelConfig]:
    """The class of the section [model], which its key `type` names."""
    name = model.get("type", "bert")
    if not isinstance(name, str) or name not in MODELS:
        raise InputError(
            f"{where}: model.type = {_shown(name)}; must be one of {', '.join(MODELS)}"
        )
    return MODELS[name]


def _section(
    cls: type, values: dict[str, Any], prefix: str, source: str, sources: dict[str, str]
) -> Any:
    fields = {f.name: f for f in settings_of(cls)}
    hints = typing.get_type_hints(cls)
    given: dict[str, Any] = {}
    for name, value in values.items():
        key = prefix + name
        where = sources.get(key, source)
        if name not in fields:
            raise InputError(f"{where}: unknown key '{key}'; {_near(name, prefix, list(fields))}")
        hint = hints[name]
        if dataclasses.is_dataclass(hint) or hint == ModelConfig:
            if not isinstance(value, dict):
                raise InputError(f"{where}: {key} = {_shown(value)}; must be a section, [{key}]")
            if hint == ModelConfig:
                hint = _model_class(cast("dict[str, Any]", value), where)
            given[name] = _section(
                cast(type, hint), cast("dict[str, Any]", value), key + ".", source, sources
            )
        else:
            given[name] = _value(fields[name], hint, value, key, where)
    return cls(**given)


# Keys of BertConfig and ModernBertConfig that a recipe does not have, and why.
FIXED = {
    "model.hidden_act": 'it is "gelu", as in BERT',
    "model.hidden_activation": 'it is "gelu", as in ModernBERT',
    "model.classifier_activation": 'it is "gelu", as in ModernBERT',
    "model.layer_types": "model.global_attn_every_n_layers gives them",
    "model.rope_parameters": "model.global_rope_theta and model.local_rope_theta give them",
    "model.type_vocab_size": "it is 2, as in BERT",
    "model.position_embedding_type": 'it is "absolute", as in BERT',
    "model.vocab_size": "it is that of the dataset; `fastbert prepare --vocab-size` chooses it",
}


def _near(name: str, prefix: str, known: list[str]) -> str:
    if fixed := FIXED.get(prefix + name):
        return fixed
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    if near:
        return "did you mean " + " or ".join(prefix + n for n in near) + "?"
    return "known " + (f"in [{prefix[:-1]}]" if prefix else "at the top") + ": " + ", ".join(known)


def _value(spec: dataclasses.Field[Any], hint: Any, value: Any, key: str, where: str) -> Any:
    def wrong(what: str) -> InputError:
        return InputError(f"{where}: {key} = {_shown(value)}; must be {what}")

    if isinstance(hint, types.UnionType):
        # `int | None`: TOML has no null, so a value that is given is never None.
        hint = next(t for t in typing.get_args(hint) if t is not types.NoneType)
    if hint is bool:
        if not isinstance(value, bool):
            raise wrong("true or false")
        return value
    if hint is str:
        if not isinstance(value, str) or not value:
            raise wrong("a string that is not empty")
        if key in PATHS:
            try:
                value = os.path.expanduser(str(place(value)) if is_url(value) else value)
            except InputError as error:
                raise InputError(f"{where}: {key}: {error}") from None
        options = spec.metadata.get("options")
        if options and value not in options:
            raise wrong("one of " + ", ".join(options))
        return value
    if typing.get_origin(hint) is tuple:
        pair = cast("Sequence[Any]", value if isinstance(value, (list, tuple)) else ())
        if len(pair) != 2 or not all(_is_number(v) and 0 <= v < 1 for v in pair):
            raise wrong("two numbers of at least 0 and below 1")
        return tuple(float(v) for v in pair)
    if hint is int and (not isinstance(value, int) or isinstance(value, bool)):
        raise wrong("a whole number")
    if not _is_number(value) or not _is_finite(value):
        raise wrong("a number")
    low, high, above, unit = (spec.metadata[k] for k in ("low", "high", "above", "unit"))
    if value < low or value > high or (above and value == low):
        bound = f"above {low}" if above else f"{low} or more"
        bound += f" and {high} at most" if high != math.inf else ""
        raise wrong(bound + (f" ({unit})" if unit else ""))
    return hint(value)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}..."


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_finite(value: float | int) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond every float
        return False


def check_config(
    config: RunConfig, source: str, sources: Mapping[str, str] = types.MappingProxyType({})
) -> None:
    """Raise InputError for values that contradict each other.

    Args:
        config: the settings; each value is in its own range.
        source: the recipe, for messages.
        sources: where the keys come from that are not from `source`.
    """

    def where(key: str) -> str:
        return sources.get(key, source)

    model, objective, batch = config.model, config.objective, config.batch
    if model.hidden_size % model.num_attention_heads:
        raise InputError(
            f"{where('model.num_attention_heads')}: model.num_attention_heads = "
            f"{model.num_attention_heads} does not divide model.hidden_size = {model.hidden_size}"
        )
    if model.head_size % 8:
        raise InputError(
            f"{where('model.num_attention_heads')}: model.hidden_size / "
            f"model.num_attention_heads = {model.head_size}; must be a multiple of 8"
        )
    if batch.max_length > model.max_position_embeddings:
        raise InputError(
            f"{where('batch.max_length')}: batch.max_length = {batch.max_length} is more than "
            f"model.max_position_embeddings = {model.max_position_embeddings}; "
            "lower the one or raise the other"
        )
    if batch.micro_batch_tokens < batch.max_length:
        raise InputError(
            f"{where('batch.micro_batch_tokens')}: batch.micro_batch_tokens = "
            f"{batch.micro_batch_tokens} is less than batch.max_length = {batch.max_length}; "
            "the longest sequence must fit"
        )
    if objective.pairs and isinstance(model, ModernBertConfig):
        raise InputError(
            f"{where('objective.kind')}: objective.kind = {objective.kind!r} with "
            'model.type = "modernbert"; must be "mlm": ModernBERT has no token types to tell the '
            "sentences of a pair apart, and no head for pairs"
        )
    if objective.pairs and objective.segments == "windows":
        raise InputError(
            f'{where("objective.segments")}: objective.segments = "windows" with objective.kind = '
            f'"{objective.kind}"; windows have no pairs: set objective.kind = "mlm", or segments '
            'to "fill"'
        )
    if objective.mask_token + objective.random_token > 1:
        raise InputError(
            f"{where('objective.random_token')}: objective.mask_token + "
            f"objective.random_token = {objective.mask_token + objective.random_token:g}; "
            "must be 1 at most"
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
            f'{where("schedule.over")}: schedule.over = "{config.schedule.over}" needs {key}: '
            "the learning rate follows it to the end of the run"
        )
    if config.schedule.decay == "wsd" and config.schedule.warmup + config.schedule.cooldown > 1:
        raise InputError(
            f"{where('schedule.cooldown')}: schedule.warmup + schedule.cooldown = "
            f"{config.schedule.warmup + config.schedule.cooldown:g}; must be 1 at most"
        )
    if config.optimizer.name == "muon" and config.optimizer.momentum == 1:
        raise InputError(
            f"{where('optimizer.momentum')}: optimizer.momentum = 1 with "
            'optimizer.name = "muon"; must be below 1'
        )
    if config.runtime.recompute and config.runtime.cuda_graphs:
        raise InputError(
            f"{where('runtime.recompute')}: runtime.recompute = true does not go with "
            "runtime.cuda_graphs = true; set one of them to false"
        )
    if config.stop.min_delta and not config.stop.patience:
        raise InputError(
            f"{where('stop.min_delta')}: stop.min_delta = {config.stop.min_delta} "
            "needs stop.patience"
        )
