"""Reads ds_config.json: DeepSpeed's own settings. Every setting there takes effect or is an error.

A user's own file is accepted. What it repeats of the recipe must agree with it. "auto", as in files
written for transformers, leaves a value to the recipe or, for one of DeepSpeed's own keys, to its
default. DeepSpeed accepts most keys and values in silence. Here a misspelt key is an error, and so
is a setting that would have no effect, or would break the training or its checkpoints.

ds_keys.py lists the keys and their values.
"""

from __future__ import annotations

import difflib
import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from fastbert.config import DEEPSPEED, RunConfig
from fastbert.errors import InputError
from fastbert.training.ds_keys import (
    COUNT,
    IDLE,
    NEEDS,
    NEVER,
    NOTHING,
    ONLY,
    OPTIMIZERS,
    OWN,
    RECIPE,
    SCHEDULERS,
    SECTIONS,
    WHOLE,
    Kind,
)

AUTO = "auto"


@dataclass(frozen=True)
class DeepSpeedSettings:
    """The checked content of the file.

    Attributes:
        path: the file.
        values: DeepSpeed's own keys, without those that are "auto" or null.
        precisions: settings that fit one precision alone, and that precision, such as
            {"bf16.enabled = true": "bf16"}.
        asked: runtime.precision and the recipe that has it, for messages.
    """

    path: str
    values: dict[str, Any]
    precisions: Mapping[str, str] = field(default_factory=dict)
    asked: str = "runtime.precision"

    def stage(self, *, precision: str, world: int, optimizer: str) -> int:
        """The ZeRO stage, 0 to 3.

        "auto" means 0 in fp32 on one process and for LAMB, where a higher stage gains nothing or is
        impossible, and 1 otherwise. On one CPU process, a model of 1M parameters costs 0.7 ms a
        step over plain torch at stage 0, about 5 ms at stages 1 and 2, and about 13 ms at stage 3
        (see engine.py).

        Args:
            precision: "fp32" or "bf16".
            world: number of ranks.
            optimizer: optimizer.name of the recipe.

        Raises:
            InputError: the file asks for another precision; or for bf16 with stage 0, where
                DeepSpeed applies zero gradients; or for LAMB with stages 1 to 3, whose flat
                partitions hide the matrices that LAMB takes norms of; or the groups of ranks that
                gather weights among themselves do not divide the world size.
        """
        for what, needed in self.precisions.items():
            if needed != precision:
                raise InputError(
                    f"{self.path}: {what} contradicts {self.asked}, which is {precision} here; "
                    f"make them equal, or remove it from {self.path}"
                )
        stage = self.values["zero_optimization"].get("stage", AUTO)
        if stage == AUTO:
            stage = 0 if optimizer == "lamb" or (precision == "fp32" and world == 1) else 1
        if stage == 0 and precision == "bf16":
            what = (
                'optimizer.name = "lamb" needs it, or runtime.precision = "fp32"'
                if optimizer == "lamb"
                else "set it to 1, 2, 3 or auto"
            )
            raise InputError(
                f"{self.path}: zero_optimization.stage = 0 does not train in bf16; {what}"
            )
        if stage > 0 and optimizer == "lamb":
            raise InputError(
                f"{self.path}: zero_optimization.stage = {stage} does not go with "
                'optimizer.name = "lamb"; set it to 0 or auto'
            )
        near = self.values["zero_optimization"].get("zero_hpz_partition_size", 1)
        if stage == 3 and COUNT.fits(near) and world % min(near, world):
            raise InputError(
                f"{self.path}: zero_optimization.zero_hpz_partition_size = {near} "
                f"does not divide the number of ranks, {world}"
            )
        return stage


class Answer(NamedTuple):
    """The recipe's value for one of DeepSpeed's keys.

    Attributes:
        place: the recipe's key.
        shown: its value, for messages.
        values: what DeepSpeed's key may be; empty where the two cannot be compared.
    """

    place: str
    shown: str
    values: tuple[Any, ...]


def read_ds_config(config: RunConfig, recipe: str) -> DeepSpeedSettings:
    """Read and check the file that runtime.deepspeed names, or else the packaged one.

    Args:
        config: the recipe.
        recipe: its path, for messages.

    Raises:
        InputError: the file is missing or not JSON; a key is unknown (similar ones are suggested);
            or a value contradicts the recipe (both places are named), asks for what fastbert does
            not do, or has the wrong type.
    """
    path = config.runtime.deepspeed or str(DEEPSPEED)
    values, answers = _load(path, recipe), _answers(config)

    def check(
        section: str, values: dict[str, Any], known: Mapping[str, Kind | None] | None
    ) -> None:
        for key, value in values.items():
            place = f"{section}.{key}" if section else key
            if known is not None and key not in known:
                raise InputError(f"{path}: unknown key '{place}'; {_suggest(key, section, known)}")
            if value is None or value == AUTO:
                continue
            if what := _objection(place, value, known[key] if known else None, answers, recipe):
                raise InputError(f"{path}: {place} = {_shown(value)}{what}")
            if isinstance(value, dict) and place not in IDLE:
                check(place, value, SECTIONS.get(place))

    check("", values, {**RECIPE, **OWN, **dict.fromkeys(IDLE)})
    values = _without_auto(values)
    own = {key: value for key, value in values.items() if key in OWN}
    asked = f"runtime.precision = {json.dumps(config.runtime.precision)} in {recipe}"
    return DeepSpeedSettings(path, {"zero_optimization": {}, **own}, _precisions(values), asked)


def _objection(
    place: str, value: Any, kind: Kind | None, answers: Mapping[str, Answer], recipe: str
) -> str | None:
    """What is wrong with a known key's value, as the end of a message that names both."""
    if place in IDLE:
        return (
            None
            if _asks_for_nothing(place, value)
            else " is not for fastbert, which does nothing of the kind; remove it"
        )
    if place in NEVER:
        return f" does not work with fastbert: {NEVER[place]}; remove it"
    if kind is not None and not kind.fits(value):
        return f"; must be {kind.words}"
    if place in ONLY and not _among(value, ONLY[place][0]):
        good, why = ONLY[place]
        return f"; must be {' or '.join(map(json.dumps, good))}: {why}"
    if place in answers and not _among(value, answers[place].values):
        there = answers[place]
        if there.values:
            return (
                f" contradicts {there.place} = {there.shown} in {recipe}; "
                'make them equal, or write "auto"'
            )
        return (
            f" has no equal in {recipe}, where {there.place} = {there.shown}; "
            'remove it, or write "auto"'
        )
    if place in NEEDS and value is True and importlib.util.find_spec(NEEDS[place]) is None:
        return f" needs a package: pip install {NEEDS[place]}, or remove it"
    if place == "zero_optimization.allgather_bucket_size" and WHOLE.fits(value) and value % 2:
        return "; must be even"
    if place == "zero_optimization.stage" and not _among(value, (0, 1, 2, 3)):
        return '; must be 0, 1, 2, 3 or "auto"'
    return None


def _load(path: str, recipe: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        if twice := sorted({key for key in keys if keys.count(key) > 1}):
            raise InputError(f"{path}: key '{twice[0]}' is there twice; remove one")
        return dict(pairs)

    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=unique)
    except FileNotFoundError:
        raise InputError(
            f"{recipe}: runtime.deepspeed = {path!r}: no such file; "
            "without this key fastbert uses its own settings"
        ) from None
    except OSError as error:
        raise InputError(
            f"{recipe}: runtime.deepspeed = {path!r}: cannot be read: {error.strerror}"
        ) from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: must be a JSON object, such as {{}}")
    return values


def _answers(config: RunConfig) -> dict[str, Answer]:
    """The recipe's values for those of DeepSpeed's keys that the recipe decides."""
    optimizer, schedule = config.optimizer, config.schedule

    def answer(place: str, *values: Any) -> Answer:
        section, _, name = place.partition(".")
        there = getattr(getattr(config, section), name)
        return Answer(
            place, "(not set)" if there is None else json.dumps(there), values or (there,)
        )

    steps = config.stop.steps if schedule.over == "steps" else None
    warmup = answer("schedule.warmup", round(schedule.warmup * (steps or 0)))
    if steps:
        warmup = warmup._replace(
            shown=f"{warmup.shown} of stop.steps = {steps}, {warmup.values[0]} steps,"
        )
    else:
        warmup = warmup._replace(shown=f"{warmup.shown} of the run", values=())
    packs = answer("batch.micro_batch_tokens")
    packs = packs._replace(shown=f"{packs.shown}, tokens instead of sequences", values=())
    return {
        "train_batch_size": answer("batch.sequences"),
        "train_micro_batch_size_per_gpu": packs,
        "gradient_accumulation_steps": packs,
        "gradient_clipping": answer("optimizer.max_grad_norm"),
        "zero_allow_untested_optimizer": answer(
            "optimizer.name", *((True, False) if optimizer.name == "adamw" else (True,))
        ),
        "optimizer.type": answer("optimizer.name", *OPTIMIZERS[optimizer.name]),
        "optimizer.params.lr": answer("optimizer.lr"),
        "optimizer.params.betas": answer("optimizer.betas", list(optimizer.betas)),
        "optimizer.params.eps": answer("optimizer.eps"),
        "optimizer.params.weight_decay": answer("optimizer.weight_decay"),
        "optimizer.params.momentum": answer("optimizer.momentum"),
        "optimizer.params.max_grad_norm": answer("optimizer.max_grad_norm"),
        "scheduler.type": answer("schedule.decay", SCHEDULERS[schedule.decay]),
        "scheduler.params.warmup_max_lr": answer("optimizer.lr"),
        "scheduler.params.warmup_num_steps": warmup,
        "scheduler.params.total_num_steps": answer("stop.steps"),
    }


def _precisions(values: dict[str, Any]) -> dict[str, str]:
    """Settings that fit one precision alone: the switch of bf16, and dtypes."""
    found = {}
    for key in ("bf16", "bfloat16"):
        enabled = values.get(key, {}).get("enabled")
        if enabled is not None:
            found[f"{key}.enabled = {json.dumps(enabled)}"] = "bf16" if enabled else "fp32"
    types = values.get("data_types", {})
    for key in ("param_dtype", "grad_accum_dtype"):
        # Gradients may be summed in fp32 at any precision, since a sum may be more exact than its
        # terms.
        if key in types and (key, types[key]) != ("grad_accum_dtype", "fp32"):
            found[f"data_types.{key} = {json.dumps(types[key])}"] = types[key]
    return found


def _without_auto(value: Any) -> Any:
    """Remove what is "auto" or null, at any depth."""
    if isinstance(value, dict):
        return {
            key: _without_auto(item)
            for key, item in value.items()
            if item != AUTO and item is not None
        }
    return value


def _asks_for_nothing(place: str, value: Any) -> bool:
    if isinstance(value, dict):
        return value.get("enabled") is False or all(
            item in (None, False, AUTO) for item in value.values()
        )
    return value is False or (place in NOTHING and _among(value, (NOTHING[place],)))


def _among(value: Any, values: Sequence[Any]) -> bool:
    """Whether the value equals one of the others; unlike in Python, true is not 1."""
    return any(
        isinstance(value, bool) == isinstance(other, bool) and value == other for other in values
    )


def _suggest(key: str, section: str, known: Mapping[str, Any]) -> str:
    """Similar known keys; all known keys where none is similar."""
    inside = f"{section}." if section else ""
    near = difflib.get_close_matches(key, known, n=3, cutoff=0.6)
    if near:
        return "did you mean " + " or ".join(inside + name for name in near) + "?"
    return f"known{f' in {section}' if section else ''}: " + ", ".join(
        sorted(name for name in known if section or name not in IDLE)
    )


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
