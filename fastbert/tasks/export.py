"""Export a run as a folder for transformers and sentence-transformers, and verify the result.

The folder is written under a temporary name. It is renamed only after stock transformers has loaded
it without a missing or unexpected weight, and has computed the same logits and the same hidden
states of every layer as our model, on real text.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastbert.checkpoints.hugging_face import left_out, new_folder, write_folder
from fastbert.checkpoints.sentence_folder import write_vector_settings
from fastbert.checkpoints.weight_names import table_of, to_hugging_face
from fastbert.checkpoints.weight_table import HEADS, MLM, NSP
from fastbert.data.dataset import TokenDataset, open_dataset
from fastbert.data.packing import PackedBatch, pack_texts
from fastbert.data.tokenizer import kind_of
from fastbert.errors import InputError
from fastbert.models.bert import BertForPreTraining
from fastbert.models.build import Model
from fastbert.presence import unreadable
from fastbert.recipe import dump_config
from fastbert.tasks.pretrained import Pretrained, fit_pair
from fastbert.training.heldout import HeldOut
from fastbert.training.metrics import read_metrics

# The largest allowed difference of a logit or hidden state. Rounding in fp32 causes 1e-6 for a tiny
# model and 2e-5 for BERT-base.
TOLERANCE = 1e-4
PAIRS = 8  # pairs of sentences from the held-out text that are compared
SENTENCE_TOKENS = 60  # at most, of each of these sentences

# These are compared where the run's dataset is not available.
SENTENCES = [
    (
        "The river rises in the mountains, flows north for 120 kilometres, "
        "and joins the sea near the old harbour.",
        "It is not navigable.",
    ),
    ('She asked: "Who wrote this?"', "Nobody in the room knew the answer."),
    ("In 1969 two people walked on the Moon.", "Their ship returned four days later."),
    (
        "Bread is made of flour, water and salt.",
        "The first railway in the country was opened in 1837.",
    ),
]


# Prefixes of the weights that each architecture does not have.
_LEFT_OUT = {
    "BertForPreTraining": (),
    "BertForMaskedLM": (HEADS[NSP],),
    "BertModel": (HEADS[MLM], "nsp_head.classifier."),
    "ModernBertForMaskedLM": (),
    "ModernBertModel": (HEADS[MLM],),
}


class ExportError(RuntimeError):
    """The exported folder does not hold the same model."""


@dataclass(frozen=True)
class Exported:
    """The result of an export.

    Attributes:
        out, architecture: the folder, and the class of transformers that it is for.
        difference: the largest difference between our logits and those of transformers; for an
            encoder, between BERT's pooled vectors, or ModernBERT's last hidden states.
        hidden_difference: the largest difference of the hidden states of all layers; where a
            layer has values above 1, over the largest of them.
        compared: number of values compared for `difference`.
    """

    out: str
    architecture: str
    difference: float
    hidden_difference: float
    compared: int


def export(
    pretrained: Pretrained, out: str | Path, texts: list[str] | None = None, encoder: bool = False
) -> Exported:
    """Write the folder `out` and verify it.

    Args:
        pretrained: on the CPU, where the comparison runs.
        out: the new folder.
        texts: texts to compare on; by default held-out sentences of the run's dataset, where it
            still exists.
        encoder: leave out the heads of pre-training. transformers warns about weights that the
            class in use does not have, as it does for Google's own BERTs; AutoModel and
            SentenceTransformer load a folder without the heads silently. A BERT needs a pooler for
            this, which a run trains with its NSP head. A folder without an MLM head always becomes
            an encoder.

    Raises:
        InputError: `out` exists already; or a BERT has no pooler where `encoder` is asked for or
            there is no MLM head to export; or without `encoder` a folder has a head of another
            task, such as the classifier of `fastbert finetune`.
        ExportError: transformers does not load the folder cleanly, tokenizes differently, or
            computes other logits. `out` is not created.
    """
    if not encoder and pretrained.recipe is None:
        _check_heads(pretrained)
    architecture = _architecture(pretrained, encoder)
    state = {
        name: tensor
        for name, tensor in pretrained.model.state_dict().items()
        if not name.startswith(_LEFT_OUT[architecture])
    }
    pairs = [(text, "") for text in texts] if texts else _heldout_pairs(pretrained) or SENTENCES
    with new_folder(out) as folder:
        write_folder(
            folder,
            architecture,
            to_hugging_face(state, pretrained.config),
            pretrained.config,
            pretrained.model.vocab_size,
            pretrained.tokenizer,
            pretrained.max_length,
            pretrained.vectors.keeps_end,
        )
        vectors = pretrained.vectors
        if vectors.problem is not None:
            warnings.warn(
                f"{vectors.problem} cannot be exported: SentenceTransformer will take the mean of "
                f"the tokens in {out}",
                stacklevel=2,
            )
        elif vectors.normalize or vectors.pool != "mean":
            size, length = pretrained.config.hidden_size, pretrained.max_length
            write_vector_settings(folder, vectors, size, length)
        card = model_card(pretrained, architecture, Path(out).name)
        (folder / "README.md").write_text(card, encoding="utf-8")
        with _quiet():
            logits, hidden, compared = compare(folder, architecture, pretrained, pairs)
        for what, difference in (("logits", logits), ("hidden states", hidden)):
            if not difference <= TOLERANCE:  # NaN is a failure too
                raise ExportError(
                    f"{out}: not written: transformers' {what} differ by {difference:.3g}, "
                    f"more than {TOLERANCE:g}"
                )
    return Exported(str(out), architecture, logits, hidden, compared)


def _check_heads(pretrained: Pretrained) -> None:
    """Raise InputError for a Hugging Face folder with weights that an export would lose."""
    if lost := left_out(pretrained.path, pretrained.config):
        raise InputError(
            f"{pretrained.path}: the head of a fine-tuned model ({', '.join(lost[:2])}) would be "
            "lost; the folder is already in the form of transformers, so copy it; or give "
            "--encoder for the encoder alone"
        )


def _architecture(pretrained: Pretrained, encoder: bool) -> str:
    """Return the class of transformers to export for; a head that was not trained is left out.

    BertForMaskedLM is BertForPreTraining without pooler and NSP head, and BertModel has no MLM
    head: neither the encoder of a fine-tuned folder nor a folder of sentence-transformers has it.
    """
    if not isinstance(pretrained.model, BertForPreTraining):
        alone = encoder or MLM not in pretrained.heads
        return "ModernBertModel" if alone else "ModernBertForMaskedLM"
    if encoder or MLM not in pretrained.heads:
        if pretrained.pooler:
            return "BertModel"
        what, advice = (
            ("trained without pairs, so it has no pooler", "leave --encoder out")
            if MLM in pretrained.heads
            else ("has no MLM head and no pooler", "take the folder as it is")
        )
        raise InputError(f"{pretrained.path}: {what}, which AutoModel needs; {advice}")
    return "BertForPreTraining" if NSP in pretrained.heads else "BertForMaskedLM"


@torch.inference_mode()
def compare(
    folder: Path, architecture: str, pretrained: Pretrained, pairs: list[tuple[str, str]]
) -> tuple[float, float, int]:
    """Compare our model with stock transformers on pairs of texts.

    transformers gets the texts padded, as it is normally used.

    Args:
        folder, architecture: the exported folder, and the class of transformers to load it with.
        pretrained: our model.
        pairs: texts; the second of a pair may be "".

    Returns:
        The largest difference of a logit, the largest difference of a hidden state of any layer
        (over the largest value of the layer where this is above 1), and the number of logits.

    Raises:
        ExportError: weights are missing or unexpected, or ids differ.
    """
    model, tokenizer = _open_with_transformers(folder, architecture)
    room = pretrained.max_length - 3
    a, b = [], []
    for pair in pairs:
        ours = [pretrained.tokenizer.encode(text, add_special_tokens=False).ids for text in pair]
        theirs = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in pair]
        if ours != theirs:
            raise ExportError(f"transformers' tokenizer gives other ids for {pair!r}")
        first, second = fit_pair(ours[0], ours[1], room)
        a.append(first)
        b.append(second)
    single = not any(b)
    batch = pack_texts(a, None if single else b, pretrained.special)
    states = pretrained.model.hidden_states(batch)
    ours = _results(pretrained.model, architecture, states[-1], batch)

    lengths = batch.cu_seqlens.diff().tolist()
    real = torch.arange(batch.max_seqlen) < torch.tensor(lengths)[:, None]
    inputs = {"input_ids": torch.full(real.shape, pretrained.special.pad)}
    inputs["input_ids"][real] = batch.input_ids
    if isinstance(pretrained.model, BertForPreTraining):
        inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
        inputs["token_type_ids"][real] = batch.token_type_ids
    outputs = model(**inputs, attention_mask=real.long(), output_hidden_states=True)
    # Rounding grows with the values, and the residual stream of a pre-norm model grows by layers.
    hidden = [
        (theirs[real] - ours).abs() / theirs[real].abs().max().clamp(min=1)
        for theirs, ours in zip(outputs["hidden_states"], states, strict=True)
    ]
    differences = [
        ((theirs[real] if theirs.ndim == 3 else theirs) - ours[name]).abs()
        for name, theirs in outputs.items()
        if name in ours
    ]
    return _largest(differences), _largest(hidden), sum(d.numel() for d in differences)


def _results(
    model: Model, architecture: str, last: torch.Tensor, batch: PackedBatch
) -> dict[str, torch.Tensor]:
    """Return our results from the last hidden states, by the names that transformers gives them."""
    if architecture == "ModernBertModel":
        return {"last_hidden_state": last}
    if not isinstance(model, BertForPreTraining):
        return {"logits": model.token_logits(last)}
    first = last[batch.cu_seqlens[:-1].long()]
    if architecture == "BertModel":  # the pooled vector is the input of a classifier
        return {"pooler_output": torch.tanh(model.nsp_head.pooler(first))}
    logits = model.token_logits(last)
    pairs = {"seq_relationship_logits": model.pair_logits(first)}
    return {"prediction_logits": logits, "logits": logits, **pairs}


def _largest(differences: list[torch.Tensor]) -> float:
    # torch's max() of a tensor with a NaN is NaN. Python's max() might lose it.
    return float(torch.stack([d.max() for d in differences]).max())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the messages and progress bars of transformers; its loading report is checked."""
    # Read at import. Everything needed is in the folder.
    os.environ["HF_HUB_OFFLINE"] = "1"
    import transformers

    verbosity = transformers.logging.get_verbosity()
    bars = transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        if bars:
            transformers.logging.enable_progress_bar()


def _open_with_transformers(folder: Path, architecture: str) -> tuple[Any, Any]:
    import transformers

    model, report = getattr(transformers, architecture).from_pretrained(
        folder, output_loading_info=True
    )
    wrong = {kind: sorted(map(str, names)) for kind, names in report.items() if names}
    if wrong:
        raise ExportError(f"transformers loads the weights with complaints: {wrong}")
    return model.eval(), transformers.AutoTokenizer.from_pretrained(folder)


def _datasets_of(pretrained: Pretrained, verify: bool) -> list[TokenDataset | None]:
    """Return the datasets that the run was trained on; None for those that are gone or changed.

    `verify` must be set where their tokens are read.
    """
    if pretrained.recipe is None:
        return []
    found: list[TokenDataset | None] = []
    for source, digest in zip(pretrained.recipe.sources, _digests(pretrained), strict=False):
        try:
            dataset = open_dataset(source.path, verify)
        except InputError:
            dataset = None
        found.append(dataset if dataset and dataset.sha256 == digest else None)
    return found


def _digests(pretrained: Pretrained) -> list[str]:
    """Return the SHA-256 of each dataset's manifest, as the checkpoint says."""
    digests = pretrained.metadata.get("dataset_sha256", "")
    return digests if isinstance(digests, list) else [digests]


def _heldout_pairs(pretrained: Pretrained) -> list[tuple[str, str]]:
    """Return the first two sentences of some held-out documents as text.

    The list is empty where the run's dataset is gone.
    """
    dataset = next(filter(None, _datasets_of(pretrained, verify=True)), None)
    if dataset is None:
        return []
    split = dataset.split("heldout")
    documents = np.linspace(0, split.documents - 1, min(PAIRS, split.documents)).astype(np.int64)
    first, end = split.first_sentence(documents), split.first_sentence(documents + 1)
    second = np.minimum(first + 1, end - 1)  # in a document of one sentence, the same one
    return [
        (_text(pretrained, dataset, a), _text(pretrained, dataset, b))
        for a, b in zip(first.tolist(), second.tolist(), strict=True)
    ]


def _text(pretrained: Pretrained, dataset: TokenDataset, sentence: int) -> str:
    """Decode a held-out sentence, up to SENTENCE_TOKENS tokens."""
    split = dataset.split("heldout")
    start, end = split.first_token(np.array([sentence, sentence + 1]))
    length = min(end - start, SENTENCE_TOKENS)
    return pretrained.tokenizer.decode(split.gather(np.array([start]), np.array([length])).tolist())


def model_card(pretrained: Pretrained, architecture: str, name: str) -> str:
    """Return the README.md: the model, its use, and how it was trained and measured."""
    config, recipe = pretrained.config, pretrained.recipe
    parameters = sum(
        p.numel()
        for n, p in pretrained.model.named_parameters()
        if not n.startswith(_LEFT_OUT[architecture])
    )
    lines = [
        "---",
        "library_name: transformers",
        f"pipeline_tag: {'feature-extraction' if architecture.endswith('Model') else 'fill-mask'}",
        f"tags: [{config.type}, fastbert]",
        "---",
        f"# {name}",
        "",
        f"A {table_of(config).title} of {config.num_hidden_layers} layers, "
        f"hidden size {config.hidden_size}, {config.num_attention_heads} heads and "
        f"{pretrained.model.vocab_size:,} tokens ({parameters / 1e6:.1f} M parameters), "
        f"{'exported by' if recipe is None else 'pre-trained with'} fastbert. "
        f"The tokenizer is {kind_of(pretrained.tokenizer)}.",
        "",
        "```python",
        f"from transformers import AutoTokenizer, {architecture}",
        f'model = {architecture}.from_pretrained("{name}")',
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
        "```",
    ]
    if recipe is not None:
        lines += [
            "",
            "## Data",
            "",
            *_data(pretrained),
            "",
            "## Training",
            "",
            *_figures(pretrained),
        ]
        lines += ["", "The full recipe:", "", "```toml", dump_config(recipe).rstrip(), "```"]
    return "\n".join(lines) + "\n"


def _data(pretrained: Pretrained) -> list[str]:
    """Return the section on the training text.

    The digest is that of the dataset's manifest, which covers every file.
    """
    assert pretrained.recipe is not None
    lines: list[str] = []
    sources, datasets = pretrained.recipe.sources, _datasets_of(pretrained, verify=False)
    for source, digest, dataset in zip(sources, _digests(pretrained), datasets, strict=False):
        said = f"The dataset `{source.path}` (manifest SHA-256 `{digest}`)"
        lines += [""] if lines else []
        if dataset is None:
            lines.append(f"{said}; it was not found when this folder was written.")
            continue
        rows = []
        for name in ("train", "heldout"):
            split = dataset.split(name)
            counts = (split.documents, split.sentences, split.tokens)
            rows.append((name, *(f"{count:,}" for count in counts)))
        lines += [
            f"{said}:",
            "",
            "| split | documents | sentences | tokens |",
            "| --- | --- | --- | --- |",
            *(f"| {' | '.join(row)} |" for row in rows),
        ]
    if len(sources) > 1:
        lines += ["", "They are mixed by the weights in the recipe below."]
    return lines


def _figures(pretrained: Pretrained) -> list[str]:
    """Return a table of the training's length and of the last evaluation before the checkpoint."""
    step, progress = pretrained.metadata["step"], pretrained.metadata.get("progress", {})
    rows = [("steps", f"{step:,}")]
    rows += [("tokens seen", f"{progress['tokens']:,}")] if "tokens" in progress else []
    rows += [("hours", f"{progress['seconds'] / 3600:.2f}")] if "seconds" in progress else []
    # The checkpoint is in the folder `checkpoints` of the run.
    file = pretrained.path.resolve().parents[1] / "metrics.jsonl"
    try:
        evaluations = [
            record
            for record in read_metrics(file)
            if record.get("event") == "evaluate" and record["step"] <= step
        ]
    except OSError as error:
        raise unreadable(file, error) from None
    for key in [f.name for f in fields(HeldOut)] if evaluations else []:
        value = evaluations[-1].get(key)
        rows += [] if value is None else [(f"held-out {key}", f"{value:.4f}")]
    return ["| figure | value |", "| --- | --- |", *(f"| {key} | {value} |" for key, value in rows)]
