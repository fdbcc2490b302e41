"""What the settings beside a tokenizer.json change in it, as in transformers.

Some classes of transformers take only the vocabulary from tokenizer.json. BertTokenizer makes its
normalizer from do_lower_case, strip_accents and tokenize_chinese_chars, RobertaTokenizer its
pre-tokenizer from add_prefix_space, whatever the file says. Here a setting that is given wins too.
Where one is not given, and the default of the class contradicts the file, only the author can know
which of the two the model was trained with.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastbert.data.token_roles import CONFIG
from fastbert.errors import InputError
from fastbert.presence import is_file
from fastbert.regular_file import read_text

# For each part of tokenizer.json that such a class replaces: the classes, the types of model for
# which transformers chooses one of them, and its settings by their name in the file, with defaults.
_PARTS: list[tuple[str, str, set[str], set[str], dict[str, tuple[str, bool | None]]]] = [
    (
        "normalizer",
        "BertNormalizer",
        {"BertTokenizer", "DistilBertTokenizer", "ElectraTokenizer"},
        {"bert", "distilbert", "electra"},
        {
            "lowercase": ("do_lower_case", True),
            "strip_accents": ("strip_accents", None),
            "handle_chinese_chars": ("tokenize_chinese_chars", True),
        },
    ),
    (
        "pre_tokenizer",
        "ByteLevel",
        {"RobertaTokenizer", "GPT2Tokenizer"},
        {"roberta", "gpt2"},
        {"add_prefix_space": ("add_prefix_space", False)},
    ),
]


def apply_settings(tokenizer: dict[str, Any], config: dict[str, Any], file: Path) -> bool:
    """Change the content of a tokenizer.json as the class that transformers chooses would.

    Args:
        tokenizer: the content, which is changed.
        config: what the files beside it say, from `token_roles.read_settings`.
        file: where it came from.

    Returns:
        Whether something was changed.

    Raises:
        InputError: a setting has the wrong type, or the default of one that is not given
            contradicts the file.
    """
    name = config.get("tokenizer_class")
    name = name.removesuffix("Fast") if isinstance(name, str) else ""
    model_type = "" if name else _model_type(file.with_name("config.json"))
    changed = False
    for part, kind, classes, model_types, settings in _PARTS:
        found = tokenizer.get(part)
        if not isinstance(found, dict) or found.get("type") != kind:
            continue
        if name not in classes and model_type not in model_types:
            continue
        for key, (setting, default) in settings.items():
            there = found.get(key)
            wanted = config.get(setting, default)
            if type(wanted) is not bool and not (wanted is None and default is None):
                raise InputError(
                    f"{file.with_name(CONFIG)}: {setting} = {wanted!r:.40}; must be true or false"
                )
            if _meaning(found, key, wanted) == _meaning(found, key, there):
                continue
            if setting not in config:
                raise InputError(
                    f"{file}: {key} is {json.dumps(there)}, but {CONFIG} does not give {setting}, "
                    f"so transformers takes {json.dumps(default)}; write the one that the model "
                    f'was trained with: "{setting}": {json.dumps(there)} or {json.dumps(default)}'
                )
            found[key] = wanted
            changed = True
    return changed


def _meaning(part: dict[str, Any], key: str, value: bool | None) -> bool | None:
    """What a value stands for: without a choice accents go exactly where capitals do."""
    if key == "strip_accents" and value is None:
        return part.get("lowercase")
    return value


def _model_type(file: Path) -> str:
    """The type of the model beside a tokenizer; empty where none is given."""
    if not is_file(file):
        return ""
    try:
        config = json.loads(read_text(file))
    except (OSError, ValueError, RecursionError):
        return ""  # who loads the model says so
    found = config.get("model_type") if isinstance(config, dict) else None
    return found if isinstance(found, str) else ""
