"""The weights of an architecture, with transformers' name for each: what a table of them holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

MLM, NSP = "mlm", "nsp"
HEADS = {MLM: "mlm_head.", NSP: "nsp_head."}
POOLER = "nsp_head.pooler.weight"  # of BERT alone
# The vocabulary matrix [V, D] where it is not the word embedding.
DECODER = "mlm_head.decoder"


class Entry(NamedTuple):
    """How one of our weights is stored by Hugging Face.

    Attributes:
        theirs: its name there, or the names of query, key and value, which our weight joins.
        axes: a letter for each axis of one of their weights: V vocabulary, D hidden, F
            feed-forward, P positions, S segments, C classes of a pair; Q is 3 D, and G is 2 F.
    """

    theirs: tuple[str, ...]
    axes: str


class Table(NamedTuple):
    """All weights of a model.

    Attributes:
        title: the name of the architecture.
        prefix: with which the names of its classes in transformers begin.
        entries: by our name.
        decoder: their name of the vocabulary matrix, which a folder of a tied model may hold too.
        decoder_bias: a second name of its bias; None where there is none.
        other_tasks: prefixes of heads that a fine-tuned folder may hold; they are dropped.
        canonical: turns a name of an older or a smaller folder into today's full name.
    """

    title: str
    prefix: str
    entries: dict[str, Entry]
    decoder: str
    decoder_bias: str | None
    other_tasks: tuple[str, ...]
    canonical: Callable[[str], str]
