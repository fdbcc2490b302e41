"""A checkpoint is whole or it is not there; a damaged one is noticed."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastbert.errors import InputError
from fastbert.training import checkpoint
from fastbert.training.checkpoint import MANIFEST, exists, newest_sound, open_checkpoint, read_all, read_weights, save

ROOT = Path(__file__).parents[1]
METADATA = {"vocab_size": 7, "progress": {"seconds": 0.1 + 0.2, "best_loss": None}, "recipe": 'data = "ü"\n'}


def tensors(seed: int = 0) -> list[tuple[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a.weight": (5, 3), "a.bias": (5,), "scalar": ()}
    return [(f"{slot}/{n}", torch.randn(s, generator=generator)) for n, s in shapes.items() for slot in ("weight", "exp_avg", "exp_avg_sq")]


def save_at(run: Path, *steps: int, keep: int = 10) -> list[Path]:
    return [save(run / "checkpoints", step, tensors(step), {**METADATA, "step": step}, keep) for step in steps]


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_what_is_saved_is_read(tmp_path):
    (path,) = save_at(tmp_path, 200)
    assert path == tmp_path / "checkpoints/step-00000200"
    found, complaints = newest_sound(tmp_path)
    assert complaints == [] and found is not None
    assert (found.path, found.step, found.metadata) == (path, 200, {**METADATA, "step": 200})
    state = read_all(path)
    assert set(state) == {"weight", "exp_avg", "exp_avg_sq"}
    for key, tensor in tensors(200):
        slot, _, name = key.partition("/")
        assert torch.equal(state[slot][name], tensor) and state[slot][name].shape == tensor.shape
    weights = read_weights(path)
    assert set(weights) == set(state["weight"]) and all(torch.equal(weights[n], state["weight"][n]) for n in weights)


def test_large_states_are_split_into_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 70)
    (path,) = save_at(tmp_path, 1)
    shards = sorted(path.glob("*.safetensors"))
    assert len(shards) > 3 and shards[0].name == "tensors-00000.safetensors"
    assert sum(len(slot) for slot in read_all(path).values()) == len(tensors())
    shards[1].unlink()
    assert newest_sound(tmp_path) == (None, [f"{path}: damaged: {shards[1].name} cannot be read: No such file or directory"])


def test_two_equal_saves_are_the_same_bytes(tmp_path):
    (one,), (two,) = save_at(tmp_path / "a", 3), save_at(tmp_path / "b", 3)
    assert [(p.name, p.read_bytes()) for p in sorted(one.iterdir())] == [(p.name, p.read_bytes()) for p in sorted(two.iterdir())]


def test_retention_keeps_the_newest(tmp_path):
    save_at(tmp_path, 1, 2, 3, 10, keep=2)
    assert names(tmp_path) == ["step-00000003", "step-00000010"]


def test_nothing_is_deleted_before_the_newest_is_verified(tmp_path, monkeypatch):
    save_at(tmp_path, 1, 2)
    read = checkpoint._read
    monkeypatch.setattr(checkpoint, "_read", lambda path: "bad sectors" if path.name == "step-00000003" else read(path))
    with pytest.raises(OSError, match="read back wrong right after it was written: bad sectors"):
        save_at(tmp_path, 3, keep=1)
    assert {"step-00000001", "step-00000002"} <= set(names(tmp_path))


def test_retention_does_not_count_damaged_ones_of_later_steps(tmp_path):
    """After a fallback from a damaged step 30 to 10, a save at 20 must not delete the only sound ones."""
    save_at(tmp_path, 10, 30)
    (tmp_path / "checkpoints/step-00000030" / MANIFEST).write_text("{")
    save_at(tmp_path, 20, keep=1)
    found, _ = newest_sound(tmp_path)
    assert found is not None and found.step == 20
    save_at(tmp_path, 30, keep=1)
    assert newest_sound(tmp_path)[1] == [] and names(tmp_path) == ["step-00000030"]


def test_a_step_that_is_saved_again_replaces_the_first(tmp_path):
    save_at(tmp_path, 5)
    save(tmp_path / "checkpoints", 5, tensors(99), METADATA, 3)
    assert torch.equal(read_weights(tmp_path / "checkpoints/step-00000005")["a.bias"], dict(tensors(99))["weight/a.bias"])
    assert names(tmp_path) == ["step-00000005"]


@pytest.mark.parametrize("at", ["tensors", "rename"])
def test_a_failing_disk_leaves_nothing_half_written(tmp_path, monkeypatch, at):
    save_at(tmp_path, 1)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def running_out():
        yield from tensors()[:2]
        full()

    if at == "rename":
        monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path / "checkpoints", 2, running_out() if at == "tensors" else tensors(), METADATA, 1)
    assert names(tmp_path) == ["step-00000001"]
    assert newest_sound(tmp_path)[0].step == 1


SMALL_DISK = """
import resource, signal, sys
from pathlib import Path
import torch
from fastbert.training.checkpoint import save
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
try:
    save(Path(sys.argv[1]), 1, [("weight/a", torch.zeros(10_000))], {}, 1)
except OSError as error:
    print(error.errno, error.strerror, Path(error.filename).name)
"""


def test_a_real_refusal_while_safetensors_writes_is_an_oserror(tmp_path):
    """The library raises an exception of its own, whose text alone says why. No file may grow beyond 5,000 bytes here."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    command = [sys.executable, "-c", SMALL_DISK, str(tmp_path / "checkpoints")]
    child = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=60)
    assert child.stdout.strip() == f"{errno.EFBIG} File too large tensors-00000.safetensors", child.stderr
    assert names(tmp_path) == []


def test_what_a_killed_process_left_is_cleared_away(tmp_path):
    leftover = tmp_path / "checkpoints/.writing-step-00000007"
    leftover.mkdir(parents=True)
    (leftover / "tensors-00000.safetensors").write_bytes(b"half")
    assert not exists(tmp_path) and newest_sound(tmp_path) == (None, [])
    save_at(tmp_path, 8)
    assert names(tmp_path) == ["step-00000008"]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "a flipped bit": (lambda p: flip(p / "tensors-00000.safetensors"), "tensors-00000.safetensors does not have the SHA-256"),
    "a short file": (lambda p: os.truncate(p / "tensors-00000.safetensors", 100), "tensors-00000.safetensors has 100 bytes in place of"),
    "no tensors": (lambda p: (p / "tensors-00000.safetensors").unlink(), "tensors-00000.safetensors cannot be read"),
    "no manifest": (lambda p: (p / MANIFEST).unlink(), "manifest.json is missing"),
    "half a manifest": (lambda p: os.truncate(p / MANIFEST, 40), "not the manifest of a checkpoint"),
    "a changed number": (lambda p: edit(p, lambda m: m["metadata"].update(step=6)), "manifest.json does not have its own SHA-256"),
    "a newer format": (lambda p: edit(p, lambda m: m.update(format=2)), "format = 2, this fastbert reads format 1"),
    "a path": (
        lambda p: edit(p, lambda m: m.update(files={"../x.safetensors": {"size": 1, "sha256": ""}}), True),
        "names a file that is none",
    ),
}


def edit(path: Path, change, sign: bool = False) -> None:
    manifest = json.loads((path / MANIFEST).read_text())
    change(manifest)
    if sign:
        manifest.pop("sha256")
        manifest["sha256"] = checkpoint._own_sha256(manifest)
    (path / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_next_sound_one_is_taken(tmp_path, damage):
    change, message = DAMAGE[damage]
    good, bad = save_at(tmp_path, 1, 2)
    change(bad)
    found, complaints = newest_sound(tmp_path)
    assert found is not None and found.path == good
    assert len(complaints) == 1 and complaints[0].startswith(f"{bad}: damaged: ") and message in complaints[0] and "\n" not in complaints[0]
    with pytest.raises(InputError, match="not a sound checkpoint") as error:
        open_checkpoint(bad)
    assert message in str(error.value)


@settings(max_examples=60, deadline=None)
@given(st.one_of(st.binary(max_size=200), st.text(max_size=60).map(str.encode), st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["format", "files", "metadata", "step", "sha256"]), inner),
).map(lambda value: json.dumps(value).encode())))  # fmt: skip
def test_rubbish_in_place_of_a_manifest_is_one_complaint(tmp_path_factory, rubbish):
    run = tmp_path_factory.mktemp("rubbish")
    (path,) = save_at(run, 1)
    (path / MANIFEST).write_bytes(rubbish)
    found, complaints = newest_sound(run)
    assert found is None and len(complaints) == 1


def test_folders_of_other_names_are_no_checkpoints(tmp_path):
    for name in ("step-x", "step-12", "best", "step-00000001.bak"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert not exists(tmp_path)
