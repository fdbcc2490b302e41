"""NaN and infinity are an error of every verb, and never end with exit code 0.

Weights that contain them are bad input, and a model that computes them has diverged.
"""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_bert import make_hugging_face_folder, make_run

from fastbert.checkpoints import checkpoint
from fastbert.cli import run as command_line
from fastbert.durable import sha256_of
from fastbert.strict_json import dumps
from fastbert.tasks.run_report import report
from fastbert.training.history import History
from fastbert.training.metrics import MetricsFile, read_metrics
from fastbert.training.picture import loss_figure, write_picture
from tests.ranks import Ranks

HUGE = 3e38  # finite, though no sum of two such numbers is
VALUES = "bert.encoder.layer.1.attention.self.value.weight"


@pytest.fixture(scope="module")
def valid(small_dataset, tmp_path_factory) -> Path:
    return make_hugging_face_folder(tmp_path_factory.mktemp("hf"), small_dataset.tokenizer_dir)


def write_labelled(folder: Path, rows: str) -> None:
    """Write x.csv to train on, and y.csv to evaluate on: other texts with the same labels."""
    (folder / "x.csv").write_text("text,label\n" + rows)
    (folder / "y.csv").write_text("text,label\n" + rows.replace("the ", "a "))


@pytest.fixture
def folder(valid, small_dataset, tmp_path) -> Path:
    """A copy of the model that a test may damage, with the input of the verbs."""
    (tmp_path / "texts.txt").write_text("the list\nthe name of the module\n")
    write_labelled(tmp_path, "".join(f"the list {i},{i % 2}\n" for i in range(12)))
    return make_hugging_face_folder(tmp_path / "hf", small_dataset.tokenizer_dir)


def spoil(file: Path, name: str, value: float) -> None:
    weights = load_file(file)
    weights[name].view(-1)[-1] = value
    save_file(weights, file, metadata={"format": "pt"})


def spoil_all(file: Path, name: str, value: float) -> None:
    weights = load_file(file)
    weights[name] = torch.full_like(weights[name], value)
    save_file(weights, file, metadata={"format": "pt"})


def verbs(model: Path, files: Path, data: Path) -> dict[str, list[str]]:
    return {
        "fill": ["fill-mask", str(model), "the [MASK]"],
        "nsp": ["nsp", str(model), "the list", "the name"],
        "embed": ["embed", str(model), str(files / "texts.txt"), "--out", str(files / "out.npy")],
        "embed cls": [
            "embed",
            str(model),
            str(files / "texts.txt"),
            "--out",
            str(files / "out.jsonl"),
            "--pool",
            "cls",
            "--normalize",
        ],
        "evaluate": ["evaluate", str(model), "--data", str(data), "--sequences", "8"],
        "finetune": [
            "finetune",
            str(model),
            "--train",
            str(files / "x.csv"),
            "--eval",
            str(files / "y.csv"),
            "--out",
            str(files / "out"),
        ],
        "export": ["export", str(model), "--out", str(files / "out")],
    }


def refused(command: list[str], code: int, files: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Return the one line that a verb prints; stdout is empty, and nothing is written."""
    before = sorted(files.rglob("*"))
    assert command_line(command) == code, capsys.readouterr()
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if not line.startswith("seed ")]
    assert out == "" and len(lines) == 1 and lines[0].startswith("fastbert: "), (out, err)
    assert sorted(files.rglob("*")) == before
    return lines[0]


@pytest.mark.parametrize("verb", verbs(Path(), Path(), Path()))
def test_a_folder_with_one_nan_is_bad_input(folder, small_dataset, tmp_path, capsys, verb):
    spoil(folder / "model.safetensors", VALUES, math.nan)
    line = refused(verbs(folder, tmp_path, small_dataset.path)[verb], 2, tmp_path, capsys)
    assert f"{folder / 'model.safetensors'}: {VALUES} holds numbers that are not finite" in line


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "name",
    [
        "bert.embeddings.position_embeddings.weight",
        "cls.predictions.bias",
        "cls.seq_relationship.weight",
    ],
)
def test_any_weight_and_either_infinity(folder, tmp_path, capsys, name, value):
    spoil(folder / "model.safetensors", name, value)
    assert f"{name} holds numbers" in refused(
        ["fill-mask", str(folder), "the [MASK]"], 2, tmp_path, capsys
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_type_of_number(folder, tmp_path, capsys, dtype):
    """A number beyond the range of single precision is refused too."""
    file = folder / "model.safetensors"
    weights = {name: tensor.to(dtype) for name, tensor in load_file(file).items()}
    weights[VALUES][0, 0] = 1e300 if dtype == torch.float64 else math.nan
    save_file(weights, file, metadata={"format": "pt"})
    assert f"{VALUES} holds numbers" in refused(
        ["fill-mask", str(folder), "the [MASK]"], 2, tmp_path, capsys
    )


def test_a_checkpoint_and_a_run(folder, small_dataset, tmp_path, capsys):
    """Its hashes are correct, because another program wrote it.

    The page of such a run says so, and is still written.
    """
    run = make_run(tmp_path / "run", folder, str(small_dataset.path))
    path = run / "checkpoints/step-00000007"
    (file,) = path.glob("*.safetensors")
    spoil(file, "weight/layers.0.feed_forward.weight", math.nan)
    manifest = json.loads((path / "manifest.json").read_bytes())
    del manifest["sha256"]
    manifest["files"][file.name] = {"size": file.stat().st_size, "sha256": sha256_of(file)}
    (path / "manifest.json").write_bytes(checkpoint.manifest_bytes(manifest))
    for model in (run, path):
        line = refused(["fill-mask", str(model), "the [MASK]"], 2, tmp_path, capsys)
        assert f"{path}: layers.0.feed_forward.weight holds numbers that are not finite" in line
    (run / "metrics.jsonl").write_text(json.dumps(STEP) + "\n")
    assert (
        "layers.0.feed_forward.weight holds numbers that are not finite" in report(run).read_text()
    )


@pytest.mark.parametrize(
    "verb", [verb for verb in verbs(Path(), Path(), Path()) if verb != "export"]
)
def test_a_model_that_gives_no_finite_numbers_has_diverged(
    folder, small_dataset, tmp_path, capsys, verb
):
    """Every weight is finite, and no output is."""
    spoil_all(folder / "model.safetensors", "bert.embeddings.word_embeddings.weight", HUGE)
    spoil_all(folder / "model.safetensors", "bert.encoder.layer.1.output.LayerNorm.weight", HUGE)
    spoil_all(folder / "model.safetensors", "bert.encoder.layer.1.output.LayerNorm.bias", HUGE)
    line = refused(verbs(folder, tmp_path, small_dataset.path)[verb], 1, tmp_path, capsys)
    assert "diverged" in line


def test_ranks_that_evaluate_such_a_model_end_alike(folder, small_dataset, tmp_path):
    spoil_all(folder / "model.safetensors", "bert.embeddings.word_embeddings.weight", HUGE)
    command = ["evaluate", str(folder), "--data", str(small_dataset.path), "--sequences", "8"]
    with Ranks(command, tmp_path / "ranks", 2) as ranks:
        assert ranks.wait() == [1, 1], ranks.errors
        (line,) = ranks.errors.splitlines()
    assert (
        line
        == f"fastbert: {folder}: the held-out loss is nan: the model has diverged; take another one"
    )


# Fine-tuning


def finetuned(folder: Path, files: Path, *more: str) -> list[str]:
    return [
        "finetune",
        str(folder),
        "--train",
        str(files / "x.csv"),
        "--eval",
        str(files / "y.csv"),
        "--out",
        str(files / "out"),
        *more,
    ]


@pytest.mark.parametrize("lr", ["5e5", "1e10", "1e30"])
def test_a_learning_rate_that_is_too_high(folder, tmp_path, capsys, lr):
    line = refused(finetuned(folder, tmp_path, "--lr", lr), 1, tmp_path, capsys)
    assert "the training has diverged" in line and "nothing is saved; try a lower --lr" in line


@pytest.mark.parametrize(
    "more",
    [["--epochs", "1", "--batch", "12"], ["--patience", "1", "--heldout", "0.3"], ["--seeds", "2"]],
)
def test_also_at_the_last_step_and_on_what_is_held_out(folder, tmp_path, capsys, more):
    """With one step, its loss is finite, and the weights after it are not."""
    assert "the training has diverged" in refused(
        finetuned(folder, tmp_path, "--lr", "1e30", *more), 1, tmp_path, capsys
    )


@pytest.mark.parametrize("lr", ["nan", "inf", "-inf", "0", "3e38"])
def test_a_learning_rate_that_is_none(folder, tmp_path, capsys, lr):
    assert f"--lr {float(lr)}" in refused(
        finetuned(folder, tmp_path, "--lr", lr), 2, tmp_path, capsys
    )


@pytest.mark.parametrize("label", ["1e31", "-1e31", "1e20", "3e38", "1e300"])
def test_numbers_whose_squares_do_not_fit(folder, tmp_path, capsys, label):
    write_labelled(tmp_path, f"the list,1\nthe name,{label}\n")
    line = refused(finetuned(folder, tmp_path, "--regression"), 2, tmp_path, capsys)
    assert f"x.csv: 1 bad row: line 3: label '{label}' is beyond 1e+15" in line


def test_the_largest_numbers_have_scores(folder, tmp_path, capsys):
    """The squares of many of them do not fit single precision either."""
    write_labelled(tmp_path, "".join(f"the list {i},{i}e14\n" for i in range(10)))
    assert (
        command_line([*finetuned(folder, tmp_path, "--regression", "--epochs", "1"), "--json"]) == 0
    )
    scores = json.loads(capsys.readouterr().out)["scores"]
    assert all(math.isfinite(score["mean"]) for score in scores.values())


# JSON

STEP = {
    "step": 1,
    "loss": 7.0,
    "loss_mlm": 6.3,
    "loss_nsp": 0.7,
    "accuracy_mlm": 0.1,
    "accuracy_nsp": 0.5,
    "lr": 1e-3,
    "grad_norm": 1.0,
}
STEP |= {"tokens": 100, "masked": 15, "sequences": 4, "seconds": 0.1, "tokens_per_s": 1000.0}
EVALUATION = {
    "event": "evaluate",
    "step": 1,
    "loss": math.nan,
    "loss_mlm": math.nan,
    "accuracy_mlm": 0.0,
    "loss_mask_token": math.nan,
}
EVALUATION |= {
    "accuracy_mask_token": 0.0,
    "loss_nsp": math.inf,
    "accuracy_nsp": 0.0,
    "seconds": 1.0,
}
EVALUATION |= {"training_tokens": 100, "training_seconds": 1.0}


def constant(name: str) -> None:
    raise AssertionError(f"{name} is no JSON")


def test_metrics_are_json_and_read_again(folder, small_dataset, tmp_path):
    """The picture, the page and the model card read them.

    A run may have had a single evaluation whose loss was NaN.
    """
    run = make_run(tmp_path / "run", folder, str(small_dataset.path))
    file = MetricsFile(run / "metrics.jsonl", fresh=True)
    for record in (STEP, EVALUATION):
        file.write(record)
    for line in (run / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=constant)
    step, evaluation = read_metrics(run / "metrics.jsonl")
    assert step == STEP and evaluation == {
        k: None if v in (math.nan, math.inf) else v for k, v in EVALUATION.items()
    }
    for records in ([STEP, EVALUATION], [step, evaluation]):
        history = History(("loss_mlm", "loss_nsp"))
        history.read(records)
        write_picture(
            run / "loss.png", functools.partial(loss_figure, history, "run", {"unigram": 6.7})
        )
        assert (run / "loss.png").exists()
        (run / "loss.png").unlink()
    assert "<svg" in report(run, sequences=8).read_text()
    assert command_line(["export", str(run), "--out", str(tmp_path / "export")]) == 0


def test_strict_json():
    values = {
        "a": [math.nan, (math.inf, 1.5, None)],
        "b": {"c": -math.inf, "d": "NaN"},
        "e": True,
        "f": np.float64("nan"),
    }
    assert json.loads(dumps(values), parse_constant=constant) == {
        "a": [None, [None, 1.5, None]],
        "b": {"c": None, "d": "NaN"},
        "e": True,
        "f": None,
    }
