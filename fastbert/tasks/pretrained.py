"""`Pretrained`: inference with a trained model.

It returns vectors, hidden states, tokens for `[MASK]`, and next-sentence probabilities. Texts are
packed, as in training: sorted by length, one after another, without padding.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from fastbert.checkpoints.sentence_folder import VectorSettings
from fastbert.checkpoints.weight_table import MLM, NSP
from fastbert.config import ModelConfig, RunConfig
from fastbert.data.cuts import Cuts
from fastbert.data.manifest import SpecialIds
from fastbert.data.packing import PackedBatch, pack_texts
from fastbert.data.tokenizer import encode_with_special, is_bert, token_text
from fastbert.errors import Diverged, InputError, warn
from fastbert.models.bert import BertForPreTraining
from fastbert.models.build import Model

PACK_TOKENS = 4096  # tokens per forward pass; all hidden states of BERT-base then take 160 MB
CHARACTERS = 16  # of a long text that are tokenized at first, for each token that is used
# Of BERT's tokenizer: ASCII white space and punctuation, and the ideographs, which are words of
# their own.
_BETWEEN = re.compile(r"[\t-\r -/:-@\[-`{-~\u4e00-\u9fff]")
POOLS = ("mean", "max", "cls")


class TextCutWarning(UserWarning):
    """Texts were longer than the model's positions and were cut."""


@dataclass(frozen=True, repr=False)
class Pretrained:
    """A model with its tokenizer, in evaluation mode.

    Attributes:
        max_length: the most tokens of a text, with [CLS] and [SEP], that the model was trained on;
            it may have more positions, whose embeddings are then random.
        vectors: how the folder's author makes a vector of a text.
        heads: which of "mlm" and "nsp" were trained.
        path: the folder that the weights came from.
        recipe: that of the run; None for a Hugging Face folder.
        metadata: that of the checkpoint; empty for a Hugging Face folder.
        pooler: BERT's pooler was trained, or its weights are there.
    """

    model: Model
    tokenizer: Tokenizer
    special: SpecialIds
    config: ModelConfig
    max_length: int
    vectors: VectorSettings
    heads: frozenset[str]
    path: Path
    recipe: RunConfig | None
    metadata: dict[str, Any]
    pooler: bool = False

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore what a pickle or a copy has, and a setting that no tokenizer's own copy keeps."""
        self.__dict__.update(state)
        self.tokenizer.encode_special_tokens = True

    def __repr__(self) -> str:
        facts = [
            f"{self.config.num_hidden_layers} layers",
            f"hidden size {self.config.hidden_size}",
            f"{self.model.vocab_size:,} tokens",
        ]
        if "step" in self.metadata:
            facts.append(f"step {self.metadata['step']:,}")
        loss = self.metadata.get("progress", {}).get("heldout_loss")
        facts += [] if loss is None else [f"held-out loss {loss:.3f}"]
        return f"<{self.path}: {', '.join(facts)}>"

    @property
    def mask_token(self) -> str:
        """The token that hides a word in a text: `[MASK]` in BERT."""
        return self.tokenizer.id_to_token(self.special.mask) or ""

    @property
    def max_tokens(self) -> int:
        """The number of tokens of a text that fit between [CLS] and [SEP]."""
        return self.max_length - 2

    def encode(
        self,
        texts: str | Iterable[str],
        pool: str | None = None,
        layer: int | Sequence[int] = -1,
        normalize: bool | None = None,
    ) -> np.ndarray:
        """One vector for each text.

        Args:
            texts: any number, or a single one. A text without tokens becomes `[CLS] [SEP]`. A text
                that is too long is cut, with a warning.
            pool: "mean" or "max" over all tokens including [CLS] and [SEP], as in
                sentence-transformers; or "cls". By default what the folder of a
                sentence-transformers model says, else "mean".
            layer: 0 is the output of the embeddings, 1 that of the first layer, -1 that of the
                last. Of several layers the mean is taken for each token.
            normalize: divide each vector by its L2 norm; by default as `pool`, else False.

        Returns:
            float32 [N, D], in the order of `texts`; [D] for a single text.

        Raises:
            InputError: an unknown pool, a layer that does not exist, a text that is no string, or
                a folder that asks for more than pooling and normalization, where `pool` is not
                given.
            Diverged: the vectors are not finite. The other methods raise it too.
        """
        if isinstance(texts, str):
            return self.encode([texts], pool, layer, normalize)[0]
        if pool is None and self.vectors.problem is not None:
            raise InputError(
                f"{self.vectors.problem} cannot be done here; choose the pool, one of "
                f"{', '.join(POOLS)}, for other vectors"
            )
        pool = self.vectors.pool if pool is None else pool
        normalize = self.vectors.normalize if normalize is None else normalize
        count = self.config.num_hidden_layers + 1
        layers = _whole_numbers(layer)
        if pool not in POOLS:
            raise InputError(f"pool = {pool!r}; must be one of {', '.join(POOLS)}")
        wrong = [index for index in layers if not -count <= index < count]
        if wrong or not layers:
            raise InputError(
                f"layer = {wrong[0] if wrong else []}; the model has 0 (embeddings) to "
                f"{count - 1}, or -1 (last) to {-count}"
            )
        ids = self._ids(_listed(texts))
        result = np.empty((len(ids), self.config.hidden_size), np.float32)
        for chosen, batch in self._packs(ids):
            states = self._hidden(batch)
            hidden = (
                torch.stack([states[index].float() for index in layers]).mean(0)
                if layers[1:]
                else states[layers[0]].float()
            )
            if pool == "cls":
                vectors = hidden[batch.cu_seqlens[:-1].long()]
            else:
                vectors = torch.segment_reduce(hidden, pool, lengths=batch.cu_seqlens.diff().long())
            if normalize:
                vectors = torch.nn.functional.normalize(vectors)
            result[chosen] = self._finite(vectors).cpu().numpy()
        return result

    def hidden_states(self, texts: Iterable[str]) -> list[list[np.ndarray]]:
        """Return the hidden states of each text: L + 1 float32 arrays [n, D], embeddings first.

        n includes [CLS] and [SEP].

        Raises:
            InputError, Diverged: as `encode`.
        """
        ids = self._ids(_listed(texts))
        result: list[list[np.ndarray]] = [[] for _ in ids]
        for chosen, batch in self._packs(ids):
            for state in self._hidden(batch):
                values = self._finite(state.float()).cpu().numpy()
                parts = np.split(values, batch.cu_seqlens[1:-1].cpu().numpy())
                for i, part in zip(chosen, parts, strict=True):
                    result[i].append(part)
        return result

    def fill_mask(self, text: str, k: int = 5) -> list[list[tuple[str, float]]]:
        """Return the k most probable tokens for each `mask_token` of the text, best first.

        Each comes with its probability.

        Raises:
            InputError: the text has no `mask_token` or is too long, k is out of range, or the MLM
                head was not trained.
        """
        self._require_head(MLM)
        _check_text(text, "text")
        ids = encode_with_special(self.tokenizer, text)
        if self.special.mask not in ids:
            raise InputError(
                f"{text!r}: no {self.mask_token} to fill; write one where a word is missing"
            )
        if not isinstance(k, Integral) or not 1 <= k <= self.model.vocab_size:
            raise InputError(
                f"k = {k!r}; must be a number from 1 to the {self.model.vocab_size:,} tokens of "
                "the vocabulary"
            )
        if len(ids) > self.max_tokens:
            raise InputError(
                f"the text has {len(ids)} tokens, the model takes {self.max_tokens}; shorten it"
            )
        batch = self._batch([ids])
        with torch.inference_mode():
            hidden = self._hidden(batch)[-1][batch.input_ids == self.special.mask]
            logits = self.model.token_logits(hidden)
            # Rows beyond the tokenizer's vocabulary, which some models add as padding, stand for no
            # token.
            logits = self._finite(logits[:, : self.tokenizer.get_vocab_size()].float())
            best: Any = logits.softmax(-1).topk(int(k))
        ids_of: list[list[int]] = best.indices.tolist()
        shares: list[list[float]] = best.values.tolist()
        return [
            [(token_text(self.tokenizer, i), p) for i, p in zip(*row, strict=True)]
            for row in zip(ids_of, shares, strict=True)
        ]

    def next_sentence(self, first: str, second: str) -> float:
        """Return the probability that `second` follows `first`.

        Of a pair that is too long, the longer text is cut, with a warning.

        Raises:
            InputError: the NSP head was not trained.
        """
        self._require_head(NSP)
        assert isinstance(self.model, BertForPreTraining)  # the only model with this head
        _check_text(first, "first")
        _check_text(second, "second")
        room = self.max_length - 3
        a, b = self.token_ids([first, second], room + 1)
        if len(a) + len(b) > room:
            _warn_cut(1, 1, room, self.vectors.keeps_end)
            a, b = fit_pair(a, b, room, self.vectors.keeps_end)
        batch = self._batch([a], [b])
        with torch.inference_mode():
            logits = self.model.pair_logits(self._hidden(batch)[-1][:1])
        return float(self._finite(logits.float()).softmax(-1)[0, 0])

    def token_ids(self, texts: list[str], most: int) -> list[list[int]]:
        """Return the token ids of each text; of a long text at least the `most` to be kept.

        They are at its beginning, or where the tokenizer says so at its end.
        """
        if self.vectors.keeps_end:
            encoded = self.tokenizer.encode_batch(texts, add_special_tokens=False)
            return [found.ids for found in encoded]
        return first_tokens(self.tokenizer, texts, most)

    def _ids(self, texts: list[str]) -> list[list[int]]:
        """Return the token ids of each text, cut to the model's length."""
        for number, text in enumerate(texts):
            _check_text(text, f"text {number}")
        ids = self.token_ids(texts, self.max_tokens + 1)
        end, cut = self.vectors.keeps_end, sum(len(tokens) > self.max_tokens for tokens in ids)
        if cut:
            _warn_cut(cut, len(ids), self.max_tokens, end)
        return [fit(one, self.max_tokens, end) for one in ids]

    def _packs(self, ids: list[list[int]]) -> Iterator[tuple[list[int], PackedBatch]]:
        """Yield packs with the indices of their texts.

        The longest texts come first, so that texts of similar length share a pack.
        """
        order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
        chosen: list[int] = []
        tokens = 0
        for i in order:
            length = len(ids[i]) + 2
            if chosen and tokens + length > PACK_TOKENS:
                yield chosen, self._batch([ids[j] for j in chosen])
                chosen, tokens = [], 0
            chosen.append(i)
            tokens += length
        if chosen:
            yield chosen, self._batch([ids[j] for j in chosen])

    def _batch(self, a: list[list[int]], b: list[list[int]] | None = None) -> PackedBatch:
        return pack_texts(a, b, self.special).to(self.model.embeddings.word.device)

    @torch.inference_mode()
    def _hidden(self, batch: PackedBatch) -> list[Tensor]:
        return self.model.hidden_states(batch)

    def _finite(self, values: Tensor) -> Tensor:
        if not values.isfinite().all():
            raise Diverged(
                f"{self.path}: the model's results are not finite, as after a training run that "
                "has diverged; take another one"
            )
        return values

    def _require_head(self, head: str) -> None:
        if head not in self.heads:
            what = {MLM: "masked tokens", NSP: "next sentences"}[head]
            raise InputError(
                f"{self.path}: the model was not trained on {what}, "
                "or its weights for them are missing"
            )


def first_tokens(tokenizer: Tokenizer, texts: list[str], most: int) -> list[list[int]]:
    """Return the token ids of each text; of a long text at least the first `most`, if it has them.

    The tokenizer takes 400 bytes a character. So of a text that is much longer than `most` tokens
    only the beginning is tokenized, up to a place across which the tokenizer never looks.
    """
    size = CHARACTERS * most
    start = _start if is_bert(tokenizer) else Cuts(tokenizer).start
    starts = [text if len(text) <= 2 * size else start(text, size) for text in texts]
    ids = [found.ids for found in tokenizer.encode_batch(starts, add_special_tokens=False)]
    for i, text in enumerate(texts):
        while len(ids[i]) < most and len(starts[i]) < len(text):
            starts[i] = start(text, 4 * len(starts[i]) + size)
            ids[i] = tokenizer.encode(starts[i], add_special_tokens=False).ids
    return ids


def _start(text: str, size: int) -> str:
    """About `size` characters from the start of a text, or all of it, ending between two words."""
    if size >= len(text):
        return text
    found = _BETWEEN.search(text, size)
    return text if found is None else text[: found.end()]


def fit(ids: list[int], room: int, keeps_end: bool) -> list[int]:
    """Cut the end of a text, or with `keeps_end` its beginning, to at most `room` tokens."""
    return ids[max(0, len(ids) - room) :] if keeps_end else ids[:room]


def fit_pair(
    a: list[int], b: list[int], room: int, keeps_end: bool = False
) -> tuple[list[int], list[int]]:
    """Cut the longer of two texts as `fit` until they have at most `room` tokens together.

    This is the strategy "longest_first" of transformers.
    """
    keep = max(room - len(b), min(len(a), math.ceil(room / 2)))
    if len(a) + len(b) <= room:
        return a, b
    return fit(a, keep, keeps_end), fit(b, room - keep, keeps_end)


def _listed(texts: Any) -> list[str]:
    # A dictionary or a data frame would give the vectors of its keys or column names, and a set
    # those of its texts in an unknown order.
    kind: type[object] = texts.__class__
    strange = issubclass(kind, (str, Mapping, set, frozenset)) or getattr(texts, "ndim", 1) != 1
    if strange or not issubclass(kind, Iterable):
        raise InputError(
            f"texts = {' '.join(repr(texts).split())[:60]}, of type {kind.__name__}; must "
            "be a list of strings"
        )
    return list(texts)


def _whole_numbers(layer: Any) -> list[int]:
    several = issubclass(type(layer), Iterable) and type(layer) is not str
    layers: list[Any] = list(layer) if several else [layer]
    for index in layers:
        if isinstance(index, bool) or not isinstance(index, Integral):
            raise InputError(f"layer = {layer!r:.60}; must be a whole number, or a list of them")
    return [int(index) for index in layers]


def _check_text(text: object, what: str) -> None:
    if not isinstance(text, str):
        raise InputError(f"{what} is {text!r:.60}; a text must be a string")
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise InputError(f"{what} is {text!r:.60}: holds half a character, which is no text")


def _warn_cut(cut: int, texts: int, length: int, keeps_end: bool) -> None:
    of = f"{cut:,} of {texts:,} texts are" if texts > 1 else "the text is"
    warn(
        f"{of} longer than the {length} tokens that the model takes; the "
        f"{'beginning' if keeps_end else 'rest'} is cut off",
        TextCutWarning,
    )
