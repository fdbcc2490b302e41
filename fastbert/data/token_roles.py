"""Which token of a tokenizer.json begins a text, ends it, masks, pads, or means "unknown".

transformers writes the names into tokenizer_config.json (in older folders also
special_tokens_map.json), and the post-processor names the two that frame a text. Once loaded, a
tokenizer carries them in its own post-processor: the template has entries that it does not use,
under the names of the roles, so that a copy in another process knows them too. A BERT tokenizer has
no such entries, because its five tokens always have the same names.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from fastbert.errors import InputError
from fastbert.presence import is_file
from fastbert.regular_file import read_text

BERT_TOKENS = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
CONFIG, OLD_MAP = "tokenizer_config.json", "special_tokens_map.json"
_EXTRA = "extra_special_tokens"  # the entry that lists which of the other added tokens are special
# What takes a missing token's place: models without a class token begin a text with bos.
_INSTEAD = {"cls": "bos", "sep": "eos"}


@dataclass(frozen=True)
class TokenRoles:
    """Which token has which role."""

    # The token of each role: pad, cls, sep and mask, and unk where the tokenizer has one. A
    # byte-level tokenizer needs none. cls and sep may be the same token.
    names: dict[str, str]
    # The other tokens that are marked as special, such as the marks of entities.
    extra_special: tuple[str, ...] = ()


def read_settings(folder: Path) -> dict[str, Any]:
    """Return what the files beside a tokenizer.json say, as transformers reads them.

    Raises:
        InputError: a file is no JSON object.
    """
    settings = read_object(folder / CONFIG)
    # transformers ignores the older file where the newer one lists the added tokens.
    if "added_tokens_decoder" not in settings:
        settings = settings | read_object(folder / OLD_MAP)
    return settings


def read_object(file: Path) -> dict[str, Any]:
    """Return the settings in a file, none where there is no file; raises InputError."""
    if not is_file(file):
        return {}
    try:
        values = json.loads(read_text(file))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"{file}: cannot be read as a tokenizer's settings: {error}; correct or remove it"
        ) from None
    if not isinstance(values, dict):
        raise InputError(f"{file}: not a JSON object of a tokenizer's settings; correct it")
    return values


def named_tokens(settings: dict[str, Any]) -> dict[str, AddedToken]:
    """Return the tokens that have a name in the settings, such as "mask_token", by this name.

    Raises:
        ValueError, TypeError: a name does not stand for a token.
    """
    return {
        key: _token(value)
        for key, value in settings.items()
        if key.endswith("_token") and isinstance(value, (str, dict))
    }


def listed_tokens(settings: dict[str, Any]) -> list[AddedToken]:
    """Return the tokens that the settings list by id, and then those without a name of their own.

    Raises:
        ValueError, TypeError, AttributeError: a list is not as transformers writes it.
    """
    by_id = settings.get("added_tokens_decoder") or {}
    found = [_token(token) for _, token in sorted(by_id.items(), key=lambda item: int(item[0]))]
    for key in ("additional_special_tokens", _EXTRA):
        listed = settings.get(key) or []
        # In an object each token has a name of its own.
        found += map(_token, listed.values() if isinstance(listed, dict) else listed)
    return found


def _token(value: Any) -> AddedToken:
    """Return a token of the settings; a bare string is a special token."""
    entry = {"content": value, "special": True} if isinstance(value, str) else dict(value)
    flags = {
        name: entry[name]
        for name in ("single_word", "lstrip", "rstrip", "normalized", "special")
        if name in entry
    }
    content = entry.get("content")
    if not isinstance(content, str) or not content:
        raise ValueError(f"{value!r:.60} is not a token")
    return AddedToken(content, **{"special": True, **flags})


def find_roles(settings: dict[str, Any], tokenizer: dict[str, Any], file: Path) -> TokenRoles:
    """Return the roles that the settings, the post-processor and the model name.

    A role that none of them names goes to BERT's token for it where the vocabulary has this one.

    Args:
        settings: from `read_settings`.
        tokenizer: the content of tokenizer.json, in which all tokens are.
        file: its path, for the error.

    Raises:
        InputError: no token to mask, pad, begin or end with, or one token with two of these roles.
    """
    named = {key[: -len("_token")]: token.content for key, token in named_tokens(settings).items()}
    model, added = tokenizer["model"], tokenizer["added_tokens"]
    vocabulary = {token["content"] for token in added} | _vocabulary(model)
    found = {**_unknown(model), **_frame(tokenizer.get("post_processor")), **named}
    names: dict[str, str] = {}
    for role, usual in BERT_TOKENS.items():
        name = found.get(role) or found.get(_INSTEAD.get(role, role))
        if name is None and usual in vocabulary:
            name = usual
        if name is not None:
            names[role] = name
    missing = [f"{role}_token" for role in BERT_TOKENS if role not in names and role != "unk"]
    if missing:
        example = ", ".join(f'"{name}": "[{name[:-6].upper()}]"' for name in missing)
        raise InputError(
            f"{file}: no {', '.join(missing)}, which training on masked text needs; add with "
            f"transformers: tokenizer.add_special_tokens({{{example}}}), then save_pretrained"
        )
    for role in BERT_TOKENS:
        if role != "mask" and names.get(role) == names["mask"]:
            raise InputError(
                f"{file}: {names['mask']!r} is both mask_token and {role}_token; "
                "give the mask a token of its own"
            )
    extra = tuple(
        token["content"]
        for token in added
        if token["special"] and token["content"] not in names.values()
    )
    return TokenRoles(names, extra)


def _vocabulary(model: dict[str, Any]) -> set[str]:
    vocabulary = model["vocab"]  # of Unigram a list of pairs, else an object
    return set(vocabulary) if isinstance(vocabulary, dict) else {entry[0] for entry in vocabulary}


def _unknown(model: dict[str, Any]) -> dict[str, str]:
    """Return what the model itself takes for a piece that it does not know."""
    if model.get("unk_token") is not None:
        return {"unk": model["unk_token"]}
    if model["type"] == "Unigram" and model.get("unk_id") is not None:
        return {"unk": model["vocab"][model["unk_id"]][0]}
    return {}


def _frame(processor: dict[str, Any] | None) -> dict[str, str]:
    """Return the tokens that a post-processor puts before and after a single text."""
    if processor is None:
        return {}
    if processor["type"] == "Sequence":
        found: dict[str, str] = {}
        for part in processor["processors"]:
            found |= _frame(part)
        return found
    if processor["type"] in ("BertProcessing", "RobertaProcessing"):
        return {role: processor[role][0] for role in ("cls", "sep")}
    if processor["type"] != "TemplateProcessing":
        return {}
    pieces, tokens = processor["single"], processor["special_tokens"]
    text = next(i for i, piece in enumerate(pieces) if "Sequence" in piece)
    first, last = pieces[0], pieces[-1]
    found = {}
    if text > 0:
        found["cls"] = tokens[first["SpecialToken"]["id"]]["tokens"][0]
    if text < len(pieces) - 1:
        found["sep"] = tokens[last["SpecialToken"]["id"]]["tokens"][-1]
    return found


def template(roles: TokenRoles, ids: dict[str, int], with_roles: bool) -> dict[str, Any]:
    """Return the post-processor: cls A sep, or cls A sep B sep, as our examples are made.

    Args:
        roles: of the tokenizer.
        ids: of all tokens.
        with_roles: whether it carries the roles, as in memory; a file has them in CONFIG.
    """
    cls, sep = roles.names["cls"], roles.names["sep"]

    def special(token: str, kind: int) -> dict[str, Any]:
        return {"SpecialToken": {"id": token, "type_id": kind}}

    def text(name: str, kind: int) -> dict[str, Any]:
        return {"Sequence": {"id": name, "type_id": kind}}

    groups: dict[str, tuple[str, ...]] = {cls: (cls,), sep: (sep,)}
    if with_roles:
        groups |= {f"{role}_token": (name,) for role, name in roles.names.items()}
        if roles.extra_special:
            groups[_EXTRA] = roles.extra_special
    return {
        "type": "TemplateProcessing",
        "single": [special(cls, 0), text("A", 0), special(sep, 0)],
        "pair": [
            *[special(cls, 0), text("A", 0), special(sep, 0)],
            *[text("B", 1), special(sep, 1)],
        ],
        "special_tokens": {
            name: {"id": name, "ids": [ids[token] for token in tokens], "tokens": list(tokens)}
            for name, tokens in groups.items()
        },
    }


def roles_of(tokenizer: Tokenizer) -> TokenRoles | None:
    """Return the roles that a loaded tokenizer carries; None for one of BERT's."""
    state = part_of(tokenizer.post_processor)
    entries: Any = (state or {}).get("special_tokens")
    if not isinstance(entries, dict) or "mask_token" not in entries:
        return None
    names = {
        role: entries[f"{role}_token"]["tokens"][0]
        for role in BERT_TOKENS
        if f"{role}_token" in entries
    }
    return TokenRoles(names, tuple(entries.get(_EXTRA, {"tokens": ()})["tokens"]))


def part_of(component: Any) -> dict[str, Any] | None:
    """Return a component of a tokenizer, such as its normalizer, as tokenizer.json has it."""
    return None if component is None else json.loads(component.__getstate__())
