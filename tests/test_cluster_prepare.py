"""examples/cluster/prepare.sh and prepare.yaml make the dataset that one command makes.

The schedulers are stand-ins (stand_ins.py) that run all tasks on this machine. The tasks are real.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import stand_ins
from tests.prepared import SMALL_PIECES, command, files_of
from tests.ranks import ROOT, environment

pytestmark = pytest.mark.slow

EXAMPLES = ROOT / "examples/cluster"
OPTIONS = ("--out", "datasets/web", "--vocab-size", "1000")
# The command in small pieces. The first process with index 1 is killed, once it is asked for.
FASTBERT = """#!/bin/sh
if [ -e kill ] && [ "${SLURM_ARRAY_TASK_ID:-$JOB_COMPLETION_INDEX}" = 1 ]; then
    rm kill
    kill -9 $$
fi
exec %s -c %s "$@"
"""


class Place:
    """A folder with text and the commands of a cluster, such as all nodes share."""

    def __init__(self, folder: Path, documents: list[str]):
        self.folder = folder
        (folder / "bin").mkdir()
        (folder / "corpus").mkdir()
        text = "".join(json.dumps({"text": document}) + "\n" for document in documents)
        (folder / "corpus/a.jsonl").write_text(text)
        stand_ins.install(folder / "bin")
        code = f"{SMALL_PIECES}from fastbert.cli import main; main()"
        words = shlex.quote(sys.executable), shlex.quote(code)
        (folder / "bin/fastbert").write_text(FASTBERT % words)
        (folder / "bin/fastbert").chmod(0o755)
        path = os.pathsep.join([str(folder / "bin"), os.environ["PATH"]])
        self.environment = environment(PATH=path)

    def run(self, *words: str, **more: str) -> tuple[int, str]:
        """Return the exit code and the output of a command."""
        options: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        variables = {**self.environment, **more}
        done = subprocess.run(words, cwd=self.folder, env=variables, timeout=300, **options)
        return done.returncode, done.stdout

    def is_made(self) -> bool:
        """Whether the dataset is the one that a single process makes at once."""
        if not (self.folder / "datasets/web").is_dir():
            return False
        alone, options = self.folder / "alone", {"vocab_size": 1000, "progress": False}
        line = command(Path("corpus"), alone, workers=1, **options)
        assert self.run(*line)[0] == 0
        return files_of(self.folder / "datasets/web") == files_of(alone)


@pytest.fixture
def place(tmp_path: Path, english_documents: list[str]) -> Place:
    return Place(tmp_path, english_documents)


def test_slurm(place: Place):
    """Nothing runs after a task that was killed, and the same line makes what is missing."""
    line = [str(EXAMPLES / "prepare.sh"), "corpus/", *OPTIONS]
    (place.folder / "kill").touch()
    assert place.run(*line, TASKS="3")[0] == 0
    codes = json.loads((place.folder / "slurm-jobs.json").read_text())
    assert codes[0] == 0 < codes[1] and codes[2:] == [1, 1] and not place.is_made()
    assert place.run(*line, TASKS="3")[0] == 0
    assert json.loads((place.folder / "slurm-jobs.json").read_text())[4:] == [0, 0, 0, 0]
    assert place.is_made() and not (place.folder / "datasets/web.work").exists()


def test_kubernetes(place: Place):
    """It is applied until a pod says "ready"; a pod that is killed is started again."""
    text = (EXAMPLES / "prepare.yaml").read_text()
    assert text.count("16") == 4, "a comment, completions, parallelism, and N of --task"
    options = json.dumps(OPTIONS[2:])[1:-1]
    text = text.replace("16", "3").replace('"datasets/web", ', f'"datasets/web", {options}, ')
    (place.folder / "prepare.yaml").write_text(text)
    (place.folder / "kill").touch()
    said = list[str]()
    while not any(": ready" in output for output in said):
        assert len(said) < 3, "it encodes, then assembles, then finishes"
        code, output = place.run("kubectl", "apply", "-f", "prepare.yaml")
        assert code == 0, output
        said.append(output)
    assert "fastbert-prepare-1: start 2: exit code 0" in said[0]
    assert place.is_made() and not (place.folder / "datasets/web.work").exists()


def test_kubernetes_fails_the_job_for_bad_input(place: Place):
    text = (EXAMPLES / "prepare.yaml").read_text().replace("corpus/", "none/").replace("16", "2")
    (place.folder / "prepare.yaml").write_text(text)
    code, output = place.run("kubectl", "apply", "-f", "prepare.yaml")
    assert code == 1 and output.count("exit code 2") == 2 and "start 2" not in output
