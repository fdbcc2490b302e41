"""Datasets made from and into a bucket, against the same on a disk."""

from __future__ import annotations

import contextlib
import gzip
import json
import threading
from pathlib import Path

import pytest

import fastbert
from fastbert import storage
from fastbert.data import remote_dataset
from fastbert.data.dataset import open_dataset
from fastbert.data.prepare import prepare
from fastbert.data.remote_dataset import fetch_dataset, files_of
from fastbert.data.sources import find_sources
from fastbert.durable import sealed, sha256_of
from fastbert.errors import InputError
from fastbert.planning.plan import Hardware, plan
from fastbert.recipe import load_config
from fastbert.storage import Url
from tests.ranks import Ranks
from tests.store_server import BUCKET, Faults, Proxy, credentials, make_bucket, s3_server
from tests.trials import wait_for


@pytest.fixture(scope="module")
def server():
    with s3_server() as port:
        make_bucket(port, BUCKET)
        yield port


@pytest.fixture
def proxy(server, monkeypatch, tmp_path):
    import s3fs

    opened = Proxy(server)
    monkeypatch.setattr(s3fs.S3FileSystem, "cachable", False)
    for name, value in credentials(opened.port).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("FASTBERT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(storage, "FIRST_PAUSE_S", 0.01)
    storage._file_system.cache_clear()
    yield opened
    opened.close()
    storage._file_system.cache_clear()


@pytest.fixture
def texts(english_documents, tmp_path) -> Path:
    """A folder with text in several formats."""
    import pyarrow
    import pyarrow.parquet

    folder, docs = tmp_path / "texts", english_documents[:120]
    (folder / "more").mkdir(parents=True)
    lines = [json.dumps({"text": text}) for text in docs[:40]]
    with gzip.open(folder / "a.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write("\n".join(lines))
    (folder / "more/b.txt").write_text("\n\n".join(docs[40:80]), encoding="utf-8")
    table = pyarrow.table({"text": docs[80:]})
    pyarrow.parquet.write_table(table, folder / "more/c.parquet", row_group_size=10)
    return folder


def put_folder(folder: Path, url: Url) -> None:
    for entry in storage.objects(folder):
        storage.put(folder / entry.name, url / entry.name)


def hashes(folder: Path) -> dict[str, str]:
    return {entry.name: sha256_of(folder / entry.name) for entry in storage.objects(folder)}


OPTIONS = {"vocab_size": 400, "workers": 1, "progress": False}


def test_text_and_dataset_in_a_bucket_give_the_same_bytes(proxy, texts, tmp_path, monkeypatch):
    prepare([texts], tmp_path / "local", **OPTIONS)
    at = Url(f"s3://{BUCKET}/{tmp_path.name}")
    put_folder(texts, at / "texts")
    monkeypatch.setattr(storage, "READ_AHEAD", 20_000)
    proxy.fault = faults = Faults("cut", 3, "GET .*texts/")
    report = fastbert.prepare(str(at / "texts"), str(at / "data"), **OPTIONS)
    assert faults.left == 0 and report.figures["documents"] > 100
    copy = fetch_dataset(at / "data")
    assert hashes(copy) == hashes(tmp_path / "local")
    assert open_dataset(str(at / "data")).sha256 == open_dataset(tmp_path / "local").sha256
    before = len(proxy.requests)
    assert fetch_dataset(at / "data") == copy
    assert len(proxy.requests) - before <= 3, "the manifest alone is read again"
    with pytest.raises(InputError, match=f"{at}/data: exists already"):
        fastbert.prepare(str(at / "texts"), str(at / "data"), **OPTIONS)
    assert not list((tmp_path / "cache/prepare").iterdir())


def test_the_objects_of_a_url_are_found_as_files_are(proxy, texts, tmp_path):
    at = Url(f"s3://{BUCKET}/{tmp_path.name}")
    put_folder(texts, at / "t")
    storage.write(at / "t/.hidden/x.txt", b"no")
    storage.write(at / "t/notes.pdf", b"no")
    storage.write(at / "t/set/manifest.json", b"{}")
    storage.write(at / "t/set/train/x.txt", b"no")

    def found(*urls: str) -> list[str]:
        return [str(s.path)[len(str(at)) + 1 :] for s in find_sources(urls)[0]]

    everything = ["t/a.jsonl.gz", "t/more/b.txt", "t/more/c.parquet"]
    assert found(f"{at}/t") == everything
    assert found(f"{at}/t/*.jsonl.gz") == everything[:1]
    assert found(f"{at}/t/more/?.txt", f"{at}/t") == [everything[1], everything[0], everything[2]]
    _, left_out = find_sources([f"{at}/t"])
    assert sorted(str(x.path)[len(str(at)) :] for x in left_out) == [
        "/t/notes.pdf",
        "/t/set/manifest.json",
        "/t/set/train/x.txt",
    ]
    for url, words in (
        (f"{at}/none", "no such object, and nothing below it"),
        (f"{at}/t/*.csv", "nothing there has such a name"),
        (f"{at}/t/notes.pdf", "the suffix does not tell the format"),
        ("s3://no-such-bucket/x", "there is no bucket"),
        ("abc://x/y", "no known kind of URL"),
    ):
        with pytest.raises(InputError, match=words):
            find_sources([url])


def test_what_is_uploaded_of_a_dataset_that_fails_is_removed(proxy, tmp_path, monkeypatch):
    at = Url(f"s3://{BUCKET}/{tmp_path.name}")
    monkeypatch.setattr(storage, "ATTEMPTS", 2)
    proxy.fault = Faults("503", 2, "PUT .*manifest")
    words = f"{at}/d/manifest.json: .*reduce your request rate"
    with pytest.raises(InputError, match=words), remote_dataset.uploading(at / "d") as made:
        made.mkdir()
        (made / "manifest.json").write_bytes(sealed({"files": {}}))
        (made / "tokens").write_bytes(b"123")
    uploaded = [path for method, path in proxy.requests if method == "PUT"]
    assert ".upload" in uploaded[0] and "tokens" in uploaded[1], "the manifest goes last"
    assert storage.objects(at) == []


def test_a_killed_upload_is_completed_by_the_same_request(proxy, tmp_path, monkeypatch, capsys):
    at, request = Url(f"s3://{BUCKET}/{tmp_path.name}/d"), (["a.txt"], {"heldout": 0.1})

    def upload(*request: object) -> None:
        with remote_dataset.uploading(at, *request) as made:
            made.mkdir()
            (made / "manifest.json").write_bytes(sealed({"files": {}}))
            (made / "tokens").write_bytes(b"123")

    with monkeypatch.context() as patch, pytest.raises(InputError):
        patch.setattr(storage, "ATTEMPTS", 2)
        patch.setattr(storage, "remove", lambda _: None)  # a process that is killed removes nothing
        proxy.fault = Faults("503", 2, "PUT .*manifest")
        upload(*request)
    assert storage.names(at) == [".upload", "tokens"]
    words = "holds .upload, tokens, and no dataset; if this is an upload that was killed"
    with pytest.raises(InputError, match=words):
        upload(["b.txt"], {"heldout": 0.1})
    upload(*request)
    assert "whose upload was killed; it will be completed" in capsys.readouterr().err
    assert storage.names(at) == ["manifest.json", "tokens"]


def small_upload(at: Url, tokens: bytes) -> contextlib.ExitStack:
    """Prepare to upload a dataset; what it is made from is different for other tokens."""
    stack = contextlib.ExitStack()
    made = stack.enter_context(remote_dataset.uploading(at, tokens))
    made.mkdir()
    (made / "manifest.json").write_bytes(sealed({"files": {}, "tokens": str(tokens)}))
    (made / "tokens").write_bytes(tokens)
    return stack


def test_of_two_datasets_that_are_made_at_once_one_is_there(proxy, tmp_path):
    """The other one is refused before it has written anything, and removes nothing."""
    at = Url(f"s3://{BUCKET}/{tmp_path.name}")
    late = small_upload(at / "a", b"late")
    small_upload(at / "a", b"early").close()
    with pytest.raises(InputError, match=f"{at}/a: exists already"):
        late.close()
    assert storage.names(at / "a") == ["manifest.json", "tokens"]
    assert storage.read(at / "a/tokens") == b"early"

    late, early = small_upload(at / "b", b"late"), small_upload(at / "b", b"early")
    proxy.fault = Faults("hold", 1, "PUT .*/b/tokens")
    thread = threading.Thread(target=early.close)
    thread.start()
    wait_for(lambda: not proxy.fault.left)
    assert storage.waits() == f"{at}/b/tokens"
    with pytest.raises(InputError, match=f"{at}/b: another dataset is being uploaded there"):
        late.close()
    proxy.released.set()
    thread.join()
    assert storage.waits() == ""
    assert storage.names(at / "b") == ["manifest.json", "tokens"]
    assert storage.read(at / "b/tokens") == b"early"


def test_a_store_without_conditions_gets_a_dataset_too(proxy, tmp_path):
    at = Url(f"s3://{BUCKET}/{tmp_path.name}/d")
    faults = [Faults("501", 1, "PUT .*upload"), Faults("501", 1, "PUT .*manifest")]
    proxy.fault = lambda *request: next(filter(None, (f(*request) for f in faults)), "")
    small_upload(at, b"123").close()
    assert not any(f.left for f in faults)
    assert storage.names(at) == ["manifest.json", "tokens"]


@pytest.mark.slow
def test_two_commands_at_once_with_one_url_leave_the_dataset_of_one(
    proxy, english_documents, tmp_path
):
    at = Url(f"s3://{BUCKET}/{tmp_path.name}/d")
    options, wanted = ["--vocab-size", "400", "--workers", "1"], []
    for name, documents in (("a", english_documents[:60]), ("b", english_documents[60:120])):
        (tmp_path / f"{name}.txt").write_text("\n\n".join(documents), encoding="utf-8")
        prepare([tmp_path / f"{name}.txt"], tmp_path / name, **OPTIONS)
        wanted.append(hashes(tmp_path / name))
    first, second = (
        Ranks(
            ["prepare", f"{tmp_path}/{name}.txt", "--out", str(at), *options],
            tmp_path / f"{name}-said",
        )
        for name in "ab"
    )
    with first, second:
        codes = first.wait() + second.wait()
        assert sorted(codes) == [0, 2], first.errors + second.errors
    assert hashes(fetch_dataset(at)) == wanted[codes.index(0)]


def test_text_is_added_to_a_dataset_on_a_disk_alone(small_dataset, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTBERT_CACHE", str(tmp_path / "cache"))
    url = Url(f"memory://{tmp_path}/data")
    put_folder(small_dataset.path, url)
    (tmp_path / "a.txt").write_text("One.\n\nTwo.")
    with pytest.raises(InputError, match=f"out = {url} is a URL; copy the dataset to a"):
        fastbert.prepare(tmp_path / "a.txt", str(url), add=True)


def test_a_plan_reads_a_dataset_in_a_bucket(small_dataset, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTBERT_CACHE", str(tmp_path / "cache"))
    url = Url(f"memory://{tmp_path}/data")
    put_folder(small_dataset.path, url)
    found = [
        plan(load_config("mini", {"data": str(data)}), "mini", Hardware("h100"))
        for data in (small_dataset.path, url, f"{url}/none")
    ]
    assert found[0] == found[1] and "none is not here" in found[2].assumptions[0]


def test_a_manifest_cannot_write_outside_its_copy(proxy, tmp_path):
    at = Url(f"s3://{BUCKET}/{tmp_path.name}")
    for name in ("../x", "/etc/x", "a/../../x", ""):
        manifest = sealed({"files": {name: {"size": 1, "sha256": "0"}}})
        storage.write(at / "manifest.json", manifest)
        with pytest.raises(InputError, match="not the manifest of a dataset"):
            fetch_dataset(at)
    storage.write(at / "manifest.json", sealed({"files": {}}).replace(b"{}", b"{ }"))
    with pytest.raises(InputError, match="damaged or changed"):
        fetch_dataset(at)
    with pytest.raises(InputError, match=f"{at}/none: no such dataset"):
        fetch_dataset(at / "none")


def test_a_changed_file_is_found(proxy, texts, tmp_path):
    prepare([texts], tmp_path / "local", **OPTIONS)
    at = Url(f"s3://{BUCKET}/{tmp_path.name}")
    put_folder(tmp_path / "local", at)
    data = bytearray(storage.read(at / "tokenizer/vocab.txt"))
    data[5] ^= 1
    storage.write(at / "tokenizer/vocab.txt", bytes(data))
    with pytest.raises(InputError, match=r"vocab\.txt: does not have the SHA-256 of its manifest"):
        fetch_dataset(at)
    assert not [p for p in (tmp_path / "cache/datasets").iterdir() if p.is_dir()]


def test_the_files_of_the_format_of_blocks():
    """Format 3 lists its shards by size; the hashes of their blocks are in its table."""
    splits = {"train": {"shards": [512, 7]}, "heldout": {"shards": [9]}}
    manifest = {
        "files": {"part-00000/blocks": {"size": 3, "sha256": "ab"}},
        "parts": [{"splits": splits}],
    }
    assert files_of(manifest) == {
        "part-00000/blocks": (3, "ab"),
        "part-00000/train-00000": (512, None),
        "part-00000/train-00001": (7, None),
        "part-00000/heldout-00000": (9, None),
    }
