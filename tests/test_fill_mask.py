"""The predictions of both heads agree with those of transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny_bert import VOCABULARY, make_hugging_face_folder
from transformers import AutoTokenizer, BertForPreTraining, BertModel

import fastbert
from fastbert.errors import InputError
from fastbert.tasks.pretrained import TextCutWarning, fit_pair


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_hugging_face_folder(tmp_path_factory.mktemp("hf"))


@pytest.fixture(scope="module")
def stock(folder):
    return BertForPreTraining.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("text", ["[MASK]", "A [MASK] is [MASK].", "the un[MASK]ed object[MASK]"])
def test_fill_is_that_of_transformers(folder, stock, text):
    model, tokenizer = stock
    inputs = tokenizer(text, return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).prediction_logits[inputs["input_ids"] == tokenizer.mask_token_id]
    expected = logits.softmax(-1).topk(4)
    found = fastbert.load(folder).fill_mask(text, k=4)
    assert len(found) == text.count("[MASK]")
    assert [[token for token, _ in best] for best in found] == [
        tokenizer.convert_ids_to_tokens(row) for row in expected.indices.tolist()
    ]
    torch.testing.assert_close(
        torch.tensor([[p for _, p in best] for best in found]),
        expected.values,
        rtol=1e-4,
        atol=1e-6,
    )


def test_all_probabilities_are_one(folder):
    ((*everything,),) = fastbert.load(folder).fill_mask("A [MASK].", k=VOCABULARY)
    assert sum(p for _, p in everything) == pytest.approx(1, abs=1e-5)
    assert len({token for token, _ in everything}) == VOCABULARY


@pytest.mark.parametrize(
    "pair",
    [
        ("A list.", "Names refer to objects."),
        ("A list is a sequence " * 9, "Objects."),
        ("A", "list " * 40),
    ],
)
@pytest.mark.filterwarnings("ignore::fastbert.tasks.pretrained.TextCutWarning")
def test_next_sentence_is_that_of_transformers_cut_in_the_same_way(folder, stock, pair):
    model, tokenizer = stock
    with torch.no_grad():
        inputs = tokenizer(*pair, return_tensors="pt", truncation="longest_first", max_length=32)
        expected = model(**inputs).seq_relationship_logits.softmax(-1)[0, 0].item()
    assert fastbert.load(folder).next_sentence(*pair) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("side", "lost"), [("right", "rest"), ("left", "beginning")])
def test_a_long_pair_is_cut_with_a_message(folder, tmp_path, stock, side, lost):
    """On the side that the tokenizer names, as with transformers."""
    model, _ = stock
    hf = shutil.copytree(folder, tmp_path / "hf")
    file = hf / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "truncation_side": side}))
    tokenizer = AutoTokenizer.from_pretrained(hf)
    for pair in (("A list is a sequence " * 9, "Objects. " * 9), ("A", "list of names " * 40)):
        with torch.no_grad():
            inputs = tokenizer(*pair, return_tensors="pt", truncation=True, max_length=32)
            expected = model(**inputs).seq_relationship_logits.softmax(-1)[0, 0].item()
        with pytest.warns(TextCutWarning, match=f"longer than the 29 tokens .*; the {lost} is cut"):
            assert fastbert.load(hf).next_sentence(*pair) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("a", "b", "kept"),
    [
        (3, 4, (3, 4)),
        (20, 3, (7, 3)),
        (3, 20, (3, 7)),
        (20, 20, (5, 5)),
        (6, 5, (5, 5)),
        (0, 20, (0, 10)),
    ],
)
def test_fit_pair_takes_from_the_longer(a, b, kept):
    first, second = fit_pair(list(range(a)), list(range(b)), 10)
    assert (first, second) == (list(range(kept[0])), list(range(kept[1])))
    ends = fit_pair(list(range(a)), list(range(b)), 10, keeps_end=True)
    assert ends == (list(range(a - kept[0], a)), list(range(b - kept[1], b)))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("no mask",), r"'no mask': no \[MASK\] to fill"),
        (("[mask]",), r"no \[MASK\]"),
        (("[MASK]", 0), "k = 0; must be a number from 1"),
        (("[MASK]", VOCABULARY + 1), f"k = {VOCABULARY + 1}.* {VOCABULARY}"),
        (("list " * 50 + "[MASK]",), "the model takes 30; shorten it"),
    ],
)
def test_wrong_input(folder, arguments, words):
    with pytest.raises(InputError, match=words):
        fastbert.load(folder).fill_mask(*arguments)


def test_an_encoder_alone_fills_nothing(folder, tmp_path):
    BertModel.from_pretrained(folder).save_pretrained(tmp_path)
    (tmp_path / "vocab.txt").write_bytes((folder / "vocab.txt").read_bytes())
    with pytest.raises(
        InputError, match="not trained on masked tokens, or its weights for them are missing"
    ):
        fastbert.load(tmp_path).fill_mask("[MASK]")
