"""Reads a recipe and overrides as a `RunConfig`, and checks them.

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
import re
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from fastbert.config import (
    MODELS,
    MUON_MOMENTUM,
    SIZE_UNITS,
    ModelConfig,
    ModernBertConfig,
    PhaseConfig,
    RunConfig,
    SourceConfig,
    Weights,
    settings_of,
    size_of,
)
from fastbert.errors import InputError
from fastbert.nesting import MOST, is_too_deep
from fastbert.recipe_checks import check_config
from fastbert.regular_file import read_text
from fastbert.storage import Place, as_text, expanded, is_url, place, read

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PATHS = ("data", "run", "init", "branch_from", "runtime.deepspeed")  # may hold ~ and variables
PACKAGED = Path(__file__).parent / "recipes"  # the recipes that fastbert brings along
DEEPSPEED = PACKAGED / "ds_config.json"  # DeepSpeed's settings where a recipe names no file
COMMAND_LINE = "command line"  # in messages: where a value came from
OVERRIDES = "overrides"
LONGEST_VALUE = 80  # characters of a wrong value that a message shows
LONGEST_RECIPE = 1 << 20  # characters; 10,000 datasets have room in it
# A dotted key of more parts than that; the memory that the parser takes for one grows with their
# square. Keys of a recipe have three parts at most.
_PART = r"""(?:[\w-]+|"[^"\n]*"|'[^'\n]*')[ \t]*\.[ \t]*"""
_LONG_KEY = re.compile(rf"(?<![\w-])(?:{_PART}){{{MOST}}}")
_BARE_POINT = re.compile(r"[+-]?(\.\d+|\d+\.)([eE][+-]?\d+)?")
SIZE_POWER = re.compile(r"size\^(\d+|\d*\.\d+)")  # of the key `weights`


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
    branch_from: str | None = None,
) -> RunConfig:
    """Read a recipe and apply overrides, which win.

    Args:
        recipe: a path, the name of a packaged recipe (see `find_recipe`), or the recipe's tables.
        overrides: `section.key=value` lines as on the command line, with values in TOML; or a
            mapping. Its keys may be dotted, its values may be tables, and None removes a key of the
            recipe, so that the default applies.
        branch_from: sets the key of this name.

    Raises:
        InputError: a file that cannot be read, TOML that cannot be parsed, an unknown key (similar
            ones are listed), a value of the wrong type or out of range, or values that contradict
            each other.
    """
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    if isinstance(recipe, Mapping):
        source = "recipe"
        check_nesting(recipe, source)
        _merge(values, recipe, "", source, sources)
    else:
        source = str(recipe)
        values = _read(place(source) if is_url(source) else find_recipe(recipe), source)
    if isinstance(overrides, Mapping):
        check_nesting(overrides, OVERRIDES)
        _merge(values, overrides, "", OVERRIDES, sources)
    else:
        for override in overrides:
            _apply(values, override, sources)
    if branch_from is not None:
        _set(values, "branch_from", branch_from, "--branch-from", sources)
    return _build(values, source, sources)


def _read(at: Place, name: str) -> dict[str, Any]:
    """The tables of a TOML file; `name` is the one to show in messages."""
    try:
        text = read_text(at) if isinstance(at, Path) else read(at).decode()
    except OSError as error:
        raise InputError(f"{name}: cannot be read as a recipe: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{name}: not UTF-8 ({error}); save it as UTF-8") from None
    return _parse(text, name)


def _parse(text: str, name: str) -> dict[str, Any]:
    """The tables of TOML; `name` is the file to show in messages."""
    if len(text) > LONGEST_RECIPE:
        raise InputError(
            f"{name}: {len(text):,} characters, and a recipe has {LONGEST_RECIPE:,} at most; give "
            "the file of a recipe"
        )
    _check_keys(text, name)
    try:
        values = tomllib.loads(text)
    except ValueError as error:  # also for a number of 5,000 digits
        raise InputError(f"{name}: not valid TOML: {error}") from None
    except RecursionError:
        raise _too_deep(name) from None
    check_nesting(values, name)
    return values


def _check_keys(text: str, name: str) -> None:
    """Raise InputError where a key has more parts than the parser can take."""
    if found := _LONG_KEY.search(text):
        raise InputError(
            f"{name}: the key {found[0][:40]}... has more than {MOST} parts; keys of a recipe "
            "have three at most, such as model.hidden_size"
        )


def check_nesting(values: Any, name: str) -> None:
    """Raise InputError where values are nested more deeply than in any recipe."""
    if is_too_deep(values):
        raise _too_deep(name)


def _too_deep(name: str) -> InputError:
    return InputError(
        f"{name}: values are nested in more than {MOST} levels; a recipe has tables, and lists of "
        "tables"
    )


def parse_config(text: str, source: str) -> RunConfig:
    """Read a recipe from a string; `source` is where it is from, for messages."""
    return _build(_parse(text, source), source, {})


def dump_config(config: RunConfig) -> str:
    """The settings as TOML. `parse_config` makes the same RunConfig of it again."""
    return "\n\n".join(_tables(config, "")) + "\n"


def _tables(section: Any, name: str) -> list[str]:
    """A section as TOML: its own lines, then its sections, then its lists of sections."""
    lines: list[str] = []
    tables: list[str] = []
    for item in settings_of(section):
        value, key = getattr(section, item.name), f"{name}{item.name}"
        if dataclasses.is_dataclass(value):
            own, *others = _tables(value, f"{key}.")
            tables += [f"[{key}]\n{own}" if own else "", *others]
        elif item.name == "phase":
            for phase in value:
                own, *others = _tables(phase, f"{key}.")
                tables += [f"[[{key}]]\n{own}".rstrip(), *others]
        elif value is not None:
            lines.append(f"{item.name} = {toml_value(value)}")
    return ["\n".join(lines), *filter(None, tables)]


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
    if dataclasses.is_dataclass(value):
        items = [(f.name, getattr(value, f.name)) for f in dataclasses.fields(value)]
        given = [f"{name} = {toml_value(v)}" for name, v in items if v is not None]
        return "{" + ", ".join(given) + "}"
    if isinstance(value, tuple):
        return "[" + ", ".join(toml_value(v) for v in cast("tuple[Any, ...]", value)) + "]"
    return repr(value)


def _apply(values: dict[str, Any], override: str, sources: dict[str, str]) -> None:
    """Apply one `key=value` of the command line."""
    _check_keys(override, COMMAND_LINE)
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key:
        raise InputError(
            f"{COMMAND_LINE}: {_shown(override)} is not key=value; "
            "write for example batch.sequences=64"
        )
    try:
        value, *others = tomllib.loads(f"value = {text}").values()
    except ValueError:
        value = text.strip()  # a bare word: run=runs/demo needs no quotes
        others = value.splitlines()[1:]
    except RecursionError:
        raise _too_deep(f"{COMMAND_LINE}: {key}") from None
    if others:
        raise InputError(
            f"{COMMAND_LINE}: {_shown(override)} has several lines; give each setting as an "
            "argument of its own"
        )
    check_nesting(value, f"{COMMAND_LINE}: {key}")
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
            _set(values, key, plain(value), origin, sources)


def plain(value: Any) -> Any:
    """The value as TOML would give it: paths as text, and numbers of NumPy as Python's own."""
    if isinstance(value, os.PathLike):
        return os.fspath(cast("os.PathLike[str]", value))
    if isinstance(value, bool) or type(value).__name__ in ("bool", "bool_"):  # NumPy's
        return bool(value)
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    if isinstance(value, Mapping):  # in a list, such as a source of a mixture
        tables = cast("Mapping[Any, Any]", value)
        return {name: plain(v) for name, v in tables.items() if v is not None}
    if isinstance(value, list | tuple):
        return [plain(item) for item in cast("Sequence[Any]", value)]
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
        if hint == ModelConfig and isinstance(value, dict):
            hint = _model_class(cast("dict[str, Any]", value), where)
        section, listed = _section_class(hint)
        if listed and isinstance(value, list):
            given[name] = _list(cast(type, section), cast("list[Any]", value), key, where)
        elif section and not listed:
            if not isinstance(value, dict):
                raise InputError(f"{where}: {key} = {_shown(value)}; must be a section, [{key}]")
            given[name] = _section(
                section, cast("dict[str, Any]", value), key + ".", source, sources
            )
        elif hint == tuple[PhaseConfig, ...]:
            raise InputError(
                f"{where}: {key} = {_shown(value)}; must be a list of tables, [[{key}]]"
            )
        elif hint == Weights | None:
            given[name] = _weights(value, key, where)
        else:
            given[name] = _value(fields[name], hint, value, key, where)
    return cls(**given)


def _section_class(hint: Any) -> tuple[type | None, bool]:
    """The class of the tables that a key may have, and whether it has a list of them."""
    if hint == ModelConfig:
        return cast(type, hint), False
    for kind in (hint, *typing.get_args(hint)):
        if dataclasses.is_dataclass(kind):
            return cast(type, kind), typing.get_origin(hint) is tuple
        if typing.get_origin(kind) is tuple and dataclasses.is_dataclass(typing.get_args(kind)[0]):
            return typing.get_args(kind)[0], True
    return None, False


def _list(cls: type, tables: list[Any], key: str, where: str) -> tuple[Any, ...]:
    """Read a list of tables, such as [[phase]]; messages name the first one "phase 1"."""
    found = []
    for number, table in enumerate(tables, 1):
        if not isinstance(table, dict):
            example = ', such as {path = "data/my"}' if cls is SourceConfig else ""
            raise InputError(f"{where}: {key} {number} = {_shown(table)}; must be a table{example}")
        values = cast("dict[str, Any]", table)
        if cls is SourceConfig and "path" not in values:
            raise InputError(f"{where}: {key} {number}: path is missing; name the dataset's folder")
        found.append(_section(cls, values, f"{key} {number}: ", where, {}))
    return tuple(found)


def _weights(value: Any, key: str, where: str) -> Weights:
    """Read "size^0.7", or a number for each source."""
    if isinstance(value, (list, tuple)):
        numbers_ = cast("Sequence[Any]", value)
        if numbers_ and all(_is_number(v) and _is_finite(v) and v >= 0 for v in numbers_):
            return tuple(float(v) for v in numbers_)
    if isinstance(value, str) and (found := SIZE_POWER.fullmatch(value)) and float(found[1]) <= 1:
        return value
    raise InputError(
        f'{where}: {key} = {_shown(value)}; must be "size^E" with E from 0 to 1, such as '
        '"size^0.7", or a list with a number of 0 or more for each source'
    )


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
    shown = _shown(value)

    def wrong(what: str) -> InputError:
        return InputError(f"{where}: {key} = {shown}; must be {what}")

    if isinstance(hint, types.UnionType):
        # `int | None`: TOML has no null, so a value that is given is never None.
        # And a list of sources has been read by `_list`.
        hint = next(t for t in typing.get_args(hint) if t is not types.NoneType)
    if hint is bool:
        if not isinstance(value, bool):
            raise wrong("true or false")
        return value
    if hint is str:
        if not isinstance(value, str) or not value:
            or_list = ", or a list of tables with a path each" if key == "data" else ""
            raise wrong("a string that is not empty" + or_list)
        if key in PATHS or spec.name == "path":
            try:
                value = expanded(as_text(value))
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
    if spec.metadata.get("is_size") and isinstance(value, str):
        value = size_of(value)
        if value is None:
            raise wrong(f'bytes, or a number with a unit ({", ".join(SIZE_UNITS)}): "4 GiB"')
    if hint is int and (not isinstance(value, int) or isinstance(value, bool)):
        whole = isinstance(value, float) and value.is_integer()
        raise wrong(f"a whole number, {int(value)}" if whole else "a whole number")
    if not _is_number(value) or not _is_finite(value):
        # Of a number, TOML needs a digit on both sides of the point.
        bare = isinstance(value, str) and _BARE_POINT.fullmatch(value)
        raise wrong("a number, with a digit before and behind the point" if bare else "a number")
    low, high, above, unit = (spec.metadata[k] for k in ("low", "high", "above", "unit"))
    if value < low or value > high or (above and value == low):
        bound = f"above {low}" if above else f"{low} or more"
        bound += f" and {high} at most" if high != math.inf else ""
        raise wrong(bound + (f" ({unit})" if unit else ""))
    return hint(value)


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python writes no whole number of more than 4,300 digits
        return "a value with thousands of digits"
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}..."


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_finite(value: float | int) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond every float
        return False
