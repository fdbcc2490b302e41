"""The tokenizer of a model or dataset: load it, check it, save it.

The algorithms are those of Hugging Face's `tokenizers`, in Rust. Any tokenizer.json is taken, and
gives the ids that transformers' AutoTokenizer gives. BERT's WordPiece has rules of its own: it may
be a vocab.txt alone, its words are looked up in a faster way (encoder.py), and its files stay as
they always were.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from fastbert.data import token_roles
from fastbert.data.manifest import SpecialIds
from fastbert.data.token_roles import BERT_TOKENS, TokenRoles, roles_of
from fastbert.data.tokenizer_class import apply_settings
from fastbert.errors import InputError
from fastbert.presence import hub_hint, is_file, is_folder
from fastbert.regular_file import read_text

LONGEST_WORD = 100  # characters; WordPiece makes a longer one [UNK]
# The largest limit of that kind that a tokenizer may have. The time for a word grows with its
# square: 0.02 ms a character at 100 and 0.2 ms at 1,000.
LARGEST_LIMIT = 1000


# What every tokenizer is tried on when it is loaded; no vocabulary has some of these characters.
_PROBE = "A b\u00e9 \u4e2d\U0001f600 \u0378\U000e0fff\n 1"


def behaviour(tokenizer: Tokenizer) -> list[Any]:
    """Return what decides which ids a text gets, and what they mean, as values of JSON."""
    if not is_bert(tokenizer):
        return [json.loads(tokenizer.to_str())]
    ids = tokenizer.get_vocab()
    return [sorted(ids, key=ids.__getitem__), token_roles.part_of(tokenizer.normalizer)]


def same_tokens(a: Tokenizer, b: Tokenizer) -> bool:
    """Whether equal ids mean equal tokens, and both tokenizers treat text in the same way."""
    return behaviour(a) == behaviour(b)


def is_bert(tokenizer: Tokenizer) -> bool:
    """Whether a loaded tokenizer is a WordPiece tokenizer that does what BERT's does."""
    return roles_of(tokenizer) is None


def kind_of(tokenizer: Tokenizer) -> str:
    """Return the algorithm of a tokenizer, in words for people: "byte-level BPE"."""
    name = type(tokenizer.model).__name__
    byte_level = '"ByteLevel"' in json.dumps(
        [token_roles.part_of(part) for part in (tokenizer.normalizer, tokenizer.pre_tokenizer)]
    )
    return f"byte-level {name}" if byte_level else name


def lowercases(tokenizer: Tokenizer) -> bool:
    """Whether a tokenizer converts capitals to small letters."""
    normalizer = tokenizer.normalizer
    return normalizer is not None and "A" not in normalizer.normalize_str("A")


# Copies of tokenizers in which names of special tokens stand for these.
_WITH_SPECIAL: WeakKeyDictionary[Tokenizer, Tokenizer] = WeakKeyDictionary()


def encode_with_special(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the ids of a text in which names of special tokens stand for these, as "[MASK]".

    A copy does it, since another thread may be using the tokenizer.
    """
    copy = _WITH_SPECIAL.get(tokenizer)
    if copy is None:
        copy = _WITH_SPECIAL[tokenizer] = Tokenizer.from_str(tokenizer.to_str())
    return copy.encode(text, add_special_tokens=False).ids


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """Return a token for people: the text that it stands for, or the piece of BERT's vocabulary."""
    if is_bert(tokenizer):
        return tokenizer.id_to_token(token) or ""
    return tokenizer.decode([token], skip_special_tokens=False)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a tokenizer from a folder with tokenizer.json or vocab.txt, or from one of these files.

    Settings of tokenizer_config.json that contradict tokenizer.json win, as in transformers.

    A vocab.txt alone, which is BERT's, does not say whether text is lower-cased. A
    tokenizer_config.json beside it does. Without one, a vocabulary without capital letters is
    assumed to be lower-cased.

    The names of special tokens in a text are ordinary text, as with transformers'
    `split_special_tokens`; all other added tokens are kept whole.

    Raises:
        InputError: there is no tokenizer, it cannot be read, a special token is missing, a token
            occurs twice, or ids have gaps.
    """
    path = Path(path)
    file = path
    if is_folder(path):
        names = ("tokenizer.json", "vocab.txt")
        file = next((path / name for name in names if is_file(path / name)), path)
        if file == path:
            raise InputError(
                f"{path}: no tokenizer.json and no vocab.txt in this folder; "
                "give the folder of a tokenizer"
            )
    try:
        text = read_text(file)
    except FileNotFoundError:
        raise InputError(
            f"{path}: no such tokenizer; give the folder of a tokenizer, or a vocab.txt"
            + hub_hint(path)
        ) from None
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(
            f"{file}: not UTF-8 at byte {error.start}; a vocabulary is a text file"
        ) from None
    tokenizer = _from_json(text, file) if file.suffix == ".json" else _from_vocabulary(text, file)
    special_ids(tokenizer, file)
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    if sorted(vocabulary.values()) != list(range(len(vocabulary))):
        raise InputError(
            f"{file}: its {len(vocabulary)} tokens do not have the ids 0 to "
            f"{len(vocabulary) - 1}; renumber them"
        )
    if is_bert(tokenizer) and any("\n" in token or "\r" in token for token in vocabulary):
        raise InputError(
            f"{file}: a token contains a line break, which vocab.txt cannot represent; remove it"
        )
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = True  # "[MASK]" in a text is six ordinary characters
    return tokenizer


def extra_tokens(tokenizer: Tokenizer) -> list[AddedToken]:
    """Return the tokens that a model has added to the special ones, such as the marks of entities.

    In a text they are kept whole, as in transformers.
    """
    roles = roles_of(tokenizer)
    special = set((roles.names if roles else BERT_TOKENS).values())
    added = tokenizer.get_added_tokens_decoder().values()
    return [token for token in added if token.content not in special]


def unreachable(tokenizer: Tokenizer) -> list[str]:
    """Return the tokens of a vocabulary that no text gives, in the order of their ids.

    BERT's normalizer and pre-tokenizer change or split every text that could give them: capitals
    where text is lower-cased, accents, or punctuation beside letters. Names in brackets, such as
    [unused1], are not counted: they wait for a use. None is returned of other tokenizers.
    """
    if not is_bert(tokenizer):
        return []
    ids = tokenizer.get_vocab(with_added_tokens=False)
    kept = {token.content for token in extra_tokens(tokenizer)}
    found = []
    lowercase = tokenizer.normalizer.lowercase
    for token in ids:
        if token in kept or (token.startswith("[") and token.endswith("]")):
            continue
        plain = token.removeprefix("##")
        if plain.isascii() and plain.isalnum() and len(plain) < LONGEST_WORD:
            if lowercase and plain != plain.lower():
                found.append(token)
            continue
        # A piece inside a word is tried after a letter.
        word = f"a{token[2:]}" if token.startswith("##") and len(token) > 2 else token
        normalized = tokenizer.normalizer.normalize_str(word)
        pieces = [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(normalized)]
        if pieces != [word] or len(word) > LONGEST_WORD:
            found.append(token)
    return sorted(found, key=ids.__getitem__)


def save_tokenizer(tokenizer: Tokenizer, folder: str | Path) -> None:
    """Write tokenizer.json and tokenizer_config.json, and BERT's vocab.txt, for AutoTokenizer."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    roles = roles_of(tokenizer)
    for name, text in (_files(tokenizer, roles) if roles else _bert_files(tokenizer)).items():
        (folder / name).write_text(text, encoding="utf-8", newline="\n")


def _files(tokenizer: Tokenizer, roles: TokenRoles) -> dict[str, str]:
    settings = json.loads(tokenizer.to_str())
    special = {*roles.names.values(), *roles.extra_special}
    for token in settings["added_tokens"]:
        token["special"] = token["content"] in special
    settings["post_processor"] = token_roles.template(roles, tokenizer.get_vocab(), False)
    config: dict[str, Any] = {
        # The class that takes tokenizer.json as it is.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **{f"{role}_token": name for role, name in roles.names.items()},
    }
    if roles.extra_special:
        config["additional_special_tokens"] = list(roles.extra_special)
    return {
        "tokenizer.json": json.dumps(settings, indent=2, ensure_ascii=False) + "\n",
        token_roles.CONFIG: json.dumps(config, indent=2, ensure_ascii=False) + "\n",
    }


def _bert_files(tokenizer: Tokenizer) -> dict[str, str]:
    normalizer, ids = tokenizer.normalizer, tokenizer.get_vocab()
    config = {
        "tokenizer_class": "BertTokenizerFast",
        "do_lower_case": normalizer.lowercase,
        "strip_accents": normalizer.strip_accents,
        "tokenize_chinese_chars": normalizer.handle_chinese_chars,
        "model_max_length": 512,
        **{f"{name}_token": token for name, token in BERT_TOKENS.items()},
    }
    if extra := [token.content for token in extra_tokens(tokenizer)]:
        config["additional_special_tokens"] = extra
    return {
        # Not tokenizer.save, which reports a full disk as a bare Exception.
        "tokenizer.json": _with_extra_special(tokenizer, True) or tokenizer.to_str(pretty=True),
        "vocab.txt": "".join(token + "\n" for token in sorted(ids, key=ids.__getitem__)),
        token_roles.CONFIG: json.dumps(config, indent=2) + "\n",
    }


def special_ids(tokenizer: Tokenizer, source: str | Path) -> SpecialIds:
    """Return the ids of the special tokens.

    Raises:
        InputError: one is missing; the message names the tokenizer by `source`.
    """
    if roles := roles_of(tokenizer):
        found = {role: tokenizer.token_to_id(name) for role, name in roles.names.items()}
        return SpecialIds(**{"unk": None, **found})
    ids = {name: tokenizer.token_to_id(token) for name, token in BERT_TOKENS.items()}
    missing = [BERT_TOKENS[name] for name, number in ids.items() if number is None]
    if missing:
        raise InputError(
            f"{source}: the vocabulary has no {', '.join(missing)}; "
            f"a BERT vocabulary needs {' '.join(BERT_TOKENS.values())}"
        )
    return SpecialIds(**{name: number for name, number in ids.items() if number is not None})


def assemble(
    tokens: Sequence[str], lowercase: bool, strip_accents: bool | None = None, chinese: bool = True
) -> Tokenizer:
    """Return BERT's tokenizer for a vocabulary, in the order of its ids."""
    ids = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(
        models.WordPiece(ids, unk_token="[UNK]", max_input_chars_per_word=LONGEST_WORD)
    )
    tokenizer.normalizer = normalizers.BertNormalizer(
        lowercase=lowercase, strip_accents=strip_accents, handle_chinese_chars=chinese
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.BertProcessing(
        ("[SEP]", ids["[SEP]"]), ("[CLS]", ids["[CLS]"])
    )
    tokenizer.add_special_tokens(list(BERT_TOKENS.values()))
    tokenizer.encode_special_tokens = True
    return tokenizer


def _from_json(text: str, file: Path) -> Tokenizer:
    """Load a file of `tokenizers`, with the settings beside it."""
    config = token_roles.read_settings(file.parent)
    try:
        settings = json.loads(text, object_pairs_hook=lambda pairs: _unique(pairs, file))
        contents = [str(token["content"]) for token in settings["added_tokens"]]
        model = settings["model"]
        kind, limit = model["type"], model.get("max_input_chars_per_word", LONGEST_WORD)
        random, complete = model.get("dropout"), len(model["vocab"]) > 0
        for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
            if not isinstance(settings.get(part), dict | None):
                raise TypeError(f"{part} is no object")
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(
            f"{file}: not the file of a tokenizer ({type(error).__name__}: {error}); "
            "save the tokenizer again with transformers"
        ) from None
    if type(limit) is not int or not 1 <= limit <= LARGEST_LIMIT:
        raise InputError(
            f"{file}: max_input_chars_per_word = {limit!r:.40}; must be from 1 to "
            f"{LARGEST_LIMIT:,}, in BERT {LONGEST_WORD}: the time for a word grows with its square"
        )
    if not complete:
        raise InputError(f"{file}: the {kind} model has an empty vocabulary")
    if random:
        raise InputError(
            f"{file}: dropout = {random!r:.40} gives other ids each time; set it to null"
        )
    if "" in contents:
        raise InputError(f"{file}: an added token is empty; remove it")
    if apply_settings(settings, config, file):
        text = json.dumps(settings)
    tokenizer = _build(text, file)
    try:
        named = token_roles.named_tokens(config)
        listed = [*token_roles.listed_tokens(config), *named.values()]
        # transformers adds what only the settings know.
        if missing := [token for token in listed if token.content not in contents]:
            tokenizer.add_tokens(missing)
            settings = json.loads(tokenizer.to_str())
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(
            f"{file.with_name(token_roles.CONFIG)}: cannot be read as a tokenizer's settings: "
            f"{error}"
        ) from None
    roles_are_berts = all(
        named[f"{role}_token"].content == name
        for role, name in BERT_TOKENS.items()
        if f"{role}_token" in named
    )
    if roles_are_berts and _does_what_bert_does(settings):
        return _with_extra_whole(tokenizer)
    try:
        roles = token_roles.find_roles(config, settings, file)
    except (KeyError, TypeError, IndexError, AttributeError, StopIteration) as error:
        raise InputError(
            f"{file}: its post-processor or its model is not as `tokenizers` writes it "
            f"({type(error).__name__}: {error}); save the tokenizer again with transformers"
        ) from None
    unknown = [name for name in roles.names.values() if tokenizer.token_to_id(name) is None]
    if unknown:
        raise InputError(f"{file}: {unknown[0]!r} is a special token, but not in the vocabulary")
    return with_roles(tokenizer, settings, roles)


def with_roles(tokenizer: Tokenizer, settings: dict[str, Any], roles: TokenRoles) -> Tokenizer:
    """Return a tokenizer as it is in memory, where it carries its roles.

    Args:
        tokenizer: as its tokenizer.json gives it.
        settings: the content of that file, which is changed.
        roles: of its tokens, which are all in its vocabulary.
    """
    for token in settings["added_tokens"]:
        # The switch for text of special tokens, encode_special_tokens, is about all that are marked
        # as special. So those that are kept whole are marked again when they are saved.
        token["special"] = token["content"] in roles.names.values()
    settings["truncation"] = settings["padding"] = None
    settings["post_processor"] = token_roles.template(roles, tokenizer.get_vocab(), True)
    changed = Tokenizer.from_str(json.dumps(settings))
    changed.encode_special_tokens = True
    return changed


def _does_what_bert_does(settings: dict[str, Any]) -> bool:
    """Whether Encoder's rules hold for a tokenizer.json."""
    model, normalizer = settings["model"], settings.get("normalizer") or {}
    parts = (model, normalizer, settings.get("pre_tokenizer") or {})
    return (
        [part.get("type") for part in parts] == ["WordPiece", "BertNormalizer", "BertPreTokenizer"]
        and (model.get("continuing_subword_prefix"), model.get("unk_token")) == ("##", "[UNK]")
        and normalizer.get("clean_text") is True
        and all(token["special"] for token in settings["added_tokens"])
    )


def _build(text: str, file: Path) -> Tokenizer:
    """Return the tokenizer of a tokenizer.json, after a trial."""
    try:
        tokenizer = Tokenizer.from_str(text)
        tokenizer.encode_special_tokens = True
        tokenizer.encode(_PROBE)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the Rust side raises no narrower type, and its panics are none
        raise InputError(f"{file}: not a valid tokenizer: {' '.join(str(error).split())}") from None
    return tokenizer


def _with_extra_whole(tokenizer: Tokenizer) -> Tokenizer:
    """Return the tokenizer so that it keeps extra tokens whole where it takes the five for text.

    The setting for that, encode_special_tokens, is about all tokens that are marked as special. So
    the extra ones are not marked here, but again when they are saved.
    """
    changed = _with_extra_special(tokenizer, False)
    return Tokenizer.from_str(changed) if changed else tokenizer


def _with_extra_special(tokenizer: Tokenizer, special: bool) -> str | None:
    """Return tokenizer.json with the extra tokens marked so; None where there are none."""
    extra = {token.content for token in extra_tokens(tokenizer)}
    if not extra:
        return None
    settings = json.loads(tokenizer.to_str())
    for token in settings["added_tokens"]:
        token["special"] = special or token["content"] not in extra
    return json.dumps(settings, indent=2, ensure_ascii=False)


def _unique(pairs: list[tuple[str, Any]], file: Path) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        double = next(name for name, count in counts.items() if count > 1)
        raise InputError(f"{file}: {double!r} occurs twice; keep one")
    return values


def _from_vocabulary(text: str, file: Path) -> Tokenizer:
    """Load a list of tokens, one per line; the line's number, from 0, is the id."""
    tokens = text.replace("\r\n", "\n").removesuffix("\n").split("\n")
    ids: dict[str, int] = {}
    for i, token in enumerate(tokens):
        if not token:  # a blank one is a token, although no text gives it
            raise InputError(f"{file}: line {i + 1} is empty; a vocabulary has one token per line")
        if token in ids:
            raise InputError(
                f"{file}: line {i + 1}: {token!r} is already in line {ids[token] + 1}; keep one"
            )
        ids[token] = i
    special_ids(Tokenizer(models.WordPiece(ids, unk_token="[UNK]")), file)
    config_file = file.with_name(token_roles.CONFIG)
    config = token_roles.read_object(config_file)
    lowercase, accents = config.get("do_lower_case"), config.get("strip_accents")
    chinese = config.get("tokenize_chinese_chars", True)
    try:
        extra = _extra_of_config(config)
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(
            f"{config_file}: cannot be read as a tokenizer's settings: {error}"
        ) from None
    if lowercase is None:
        ordinary = (t for t in tokens if not (t.startswith("[") and t.endswith("]")))
        lowercase = not any(token != token.lower() for token in ordinary)
    try:
        tokenizer = assemble(tokens, lowercase, accents, chinese)
        tokenizer.add_special_tokens(extra)
        return _with_extra_whole(tokenizer)
    except TypeError as error:
        raise InputError(
            f"{config_file}: do_lower_case, strip_accents or tokenize_chinese_chars has the wrong "
            f"type: {error}"
        ) from None


def _extra_of_config(config: dict[str, Any]) -> list[AddedToken]:
    """Return the extra special tokens that tokenizer_config.json lists beside a vocab.txt.

    Raises:
        ValueError, TypeError, AttributeError: it lists them in another way than transformers.
    """
    extra: dict[str, AddedToken] = {}
    for token in token_roles.listed_tokens(config):
        if not token.special:
            raise ValueError(f"{token.content!r} is an added token that is not special")
        if token.content not in BERT_TOKENS.values():
            extra.setdefault(token.content, token)
    return list(extra.values())
