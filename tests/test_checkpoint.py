"""A checkpoint is complete or absent, and damage is detected."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from fastbert.checkpoints import checkpoint
from fastbert.checkpoints.checkpoint import (
    MANIFEST,
    exists,
    newest_valid,
    open_checkpoint,
    publish,
    read_all,
    read_weights,
    share_of,
    staging_of,
    sweep,
    write_share,
)
from fastbert.errors import InputError
from tests.one_process import save

ROOT = Path(__file__).parents[1]
METADATA = {
    "vocab_size": 7,
    "progress": {"seconds": 0.1 + 0.2, "best_loss": None},
    "recipe": 'data = "ü"\n',
}


def tensors(seed: int = 0) -> list[tuple[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a.weight": (5, 3), "a.bias": (5,), "scalar": ()}
    return [
        (f"{slot}/{n}", torch.randn(s, generator=generator))
        for n, s in shapes.items()
        for slot in ("weight", "exp_avg", "exp_avg_sq")
    ]


def save_at(run: Path, *steps: int, keep: int = 10) -> list[Path]:
    return [
        save(run / "checkpoints", step, tensors(step), {**METADATA, "step": step}, keep)
        for step in steps
    ]


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_what_is_saved_is_read(tmp_path):
    (path,) = save_at(tmp_path, 200)
    assert path == tmp_path / "checkpoints/step-00000200"
    found, complaints = newest_valid(tmp_path)
    assert complaints == [] and found is not None
    assert (found.path, found.step, found.metadata) == (path, 200, {**METADATA, "step": 200})
    state = read_all(path)
    assert set(state) == {"weight", "exp_avg", "exp_avg_sq"}
    for key, tensor in tensors(200):
        slot, _, name = key.partition("/")
        assert torch.equal(state[slot][name], tensor) and state[slot][name].shape == tensor.shape
    weights = read_weights(path)
    assert set(weights) == set(state["weight"]) and all(
        torch.equal(weights[n], state["weight"][n]) for n in weights
    )


def test_the_files_are_those_of_safetensors(tmp_path):
    """They are valid for tensors of no, one or very many numbers, and aligned for other readers."""
    state = {
        "weight/a": torch.zeros(0, 4),
        "weight/b": torch.tensor(3.5),
        'weight/ü"': torch.arange(3.0 * checkpoint.PIECE + 5),
    }
    file = save(tmp_path, 1, state.items(), {}, 1) / "tensors-00000-00000.safetensors"
    found = load_file(file)
    assert set(found) == set(state) and all(
        torch.equal(found[n], t) and found[n].shape == t.shape for n, t in state.items()
    )
    assert (8 + int.from_bytes(file.read_bytes()[:8], "little")) % 8 == 0


def test_only_fp32_is_written_and_from_a_copy(tmp_path):
    """That includes views, transposed tensors and other types, which training changes meanwhile."""
    whole = torch.arange(12.0).reshape(3, 4)
    share = share_of(
        0,
        1,
        [
            ("weight/a", whole.T),
            ("weight/b", whole.double()),
            ("weight/c", whole[1:, 2:]),
            ("weight/d", whole),
        ],
    )
    whole.zero_()
    publish(tmp_path, 1, tmp_path / "x", write_share(tmp_path / "x", 0, share), {})
    found, expected = read_weights(tmp_path / "step-00000001"), torch.arange(12.0).reshape(3, 4)
    for name, tensor in {
        "a": expected.T,
        "b": expected,
        "c": expected[1:, 2:],
        "d": expected,
    }.items():
        assert torch.equal(found[name], tensor) and found[name].dtype is torch.float32


def test_every_tensor_is_in_one_share_and_shares_are_even():
    generator = torch.Generator().manual_seed(0)
    sizes = [30_000, 30_000, 30_000, *torch.randint(1, 5_000, (60,), generator=generator).tolist()]
    state = [(f"weight/{number}", torch.zeros(size)) for number, size in enumerate(sizes)]
    for world in (1, 2, 3, 5, 100):
        shares = [share_of(rank, world, iter(state)) for rank in range(world)]
        assert sorted(name for share in shares for name in share) == sorted(
            name for name, _ in state
        )
        held = [sum(tensor.numel() for tensor in share.values()) for share in shares]
        assert max(held) - min(held) <= max(sizes) and (world > 3 or max(held) - min(held) <= 5_000)


def test_a_rank_takes_every_tensor_but_holds_its_share_alone():
    """Gathering a tensor is a collective operation of all ranks."""
    taken = []

    def one_by_one():
        for number in range(10):
            taken.append(number)
            yield f"weight/{number}", torch.zeros(1000)

    assert len(share_of(1, 5, one_by_one())) == 2 and taken == list(range(10))


def test_shares_of_several_ranks_are_one_checkpoint(tmp_path):
    """The tensors do not depend on who wrote them, and files outside the manifest are not read."""
    (alone,) = save_at(tmp_path / "alone", 4)
    staging = staging_of(tmp_path / "shared/checkpoints", 4, "x")
    files = {}
    for rank in (2, 0, 1):
        files |= write_share(staging, rank, share_of(rank, 3, tensors(4)))
    path = publish(tmp_path / "shared/checkpoints", 4, staging, files, METADATA)
    assert sorted(p.name for p in path.glob("tensors-*")) == [
        f"tensors-{rank:05d}-00000.safetensors" for rank in range(3)
    ]
    save_file({"weight/a.bias": torch.zeros(1)}, path / "tensors-00009-00000.safetensors")
    one, other = read_all(alone), read_all(path)
    assert one.keys() == other.keys()
    for slot in one:
        assert sorted(one[slot]) == sorted(other[slot]) and all(
            torch.equal(tensor, other[slot][n]) for n, tensor in one[slot].items()
        )


def test_a_share_that_is_not_to_be_seen_is_missed(tmp_path):
    """This happens where a rank writes to a disk of its own machine under the same name."""
    staging = staging_of(tmp_path, 4, "x")
    files = write_share(staging, 0, share_of(0, 2, tensors())) | write_share(
        tmp_path / "elsewhere", 1, share_of(1, 2, tensors())
    )
    with pytest.raises(FileNotFoundError) as error:
        publish(tmp_path, 4, staging, files, METADATA)
    assert (
        str(error.value.filename).endswith("/tensors-00001-00000.safetensors")
        and not (tmp_path / "step-00000004").exists()
    )
    (staging / "tensors-00001-00000.safetensors").write_bytes(b"short")
    with pytest.raises(OSError, match="does not have the size that its rank wrote"):
        publish(tmp_path, 4, staging, files, METADATA)


def test_reading_needs_no_memory_for_what_is_not_looked_at(tmp_path):
    """There are 64 MB of numbers, and a tensor is read from disk when it is used."""
    big = torch.zeros(1 << 22)
    save(
        tmp_path,
        1,
        ((f"{slot}/a", big) for slot in ("weight", "exp_avg", "exp_avg_sq", "more")),
        {},
        1,
    )
    child = subprocess.run(
        [sys.executable, "-c", SMALL_MEMORY, str(tmp_path / "step-00000001")],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0 and int(child.stdout) < 8 << 20, child


SMALL_MEMORY = """
import sys
from pathlib import Path
from fastbert.checkpoints.checkpoint import read_all
def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("RssAnon"))
before = anonymous()
state = read_all(Path(sys.argv[1]))
assert all(float(tensor.sum()) == 0 for slot in state.values() for tensor in slot.values())
print(anonymous() - before)
"""


def test_large_states_are_split_into_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 70)
    (path,) = save_at(tmp_path, 1)
    shards = sorted(path.glob("*.safetensors"))
    assert len(shards) > 3 and shards[0].name == "tensors-00000-00000.safetensors"
    assert sum(len(slot) for slot in read_all(path).values()) == len(tensors())
    shards[1].unlink()
    assert newest_valid(tmp_path) == (
        None,
        [f"{path}: damaged: {shards[1].name} cannot be read: No such file or directory"],
    )


def test_two_equal_saves_are_the_same_bytes(tmp_path):
    (one,), (two,) = save_at(tmp_path / "a", 3), save_at(tmp_path / "b", 3)
    assert [(p.name, p.read_bytes()) for p in sorted(one.iterdir())] == [
        (p.name, p.read_bytes()) for p in sorted(two.iterdir())
    ]


def test_retention_keeps_the_newest(tmp_path):
    save_at(tmp_path, 1, 2, 3, 10, keep=2)
    assert names(tmp_path) == ["step-00000003", "step-00000010"]


@pytest.mark.parametrize("bad", ["tensors-00000-00000.safetensors", MANIFEST])
def test_nothing_is_deleted_where_the_disk_gives_back_something_else(tmp_path, monkeypatch, bad):
    save_at(tmp_path, 1, 2)
    sync = os.fsync

    def bad_sectors(descriptor: int) -> None:
        sync(descriptor)
        if (file := Path(os.readlink(f"/proc/self/fd/{descriptor}"))).name == bad:
            flip(file)

    monkeypatch.setattr(os, "fsync", bad_sectors)
    with pytest.raises(OSError, match="read back wrong right after it was written") as error:
        save_at(tmp_path, 3, keep=1)
    assert Path(error.value.filename).name == bad
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


def test_retention_does_not_count_damaged_ones_of_later_steps(tmp_path):
    """After a fallback from a damaged step 30 to 10, a save at 20 must keep the valid ones."""
    save_at(tmp_path, 10, 30)
    (tmp_path / "checkpoints/step-00000030" / MANIFEST).write_text("{")
    save_at(tmp_path, 20, keep=1)
    found, _ = newest_valid(tmp_path)
    assert found is not None and found.step == 20
    save_at(tmp_path, 30, keep=1)
    assert newest_valid(tmp_path)[1] == [] and names(tmp_path) == ["step-00000030"]


def test_a_valid_checkpoint_is_never_replaced(tmp_path):
    """Saving the same state again succeeds, and saving another state of the same step is an error.

    A damaged checkpoint is replaced.
    """
    save_at(tmp_path, 5)
    save(tmp_path / "checkpoints", 5, tensors(5), METADATA, 3)
    with pytest.raises(FileExistsError, match="another valid checkpoint of that step is there"):
        save(tmp_path / "checkpoints", 5, tensors(99), METADATA, 3)
    assert torch.equal(
        read_weights(tmp_path / "checkpoints/step-00000005")["a.bias"],
        dict(tensors(5))["weight/a.bias"],
    )
    flip(tmp_path / "checkpoints/step-00000005/tensors-00000-00000.safetensors")
    save(tmp_path / "checkpoints", 5, tensors(99), METADATA, 3)
    assert torch.equal(
        read_weights(tmp_path / "checkpoints/step-00000005")["a.bias"],
        dict(tensors(99))["weight/a.bias"],
    )
    assert names(tmp_path) == ["step-00000005"]


def test_numbers_that_are_not_finite_are_not_saved(tmp_path):
    save_at(tmp_path, 1)
    for value in (float("nan"), float("inf"), -float("inf")):
        state = tensors()
        state[4][1][-1:] = value
        with pytest.raises(ValueError, match=f"^{state[4][0]} holds numbers that are not finite$"):
            save(tmp_path / "checkpoints", 2, state, METADATA, 1)
    assert names(tmp_path) == ["step-00000001"]


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
        save(
            tmp_path / "checkpoints",
            2,
            running_out() if at == "tensors" else tensors(),
            METADATA,
            1,
        )
    assert names(tmp_path) == ["step-00000001"]
    assert newest_valid(tmp_path)[0].step == 1


ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
SMALL_DISK = """
import resource, signal, sys
from pathlib import Path
import torch
from tests.one_process import save
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
try:
    save(Path(sys.argv[1]), 1, [("weight/a", torch.zeros(10_000))], {}, 1)
except OSError as error:
    print(error.errno, error.strerror, Path(error.filename).name)
"""


def test_a_share_that_fails_makes_room_at_once(tmp_path, monkeypatch):
    """It frees the space long before the other ranks hear of it, since a full disk may need it."""
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 70)
    state = dict(tensors())
    list(state.values())[-1].fill_(float("nan"))
    with pytest.raises(ValueError):
        write_share(tmp_path / "staging", 0, state)
    assert list((tmp_path / "staging").iterdir()) == []


def test_a_real_refusal_names_its_file(tmp_path):
    """The system's error does not name it. No file may grow beyond 5,000 bytes here."""
    command = [sys.executable, "-c", SMALL_DISK, str(tmp_path / "checkpoints")]
    child = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=60)
    assert (
        child.stdout.strip() == f"{errno.EFBIG} File too large tensors-00000-00000.safetensors"
    ), child.stderr
    assert names(tmp_path) == []


def test_what_a_killed_process_left_is_no_checkpoint_and_is_swept_away(tmp_path):
    (whole,) = save_at(tmp_path / "whole", 7)
    (tmp_path / "checkpoints").mkdir()
    for leftover in (".writing-step-00000007-0", ".deleted-step-00000007-0"):
        shutil.copytree(whole, tmp_path / "checkpoints" / leftover)
        (tmp_path / "checkpoints" / leftover / MANIFEST).unlink()
    shutil.copytree(whole, tmp_path / "checkpoints/.writing-step-00000007-1")
    assert not exists(tmp_path) and newest_valid(tmp_path) == (None, [])
    save_at(tmp_path, 6)
    sweep(tmp_path / "checkpoints")
    assert names(tmp_path) == ["step-00000006"]
    sweep(tmp_path / "nowhere")


def test_an_earlier_start_that_is_still_alive_cannot_spoil_what_is_saved(tmp_path):
    """A new start has removed the earlier one's unfinished files, and saves the same step."""
    folder = tmp_path / "checkpoints"
    stale = staging_of(folder, 3, "stale")
    files = write_share(stale, 0, share_of(0, 1, tensors(1)))
    sweep(folder)
    save_at(tmp_path, 3)
    for again in (
        lambda: publish(folder, 3, stale, files, {}),
        lambda: publish(folder, 3, stale, write_share(stale, 0, dict(tensors(1))), {}),
    ):
        with pytest.raises(OSError):
            again()
    assert torch.equal(
        read_weights(folder / "step-00000003")["a.bias"], dict(tensors(3))["weight/a.bias"]
    )


def filled(folder: Path) -> Path:
    """Make a folder that does not belong to fastbert."""
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("theirs")
    (folder / "thesis.txt").write_text("theirs")
    return folder


def is_whole(folder: Path) -> bool:
    return all((folder / name).read_text() == "theirs" for name in ("manifest.json", "thesis.txt"))


@pytest.mark.parametrize(
    "name", [".deleted-x", ".deleted-step-00000001-0", ".writing-step-00000009-0"]
)
@pytest.mark.parametrize("what", ["folder", "file", "nothing"])
def test_of_a_link_only_the_link_is_deleted(tmp_path, name, what):
    theirs, folder = filled(tmp_path / "theirs"), tmp_path / "run/checkpoints"
    save_at(tmp_path / "run", 1)
    (folder / name).symlink_to(
        {"folder": theirs, "file": theirs / "thesis.txt", "nothing": tmp_path / "nowhere"}[what]
    )
    save_at(tmp_path / "run", 2, keep=1)
    assert is_whole(theirs) and (name.startswith(".writing") or not os.path.lexists(folder / name))
    if not os.path.lexists(folder / name):
        (folder / name).symlink_to(theirs)
    sweep(folder)
    assert is_whole(theirs) and names(tmp_path / "run") == ["step-00000002"]


def test_a_checkpoint_that_was_moved_and_linked_is_not_deleted_where_it_lies(tmp_path):
    """Users do this on a full disk: `mv step-00000001 /archive; ln -s /archive/step-00000001`."""
    (first,) = save_at(tmp_path, 1)
    archive = tmp_path / "archive"
    first.rename(archive)
    first.symlink_to(archive)
    save_at(tmp_path, 2, keep=1)
    assert names(tmp_path) == ["step-00000002"] and open_checkpoint(archive).step == 1
    archive.rename(tmp_path / "checkpoints/step-00000003")
    (tmp_path / "checkpoints/step-00000003").rename(archive)
    (tmp_path / "checkpoints/step-00000003").symlink_to(archive)
    (archive / MANIFEST).write_text("{")
    save_at(tmp_path, 3)  # a damaged one is deleted
    assert (archive / MANIFEST).read_text() == "{" and not (
        tmp_path / "checkpoints/step-00000003"
    ).is_symlink()


def test_sweep_takes_files_and_folders_in_folders(tmp_path):
    (tmp_path / ".deleted-step-00000001-0/deep/er").mkdir(parents=True)
    (tmp_path / ".writing-step-00000001-0").touch()
    sweep(tmp_path)
    assert list(tmp_path.iterdir()) == []


UNREADABLE = {
    "checkpoints/ on a disk that is not mounted": lambda run: moved(run / "checkpoints").symlink_to(
        "/not/mounted"
    ),
    "a run on a disk that is not mounted": lambda run: moved(run).symlink_to("/not/mounted"),
    "a loop of links": lambda run: moved(run / "checkpoints").symlink_to("checkpoints"),
    "a file in its place": lambda run: moved(run / "checkpoints").write_text(""),
    "the newest on a disk that is not mounted": lambda run: moved(
        run / "checkpoints/step-00000002"
    ).symlink_to("/not/mounted"),
    "the newest a loop of links": lambda run: moved(run / "checkpoints/step-00000002").symlink_to(
        "step-00000002"
    ),
    "its manifest a loop of links": lambda run: moved(
        run / "checkpoints/step-00000002" / MANIFEST
    ).symlink_to(MANIFEST),
    "its tensors on a disk that is not mounted": lambda run: moved(
        run / "checkpoints/step-00000002/tensors-00000-00000.safetensors"
    ).symlink_to("/not/mounted"),
}


def moved(path: Path) -> Path:
    path.rename(path.with_name("elsewhere"))
    return path


@pytest.mark.parametrize("how", UNREADABLE)
def test_what_cannot_be_read_is_neither_missing_nor_damaged(tmp_path, how):
    """Otherwise an older checkpoint would be used, and this one would be deleted."""
    run = tmp_path / "run"
    save_at(run, 1, 2)
    UNREADABLE[how](run)
    with pytest.raises(InputError) as error:
        newest_valid(run)
    assert "\n" not in str(error.value) and str(run) in str(error.value)
    if "newest" not in how and "its" not in how:
        with pytest.raises(InputError):
            exists(run)
        with pytest.raises(InputError):
            sweep(run / "checkpoints")


def test_a_checkpoint_that_cannot_be_read_is_not_replaced(tmp_path):
    run = tmp_path / "run"
    save_at(run, 1, 2)
    UNREADABLE["its manifest a loop of links"](run)
    with pytest.raises(InputError, match="Too many levels"):
        save_at(run, 2)
    assert names(run) == ["step-00000001", "step-00000002"]


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda path: path.write_text(""), "manifest.json cannot be read: Not a directory"),
        (lambda path: path.mkdir(), "manifest.json is missing"),
        (lambda path: (path / MANIFEST).mkdir(parents=True), "manifest.json is not a file"),
        # A pipe would block its reader.
        (lambda path: (path.mkdir(), os.mkfifo(path / MANIFEST)), "manifest.json is not a file"),
    ],
)
def test_something_else_with_the_name_of_a_checkpoint_is_damaged(tmp_path, make, message):
    (good,) = save_at(tmp_path, 1)
    bad = tmp_path / "checkpoints/step-00000002"
    make(bad)
    assert newest_valid(tmp_path)[0].path == good and newest_valid(tmp_path)[1] == [
        f"{bad}: damaged: {message}"
    ]
    save_at(tmp_path, 2)
    assert newest_valid(tmp_path)[0].path == bad and newest_valid(tmp_path)[1] == []
    sweep(tmp_path / "checkpoints")
    assert names(tmp_path) == [good.name, bad.name]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "a flipped bit": (
        lambda p: flip(p / "tensors-00000-00000.safetensors"),
        "tensors-00000-00000.safetensors does not have the SHA-256",
    ),
    "a short file": (
        lambda p: os.truncate(p / "tensors-00000-00000.safetensors", 100),
        "tensors-00000-00000.safetensors has 100 bytes in place of",
    ),
    "no tensors": (
        lambda p: (p / "tensors-00000-00000.safetensors").unlink(),
        "tensors-00000-00000.safetensors cannot be read",
    ),
    "no manifest": (lambda p: (p / MANIFEST).unlink(), "manifest.json is missing"),
    "half a manifest": (
        lambda p: os.truncate(p / MANIFEST, 40),
        "not the manifest of a checkpoint",
    ),
    "a changed number": (
        lambda p: edit(p, lambda m: m["metadata"].update(step=6)),
        "manifest.json does not have its own SHA-256",
    ),
    "a newer format": (
        lambda p: edit(p, lambda m: m.update(format=3)),
        "format = 3, this fastbert reads format 2",
    ),
    "a path": (
        lambda p: edit(
            p, lambda m: m.update(files={"../x.safetensors": {"size": 1, "sha256": ""}}), True
        ),
        "names a file that is none",
    ),
}


def edit(path: Path, change, sign: bool = False) -> None:
    manifest = json.loads((path / MANIFEST).read_text())
    change(manifest)
    if sign:
        manifest.pop("sha256")
        manifest["sha256"] = checkpoint._own_sha256(manifest)
    (path / MANIFEST).write_text(json.dumps(manifest, indent=1))


def test_a_checkpoint_whose_files_have_other_names_is_read(tmp_path):
    """Checkpoints had these names before there were several ranks."""
    (path,) = save_at(tmp_path, 1)
    edit(
        path,
        lambda manifest: manifest.update(
            files={"tensors-00000.safetensors": next(iter(manifest["files"].values()))}
        ),
        True,
    )
    (path / "tensors-00000-00000.safetensors").rename(path / "tensors-00000.safetensors")
    assert open_checkpoint(path).step == 1 and torch.equal(
        read_weights(path)["a.bias"], dict(tensors(1))["weight/a.bias"]
    )


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_next_valid_one_is_taken(tmp_path, damage):
    change, message = DAMAGE[damage]
    good, bad = save_at(tmp_path, 1, 2)
    change(bad)
    found, complaints = newest_valid(tmp_path)
    assert found is not None and found.path == good
    assert (
        len(complaints) == 1
        and complaints[0].startswith(f"{bad}: damaged: ")
        and message in complaints[0]
        and "\n" not in complaints[0]
    )
    with pytest.raises(InputError, match="not a valid checkpoint") as error:
        open_checkpoint(bad)
    assert message in str(error.value)


@settings(max_examples=60)
@given(st.one_of(st.binary(max_size=200), st.text(max_size=60).map(str.encode), st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["format", "files", "metadata", "step", "sha256"]), inner),
).map(lambda value: json.dumps(value).encode())))  # fmt: skip
def test_rubbish_in_place_of_a_manifest_is_one_complaint(tmp_path_factory, rubbish):
    run = tmp_path_factory.mktemp("rubbish")
    (path,) = save_at(run, 1)
    (path / MANIFEST).write_bytes(rubbish)
    found, complaints = newest_valid(run)
    assert found is None and len(complaints) == 1


def test_folders_of_other_names_are_no_checkpoints(tmp_path):
    for name in ("step-x", "step-12", "best", "step-00000001.bak"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert not exists(tmp_path)
