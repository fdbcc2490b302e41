"""The encoder counts the spelling that the tokenizer drops, and characters that become [UNK]."""

from __future__ import annotations

import json
import random
import re
import resource
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.normalizers import BertNormalizer

from fastbert.data import encode, vocabulary
from fastbert.data import encoder as module
from fastbert.data.dataset import open_dataset
from fastbert.data.documents import Chunk
from fastbert.data.encoder import Encoder, Losses
from fastbert.data.prepare import prepare
from fastbert.data.sources import Source
from fastbert.data.tokenizer import load_tokenizer
from fastbert.data.vocabulary import train_tokenizer
from fastbert.data.workers import apply_in_child

LIMIT = 100  # characters of a word; WordPiece makes a longer one [UNK]
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
        ("f\x1bür", 1, 1, "f\\x1bür → fur"),
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
    both = Losses(1, 2, 3, 4, 5, 6, 7, 8, ("a", "b"), ("U+200B",))
    both += Losses(1, 1, 1, 1, 1, 1, 1, 1, ("b", "c", "d"), ("U+200B", "U+000C"))
    assert both == Losses(2, 3, 4, 5, 6, 7, 8, 9, ("a", "b", "c"), ("U+200B", "U+000C"))


@pytest.mark.parametrize(
    "character", ["\f", "\v", "\x85", "\x97", "\u200b", "\u200c", "\u200d", "\ue001", "\ufffd"]
)
def test_characters_that_the_normalizer_removes(lower: Tokenizer, character: str) -> None:
    word = f"page{character}break"
    assert lower.normalizer.normalize_str(word) == "pagebreak"  # two words, or a letter, are lost
    encoder = Encoder(lower)
    for sentence, words in ((f"{word} a {word}, b", 2), (f"{word}", 1)):  # new, then looked up
        losses = encoder([sentence]).losses
        assert losses.removed_words == words
        assert losses.removed == (f"U+{ord(character):04X}",)
    keeping = Tokenizer.from_str(lower.to_str())
    keeping.normalizer.clean_text = False
    assert Encoder(keeping)([word]).losses.removed_words == 0


@pytest.mark.parametrize("character", ["\ufeff", "\u00ad", "\u200e", "\u202b", "\t", "\u2028", "é"])
def test_characters_without_meaning_are_not_counted(lower: Tokenizer, character: str) -> None:
    losses = Encoder(lower)([f"page{character}break"]).losses
    assert (losses.removed_words, losses.removed) == (0, ())


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
    options = manifest["parts"][0]["options"]
    assert options["keep_accents"] and options["lowercase"]
    for folder, distinct in (("lost", 1), ("kept", 2)):
        ours = load_tokenizer(tmp_path / folder / "tokenizer")
        theirs = AutoTokenizer.from_pretrained(tmp_path / folder / "tokenizer")
        ids = [ours.encode(word, add_special_tokens=False).ids for word in ("फूल", "फल", "A")]
        assert len({json.dumps(each) for each in ids[:2]}) == distinct
        assert ids == [theirs.encode(w, add_special_tokens=False) for w in ("फूल", "फल", "a")]


LONG = [
    "a" * 101,
    "a" * 100 + "." + "b" * 101,
    "ACGT" * 1000,
    "é" * 150,
    "e\u0301" * 99,
    "e\u0301" * 101,
    "ก" * 250 + "。" + "ข" * 100,
    "한" * 40,  # 120 characters once the normalizer has decomposed them
    "中" * 1000,
    "x" * 130 + "中" + "y" * 99,
    "https://example.org/" + "0123456789abcdef" * 20 + "?q=1",
]


def by_definition(tokenizer: Tokenizer, sentence: str) -> tuple[list[int], int]:
    """Return the ids with too long words split by spaces, and the characters of such words."""
    words = tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(sentence))
    ids, cut = [], 0
    for word, _ in words:
        cut += len(word) if len(word) > LIMIT else 0
        spaced = " ".join(word[i : i + LIMIT] for i in range(0, len(word), LIMIT))
        ids += tokenizer.encode(spaced, add_special_tokens=False).ids
    return ids, cut


@pytest.mark.parametrize("lowercase", [True, False])
def test_long_words_are_cut(lowercase: bool) -> None:
    alphabet = "ACGTacgt中กข한éüxyb0123456789 " + LETTERS
    tokenizer = train_tokenizer([f"{alphabet} " + " ".join(alphabet) * 3], 200, lowercase)
    encoder = Encoder(tokenizer)
    for sentence in (*LONG, "before " + " after ".join(LONG)):
        encoded = encoder([sentence])
        ids, cut = by_definition(tokenizer, sentence)
        assert encoded.ids.tolist() == ids
        assert encoded.losses.cut_characters == cut
    dna = encoder(["ACGT" * 1000])
    assert dna.losses.cut_characters == 4000
    assert not lowercase or dna.losses.unknown_characters == 0


@pytest.mark.parametrize("run", ["acgt" * 50, "ก" * 150, "ab" * 75 + "." + "cd" * 75])
def test_the_vocabulary_is_trained_on_the_pieces(run: str) -> None:
    """A run of letters gives the same vocabulary as with spaces where the encoder splits it."""
    spaced = re.sub(r"([^.]{100})(?=[^.])", r"\1 ", run)
    assert spaced != run
    made = [train_tokenizer([f"{text} "] * 3, 300).to_str() for text in (run, spaced)]
    assert made[0] == made[1]


def test_time_of_training_does_not_grow_with_the_square_of_a_word() -> None:
    """A run of 200,000 letters takes about as long as that many in short words, not 20 times."""
    letters = "".join(random.Random(1).choices(LETTERS, k=200_000))
    short = " ".join(letters[i : i + 50] for i in range(0, len(letters), 50))
    taken = []
    for text in (letters, short):
        begin = time.process_time()
        train_tokenizer([text], 200)
        taken.append(time.process_time() - begin)
    assert taken[0] < 10 * taken[1]


def test_long_words_in_the_report(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(("acgt" * 300 + "\n\n") + "tgca" * 200, encoding="utf-8")
    report = prepare(
        [tmp_path / "a.txt"], tmp_path / "out", vocab_size=100, workers=1, progress=False
    )
    assert report.figures["cut_character_share"] == 1 and report.figures["unknown_share"] == 0
    row = next(row for row in report.rows if row.name.startswith("words of more than 100"))
    assert "100.00 % of characters" in row.value and "put spaces" in row.advice


@pytest.mark.parametrize("size", [1, 7, 100, 1000])
def test_slices_change_nothing(
    lower: Tokenizer, english_documents: list[str], monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """A long document is encoded in slices, and a run without spaces in parts."""
    sentences = [
        *english_documents[:20],
        "",
        "中文，測試。" * 200,
        "ab" * 700,
        "कखग घ" * 90,
        "x\u3000y" * 300,
    ]
    sentences += ["a " * 500, "." * 300, ""]
    whole = Encoder(lower)(sentences)
    assert [by_definition(lower, sentence)[0] for sentence in sentences] == [
        part.tolist() for part in np.split(whole.ids, np.cumsum(whole.lengths)[:-1])
    ]
    monkeypatch.setattr(module, "_SLICE", size)
    monkeypatch.setattr(module, "_LONGEST_RUN", 2 * LIMIT)
    sliced = Encoder(lower)(sentences)
    assert sliced.ids.tolist() == whole.ids.tolist()
    assert sliced.lengths.tolist() == whole.lengths.tolist()
    assert sliced.losses == whole.losses
    for hashed in (1, 3, 1 << 16):
        monkeypatch.setattr(encode, "_HASHED_SPANS", hashed)
        lengths = whole.lengths[whole.lengths > 0]
        hashes = encode.hash_spans(whole.ids, lengths)
        assert hashes.tolist() == encode._hash_some_spans(whole.ids, lengths).tolist()


def peak_memory(tokenizer: str):
    """Return a function from a document to the peak memory of encoding it, in bytes."""
    encoder = encode.ChunkEncoder(tokenizer, "text")

    def encode_all(text: str) -> int:
        chunk = Chunk(Source(Path("a.txt"), "txt", ""), text.encode(), 1, 0, 0)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        encoder(chunk)
        return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)

    return encode_all


@pytest.mark.parametrize("text", ["中文字測試好" * 150_000, "word " * 600_000])
def test_memory_for_one_long_document(lower: Tokenizer, text: str) -> None:
    """A sentence of 3 MB takes 40 bytes per byte; the longest document, 64 MiB, takes 2.5 GB."""
    assert apply_in_child(peak_memory, (lower.to_str(),), text) < 40 * len(text.encode())


@settings(max_examples=300)
@given(st.text(st.characters(max_codepoint=127)), st.booleans(), st.sampled_from([None, False]))
def test_ascii_is_normalised_as_by_rust(text: str, lowercase: bool, accents: bool | None) -> None:
    normalizer = BertNormalizer(lowercase=lowercase, strip_accents=accents)
    for some in (text, "".join(map(chr, range(128)))):
        assert vocabulary._normalized(some, normalizer) == normalizer.normalize_str(some)
