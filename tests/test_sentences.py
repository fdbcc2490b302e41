"""The sentence splitter on cases labelled by hand, and its properties for any text."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastbert.data.sentences import split_sentences

# "|" marks where a sentence ends.
CASES = """
He came. | She left.
Is it true? | Yes! | No.
Dr. Smith met Mrs. Jones at St. Mary's.
John F. Kennedy and J. R. R. Tolkien met C. P. Cavafy.
He lived in the U.S. for years. | In the U.S. the law differs.
He lived in the U.S. | The law differs there.
The U.S. Senate met at 5 p.m. Monday.
It ended at 5 p.m. | They went home.
Pi is about 3.14. | It is 3.5 m tall.
The station is No. 5 on line 2. | Trains stop there.
He said no. | Nobody heard him.
Apple Inc. is a company. | It makes phones.
He works for Apple Inc. | He likes it.
World War I. | The war ended in 1918.
It was written c. 1300, i.e. before the plague, e.g. by monks.
Bees, ants, etc. are insects. | Spiders are not.
See Smith et al. (1999) and Fig. 3. | The rest follows.
"Stop!" he cried. | "Why?" she asked.
He said "Stop." | She did not.
It is old (founded c. 1200). | It is small.
Wait... | What?
He waited… | She came.
Visit www.example.com. | It helps.
In group 7. | Critics praised it.
1. First item. | 2. Second item.
a) One thing. | Another.
The name (lit. "big house"; pl. houses) is old.
Born on Jan. 5, 1900. | He died in Dec. 1950.
He holds a Ph.D. from Yale. | He holds a Ph.D. | It is from Yale.
Gen. Lee and Lt. Col. Grant met Sen. Sumner Jr. yesterday.
Johann Sebastian Bach (b. 1685, d. 1750) wrote it.
Is it 5 ft. tall? | Ft. Worth is.
«Oui.» | «Non.»
“Good.” | ‘Bad.’
Élan vital. | Étienne knew.
Это дом. | Он большой.
यह घर है। | वह बड़ा है।
这是一句话。| 这是另一句！| 真的吗？
「はい。」| そうです。
هل هذا صحيح؟ | نعم.
what is this? | it is a test. | no.
A question?! | An answer.
"""


@pytest.mark.parametrize("case", [line for line in CASES.split("\n") if line])
def test_labelled(case: str) -> None:
    expected = [part.strip() for part in case.split("|")]
    text = re.sub(r"\|\s*" if re.search("[一-鿿ぁ-ん]", case) else r"\|\s", "", case)
    assert split_sentences(text) == expected


def test_lines_end_sentences() -> None:
    assert split_sentences("A title\nA sentence. Another\n\n  \nlast ") == [
        "A title",
        "A sentence.",
        "Another",
        "last",
    ]


@settings(max_examples=300)
@given(
    st.one_of(
        st.text(),
        st.lists(
            st.sampled_from(
                [
                    "Mr",
                    ".",
                    " ",
                    "A",
                    "b",
                    "!",
                    "?",
                    "\n",
                    '"',
                    "1",
                    "。",
                    "」",
                    "U.S",
                    "…",
                    "\u3000",
                ]
            )
        ).map("".join),
    )
)
def test_any_text(text: str) -> None:
    sentences = split_sentences(text)
    # Nothing is lost, added or moved.
    assert "".join("".join(sentences).split()) == "".join(text.split())
    assert all(
        sentence and sentence == sentence.strip() and "\n" not in sentence for sentence in sentences
    )


@pytest.mark.parametrize(
    "piece", [".", "!)", "A.\t", ". ", "(a", "1. ", "\n\n", "。", '"', "U.S. x "]
)
def test_long_runs_take_no_longer(piece: str) -> None:
    """A quadratic pattern would need hours for these."""
    text = piece * 200_000
    assert "".join("".join(split_sentences(text)).split()) == "".join(text.split())


@pytest.mark.parametrize("space", [" ", "\t", "\u3000"])
def test_space_before_a_line_costs_nothing(space: str) -> None:
    """The pattern of list numbers once scanned the space again for each mark."""
    taken = []
    for text in ("Inc. Foo " * 4000, space * 40_000 + "Inc. Foo " * 4000):
        begin = time.process_time()
        split_sentences(text)
        taken.append(time.process_time() - begin)
    assert taken[1] < 20 * taken[0]
