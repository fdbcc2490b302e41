"""Evaluate a model on held-out text: losses and accuracies, compared with count models.

Masked positions are also reported by corruption type, by length of the sequence and by frequency of
the token. Positions that show `[MASK]` are reported separately, because a token that was left
unchanged can be copied, which alone is worth 0.6 nats. Every figure is a sum over positions divided
by their number, so it does not depend on batches or ranks. Those of a mixture are means over its
sources by their shares of the examples, as in the losses that training reports.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastbert.checkpoints.weight_table import MLM, NSP
from fastbert.cluster.group import Group
from fastbert.config import BatchConfig, RunConfig
from fastbert.data import baselines as baselines
from fastbert.data.batches import heldout_batches
from fastbert.data.dataset import TokenDataset
from fastbert.data.mixture import BLOCK
from fastbert.data.packing import PackedBatch
from fastbert.data.streams import Streams
from fastbert.data.tokenizer import load_tokenizer, same_tokens
from fastbert.errors import Diverged, InputError
from fastbert.models.bert import BertForPreTraining
from fastbert.presence import is_folder
from fastbert.progress import Follow, unseen
from fastbert.storage import is_url
from fastbert.tasks.pretrained import Pretrained
from fastbert.training.heldout import mean_baselines, mean_by_share
from fastbert.training.verified_dataset import open_sources

MASKED, RANDOM, UNCHANGED = "[MASK]", "random", "unchanged"
LENGTHS = (32, 64, 128, 256)  # tokens of the sequence: the upper bounds of the classes
FREQUENCIES = (1000, 100, 10)  # per million tokens of training text: lower bounds of the classes
LOGITS = 1 << 24  # computed at a time, at most: 64 MB
_SUMS = ("count", "loss", "correct", "correct_of_5", "unigram", "left_bigram")


@dataclass(frozen=True)
class Masked:
    """Masked positions of one class: their number, mean losses in nats, and accuracies.

    `accuracy` is top-1 and `accuracy_of_5` is top-5.
    """

    count: int
    loss: float
    accuracy: float
    accuracy_of_5: float
    unigram: float  # nats, from the frequency of the token alone
    left_bigram: float  # nats, from the token before it too, where that is visible

    @property
    def perplexity(self) -> float:
        """e to the power of the loss; infinity where this overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


@dataclass(frozen=True)
class Pairs:
    """Next-sentence prediction: number of pairs, mean loss and accuracy."""

    count: int
    loss: float  # nats
    accuracy: float


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation. The groups hold the classes with at least one position."""

    masked: Masked
    pairs: Pairs | None  # None for a model trained without pairs
    by_corruption: dict[str, Masked]
    by_length: dict[str, Masked]
    by_frequency: dict[str, Masked]
    sequences: int
    tokens: int
    baselines: dict[str, float]  # the dataset's, nats per token
    sources: dict[str, Evaluation] = field(default_factory=dict)  # of a mixture, by name

    @property
    def loss(self) -> float:
        """MLM + NSP, in nats, as training reports it."""
        return self.masked.loss + (self.pairs.loss if self.pairs else 0.0)

    def flat(self) -> dict[str, Any]:
        """Return a dict for JSON; its first keys are those of "evaluate" lines in metrics.jsonl."""
        shown, pairs = self.by_corruption.get(MASKED), self.pairs
        found = {
            "loss": self.loss,
            "loss_mlm": self.masked.loss,
            "accuracy_mlm": self.masked.accuracy,
            "loss_mask_token": shown and shown.loss,
            "accuracy_mask_token": shown and shown.accuracy,
            "loss_nsp": pairs and pairs.loss,
            "accuracy_nsp": pairs and pairs.accuracy,
            "accuracy_of_5_mlm": self.masked.accuracy_of_5,
            "perplexity": self.masked.perplexity,
            "sequences": self.sequences,
            "tokens": self.tokens,
            "masked": self.masked.count,
            "by_corruption": {name: asdict(found) for name, found in self.by_corruption.items()},
            "by_length": {name: asdict(found) for name, found in self.by_length.items()},
            "by_frequency": {name: asdict(found) for name, found in self.by_frequency.items()},
            "baselines": self.baselines,
        }
        if self.sources:
            found["sources"] = {name: one.flat() for name, one in self.sources.items()}
        return found


def evaluate(
    pretrained: Pretrained,
    data: str | Path | None = None,
    sequences: int | None = None,
    group: Group | None = None,
    follow: Follow = unseen,
) -> Evaluation:
    """Evaluate on the held-out text of a dataset or a mixture, with the same masks for every model.

    Args:
        pretrained: the model of a run is evaluated under its own recipe, that of a Hugging Face
            folder under the default objective.
        data: the dataset; by default the run's own, all sources of a mixture.
        sequences: number of held-out examples of each source; by default the recipe's
            `evaluate.sequences`.
        group: ranks that share the work; all of them get the result.
        follow: shows the progress.

    Raises:
        InputError: no dataset is given; one is missing, damaged or made with another vocabulary;
            the run's is another one than it was trained on; or the model has no MLM head.
        Diverged: the loss is not finite.
    """
    if MLM not in pretrained.heads:
        raise InputError(
            f"{pretrained.path}: no weights of an MLM head; there is no loss to measure"
        )
    recipe = pretrained.recipe or _recipe_for(pretrained)
    paths = [str(data)] if data else [source.path for source in recipe.sources]
    if not paths[0]:
        raise InputError(
            f"{pretrained.path}: not a run, so it names no dataset; give one with --data"
        )
    if not data:
        _check_there(pretrained, paths)
    datasets = open_sources(paths, group)
    _check_vocabulary(pretrained, datasets[0])
    if not data:
        _check_trained_on(pretrained, datasets, paths)
    if recipe.phase:
        # A phase with longer sequences may not have begun.
        longest = min(recipe.longest, pretrained.max_length)
        recipe = replace(recipe, batch=replace(recipe.batch, max_length=longest))
    if NSP not in pretrained.heads:
        recipe = replace(recipe, objective=replace(recipe.objective, kind="mlm"))
    wanted = sequences or recipe.evaluate.sequences
    found = [_evaluate(pretrained, dataset, recipe, wanted, group, follow) for dataset in datasets]
    if len(found) == 1:
        return found[0]
    shares = [quota / BLOCK for quota in Streams(datasets, recipe).quotas(recipe)]
    return _together(dict(zip(recipe.source_names, found, strict=True)), shares)


def _evaluate(
    pretrained: Pretrained,
    dataset: TokenDataset,
    recipe: RunConfig,
    sequences: int,
    group: Group | None,
    follow: Follow,
) -> Evaluation:
    """Evaluate on one dataset."""
    batches = heldout_batches(dataset, recipe, sequences)
    mine = batches[group.rank :: group.world] if group else batches
    classes = _Classes(dataset)
    sums = classes.sums(pretrained, mine, follow)
    if group:
        sums = group.sum(sums.to(group.device)).cpu()
    found = classes.evaluation(sums, batches)
    if not math.isfinite(found.loss):
        raise Diverged(
            f"{pretrained.path}: the held-out loss is {found.loss}: the model has diverged; "
            "take another one"
        )
    return found


Figures = TypeVar("Figures", Masked, Pairs)


def _together(sources: dict[str, Evaluation], shares: Sequence[float]) -> Evaluation:
    """Return the means over the sources of a mixture by their shares, which add up to 1."""
    found = list(sources.values())

    def mean(parts: Sequence[Figures | None]) -> Figures | None:
        given = [part for part, share in zip(parts, shares, strict=True) if part and share]
        if not given:
            return None
        values = {
            f.name: mean_by_share([getattr(part, f.name, None) for part in parts], shares)
            for f in fields(given[0])
        }
        count = sum(part.count for part in given)
        return type(given[0])(**{**values, "count": count})  # type: ignore[arg-type]

    def by_class(groups: Sequence[dict[str, Masked]]) -> dict[str, Masked]:
        names = dict.fromkeys(name for group in groups for name in group)
        means = {name: mean([group.get(name) for group in groups]) for name in names}
        return {name: one for name, one in means.items() if one is not None}

    masked = mean([one.masked for one in found])
    assert masked is not None, "a mixture in which every source has the share 0"
    return Evaluation(
        masked=masked,
        pairs=mean([one.pairs for one in found]),
        by_corruption=by_class([one.by_corruption for one in found]),
        by_length=by_class([one.by_length for one in found]),
        by_frequency=by_class([one.by_frequency for one in found]),
        sequences=sum(one.sequences for one in found),
        tokens=sum(one.tokens for one in found),
        baselines=mean_baselines([one.baselines for one in found], shares),
        sources=sources,
    )


class _Classes:
    """The classes of masked positions; each has a row of sums, and the last row is for pairs."""

    def __init__(self, dataset: TokenDataset):
        self.dataset = dataset
        self.per_million = _per_million(dataset)
        between = [f"{low + 1} to {high}" for low, high in itertools.pairwise(LENGTHS)]
        self.lengths = [f"1 to {LENGTHS[0]}", *between, f"more than {LENGTHS[-1]}"]
        between = [f"{low:,} to {high:,}" for high, low in itertools.pairwise(FREQUENCIES)]
        self.frequencies = [f"{FREQUENCIES[0]:,} or more", *between, f"less than {FREQUENCIES[-1]}"]
        self.names = ["all", MASKED, RANDOM, UNCHANGED, *self.lengths, *self.frequencies]

    def sums(
        self, pretrained: Pretrained, batches: Sequence[PackedBatch], follow: Follow
    ) -> Tensor:
        """Return the sums of each class, float64 [classes + 1, 6], in the order of _SUMS.

        The row of the pairs has count, loss and correct predictions.
        """
        sums = torch.zeros(len(self.names) + 1, len(_SUMS), dtype=torch.float64)
        if not batches:
            return sums
        simple = self._count_models(batches)
        shown = follow(batches, f"held-out text of {self.dataset.path}")
        for batch, unigram, left_bigram in zip(shown, *simple, strict=True):
            found, pairs = _measure(pretrained, batch)
            values = torch.stack(
                [torch.ones(len(unigram), dtype=torch.float64), *found, unigram, left_bigram], 1
            )
            for row, members in enumerate(self._members(batch)):
                sums[row] += values[members].sum(0)
            sums[-1, :3] += pairs
        return sums

    def evaluation(self, sums: Tensor, batches: Sequence[PackedBatch]) -> Evaluation:
        rows = {
            name: row for name, row in zip(self.names, sums[:-1].tolist(), strict=True) if row[0]
        }
        found = {
            name: Masked(round(count), *(value / count for value in values))
            for name, (count, *values) in rows.items()
        }
        count, loss, correct = sums[-1, :3].tolist()

        def some(names: Sequence[str]) -> dict[str, Masked]:
            return {name: found[name] for name in names if name in found}

        return Evaluation(
            masked=found["all"],
            pairs=Pairs(round(count), loss / count, correct / count) if count else None,
            by_corruption=some([MASKED, RANDOM, UNCHANGED]),
            by_length=some(self.lengths),
            by_frequency=some(self.frequencies),
            sequences=sum(batch.sequences for batch in batches),
            tokens=sum(batch.tokens for batch in batches),
            baselines=self.dataset.baselines,
        )

    def _members(self, batch: PackedBatch) -> list[Tensor]:
        """Return which of the batch's masked positions are in each class, bool [M] per class."""
        seen, labels = batch.input_ids[batch.masked_positions], batch.labels
        shown, kept = seen == self.dataset.special.mask, seen == labels
        bounds = batch.cu_seqlens.long()
        lengths = bounds.diff()[torch.searchsorted(bounds, batch.masked_positions, right=True) - 1]
        length = torch.bucketize(lengths, torch.tensor(LENGTHS))
        ends = torch.tensor(FREQUENCIES[::-1], dtype=torch.float64)
        frequency = len(FREQUENCIES) - torch.bucketize(self.per_million[labels], ends, right=True)
        of_length = [length == i for i in range(len(self.lengths))]
        of_frequency = [frequency == i for i in range(len(self.frequencies))]
        return [torch.ones_like(shown), shown, ~shown & ~kept, kept, *of_length, *of_frequency]

    def _count_models(self, batches: Sequence[PackedBatch]) -> list[tuple[Tensor, ...]]:
        """Return the losses of the masked tokens under the unigram and the left bigram.

        A left neighbour that is [MASK] counts as hidden.

        Returns:
            For each model the losses in nats, one tensor per batch.
        """
        special, boundary = self.dataset.special, self.dataset.vocab_size
        left = torch.cat([batch.input_ids[batch.masked_positions - 1] for batch in batches])
        left[(left == special.cls) | (left == special.sep)] = boundary
        left[left == special.mask] = -1
        labels = torch.cat([batch.labels for batch in batches])
        found = baselines.nats(self.dataset.split("train"), boundary, left.numpy(), labels.numpy())
        counts = [len(batch.labels) for batch in batches]
        return [torch.from_numpy(found[name]).split(counts) for name in ("unigram", "left_bigram")]


@torch.inference_mode()
def _measure(pretrained: Pretrained, batch: PackedBatch) -> tuple[list[Tensor], Tensor]:
    """Return the sums of one batch.

    Returns:
        Loss, top-1 and top-5 correctness of each masked position, float64 [M] each; and count,
        loss and correct predictions of the pairs, float64 [3].
    """
    model = pretrained.model
    batch = batch.to(model.embeddings.word.device)
    masked, first = model.loss_rows(batch)
    parts = []
    rows = max(1, LOGITS // model.vocab_size)
    for hidden, labels in zip(masked.split(rows), batch.labels.split(rows), strict=True):
        logits = model.token_logits(hidden).float()
        of_label = logits.gather(1, labels[:, None])
        # NaN counts as better than anything, so that it is never correct.
        better = (~(logits <= of_label)).sum(1)
        loss = torch.logsumexp(logits, 1) - of_label[:, 0]
        found = (loss.double(), (better < 1).double(), (better < 5).double())
        parts.append(torch.stack(found).cpu())
    pairs = torch.zeros(3, dtype=torch.float64)
    labels = batch.next_sentence_labels
    if isinstance(model, BertForPreTraining) and (labels >= 0).any():
        logits = model.pair_logits(first).float()
        losses = torch.nn.functional.cross_entropy(
            logits, labels, reduction="none", ignore_index=-100
        )
        correct = logits.argmax(1) == labels
        counts = (labels >= 0).double().sum(), losses.double().sum(), correct.double().sum()
        pairs = torch.stack(counts).cpu()
    return list(torch.cat(parts, 1)), pairs


def _per_million(dataset: TokenDataset) -> Tensor:
    """Return how often each token occurs per million tokens of training text, float64 [V]."""
    counts = baselines.counts(dataset.split("train"), dataset.vocab_size)
    return torch.from_numpy(counts * (1e6 / max(1, counts.sum())))


def _recipe_for(pretrained: Pretrained) -> RunConfig:
    """Return the default recipe, with sequences no longer than the model was trained on."""
    batch = BatchConfig(max_length=min(BatchConfig().max_length, pretrained.max_length))
    return RunConfig(data="", model=pretrained.config, batch=batch)


def _check_there(pretrained: Pretrained, paths: Sequence[str]) -> None:
    """Check that the datasets of a run are there, since its recipe may name them by short paths."""
    for path in paths:
        if not is_url(path) and not is_folder(Path(path)):
            below = "" if Path(path).is_absolute() else f" below {Path.cwd()}"
            raise InputError(
                f"{path}: no such dataset{below}; {pretrained.path} was trained on it: call this "
                "in the folder where the run was begun, or give the dataset with --data"
            )


def _check_trained_on(
    pretrained: Pretrained, datasets: Sequence[TokenDataset], paths: Sequence[str]
) -> None:
    """Check that the datasets are those of the run, which may lie elsewhere under a short path."""
    known = pretrained.metadata.get("dataset_sha256")
    digests = known if isinstance(known, list) else [known]
    for path, dataset, digest in zip(paths, datasets, digests, strict=False):
        if dataset.sha256 != digest:
            raise InputError(
                f"{path}: not the dataset that {pretrained.path} was trained on, or changed since; "
                "if it is the one that you mean, give it with --data"
            )


def _check_vocabulary(pretrained: Pretrained, dataset: TokenDataset) -> None:
    """Check that the dataset's ids mean the same tokens as those of the model."""
    theirs = load_tokenizer(dataset.tokenizer_dir)
    if not same_tokens(theirs, pretrained.tokenizer):
        raise InputError(
            f"{dataset.path}: made with another tokenizer ({theirs.get_vocab_size():,} tokens) "
            f"than {pretrained.path} ({pretrained.tokenizer.get_vocab_size():,}); prepare the text "
            f"with --tokenizer {pretrained.path}"
        )
