"""The comparison with transformers' Trainer.

Both sides are measured in the same way. The tests also cover the pairs that it learns from, and the
figures.
"""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.quality.bench_quality import (
    DEFAULTS,
    FIGURES,
    OURS,
    RECIPE,
    SAME,
    SEARCH_SEED,
    SEARCH_SHARE,
    TRAINER,
    Bench,
    Run,
    first_reached,
    main,
    ours,
    sooner,
)
from benchmarks.quality.trainer_rival import build_model, evaluate, heldout, sentence_pairs
from fastbert.models.bert import BertForPreTraining
from fastbert.models.heads import losses
from fastbert.recipe import load_config
from fastbert.training.heldout import heldout_means, heldout_sums
from tests.tiny_dataset import tiny_dataset


def test_the_same_weights_measure_the_same_on_both_sides(small_dataset):
    config = load_config(RECIPE, [f"data={small_dataset.path}", "evaluate.sequences=64"])
    torch.manual_seed(0)
    mine = BertForPreTraining(config.model, small_dataset.vocab_size).eval()
    with torch.no_grad():  # initially all tokens and pairs are equally likely
        for parameter in mine.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    theirs = build_model(config, small_dataset.vocab_size, mine)
    batches = heldout(small_dataset, config)
    with torch.no_grad():
        sums = [
            heldout_sums(losses(mine(batch)), batch, small_dataset.special.mask)
            for batch in batches
        ]
    a, b = (
        heldout_means(torch.stack(sums).sum(0)),
        evaluate(theirs, batches, small_dataset.special.mask),
    )
    assert len(batches) > 1
    assert vars(b) == pytest.approx(vars(a), rel=1e-4)
    assert sum(p.numel() for p in theirs.parameters()) == sum(p.numel() for p in mine.parameters())
    theirs.cls.predictions.bias.data[small_dataset.special.cls] += 10
    assert evaluate(theirs, batches, small_dataset.special.mask).loss_mlm > a.loss_mlm + 0.1


def test_a_pair_is_two_neighbours_or_has_b_from_another_document(tmp_path):
    lengths = [[4, 3, 6], [5, 5], [7], [2, 9, 1, 30]] * 30
    dataset = tiny_dataset(tmp_path / "dataset", lengths)
    split = dataset.split("train")
    starts, begin = {}, 0
    for number, document in enumerate(lengths):
        for index, length in enumerate(document):
            starts[begin] = (number, index, length)  # every token is its own position
            begin += length
    pairs = sentence_pairs(dataset, max_length=24, seed=1)
    assert len(pairs) == split.sentences - split.documents
    seen = []
    for pair in pairs:
        ids, mask = pair["input_ids"], pair["special_tokens_mask"]
        first, second, third = (i for i, special in enumerate(mask) if special)
        a, b = ids[1:second], ids[second + 1 : third]
        assert first == 0 and [ids[i] for i in (first, second, third)] == [
            dataset.special.cls,
            dataset.special.sep,
            dataset.special.sep,
        ]
        assert pair["token_type_ids"] == [0] * (second + 1) + [1] * (third - second)
        assert len(ids) <= 24
        (a_document, a_index, a_length), (b_document, b_index, b_length) = (
            starts[a[0]],
            starts[b[0]],
        )
        assert len(ids) == min(24, a_length + b_length + 3)
        assert a == list(range(a[0], a[0] + len(a))) and b == list(range(b[0], b[0] + len(b)))
        if pair["next_sentence_label"] == 0:
            assert (b_document, b_index) == (a_document, a_index + 1)
        else:
            assert b_document != a_document and b_index > 0
        seen.append(pair["next_sentence_label"])
    assert 0.35 < sum(seen) / len(seen) < 0.65


def points(*pairs: tuple[float, float]) -> list[dict[str, float]]:
    return [
        {"event": "evaluate", "step": step, "training_seconds": seconds, "loss_mlm": loss}
        for step, (seconds, loss) in enumerate(pairs, 1)
    ]


def test_when_a_loss_is_first_reached():
    curve = points((10, 7.0), (20, 6.0), (30, 6.5), (40, 5.0))
    assert first_reached(curve, 6.5) == 15
    assert first_reached(curve, 8.0) == 10  # before the first evaluation nothing is known
    assert first_reached(curve, 5.75) == 35
    assert first_reached(curve, 4.9) is None


def test_how_many_times_sooner(small_dataset, tmp_path):
    bench = Bench(small_dataset, tmp_path)

    def keep(run: Run, curve: list[dict[str, float]]) -> None:
        (tmp_path / f"{run.name}.jsonl").write_text(
            "".join(json.dumps(point) + "\n" for point in curve)
        )

    rival = Run(TRAINER, 60.0, 1, 8, 1e-3)
    keep(rival, points((30, 7.0), (60, 6.0)))
    for part, loss in ((1, 5.0), (2, 5.5), (3, 6.0), (5, 6.1)):
        keep(ours(60.0 / part, 1), points((24 / part, 6.5), (60 / part, loss)))
    found = sooner(bench, rival, (2, 3, 5))
    assert found["goal_loss_mlm"] == 6.0
    assert found["sooner_on_the_curve"] == pytest.approx(60 / 36)
    assert found["sooner_by_a_shorter_run"] == 3
    keep(rival, points((60, 4.0)))
    found = sooner(bench, rival, (2, 3, 5))
    assert found["sooner_on_the_curve"] == found["sooner_by_a_shorter_run"] == 0


@pytest.mark.slow
def test_a_short_one_runs_and_what_is_finished_is_not_made_again(
    small_dataset, tmp_path, monkeypatch
):
    """One run of each side is made. The others are there, as after an interrupted call."""
    runs = tmp_path / "quality-runs" / small_dataset.sha256[:8] / "fp32"
    runs.mkdir(parents=True)
    search = Run(TRAINER, 2.0 / SEARCH_SHARE, SEARCH_SEED, *DEFAULTS)
    there = (Run(SAME, 2.0, 1), 2.125), (search, 7.5), (ours(1.0, 1), 7.25)
    for run, loss in there:
        last = {
            "event": "evaluate",
            "step": 90,
            "training_tokens": 6000,
            "training_seconds": run.seconds,
            "loss_mlm": loss,
            "loss_mask_token": 2.25,
            "accuracy_mlm": 0.5,
            "accuracy_nsp": 0.5,
        }
        (runs / f"{run.name}.jsonl").write_text(json.dumps(last) + "\n")
    command = ["bench_quality", small_dataset.path, "--out", tmp_path, "--quick"]
    monkeypatch.setattr("sys.argv", list(map(str, command)))
    main()
    text = (tmp_path / "quality.md").read_text(encoding="utf-8")
    # It is as it was saved.
    assert "| 1 | Trainer, our recipe | 2.125 | 2.250 | 50.0% | 0.01 M | 3,000 |" in text
    assert "| 8 | 5e-05 | 7.500 |" in text and "| 1 s | 1 | 7.250 |" in text
    assert (
        "| 1 | fastbert |" in text
        and "| 1 | Trainer |" in text
        and (tmp_path / "quality.png").stat().st_size > 10_000
    )
    record = json.loads((tmp_path / "quality.json").read_text(encoding="utf-8"))
    assert set(record["ratios"]) == {FIGURES[0]}
    made = {row["side"]: row for row in record["rows"] if row.get("budget_s") == 2.0}
    assert set(made) == {OURS, TRAINER, SAME}
    for side in (OURS, TRAINER):
        assert made[side]["tokens"] > 0 and 0 < made[side]["loss_mlm"] != 2.125
    assert len(list(runs.iterdir())) == 5
