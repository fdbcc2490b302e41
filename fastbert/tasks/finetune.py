"""Classification of texts or pairs of texts on top of a pre-trained encoder: csv in, accuracy and a Hugging Face folder out.

As in BERT: [CLS] through the pooler, dropout, one matrix; everything is trained.
Source: Devlin et al., 2019, section 4.1 and appendix A.3 (learning rates of 2e-5 to 5e-5, batches of 16 or 32, 2 to 4 epochs).
"""

from __future__ import annotations

import csv
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fastbert.data.packing import PackedBatch, pack_texts
from fastbert.errors import InputError
from fastbert.tasks.hugging_face import check_new, new_folder, write_folder
from fastbert.tasks.pretrained import Pretrained, fit_pair
from fastbert.weights import HEADS, MLM, to_hugging_face

WARMUP = 0.1  # of the steps; then linear to zero
WEIGHT_DECAY = 0.01
CLIP = 1.0
EVALUATION_BATCH = 64
MAX_LENGTH = 128


@dataclass(frozen=True)
class Examples:
    """The rows of a csv file: `second` is empty where there is no column text_b; `lines` are their first lines in the file."""

    file: Path
    first: list[str]
    second: list[str]
    labels: list[str]
    lines: list[int]


@dataclass(frozen=True)
class Epoch:
    """Mean training loss in nats, and accuracy on the evaluation file."""

    epoch: int
    loss: float
    accuracy: float


@dataclass(frozen=True)
class Finetuned:
    """`majority` is the accuracy of always answering the most frequent label of the evaluation file: what there is to beat."""

    accuracy: float
    majority: float
    labels: list[str]
    epochs: list[Epoch]
    out: str | None


def finetune(
    pretrained: Pretrained,
    train: str | Path,
    evaluation: str | Path,
    out: str | Path | None = None,
    *,
    epochs: int = 3,
    lr: float = 5e-5,
    batch: int = 32,
    max_length: int | None = None,
    seed: int = 1,
    report: Callable[[Epoch], None] = lambda _: None,
) -> Finetuned:
    """Train on one csv file, measure on another. The weights of `pretrained` are trained in place.

    Args:
        train, evaluation: UTF-8 csv with a header and the columns text and label, and text_b where texts come in pairs.
        out: a new folder for a BertForSequenceClassification; None saves nothing.
        epochs, lr, batch: passes over the file, highest learning rate, examples of a step.
        max_length: tokens of an example, special ones counted; the end of a longer one (of its longer half) is cut. By default 128, or the
            model's positions where they are fewer.
        report: called after every epoch.

    Raises:
        InputError: a number out of range, a file that is missing or wrong (with its line), labels that do not fit, `out` taken.
    """
    longest = pretrained.config.max_position_embeddings
    max_length = min(MAX_LENGTH, longest) if max_length is None else max_length
    if epochs < 1 or batch < 1 or lr <= 0:
        raise InputError(f"--epochs {epochs} --batch {batch} --lr {lr}: all must be above 0")
    if not 8 <= max_length <= longest:
        raise InputError(f"--max-length {max_length}: must be from 8 to the model's {longest} positions")
    if out is not None:
        check_new(out)
    training, held_out = read_csv(train), read_csv(evaluation)
    labels = sorted(set(training.labels))
    if len(labels) < 2:
        raise InputError(f"{train}: every label is {labels[0]!r}; two or more are needed")
    for label, line in zip(held_out.labels, held_out.lines, strict=True):
        if label not in labels:
            raise InputError(f"{evaluation}:{line}: label {label!r} does not occur in {train}")
    if bool(training.second) != bool(held_out.second):
        raise InputError(f"{evaluation}: only one of this file and {train} has the column text_b; give both or none")

    torch.manual_seed(seed)
    model = Classifier(pretrained, len(labels))
    data, data_held_out = (_Encoded(pretrained, e, labels, max_length) for e in (training, held_out))
    optimizer, schedule = _optimizer(model, lr, epochs * -(-len(data) // batch))
    done: list[Epoch] = []
    for epoch in range(1, epochs + 1):
        total = 0.0
        model.train()
        for rows in torch.randperm(len(data)).split(batch):
            pack, target = data.batch(rows)
            loss = nn.functional.cross_entropy(model(pack), target)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            schedule.step()
            total += loss.item() * len(rows)
        done.append(Epoch(epoch, total / len(data), accuracy(model, data_held_out)))
        report(done[-1])
    if out is not None:
        _save(out, model, pretrained, labels)
    majority = max(Counter(held_out.labels).values()) / len(held_out.labels)
    return Finetuned(done[-1].accuracy, majority, labels, done, None if out is None else str(out))


def read_csv(file: str | Path) -> Examples:
    """Read and check a csv file of examples; raises InputError with file and line for anything that is not as `finetune` says."""
    file = Path(file)
    found = Examples(file, [], [], [], [])
    try:
        with open(file, encoding="utf-8-sig", newline="") as handle:
            reader = csv.reader(handle, strict=True)
            columns = next(reader, [])
            if sorted(columns) not in (["label", "text"], ["label", "text", "text_b"]):
                raise InputError(f"{file}:1: the columns are {columns}; must be text,label or text,text_b,label")
            line = reader.line_num + 1
            for row in reader:
                if row:
                    _add(found, dict(zip(columns, row, strict=False)), len(row) - len(columns), line)
                line = reader.line_num + 1
    except csv.Error as error:
        raise InputError(f"{file}:{reader.line_num}: not valid csv: {error}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not UTF-8 ({error.reason}); convert it first") from None
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}") from None
    if not found.labels:
        raise InputError(f"{file}: no examples below the header")
    return found


def _add(found: Examples, row: dict[str, str], surplus: int, line: int) -> None:
    if surplus:
        what = f"{abs(surplus)} {'more' if surplus > 0 else 'fewer'} fields than the header has columns"
        raise InputError(f"{found.file}:{line}: {what}; put texts with commas in quotes")
    empty = next((name for name, value in row.items() if not value.strip()), None)
    if empty:
        raise InputError(f"{found.file}:{line}: {empty} is empty; fill it in or delete the line")
    found.first.append(row["text"])
    found.labels.append(row["label"])
    found.lines.append(line)
    if "text_b" in row:
        found.second.append(row["text_b"])


class Classifier(nn.Module):
    """[CLS] of the encoder, pooler, dropout, one logit a class; [B, classes]."""

    def __init__(self, pretrained: Pretrained, classes: int):
        super().__init__()
        self.encoder = pretrained.model.requires_grad_(True)
        self.dropout = nn.Dropout(pretrained.config.hidden_dropout_prob)
        self.classifier = nn.Linear(pretrained.config.hidden_size, classes)
        nn.init.normal_(self.classifier.weight, std=pretrained.config.initializer_range)
        nn.init.zeros_(self.classifier.bias)
        self.to(self.encoder.embeddings.words.device)

    def forward(self, batch: PackedBatch) -> Tensor:
        hidden = self.encoder.hidden_states(batch)[-1]
        pooled = torch.tanh(self.encoder.nsp_head.pooler(hidden[batch.cu_seqlens[:-1].long()]))
        return self.classifier(self.dropout(pooled))


class _Encoded:
    """Examples as token ids on the CPU, and batches of them on the model's device."""

    def __init__(self, pretrained: Pretrained, examples: Examples, labels: list[str], max_length: int):
        def ids(texts: list[str]) -> list[list[int]]:
            return [encoding.ids for encoding in pretrained.tokenizer.encode_batch(texts, add_special_tokens=False)]

        first, second = ids(examples.first), ids(examples.second)
        if second:
            pairs = [fit_pair(a, b, max_length - 3) for a, b in zip(first, second, strict=True)]
            first, second = [a for a, _ in pairs], [b for _, b in pairs]
        self.first, self.second = [a[: max_length - 2] for a in first], second
        self.targets = torch.tensor([labels.index(label) for label in examples.labels])
        self.special = pretrained.special
        self.device = pretrained.model.embeddings.words.device

    def __len__(self) -> int:
        return len(self.first)

    def batch(self, rows: Tensor) -> tuple[PackedBatch, Tensor]:
        chosen = rows.tolist()
        second = [self.second[i] for i in chosen] if self.second else None
        pack = pack_texts([self.first[i] for i in chosen], second, self.special)
        # A fresh key for every example and step: the model's dropout is a function of it.
        pack = dataclasses.replace(pack, dropout_keys=torch.randint(2**62, (len(chosen),)))
        return pack.to(self.device), self.targets[rows].to(self.device)

    def in_order(self, size: int) -> Iterator[tuple[PackedBatch, Tensor]]:
        for rows in torch.arange(len(self)).split(size):
            yield self.batch(rows)


@torch.no_grad()
def accuracy(model: Classifier, data: _Encoded) -> float:
    """Share of the examples whose label has the largest logit."""
    model.eval()
    hits = sum(int((model(pack).argmax(-1) == target).sum()) for pack, target in data.in_order(EVALUATION_BATCH))
    return hits / len(data)


def _optimizer(model: Classifier, lr: float, steps: int) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW, no decay on biases and LayerNorms; linear warm-up, then linear to zero."""
    unused = ("encoder.mlm_head.", "encoder.nsp_head.classifier.")
    used = [p for name, p in model.named_parameters() if not name.startswith(unused)]
    groups = [
        {"params": [p for p in used if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in used if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr)
    warmup = max(1, round(WARMUP * steps))
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min((i + 1) / warmup, (steps - i) / max(1, steps - warmup)))


def _save(out: str | Path, model: Classifier, pretrained: Pretrained, labels: list[str]) -> None:
    left_out = (HEADS[MLM], "nsp_head.classifier.")
    state = to_hugging_face({name: t for name, t in model.encoder.state_dict().items() if not name.startswith(left_out)})
    state |= {f"classifier.{name}": tensor for name, tensor in model.classifier.state_dict().items()}
    names = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    with new_folder(out) as folder:
        write_folder(
            folder,
            "BertForSequenceClassification",
            state,
            pretrained.config,
            pretrained.model.vocab_size,
            pretrained.tokenizer,
            problem_type="single_label_classification",
            **names,
        )
