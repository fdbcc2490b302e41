"""`run=`: what may exist when a run begins, and that a refused run loses nothing in its folder."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from tiny_bert import make_hugging_face_folder

import fastbert
from fastbert.checkpoints.ownership import RunLock
from fastbert.errors import InputError
from fastbert.recipe import load_config
from fastbert.tasks.run_report import report
from fastbert.training.loop import pretrain
from tests.ranks import ROOT, environment
from tests.tiers import slow
from tests.trials import Laboratory, Trial, lines_so_far, wait_for

SECRET = "root:secret"
NOBODY = 65534
SHORT = ("stop.steps=4", "checkpoint.every=2", "evaluate.every=4")


@pytest.fixture(scope="module")
def lab(tmp_path_factory, small_dataset) -> Laboratory:
    return Laboratory(tmp_path_factory.mktemp("run-folder"), small_dataset.path)


@pytest.fixture
def trial(lab) -> Trial:
    return lab.trial(*SHORT)


@pytest.fixture(scope="module")
def finished(lab) -> Trial:
    trial = lab.trial(*SHORT)
    assert train(trial) == 0
    return trial


@pytest.fixture
def run(trial, finished) -> Path:
    """A finished run, in the trial's own folder."""
    trial.copy_of(finished)
    return trial.run


def train(trial: Trial, *overrides: str, resume: bool = False) -> int:
    """Train in this process."""
    return pretrain(
        load_config(trial.recipe, [*trial.overrides, *overrides]), str(trial.recipe), resume
    ).exit_code


def refusal(trial: Trial, *overrides: str, resume: bool = False) -> str:
    with pytest.raises(InputError) as error:
        train(trial, *overrides, resume=resume)
    assert "\n" not in str(error.value)
    return str(error.value)


def contents(folder: Path) -> dict[str, object]:
    """Return everything in a folder: the bytes of files and the targets of links."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        mode = path.lstat().st_mode
        if stat.S_ISLNK(mode):
            found[str(path.relative_to(folder))] = os.readlink(path)
        else:
            found[str(path.relative_to(folder))] = (
                path.read_bytes() if stat.S_ISREG(mode) else stat.S_IFMT(mode)
            )
    return found


# Folders of something else


def project(folder: Path, dataset: Path) -> None:
    """A folder of something else that has the file names of a run."""
    for name in ("config.toml", "log.txt", "metrics.jsonl", "loss.png", "train.py"):
        (folder / name).write_text(f"my {name}")
    for name in ("tensorboard", "tokenizer", "src"):
        (folder / name).mkdir()
        (folder / name / "events.out.tfevents.1").write_text("months of work")


def config_alone(folder: Path, dataset: Path) -> None:
    (folder / "config.toml").write_text("[database]\nport = 5432\n")


def dataset(folder: Path, dataset: Path) -> None:
    shutil.copytree(dataset, folder, dirs_exist_ok=True)


def exported(folder: Path, dataset: Path) -> None:
    shutil.copytree(make_hugging_face_folder(folder.with_name("model")), folder, dirs_exist_ok=True)


def a_trainer_of_others(folder: Path, dataset: Path) -> None:
    (folder / "checkpoints/epoch=3-step=400.ckpt").mkdir(parents=True)
    (folder / "checkpoint-500").mkdir()
    (folder / "trainer_state.json").write_text("{}")


def hidden_files(folder: Path, dataset: Path) -> None:
    (folder / ".git").mkdir()
    (folder / ".git/HEAD").write_text("ref: refs/heads/main")


def an_owner_of_others(folder: Path, dataset: Path) -> None:
    (folder / ".owner").write_text("alice@example.com\n")
    (folder / "log.txt").write_text("hers")


def records_alone(folder: Path, dataset: Path) -> None:
    """The records of a run whose other files were deleted."""
    (folder / "metrics.jsonl").write_text('{"step": 7, "loss": 3.0}\n')


def a_folder_of_runs(folder: Path, dataset: Path) -> None:
    (folder / "base/checkpoints/step-00000004").mkdir(parents=True)
    RunLock.claim(folder / "base")


def a_checkpoints_folder(folder: Path, dataset: Path) -> None:
    (folder / "step-00000004").mkdir()
    (folder / ".writing-step-00000006-x-1").mkdir()


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        project,
        config_alone,
        dataset,
        exported,
        a_trainer_of_others,
        hidden_files,
        an_owner_of_others,
        records_alone,
        a_folder_of_runs,
        a_checkpoints_folder,
    ],
)
def test_a_folder_of_something_else_is_refused(trial, small_dataset, make, resume):
    trial.run.mkdir()
    make(trial.run, small_dataset.path)
    before = contents(trial.run)
    message = refusal(trial, resume=resume)
    assert (
        f"{trial.recipe}: run = '{trial.run}': holds {sorted(os.listdir(trial.run))[0]}" in message
    )
    assert "is no run; give a new or an empty folder by run=" in message
    link = trial.folder / "link"
    link.symlink_to(trial.run)
    assert "is no run" in refusal(trial, f"run={link}", resume=resume)
    assert contents(trial.run) == before


@pytest.mark.slow
def test_the_folder_that_one_stands_in(lab, small_dataset):
    """This is `run=.` in a project, by the command line."""
    trial = lab.trial(*SHORT)
    project(trial.folder, small_dataset.path)
    before = contents(trial.folder)
    command = [sys.executable, "-m", "fastbert", "pretrain", "recipe.toml", *SHORT, "run=."]
    done = subprocess.run(
        command, cwd=trial.folder, env=environment(), capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (2, "") and contents(trial.folder) == before
    (line,) = done.stderr.splitlines()
    assert (
        line.startswith(
            "fastbert: recipe.toml: run = '.': holds config.toml, ds_config.json, log.txt and "
        )
        and "is no run" in line
    )


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda path: path.write_text(""), "a file; give a folder"),
        (os.mkfifo, "a file; give a folder"),
        (
            lambda path: path.symlink_to("/not/mounted"),
            "a link to /not/mounted, which is not there; mount its disk",
        ),
        (lambda path: path.symlink_to(path.name), "Too many levels of symbolic links"),
    ],
)
def test_what_is_no_folder_is_refused(trial, make, words):
    make(trial.run)
    before = contents(trial.folder)
    for resume in (False, True):
        message = refusal(trial, resume=resume)
        assert f"{trial.recipe}: run = '{trial.run}': " in message and words in message
    assert contents(trial.folder) == before


# Folders that a run may begin in


def a_link(folder: Path, elsewhere: Path) -> None:
    folder.symlink_to(elsewhere)


def a_disk(folder: Path, elsewhere: Path) -> None:
    (folder / "lost+found").mkdir(parents=True)


def a_disk_for_checkpoints(folder: Path, elsewhere: Path) -> None:
    (folder / "checkpoints/lost+found").mkdir(parents=True)


def a_link_for_checkpoints(folder: Path, elsewhere: Path) -> None:
    folder.mkdir()
    (folder / "checkpoints").symlink_to(elsewhere)


def dead_before_the_claim(folder: Path, elsewhere: Path) -> None:
    folder.mkdir()
    (folder / ".owner-0123456789abcdef").write_text("01234")


def dead_after_the_claim(folder: Path, elsewhere: Path) -> None:
    folder.mkdir()
    RunLock.claim(folder)


def dead_in_the_middle_of_a_file(folder: Path, elsewhere: Path) -> None:
    dead_after_the_claim(folder, elsewhere)
    (folder / ".writing-config.toml").write_text("data = ")
    (folder / "config.toml").write_text("data = ")
    (folder / "tokenizer").mkdir()


def dead_before_the_first_step(folder: Path, elsewhere: Path) -> None:
    dead_in_the_middle_of_a_file(folder, elsewhere)
    (folder / "metrics.jsonl").write_text("")
    (folder / "log.txt").write_text("1 parameters\n")
    (folder / "checkpoints/.writing-step-00000004-x-1").mkdir(parents=True)


@pytest.mark.parametrize(
    "make",
    [
        slow(a_link),
        a_disk,
        slow(a_disk_for_checkpoints),
        a_link_for_checkpoints,
        slow(dead_before_the_claim),
        dead_after_the_claim,
        slow(dead_in_the_middle_of_a_file),
        dead_before_the_first_step,
    ],
)
def test_a_run_begins_in_a_folder_with_nothing_in_it(trial, finished, tmp_path, make):
    """It may also contain what an early failure has left; both commands can start it again."""
    make(trial.run, tmp_path)
    resume = make.__name__ in ("dead_after_the_claim", "dead_before_the_first_step")
    assert train(trial, resume=resume) == 0
    assert trial.steps == finished.steps
    config = (trial.run / "config.toml").read_text()
    assert config.replace(str(trial.folder), "") == (
        finished.run / "config.toml"
    ).read_text().replace(str(finished.folder), "")


# Checkpoints that cannot be seen


def moved(path: Path) -> Path:
    path.rename(path.with_name("elsewhere"))
    return path


GONE = {
    "a link to a disk that is not mounted": (
        lambda run: moved(run / "checkpoints").symlink_to("/not/mounted"),
        "/not/mounted",
    ),
    "the folder on which it would be mounted": (
        lambda run: moved(run / "checkpoints").mkdir(),
        "4 steps and a checkpoint step-00000004",
    ),
    "moved away": (
        lambda run: moved(run / "checkpoints"),
        "4 steps and a checkpoint step-00000004",
    ),
    "a loop of links": (
        lambda run: moved(run / "checkpoints").symlink_to("checkpoints"),
        "Too many levels of symbolic links",
    ),
    "a file": (lambda run: moved(run / "checkpoints").write_text(""), "Not a directory"),
    "deleted": (
        lambda run: shutil.rmtree(run / "checkpoints"),
        "4 steps and a checkpoint step-00000004",
    ),
    "the newest not mounted": (
        lambda run: moved(run / "checkpoints/step-00000004").symlink_to("/not/mounted"),
        "/not/mounted",
    ),
}


@pytest.mark.parametrize("how", GONE)
def test_a_run_whose_checkpoints_cannot_be_seen_does_not_start_anew(trial, run, how):
    GONE[how][0](run)
    before = contents(run)
    message = refusal(trial, resume=True)
    assert (
        GONE[how][1] in message
        and str(run) in message
        and any(word in message for word in ("mount its disk", "resume with --resume"))
    )
    assert str(run) in refusal(trial)
    assert contents(run) == before


@pytest.mark.parametrize(
    "how", ["a link to a disk that is not mounted", "a loop of links", "the newest not mounted"]
)
def test_what_reads_a_run_says_so_too(trial, run, how):
    """An older checkpoint is not taken for the newest, nor a run for some other folder."""
    GONE[how][0](run)
    with pytest.raises(InputError, match=GONE[how][1]):
        fastbert.load(run)
    # It is where the results would be.
    assert GONE[how][1] in report(run, trial.folder / "page.html").read_text()


def test_a_resumed_run_counts_as_one_that_had_checkpoints(trial, run):
    """Its save may have come so late that the event was lost with the process."""
    assert train(trial, "stop.steps=5", resume=True) == 0
    lines = [
        line for line in (run / "metrics.jsonl").read_text().splitlines() if '"save"' not in line
    ]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    shutil.rmtree(run / "checkpoints")
    assert "5 steps and a checkpoint step-00000004, but" in refusal(trial, resume=True)


@pytest.mark.parametrize("name", ["metrics.jsonl", ".owner"])
def test_records_that_cannot_be_read_are_not_missing(trial, run, name):
    shutil.rmtree(run / "checkpoints")
    moved(run / name).symlink_to("/not/mounted")
    before = contents(run)
    for resume in (False, True):
        message = refusal(trial, resume=resume)
        assert str(run / name) in message and "mount its disk" in message
    assert contents(run) == before


AS_NOBODY = """
import os, sys
from fastbert.cli import main
import fastbert.tasks.load, fastbert.training.loop  # which this user may not read
if os.geteuid() == 0:
    os.setgroups([])
    os.setgid({nobody})
    os.setuid({nobody})
main(sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.parametrize("place", ["checkpoints", "metrics.jsonl"])
def test_no_right_to_read_is_no_reason_to_start_anew(finished, small_dataset, place):
    """The user is not root, and the folder is not inside one of root's."""
    folder = Path(tempfile.mkdtemp())
    try:
        trial = Trial(
            folder / "trial", shutil.copytree(small_dataset.path, folder / "dataset"), *SHORT
        )
        trial.copy_of(finished)
        if place == "metrics.jsonl":
            shutil.rmtree(trial.run / "checkpoints")
        if os.geteuid() == 0:
            for path in (folder, *folder.rglob("*")):
                os.chown(path, NOBODY, NOBODY)
            os.chown(trial.run / place, 0, 0)
        before = contents(trial.run)
        (trial.run / place).chmod(0o700 if os.geteuid() == 0 else 0)
        code = AS_NOBODY.format(nobody=NOBODY)
        command = [sys.executable, "-c", code, *trial.command]
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=environment(HOME=str(folder)),
            capture_output=True,
            text=True,
            timeout=120,
        )
        (trial.run / place).chmod(0o700)
        assert done.returncode == 2 and done.stdout == "", done
        (line,) = done.stderr.splitlines()
        assert (
            "Permission denied" in line
            and str(trial.run / place).rstrip(".") in line
            and "get the right to read it" in line
        )
        assert contents(trial.run) == before
    finally:
        shutil.rmtree(folder)


# Two starts


def test_a_second_start_does_not_delete_the_records_of_a_living_run(lab):
    """This is before the first checkpoint; afterwards a second start is refused anyway."""
    trial = lab.trial("checkpoint.every=1000000", steps=1000000)
    with trial.start() as ranks:
        wait_for(lambda: lines_so_far(trial) >= 5)
        message = refusal(trial)
        assert (
            "steps without a checkpoint, which may be going on" in message and "--resume" in message
        )
        before = lines_so_far(trial)
        wait_for(lambda: lines_so_far(trial) > before + 3)
        ranks.signal(signal.SIGTERM)
        assert ranks.wait() == [75], ranks.errors
    steps = [step["step"] for step in trial.steps]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) >= 5


def test_a_run_that_died_before_its_first_checkpoint_is_started_again_by_resume(lab, finished):
    trial = lab.trial(*SHORT)
    with trial.start(1, "checkpoint.every=1000000", "stop.steps=1000000") as ranks:
        wait_for(lambda: lines_so_far(trial) >= 5)
        ranks.signal(signal.SIGKILL)
        assert ranks.wait() == [-9]
    before = contents(trial.run)
    assert "steps without a checkpoint" in refusal(trial)
    assert contents(trial.run) == before
    assert any("starting from the beginning" in line for line in trial.resume())
    assert trial.steps == finished.steps


# What is copied into the run, and what is written there


@pytest.fixture
def dataset(small_dataset, tmp_path) -> Path:
    """A copy of the dataset that a test may change."""
    return shutil.copytree(small_dataset.path, tmp_path / "dataset")


def test_a_link_beside_the_tokenizer_is_not_copied(trial, dataset, tmp_path):
    (tmp_path / "shadow").write_text(SECRET)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/shadow").write_text(SECRET)
    (dataset / "tokenizer/x").symlink_to(tmp_path / "shadow")
    (dataset / "tokenizer/y").symlink_to(tmp_path / "folder")
    (dataset / "tokenizer/notes.txt").write_text("not part of a tokenizer")
    assert train(trial, f"data={dataset}") == 0
    assert sorted(os.listdir(trial.run / "tokenizer")) == [
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.txt",
    ]
    assert not any(
        SECRET.encode() in data for data in contents(trial.run).values() if isinstance(data, bytes)
    )


@pytest.mark.parametrize("name", ["vocab.txt", "tokenizer.json", "tokenizer_config.json"])
def test_a_file_of_the_tokenizer_that_is_a_link_is_refused(trial, dataset, tmp_path, name):
    """This holds even for a link to a file of the right size."""
    shutil.move(dataset / "tokenizer" / name, tmp_path / "private")
    (dataset / "tokenizer" / name).symlink_to(tmp_path / "private")
    message = refusal(trial, f"data={dataset}")
    assert f"{dataset / 'tokenizer' / name}: a link, which is not followed" in message
    assert not trial.run.exists()


def test_a_dataset_that_is_a_link_is_accepted(trial, dataset, tmp_path):
    (tmp_path / "link").symlink_to(dataset)
    assert train(trial, f"data={tmp_path / 'link'}") == 0


@pytest.mark.parametrize("name", ["config.toml", "tokenizer/vocab.txt", "tokenizer/tokenizer.json"])
def test_a_resume_does_not_write_through_links(trial, run, tmp_path, name):
    mine = tmp_path / "mine"
    moved(run / name).symlink_to(mine)
    mine.write_text("mine")
    assert train(trial, "stop.steps=5", resume=True) == 0
    assert mine.read_text() == "mine" and not (run / name).is_symlink()


@pytest.mark.slow
def test_a_full_disk_leaves_the_recipe_that_was_there(trial, run):
    """In a process with a file size limit of 200 bytes, the claim fits and the recipe does not."""
    before = (run / "config.toml").read_bytes()

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))

    command = [sys.executable, "-m", "fastbert", *trial.command]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=limit,
    )
    assert (
        done.returncode == 2 and "config.toml cannot be written: File too large" in done.stderr
    ), done.stderr
    assert (run / "config.toml").read_bytes() == before
    assert not list(run.glob(".writing-*"))
    assert train(trial, "stop.steps=5", resume=True) == 0


# metrics.jsonl


def test_bad_lines_of_metrics_forbid_neither_resume_nor_report(trial, run, capsys):
    """Two machines may have appended over a network disk, or the disk had a hole."""
    path = run / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    lines[1:1] = [
        b'{"step": 2, "lo{"step": 2, "loss": 6.9}\n',
        b"\0" * 100 + b"\n",
        b"1.5}\n",
        b"\xff\xfe\n",
        b"null\n",
    ]
    path.write_bytes(b"".join(lines))
    assert train(trial, "stop.steps=6", resume=True) == 0
    assert (
        f"{path}: 5 of its lines cannot be read and are left out; the first is line 2"
        in capsys.readouterr().out
    )
    assert [step["step"] for step in trial.steps] == [1, 2, 3, 4, 5, 6]
    assert path.read_bytes().startswith(b"".join(lines))  # its content does not change
    assert (
        "5 lines of metrics.jsonl cannot be read"
        in report(run, trial.folder / "page.html").read_text()
    )


def test_every_line_of_metrics_is_json_also_where_a_loss_is_not_finite(lab):
    trial = lab.trial(
        "optimizer.name=sgd",
        "optimizer.lr=100",
        "optimizer.max_grad_norm=0",
        "schedule.warmup=0",
        "schedule.decay=constant",
    )
    assert train(trial, "stop.steps=14", "evaluate.every=1", "stop.skipped=100") == 1
    for line in (trial.run / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)
    assert trial.records("evaluate")[-1]["loss"] is None
    report(trial.run, trial.folder / "page.html")
