"""What the encoder counts of a text: spelling that the tokenizer drops, and characters that become [UNK]."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from fastbert.data.dataset import open_dataset
from fastbert.data.encoder import Encoder, Losses
from fastbert.data.prepare import prepare
from fastbert.data.tokenizer import load_tokenizer
from fastbert.data.vocabulary import train_tokenizer

LETTERS = "abcdefghijklmnopqrstuvwxyz"


@pytest.fixture(scope="module")
def lower() -> Tokenizer:
    return train_tokenizer([f"{LETTERS} für फल फूल " * 3], 200)


@pytest.mark.parametrize(
    ("sentence", "words", "marks", "example"),
    [
        ("für fur", 1, 1, "für → fur"),
        ("fu\u0308r", 1, 1, "fu\u0308r → fur"),  # decomposed
        ("फूल फल, फूल", 2, 2, "फूल → फल"),
        ("กู้ภัย", 1, 3, "กู้ภัย → กภย"),
        ("مُحَمَّد", 1, 4, "مُحَمَّد → محمد"),
        ("がか", 1, 1, "がか → かか"),
        ("plain WORDS, 中文 한글", 0, 0, None),
    ],
)
def test_marks_that_are_lost(
    lower: Tokenizer, sentence: str, words: int, marks: int, example: str | None
) -> None:
    losses = Encoder(lower)(["x", sentence]).losses
    assert (losses.marked_words, losses.marks) == (words, marks)
    assert losses.examples == ((example,) if example else ())
    cased = train_tokenizer([f"{LETTERS} für"], 200, lowercase=False)
    keeping = train_tokenizer([f"{LETTERS} für"], 200, keep_accents=True)
    for other in (cased, keeping):
        assert Encoder(other)([sentence]).losses.marks == 0


def test_counts(lower: Tokenizer) -> None:
    encoder = Encoder(lower)
    losses = encoder(["Ab c1Cd, getName! CC(=O)", "", "xyz ☃☃q ok"]).losses
    assert (losses.words, losses.inner_capitals) == (8, 2)
    assert losses.characters == len("Abc1Cd,getName!CC(=O)xyz☃☃qok")
    # No "1", no "##a", no punctuation and no snowman is in the vocabulary.
    unknown = ("c1cd", ",", "getname", "!", "(", "=", ")", "☃☃q")
    assert losses.unknown_characters == sum(map(len, unknown))
    assert encoder(["xyz ☃☃q ok"]).losses.unknown_characters == 3  # also when it is looked up
    both = Losses(1, 2, 3, 4, 5, 6, ("a", "b")) + Losses(1, 1, 1, 1, 1, 1, ("b", "c", "d"))
    assert both == Losses(2, 3, 4, 5, 6, 7, ("a", "b", "c"))


def test_accents_are_kept_where_asked(tmp_path: Path) -> None:
    """Two spellings that BERT's normalizer makes one: reported by default, two tokens if kept."""
    from transformers import AutoTokenizer

    (tmp_path / "a.txt").write_text("फूल A\n\nफल b\n\nफूल C\n\nफल d\n", encoding="utf-8")
    options = {"vocab_size": 100, "workers": 1, "progress": False}
    report = prepare([tmp_path / "a.txt"], tmp_path / "lost", **options)
    row = next(row for row in report.rows if row.name == "accents and vowel signs dropped")
    assert "25.00 % of words" in row.value and "फूल → फल" in row.value
    assert "--keep-accents" in row.advice and "--cased" in row.advice
    assert report.figures["accents_lost"]["characters"] == pytest.approx(2 / 14, abs=1e-6)
    report = prepare([tmp_path / "a.txt"], tmp_path / "kept", keep_accents=True, **options)
    assert report.figures["accents_lost"] == {"words": 0, "characters": 0, "examples": []}
    manifest = open_dataset(tmp_path / "kept").manifest
    assert manifest["options"]["keep_accents"] and manifest["options"]["lowercase"]
    for folder, distinct in (("lost", 1), ("kept", 2)):
        ours = load_tokenizer(tmp_path / folder / "tokenizer")
        theirs = AutoTokenizer.from_pretrained(tmp_path / folder / "tokenizer")
        ids = [ours.encode(word, add_special_tokens=False).ids for word in ("फूल", "फल", "A")]
        assert len({json.dumps(each) for each in ids[:2]}) == distinct
        assert ids == [theirs.encode(w, add_special_tokens=False) for w in ("फूल", "फल", "a")]
