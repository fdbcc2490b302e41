"""OpenMP's threads spin on idle cores, and sleep beside busy programs."""

from __future__ import annotations

import json
import os
import subprocess

import pytest
from tiny_bert import make_hugging_face_folder

from fastbert import child
from fastbert.contention import CONTENDED, POLICIES, wait_policy, waited
from tests.ranks import environment
from tests.tiers import slow
from tests.trials import Trial

spinning = pytest.mark.skipif(
    not wait_policy().startswith("by spinning"), reason=f"OpenMP's threads wait {wait_policy()}"
)

# Counts the processor time of two threads that meet a hundred times, with a pause after each time.
# A thread that sleeps uses none of it in the pauses. Who is contended is decided here, since the
# machine of a test may be busy or not.
SPUN = """
import json, math, os, time, torch
from fastbert import contention
contention.LOOK_S, contention.ASLEEP_S = 0.01, (2.0, 2.0)
x, a, b = torch.zeros(1 << 17), torch.randn(300, 300), torch.randn(300, 300)

def spun(contended, threads):
    contention.CONTENDED = contended
    while len(os.listdir("/proc/self/task")) != threads:
        time.sleep(0.01)
    before = time.process_time()
    for _ in range(100):
        x.add_(1)
        time.sleep(0.002)
    return time.process_time() - before, float((a @ b).double().sum())

contention.CONTENDED = math.inf
x.add_(1)  # begins the threads
contention.watch_contention()
contention.watch_contention()
threads = len(os.listdir("/proc/self/task"))
team = max(2, len(os.sched_getaffinity(0)))  # a thread of Python, and those that it adds
print(json.dumps([spun(math.inf, threads), spun(-1, threads + team), spun(math.inf, threads)]))
"""


def run(code: str, *arguments: str, **variables: str) -> str:
    """The output of a process in which OpenMP has two threads."""
    without = {k: v for k, v in environment().items() if k not in POLICIES}
    done = subprocess.run(
        child.command("exec(sys.argv[1])", code, *arguments),
        env=without | {"OMP_NUM_THREADS": "2"} | variables,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-600:]
    return done.stdout


@spinning
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two threads spin on two cores only")
def test_threads_sleep_while_the_cores_are_contended_and_spin_again_afterwards():
    (first, one), (asleep, two), (again, three) = json.loads(run(SPUN))
    assert asleep < min(first, again) / 2
    assert one == two == three


# Two threads and another busy process on one core.
BESIDE = """
import os, subprocess, threading, torch
from fastbert.contention import waited
core = min(os.sched_getaffinity(0))
for thread in os.listdir("/proc/self/task"):
    os.sched_setaffinity(int(thread), {core})
other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
try:
    found = []
    thread = threading.Thread(target=lambda: found.append(waited(1.0)))
    thread.start()
    x = torch.zeros(1 << 17)
    while thread.is_alive():
        x.add_(1)
    print(found[0])
finally:
    other.kill()
    other.wait()
"""


@spinning
def test_a_busy_neighbour_is_noticed():
    assert float(run(BESIDE)) > CONTENDED > waited(0.2)


WATCHED = """
import fastbert, threading
MAKE
print([thread.name for thread in threading.enumerate()].count("contention"))
"""


def watches(make: str, *arguments: str, **variables: str) -> bool:
    """Whether a process watches after these lines."""
    return run(WATCHED.replace("MAKE", make), *arguments, **variables).splitlines()[-1] == "1"


@pytest.mark.parametrize(
    "variables, expected",
    [
        ({}, True),
        slow({"OMP_WAIT_POLICY": "PASSIVE"}, False),
        slow({"GOMP_SPINCOUNT": "7"}, False),
        slow({"OMP_NUM_THREADS": "1"}, False),
    ],
)
@spinning
def test_a_process_with_a_model_watches_unless_the_user_chose(tmp_path, variables, expected):
    folder = make_hugging_face_folder(tmp_path)
    assert watches("fastbert.load(sys.argv[2], 'cpu')", str(folder), **variables) is expected


TRAIN = """
fastbert.pretrain(sys.argv[2], run=sys.argv[3], batch={"sequences": int(sys.argv[4])})
"""


# 8 sequences go to one process with two threads, and 16 to two processes with one.
@pytest.mark.slow
@spinning
@pytest.mark.parametrize("sequences, expected", [(8, True), (16, False)])
def test_a_run_watches_where_its_threads_meet(tmp_path, small_dataset, sequences, expected):
    trial = Trial(tmp_path / "trial", small_dataset.path, steps=2)
    arguments = str(trial.recipe), str(tmp_path / "run"), str(sequences)
    assert watches(TRAIN, *arguments) is expected
