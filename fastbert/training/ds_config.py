"""Reads ds_config.json: DeepSpeed's own settings. Every setting there takes effect or is an error.

A user's own file is accepted. What the recipe decides is left out there, or is "auto", as in files
written for transformers; "auto" gives one of DeepSpeed's own keys its default. DeepSpeed accepts
most keys and values in silence. Here a misspelt key is an error, and so is a setting that would
have no effect, or would break the training or its checkpoints. One message has all of them.

ds_keys.py lists the keys and their values.
"""

from __future__ import annotations

import difflib
import importlib.util
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fastbert.config import RunConfig
from fastbert.errors import InputError
from fastbert.nesting import MOST, is_too_deep
from fastbert.recipe import DEEPSPEED
from fastbert.regular_file import read_text
from fastbert.training.ds_keys import (
    COUNT,
    NEEDS,
    NEVER,
    NOTHING,
    ONLY,
    OWN,
    RECIPE,
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
            {"data_types.param_dtype = \"bf16\"": "bf16"}.
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
                partitions hide the matrices that LAMB takes norms of; or for Muon or StableAdamW
                with stage 3, which divides every matrix among all ranks; or the groups of ranks
                that gather weights among themselves do not divide the world size.
        """
        for what, needed in self.precisions.items():
            if needed != precision:
                raise InputError(
                    f"{self.path}: {what} contradicts {self.asked}, which keeps the weights in "
                    f"{precision} here; make them equal, or remove it from {self.path}"
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
        check_optimizer(f"{self.path}: zero_optimization.stage = {stage}", stage, optimizer)
        near = self.values["zero_optimization"].get("zero_hpz_partition_size", 1)
        if stage == 3 and COUNT.fits(near) and world % min(near, world):
            raise InputError(
                f"{self.path}: zero_optimization.zero_hpz_partition_size = {near} "
                f"does not divide the number of ranks, {world}"
            )
        return stage


def check_optimizer(setting: str, stage: int, optimizer: str) -> None:
    """Raise InputError where an optimizer does not work at a ZeRO stage; `setting` begins it."""
    stages = {"lamb": (0,), "muon": (0, 1, 2), "stable_adamw": (0, 1, 2)}.get(
        optimizer, (0, 1, 2, 3)
    )
    if stage not in stages:
        raise InputError(
            f'{setting} does not go with optimizer.name = "{optimizer}"; '
            f"set it to {', '.join(map(str, stages))} or auto"
        )


def read_ds_config(config: RunConfig, recipe: str) -> DeepSpeedSettings:
    """Read and check the file that runtime.deepspeed names, or else the packaged one.

    Args:
        config: the recipe.
        recipe: its path, for messages.

    Raises:
        InputError: the file is missing or not JSON; a key is unknown (similar ones are suggested);
            or a value is for the recipe to decide (its key is named), asks for what fastbert does
            not do, or has the wrong type. All of these are in one line.
    """
    settings, problems = find_problems(config.runtime.deepspeed or str(DEEPSPEED), recipe)
    if problems:
        raise InputError(f"{settings.path}: {in_one_line(problems)}")
    asked = f"runtime.precision = {json.dumps(config.runtime.precision)} in {recipe}"
    return replace(settings, asked=asked)


def find_problems(path: str, recipe: str) -> tuple[DeepSpeedSettings, dict[str, str]]:
    """Read a file.

    Returns:
        Its settings, and what is wrong with each key that is for the recipe to decide, or that
        fastbert refuses. DeepSpeed's own checks are `objections` in engine.py.

    Raises:
        InputError: the file is missing or not JSON.
    """
    values = _load(path, recipe)
    own = {key: value for key, value in _without_auto(values).items() if key in OWN}
    settings = DeepSpeedSettings(path, {"zero_optimization": {}, **own}, _precisions(own))
    return settings, dict(_problems("", values, OWN, recipe))


def in_one_line(problems: Mapping[str, str]) -> str:
    """The problems, numbered if there are several."""
    if len(problems) == 1:
        return next(iter(problems.values()))
    return "; ".join(f"({i}) {problem}" for i, problem in enumerate(problems.values(), 1))


def _problems(
    section: str, values: dict[str, Any], known: Mapping[str, Kind] | None, recipe: str
) -> Iterator[tuple[str, str]]:
    """Keys of a section, and what is wrong with each; `known` None permits any key."""
    for key, value in values.items():
        place = f"{section}.{key}" if section else key
        if known is not None and key not in known:
            if section or not _asks_for_nothing(key, value):
                yield place, _not_ours(place, value, known, recipe)
        elif value is None or value == AUTO:
            continue
        elif what := _objection(place, value, known[key] if known else None):
            yield place, f"{place} = {_shown(value)}{what}"
        elif isinstance(value, dict):
            yield from _problems(place, value, SECTIONS.get(place), recipe)


def _not_ours(place: str, value: Any, known: Mapping[str, Kind], recipe: str) -> str:
    """What is wrong with a key that DeepSpeed does not get."""
    section, _, key = place.rpartition(".")
    if place in RECIPE:
        return (
            f"{place} = {_shown(value)}: set by {RECIPE[place]} in {recipe}; "
            'remove it here, or write "auto"'
        )
    near = difflib.get_close_matches(key, known if section else [*known, *RECIPE], n=3, cutoff=0.6)
    if near:
        hint = "did you mean " + " or ".join(f"{section}.{n}" if section else n for n in near) + "?"
    else:
        hint = f"known{f' in {section}' if section else ''}: " + ", ".join(sorted(known))
    return f"{place} = {_shown(value)} is no setting of fastbert; remove it; {hint}"


def _objection(place: str, value: Any, kind: Kind | None) -> str | None:
    """What is wrong with the value of one of DeepSpeed's keys, as the end of a message."""
    if place in NEVER:
        return f" does not work with fastbert: {NEVER[place]}; remove it"
    if kind is not None and not kind.fits(value):
        return f"; must be {kind.words}"
    if place in ONLY and not _among(value, ONLY[place][0]):
        good, why = ONLY[place]
        return f"; must be {' or '.join(map(json.dumps, good))}: {why}"
    if place in NEEDS and value is True and importlib.util.find_spec(NEEDS[place]) is None:
        return f" needs a package: pip install {NEEDS[place]}, or remove it"
    if place == "zero_optimization.allgather_bucket_size" and WHOLE.fits(value) and value % 2:
        return "; must be even"
    if place == "zero_optimization.stage" and not _among(value, (0, 1, 2, 3)):
        return '; must be 0, 1, 2, 3 or "auto"'
    return None


def _load(path: str, recipe: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            counts = Counter(key for key, _ in pairs)
            twice = min(key for key, count in counts.items() if count > 1)
            raise InputError(f"{path}: key '{twice}' is there twice; remove one")
        return values

    try:
        values = json.loads(read_text(path), object_pairs_hook=unique)
    except FileNotFoundError:
        raise InputError(
            f"{recipe}: runtime.deepspeed = {path!r}: no such file; "
            "without this key fastbert uses its own settings"
        ) from None
    except OSError as error:
        raise InputError(
            f"{recipe}: runtime.deepspeed = {path!r}: cannot be read: {error.strerror}"
        ) from None
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON: {error}") from None
    except RecursionError:
        raise _too_deep(path) from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: must be a JSON object, such as {{}}")
    if is_too_deep(values):
        raise _too_deep(path)
    return values


def _too_deep(path: str) -> InputError:
    return InputError(
        f"{path}: values are nested in more than {MOST} levels; DeepSpeed's settings have four"
    )


def _precisions(own: dict[str, Any]) -> dict[str, str]:
    """Settings that fit one precision alone."""
    types = own.get("data_types", {})
    return {
        f"data_types.{key} = {json.dumps(types[key])}": types[key]
        for key in ("param_dtype", "grad_accum_dtype")
        # Gradients may be summed in fp32 at any precision, since a sum may be more exact than its
        # terms.
        if key in types and (key, types[key]) != ("grad_accum_dtype", "fp32")
    }


def _without_auto(value: Any) -> Any:
    """Remove what is "auto" or null, at any depth."""
    if isinstance(value, dict):
        return {
            key: _without_auto(item)
            for key, item in value.items()
            if item != AUTO and item is not None
        }
    return value


def _asks_for_nothing(key: str, value: Any) -> bool:
    """Whether a key that DeepSpeed does not get may be there all the same, since it is off."""
    if isinstance(value, dict):
        switch = value.get("enabled")
        return _off(switch) if switch is not None else all(map(_off, _leaves(value)))
    return _off(value) or (key in NOTHING and _among(value, (NOTHING[key],)))


def _off(value: Any) -> bool:
    return value is None or value is False or value == AUTO


def _leaves(value: Any) -> Iterator[Any]:
    """The values of an object and of the objects in it."""
    for item in value.values():
        yield from _leaves(item) if isinstance(item, dict) else [item]


def _among(value: Any, values: Sequence[Any]) -> bool:
    """Whether the value equals one of the others; unlike in Python, true is not 1."""
    return any(
        isinstance(value, bool) == isinstance(other, bool) and value == other for other in values
    )


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
