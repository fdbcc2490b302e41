"""Pre-train BERT with transformers' Trainer, set up as documented: the rival of `bench_quality`.

    python -m benchmarks.quality.trainer_rival RECIPE.toml DATASET RUN --seconds 240 --seed 1 \\
        --points 12 --batch 32 --lr 1e-3 [--precision bf16]

The model is BertForPreTraining with BertConfig's defaults, except the recipe's sizes. Sentence
pairs are made once, half of them with a wrong B, as by transformers'
TextDatasetForNextSentencePrediction until its removal. DataCollatorForLanguageModeling draws new
masks at each use, and pads to the longest sequence of a batch. TrainingArguments has its defaults,
except batch and learning rate. Three things are more favourable than that:

- A pair is two adjacent sentences, and a wrong B is a sentence that could be a true B. So pairs
  have the distribution of the held-out pairs.
- The linear decay follows the clock, so that it ends exactly with the time.
- Sentences and their token ids, which the dataset already contains, cost no time; nor do
  evaluations.

Without --batch and --lr the Trainer gets our recipe: batch, AdamW's settings, schedule, dropout and
exactly our initial weights. Both sides train with AdamW and BERT's 15 % of masks, whatever the
recipe says of these, and in the same precision. bf16 is `TrainingArguments(bf16=True)`: autocast.

RUN/metrics.jsonl gets the evaluations, in the format of a fastbert run.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from benchmarks.step.bench_step import pad
from fastbert.checkpoints.weight_names import to_hugging_face
from fastbert.config import BertConfig, RunConfig, ScheduleConfig
from fastbert.data.batches import heldout_batches
from fastbert.data.dataset import TokenDataset, open_dataset
from fastbert.data.packing import PackedBatch
from fastbert.heap import keep_heap
from fastbert.models.bert import BertForPreTraining
from fastbert.models.heads import Losses
from fastbert.recipe import load_config
from fastbert.training.heldout import HeldOut, heldout_means, heldout_sums
from fastbert.training.metrics import MetricsFile
from fastbert.training.schedule import factor

PRECISIONS = ("fp32", "bf16")
EVALUATION_TOKENS = 2048  # per forward pass, because the logits of all positions are in memory

SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
)
DROPOUT = ("hidden_dropout_prob", "attention_probs_dropout_prob")


def common(precision: str) -> list[str]:
    """The settings that both sides have, so that neither optimizer nor masks nor dtype decide."""
    return [
        "optimizer.name=adamw",
        "objective.mask_rate=0.15",
        f"runtime.precision={precision}",
    ]


def build_model(
    config: RunConfig, vocab_size: int, weights: BertForPreTraining | None = None
) -> transformers.BertForPreTraining:
    """A model with as many weights as ours, with transformers' initialisation and dropout.

    If `weights` are given, it has these and the recipe's dropout.
    """
    names = SIZES if weights is None else (*SIZES, *DROPOUT, "layer_norm_eps")
    settings = transformers.BertConfig(
        vocab_size=vocab_size, **{name: getattr(config.model, name) for name in names}
    )
    model = transformers.BertForPreTraining(settings)
    if weights is not None:
        missing, unexpected = model.load_state_dict(
            to_hugging_face(weights.state_dict(), weights.config), strict=False
        )
        # The decoder is missing because it is tied to the embeddings.
        assert not unexpected and all("decoder" in name for name in missing), (missing, unexpected)
    return model


def sentence_pairs(dataset: TokenDataset, max_length: int, seed: int) -> list[dict[str, Any]]:
    """Each sentence that has a successor, with it or with a wrong B, in the collator's format.

    The label is 0 for the successor, and 1 for a sentence of another document.
    """
    split, draw = dataset.split("train"), random.Random(seed)
    bounds = split.first_token(np.arange(split.sentences + 1))
    tokens = split.gather(bounds[:-1], np.diff(bounds)).tolist()  # a span lies in one shard
    sentences = [tokens[a:b] for a, b in itertools.pairwise(bounds.tolist())]
    starts = split.first_sentence(np.arange(split.documents + 1)).tolist()
    documents = [sentences[a:b] for a, b in itertools.pairwise(starts) if b - a > 1]
    pairs = []
    for number, document in enumerate(documents):
        for a, b in itertools.pairwise(document):
            label = int(draw.random() < 0.5)
            if label:
                other = draw.randrange(len(documents) - 1)
                b = draw.choice(documents[other + (other >= number)][1:])
            pairs.append(_pair(a[:], b[:], label, dataset, max_length))
    return pairs


def _pair(
    a: list[int], b: list[int], label: int, dataset: TokenDataset, max_length: int
) -> dict[str, Any]:
    while len(a) + len(b) > max_length - 3:
        (a if len(a) > len(b) else b).pop()
    cls, sep = dataset.special.cls, dataset.special.sep
    return {
        "input_ids": [cls, *a, sep, *b, sep],
        "token_type_ids": [0] * (len(a) + 2) + [1] * (len(b) + 1),
        "special_tokens_mask": [1, *[0] * len(a), 1, *[0] * len(b), 1],
        "next_sentence_label": label,
    }


@torch.no_grad()
def evaluate(
    model: transformers.BertForPreTraining, batches: list[PackedBatch], mask_id: int
) -> HeldOut:
    """Evaluate their model as `Engine.evaluate` does ours: the same examples, masks and sums."""
    model.eval()
    sums = torch.zeros(9, dtype=torch.float64)
    for batch in batches:
        padded = pad([batch])
        labels, pair_labels = padded.pop("labels"), padded.pop("next_sentence_label")
        found = model(**padded)
        token_logits = found.prediction_logits[labels != -100]  # in the order of the pack
        pair_logits = found.seq_relationship_logits
        token_losses = torch.nn.functional.cross_entropy(
            token_logits, batch.labels, reduction="none"
        )
        pair_losses = torch.nn.functional.cross_entropy(
            pair_logits, pair_labels, reduction="none", ignore_index=-100
        )
        correct = (token_logits.argmax(-1) == batch.labels, pair_logits.argmax(-1) == pair_labels)
        sums += heldout_sums(
            Losses(
                token_losses.sum(),
                pair_losses.sum(),
                token_losses,
                correct[0],
                pair_losses,
                correct[1],
            ),
            batch,
            mask_id,
        )
    return heldout_means(sums)


def heldout(dataset: TokenDataset, config: RunConfig) -> list[PackedBatch]:
    """The recipe's held-out set, in packs that are small enough for padded logits."""
    limit = max(EVALUATION_TOKENS, config.batch.max_length)
    config = dataclasses.replace(
        config, batch=dataclasses.replace(config.batch, micro_batch_tokens=limit)
    )
    return heldout_batches(dataset, config, config.evaluate.sequences)


class Clock:
    """Seconds of training: it starts with the first step and is paused during evaluations."""

    def __init__(self) -> None:
        self._began: float | None = None
        self._before = 0.0

    @property
    def seconds(self) -> float:
        return self._before + (
            time.perf_counter() - self._began if self._began is not None else 0.0
        )

    def go(self) -> None:
        self._began = time.perf_counter()

    def stand(self) -> None:
        self._before, self._began = self.seconds, None


class TimedTrainer(transformers.Trainer):
    """A Trainer whose schedule follows a clock, because the number of steps is not known."""

    def __init__(self, clock: Clock, limit: float, schedule: ScheduleConfig, **arguments: Any):
        super().__init__(**arguments)
        self._clock, self._limit, self._schedule = clock, limit, schedule

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        updated: Any = optimizer or self.optimizer
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
            updated, lambda _: factor(self._schedule, self._clock.seconds / self._limit)
        )
        return self.lr_scheduler


class Evaluations(transformers.TrainerCallback):
    """Run `points` evaluations, the last one at the time limit, which ends the training."""

    def __init__(self, clock: Clock, limit: float, points: int, measure: Any, metrics: MetricsFile):
        self.clock, self.measure, self.metrics = clock, measure, metrics
        self.marks = [limit * (i + 1) / points for i in range(points)]

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 0:
            self.clock.go()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.clock.seconds < self.marks[0]:
            return
        self.clock.stand()
        while self.marks and self.clock.seconds >= self.marks[0]:
            del self.marks[0]
        found = dataclasses.asdict(self.measure())
        done = {
            "step": state.global_step,
            "training_tokens": state.num_input_tokens_seen,
            "training_seconds": self.clock.seconds,
        }
        self.metrics.write({"event": "evaluate", **done, **found})
        control.should_training_stop = not self.marks
        self.clock.go()


def train(
    config: RunConfig,
    dataset: TokenDataset,
    run: Path,
    seconds: float,
    points: int,
    settings: tuple[int, float] | None,
) -> None:
    """Train for `seconds` and write RUN/metrics.jsonl.

    Args:
        config: the recipe.
        dataset: the training data.
        run: folder of metrics.jsonl.
        seconds: time limit.
        points: number of evaluations.
        settings: batch and learning rate; None for our recipe.
    """
    transformers.set_seed(config.seed)
    if settings:
        model = build_model(config, dataset.vocab_size)
        schedule = ScheduleConfig(warmup=0.0, decay="linear")
        optimizer: dict[str, Any] = {
            "per_device_train_batch_size": settings[0],
            "learning_rate": settings[1],
        }
    else:
        torch.manual_seed(config.seed)
        assert isinstance(config.model, BertConfig)
        model = build_model(
            config, dataset.vocab_size, BertForPreTraining(config.model, dataset.vocab_size)
        )
        schedule = config.schedule
        given = config.optimizer
        optimizer = {
            "per_device_train_batch_size": config.batch.sequences,
            "learning_rate": given.lr,
            "max_grad_norm": given.max_grad_norm,
        }
        optimizer |= {
            "adam_beta1": given.betas[0],
            "adam_beta2": given.betas[1],
            "adam_epsilon": given.eps,
            "weight_decay": given.weight_decay,
        }
    clock, batches = Clock(), heldout(dataset, config)
    metrics = MetricsFile(run / "metrics.jsonl", fresh=True)
    evaluations = Evaluations(
        clock, seconds, points, lambda: evaluate(model, batches, dataset.special.mask), metrics
    )
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder,
            seed=config.seed,
            max_steps=10**7,  # the clock ends the training
            include_num_input_tokens_seen="non_padding",
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            bf16=config.runtime.precision == "bf16",
            **optimizer,
        )
        trainer = TimedTrainer(
            clock,
            seconds,
            schedule,
            model=model,
            args=arguments,
            # A list is sufficient.
            train_dataset=sentence_pairs(  # type: ignore[arg-type]
                dataset, config.batch.max_length, config.seed
            ),
            data_collator=transformers.DataCollatorForLanguageModeling(
                transformers.AutoTokenizer.from_pretrained(dataset.tokenizer_dir),
                mlm_probability=0.15,
            ),
            callbacks=[evaluations],
        )
        trainer.train()
    metrics.close()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", help="sizes of the model, max_length and the held-out set")
    parser.add_argument("dataset", help="a folder made by `fastbert prepare`")
    parser.add_argument("run", type=Path, help="an existing folder, for metrics.jsonl")
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--points", type=int, required=True, help="number of evaluations")
    parser.add_argument("--batch", type=int, help="sequences per step; requires --lr")
    parser.add_argument("--lr", type=float)
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help="(fp32)")
    given = parser.parse_args()
    keep_heap()
    settings = [f"data={given.dataset}", f"seed={given.seed}", *common(given.precision)]
    config = load_config(given.recipe, settings)
    tuned = (given.batch, given.lr) if given.batch and given.lr else None
    train(config, open_dataset(given.dataset), given.run, given.seconds, given.points, tuned)


if __name__ == "__main__":
    main()
