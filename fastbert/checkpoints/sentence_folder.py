"""What a sentence-transformers folder says about vectors: pooling, normalization, length."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastbert.errors import InputError
from fastbert.presence import is_file
from fastbert.regular_file import read_text

MODULES = "modules.json"
SENTENCES = "config_sentence_transformers.json"
_POOLS = ("mean", "max", "cls")
# Names of pooling in files of older releases: each is true or false there.
_OLDER = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


@dataclass(frozen=True)
class VectorSettings:
    """How a folder's author makes one vector of a text's hidden states.

    Attributes:
        pool: "mean", "max" or "cls".
        normalize: each vector is divided by its L2 norm.
        keeps_end: a text that is too long loses its beginning, and not its end.
        problem: what the folder asks for beyond that; None where there is nothing.
    """

    pool: str = "mean"
    normalize: bool = False
    keeps_end: bool = False
    problem: str | None = None


def read_vector_settings(folder: Path, lowercase: bool) -> VectorSettings:
    """Read modules.json and what it names, without which vectors are means, and the side to cut.

    Args:
        folder: a Hugging Face folder.
        lowercase: its tokenizer lower-cases texts.

    Raises:
        InputError: a file is not what sentence-transformers writes.
    """
    file = folder / MODULES
    settings = VectorSettings(keeps_end=_keeps_end(folder))
    if not is_file(file):
        return settings
    try:
        modules = [
            (str(module["type"]).rpartition(".")[2], str(module["path"]))
            for module in json.loads(read_text(file))
        ]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        raise InputError(f"{file}: no list of modules; download or save the model again") from None
    kinds = [kind for kind, _ in modules]
    settings = replace(settings, normalize="Normalize" in kinds)
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        return replace(settings, problem=f"{file}: the modules {', '.join(kinds)}")
    name = modules[1][1]
    if Path(name).name != name:
        raise InputError(f"{file}: {name!r} is no folder beside it")
    pooling = _read(folder / name / "config.json")
    pools = pooling.get("pooling_mode", [pool for key, pool in _OLDER.items() if pooling.get(key)])
    pools = pools if isinstance(pools, list) else [pools]
    problem = None
    if len(pools) != 1 or pools[0] not in _POOLS:
        problem = f"{folder / name / 'config.json'}: pooling by {', '.join(map(str, pools))}"
    elif prompt := _prompt(folder):
        problem = f"{folder}: the prompt {prompt!r} before each text"
    elif (kept := _read(folder / SENTENCES).get("truncate_dim")) is not None:
        problem = f"{folder / SENTENCES}: truncate_dim = {kept}, the first values of each vector,"
    elif _read(folder / "sentence_bert_config.json").get("do_lower_case") and not lowercase:
        problem = f"{folder}: lower-casing before a cased tokenizer"
    return replace(settings, pool=settings.pool if problem else pools[0], problem=problem)


def write_vector_settings(folder: Path, settings: VectorSettings, size: int, length: int) -> None:
    """Write the files that `read_vector_settings` reads, as sentence-transformers does.

    Args:
        folder: a Hugging Face folder.
        settings: without a problem.
        size: of a vector.
        length: the most tokens of a text.
    """
    modules = [("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize")]
    listed = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, path) in enumerate(modules[: 3 if settings.normalize else 2])
    ]
    chosen = {key: pool == settings.pool for key, pool in _OLDER.items() if pool in _POOLS}
    (folder / "1_Pooling").mkdir()
    for name, values in {
        MODULES: listed,
        "1_Pooling/config.json": {"word_embedding_dimension": size, **chosen},
        "sentence_bert_config.json": {"max_seq_length": length, "do_lower_case": False},
    }.items():
        (folder / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def read_max_length(folder: Path, positions: int) -> int:
    """The most tokens of a text that the folder is for: that of its tokenizer, or fewer.

    Args:
        folder: a Hugging Face folder.
        positions: the model's positions.
    """
    limits = [
        _read(folder / "tokenizer_config.json").get("model_max_length"),
        _read(folder / "sentence_bert_config.json").get("max_seq_length"),
    ]
    # transformers writes 1e30 where there is no limit.
    return min([positions, *(n for n in limits if type(n) is int and n > 3)])


def _keeps_end(folder: Path) -> bool:
    """Whether a tokenizer cuts the beginning of a text: what tokenizer.json says counts last."""
    side = _read(folder / "tokenizer_config.json").get("truncation_side")
    if side is None:
        truncation = _read(folder / "tokenizer.json").get("truncation")
        side = truncation.get("direction") if isinstance(truncation, dict) else None
    return isinstance(side, str) and side.lower() == "left"


def _prompt(folder: Path) -> str:
    config = _read(folder / SENTENCES)
    prompts, name = config.get("prompts"), config.get("default_prompt_name")
    return str(prompts.get(name, "")) if isinstance(prompts, dict) else ""


def _read(file: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is no such file."""
    if not is_file(file):
        return {}
    try:
        values = json.loads(read_text(file))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file}: cannot be read as JSON: {error}") from None
    if not isinstance(values, dict):
        raise InputError(f"{file}: not a JSON object")
    return values
