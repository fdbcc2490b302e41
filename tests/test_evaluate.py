"""Held-out figures against transformers' own losses, one example at a time."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_bert import make_hugging_face_folder, make_run
from transformers import BertForPreTraining, BertModel

import fastbert
from fastbert.data.batches import heldout_batches
from fastbert.errors import InputError
from fastbert.tasks.evaluate import MASKED, RANDOM, UNCHANGED, evaluate
from tests.ranks import Ranks

SEQUENCES = 24


@pytest.fixture(scope="module")
def folder(small_dataset, tmp_path_factory) -> Path:
    return make_hugging_face_folder(tmp_path_factory.mktemp("hf"), small_dataset.tokenizer_dir)


@pytest.fixture(scope="module")
def run(small_dataset, folder, tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("run"), folder, str(small_dataset.path))


def test_figures_are_those_of_transformers(small_dataset, folder, run):
    stock = BertForPreTraining.from_pretrained(folder).eval()
    model = fastbert.load(run)
    assert model.recipe is not None
    (
        token_losses,
        token_correct,
        hits_of_5,
        shown,
        kept,
        lengths,
        targets,
        pair_losses,
        pair_correct,
    ) = (
        [],
        [],
        [],
        [],
        [],
        [],
        [],
        [],
        [],
    )
    for batch in heldout_batches(small_dataset, model.recipe, SEQUENCES):
        for i, (start, end) in enumerate(
            zip(batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist(), strict=True)
        ):
            ids = batch.input_ids[start:end]
            chosen = (batch.masked_positions >= start) & (batch.masked_positions < end)
            where, labels = batch.masked_positions[chosen] - start, batch.labels[chosen]
            with torch.no_grad():
                found = stock(
                    input_ids=ids[None], token_type_ids=batch.token_type_ids[None, start:end]
                )
            logits, label = found.prediction_logits[0, where], batch.next_sentence_labels[i]
            token_losses += torch.nn.functional.cross_entropy(
                logits, labels, reduction="none"
            ).tolist()
            token_correct += (logits.argmax(-1) == labels).tolist()
            hits_of_5 += (logits.topk(5).indices == labels[:, None]).any(-1).tolist()
            shown += (ids[where] == small_dataset.special.mask).tolist()
            kept += (ids[where] == labels).tolist()
            lengths += [end - start] * len(labels)
            targets += labels.tolist()
            pair_losses.append(
                torch.nn.functional.cross_entropy(found.seq_relationship_logits, label[None]).item()
            )
            pair_correct.append(found.seq_relationship_logits.argmax().item() == label.item())

    def mean(values) -> float:
        values = list(values)
        return sum(values) / len(values)

    def of(chosen, values) -> float:
        return mean(x for x, wanted in zip(values, chosen, strict=True) if wanted)

    followed: list[str] = []

    def follow(items: Sequence, name: str) -> Iterator:
        for item in items:
            followed.append(name)
            yield item

    result = evaluate(model, sequences=SEQUENCES, follow=follow)
    assert len(followed) > 1 and set(followed) == {f"held-out text of {small_dataset.path}"}
    flat = result.flat()
    groups = {name: flat.pop(f"by_{name}") for name in ("corruption", "length", "frequency")}
    assert flat == {
        "loss": pytest.approx(mean(token_losses) + mean(pair_losses), rel=1e-5),
        "loss_mlm": pytest.approx(mean(token_losses), rel=1e-5),
        "accuracy_mlm": pytest.approx(mean(token_correct)),
        "accuracy_of_5_mlm": pytest.approx(mean(hits_of_5)),
        "loss_mask_token": pytest.approx(of(shown, token_losses), rel=1e-5),
        "accuracy_mask_token": pytest.approx(of(shown, token_correct)),
        "loss_nsp": pytest.approx(mean(pair_losses), rel=1e-4),
        "accuracy_nsp": pytest.approx(mean(pair_correct)),
        "perplexity": pytest.approx(math.exp(mean(token_losses)), rel=1e-4),
        "sequences": SEQUENCES,
        "tokens": sum(
            batch.tokens for batch in heldout_batches(small_dataset, model.recipe, SEQUENCES)
        ),
        "masked": len(token_losses),
        "baselines": small_dataset.baselines,
    }
    assert 0.7 < mean(shown) < 0.9

    split = small_dataset.split("train")
    counts = np.bincount(
        split.gather(np.array([0]), np.array([split.tokens])), minlength=small_dataset.vocab_size
    )
    frequency = [1e6 * counts[label] / split.tokens for label in targets]
    classes = {
        "corruption": {
            MASKED: shown,
            RANDOM: [not a and not b for a, b in zip(shown, kept, strict=True)],
            UNCHANGED: [b and not a for a, b in zip(shown, kept, strict=True)],
        },
        "length": {
            "1 to 32": [n <= 32 for n in lengths],
            "33 to 64": [32 < n <= 64 for n in lengths],
        },
        "frequency": {
            "1,000 or more": [f >= 1000 for f in frequency],
            "100 to 1,000": [100 <= f < 1000 for f in frequency],
            "10 to 100": [10 <= f < 100 for f in frequency],
            "less than 10": [f < 10 for f in frequency],
        },
    }
    for kind, members in classes.items():
        assert set(groups[kind]) == {name for name, chosen in members.items() if any(chosen)}
        for name, found in groups[kind].items():
            chosen = members[name]
            assert found["count"] == sum(chosen)
            assert found["loss"] == pytest.approx(of(chosen, token_losses), rel=1e-5)
            assert (found["accuracy"], found["accuracy_of_5"]) == (
                pytest.approx(of(chosen, token_correct)),
                pytest.approx(of(chosen, hits_of_5)),
            )
    assert len(groups["frequency"]) > 1 and {MASKED, UNCHANGED} <= set(groups["corruption"])


def test_count_models_know_frequencies_and_the_token_before(small_dataset, run):
    """Both are the count models of `prepare`, applied to the positions that the model predicts."""
    found = evaluate(fastbert.load(run)).masked
    assert found.unigram == pytest.approx(small_dataset.baselines["unigram"], rel=0.05)
    assert found.left_bigram == pytest.approx(small_dataset.baselines["left_bigram"], rel=0.05)


@pytest.mark.parametrize("tokens", [32, 100, 4096])
def test_the_size_of_a_batch_changes_nothing(run, tokens):
    model = fastbert.load(run)
    assert model.recipe is not None
    other = replace(
        model,
        recipe=replace(model.recipe, batch=replace(model.recipe.batch, micro_batch_tokens=tokens)),
    )
    a, b = evaluate(model, sequences=SEQUENCES).flat(), evaluate(other, sequences=SEQUENCES).flat()
    assert numbers(b) == pytest.approx(numbers(a), rel=2e-6)


def test_ranks_share_the_work(run, tmp_path):
    """Two ranks print what one prints, and only once."""
    results = []
    for world in (1, 2):
        with Ranks(
            ["evaluate", str(run), "--sequences", "24", "--json"], tmp_path / str(world), world
        ) as ranks:
            assert ranks.wait() == [0] * world, ranks.errors
            results.append(json.loads(ranks[0].out.read_text()))
            assert world == 1 or ranks[1].out.read_text() == ""
    assert numbers(results[1]) == pytest.approx(numbers(results[0]), rel=2e-6)


def numbers(value) -> list[float]:
    if isinstance(value, dict):
        return [x for key in sorted(value) for x in numbers(value[key])]
    return [] if value is None or isinstance(value, str) else [value]


def test_a_folder_and_another_dataset_with_the_same_tokenizer(small_dataset, folder, run):
    of_run, of_folder = (
        numbers(evaluate(fastbert.load(x), small_dataset.path, SEQUENCES).flat())
        for x in (run, folder)
    )
    # The folder has no recipe. So the default max_length is cut to the model's 32 positions, which
    # is also the run's value. Packs may differ.
    assert of_folder == pytest.approx(of_run, rel=2e-6)


def test_without_pairs_there_are_no_pair_figures(small_dataset, folder, tmp_path):
    found = evaluate(
        fastbert.load(make_run(tmp_path, folder, str(small_dataset.path), kind="mlm")),
        sequences=SEQUENCES,
    )
    assert found.pairs is None and found.flat()["accuracy_nsp"] is None
    assert found.loss == found.masked.loss


def test_an_endless_perplexity_is_no_crash(small_dataset, run):
    model = fastbert.load(run)
    with torch.no_grad():
        model.model.embeddings.word.mul_(1e4)
    assert evaluate(model, sequences=4).masked.perplexity == math.inf


def test_what_cannot_be_evaluated(small_dataset, folder, run, tmp_path):
    with pytest.raises(InputError, match="not a run, so it names no dataset; give one with --data"):
        evaluate(fastbert.load(folder))
    with pytest.raises(InputError, match="gone: no such dataset"):
        evaluate(fastbert.load(make_run(tmp_path / "run", folder, str(tmp_path / "gone"))))
    BertModel.from_pretrained(folder).save_pretrained(tmp_path / "encoder")
    (tmp_path / "encoder/vocab.txt").write_bytes((folder / "vocab.txt").read_bytes())
    with pytest.raises(InputError, match="no weights of an MLM head"):
        evaluate(fastbert.load(tmp_path / "encoder"), small_dataset.path)


def test_a_run_is_evaluated_on_its_own_dataset_alone(
    small_dataset, folder, run, tmp_path, monkeypatch
):
    """Its recipe may name the dataset by a path that leads elsewhere from another folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("\n\n".join(f"Text {i}. It has two." for i in range(9)))
    tokenizer = small_dataset.path / "tokenizer"
    options = {"tokenizer": tokenizer, "heldout": 0.5, "workers": 1, "progress": False}
    fastbert.prepare("text.txt", "other/data", **options)
    shutil.copytree(small_dataset.path, "data")
    model = fastbert.load(make_run(tmp_path / "short", folder, "data"))
    found = evaluate(model, sequences=4)
    monkeypatch.chdir(tmp_path / "other")
    with pytest.raises(
        InputError, match=r"^data: not the dataset that .*short.*, or changed since"
    ):
        evaluate(model, sequences=4)
    assert evaluate(model, "data", sequences=4).masked.loss != found.masked.loss
    monkeypatch.chdir(tmp_path.parent)
    words = f"^data: no such dataset below {tmp_path.parent}; .*where the run was begun.*--data"
    with pytest.raises(InputError, match=words):
        evaluate(model, sequences=4)


def test_a_dataset_of_another_tokenizer(small_dataset, run, tmp_path):
    other = make_hugging_face_folder(tmp_path / "other")
    with pytest.raises(
        InputError,
        match=r"made with another tokenizer \(1,000 tokens\).*\(400\); prepare the text with "
        r"--tokenizer",
    ):
        evaluate(fastbert.load(other), small_dataset.path)
    # The tokens are the same, but capital letters are kept, so the ids of a text differ.
    cased = make_hugging_face_folder(tmp_path / "cased", small_dataset.tokenizer_dir)
    settings = json.loads((cased / "tokenizer_config.json").read_text())
    (cased / "tokenizer_config.json").write_text(json.dumps(settings | {"do_lower_case": False}))
    with pytest.raises(InputError, match="made with another tokenizer"):
        evaluate(fastbert.load(cased), small_dataset.path)
