"""The command line in real processes: output, exit codes, and one clear line for every error."""

from __future__ import annotations

import contextlib
import json
import re
import resource
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from tiny_bert import make_hugging_face_folder, make_run

from fastbert import __version__
from fastbert.cli import run as run_inside
from tests.ranks import Ranks, environment

VERBS = [
    "prepare",
    "init",
    "pretrain",
    "evaluate",
    "export",
    "fill-mask",
    "nsp",
    "embed",
    "finetune",
    "report",
    "doctor",
    "recipes",
    "plan",
]


@dataclass(frozen=True)
class Result:
    """What a process has left behind; its output ends in `stdout` and `stderr`."""

    returncode: int
    stdout: str
    stderr: str


def fastbert(folder: Path, *arguments: str) -> Result:
    """`fastbert ...` in a process of its own, with `folder` as its working directory.

    The process is forked from one that has imported the libraries (fork_server.py).
    """
    with (
        tempfile.TemporaryDirectory() as outputs,
        Ranks(arguments, Path(outputs), workplace=folder, COLUMNS="200") as ranks,
    ):
        (code,) = ranks.wait()
        return Result(code, ranks[0].out.read_text(), ranks[0].err.read_text())


@pytest.fixture(scope="module")
def place(small_dataset, tmp_path_factory) -> Path:
    """A folder with the input of all verbs: a model, a run, texts, labelled texts, a recipe."""
    folder = tmp_path_factory.mktemp("place")
    hf = make_hugging_face_folder(folder / "hf", small_dataset.tokenizer_dir)
    make_run(folder / "run", hf, str(small_dataset.path))
    (folder / "texts.txt").write_text("A list.\n" + "list " * 99 + "\n", encoding="utf-8")
    (folder / "train.csv").write_text("text,label\na list,x\na name,y\n", encoding="utf-8")
    (folder / "eval.csv").write_text("text,label\nthe list,x\nthe name,y\n", encoding="utf-8")
    (folder / "bad.csv").write_text("text,label\na list\n", encoding="utf-8")
    (folder / "latin.txt").write_bytes(b"caf\xe9\n")
    (folder / "recipe.toml").write_text(
        f'data = "{small_dataset.path}"\n[stop]\nsteps = 10\n', encoding="utf-8"
    )
    (folder / "typo.toml").write_text('data = "x"\n[batch]\nsequence = 8\n', encoding="utf-8")
    (folder / "half").mkdir()
    (folder / "half/config.toml").write_text('data = "x"\n', encoding="utf-8")
    return folder


def test_help_names_every_verb(tmp_path):
    command = [sys.executable, "-m", "fastbert", "--help"]
    result = subprocess.run(
        command, cwd=tmp_path, env=environment(COLUMNS="200"), capture_output=True, text=True
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert all(re.search(rf"^\W*{verb} ", result.stdout, re.MULTILINE) for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_every_verb_explains_every_option(verb, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert run_inside([verb, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"Example: fastbert {verb}" in text
    for line in text.splitlines():
        if option := re.match(r"│ \*? *(--[a-z-]+)", line):
            words = re.split(r"<[^>]*>", line)[-1].strip(" │")
            assert len(words) > 8, f"{verb} {option[1]} has no help: {line}"


def test_version_and_no_arguments(capsys):
    assert run_inside(["--version"]) == 0
    assert capsys.readouterr().out == f"fastbert {__version__}\n"
    assert run_inside([]) == 0
    assert "Usage: fastbert" in capsys.readouterr().out


@pytest.fixture
def inside(place, monkeypatch, capsys):
    """Run a command in this process, where everything is loaded: (exit code, stdout, stderr)."""
    monkeypatch.chdir(place)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: str) -> tuple[int, str, str]:
        code = run_inside(arguments)
        return code, *capsys.readouterr()

    return run


def check_refusal(code: int, out: str, err: str, words: list[str]) -> None:
    assert (code, out) == (2, ""), err
    assert err.count("\n") == 1 and err.startswith("fastbert: ") and "Traceback" not in err, err
    assert all(word in err for word in words), err


# A few bad commands run in a real process, the others in this process.
PROCESSES = ("pretrain", "evaluate", "embed")
BAD = {
    "recipes": (["recipes", "minni"], ["minni: no such packaged recipe; known: base, demo"]),
    "prepare": (["prepare", "nothing.txt", "--out", "new"], ["nothing.txt"]),
    "init": (
        ["init", "hf", "--minutes", "5", "--out", "new.toml"],
        ["hf: not a complete dataset", "manifest.json"],
    ),
    "pretrain": (["pretrain", "typo.toml"], ["typo.toml", "batch.sequence", "batch.sequences"]),
    "evaluate": (["evaluate", "nowhere"], ["'nowhere' does not exist", "fastbert evaluate --help"]),
    "export": (["export", "half", "--out", "new"], ["half: a run without a checkpoint"]),
    "fill-mask": (["fill-mask", "hf", "No gap here."], ["No gap here.", "[MASK]"]),
    "nsp": (["nsp", "hf", "only one"], ["SECOND", "fastbert nsp --help"]),
    "embed": (["embed", "hf", "no.txt", "--out", "x.npy"], ["no.txt: no such file"]),
    "finetune": (
        ["finetune", "hf", "--train", "bad.csv", "--eval", "eval.csv", "--out", "new"],
        ["bad.csv: 1 bad row: line 2"],
    ),
    "report": (["report", "hf"], ["hf: no config.toml; give the folder of a run"]),
    "doctor": (["doctor", "please"], ["please"]),
    "plan": (["plan", "recipe.toml", "--gpu", "h1000", "--stage", "1"], ["--gpu h1000", "a100"]),
}
NOT_UTF_8 = [
    "latin.txt: line 1",
    "is not UTF-8",
    "iconv -f WINDOWS-1252 -t UTF-8 latin.txt > utf8-",
]
MORE = {
    "no such verb": (["pretrian"], ["pretrian", "fastbert --help"]),
    "no such option": (
        ["fill-mask", "hf", "x", "--tokens", "3"],
        ["--tokens", "fastbert fill-mask --help"],
    ),
    "not a number": (["fill-mask", "hf", "[MASK]", "--k", "many"], ["--k", "integer"]),
    "prepare: not UTF-8": (["prepare", "latin.txt", "--out", "new"], NOT_UTF_8),
    "prepare: taken": (["prepare", "texts.txt", "--out", "hf"], ["hf"]),
    "init: no dataset": (
        ["init", "nowhere", "--minutes", "5", "--out", "new.toml"],
        ["nowhere: no such dataset below /", "fastbert prepare"],
    ),
    **{
        f"init: {minutes} minutes": (
            ["init", "hf", "--minutes", minutes, "--out", "new.toml"],
            [f"--minutes {minutes}", "above 0"],
        )
        for minutes in ("0", "-5", "nan", "inf")
    },
    "init: taken": (
        ["init", "hf", "--minutes", "5", "--out", "recipe.toml"],
        ["recipe.toml: exists already"],
    ),
    "init: no folder": (
        ["init", "hf", "--minutes", "5", "--out", "no/new.toml"],
        ["no/new.toml: there is no folder no"],
    ),
    "pretrain: no recipe": (["pretrain", "no.toml"], ["no.toml", "no such recipe"]),
    "pretrain: override": (
        ["pretrain", "recipe.toml", "batch.sequences=0"],
        ["command line", "batch.sequences = 0"],
    ),
    "evaluate: no dataset": (["evaluate", "hf"], ["hf", "--data"]),
    "evaluate: a file": (["evaluate", "texts.txt"], ["'texts.txt' is a file"]),
    "export: taken": (["export", "run", "--out", "hf"], ["--out hf: is there already"]),
    "recipes: taken": (
        ["recipes", "mini", "--out", "recipe.toml"],
        ["recipe.toml: exists already"],
    ),
    "recipes: which": (["recipes", "--out", "new.toml"], ["--out: name the recipe to copy"]),
    "fill: k": (["fill-mask", "hf", "[MASK]", "--k", "0"], ["k = 0"]),
    "embed: pool": (
        ["embed", "hf", "texts.txt", "--out", "x.npy", "--pool", "sum"],
        ["pool = 'sum'", "mean, max, cls"],
    ),
    "embed: not UTF-8": (
        ["embed", "hf", "latin.txt", "--out", "x.npy"],
        NOT_UTF_8,
    ),
    "embed: out": (["embed", "hf", "texts.txt", "--out", "x.txt"], ["--out x.txt", ".npy"]),
    "export: no permission": (
        ["export", "hf", "--out", "/sys/new"],
        ["/sys/", "; choose another path"],  # no space on it would help
    ),
    "finetune: settings": (
        ["finetune", "hf", "--train", "train.csv", "--eval", "eval.csv", "--lr", "0"],
        ["--lr 0.0"],
    ),
    "fill: not UTF-8": (["fill-mask", "hf", "caf\udce9 [MASK]"], ["is not UTF-8"]),
    "finetune: seed": (
        ["finetune", "hf", "--train", "train.csv", "--eval", "eval.csv", "--seed", "-1"],
        ["--seed"],
    ),
    # As where a shell variable is not set. The first would read the current folder.
    "prepare: empty": (["prepare", "", "--out", "new"], ["'prepare' is empty", "shell variable"]),
    "prepare: no out": (["prepare", "texts.txt", "--out", ""], ["'--out' is empty"]),
    "embed: no out": (["embed", "hf", "texts.txt", "--out="], ["'--out=' is empty"]),
    "plan: empty": (["plan", "recipe.toml", ""], ["'recipe.toml' is empty"]),
    "fill: Hub": (
        ["fill-mask", "google-bert/bert-base", "A [MASK]."],
        ["does not exist; for a model of the Hub", "`hf download google-bert/bert-base` prints"],
    ),
    "prepare: Hub": (
        ["prepare", "texts.txt", "--out", "new", "--tokenizer", "bert-base"],
        ["bert-base: no such tokenizer", "`hf download bert-base` prints"],
    ),
    "plan: dashes": (
        ["plan", "recipe.toml", "--optimizer.lr=1e-3"],
        ["No such option: --optimizer.lr", "no dashes before it: optimizer.lr=VALUE"],
    ),
    "plan: dataset": (["plan", "recipe.toml", "data=hf", "--stage", "1"], ["hf", "manifest.json"]),
}


def test_there_is_a_bad_command_for_every_verb():
    assert set(BAD) == set(VERBS) > set(PROCESSES)


@pytest.mark.parametrize("verb", PROCESSES)
def test_bad_input_is_one_line_and_code_2_and_writes_nothing(place, verb):
    arguments, words = BAD[verb]
    before = sorted(place.rglob("*"))
    result = fastbert(place, *arguments)
    check_refusal(result.returncode, result.stdout, result.stderr, words)
    assert sorted(place.rglob("*")) == before


OTHERS = {verb: bad for verb, bad in BAD.items() if verb not in PROCESSES} | MORE


@pytest.mark.parametrize("case", OTHERS)
def test_more_bad_input(place, inside, case):
    arguments, words = OTHERS[case]
    before = sorted(place.rglob("*"))
    code, out, err = inside(*arguments)
    check_refusal(code, out, err, words)
    assert sorted(place.rglob("*")) == before


FULL = {
    "new": ["export", "hf", "--out", "new"],
    "x.npy": ["embed", "hf", "texts.txt", "--out", "x.npy"],
    "x.jsonl": ["embed", "hf", "texts.txt", "--out", "x.jsonl"],
    "x.parquet": ["embed", "hf", "texts.txt", "--out", "x.parquet"],
    "run/report.html": ["report", "run"],
    "tuned": ["finetune", "hf", "--train", "train.csv", "--eval", "eval.csv", "--out", "tuned"],
}


@pytest.mark.parametrize("out", FULL)
def test_a_full_disk_names_what_was_to_be_written(place, inside, out):
    """A limit of the size of a file gives the same kind of error as a full disk."""
    metrics = place / "run/metrics.jsonl"
    metrics.write_text('{"step": 1, "loss_mlm": 6.0, "seconds": 1.0}\n')
    before = sorted(place.rglob("*"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        code, stdout, err = inside(*FULL[out])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    last = f"fastbert: {out}: File too large; free disk space or choose another path\n"
    assert code == 2 and err.endswith(last) and stdout == "", err
    assert sorted(place.rglob("*")) == before


def test_stdout_on_a_full_disk_is_named(place, monkeypatch, capsys):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        code = run_inside(["recipes"])
        monkeypatch.undo()
        assert code == 2 and "standard output: No space left" in capsys.readouterr().err
        with contextlib.suppress(OSError):
            full.close()


def test_a_current_folder_that_was_deleted(tmp_path):
    """oneMKL would end the process by a line of its own when torch is imported."""
    script = f"mkdir gone && cd gone && rmdir ../gone && {sys.executable} -m fastbert plan mini"
    result = subprocess.run(
        ["sh", "-c", script],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    check_refusal(result.returncode, result.stdout, result.stderr, ["folder was deleted"])


def test_a_path_that_is_not_there_is_refused_before_anything_heavy_loads():
    code = (
        "import sys; from fastbert.cli import run; "
        "print(run(['fill-mask', 'nowhere', '[MASK]']), 'torch' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True
    )
    assert result.stdout == "2 False\n"


def test_evaluate(place, inside):
    result = fastbert(place, "evaluate", "run", "--sequences", "8", "--json")
    assert (result.returncode, result.stderr) == (0, "")
    found = json.loads(result.stdout)
    # Which weights were measured: those of the newest checkpoint, not of the step a run is at.
    assert found["step"] == 7 and found["model"] == "run/checkpoints/step-00000007"
    assert found["sequences"] == 8 and found["loss"] == pytest.approx(
        found["loss_mlm"] + found["loss_nsp"]
    )
    code, out, err = inside("evaluate", "run", "--sequences", "8")
    assert (code, err) == (0, "")
    for text in (
        "run/checkpoints/step-00000007, step 7: 8 held-out sequences",
        f"{found['loss_mask_token']:.3f}",
        "next sentence",
        "word frequencies",
    ):
        assert text in out


@pytest.mark.slow
def test_export_says_nothing_but_its_result(place, inside, tmp_path):
    result = fastbert(place, "export", "run", "--out", str(tmp_path / "out"))
    assert (result.returncode, result.stderr) == (0, "")
    first, second = result.stdout.splitlines()
    assert (
        first == f"{tmp_path / 'out'}: BertForPreTraining, loaded by transformers without complaint"
    )
    assert re.fullmatch(
        r"largest difference of [\d,]+ logits: \d\.\de-0\d; of every layer: \d\.\de-0\d", second
    )
    code, out, _ = inside(
        "export", "hf", "--out", str(tmp_path / "again"), "--text", "A list.", "--json"
    )
    assert (
        code == 0
        and json.loads(out)["difference"] < 1e-4
        and (tmp_path / "again/config.json").exists()
    )


def test_fill_and_nsp(place, inside):
    result = fastbert(place, "fill-mask", "hf", "A [MASK] is a [MASK].", "--k", "3", "--json")
    assert (result.returncode, result.stderr) == (0, "")
    found = json.loads(result.stdout)
    assert found["text"] == "A [MASK] is a [MASK]." and [len(best) for best in found["masks"]] == [
        3,
        3,
    ]
    best = found["masks"][0][0]
    _, shown, _ = inside("fill-mask", "run", "A [MASK] is a [MASK].")
    assert (
        best["token"] in shown
        and f"{100 * best['probability']:.1f} %" in shown
        and "[MASK] 2 of 2" in shown
    )
    probability = json.loads(inside("nsp", "hf", "A list.", "A name.", "--json")[1])["probability"]
    assert inside("nsp", "run", "A list.", "A name.") == (
        0,
        f"A  A list.\nB  A name.\n   {100 * probability:.1f} % that B follows A\n",
        "",
    )


def test_embed_warns_once_and_keeps_stdout_clean(inside, tmp_path):
    code, out, err = inside(
        "embed",
        "run",
        "texts.txt",
        "--pool",
        "cls",
        "--layer",
        "1",
        "--out",
        str(tmp_path / "x.npy"),
        "--json",
    )
    assert code == 0
    assert json.loads(out) == {
        "out": str(tmp_path / "x.npy"),
        "rows": 2,
        "hidden_size": 32,
        "pool": "cls",
        "layer": [1],
        "normalize": False,
    }
    assert (
        err
        == "fastbert: 1 of 2 texts are longer than the 30 tokens that the model takes; the rest is "
        "cut off\n"
    )
    assert np.load(tmp_path / "x.npy").shape == (2, 32)


def test_finetune(inside, tmp_path):
    arguments = [
        "finetune",
        "hf",
        "--train",
        "train.csv",
        "--eval",
        "eval.csv",
        "--epochs",
        "2",
        "--out",
        str(tmp_path / "out"),
        "--json",
    ]
    code, out, err = inside(*arguments)
    found = json.loads(out)
    assert (
        code == 0
        and found["labels"] == ["x", "y"]
        and found["majority"] == 0.5
        and len(found["trials"][0]["epochs"]) == 2
    )
    assert [line.split(":")[0] for line in err.splitlines()] == [
        "seed 1, epoch 1 of 2",
        "seed 1, epoch 2 of 2",
    ]
    assert (tmp_path / "out/model.safetensors").exists()
    # It is in the form of transformers, and an export would lose the classifier.
    code, out, err = inside("export", str(tmp_path / "out"), "--out", str(tmp_path / "again"))
    check_refusal(code, out, err, ["classifier.bias", "copy it", "--encoder"])
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["finetune", "hf", "--train", "train.csv", "--eval", "eval.csv", "--out", "new"],
        ["embed", "hf", "texts.txt", "--out", "new.npy"],
        ["export", "hf", "--out", "new"],
    ],
)
def test_what_one_process_does_is_not_done_by_every_rank(inside, monkeypatch, place, arguments):
    """All would write the same result, and all but one fail at the end."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_refusal(*inside(*arguments), [f"{arguments[0]} runs in one", "2 says", "without the lau"])
    assert not (place / arguments[-1]).exists()
    monkeypatch.setenv("LOCAL_RANK", "1")  # the line is said once
    assert inside(*arguments) == (2, "", "")


def test_plan_reads_the_dataset(inside, small_dataset):
    code, out, _ = inside(
        "plan", "recipe.toml", "--gpus", "2", "--gpu", "a100", "--stage", "1", "--json"
    )
    found = json.loads(out)
    assert code == 0 and found["vocab_size"] == small_dataset.vocab_size and found["steps"] == 10
    assert not any("is not here" in line for line in found["assumptions"])
    assert 8 < found["tokens_per_step"] / 256 <= 128
    _, shown, _ = inside("plan", "recipe.toml", "--stage", "1")
    assert "8 x h100" in shown and "memory: activations" in shown and "limited by" in shown


def test_prepare_reports(place, inside, english_jsonl, tmp_path):
    code, out, err = inside(
        "prepare",
        str(english_jsonl),
        "--out",
        str(tmp_path / "dataset"),
        "--vocab-size",
        "500",
        "--workers",
        "1",
        "--json",
    )
    assert (code, err) == (0, "")
    assert json.loads(out)["vocab_size"] == 500 and (tmp_path / "dataset/manifest.json").exists()


def test_a_bug_is_no_bad_input(monkeypatch):
    """An exception that no input causes keeps its traceback."""
    monkeypatch.setattr("fastbert.doctor.diagnose", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_inside(["doctor"])


@pytest.mark.parametrize(
    "command",
    ["pretrain mini data=x run=memory://r", "prepare x.txt --out memory://d"],
)
def test_what_is_kept_in_memory_would_be_lost(command, capsys):
    assert run_inside(command.split()) == 2
    assert "is gone when the command ends; give a folder" in capsys.readouterr().err
