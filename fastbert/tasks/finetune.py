"""Fine-tune a pre-trained encoder for classification or regression of texts or pairs of texts.

The input is files of labelled texts, the output scores and a Hugging Face folder. As in
transformers, the head is that of the architecture (BERT's pooler of [CLS], ModernBERT's prediction
head), dropout, and one matrix. Everything is trained unless layers are
frozen.

Source: Devlin et al., 2019, section 4.1 and appendix A.3 (learning rates of 2e-5 to 5e-5, batches
of 16 or 32, 2 to 4 epochs).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fastbert.checkpoints.hugging_face import check_new, new_folder, write_folder
from fastbert.checkpoints.weight_names import table_of, to_hugging_face
from fastbert.config import ModelConfig
from fastbert.data.packing import PackedBatch, pack_texts
from fastbert.errors import Diverged, InputError, warn
from fastbert.models.build import Model
from fastbert.progress import Follow, unseen
from fastbert.tasks import scores
from fastbert.tasks.labelled import Examples, number, read_examples
from fastbert.tasks.pretrained import Pretrained, fit, fit_pair
from fastbert.torch_defaults import torch_defaults

WARMUP = 0.1  # share of the steps; the learning rate then falls linearly to zero
WEIGHT_DECAY = 0.01
CLIP = 1.0  # largest norm of the gradient
EVALUATION_BATCH = 64  # examples
LARGEST_LR = 1e30  # the optimizer multiplies by it in fp32, whose largest value is 3.4e38
MAX_LENGTH = 128  # tokens
SCORE_COLUMN = "score"  # the label column of STS-B, the one layout whose labels are numbers


class LengthWarning(UserWarning):
    """Texts are longer than what the model was trained on, or than what it reads of them."""


class DataWarning(UserWarning):
    """The examples look wrong, so the scores may not mean what they seem to."""


class PictureWarning(UserWarning):
    """A picture could not be drawn."""


@dataclass(frozen=True)
class Settings:
    """The settings of a fine-tuning run. The defaults are those of the paper.

    Attributes:
        epochs, lr, batch: passes over the file, highest learning rate, examples per step.
        max_length: tokens per example, including special tokens. A longer example is cut at its
            end, or where the tokenizer says so at its beginning; of a pair its longer text is. By
            default 128, or what the model was trained on where that is less.
        seed, seeds: the first seed, and the number of seeds. A seed determines order, dropout and
            the initial head. The split is that of the first seed.
        patience: stop when the score on the held-out part has not improved for this many epochs,
            and use the best epoch. None trains to the end.
        heldout: share of the training file that is held out where `patience` is set.
        metric: the metric to select by: accuracy, f1 or matthews for classes, spearman or pearson
            for numbers; by default the first.
        regression: whether labels are numbers; None decides by the file (STS-B's column "score").
        layer_decay: learning rate of a layer relative to the one above (Sun et al., 2019,
            equation 2). That of the embeddings is the lowest.
        freeze: freeze the embeddings and this many layers; 0 trains everything.
    """

    epochs: int = 3
    lr: float = 5e-5
    batch: int = 32
    max_length: int | None = None
    seed: int = 1
    seeds: int = 1
    patience: int | None = None
    heldout: float = 0.1
    metric: str | None = None
    regression: bool | None = None
    layer_decay: float = 1.0
    freeze: int = 0


@dataclass(frozen=True)
class Epoch:
    """The result of an epoch."""

    seed: int
    epoch: int
    loss: float  # mean training loss, in nats or as squared error
    score: float  # the metric on the held-out part, or on the evaluation file where there is none


@dataclass(frozen=True)
class Trial:
    """The result of one seed.

    `scores` has every metric on the evaluation file, with the weights of `best_epoch`.
    """

    seed: int
    best_epoch: int
    scores: dict[str, float]
    epochs: list[Epoch]


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation over the seeds; the standard deviation of one seed is 0."""

    mean: float
    std: float


@dataclass(frozen=True)
class Finetuned:
    """The result of a fine-tuning run."""

    metric: str  # the metric that was selected by
    scores: dict[str, Spread]  # every metric on the evaluation file, over the seeds
    labels: list[str]  # the classes; empty for regression
    # Accuracy of always answering the most frequent label of the evaluation file.
    majority: float | None
    trials: list[Trial]  # one for each seed
    confusion: list[list[int]]  # of the saved trial; rows are true classes
    out: str | None  # the folder


@dataclass(frozen=True)
class _Task:
    """The task: the classes, and the metric to select by. Without classes it is regression."""

    labels: list[str]
    metric: str

    @property
    def scores(self) -> dict[str, scores.Score]:
        return scores.of_classes(len(self.labels)) if self.labels else scores.OF_NUMBERS

    def targets(self, examples: Examples) -> Tensor:
        """Return the labels as int64 [N] classes, or as float32 [N]."""
        if not self.labels:
            return torch.tensor(examples.numbers())
        places = {label: i for i, label in enumerate(self.labels)}
        return torch.tensor([places[label] for label in examples.labels])

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        if self.labels:
            return nn.functional.cross_entropy(logits, targets)
        return nn.functional.mse_loss(logits[:, 0], targets)

    def measure(self, answers: np.ndarray, data: _Encoded) -> dict[str, float]:
        """Return every score of predictions."""
        truth = data.targets.numpy()
        return {name: score(answers, truth) for name, score in self.scores.items()}

    @torch.no_grad()
    def answers(self, model: Classifier, data: _Encoded) -> np.ndarray:
        """Return the predictions: int64 [N] classes, or float32 [N]."""
        model.eval()
        logits = torch.cat([model(pack).cpu() for pack, _ in data.in_order(EVALUATION_BATCH)])
        _check_finite(self, "the evaluation", {"an answer": logits})
        return (logits.argmax(-1) if self.labels else logits[:, 0]).numpy()


@torch_defaults()
def finetune(
    pretrained: Pretrained,
    train: Examples | str | Path,
    evaluation: Examples | str | Path,
    out: str | Path | None = None,
    settings: Settings | None = None,
    *,
    report: Callable[[Epoch], None] = lambda _: None,
    follow: Follow = unseen,
) -> Finetuned:
    """Train on one file and evaluate on another.

    Nothing is selected by the evaluation file. The weights of `pretrained` are trained in place.

    Args:
        pretrained: the model.
        train, evaluation: files for `read_examples`, or its results.
        out: a new folder for the model, as `architecture` names it, and confusion.png; None saves
            nothing.
            Of several seeds the best one on the held-out part is saved, or the first one where
            nothing is held out.
        settings: by default `Settings()`.
        report: called after every epoch.
        follow: shows the progress of an epoch.

    Raises:
        InputError: a setting out of range, a file that is missing or wrong (with its lines), labels
            that do not fit, or an existing `out`.
        Diverged: a loss, a gradient, a weight or a prediction is not finite; nothing is saved.
    """
    settings = settings or Settings()
    max_length = _check(settings, pretrained)
    if out is not None:
        check_new(out)
    training, test = (
        x if isinstance(x, Examples) else read_examples(x) for x in (train, evaluation)
    )
    regression = _is_regression(training, settings)
    if not regression:
        training, test = training.named(test), test.named(training)
    task = _task(training, test, settings, regression)
    _warn_of_one_label(test, task)
    _warn_of_shared(training, test)
    held_out = None
    if settings.patience is not None:
        training, held_out = _split(training, settings, by_class=bool(task.labels))
    data, test_data = (_Encoded(pretrained, task, part, max_length) for part in (training, test))
    dev_data = _Encoded(pretrained, task, held_out, max_length) if held_out else None

    start = {name: tensor.clone() for name, tensor in pretrained.model.state_dict().items()}
    trials: list[Trial] = []
    best, saved = -float("inf"), dict[str, Tensor]()
    table = np.zeros((0, 0), np.int64)
    for seed in range(settings.seed, settings.seed + settings.seeds):
        pretrained.model.load_state_dict(start)
        torch.manual_seed(seed)
        model = Classifier(pretrained, max(1, len(task.labels)))
        of_trial = dataclasses.replace(settings, seed=seed, seeds=1)
        epochs, kept = _train(model, task, data, dev_data or test_data, of_trial, report, follow)
        model.load_state_dict(kept)
        answers = task.answers(model, test_data)
        found = task.measure(answers, test_data)
        chosen = max(epochs, key=lambda e: e.score) if dev_data else epochs[-1]
        trials.append(Trial(seed, chosen.epoch, found, epochs))
        if not saved or (dev_data and chosen.score > best):
            best, saved = chosen.score, kept
            if task.labels:
                table = scores.confusion(answers, test_data.targets.numpy(), len(task.labels))
    if out is not None:
        model.load_state_dict(saved)
        _save(out, model, pretrained, task, table, max_length)
    return Finetuned(
        metric=task.metric,
        scores={name: spread([trial.scores[name] for trial in trials]) for name in task.scores},
        labels=task.labels,
        majority=max(Counter(test.labels).values()) / len(test) if task.labels else None,
        trials=trials,
        confusion=table.tolist(),
        out=None if out is None else str(out),
    )


def _train(
    model: Classifier,
    task: _Task,
    data: _Encoded,
    watched: _Encoded,
    settings: Settings,
    report: Callable[[Epoch], None],
    follow: Follow,
) -> tuple[list[Epoch], dict[str, Tensor]]:
    """Train with the one seed of `settings`, and measure each epoch on the part that is `watched`.

    Returns:
        The epochs, and the weights of the best one, or of the last where nothing is held out.
    """
    patience, seed = settings.patience, settings.seed
    steps = settings.epochs * -(-len(data) // settings.batch)
    optimizer, schedule = _optimizer(model, settings, steps)
    done: list[Epoch] = []
    kept: dict[str, Tensor] = {}
    for epoch in range(1, settings.epochs + 1):
        total = 0.0
        model.train()
        batches = torch.randperm(len(data)).split(settings.batch)
        at = f"seed {seed}, epoch {epoch}"
        for rows in follow(batches, f"{at} of {settings.epochs}"):
            pack, target = data.batch(rows)
            loss = task.loss(model(pack), target)
            optimizer.zero_grad()
            loss.backward()
            trained = [p for p in model.parameters() if p.requires_grad]
            norm = nn.utils.clip_grad_norm_(trained, CLIP)
            _check_finite(task, at, {"the loss": loss, "the gradient": norm})
            optimizer.step()
            schedule.step()
            total += loss.item() * len(rows)
        weights = {f"the weight {name}": tensor for name, tensor in model.named_parameters()}
        _check_finite(task, at, weights)
        score = task.measure(task.answers(model, watched), watched)[task.metric]
        done.append(Epoch(seed, epoch, total / len(data), score))
        report(done[-1])
        best = max(done, key=lambda e: e.score)  # the first one among equals
        if patience is None or best.epoch == epoch:
            kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        if patience is not None and epoch - best.epoch >= patience:
            break
    return done, kept


def _check_finite(task: _Task, where: str, values: Mapping[str, Tensor]) -> None:
    """Raise Diverged where one of the values is not finite."""
    for name, value in values.items():
        if not value.isfinite().all():
            labels = "" if task.labels else ", or scale the labels down"
            raise Diverged(
                f"the training has diverged: {name} is not finite in {where}; nothing is saved; "
                f"try a lower --lr{labels}"
            )


def _check(settings: Settings, pretrained: Pretrained) -> int:
    """Return the maximum length of an example in tokens.

    Raises:
        InputError: a setting is out of range.
    """
    longest, layers = pretrained.config.max_position_embeddings, pretrained.config.num_hidden_layers
    trained = pretrained.max_length
    s = settings
    if s.epochs < 1 or s.batch < 1 or not 0 < s.lr <= LARGEST_LR or s.seeds < 1:
        raise InputError(
            f"--epochs {s.epochs} --batch {s.batch} --lr {s.lr} --seeds {s.seeds}: "
            f"all must be above 0, and --lr at most {LARGEST_LR:g}"
        )
    if s.patience is not None and (s.patience < 1 or not 0 < s.heldout < 1):
        raise InputError(
            f"--patience {s.patience} --heldout {s.heldout}: must be 1 epoch or more, "
            "and a share between 0 and 1"
        )
    if not 0 < s.layer_decay <= 1:
        raise InputError(f"--layer-decay {s.layer_decay}: must be above 0 and at most 1")
    if not 0 <= s.freeze <= layers:
        raise InputError(f"--freeze {s.freeze}: must be from 0 to the model's {layers} layers")
    max_length = min(MAX_LENGTH, trained) if s.max_length is None else s.max_length
    if not 8 <= max_length <= longest:
        raise InputError(
            f"--max-length {max_length}: must be from 8 to the model's {longest} positions"
        )
    if max_length > trained:
        warn(
            f"--max-length {max_length}: {pretrained.path} was trained on {trained} tokens at "
            "most; the positions behind those begin untrained here",
            LengthWarning,
        )
    return max_length


def _is_regression(training: Examples, settings: Settings) -> bool:
    if settings.regression is None:
        return training.columns.label == SCORE_COLUMN
    return settings.regression


def _task(training: Examples, test: Examples, settings: Settings, regression: bool) -> _Task:
    """Determine the task, and check that both files fit it."""
    known = list(scores.OF_NUMBERS if regression else scores.of_classes(2))
    metric = settings.metric or known[0]
    if metric not in known:
        raise InputError(
            f"--metric {metric}: of {'numbers' if regression else 'classes'} it can be "
            f"{', '.join(known)}"
        )
    if bool(training.second) != bool(test.second):
        pairs, alone = (training, test) if training.second else (test, training)
        raise InputError(
            f"{alone.file}: texts stand alone here, and in {pairs.file} they are pairs "
            f"({pairs.columns.second}); use pairs in both files or in neither"
        )
    if regression:
        for examples in (training, test):
            examples.numbers()  # raises with the lines of labels that are not numbers
        return _Task([], metric)
    labels = _in_order(training)
    if len(labels) < 2:
        raise InputError(f"{training.file}: every label is {labels[0]!r}; two or more are needed")
    _warn_of_alike(training, labels)
    _warn_of_contradictions(training)
    if settings.regression is None:
        _warn_of_fractions(training, labels)
    strange = [
        (label, line)
        for label, line in zip(test.labels, test.lines, strict=True)
        if label not in labels
    ]
    if strange:
        label, line = strange[0]
        more = f" (and {len(strange) - 1:,} rows more)" if strange[1:] else ""
        raise InputError(
            f"{test.file}: {test.unit} {line}: label {label!r} does not occur in "
            f"{training.file}{more}"
        )
    return _Task(labels, metric)


def _warn_of_alike(training: Examples, labels: Sequence[str]) -> None:
    """Warn where labels are the same word or number in another spelling, such as 1 and 1.0."""
    spellings: dict[str | float, str] = {}
    for label in labels:
        value = number(label)
        meaning = label.casefold() if value is None else value
        if (other := spellings.setdefault(meaning, label)) != label:
            warn(
                f"{training.file}: the labels {other!r} and {label!r} are two classes here; if "
                "they are one, write them alike",
                DataWarning,
            )


def _warn_of_contradictions(training: Examples) -> None:
    """Warn where the same example has several labels, one of which at most can be learned."""
    first: dict[tuple[str, ...], int] = {}
    unlike: dict[tuple[str, ...], tuple[int, int]] = {}
    for row, texts in enumerate(_examples(training)):
        before = first.setdefault(texts, row)
        if training.labels[before] != training.labels[row]:
            unlike.setdefault(texts, (training.lines[before], training.lines[row]))
    if unlike:
        (one, two), count = next(iter(unlike.values())), len(unlike)
        warn(
            f"{training.file}: {count:,} text{'s have' if count > 1 else ' has'} several labels, "
            f"as in the {training.unit}s {one:,} and {two:,}; at most one of them can be learned",
            DataWarning,
        )


def _examples(part: Examples) -> Iterator[tuple[str, ...]]:
    """Yield the text or the two texts of each example."""
    return zip(part.first, part.second, strict=True) if part.second else zip(part.first)


def _warn_of_fractions(training: Examples, labels: Sequence[str]) -> None:
    """Warn where classes look like measurements: all are numbers, and one is no whole number."""
    values = {label: number(label) for label in labels}
    fractions = [label for label, value in values.items() if value is not None and value % 1 > 0]
    if fractions and None not in values.values():
        warn(
            f"{training.file}: the labels are numbers with fractions, such as {fractions[0]}, and "
            f"each of the {len(labels):,} is a class here; --regression learns them as numbers, "
            "and --classes leaves this message out",
            DataWarning,
        )


def _warn_of_one_label(test: Examples, task: _Task) -> None:
    """Warn where the labels of the evaluation do not vary, so that most scores are meaningless."""
    if len(set(task.targets(test).tolist())) == 1:
        others = [name for name in task.scores if name != "accuracy"]
        warn(
            f"{test.file}: every label is {test.labels[0]!r}; {' and '.join(others)} say nothing "
            "of such a file",
            DataWarning,
        )


def _warn_of_shared(training: Examples, test: Examples) -> None:
    """Warn where examples of the evaluation were trained on."""
    known = set(_examples(training))
    if shared := sum(texts in known for texts in _examples(test)):
        warn(
            f"{test.file}: {shared:,} of {len(test):,} texts are also in {training.file}; "
            "the scores are better than for new texts",
            DataWarning,
        )


def _in_order(training: Examples) -> list[str]:
    """Sort the classes: as the file names them, else by number where all are numbers, else by text.

    By number 10 comes after 2.
    """
    labels = set(training.labels)
    if training.classes:
        return [label for label in training.classes if label in labels]
    numbers = {label: value for label in labels if (value := number(label)) is not None}
    if len(numbers) < len(labels) or math.inf in map(abs, numbers.values()):
        return sorted(labels)
    return sorted(labels, key=lambda label: (numbers[label], label))


def _split(training: Examples, settings: Settings, by_class: bool) -> tuple[Examples, Examples]:
    """Split into the part to train on and the held-out part; every class stays in the first."""
    generator = torch.Generator().manual_seed(settings.seed)
    order = torch.randperm(len(training), generator=generator).tolist()
    count = round(settings.heldout * len(training))
    if not 0 < count < len(training):
        raise InputError(
            f"{training.file}: {len(training)} examples are too few to hold out "
            f"--heldout {settings.heldout}; leave --patience out"
        )
    left = Counter(training.labels)
    held_out: list[int] = []
    for row in order:
        if len(held_out) < count and (not by_class or left[training.labels[row]] > 1):
            left[training.labels[row]] -= 1
            held_out.append(row)
    if not held_out:
        raise InputError(
            f"{training.file}: every class has a single example, so that none can be held out; "
            "leave --patience out"
        )
    chosen = set(held_out)
    rest = [row for row in range(len(training)) if row not in chosen]
    return training.take(rest), training.take(sorted(held_out))


def spread(values: Sequence[float]) -> Spread:
    """Return mean and standard deviation."""
    return Spread(statistics.mean(values), statistics.stdev(values) if values[1:] else 0.0)


class Classifier(nn.Module):
    """The pooled encoder, dropout, and one logit per class or a number: [B, classes]."""

    def __init__(self, pretrained: Pretrained, classes: int):
        super().__init__()
        self.encoder = pretrained.model.requires_grad_(True)
        self.dropout = nn.Dropout(pretrained.config.classifier_dropout)
        self.classifier = nn.Linear(pretrained.config.hidden_size, classes)
        nn.init.normal_(self.classifier.weight, std=pretrained.config.initializer_range)
        nn.init.zeros_(self.classifier.bias)
        self.to(self.encoder.embeddings.word.device)

    def forward(self, batch: PackedBatch) -> Tensor:
        return self.classifier(self.dropout(self.encoder.classifier_input(batch)))


class _Encoded:
    """Examples as token ids on the CPU; batches of them are on the model's device."""

    def __init__(self, pretrained: Pretrained, task: _Task, examples: Examples, max_length: int):
        first, second = (
            pretrained.token_ids(texts, max_length) for texts in (examples.first, examples.second)
        )
        end = pretrained.vectors.keeps_end
        room = max_length - (3 if second else 2)
        lengths = [len(a) + len(b) for a, b in itertools.zip_longest(first, second, fillvalue=[])]
        if cut := sum(length > room for length in lengths):
            positions = pretrained.config.max_position_embeddings
            more = f"; --max-length may be up to {positions}" if max_length < positions else ""
            warn(
                f"{examples.file}: {cut:,} of {len(lengths):,} examples are longer than "
                f"--max-length = {max_length} tokens; their {'beginning' if end else 'end'} is "
                f"cut{more}",
                LengthWarning,
            )
        if second:
            pairs = [fit_pair(a, b, room, end) for a, b in zip(first, second, strict=True)]
            first, second = [a for a, _ in pairs], [b for _, b in pairs]
        self.first, self.second = [fit(a, max_length - 2, end) for a in first], second
        self.targets = task.targets(examples)
        self.special = pretrained.special
        self.device = pretrained.model.embeddings.word.device

    def __len__(self) -> int:
        return len(self.first)

    def batch(self, rows: Tensor) -> tuple[PackedBatch, Tensor]:
        chosen = rows.tolist()
        second = [self.second[i] for i in chosen] if self.second else None
        pack = pack_texts([self.first[i] for i in chosen], second, self.special)
        # A new key for every example and step: the model's dropout is a function of it.
        pack = dataclasses.replace(pack, dropout_seeds=torch.randint(2**62, (len(chosen),)))
        return pack.to(self.device), self.targets[rows].to(self.device)

    def in_order(self, size: int) -> Iterator[tuple[PackedBatch, Tensor]]:
        for rows in torch.arange(len(self)).split(size):
            yield self.batch(rows)


def _optimizer(
    model: Classifier, settings: Settings, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Return AdamW and its schedule.

    Biases and LayerNorms have no weight decay. The learning rate warms up linearly, then falls
    linearly to zero. Lower layers have a lower learning rate, and frozen ones are not trained.
    """
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        depth = _depth(name, model.encoder)
        trained = depth is not None and (settings.freeze == 0 or depth > settings.freeze)
        parameter.requires_grad_(trained)
        if depth is not None and trained:
            groups.setdefault((depth, parameter.ndim > 1), []).append(parameter)
    groups_of_optimizer = [
        {
            "params": parameters,
            "lr": settings.lr * settings.layer_decay ** max(0, len(model.encoder.layers) - depth),
            "weight_decay": WEIGHT_DECAY if decays else 0.0,
        }
        for (depth, decays), parameters in groups.items()
    ]
    optimizer = torch.optim.AdamW(groups_of_optimizer)
    warmup = max(1, round(WARMUP * steps))
    return optimizer, torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / warmup, (steps - i) / max(1, steps - warmup))
    )


def _depth(name: str, encoder: Model) -> int | None:
    """Return the depth of a parameter; None where a classifier does not use it.

    It is 0 for the embeddings, 1 for the first layer, and one more than that of the last layer for
    the head.
    """
    layers = len(encoder.layers)
    if name.removeprefix("encoder.").startswith(encoder.NOT_FOR_CLASSIFIERS):
        return None
    if name.startswith("encoder.embeddings."):
        return 0
    return int(name.split(".")[2]) + 1 if name.startswith("encoder.layers.") else layers + 1


def architecture(config: ModelConfig) -> str:
    """Return the class of transformers that a fine-tuned folder is for."""
    return f"{table_of(config).prefix}ForSequenceClassification"


def _save(
    out: str | Path,
    model: Classifier,
    pretrained: Pretrained,
    task: _Task,
    table: np.ndarray,
    max_length: int,
) -> None:
    """Write the Hugging Face folder and the picture of the confusion matrix."""
    left_out = model.encoder.NOT_FOR_CLASSIFIERS
    kept = {n: t for n, t in model.encoder.state_dict().items() if not n.startswith(left_out)}
    state = to_hugging_face(kept, pretrained.config)
    state |= {f"classifier.{name}": t for name, t in model.classifier.state_dict().items()}
    labels = task.labels or ["LABEL_0"]
    with new_folder(out) as folder:
        write_folder(
            folder,
            architecture(pretrained.config),
            state,
            pretrained.config,
            pretrained.model.vocab_size,
            pretrained.tokenizer,
            max(max_length, pretrained.max_length),
            pretrained.vectors.keeps_end,
            problem_type="single_label_classification" if task.labels else "regression",
            id2label=dict(enumerate(labels)),
            label2id={label: i for i, label in enumerate(labels)},
        )
    # The picture is drawn when the model is safe, because drawing may fail.
    if task.labels:
        problem = scores.draw_confusion(table, labels, Path(out) / "confusion.png")
        if problem is not None:
            message = f"{problem}; the model is saved all the same"
            warn(message, PictureWarning)
