"""Runs whose folder and dataset are in a bucket, against the same runs on a disk.

The processes are real, and so is the S3 server, on loopback. Every start has a local disk of its
own, and so has every rank: they share nothing but the bucket.
"""

from __future__ import annotations

import json
import re
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import fastbert
from fastbert import cli, storage
from fastbert.checkpoints.bucket import OWNERS, Attempt, Owner, _belongs
from fastbert.checkpoints.failpoint import UPLOAD_POINTS
from fastbert.config import ObjectiveConfig, RunConfig
from fastbert.data.blocks import BLOCK_BYTES
from fastbert.data.dataset import TokenDataset
from fastbert.data.window_order import Windows
from fastbert.durable import sha256_of
from fastbert.storage import Url
from tests.block_dataset import in_blocks
from tests.ranks import Ranks
from tests.store_server import BUCKET, Faults, Proxy, credentials, make_bucket, s3_server
from tests.trials import Laboratory, Trial, wait_for

# Where the starts of a run are killed in turn, at which of their uploads, and the step of the
# newest valid checkpoint then.
KILLS = {
    "uploading@2": 3,
    "share-uploaded@2": 6,
    "manifest-uploaded@2": 12,
    "records-uploaded@2": 15,
    "publishing@1": 15,
}
RETIRING = {"retiring": 9, "retired": 12}  # the same, while an old checkpoint is deleted


@pytest.fixture(scope="module")
def server():
    with s3_server() as port:
        make_bucket(port, BUCKET)
        yield port


@pytest.fixture
def proxy(server, monkeypatch):
    import s3fs

    opened = Proxy(server)
    monkeypatch.setattr(s3fs.S3FileSystem, "cachable", False)
    for name, value in credentials(server).items():
        monkeypatch.setenv(name, value)
    storage._file_system.cache_clear()
    yield opened
    opened.close()
    storage._file_system.cache_clear()


@pytest.fixture(scope="module")
def lab(tmp_path_factory, small_dataset) -> Laboratory:
    return Laboratory(tmp_path_factory.mktemp("bucket"), small_dataset.path)


class BucketTrial(Trial):
    """A Trial whose run, and dataset, are in the bucket.

    Attributes:
        url: of the run.
        machine: the local disks of the next start; another name means other machines.
        disk: a disk for each rank; without the variable they share one.
    """

    disk = "$RANK"

    def __init__(self, folder: Path, proxy: Proxy, dataset: str | Path, stage: int = 0):
        self.url = Url(f"s3://{BUCKET}/runs/{folder.parent.name}-{folder.name}")
        overrides = f"run={self.url}", f"data={dataset}"
        super().__init__(folder, Path("unused"), *overrides, stage=stage)
        self.machine, self._port = "first", proxy.port

    def start(self, world: int = 1, *overrides: str, **more: str) -> Ranks:
        disks = {
            "FASTBERT_CACHE": f"{self.folder}/{self.machine}-{self.disk}",
            "HOME": str(self.folder),
        }
        return super().start(world, *overrides, **credentials(self._port), **disks, **more)

    def records(self, *events: str | None) -> list[dict[str, Any]]:
        self.seen.mkdir(exist_ok=True)
        (self.seen / "metrics.jsonl").write_bytes(storage.read(self.url / "metrics.jsonl"))
        return super().records(*events)

    @property
    def published(self) -> list[str]:
        """Names of the attempts with a manifest."""
        found = [entry.name.split("/") for entry in storage.objects(self.url / "checkpoints")]
        return sorted(folder for folder, name in found if name == "manifest.json")


@pytest.fixture
def dataset_url(proxy, small_dataset) -> Url:
    url = Url(f"s3://{BUCKET}/data/small")
    if storage.size(url / "manifest.json") is None:
        for entry in storage.objects(small_dataset.path):
            storage.put(small_dataset.path / entry.name, url / entry.name)
    return url


def equal(trial: Trial, other: Trial) -> None:
    tally = trial.compare(other)
    assert tally.passed and tally.compared, str(tally)


@pytest.mark.slow
def test_ranks_without_a_common_disk_train_as_on_one(lab, proxy, dataset_url, tmp_path):
    trial = BucketTrial(tmp_path / "a", proxy, dataset_url, stage=2)
    trial.resume(2)
    equal(trial, lab.undisturbed(2, 2))
    names = {entry.name for entry in storage.objects(trial.url)}
    assert {"config.toml", "log.txt", "loss.png", "tokenizer/tokenizer.json"} <= names
    assert trial.published == ["step-00000015-00000001-5", "step-00000016-00000001-6"]
    for name in trial.published:  # a share of each rank
        shares = [n for n in names if n.startswith(f"checkpoints/{name}/tensors-0")]
        assert len({share.split("/")[-1][:13] for share in shares}) == 2
    assert not any(trial.folder.glob("first-*/runs/*")), "work folders are removed"
    assert [p.name for p in (trial.folder / "first-0/datasets").iterdir() if p.is_dir()] == [
        sha256_of(lab.dataset / "manifest.json")
    ]
    # It is finished, and on machines with empty disks it says so again, with another rank count.
    trial.machine = "second"
    out = trial.resume(1)
    assert any(f"resuming after step 16 from {trial.url}/checkpoints/" in line for line in out)


@pytest.mark.slow
def test_a_kill_at_an_upload_leaves_the_newest_valid_checkpoint(lab, proxy, tmp_path):
    """A run is killed at one point after the other, and resumes on machines with empty disks."""
    trial, newest = BucketTrial(tmp_path / "a", proxy, lab.dataset), 0
    for point, after in KILLS.items():
        with trial.start(FASTBERT_FAILPOINT=point) as ranks:
            assert ranks.wait() == [-9], ranks.errors
            said = ranks[0].out.read_text()
        assert not newest or f"resuming after step {newest} from" in said
        newest = max(Attempt.of(name).step for name in trial.published)
        assert newest == after
        trial.machine = point
    out = trial.resume()
    assert any(f"resuming after step {newest} from" in line for line in out)
    equal(trial, lab.undisturbed(1, 0))
    incomplete = {
        entry.name.split("/")[0] for entry in storage.objects(trial.url / "checkpoints")
    } - set(trial.published)
    assert not incomplete, "the next start deletes what a killed one left"
    assert len(trial.published) == 2


@pytest.mark.slow
def test_a_kill_while_an_old_checkpoint_is_deleted(lab, proxy, tmp_path):
    trial = BucketTrial(tmp_path / "a", proxy, lab.dataset)
    for point, newest in RETIRING.items():
        with trial.start(FASTBERT_FAILPOINT=point) as ranks:
            assert ranks.wait() == [-9], ranks.errors
        assert Attempt.of(trial.published[-1]).step == newest
        trial.machine = point
    trial.resume()
    equal(trial, lab.undisturbed(1, 0))
    assert len(trial.published) == 2


def test_the_points_of_an_upload_are_all_tried():
    tried = {point.partition("@")[0] for point in KILLS}
    assert set(UPLOAD_POINTS) == {*tried, *RETIRING}


def test_a_kill_in_the_middle_of_a_request(lab, proxy, tmp_path):
    trial = BucketTrial(tmp_path / "a", proxy, lab.dataset)
    proxy.fault = Faults("hold", 1, "PUT .*step-00000006.*tensors")
    with trial.start() as ranks:
        wait_for(lambda: not proxy.fault.left)
        ranks.kill()
    assert trial.published == ["step-00000003-00000001-1"]
    trial.machine = "second"
    trial.resume()
    equal(trial, lab.undisturbed(1, 0))


@pytest.mark.slow
def test_damaged_checkpoints_are_skipped(lab, proxy, tmp_path):
    trial = BucketTrial(tmp_path / "a", proxy, lab.dataset)
    with trial.start(FASTBERT_FAILPOINT="publishing@4") as ranks:
        assert ranks.wait() == [-9]
    assert [name[:13] for name in trial.published] == ["step-00000006", "step-00000009"]
    newest = trial.url / "checkpoints" / trial.published[-1]
    (share,) = [e for e in storage.objects(newest) if e.name.startswith("tensors")]
    data = bytearray(storage.read(newest / share.name))
    data[len(data) // 2] ^= 1
    storage.write(newest / share.name, bytes(data))
    trial.machine = "second"
    out = trial.resume()
    assert any(f"{newest}: damaged: " in line and "SHA-256" in line for line in out)
    assert any("resuming after step 6 from" in line for line in out)
    equal(trial, lab.undisturbed(1, 0))


@pytest.mark.slow
@pytest.mark.parametrize(("world", "stage"), [(1, 0), (2, 2)])
def test_a_store_that_throttles_fails_and_cuts_changes_no_loss(
    lab, proxy, dataset_url, tmp_path, world, stage
):
    trial = BucketTrial(tmp_path / "a", proxy, dataset_url, stage=stage)
    faults = [
        Faults("503", 3, "PUT"),
        Faults("500", 2, "PUT .*tensors"),
        Faults("500", 1, "GET .*train"),
        Faults("cut", 2, "GET .*train"),
        Faults("lose", 1, "owners"),
    ]
    proxy.fault = lambda *request: next(filter(None, (f(*request) for f in faults)), "")
    trial.resume(world)
    assert not any(f.left for f in faults)
    equal(trial, lab.undisturbed(world, stage))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "stage", "status", "words"),
    [(1, 0, "503", "reduce your request rate"), (2, 2, "500", "rank 1: .*internal error")],
)
def test_a_save_that_the_store_refuses_does_not_end_the_run(
    lab, proxy, tmp_path, world, stage, status, words
):
    """All attempts to put the share of the last rank fail, which takes half a minute."""
    trial = BucketTrial(tmp_path / "a", proxy, lab.dataset, stage=stage)
    share = f"tensors-{world - 1:05d}"
    proxy.fault = Faults(status, storage.ATTEMPTS, f"PUT .*step-00000003.*{share}")
    out = trial.resume(world, "runtime.timeout_s=120")
    assert any(re.search(f"no checkpoint at step 3: .*{words}", line) for line in out)
    equal(trial, lab.undisturbed(world, stage))


@pytest.mark.slow
def test_a_start_that_was_cut_off_cannot_publish(lab, proxy, tmp_path):
    """The first start is suspended, another one finishes the run, and the first one comes back."""
    trial = BucketTrial(tmp_path / "a", proxy, lab.dataset)
    with trial.start(FASTBERT_FAILPOINT="records-uploaded@2=stop") as first:
        wait_for(lambda: _stopped(first[0].pid))
        trial.machine = "second"
        trial.resume()
        published = trial.published
        first.signal(signal.SIGCONT)
        assert first.wait() == [1]
        assert "another start of this run (on " in first.errors
    assert trial.published == published
    equal(trial, lab.undisturbed(1, 0))


def _stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def test_what_a_cut_off_start_publishes_after_the_next_one_began_is_no_part_of_the_run():
    owners = [Owner(1, "a", 1, 0), Owner(2, "b", 2, 6), Owner(3, "c", 3, 9)]
    assert _belongs(Attempt(6, 1, 2), owners) and not _belongs(Attempt(7, 1, 3), owners)
    assert _belongs(Attempt(9, 2, 1), owners) and not _belongs(Attempt(12, 2, 2), owners)
    assert _belongs(Attempt(12, 3, 1), owners)


def test_a_stalled_upload_is_named(lab, proxy, tmp_path):
    trial = BucketTrial(tmp_path / "a", proxy, lab.dataset, stage=2)
    proxy.fault = Faults("hold", 100, "PUT .*step-00000003.*tensors-00001")
    with trial.start(2, "runtime.timeout_s=6") as ranks:
        assert ranks.wait() == [1, 1]
        assert "rank 1 (" in ranks.errors and "at the checkpoint of step 3" in ranks.errors


def test_a_stalled_fetch_is_named(lab, proxy, dataset_url, tmp_path):
    trial = BucketTrial(tmp_path / "a", proxy, dataset_url, stage=2)
    seen: list[str] = []

    def second(method: str, path: str) -> str:
        """Hold what the second rank asks for; both fetch all files."""
        if "/train-" in path and method == "GET":
            seen.append(path)
            return "hold" if seen.count(path) == 2 else ""
        return ""

    proxy.fault = second
    with trial.start(2, "runtime.timeout_s=6") as ranks:
        assert ranks.wait() == [1, 1]
        assert f"at fetching {dataset_url}" in ranks.errors and "storage.py" in ranks.errors


@pytest.fixture
def in_windows(proxy, small_dataset, tmp_path) -> tuple[TokenDataset, Url]:
    """A dataset of which the steps of a trial need several windows, on a disk and in the bucket.

    Each block is a file of its own, so that the path of a request tells the block.
    """
    local = in_blocks(small_dataset, tmp_path / "windows", block_documents=2, blocks_per_shard=1)
    url = Url(f"s3://{BUCKET}/{tmp_path.name}-windows")
    for entry in storage.objects(local.path):
        storage.put(local.path / entry.name, url / entry.name)
    return local, url


WINDOWED = 'objective.kind="mlm"', f"order.window={3 * BLOCK_BYTES >> 20} MiB"


@pytest.mark.slow
def test_ranks_fetch_each_block_of_a_window_once_for_their_machine(in_windows, proxy, tmp_path):
    local, url = in_windows
    trial = BucketTrial(tmp_path / "a", proxy, url)
    trial.disk = "all"
    trial.resume(2, *WINDOWED)
    on_a_disk = Trial(tmp_path / "b", local.path)
    on_a_disk.resume(2, *WINDOWED)
    equal(trial, on_a_disk)
    asked = Counter(
        path for method, path in proxy.requests if "/train-" in path and method == "GET"
    )
    assert set(asked.values()) == {1}
    found = {path.partition("-windows/")[2].partition("?")[0] for path in asked}
    stream = Windows(
        local.blocks["train"],
        ObjectiveConfig(kind="mlm", segments="single"),
        64,
        RunConfig(data="unused").seed,
        3 * BLOCK_BYTES,
        "",
    )
    names = [{piece.name for piece in stream.blocks_of(i).pieces()} for i in range(stream.windows)]
    opened = sum(not names[i].isdisjoint(found) for i in range(stream.windows))
    assert 3 < opened < stream.windows and found == set().union(*names[:opened])


@pytest.mark.slow
def test_a_stalled_fetch_of_a_window_is_named(in_windows, proxy, tmp_path):
    trial = BucketTrial(tmp_path / "a", proxy, in_windows[1], stage=2)
    seen = Counter[str]()

    def third(method: str, path: str) -> str:
        """Hold what the second rank asks for, once the first two windows are there."""
        if "/train-" in path and method == "GET":
            seen[path] += 1
            return "hold" if seen[path] == 2 and len(seen) > 6 else ""
        return ""

    proxy.fault = third
    with trial.start(2, "runtime.timeout_s=10", *WINDOWED) as ranks:
        assert ranks.wait() == [1, 1]
        words = rf"at step \d+, waiting for {in_windows[1]}/part-00000/train-\d+, in .*prefetch\.py"
        assert re.search(words, ranks.errors), ranks.errors


@pytest.mark.slow
def test_bad_input_is_said_before_anything_is_written(lab, proxy, tmp_path):
    trial = BucketTrial(tmp_path / "a", proxy, lab.dataset)
    storage.write(trial.url / "thesis.txt", b"mine")

    def refusal(*overrides: str) -> str:
        with trial.start(1, *overrides) as ranks:
            assert ranks.wait() == [2]
            return ranks.errors

    assert "holds thesis.txt, and is no run" in refusal()
    assert "there is no bucket none" in refusal("run=s3://none/x")
    assert "no such dataset; make one" in refusal(f"data=s3://{BUCKET}/none")
    assert [e.name for e in storage.objects(trial.url)] == ["thesis.txt"]
    storage.remove(trial.url / "thesis.txt")
    trial.resume(1, "stop.steps=3")
    with Ranks(
        trial.command[:-1],
        tmp_path / "again",
        **credentials(proxy.port),
        FASTBERT_CACHE=str(tmp_path / "c"),
    ) as ranks:
        assert ranks.wait() == [2] and "resume with --resume" in ranks.errors
    assert storage.names(trial.url / OWNERS) == ["00000001"]


@pytest.mark.slow
def test_a_run_that_left_no_checkpoint_begins_anew(lab, proxy, tmp_path):
    """Its records make room, and what somebody else has put beside them stays."""
    trial = BucketTrial(tmp_path / "a", proxy, lab.dataset)
    with trial.start(FASTBERT_FAILPOINT="publishing@1") as ranks:
        assert ranks.wait() == [-9]
    assert trial.published == [] and len(trial.steps) >= 3
    storage.write(trial.url / "notes.md", b"mine")
    events = [e.name for e in storage.objects(trial.url / "tensorboard")]
    trial.machine = "second"
    out = trial.resume()
    assert any("no checkpoint to resume from; starting from the beginning" in line for line in out)
    equal(trial, lab.undisturbed(1, 0))
    assert storage.read(trial.url / "notes.md") == b"mine"
    assert not {e.name for e in storage.objects(trial.url / "tensorboard")} & set(events)


def test_a_run_in_a_bucket_by_its_url(lab, proxy, dataset_url, tmp_path, monkeypatch, capsys):
    """From Python, and by commands; what is read is copied to this machine once."""
    monkeypatch.setenv("FASTBERT_CACHE", str(tmp_path / "cache"))
    trial = BucketTrial(tmp_path / "a", proxy, dataset_url)
    result = fastbert.pretrain(
        str(trial.recipe), {"data": str(dataset_url), "run": str(trial.url), "stop.steps": 4}
    )
    assert result.exit_code == 0 and result.run == str(trial.url)
    (last,) = [r for r in trial.records(None) if r["step"] == 4]
    assert result.metrics["train"]["loss"] == last["loss"]
    weights = result.load().model.state_dict()
    again = fastbert.load(str(trial.url)).model.state_dict()
    assert weights.keys() == again.keys()
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    capsys.readouterr()
    assert cli.run(["evaluate", str(trial.url), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 4
    monkeypatch.chdir(tmp_path)
    assert cli.run(["report", str(trial.url)]) == 0
    page = (tmp_path / f"{trial.url.name}-report.html").read_text()
    assert f"<h1>{trial.url.name}</h1>" in page and "held-out MLM loss, step 4" in page
    assert cli.run(["report", f"s3://{BUCKET}/none"]) == 2
    assert f"s3://{BUCKET}/none: no config.toml" in capsys.readouterr().err
    # Its resolved recipe is one, and a new run may begin with its model.
    continued = f"run={trial.url}-more", f"init={trial.url}", "stop.steps=2"
    assert cli.run(["pretrain", f"{trial.url}/config.toml", *continued]) == 0
    assert cli.run(["evaluate", f"s3://{BUCKET}/none"]) == 2
    assert "no run with a checkpoint" in capsys.readouterr().err
