"""Any tokenizer.json gives the ids of transformers' AutoTokenizer, in a dataset as in a model."""

from __future__ import annotations

import json
import os
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer

from fastbert.data.cuts import Cuts
from fastbert.data.sentences import sentence_starts, split_sentences
from fastbert.data.text_encoder import EncodedTexts, TextEncoder
from fastbert.data.token_roles import BERT_TOKENS, roles_of
from fastbert.data.tokenizer import (
    assemble,
    load_tokenizer,
    same_tokens,
    save_tokenizer,
    special_ids,
)
from fastbert.errors import InputError
from tests.scripts import ARTICLES, ODD
from tests.tokenizer_kinds import KINDS, make_folder

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("kinds")
    return {kind: make_folder(kind, place / kind) for kind in KINDS}


def by_transformers(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def texts_without(names: set[str], count: int = 300) -> list[str]:
    """Real text in many scripts, and odd text, without the names of special tokens."""
    draw = random.Random(1)
    mixed = ("".join(draw.choices([*ODD, " ", " ", " "], k=9)) for _ in range(count))
    texts = [*ARTICLES.values(), *ODD, *mixed, "\n".join(ARTICLES.values()), ""]
    return [text for text in texts if not any(name in text for name in names)]


def encode(tokenizer: Tokenizer, texts: list[str]) -> EncodedTexts:
    return TextEncoder(tokenizer)(
        texts, [sentence_starts(text, split_sentences(text)) for text in texts]
    )


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_transformers(folders: dict[str, Path], tmp_path: Path, kind: str) -> None:
    """Of the library as it is loaded, of the encoder of datasets, and of the folder saved again."""
    ours, theirs = load_tokenizer(folders[kind]), by_transformers(folders[kind])
    roles = roles_of(ours)
    assert roles is not None
    texts = texts_without(set(roles.names.values()))
    wanted = [theirs(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert [ours.encode(text, add_special_tokens=False).ids for text in texts] == wanted
    save_tokenizer(ours, tmp_path)
    again = by_transformers(tmp_path)
    assert [again(text, add_special_tokens=False)["input_ids"] for text in texts] == wanted
    assert same_tokens(load_tokenizer(tmp_path), ours)
    assert len(again) == len(theirs) == ours.get_vocab_size()

    # Documents have no white space around them, and a document without text has no tokens.
    kept = [i for i, text in enumerate(texts) if text.strip() == text and split_sentences(text)]
    encoded = encode(ours, [texts[i] for i in kept])
    assert encoded.ids.tolist() == [token for i in kept for token in wanted[i]]
    assert (Cuts(ours).problem is None) == KINDS[kind][1]


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_are_those_of_the_settings(
    folders: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    ours, theirs = load_tokenizer(folders[kind]), by_transformers(folders[kind])
    special = special_ids(ours, "here")
    assert special.mask == theirs.mask_token_id and special.pad == theirs.pad_token_id
    assert special.unk == theirs.unk_token_id
    cls, sep = theirs.cls_token_id, theirs.sep_token_id
    first = theirs("", add_special_tokens=True)["input_ids"][:1] or [theirs.bos_token_id]
    assert special.cls == (first[0] if cls is None else cls)
    assert special.sep == (theirs.eos_token_id if sep is None else sep)
    # What is saved frames texts as our examples are framed.
    save_tokenizer(ours, tmp_path)
    again = by_transformers(tmp_path)
    a, b = (again(text, add_special_tokens=False)["input_ids"] for text in ("one", "other"))
    pair = again("one", "other", return_token_type_ids=True)
    assert pair["input_ids"] == [special.cls, *a, special.sep, *b, special.sep]
    assert pair["token_type_ids"] == [0] * (len(a) + 2) + [1] * (len(b) + 1)
    assert again.mask_token_id == special.mask and again.pad_token_id == special.pad
    special_before = {t for t in theirs.added_tokens_decoder.values() if t.special}
    special_after = {t for t in again.added_tokens_decoder.values() if t.special}
    assert {t.content for t in special_before} <= {t.content for t in special_after}
    assert "[NAME]" not in {t.content for t in special_after}  # it is ordinary text when decoded


def wordpiece_of_bert(folder: Path, lowercase: bool) -> dict[str, Any]:
    """Write BERT's tokenizer with letters in both cases, and return its tokenizer.json."""
    words = [*"abdehlorwABDEHLORWé中文", *(f"##{c}" for c in "abdehlorwABDEHLORWé文"), "中文"]
    save_tokenizer(assemble([*BERT_TOKENS.values(), *words], lowercase), folder)
    (folder / "vocab.txt").unlink()
    return json.loads((folder / "tokenizer.json").read_text())


def changed_settings(folder: Path, settings: dict[str, Any]) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


@pytest.mark.parametrize("name", ["BertTokenizer", "BertTokenizerFast", "DistilBertTokenizer", ""])
@pytest.mark.parametrize("lowercase", [True, False])
@pytest.mark.parametrize(
    "settings",
    [
        {"do_lower_case": True},
        {"do_lower_case": False},
        {"do_lower_case": True, "strip_accents": False},
        {"do_lower_case": False, "strip_accents": True},
        {"do_lower_case": True, "tokenize_chinese_chars": False},
    ],
)
def test_settings_beside_a_wordpiece_win(
    tmp_path: Path, name: str, lowercase: bool, settings: dict[str, bool]
) -> None:
    wordpiece_of_bert(tmp_path, lowercase)
    changed_settings(tmp_path, settings | ({"tokenizer_class": name} if name else {}))
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    text = "HéLLO wOrld 中文 ÉE"
    ours = load_tokenizer(tmp_path)
    assert ours.encode(text).ids == by_transformers(tmp_path)(text)["input_ids"]
    save_tokenizer(ours, tmp_path / "again")
    assert by_transformers(tmp_path / "again")(text)["input_ids"] == ours.encode(text).ids


@pytest.mark.parametrize("kind", ["roberta", "prefix_space"])
@pytest.mark.parametrize("wanted", [True, False])
def test_settings_beside_a_byte_level_tokenizer_win(
    tmp_path: Path, kind: str, wanted: bool
) -> None:
    folder = make_folder(kind, tmp_path / kind)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "RobertaTokenizerFast", "add_prefix_space": wanted}
    changed_settings(folder, settings)
    text = "Ab and Ab"
    ours = load_tokenizer(folder).encode(text, add_special_tokens=False).ids
    theirs = by_transformers(folder)(text, add_special_tokens=False)["input_ids"]
    assert ours == theirs


def test_a_default_that_contradicts_the_file_is_refused(tmp_path: Path) -> None:
    """transformers lower-cases such text; whether the model was trained so only its author knows.

    A class that takes the file as it is decides nothing, and a bare file neither.
    """
    wordpiece_of_bert(tmp_path, lowercase=False)
    changed_settings(tmp_path, {"tokenizer_class": "BertTokenizer"})
    words = 'lowercase is false, but .* "do_lower_case": false or true'
    with pytest.raises(InputError, match=words):
        load_tokenizer(tmp_path)
    changed_settings(tmp_path, {"tokenizer_class": "BertTokenizer", "do_lower_case": "no"})
    with pytest.raises(InputError, match="do_lower_case = 'no'; must be true or false"):
        load_tokenizer(tmp_path)
    changed_settings(tmp_path, {"tokenizer_class": "PreTrainedTokenizerFast"})
    assert load_tokenizer(tmp_path).encode("A").tokens[1] == "A"
    (tmp_path / "tokenizer_config.json").unlink()
    assert load_tokenizer(tmp_path).encode("A").tokens[1] == "A"
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(InputError, match=words):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_names_of_special_tokens_are_text(folders: dict[str, Path], kind: str) -> None:
    """No text may put a mask or the end of a text into a dataset."""
    tokenizer = load_tokenizer(folders[kind])
    roles, special = roles_of(tokenizer), special_ids(tokenizer, "")
    assert roles is not None
    names = list(dict.fromkeys(roles.names.values()))
    texts = ["a" + "".join(names) + "b", " ".join(["a", *names, "b"]), *names]
    found = encode(tokenizer, texts)
    assert not {special.mask, special.pad, special.cls, special.sep} & set(found.ids.tolist())


FLAGS = [{"lstrip": True}, {"rstrip": True}, {"single_word": True}, {"normalized": True}]


@pytest.mark.parametrize(
    ("kind", "flags"),
    [
        pytest.param(kind, flags, id=f"{''.join(flags) or 'plain'}-{kind}")
        for number, kind in enumerate(KINDS)
        for flags in ({}, FLAGS[number % len(FLAGS)])
    ],
)
def test_added_tokens_are_kept_whole(tmp_path: Path, kind: str, flags: dict[str, bool]) -> None:
    """Also those with spaces inside or around them, wherever they stand."""
    contents = ["<x y>", "<e1>", "  ", " z", "q ", "é", "Ab"]
    extra = [AddedToken(c, special=i % 2 == 0, **flags) for i, c in enumerate(contents)]
    make_folder(kind, tmp_path / kind, extra)
    ours, theirs = load_tokenizer(tmp_path / kind), by_transformers(tmp_path / kind)
    around = [
        *contents,
        "a",
        " ",
        " ",
        "x",
        "y>",
        "<x",
        "e1",
        "\n",
        ".",
        "z",
        "q",
        "ab",
        "中",
        "e\u0301",
    ]
    draw = random.Random(2)
    texts = ["".join(draw.choices(around, k=7)).strip() for _ in range(200)]
    texts = [text for text in texts if text]
    wanted = [theirs(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert encode(ours, texts).ids.tolist() == [token for ids in wanted for token in ids]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if KINDS[kind][1]])
def test_cuts_are_made(folders: dict[str, Path], kind: str) -> None:
    """Otherwise the tests above would prove nothing about them."""
    cuts = Cuts(load_tokenizer(folders[kind]))
    assert cuts.split("The cat's 3 (old)  toys.\n And é") == [
        *("The", " cat's", " 3", " (old)", "  toys.\n And", " é")
    ]
    assert cuts.start("one two three", 5) == "one two"


def test_an_unknown_way_of_splitting_is_not_cut(folders: dict[str, Path]) -> None:
    """There a cut would change ids, so it is not made, and Cuts says why."""
    tokenizer = load_tokenizer(folders["unknown_pattern"])
    problem = Cuts(tokenizer).problem
    assert problem is not None and "pattern" in problem
    parts = ["one", " two"]
    apart = [
        token for part in parts for token in tokenizer.encode(part, add_special_tokens=False).ids
    ]
    assert apart != tokenizer.encode("one two", add_special_tokens=False).ids
    assert encode(tokenizer, ["one two"]).ids.tolist() != apart


def test_a_bpe_with_a_token_across_spaces_is_not_cut(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    settings = json.loads((folders["gemma"] / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = settings["model"]["vocab"]
    *_, other, last = sorted(vocabulary, key=vocabulary.__getitem__)
    joined = other + "▁"
    vocabulary[joined] = vocabulary.pop(last)
    settings["model"]["merges"][-1] = [other, "▁"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(settings), encoding="utf-8")
    config = (folders["gemma"] / "tokenizer_config.json").read_bytes()
    (tmp_path / "tokenizer_config.json").write_bytes(config)
    problem = Cuts(load_tokenizer(tmp_path)).problem
    assert problem is not None and repr(joined) in problem


@pytest.mark.parametrize("kind", KINDS)
def test_each_token_belongs_to_the_sentence_where_it_ends(
    folders: dict[str, Path], kind: str
) -> None:
    text = "First one. Second, it's 2!\n\nThird 中文。第四 one"
    sentences = split_sentences(text)
    assert sentences == ["First one.", "Second, it's 2!", "Third 中文。", "第四 one"]
    tokenizer = load_tokenizer(folders[kind])
    found = encode(tokenizer, ["Zero.", text])
    starts = [text.index(sentence) for sentence in sentences] + [len(text)]
    ends = [b for _, b in tokenizer.encode(text, add_special_tokens=False).offsets]
    counts = [sum(a < end <= b for end in ends) for a, b in pairwise(starts)]
    assert found.lengths[1:].tolist() == counts and sum(counts) == len(ends)
    assert found.lengths.sum() == len(found.ids)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("modernbert", "Whereas| it|'s| 1230| inalienable|,| freedom"),
        ("llama3", "Whereas| it|'s| |123|0| inalienable|,| freedom"),
        ("gemma", "Whereas| it's| 1230| inalienable,| freedom"),
        ("llama2", "Whereas| it's| 1230| inalienable,| freedom"),
    ],
)
def test_words_are_those_of_the_pre_tokenizer(
    folders: dict[str, Path], kind: str, words: str
) -> None:
    tokenizer = load_tokenizer(folders[kind])
    found = encode(tokenizer, [words.replace("|", "")])
    groups = np.split(found.ids, np.flatnonzero(found.begins_word)[1:])
    decoded = [tokenizer.decode(group.tolist()).strip() for group in groups]
    assert decoded == [word.strip() for word in words.split("|")]


def test_what_a_normalizer_drops_is_counted(folders: dict[str, Path]) -> None:
    losses = encode(load_tokenizer(folders["wordpiece"]), ["für die eInE\u200b Größe"]).losses
    assert (losses.words, losses.marked_words, losses.marks) == (4, 2, 2)
    assert losses.inner_capitals == 2 and losses.removed_words == 0
    assert losses.examples == ("für → fur", "Größe → große")
    losses = encode(load_tokenizer(folders["nmt_unigram"]), ["für a\u200bb"]).losses
    assert (losses.marks, losses.removed_words, losses.removed) == (0, 1, ("U+200B",))
    losses = encode(load_tokenizer(folders["modernbert"]), ["für a\u200bb eInE 😀"]).losses
    assert losses.marks == losses.removed_words == losses.unknown_characters == 0


def without(*keys: str) -> Any:
    return lambda settings: {key: settings[key] for key in settings if key not in keys}


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        ("llama3", without("mask_token"), ["no mask_token", 'add_special_tokens({"mask_token"']),
        ("gpt2", without("pad_token"), ["no pad_token", "save_pretrained"]),
        ("gpt2", without("bos_token", "eos_token"), ["no cls_token, sep_token"]),
        ("gemma", lambda s: {**s, "mask_token": "<eos>"}, ["both mask_token and sep_token"]),
        ("roberta", lambda s: {**s, "mask_token": {"content": 5}}, ["tokenizer_config.json"]),
        ("roberta", lambda s: [s], ["tokenizer_config.json", "not a JSON object"]),
    ],
)
def test_roles_that_are_missing_or_wrong(
    folders: dict[str, Path], tmp_path: Path, kind: str, change: Any, words: list[str]
) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folders[kind] / name).read_bytes())
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(change(settings)))
    with pytest.raises(InputError) as raised:
        load_tokenizer(tmp_path)
    message = str(raised.value)
    assert all(word in message for word in words) and "\n" not in message, message


def test_names_of_an_old_folder(folders: dict[str, Path], tmp_path: Path) -> None:
    """Before 2023 transformers wrote them into special_tokens_map.json."""
    from transformers import AutoTokenizer

    (tmp_path / "tokenizer.json").write_bytes((folders["gemma"] / "tokenizer.json").read_bytes())
    settings = json.loads((folders["gemma"] / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast"}'
    )
    del settings["tokenizer_class"]
    settings["mask_token"] = {"content": "<MASK>", "lstrip": True, "rstrip": False}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(settings))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    special = special_ids(load_tokenizer(tmp_path), "")
    assert (special.mask, special.cls) == (theirs.mask_token_id, theirs.bos_token_id)
    assert theirs.convert_ids_to_tokens(special.mask) == "<MASK>"
