"""Objects in an S3 server, through a proxy that cuts, throttles and holds, and in memory."""

from __future__ import annotations

import hashlib
import random
import secrets
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from fastbert import storage
from fastbert.errors import InputError
from fastbert.recipe import load_config
from fastbert.storage import Entry, Url, is_url, place
from tests.ranks import environment
from tests.store_server import BUCKET, Faults, Proxy, credentials, make_bucket, s3_server

DATA = random.Random(1).randbytes(300_000)
SHA = hashlib.sha256(DATA).hexdigest()


@pytest.fixture(scope="module")
def server():
    with s3_server() as port:
        make_bucket(port, BUCKET)
        yield port


@pytest.fixture
def proxy(server, monkeypatch):
    """A proxy that all requests of this test pass."""
    opened = Proxy(server)
    for name, value in credentials(opened.port).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(storage, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(storage, "RANGE_BYTES", 65_536)
    storage._file_system.cache_clear()
    fresh_clients(monkeypatch)
    yield opened
    opened.close()
    storage._file_system.cache_clear()


def fresh_clients(monkeypatch) -> None:
    """Keep fsspec from giving a client of an earlier test, which knows another port."""
    import s3fs

    monkeypatch.setattr(s3fs.S3FileSystem, "cachable", False)


@pytest.fixture(params=["disk", "memory", "s3"])
def folder(request, tmp_path):
    """A new folder on each kind of store."""
    if request.param == "disk":
        return tmp_path / "folder"
    if request.param == "memory":
        return Url(f"memory://{secrets.token_hex(4)}")
    request.getfixturevalue("proxy")
    return Url(f"s3://{BUCKET}/{secrets.token_hex(4)}")


def put(at, data: bytes) -> None:
    if isinstance(at, Path):
        at.parent.mkdir(parents=True, exist_ok=True)
        at.write_bytes(data)
    else:
        storage.write(at, data)


def test_every_kind_of_store_answers_alike(folder):
    assert storage.objects(folder) == [] and storage.names(folder) == []
    assert storage.size(folder / "a") is None
    with pytest.raises(FileNotFoundError):
        storage.read(folder / "a")
    put(folder / "a", b"one")
    put(folder / "b/c", b"")
    put(folder / "b/d e+f", DATA)
    assert storage.objects(folder) == [Entry("a", 3), Entry("b/c", 0), Entry("b/d e+f", len(DATA))]
    assert storage.names(folder) == ["a", "b"] and storage.names(folder / "b") == ["c", "d e+f"]
    assert storage.size(folder / "a") == 3 and storage.size(folder / "aa") is None
    assert storage.read(folder / "b/d e+f") == DATA and storage.read(folder / "b/c") == b""
    with storage.open_reading(folder / "b/d e+f", 10_000) as file:
        assert file.read(7) == DATA[:7] and file.tell() == 7
        assert file.seek(-9, 2) == len(DATA) - 9 and file.read() == DATA[-9:]
        assert file.seek(100_000) == 100_000 and file.read(5) == DATA[100_000:100_005]


@pytest.mark.parametrize("folder", ["memory", "s3"], indirect=True)
def test_objects_are_put_fetched_and_removed(folder, tmp_path):
    (tmp_path / "file").write_bytes(DATA)
    storage.upload(tmp_path / "file", folder / "x", SHA)
    assert storage.fetch_range(folder / "x", 1000, 70_000) == DATA[1000:70_000]
    parts = list(storage.fetch(folder / "x", tmp_path / "back", len(DATA), SHA))
    assert (tmp_path / "back").read_bytes() == DATA and sum(parts) == len(DATA)
    for length, digest, words in (
        (len(DATA) - 1, SHA, "bytes in place of"),
        (len(DATA), "0" * 64, "SHA-256"),
    ):
        with pytest.raises(OSError, match=words) as error:
            list(storage.fetch(folder / "x", tmp_path / "wrong", length, digest))
        assert error.value.filename == str(folder / "x")
    with pytest.raises(OSError, match="is not there"):
        list(storage.fetch(folder / "none", tmp_path / "wrong", 1, None))
    storage.remove(folder / "x")
    storage.remove(folder / "x")
    assert storage.objects(folder) == []


@pytest.mark.parametrize("folder", ["memory", "s3"], indirect=True)
def test_of_several_writers_one_makes_the_object(folder):
    won: list[bytes] = []

    def write(data: bytes) -> None:
        if storage.write_new(folder / "token", data):
            won.append(data)

    threads = [threading.Thread(target=write, args=(b"%d" % i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1 and storage.read(folder / "token") == won[0]


@pytest.mark.parametrize("kind", ["503", "cut"])
def test_requests_that_fail_are_made_again(proxy, kind, tmp_path):
    at = Url(f"s3://{BUCKET}/{kind}")
    (tmp_path / "file").write_bytes(DATA)
    proxy.fault = faults = Faults(kind, 3, "PUT" if kind == "503" else "GET")
    storage.upload(tmp_path / "file", at, SHA)
    list(storage.fetch(at, tmp_path / "back", len(DATA), SHA))
    assert faults.left == 0 and (tmp_path / "back").read_bytes() == DATA


def test_a_store_that_stops_answering_is_asked_again(proxy, monkeypatch):
    monkeypatch.setattr(storage, "REQUEST_S", 1.0)
    storage._file_system.cache_clear()
    at = Url(f"s3://{BUCKET}/held")
    storage.write(at, DATA)
    proxy.fault = faults = Faults("hold", 1, "GET")
    assert storage.fetch_range(at, 0, len(DATA)) == DATA and faults.left == 0


def test_an_answer_that_is_lost_does_not_lose_the_object(proxy):
    """The put succeeds, its answer is lost, and the next attempt finds an object of ours."""
    proxy.fault = faults = Faults("lose", 1, "PUT .*mine")
    at = Url(f"s3://{BUCKET}/mine")
    assert storage.write_new(at, b"token of ours") and faults.left == 0
    assert not storage.write_new(at, b"token of another")


def test_a_store_that_keeps_failing_raises_an_error_with_the_url(proxy, monkeypatch):
    proxy.fault = Faults("503", 10**6, ".")
    at = Url(f"s3://{BUCKET}/x")
    with pytest.raises(
        OSError, match=f"(503|Service Unavailable).*{storage.ATTEMPTS} attempts"
    ) as error:
        storage.read(at)  # asks by HEAD, whose answer has no body
    assert error.value.filename == str(at)
    assert len(proxy.requests) == storage.ATTEMPTS


def test_what_the_user_has_to_change_is_said(proxy, monkeypatch):
    with pytest.raises(
        InputError, match="s3://no-such-bucket/x: there is no bucket no-such-bucket"
    ):
        storage.size(Url("s3://no-such-bucket/x"))
    with pytest.raises(InputError, match="there is no bucket"):
        storage.objects(Url("s3://no-such-bucket/x"))
    with pytest.raises(InputError, match="there is no bucket"):
        storage.write(Url("s3://no-such-bucket/x"), b"")
    with pytest.raises(InputError, match="abcd://: no known kind of URL"):
        storage.size(Url("abcd://x/y"))
    proxy.fault = Faults("503", 0, ".")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nowhere")
    storage._file_system.cache_clear()
    with pytest.raises(InputError, match=f"s3://{BUCKET}/x: no credentials .*AWS_ACCESS_KEY_ID"):
        storage.size(Url(f"s3://{BUCKET}/x"))


@pytest.mark.parametrize(("scheme", "module"), [("s3", "s3fs"), ("gs", "gcsfs")])
def test_a_missing_package_is_named_with_its_extra(scheme, module):
    code = f"""
import sys
sys.modules[{module!r}] = None
from fastbert import storage
try:
    storage.size(storage.Url("{scheme}://b/x"))
except storage.InputError as error:
    print(error)
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment()
    )
    assert f"pip install 'fastbert-pretrain[{scheme}]'" in result.stdout, result.stderr


def test_places_keep_their_slashes():
    assert place("s3://b/x") == Url("s3://b/x") and str(place("s3://b/x/")) == "s3://b/x"
    assert place("data/x") == Path("data/x") and place("file:///a/b") == Path("/a/b")
    assert is_url("gs://b/x") and not is_url("s3:/b/x") and not is_url(Path("s3://b/x"))
    url = Url("s3://b/x") / "y.jsonl.gz"
    assert (str(url), url.name, url.suffixes) == (
        "s3://b/x/y.jsonl.gz",
        "y.jsonl.gz",
        [".jsonl", ".gz"],
    )
    assert url.parent == Url("s3://b/x")
    with pytest.raises(InputError) as error:
        place("s3://key:secret@b/x")
    assert "secret" not in str(error.value)
    with pytest.raises(InputError, match=r"overrides: run: s3://\.\.\.@b: credentials") as error:
        load_config({"data": "d"}, {"run": "s3://key:secret@b/x"})
    assert "secret" not in str(error.value)
    config = load_config({"data": "s3://b/d/"}, ["run=gs://b/run"])
    assert (config.data, config.run) == ("s3://b/d", "gs://b/run")
