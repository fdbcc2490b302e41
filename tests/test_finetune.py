"""Fine-tuning learns, transformers loads the result, and selection uses only permitted data."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from scipy.stats import spearmanr
from tiny_bert import make_hugging_face_folder
from transformers import AutoTokenizer, BertForSequenceClassification, BertModel, pipeline

import fastbert
from fastbert.errors import InputError
from fastbert.tasks.finetune import (
    DataWarning,
    Epoch,
    LengthWarning,
    PictureWarning,
    Settings,
    Spread,
    finetune,
)
from fastbert.tasks.labelled import read_examples
from tests.ranks import ROOT, environment

SUBJECTS = ["list", "name", "class", "module", "value"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_hugging_face_folder(tmp_path_factory.mktemp("hf"))


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[Path, Path]:
    """The label is whether a sentence has the word "not"; the two files share no sentence."""
    folder = tmp_path_factory.mktemp("csv")
    rows = [
        (f"the {s} is {n}the same as the {t}", "no" if n else "yes")
        for s in SUBJECTS
        for t in SUBJECTS
        for n in ("", "not ")
    ]
    for name, part in (("train", rows[10:]), ("test", rows[:10])):
        (folder / f"{name}.csv").write_text(
            "text,label\n" + "".join(f'"{text}",{label}\n' for text, label in part),
            encoding="utf-8",
        )
    return folder / "train.csv", folder / "test.csv"


def test_it_learns_and_transformers_agrees(folder, files: tuple[Path, Path], tmp_path):
    seen: list[Epoch] = []
    followed: list[str] = []

    def follow(items: Sequence, name: str) -> Sequence:
        followed.append(name)
        return items

    result = finetune(
        fastbert.load(folder),
        *files,
        tmp_path / "out",
        Settings(epochs=12, lr=3e-3, batch=8),
        report=seen.append,
        follow=follow,
    )
    assert followed == [f"seed 1, epoch {n} of 12" for n in range(1, 13)]
    assert (
        result.scores["accuracy"] == Spread(1.0, 0.0)
        and result.majority == 0.5
        and result.labels == ["no", "yes"]
    )
    assert result.confusion == [[5, 0], [0, 5]]
    assert seen == result.trials[0].epochs and len(seen) == 12 and seen[-1].loss < seen[0].loss / 2

    model: Any
    model, report = BertForSequenceClassification.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )  # type: ignore[misc]
    assert not any(report.values()), report
    assert model.config.id2label == {0: "no", 1: "yes"} and model.config.label2id == {
        "no": 0,
        "yes": 1,
    }
    held_out = read_examples(files[1])
    inputs = AutoTokenizer.from_pretrained(tmp_path / "out")(
        held_out.first, return_tensors="pt", padding=True
    )
    with torch.no_grad():
        answers = model.eval()(**inputs).logits.argmax(-1).tolist()
    assert [model.config.id2label[i] for i in answers] == held_out.labels
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]

    # The result is also a BERT. Its encoder gives the same vectors as transformers, and the heads
    # that it lacks are refused.
    encoder = fastbert.load(tmp_path / "out")
    with torch.no_grad():
        expected = model.bert(**inputs).last_hidden_state[:, 0]
    np.testing.assert_allclose(encoder.encode(held_out.first, "cls"), expected, rtol=0, atol=5e-5)
    assert encoder.heads == set()


def files_apart(folder: Path) -> Path:
    """Labelled texts that no other file has."""
    (folder / "z.csv").write_text("text,label\nsome list,1\nsome name,0\n")
    return folder / "z.csv"


def test_examples_that_look_wrong_are_said(folder, files: tuple[Path, Path], tmp_path):
    def warned(train: str, evaluation: str | Path) -> list[str]:
        (tmp_path / "x.csv").write_text(train, encoding="utf-8")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", DataWarning)
            finetune(
                fastbert.load(folder), tmp_path / "x.csv", evaluation, None, Settings(epochs=1)
            )
        said = [each for each in caught if each.category is DataWarning]
        assert {each.filename for each in said} <= {__file__}
        return [str(each.message) for each in said]

    (tmp_path / "y.csv").write_text("text,label\nthe list,1\na class,0\na name,1\n")
    rows = "text,label\nthe list,1\nthe name,0\n"
    (shared,) = warned(rows, tmp_path / "y.csv")
    assert "1 of 3 texts are also in" in shared and shared.startswith(str(tmp_path / "y.csv"))
    alike = warned(rows + "a value,1.0\na module,Yes\na type,yes\n", tmp_path / "y.csv")
    assert len(alike) == 3 and "the labels '1' and '1.0' are two classes here" in alike[0]
    assert "'Yes' and 'yes'" in alike[1]
    (two,) = warned(rows + "the list,0\na class,1\nthe list,0\n", files_apart(tmp_path))
    assert two.startswith(f"{tmp_path / 'x.csv'}: 1 text has several labels, as in the lines 2 and")
    (two,) = warned(rows + "the list,0\nthe name,1\n", files_apart(tmp_path))
    assert "2 texts have several labels" in two
    assert not warned(rows + "the list,1\n", files_apart(tmp_path))
    assert not warned(files[0].read_text(encoding="utf-8"), files[1])


@pytest.mark.parametrize(
    ("labels", "regression", "says"),
    [
        (["0.5", "1.5", "3"], None, True),
        (["-.25", "1"], None, True),
        (["0.5", "1.5"], False, False),
        (["0.5", "1.5"], True, False),
        (["1.0", "2.0"], None, False),
        (["0.5", "half"], None, False),
    ],
)
def test_numbers_with_fractions_are_seldom_classes(folder, tmp_path, labels, regression, says):
    file = write_rows(tmp_path / "a.csv", [(f"the name {label}", label) for label in labels])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", DataWarning)
        finetune(fastbert.load(folder), file, file, None, Settings(epochs=1, regression=regression))
    named = [each.filename for each in caught if "--regression learns" in str(each.message)]
    found = [str(each.message) for each in caught if "--regression learns" in str(each.message)]
    assert named == [__file__] * says
    assert not says or f"such as {labels[0]}, and each of the {len(labels)} is a" in found[0]


def test_same_seed_same_weights(folder, files: tuple[Path, Path], tmp_path):
    results = []
    for i, seed in enumerate([1, 1, 2]):
        # What the caller has set in torch changes nothing.
        with torch.set_grad_enabled(i == 0), torch.autocast("cpu", torch.bfloat16, enabled=i > 0):
            model = fastbert.load(folder)
            results.append(
                finetune(model, *files, tmp_path / str(i), Settings(epochs=2, seed=seed))
            )
    same, again, other = ((tmp_path / str(i) / "model.safetensors").read_bytes() for i in range(3))
    assert same == again != other
    assert results[0].trials == results[1].trials


def test_pairs_are_two_segments(folder, tmp_path):
    """The label says which of the two texts has the word "not".

    The words of both texts together are the same under either label.
    """
    rows = [
        (f"{n}{a}", f"{m}{b}", "ab"[bool(m)])
        for a in SUBJECTS
        for b in SUBJECTS
        for n, m in (("not ", ""), ("", "not "))
    ]
    (tmp_path / "x.csv").write_text(
        "label,text_b,text\n" + "".join(f"{label},{b},{a}\n" for a, b, label in rows)
    )
    found = read_examples(tmp_path / "x.csv")
    assert (found.first[1], found.second[1], found.labels[1]) == ("list", "not list", "b")
    result = finetune(
        fastbert.load(folder),
        tmp_path / "x.csv",
        tmp_path / "x.csv",
        None,
        Settings(epochs=10, lr=3e-3, batch=8),
    )
    assert result.scores["accuracy"].mean == 1.0 and result.out is None


def test_long_texts_are_cut(folder, tmp_path):
    (tmp_path / "x.csv").write_text(
        "text,label\n" + "list " * 200 + ",a\n" + "name " * 200 + ",b\n"
    )
    result = finetune(
        fastbert.load(folder),
        tmp_path / "x.csv",
        tmp_path / "x.csv",
        None,
        Settings(epochs=1, max_length=16),
    )
    assert result.trials[0].epochs[0].loss > 0


def test_an_encoder_without_a_pooler(folder, files: tuple[Path, Path], tmp_path):
    BertModel.from_pretrained(folder, add_pooling_layer=False).save_pretrained(tmp_path / "encoder")
    (tmp_path / "encoder/vocab.txt").write_bytes((folder / "vocab.txt").read_bytes())
    assert (
        finetune(fastbert.load(tmp_path / "encoder"), *files, None, Settings(epochs=1))
        .scores["accuracy"]
        .mean
        >= 0
    )


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"text,label\na,x\nb,x\n", "every label is 'x'; two or more"),
        (
            b"text,label\na,x\nb,y\n",
            r"test.csv: line 2: label '(yes|no)' does not occur in .*bad.csv \(and 9 rows more\)",
        ),
        (
            b"text,text_b,label\na,a,no\nb,b,yes\n",
            r"test.csv: texts stand alone here, and in .*bad.csv they are pairs \(text_b\)",
        ),
        (b"text,label\na,no\nb,\n", "bad.csv: 1 bad row: line 3: label is empty"),
    ],
)
def test_files_that_do_not_fit_are_one_line(
    folder, files: tuple[Path, Path], tmp_path, data, words
):
    (tmp_path / "bad.csv").write_bytes(data)
    with pytest.raises(InputError, match=words) as caught:
        finetune(fastbert.load(folder), tmp_path / "bad.csv", files[1], tmp_path / "out")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"epochs": 0}, "--epochs 0"),
        ({"batch": 0}, "--batch 0"),
        ({"seeds": 0}, "--seeds 0"),
        ({"lr": -1.0}, r"--lr -1\.0"),
        ({"max_length": 33}, "--max-length 33: must be from 8 to the model's 32"),
        ({"patience": 0}, "--patience 0 --heldout 0.1"),
        ({"patience": 1, "heldout": 1.0}, "--heldout 1.0"),
        ({"patience": 1, "heldout": 0.001}, "40 examples are too few to hold out"),
        ({"layer_decay": 1.5}, "--layer-decay 1.5"),
        ({"freeze": 3}, "--freeze 3: must be from 0 to the model's 2 layers"),
        ({"metric": "spearman"}, "--metric spearman: of classes it can be accuracy, f1, matthews"),
        (
            {"metric": "f1", "regression": True},
            "--metric f1: of numbers it can be spearman, pearson",
        ),
        (
            {"regression": True},
            "train.csv: 40 bad rows: line 2: label 'no' is not a plain"
            "|train.csv: 40 bad rows: line 2: label 'yes' is not a plain",
        ),
    ],
)
def test_wrong_settings(folder, files: tuple[Path, Path], changes, words):
    with pytest.raises(InputError, match=words):
        finetune(fastbert.load(folder), *files, None, Settings(**changes))


def test_an_output_that_is_taken(folder, files: tuple[Path, Path]):
    with pytest.raises(InputError, match=r"--out \.: is there already"):
        finetune(fastbert.load(folder), *files, ".")


def test_numbers_are_learned_and_transformers_agrees(folder, tmp_path):
    """The number is how often a sentence says "not", in a file with STS-B's layout."""
    rows = [(f"{'not ' * n}{a} {b}", b, n) for a in SUBJECTS for b in SUBJECTS for n in (0, 2, 5)]
    (tmp_path / "train.tsv").write_text(
        "index\tsentence1\tsentence2\tscore\n" + "".join(f"0\t{a}\t{b}\t{n}\n" for a, b, n in rows)
    )
    file = tmp_path / "train.tsv"
    result = finetune(
        fastbert.load(folder), file, file, tmp_path / "out", Settings(epochs=12, lr=3e-3, batch=8)
    )
    assert (
        result.metric == "spearman"
        and result.scores["spearman"].mean > 0.9
        and result.labels == []
        and result.majority is None
    )
    model = pipeline("text-classification", model=str(tmp_path / "out"), function_to_apply="none")
    held_out = read_examples(file)
    answers: Any = model(
        [{"text": a, "text_pair": b} for a, b in zip(held_out.first, held_out.second, strict=True)]
    )
    assert spearmanr([answer["score"] for answer in answers], held_out.numbers())[
        0
    ] == pytest.approx(result.scores["spearman"].mean, abs=1e-6)
    assert not (tmp_path / "out/confusion.png").exists()


def test_the_pipeline_answers_with_the_names_of_the_labels(
    folder, files: tuple[Path, Path], tmp_path
):
    result = finetune(
        fastbert.load(folder), *files, tmp_path / "out", Settings(epochs=12, lr=3e-3, batch=8)
    )
    assert result.scores["accuracy"].mean == 1.0
    classify = pipeline("text-classification", model=str(tmp_path / "out"))
    answers: Any = classify(
        ["the list is not the same as the name", "the list is the same as the name"]
    )
    assert [answer["label"] for answer in answers] == ["no", "yes"]
    assert (tmp_path / "out/confusion.png").read_bytes().startswith(b"\x89PNG")


def test_several_seeds_begin_alike_and_have_a_mean_and_a_spread(
    folder, files: tuple[Path, Path], tmp_path
):
    several = finetune(fastbert.load(folder), *files, None, Settings(epochs=2, seeds=3, lr=1e-3))
    alone = [
        finetune(
            fastbert.load(folder), *files, None, Settings(epochs=2, seed=seed, lr=1e-3)
        ).trials[0]
        for seed in (1, 2, 3)
    ]
    assert several.trials == alone
    found = [trial.scores["matthews"] for trial in alone]
    assert several.scores["matthews"].mean == pytest.approx(np.mean(found)) and several.scores[
        "matthews"
    ].std == pytest.approx(np.std(found, ddof=1))


def test_it_stops_early_and_takes_the_best_epoch(folder, files: tuple[Path, Path], tmp_path):
    """The epoch is chosen on a part of the training file that is not trained on.

    The evaluation file has every label inverted, and does not affect the choice.
    """
    turned = {"no": "yes", "yes": "no"}
    test = read_examples(files[1])
    (tmp_path / "turned.csv").write_text(
        "text,label\n"
        + "".join(
            f"{text},{turned[label]}\n" for text, label in zip(test.first, test.labels, strict=True)
        )
    )
    chosen = Settings(epochs=30, lr=3e-3, batch=8, patience=2, heldout=0.25)
    result = finetune(
        fastbert.load(folder), files[0], tmp_path / "turned.csv", tmp_path / "out", chosen
    )
    (trial,) = result.trials
    scores = [epoch.score for epoch in trial.epochs]
    assert trial.best_epoch == scores.index(max(scores)) + 1 == len(scores) - 2 < 28
    assert max(scores) == 1.0 and result.scores["accuracy"].mean <= 0.2


def test_layers_that_are_frozen_stay_and_lower_ones_move_less(folder, files: tuple[Path, Path]):
    def moved(**changes) -> dict[str, float]:
        model = fastbert.load(folder)
        before = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
        finetune(model, *files, None, Settings(epochs=1, lr=1e-3, **changes))
        after = model.model.state_dict()
        return {name: float((after[name] - before[name]).abs().max()) for name in before}

    frozen = moved(freeze=1)
    for name, distance in frozen.items():
        still = name.startswith(("embeddings.", "layers.0.", "mlm_head.", "nsp_head.classifier."))
        assert (distance == 0) == still, name
    plain, decayed = moved(), moved(layer_decay=0.1)
    for layer, share in ((0, 0.1), (1, 1.0)):
        name = f"layers.{layer}.feed_forward.weight"
        assert decayed[name] == pytest.approx(share * plain[name], rel=0.3)
    assert decayed["embeddings.position"] == pytest.approx(
        0.01 * plain["embeddings.position"], rel=0.3
    )


def test_the_saved_folder_is_plain_json_and_safetensors(folder, files: tuple[Path, Path], tmp_path):
    finetune(fastbert.load(folder), *files, tmp_path / "out", Settings(epochs=1))
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (
        config["architectures"] == ["BertForSequenceClassification"]
        and config["problem_type"] == "single_label_classification"
    )


MANY = """
import resource, sys
from fastbert.tasks.finetune import Settings, finetune
from fastbert.tasks.load import load

# A fault must not take the machine's memory.
resource.setrlimit(resource.RLIMIT_DATA, (6 << 30, 6 << 30))
folder, file, out = sys.argv[1:]
finetune(load(folder, "cpu"), file, file, out, Settings(epochs=1, max_length=8))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_many_classes_need_little_more_memory_than_few(folder, tmp_path):
    """The picture of 200 classes once took over 9 GB, before the model was saved.

    It may take no more memory than the whole of a run with three classes.
    """
    peaks = []
    for classes in (3, 600):
        file, out = tmp_path / f"{classes}.csv", tmp_path / str(classes)
        file.write_text(
            "text,label\n" + "".join(f"the list {i},label {i}\n" for i in range(classes))
        )
        command = [sys.executable, "-c", MANY, str(folder), str(file), str(out)]
        done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert (out / "confusion.png").exists() and len(
            json.loads((out / "config.json").read_text())["id2label"]
        ) == classes
        peaks.append(int(done.stdout))
    print(peaks)
    assert max(peaks) < 2 * peaks[0], peaks


def test_an_evaluation_of_one_label_is_said(folder, tmp_path):
    """Correlations, F1 and Matthews are 0 or 1 there, whatever the model does."""
    rows = [(f"the {word}", str(i % 3)) for i, word in enumerate(SUBJECTS)]
    train = write_rows(tmp_path / "train.csv", rows)
    test = write_rows(tmp_path / "test.csv", [(text, "1") for text, _ in rows])
    for regression, names in ((False, "f1 and matthews"), (True, "spearman and pearson")):
        settings = Settings(epochs=1, regression=regression)
        words = f"test.csv: every label is '1'; {names} say nothing"
        with pytest.warns(DataWarning, match=words) as caught:
            finetune(fastbert.load(folder), train, test, None, settings)
        assert {warning.filename for warning in caught} == {__file__}


@pytest.mark.parametrize("label", [r"$\frac{$", "$5 or $6", "a\nb", "\ud800"])
def test_no_label_costs_the_model(folder, tmp_path, label):
    """The last label is half a character, which is read as U+FFFD."""
    file = tmp_path / "x.jsonl"
    rows = [
        {"text": f"the {word}", "label": label if i % 2 else "b"} for i, word in enumerate(SUBJECTS)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", PictureWarning)
        finetune(fastbert.load(folder), file, file, tmp_path / "out", Settings(epochs=1))
    assert BertForSequenceClassification.from_pretrained(tmp_path / "out").config.id2label == dict(
        enumerate(sorted({label.replace("\ud800", "\ufffd"), "b"}))
    )
    assert (tmp_path / "out/confusion.png").exists()
    assert [str(warning.message) for warning in said if warning.category is PictureWarning] == []
    assert sorted(path.name for path in (tmp_path / "out").glob(".*")) == []


def write_rows(file: Path, rows: list[tuple[str, str]]) -> Path:
    file.write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in rows))
    return file


@pytest.mark.parametrize(
    ("labels", "order"),
    [
        ([str(i) for i in range(12)], [str(i) for i in range(12)]),
        (["10.0", "9.0", "-1.0"], ["-1.0", "9.0", "10.0"]),
        (["2", "10", "01", "1"], ["01", "1", "2", "10"]),
        (["10", "9", "nine"], ["10", "9", "nine"]),
        (["nan", "10", "9"], ["10", "9", "nan"]),
        (["1e400", "10", "9"], ["10", "1e400", "9"]),
    ],
)
def test_classes_that_are_numbers_are_in_the_order_of_numbers(folder, tmp_path, labels, order):
    """Then class i of labels 0 to 11 is label i, as in every data set with integer labels."""
    file = write_rows(tmp_path / "a.csv", [(f"the name {label}", label) for label in labels])
    result = finetune(fastbert.load(folder), file, file, tmp_path / "out", Settings(epochs=1))
    assert result.labels == order
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert list(config["id2label"].values()) == order


def test_classes_have_the_names_and_the_order_of_a_hugging_face_dataset(folder, tmp_path):
    """Its numbers are then the ids of the saved model, and F1 is that of the class 1."""
    names = ["sports", "business", "never"]
    table = pyarrow.table({"text": ["a list", "a name", "the list"], "label": [0, 1, 0]})
    metadata = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
    table = table.replace_schema_metadata({b"huggingface": json.dumps(metadata).encode()})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    test = write_rows(tmp_path / "y.csv", [("one list", "sports"), ("one name", "business")])
    result = finetune(
        fastbert.load(folder), tmp_path / "x.parquet", test, tmp_path / "out", Settings(1)
    )
    assert result.labels == ["sports", "business"]
    model: Any = BertForSequenceClassification.from_pretrained(tmp_path / "out")
    assert model.config.id2label == {0: "sports", 1: "business"}
    numbers = write_rows(tmp_path / "z.csv", [("one list", "0")])
    both_numbers = write_rows(tmp_path / "n.csv", [("one list", "0"), ("one name", "1")])
    # A file without the names, as Dataset.to_csv writes it, on either side.
    for both in ((tmp_path / "x.parquet", numbers), (both_numbers, tmp_path / "x.parquet")):
        assert finetune(fastbert.load(folder), *both, None, Settings(1)).labels == names[:2]
    more = write_rows(tmp_path / "more.csv", [("one list", "3")])
    with pytest.raises(
        InputError, match=r"more\.csv: line 2: label '3' does not occur in .*x\.par"
    ):
        finetune(fastbert.load(folder), tmp_path / "x.parquet", more, None, Settings(1))
    result = finetune(
        fastbert.load(folder), tmp_path / "x.parquet", numbers, None, Settings(1, regression=True)
    )
    assert result.labels == []


def test_what_is_cut_is_counted(folder, tmp_path):
    long = "the list is a name and " * 5
    file = write_rows(tmp_path / "a.csv", [(long, "x"), ("a list", "y"), (long * 3, "y")])
    pairs = tmp_path / "pairs.csv"
    pairs.write_text(f'text,text_b,label\n"{long}","a",x\na,b,y\n')
    for examples, words in (
        (file, "a.csv: 2 of 3 examples are longer than --max-length = 16 tokens; .* up to 32"),
        (pairs, r"pairs.csv: 1 of 2 examples are longer than --max-length = 16 tokens"),
    ):
        with pytest.warns(LengthWarning, match=words) as caught:
            finetune(fastbert.load(folder), examples, examples, None, Settings(1, max_length=16))
        assert {warning.filename for warning in caught} == {__file__}
    short = write_rows(tmp_path / "b.csv", [("a list", "x"), ("a name", "y")])
    with warnings.catch_warnings():
        warnings.simplefilter("error", LengthWarning)
        finetune(fastbert.load(folder), short, short, None, Settings(1, max_length=16))


@pytest.mark.parametrize("second", ["", "a list of names " * 9])
def test_the_side_that_the_tokenizer_cuts(folder, tmp_path, second):
    """The label is the last word, which is read only where the beginning is cut."""
    hf = shutil.copytree(folder, tmp_path / "hf")
    config = hf / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "truncation_side": "left"}))
    texts = [(f"{s} {'is a value and ' * 9}{end}", end) for s in SUBJECTS for end in ("not", "the")]
    file = tmp_path / "x.csv"
    with open(file, "w", newline="") as rows:
        writer = csv.writer(rows)
        writer.writerow(["text", *["text_b"] * bool(second), "label"])
        writer.writerows([text, *[second] * bool(second), label] for text, label in texts)
    settings = Settings(epochs=20, lr=3e-3, batch=4, max_length=16)
    with pytest.warns(LengthWarning, match="10 of 10 examples .*; their beginning is cut; --max"):
        result = finetune(fastbert.load(hf), file, file, tmp_path / "out", settings)
    assert result.scores["accuracy"].mean == 1.0
    with pytest.warns(LengthWarning, match="their end is cut"):
        result = finetune(fastbert.load(folder), file, file, None, Settings(1, max_length=16))
    assert result.scores["accuracy"].mean == 0.5
    model: Any = BertForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    pairs = [[text for text, _ in texts], *[[second] * len(texts)] * bool(second)]
    inputs = tokenizer(*pairs, return_tensors="pt", truncation=True, max_length=16)
    with torch.no_grad():
        answers = model(**inputs).logits.argmax(-1).tolist()
    assert [model.config.id2label[i] for i in answers] == [label for _, label in texts]


@pytest.mark.parametrize("labels", [[str(i / 7) for i in range(40)], ["0.5", "1.5"] * 20])
def test_numbers_are_held_out_though_each_occurs_once(folder, tmp_path, labels):
    file = write_rows(tmp_path / "a.csv", [(f"the name {x}", x) for x in labels])
    settings = Settings(epochs=1, patience=1, heldout=0.25, regression=True)
    sizes = []
    finetune(
        fastbert.load(folder), file, file, None, settings,
        follow=lambda batches, _: sizes.append(sum(map(len, batches))) or batches,
    )  # fmt: skip
    assert sizes == [30]


def test_classes_of_one_example_each_cannot_be_held_out(folder, tmp_path):
    file = write_rows(tmp_path / "a.csv", [(f"the name {i}", f"c{i}") for i in range(20)])
    with pytest.raises(InputError, match="every class has a single example"):
        finetune(fastbert.load(folder), file, file, None, Settings(epochs=1, patience=1))
