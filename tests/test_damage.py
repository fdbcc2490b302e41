"""Damage of earlier processing is found in documents, counted, shown, and left as it is."""

from __future__ import annotations

import html
import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from fastbert.data.damage import (
    DECOMPOSED,
    ENTITIES,
    ESCAPES,
    HYPHENS,
    JSON,
    KINDS,
    LETTERS,
    LIGATURES,
    TAGS,
    Damage,
    find_damage,
)
from fastbert.data.dataset import open_dataset
from fastbert.data.prepare import prepare

FOUND = {
    ENTITIES: [
        *("fish &amp; chips", "it&#39;s", "a&nbsp;b", "&#x2019;", "&lt;b&gt;", "&eacute;"),
        html.escape("\"Ja\" & 'nein'"),
    ],
    TAGS: ["a<br>b", "<p>x", "</DIV>", '<a href="x">', "line<br />", "x<ref name=1/>", "<h2\n>"],
    ESCAPES: [json.dumps("é"), json.dumps("Done.\nNext"), json.dumps("a\n\nb"), r"a\r\nb"],
    JSON: [json.dumps({"id": 1, "text": "a"}), json.dumps({"text": "a"}, indent=2)],
    HYPHENS: ["the moun-\ntain", "the moun-\r\n    tain", "Stra-\nße"],
    LIGATURES: ["o\ufb03cial", "\ufb01sh", "a\ufb02oat"],
    DECOMPOSED: [unicodedata.normalize("NFD", text) for text in ("café", "über", "Ångström")],
    # What a reader with the wrong encoding makes of UTF-8.
    LETTERS: [
        *(
            text.encode().decode("cp1252")
            for text in ("café", "über", "Straße", "naïve", "it’s", "a – b", "“x", "5\u202f€", "п")
        ),
        *(text.encode().decode("latin-1") for text in ("É", "it’s", "a\u00a0b", "20 °C", "при")),
        "\ufeff".encode().decode("cp1252"),
    ],
}
HARMLESS = [
    *("AT&T; R&D, Q&A;", "a && b;", "f(&x);", "&data;", "& amp;", "&;", "&#;", "&#xg;"),
    *("a < b > c", "x <3", "<unk> <s1> <user>", "vector<int>", "i<n; j>m", "<prose>", "<-- here"),
    *(r"C:\new\users", r"\nabla \nu \upsilon \u", r"a\nb", r"\section{x}"),
    *("café über Straße naïve it’s “x” – …", "SÃO PAULO, IRMÃ”, MANHÃ", "Âme, Â, âge, âme, fâché"),
    *("f(){ return 1; }", 'x = {"a": 1}', "{}", '{"a", "b"}', "a well-known\nword", "1990-\n1995"),
    *("- one\n- two", "end --\nof", "A-\nB", "naïve", "हिन्दी", "Việt", "ไทย"),
    *("при Ð Ñandú ÑU", "Ðað, aïe, ï", "日本語", "TỜ Â, THÂN"),
]


@pytest.mark.parametrize("kind", FOUND, ids=lambda kind: kind.name)
def test_damage_is_found(kind):
    assert set(FOUND) == set(KINDS)
    for text in FOUND[kind]:
        for around in (text, f"Some\n{text}\nmore", f"日本\n{text}"):
            assert find_damage([around]).documents == {kind.name: 1}, around


@pytest.mark.parametrize("text", HARMLESS)
def test_ordinary_text_is_not_taken_for_damage(text):
    assert find_damage([text, f"Text {text}\n"]) == Damage()


def test_documents_are_counted_once_and_the_first_examples_kept():
    first = find_damage(["&amp; &amp; &lt;", "plain", "&gt; <b>"])
    assert first.documents == {ENTITIES.name: 2, TAGS.name: 1}
    assert first.examples == {ENTITIES.name: ("&amp;", "&lt;", "&gt;"), TAGS.name: ("<b>",)}
    both = first + find_damage(["&quot; it&#39;s", "<i>"])
    assert both.documents == {ENTITIES.name: 3, TAGS.name: 2}
    assert both.examples == {ENTITIES.name: ("&amp;", "&lt;", "&gt;"), TAGS.name: ("<b>", "<i>")}
    assert Damage() + first == first == first + Damage()


def test_the_report_counts_and_advises_and_the_text_stays(tmp_path: Path):
    plain = [f"He ate fish and chips on day {i}. It was good." for i in range(40)]
    texts = [*plain, "Fish &amp; chips. It&#39;s good.", "<b>Bold</b> words.", "CafÃ© words."]
    (tmp_path / "a.txt").write_text("\n\n".join(texts), encoding="utf-8")
    report = prepare(
        [tmp_path / "a.txt"], tmp_path / "out", vocab_size=200, workers=1, progress=False
    )
    rows = {row.name: row for row in report.rows}
    assert rows["documents with HTML entities"].value == "1: &amp;, &#39;"
    assert "html.unescape" in rows["documents with HTML entities"].advice
    assert rows["documents with HTML tags"].value == "1: <b>, </b>"
    assert rows["documents with letters decoded wrongly"].value == "1: Ã©"
    assert rows["documents with escapes"].value == "0"
    assert not rows["documents with escapes"].advice
    stored = json.loads(
        (tmp_path / "out" / "part-00000" / "report.json").read_text(encoding="utf-8")
    )
    assert stored["damaged_documents"]["HTML tags"] == {
        "share": round(1 / 43, 6),
        "examples": ["<b>", "</b>"],
    }
    # Every character of it is still there, as tokens.
    dataset = open_dataset(tmp_path / "out")
    tokenizer = Tokenizer.from_file(str(dataset.tokenizer_dir / "tokenizer.json"))
    splits = [dataset.split(name) for name in ("train", "heldout")]
    ids = [i for s in splits for i in s.gather(np.array([0]), np.array([s.tokens])).tolist()]
    wanted = "".join("".join(texts).lower().split())
    assert sorted(tokenizer.decode(ids).replace(" ", "")) == sorted(wanted.replace("ã", "a"))
