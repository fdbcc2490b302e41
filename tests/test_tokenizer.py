"""The vocabulary is reproducible, transformers reads it, and both encoders agree."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer

from fastbert.data import encoder as module
from fastbert.data.dataset import TokenDataset
from fastbert.data.encoder import Encoder
from fastbert.data.manifest import SpecialIds
from fastbert.data.text_encoder import TextEncoder
from fastbert.data.tokenizer import (
    is_bert,
    load_tokenizer,
    save_tokenizer,
    special_ids,
    unreachable,
)
from fastbert.data.vocabulary import train_tokenizer
from fastbert.errors import InputError

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
TEXT = "Élan and 3.14 (naïve) DON'T [MASK] [SEP] ##ing 中文字 ΣΑΣ"


@pytest.fixture(scope="module", params=[True, False], ids=["lowercase", "cased"])
def tokenizer(request: pytest.FixtureRequest, english_documents: list[str]) -> Tokenizer:
    return train_tokenizer([*english_documents[:200], TEXT * 3], 600, lowercase=request.param)


def vocabulary_of(tokenizer: Tokenizer) -> list[str]:
    ids = tokenizer.get_vocab()
    return sorted(ids, key=ids.__getitem__)


def test_training(english_documents: list[str]) -> None:
    tokens = vocabulary_of(train_tokenizer(iter(english_documents), 1000))
    assert len(tokens) == len(set(tokens)) == 1000
    assert tokens[:5] == SPECIAL
    assert {"the", "of", "python", "##ing", "a", "##a"} < set(tokens)
    assert not any(token != token.lower() for token in tokens[5:])


def test_training_is_deterministic(english_jsonl: Path) -> None:
    """It runs in new processes, because hash maps are seeded once per process."""
    code = (
        "import sys, hashlib; from fastbert.data.documents import read_documents; "
        "from fastbert.data.vocabulary import train_tokenizer; "
        "tokenizer = train_tokenizer(read_documents(sys.argv[1:]), 1000); "
        "print(hashlib.sha256(tokenizer.to_str().encode()).hexdigest())"
    )
    found = set()
    for threads in ("1", "2", "3"):
        environment = {**os.environ, "RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": threads}
        result = subprocess.run(
            [sys.executable, "-c", code, english_jsonl],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        found.add(result.stdout)
    assert len(found) == 1


def test_alphabet_leaves_room_for_words() -> None:
    words = {"the", "cat", "sat", "on", "mat"}
    many = "".join(map(chr, range(0x0250, 0x0550)))
    tokens = set(vocabulary_of(train_tokenizer(["the cat sat on the mat " * 2000, many], 200)))
    assert words < tokens  # although there are more characters than vocabulary entries
    few = "ʘʬӿ"
    tokens = set(vocabulary_of(train_tokenizer(["the cat sat on the mat " * 5000, few], 200)))
    assert words < tokens and not set(few) & tokens  # too rare for the vocabulary


@pytest.mark.parametrize("begin", [0x4E00, 0xAC00], ids=["Chinese", "Korean"])
@pytest.mark.parametrize("size", [150, 1500, 1900, 5000])
def test_characters_have_the_room_that_words_leave(begin: int, size: int) -> None:
    """A Chinese character is a word, and so there are few others; Korean words have many pieces."""
    letters = [chr(begin + i) for i in range(1000)]
    between = "" if begin == 0x4E00 else " "
    lines = [between.join(letters[i : i + 40]) for i in range(0, 1000, 40)]
    texts = ["the cat sat on the mat", *lines] * 3
    tokens = vocabulary_of(train_tokenizer(texts, size, lowercase=False))
    assert {"the", "cat", "sat", "on", "mat"} < set(tokens) and len(tokens) <= size
    known = len(set(letters) & set(tokens))
    assert known == 1000 if size >= 1500 else len(tokens) == size and known > size // 2


@pytest.mark.parametrize("size", [0, 99, 1 << 21])
def test_vocabulary_size_out_of_range(size: int) -> None:
    with pytest.raises(InputError, match=f"--vocab-size {size}:"):
        train_tokenizer(["some text"], size)


@pytest.mark.parametrize("texts", [[], [""], [" \n\t", "\x00\x01"]])
def test_nothing_to_train_on(texts: list[str]) -> None:
    with pytest.raises(InputError, match="every document is empty"):
        train_tokenizer(texts, 1000)


def short_words(tokenizer: Tokenizer, sentence: str) -> str:
    """Return a sentence with spaces after each 100 characters of longer words."""
    normalized = tokenizer.normalizer.normalize_str(sentence)
    words = [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(normalized)]
    if max(map(len, words), default=0) <= 100:
        return sentence
    return " ".join(word[i : i + 100] for word in words for i in range(0, len(word), 100))


def expected(tokenizer: Tokenizer, sentences: list[str]) -> tuple[list[int], list[int]]:
    encoded = [
        tokenizer.encode(short_words(tokenizer, sentence), add_special_tokens=False).ids
        for sentence in sentences
    ]
    return [i for ids in encoded for i in ids], [len(ids) for ids in encoded]


def test_encoder_on_real_text(tokenizer: Tokenizer, english_documents: list[str]) -> None:
    encoder = Encoder(tokenizer)
    for part in (english_documents[:300], english_documents[200:400]):
        ids, lengths, _ = encoder(part)
        assert (ids.tolist(), lengths.tolist()) == expected(tokenizer, part)


# Pieces that a splitter at white space could get wrong: control characters, which BERT removes
# although Python's split breaks a word there; accents apart from their letters; letters whose lower
# case has another length or depends on their neighbours; Chinese, which is split everywhere; words
# beyond the longest; the separator itself.
PIECES = list(
    " \t\n\r\x00\x0b\x0c\x1c\x1f\x7f\x85\xa0\xad\u0301\u0345\u1680\u180e\u200b\u2003\u2028\u2029"
    "\u3000\ufeff\ufffdaAzZ09.,!-_'#[]İßΣςǅﬁ中ｱ한́é😀"
)
PIECES += [
    "[MASK]",
    "[CLS]",
    "##a",
    " \x00 ",
    "x" * 101,
    "X" * 100,
    "the",
    "The",
    "don't",
    "中文",
    "e\u0301\u0323",
]
# Lengths around the two numbers of a key.
PIECES += ["abcdefgh", "abcdefghi", "abcdefghijklmnop", "abcdefghijklmnopq", "abcdefghijklmnopr"]


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.one_of(st.text(max_size=20), st.lists(st.sampled_from(PIECES), max_size=8).map("".join)),
        max_size=5,
    )
)
def test_encoder_on_any_text(tokenizer: Tokenizer, sentences: list[str]) -> None:
    ids, lengths, _ = Encoder(tokenizer)(sentences)
    assert (ids.tolist(), lengths.tolist()) == expected(tokenizer, sentences)


def test_encoder_with_a_small_memory(
    tokenizer: Tokenizer, english_documents: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_KEPT_WORDS", 50)
    monkeypatch.setattr(module, "_KEPT_LENGTH", 4)
    # Nearly all words collide with another one.
    monkeypatch.setattr(module, "_SLOT_BITS", 3)
    monkeypatch.setattr(module, "_SLOTS", 1 << 3)
    encoder = Encoder(tokenizer)
    for document in english_documents[:50]:
        ids, lengths, _ = encoder([document])
        assert (ids.tolist(), lengths.tolist()) == expected(tokenizer, [document])


def test_text_of_special_tokens_is_text(tokenizer: Tokenizer) -> None:
    special = special_ids(tokenizer, "here")
    assert special == SpecialIds(pad=0, unk=1, cls=2, sep=3, mask=4)
    assert not {0, 2, 3, 4} & set(
        tokenizer.encode("[PAD] [CLS] [SEP] [MASK]", add_special_tokens=False).ids
    )


def test_transformers_loads_it(tokenizer: Tokenizer, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    save_tokenizer(tokenizer, tmp_path / "ours")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "ours")
    text = TEXT.replace("[MASK] [SEP] ", "")
    assert (
        theirs(text, add_special_tokens=False)["input_ids"]
        == tokenizer.encode(text, add_special_tokens=False).ids
    )
    assert [
        theirs.pad_token_id,
        theirs.unk_token_id,
        theirs.cls_token_id,
        theirs.sep_token_id,
        theirs.mask_token_id,
    ] == [0, 1, 2, 3, 4]
    pair = theirs("the one", "the other")
    a, b = (
        tokenizer.encode(text, add_special_tokens=False).ids for text in ("the one", "the other")
    )
    assert pair["input_ids"] == [2, *a, 3, *b, 3]
    assert pair["token_type_ids"] == [0] * (len(a) + 2) + [1] * (len(b) + 1)
    assert theirs.model_max_length == 512
    # The other direction: what transformers writes is loaded here.
    theirs.save_pretrained(tmp_path / "theirs")
    back = load_tokenizer(tmp_path / "theirs")
    assert vocabulary_of(back) == vocabulary_of(tokenizer)
    assert back.encode(TEXT).ids == tokenizer.encode(TEXT).ids


def test_load(tokenizer: Tokenizer, tmp_path: Path) -> None:
    save_tokenizer(tokenizer, tmp_path)
    ids = tokenizer.encode(TEXT).ids
    assert load_tokenizer(tmp_path).encode(TEXT).ids == ids
    assert load_tokenizer(tmp_path / "tokenizer.json").encode(TEXT).ids == ids
    # tokenizer_config.json says whether it is cased.
    assert load_tokenizer(tmp_path / "vocab.txt").encode(TEXT).ids == ids
    (tmp_path / "tokenizer_config.json").unlink()
    assert load_tokenizer(tmp_path / "vocab.txt").encode(TEXT).ids == ids  # the letters in it do
    (tmp_path / "tokenizer.json").unlink()
    assert load_tokenizer(tmp_path).encode(TEXT).ids == ids
    (tmp_path / "vocab.txt").write_bytes(
        (tmp_path / "vocab.txt").read_bytes().replace(b"\n", b"\r\n")
    )
    assert load_tokenizer(tmp_path).encode(TEXT).ids == ids


def test_padding_and_truncation_that_were_saved_are_off(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    other = Tokenizer.from_str(tokenizer.to_str())
    other.enable_padding(length=50)
    other.enable_truncation(3)
    (tmp_path / "tokenizer.json").write_text(other.to_str(), encoding="utf-8")
    assert load_tokenizer(tmp_path).encode(TEXT).ids == tokenizer.encode(TEXT).ids


def changed(*path: Any, value: Any) -> Any:
    """Change one setting of a tokenizer.json."""

    def change(settings: dict[str, Any]) -> str:
        place = settings
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
        return json.dumps(settings)

    return change


def without(token: str) -> Any:
    def change(settings: dict[str, Any]) -> str:
        settings["added_tokens"] = [
            entry for entry in settings["added_tokens"] if entry["content"] != token
        ]
        vocabulary = [other for other in settings["model"]["vocab"] if other != token]
        settings["model"]["vocab"] = {other: i for i, other in enumerate(vocabulary)}
        return json.dumps(settings)

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda settings: "{", ["not the file of a tokenizer"]),
        (lambda settings: "[1]", ["not the file of a tokenizer"]),
        (lambda settings: "{}", ["not the file of a tokenizer", "added_tokens"]),
        (lambda settings: json.dumps(settings).replace('"the"', '"of"'), ["'of'", "twice"]),
        (changed("model", "type", value="BPE"), ["not a valid tokenizer"]),
        (changed("model", "type", value="Other"), ["not a valid tokenizer"]),
        (changed("model", "vocab", value={}), ["empty vocabulary"]),
        (changed("model", "unk_token", value="[NONE]"), ["not a valid tokenizer"]),
        (changed("model", "dropout", value=0.1), ["dropout = 0.1"]),
        (changed("pre_tokenizer", value={"type": "None"}), ["not a valid tokenizer"]),
        *(
            (changed(part, value=[]), ["not the file of a tokenizer", f"{part} is no object"])
            for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder")
        ),
        *(
            (
                changed("model", "max_input_chars_per_word", value=value),
                ["max_input_chars_per_word", "from 1 to 1,000"],
            )
            for value in (10**9, 1001, 0, -1, "100", True)
        ),
        (changed("model", "vocab", "of", value=5000), ["ids 0 to 599"]),
        (changed("model", "vocab", "of", value=7), ["ids 0 to 599"]),
        (changed("model", "vocab", "of", value=-1), ["not a valid tokenizer"]),
        (without("[SEP]"), ["has no [SEP]"]),
    ],
)
def test_broken_json(
    english_documents: list[str], tmp_path: Path, change: Any, words: list[str]
) -> None:
    settings = json.loads(train_tokenizer(english_documents[:200], 600).to_str())
    (tmp_path / "tokenizer.json").write_text(change(settings), encoding="utf-8")
    with pytest.raises(InputError) as raised:
        load_tokenizer(tmp_path)
    message = str(raised.value)
    assert all(word in message for word in ["tokenizer.json", *words]) and "\n" not in message, (
        message
    )


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", ["vocab.txt", "line 1 is empty"]),
        ("\n".join([*SPECIAL, "a", "b", "a"]).encode(), ["line 8", "'a'", "line 6"]),
        ("\n".join([*SPECIAL, "a", "", "b"]).encode(), ["line 7 is empty"]),
        ("\n".join([*SPECIAL[:4], "a"]).encode(), ["has no [MASK]"]),
        (b"[PAD]\n\xff", ["not UTF-8 at byte 6"]),
    ],
)
def test_broken_vocabulary(tmp_path: Path, data: bytes, words: list[str]) -> None:
    path = tmp_path / "vocab.txt"
    path.write_bytes(data)
    with pytest.raises(InputError) as raised:
        load_tokenizer(path)
    message = str(raised.value)
    assert all(word in message for word in words) and "\n" not in message, message


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_a_vocabulary_as_editors_write_it(tmp_path: Path, line_end: str) -> None:
    """With a byte order mark, and with tokens that look blank, each of which is a token."""
    blank = ["\u0085", "\u00a0", "\u3000", "\u2028", "\x1f", " "]
    tokens = [*SPECIAL, "a", *blank, "##b"]
    text = "\ufeff" + line_end.join([*tokens, ""])
    (tmp_path / "vocab.txt").write_bytes(text.encode())
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.get_vocab() == {token: i for i, token in enumerate(tokens)}
    assert unreachable(tokenizer) == blank
    save_tokenizer(tokenizer, tmp_path / "again")
    assert (tmp_path / "again/vocab.txt").read_bytes() == "\n".join([*tokens, ""]).encode()
    assert load_tokenizer(tmp_path / "again").get_vocab() == tokenizer.get_vocab()


def test_no_tokenizer_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no tokenizer\.json and no vocab\.txt"):
        load_tokenizer(tmp_path)
    with pytest.raises(InputError, match="none: no such tokenizer"):
        load_tokenizer(tmp_path / "none")


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(["vocab.txt", "tokenizer.json", "tokenizer_config.json"]),
    data=st.one_of(
        st.binary(max_size=50),
        st.lists(st.sampled_from([*SPECIAL, "\n", "a", "##", "{", "}", '"vocab"', ":", "1"])).map(
            lambda parts: "".join(parts).encode()
        ),
    ),
)
def test_rubbish(tmp_path: Path, name: str, data: bytes) -> None:
    for old in tmp_path.iterdir():
        old.unlink()
    (tmp_path / "vocab.txt").write_text("\n".join([*SPECIAL, "a"]))
    (tmp_path / name).write_bytes(data)
    try:
        load_tokenizer(tmp_path)
    except InputError as error:
        assert name in str(error) and "\n" not in str(error)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_rubbish_in_the_json(
    small_dataset: TokenDataset, tmp_path: Path, data: st.DataObject
) -> None:
    """Replace any setting of a valid tokenizer.json by another."""
    place = settings_of = json.loads(
        (small_dataset.tokenizer_dir / "tokenizer.json").read_text(encoding="utf-8")
    )
    while True:
        key = (
            data.draw(st.sampled_from(sorted(place)[:50]))
            if isinstance(place, dict)
            else data.draw(st.integers(0, len(place) - 1))
        )
        if not place[key] or not isinstance(place[key], (dict, list)) or data.draw(st.booleans()):
            break
        place = place[key]
    place[key] = data.draw(
        st.none()
        | st.booleans()
        | st.integers(-3, 2000)
        | st.text(max_size=3)
        | st.just([])
        | st.just({})
        | st.just({"type": "Lowercase"})
    )
    (tmp_path / "tokenizer.json").write_text(json.dumps(settings_of), encoding="utf-8")
    try:
        tokenizer = load_tokenizer(tmp_path)
    except InputError as error:
        assert "tokenizer.json" in str(error) and "\n" not in str(error)
    else:
        sentences = ["The [MASK] of Python, é 中!", ""]
        if not is_bert(tokenizer):  # another tokenizer that is valid
            TextEncoder(tokenizer)(sentences, [[0], []])
            return
        ids, lengths, _ = Encoder(tokenizer)(sentences)
        assert (ids.tolist(), lengths.tolist()) == expected(tokenizer, sentences)


def test_files_of_a_dataset_are_those_of_its_tokenizer(
    small_dataset: TokenDataset, tmp_path: Path
) -> None:
    save_tokenizer(load_tokenizer(small_dataset.tokenizer_dir), tmp_path)
    for name in ("tokenizer.json", "vocab.txt", "tokenizer_config.json"):
        assert (
            hashlib.sha256((tmp_path / name).read_bytes()).digest()
            == hashlib.sha256((small_dataset.tokenizer_dir / name).read_bytes()).digest()
        )


EXTRA = ["[NAME]", "<e1>", "<x y>", "##", "a.b", "é", "<e1>x"]
AROUND = ["[NAME]", "[name]", "<e1>", "<E1>", " <x y>", "<x y> ", "##", "a.b", "A.B", "É", "é"]
AROUND += [" ", "the", "the cat", ".", "xyz", "<e1>xx", "[NAMES]", "中", "", "  ", "\u0301"]


@pytest.mark.parametrize("file", ["tokenizer.json", "vocab.txt"])
@pytest.mark.parametrize(
    "flags", [{}, {"lstrip": True}, {"rstrip": True}, {"single_word": True}, {"normalized": True}]
)
def test_extra_special_tokens_are_those_of_transformers(
    tmp_path: Path, flags: dict[str, bool], file: str
) -> None:
    """Special tokens of entities stay whole as in transformers, also when saved again."""
    from transformers import AutoTokenizer

    plain = train_tokenizer(["the cat [NAME] <e1> a.b xyz ## é 中 " * 3], 200)
    save_tokenizer(plain, tmp_path / "plain")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "plain")
    extra = [AddedToken(content, special=True, **flags) for content in EXTRA]
    theirs.add_special_tokens({"additional_special_tokens": extra})
    theirs.save_pretrained(tmp_path / "theirs")
    if file == "vocab.txt":
        # As transformers 4 writes them beside tokenizer.json.
        (tmp_path / "theirs" / file).write_text("".join(t + "\n" for t in vocabulary_of(plain)))
        settings = json.loads((tmp_path / "theirs" / "tokenizer.json").read_text())
        config = json.loads((tmp_path / "theirs" / "tokenizer_config.json").read_text())
        decoder = {str(token.pop("id")): token for token in settings["added_tokens"]}
        config["added_tokens_decoder"] = decoder
        (tmp_path / "theirs" / "tokenizer_config.json").write_text(json.dumps(config))
        (tmp_path / "theirs" / "tokenizer.json").unlink()
    ours = load_tokenizer(tmp_path / "theirs")
    draw = random.Random(1)
    texts = [*AROUND, *("".join(draw.choices(AROUND, k=6)) for _ in range(300))]
    wanted = [theirs.encode(text, add_special_tokens=False) for text in texts]
    assert [ours.encode(text, add_special_tokens=False).ids for text in texts] == wanted
    encoded = Encoder(ours)(texts)
    assert encoded.ids.tolist() == [i for ids in wanted for i in ids]
    assert encoded.lengths.tolist() == list(map(len, wanted))
    # "[MASK]" in a text stays text, also next to them.
    assert special_ids(ours, "").mask not in ours.encode("[MASK] [NAME]").ids[1:-1]
    save_tokenizer(ours, tmp_path / "again")
    again = AutoTokenizer.from_pretrained(tmp_path / "again")
    assert [again.encode(text, add_special_tokens=False) for text in texts] == wanted
    assert set(EXTRA) <= set(again.all_special_tokens)
    assert load_tokenizer(tmp_path / "again").to_str() == ours.to_str()


def test_extra_tokens_of_a_config_that_make_no_sense(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join([*SPECIAL, "a"]))
    for config in (
        {"additional_special_tokens": [5]},
        {"additional_special_tokens": 5},
        {"additional_special_tokens": [""]},
        {"additional_special_tokens": ["x"], "added_tokens_decoder": {"six": {"content": "x"}}},
        {"added_tokens_decoder": {"6": {"content": "x", "special": False}}},
        {"added_tokens_decoder": [1]},
    ):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        with pytest.raises(InputError, match=r"tokenizer_config\.json: cannot be read"):
            load_tokenizer(tmp_path)


@pytest.mark.parametrize("lowercase", [True, False])
def test_tokens_that_no_text_gives(tmp_path: Path, lowercase: bool) -> None:
    """The vocabulary is written by hand; each other token is the encoding of a text."""
    dead = ["login_ok", "a b", "don't", "##-", "##中", "中文", "c++", "##a.b", "##", "x" * 101]
    dead += ["The", "É", "é", "##ü", "##Q", "한"] if lowercase else []
    alive = [".", "the", "##ing", "中", "ω", "##9", "#", "k"]
    alive += [] if lowercase else ["The", "é", "##Q", "한"]
    tokens = [*SPECIAL, "[unused1]", *sorted([*dead, *alive])]
    (tmp_path / "vocab.txt").write_text("\n".join(tokens), encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": lowercase}))
    tokenizer = load_tokenizer(tmp_path)
    assert unreachable(tokenizer) == [token for token in tokens if token in dead]
    for token in alive:
        text = f"the{token[2:]}" if token.startswith("##") else token
        assert token in tokenizer.encode(text, add_special_tokens=False).tokens
    trained = train_tokenizer(["the cat's été 中文 don't"] * 3, 100, lowercase)
    assert unreachable(trained) == []
