"""Every format gives the same documents; every broken file is one InputError that names it."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import re
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastbert.data import documents, unpack
from fastbert.data.documents import parse, read_chunks, read_documents
from fastbert.data.sources import COMPRESSIONS, FORMATS, find_sources
from fastbert.data.unpack import BadRecord
from fastbert.errors import InputError
from fastbert.tasks.embed import source_of
from fastbert.tasks.labelled import read_examples
from tests.tiers import typical

DOCUMENTS = ["One.\nStill one.", "Zwei: größer.", "三。", 'Four "quoted" \\ back', "Five"]
WIKI = """<doc id="12" url="https://example.org/?curid=12" title="Title">
Title

One.

Two <b>.

</doc>
<doc id="25" url="https://example.org/?curid=25" title="Other">
Other

Three.
</doc>
"""
WIKI_CRLF = ["Title\r\n\r\nOne.\r\n\r\nTwo <b>.", "Other\r\n\r\nThree."]
ONE_LINE = [document.replace("\n", " ") for document in DOCUMENTS]

PACK: dict[str, Callable[[bytes], bytes]] = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor().compress,
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
}


def json_lines(texts: list[str], field: str = "text") -> bytes:
    return "".join(
        json.dumps({"id": i, field: text}) + "\n" for i, text in enumerate(texts)
    ).encode()


def table(
    path: Path, column: pyarrow.Array, name: str = "text", row_group_size: int | None = None
) -> Path:
    pyarrow.parquet.write_table(
        pyarrow.table({"id": range(len(column)), name: column}), path, row_group_size=row_group_size
    )
    return path


def csv_rows(texts: list[str], name: str = "text") -> bytes:
    out = io.StringIO()
    csv.writer(out).writerows([["id", name], *enumerate(texts)])
    return out.getvalue().encode()


def write(path: Path, data: bytes | str) -> Path:
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


@pytest.mark.parametrize("packing", PACK)
@pytest.mark.parametrize(
    ("name", "data", "text_format", "expected"),
    [
        ("a.txt", "\n\n".join(DOCUMENTS), None, DOCUMENTS),
        ("a.txt", "\n \t\n\n" + "\n\u00a0\n".join(DOCUMENTS) + "\n\n\n", None, DOCUMENTS),
        ("a.txt", "\r\n\r\n".join(DOCUMENTS), None, DOCUMENTS),
        ("a.txt", "\ufeffOne.\n\nTwo.", None, ["One.", "Two."]),
        ("a.txt", "\n".join(ONE_LINE) + "\n", "lines", ONE_LINE),
        ("a.txt", "one\n\ntwo", "lines", ["one", "", "two"]),
        ("a.txt", "one\r\n\r\ntwo\r\n", "lines", ["one", "", "two"]),
        ("a.log", "\n".join(ONE_LINE), "lines", ONE_LINE),
        ("a.jsonl", json_lines(DOCUMENTS), None, DOCUMENTS),
        ("a.ndjson", b"\n" + json_lines(DOCUMENTS).replace(b"\n", b"\r\n\r\n"), None, DOCUMENTS),
        ("a.json", json_lines(DOCUMENTS), "jsonl", DOCUMENTS),
        ("a.csv", csv_rows(DOCUMENTS), None, DOCUMENTS),
        ("a.csv", '\ufeffid,text\n\n1,one\n2,\n3,"a\n\nb"', None, ["one", "", "a\n\nb"]),
        ("a.csv", 'id;text;n\n1;"one; 1,5";2\n2;two, three;3\n', None, ["one; 1,5", "two, three"]),
        ("a.csv", 'id|text\n1|"a|b"\n', None, ["a|b"]),
        ("a.csv", '"id"\t"text"\n1\ta;b\n', None, ["a;b"]),
        ("a.csv", 'text\n"a;b"\n', None, ["a;b"]),
        ("a.txt", "One.\n\nStill one.\n\n", "file", ["One.\n\nStill one."]),
        ("wiki_00", WIKI, "txt", ["Title\n\nOne.\n\nTwo <b>.", "Other\n\nThree."]),
        ("a.txt", "\ufeff" + WIKI.replace("\n", "\r\n"), None, WIKI_CRLF),
        ("a.tsv", '\ufeffid\ttext\n\n1\t"one\r\n2\t\n', None, ['"one', ""]),
        (
            "a.jsonl",
            '{"text": null}\n{"text": "a\\ud800b"}\n{"text": "a\u2028b \\ud83d\\ude00"}',
            None,
            ["", "a\ufffdb", "a\u2028b 😀"],
        ),
    ],
)
def test_formats(
    tmp_path: Path,
    packing: str,
    name: str,
    data: bytes | str,
    text_format: str | None,
    expected: list[str],
) -> None:
    path = write(
        tmp_path / (name + packing),
        PACK[packing](data if isinstance(data, bytes) else data.encode()),
    )
    assert [document.strip("\r\n") for document in read_documents([path], text_format)] == expected


def test_the_table_of_formats_is_true(tmp_path: Path) -> None:
    """Each row of docs/reference/formats.md against what the three commands read."""
    page = Path(__file__).parents[1] / "docs/reference/formats.md"
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in page.read_text(encoding="utf-8").splitlines()
        if line.startswith("| `")
    ]
    head = page.read_text(encoding="utf-8").partition("| format |")[2].partition("\n")[0]
    assert [row[0] for row in rows] == [f"`{name}`" for name in FORMATS]
    assert re.findall(r"`(\.\w+)`", head) == [name for name in PACK if name] == [*COMPRESSIONS]
    records = pyarrow.table({"text": ["One.", "Two."], "label": ["a", "b"]})
    with pyarrow.ipc.new_stream(str(tmp_path / "arrow"), records.schema) as stream:
        stream.write_table(records)
    pyarrow.parquet.write_table(records, tmp_path / "parquet")
    lines = [json.dumps(record) for record in records.to_pylist()]
    content = {
        **dict.fromkeys(("txt", "lines", "file"), b"One.\n\nTwo.\n"),
        "jsonl": "\n".join(lines).encode(),
        "json": f"[{', '.join(lines)}]".encode(),
        "csv": b"text,label\nOne.,a\nTwo.,b\n",
        "tsv": b"text\tlabel\nOne.\ta\nTwo.\tb\n",
        "arrow": (tmp_path / "arrow").read_bytes(),
        "parquet": (tmp_path / "parquet").read_bytes(),
    }
    expected = {"lines": ["One.", "", "Two."], "file": ["One.\n\nTwo."]}
    for name, (_, suffixes, _, embedded, tuned, packed) in zip(FORMATS, rows, strict=True):
        for suffix in re.findall(r"\.\w+", suffixes) or [".txt"]:
            asked = name if suffixes == "-" else None
            for packing, pack in PACK.items():
                path = write(tmp_path / f"{name}{suffix}{packing}", pack(content[name]))
                if packing and packed == "no":
                    with pytest.raises(InputError, match="unpack the file first"):
                        list(read_documents([path], asked))
                    continue
                texts = [text.strip("\n") for text in read_documents([path], asked)]
                assert texts == expected.get(name, ["One.", "Two."]), path
                by_default = source_of(path).format
                assert (by_default == name) != ("--format" in embedded), path
                assert source_of(path, name).format == name
                if tuned == "-":
                    with pytest.raises(InputError, match="must end in"):
                        read_examples(path)
                else:
                    assert len(read_examples(path)) == 2


@pytest.mark.parametrize(
    "kind",
    [
        pyarrow.string(),
        pyarrow.large_string(),
        pyarrow.string_view(),
        pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
        pyarrow.dictionary(pyarrow.int8(), pyarrow.large_string()),
        pyarrow.binary(),  # of Impala, Hive and early Spark, which do not mark text as such
        pyarrow.large_binary(),
    ],
)
def test_parquet(tmp_path: Path, kind: pyarrow.DataType) -> None:
    column = pyarrow.array([*DOCUMENTS, None] * 500).cast(kind)
    path = table(tmp_path / "a.parquet", column, "body", row_group_size=700)
    assert list(read_documents([path], text_field="body")) == [*DOCUMENTS, ""] * 500
    chunks = list(read_chunks(find_sources([path])[0], "body"))
    assert sum(chunk.read_bytes for chunk in chunks) == path.stat().st_size


@pytest.mark.parametrize("size", [1, 40, 200, 1 << 20])
def test_articles_of_wikiextractor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """An article with blank lines is one document, wherever a chunk ends."""
    monkeypatch.setattr(documents, "CHUNK_BYTES", size)
    plain = unpack._read_plain
    monkeypatch.setitem(
        unpack._UNPACK,
        "",
        lambda path, file: (
            part for piece in plain(path, file) for part in (piece[:90], piece[90:95], piece[95:])
        ),
    )
    path = write(tmp_path / "wiki_00", WIKI * 3)
    found = list(read_documents([path], "txt"))
    assert [document.strip() for document in found] == [
        "Title\n\nOne.\n\nTwo <b>.",
        "Other\n\nThree.",
    ] * 3


def test_files_without_a_suffix(tmp_path: Path) -> None:
    """An explicit format reads them in folders too, for example from WikiExtractor or Hadoop."""
    names = ["AA/wiki_00", "AA/wiki_01.bz2", "part-00000", "x.007"]
    for name in [*names, "notes.md", "picture.png"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        data = f"Text of {name}.".encode()
        write(tmp_path / name, bz2.compress(data) if name.endswith("bz2") else data)
    with pytest.raises(InputError, match=r"no file in this folder .* add --format"):
        find_sources([tmp_path / "AA"])
    sources, left_out = find_sources([tmp_path], "txt")
    assert sorted(str(s.path.relative_to(tmp_path)) for s in sources) == names
    assert {item.path.name for item in left_out} == {"notes.md", "picture.png"}
    assert len(list(read_documents([tmp_path], "txt"))) == 4


def test_a_folder_of_save_to_disk(tmp_path: Path) -> None:
    """As Dataset.save_to_disk writes it: in shards, shuffled, beside a cache, and in splits."""
    import datasets

    rows = [{"text": f"Text {i}.", "doc": {"body": f"Body {i}."}} for i in range(50)]
    dataset = datasets.Dataset.from_list(rows)
    dataset.save_to_disk(tmp_path / "plain", num_shards=3)
    write(tmp_path / "plain" / "cache-0123.arrow", "of a map that was made later")
    assert list(read_documents([tmp_path / "plain"])) == [row["text"] for row in rows]
    sources, left_out = find_sources([tmp_path / "plain"])
    assert len(sources) == 3 and [item.reason for item in left_out] == ["a cache of datasets"]
    # The folder of the Hub's cache has no state.json, and what `map` and `filter` left.
    for name in (f"cache-{'0a' * 8}", f"cache-{'0a' * 8}_00000_of_00004", "wiki-train", "cache-en"):
        table = pyarrow.table({"text": [name]})
        (tmp_path / "hub").mkdir(exist_ok=True)
        with pyarrow.ipc.new_stream(str(tmp_path / "hub" / f"{name}.arrow"), table.schema) as out:
            out.write_table(table)
    assert list(read_documents([tmp_path / "hub"])) == ["cache-en", "wiki-train"]
    _, left_out = find_sources([tmp_path / "hub"])
    assert [item.reason for item in left_out] == ["a cache of datasets"] * 2
    found = read_documents([tmp_path / "plain"], text_field="doc.body")
    assert list(found) == [row["doc"]["body"] for row in rows]
    shuffled = dataset.shuffle(seed=3).select(range(20))
    shuffled.save_to_disk(tmp_path / "shuffled")
    assert list(read_documents([tmp_path / "shuffled"])) == shuffled["text"][:]
    splits = datasets.DatasetDict(
        train=dataset.select(range(40)), test=dataset.select(range(40, 50))
    )
    splits.save_to_disk(tmp_path / "splits")
    assert sorted(read_documents([tmp_path / "splits"])) == sorted(row["text"] for row in rows)
    assert list(read_documents([tmp_path / "splits" / "test"])) == splits["test"]["text"][:]
    state = json.loads((tmp_path / "plain/state.json").read_text())
    state["_indices_files"] = [{"filename": "indices.arrow"}]
    write(tmp_path / "plain/state.json", json.dumps(state))
    with pytest.raises(InputError, match=r"file of indices.*flatten_indices\(\)\.save_to_disk"):
        find_sources([tmp_path / "plain"])


@pytest.mark.parametrize(
    "kind", ["string", "large_string", "string_view", "dictionary", "binary", "large_binary"]
)
@pytest.mark.parametrize("form", ["stream", "file"])
def test_arrow_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, form: str) -> None:
    monkeypatch.setattr(documents, "CHUNK_BYTES", 100)
    texts = [*DOCUMENTS, None, "x" * 300]
    column = pyarrow.array(texts, "string")
    column = column.dictionary_encode() if kind == "dictionary" else column.cast(kind)
    table = pyarrow.table({"id": list(range(len(texts))), "text": column})
    make = pyarrow.ipc.new_stream if form == "stream" else pyarrow.ipc.new_file
    with make(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=4)
    assert list(read_documents([tmp_path / "a.arrow"])) == [text or "" for text in texts]
    sources, _ = find_sources([tmp_path / "a.arrow"])
    chunks = list(read_chunks(sources))
    assert len(chunks) > 2
    whole = (tmp_path / "a.arrow").read_bytes()
    for damaged in (whole[: len(whole) // 2], b"text", b""):
        (tmp_path / "b.arrow").write_bytes(damaged)
        with pytest.raises(InputError, match=r"b\.arrow: "):
            list(read_documents([tmp_path / "b.arrow"]))
    with pytest.raises(InputError, match="the column 'id' holds int64, not strings"):
        list(read_documents([tmp_path / "a.arrow"], text_field="id"))


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("piece", [1, 7, 1 << 20])
def test_a_json_array(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, indent: int | None, piece: int
) -> None:
    """It is read in parts, wherever these end; what json.loads gives is the measure."""
    rows = [{"n": i, "text": f'é"{i}" [\\] {{,}}\n', "more": [1, {"a": [i]}]} for i in range(30)]
    text = json.dumps(rows, indent=indent, ensure_ascii=False)
    path = write(tmp_path / "a.json", "\ufeff\n " + text + "\n")
    monkeypatch.setattr(documents, "CHUNK_BYTES", 200)
    plain = unpack._read_plain
    monkeypatch.setitem(
        unpack._UNPACK,
        "",
        lambda path, file: (
            part[i : i + piece] for part in plain(path, file) for i in range(0, len(part), piece)
        ),
    )
    assert list(read_documents([path])) == [row["text"] for row in json.loads(text)]
    sources, _ = find_sources([path])
    assert len(list(read_chunks(sources))) > 5


def test_json_files_that_are_no_array_or_not_whole(tmp_path: Path) -> None:
    lines = write(tmp_path / "lines.json", '{"text": "a"}\n{"text": "b"}\n')
    assert list(read_documents([lines])) == ["a", "b"]
    with pytest.raises(InputError, match="no file in this folder"):
        find_sources([tmp_path])  # in a folder, .json may be anything
    assert list(read_documents([tmp_path], "json")) == ["a", "b"]
    for text, words in (
        ('[{"text": "a"}, {"te', "object 2: not JSON"),
        ('[{"text": "a"},', "object 2: the array has no end"),
        ('[{"text": "a"}, 5]', "object 2: a JSON number, not an object"),
        ("[" * 100_000, "object 1: not JSON"),
        ("[]", "empty"),
        ('[{"txt": "a"}]', "object 1: no field 'text'"),
    ):
        with pytest.raises(InputError, match=words):
            list(read_documents([write(tmp_path / "x.json", text)]))


@pytest.mark.parametrize("options", [{}, {"use_dictionary": False}, {"store_schema": False}])
def test_a_field_of_a_field(tmp_path: Path, options: dict[str, bool]) -> None:
    """Crawlers write {"doc": {"text": ...}}, in JSON lines and in Parquet."""
    rows = [{"doc": {"text": text, "n": 1}, "id": "x"} for text in DOCUMENTS]
    pyarrow.parquet.write_table(
        pyarrow.table({"doc": [*(row["doc"] for row in rows), None, {"text": None, "n": 2}]}),
        tmp_path / "a.parquet",
        **options,
    )
    write(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    for name, extra in (("a.parquet", ["", ""]), ("a.jsonl", [])):
        found = list(read_documents([tmp_path / name], text_field="doc.text"))
        assert found == [*DOCUMENTS, *extra]
    plain = write(tmp_path / "b.jsonl", '{"doc.text": "a", "doc": {"text": "b"}}')
    assert list(read_documents([plain], text_field="doc.text")) == ["a"]


@pytest.mark.parametrize("kind", ["repeated", "repeated prefix", "one large among small"])
@pytest.mark.slow
def test_parquet_that_expands_is_read_in_pieces(tmp_path: Path, kind: str) -> None:
    """The file has a few kB on disk and 2 GB as text, or rows far from the mean size."""
    large = "x" * (1 << 20)
    if kind == "repeated":
        column = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 2000), [large])
        options = {}
    elif kind == "repeated prefix":
        column = pyarrow.array([large + str(i) for i in range(300)])
        options = {"use_dictionary": False, "column_encoding": {"text": "DELTA_BYTE_ARRAY"}}
    else:
        column = pyarrow.array([large * 5, *["a"] * 100_000, large * 5, large * 5, large * 5])
        options = {}
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), path, **options)
    before = pyarrow.total_allocated_bytes()
    rows = size = 0
    for chunk in read_chunks(find_sources([path])[0]):
        assert len(chunk.data) < 18 << 20
        assert pyarrow.total_allocated_bytes() - before < 400 << 20
        assert chunk.line == rows + 1
        texts = parse(chunk)
        rows, size = rows + len(texts), size + sum(map(len, texts))
    sizes = column.dictionary.to_pylist() * len(column) if options == {} and rows == 2000 else None
    assert rows == len(column)
    assert size == sum(map(len, sizes or column.to_pylist()))


def test_a_text_of_parquet_that_is_too_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "LONGEST_TEXT_BYTES", 1 << 20)
    path = table(tmp_path / "a.parquet", pyarrow.array(["a", "b" * (1 << 20), "c" * (2 << 20)]))
    with pytest.raises(InputError, match="the text in row 3 is longer than 1 MiB"):
        list(read_documents([path]))


def test_field(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", json_lines(DOCUMENTS, "body"))
    assert list(read_documents([path], text_field="body")) == DOCUMENTS


def test_several_members_and_frames(tmp_path: Path) -> None:
    halves = [b"One.\n\nTw", b"o.\n\nThree."]
    for packing in PACK:
        path = write(tmp_path / f"a.txt{packing}", b"".join(map(PACK[packing], halves)))
        assert list(read_documents([path])) == ["One.", "Two.", "Three."]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64])
@pytest.mark.parametrize("text_format", ["txt", "lines"])
def test_where_a_chunk_ends_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, text_format: str
) -> None:
    path = write(tmp_path / "a.txt", "\n\n".join(DOCUMENTS * 3) + "\n \n\n\t\nEnd.\n")
    whole = list(read_documents([path], text_format))
    monkeypatch.setattr(documents, "CHUNK_BYTES", size)
    monkeypatch.setattr(unpack, "PIECE_BYTES", size)
    chunks = list(read_chunks(find_sources([path], text_format)[0]))
    assert [document for chunk in chunks for document in parse(chunk)] == whole
    assert len(chunks) > 5 or size == 64
    data = path.read_bytes()
    assert b"".join(chunk.data for chunk in chunks) == data
    for chunk in chunks:
        assert chunk.line == 1 + data.count(b"\n", 0, chunk.offset)
        assert data[chunk.offset :].startswith(chunk.data)
    assert sum(chunk.read_bytes for chunk in chunks) == len(data)


@pytest.mark.parametrize("size", [1, 7, 64, 1 << 20])
def test_where_a_chunk_of_csv_ends_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    path = write(tmp_path / "a.csv", csv_rows(DOCUMENTS * 30))
    monkeypatch.setattr(documents, "CHUNK_BYTES", size)
    monkeypatch.setattr(unpack, "PIECE_BYTES", size)
    chunks = list(read_chunks(find_sources([path])[0]))
    assert [document for chunk in chunks for document in parse(chunk)] == DOCUMENTS * 30
    assert sum(chunk.read_bytes for chunk in chunks) == path.stat().st_size
    assert len(chunks) == 1 or size < 1 << 20


def test_folders(tmp_path: Path) -> None:
    for name in (
        "b/2.txt",
        "b/10.txt.gz",
        "a.jsonl",
        "notes.md",
        "b/picture.png",
        ".hidden/x.txt",
        "b/.x.txt",
    ):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        text = {"a": json_lines(["a"]), "1": gzip.compress(b"ten")}.get(
            path.name[0], path.name.encode()
        )
        write(path, text)
    sources, ignored = find_sources([tmp_path, tmp_path / "a.jsonl", tmp_path / "b"])
    # Each file is read once.
    assert [str(source.path.relative_to(tmp_path)) for source in sources] == [
        "a.jsonl",
        "b/10.txt.gz",
        "b/2.txt",
    ]
    assert {item.path.name for item in ignored} == {"notes.md", "picture.png"}
    assert list(read_documents([tmp_path])) == ["a", "ten", "2.txt"]
    sources, ignored = find_sources([tmp_path], "lines")
    assert [source.format for source in sources] == ["lines", "lines"]
    assert "a.jsonl" in {item.path.name for item in ignored}


def broken(tmp_path: Path) -> dict[str, tuple[Path | str, dict[str, str], list[str]]]:
    """Return the input, the options, and words of the expected message."""
    packed = {packing: PACK[packing](b"One.\n\nTwo.\n" * 10_000) for packing in PACK}
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder / "x.md", "x")
    strings = pyarrow.array(["a", "b"])
    bad_string = pyarrow.StringArray.from_buffers(
        2, pyarrow.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pyarrow.py_buffer(b"a\xff")
    )
    good = table(tmp_path / "good.parquet", strings).read_bytes()
    return {
        "missing": (tmp_path / "none.txt", {}, ["none.txt", "no such file"]),
        "name": (tmp_path / ("x" * 300), {}, ["cannot be read", "too long"]),
        "empty": (write(tmp_path / "e.txt", ""), {}, ["e.txt", "empty"]),
        "empty gz": (write(tmp_path / "e.txt.gz", ""), {}, ["e.txt.gz", "empty"]),
        "empty zst": (write(tmp_path / "e.txt.zst", ""), {}, ["e.txt.zst", "empty"]),
        "nothing packed": (
            write(tmp_path / "n.txt.gz", gzip.compress(b"")),
            {},
            ["n.txt.gz", "empty"],
        ),
        "latin-1": (
            write(tmp_path / "l.txt", b"a\n\nb\nc\xe9d\n"),
            {},
            ["l.txt", "line 4", "byte 6", "0xe9", "UTF-8", "iconv -f WINDOWS-1252 -t UTF-8"],
        ),
        "latin-1 packed": (
            write(tmp_path / "l.jsonl.gz", gzip.compress(b'{"text": "a"}\n\xff')),
            {},
            ["line 2", "byte 14", "0xff", "unpack it and convert it", "utf8-l.jsonl"],
        ),
        "utf-16": (
            write(tmp_path / "u.txt", "text".encode("utf-16")),
            {},
            ["u.txt", "mark of UTF-16", "iconv -f UTF-16 -t UTF-8", "utf8-u.txt"],
        ),
        "cut gz": (write(tmp_path / "c.txt.gz", packed[".gz"][:-9]), {}, ["c.txt.gz", "cut short"]),
        "cut zst": (
            write(tmp_path / "c.txt.zst", packed[".zst"][:-3]),
            {},
            ["c.txt.zst", "cut short"],
        ),
        "not gz": (
            write(tmp_path / "p.txt.gz", "plain text"),
            {},
            ["p.txt.gz", "not a valid gzip"],
        ),
        "not zst": (
            write(tmp_path / "p.txt.zst", "plain text"),
            {},
            ["p.txt.zst", "not a valid zstd"],
        ),
        "damaged gz": (
            write(tmp_path / "d.txt.gz", packed[".gz"][:40] + b"????" + packed[".gz"][44:]),
            {},
            ["d.txt.gz", "not a valid gzip"],
        ),
        "json": (
            write(tmp_path / "j.jsonl", '{"text": "a"}\n{"text": \n'),
            {},
            ["j.jsonl", "line 2", "not JSON"],
        ),
        "json twice": (
            write(tmp_path / "t.jsonl", '{"text": "a"}\n{"text": "b", "text": "c"}\n'),
            {},
            ["t.jsonl", "line 2", "the field 'text' is given twice"],
        ),
        "header twice": (
            write(tmp_path / "h.csv", "id,text\n1,a\n\ufeffid,text\n2,b\n"),
            {},
            ["h.csv", "line 3", "the header again"],
        ),
        "json list": (
            write(tmp_path / "i.jsonl", '["a"]\n'),
            {},
            ["line 1", "JSON list", "jq -c '.[]'"],
        ),
        "json array": (
            write(tmp_path / "ja.jsonl", '[\n {"text": "a"},\n {"text": "b"}\n]\n'),
            {},
            ["line 1", "not JSON", "jq -c '.[]'"],
        ),
        "json over lines": (
            write(tmp_path / "jo.jsonl", '{\n "text": "a"\n}\n'),
            {},
            ["line 1", "not JSON", "jq -c ."],
        ),
        "json file": (write(tmp_path / "jf.json", "[1]"), {}, ["object 1", "JSON number"]),
        "json deep": (write(tmp_path / "h.jsonl", "[" * 100_000), {}, ["line 1", "not JSON"]),
        "field": (
            write(tmp_path / "f.jsonl", '{"body": 1, "title": 2}'),
            {},
            ["line 1", "no field 'text'", "no field of the object holds text: body, title"],
        ),
        "field beside a list": (
            write(tmp_path / "fb.jsonl", '{"rows": ["a"], "n": 1, "d": {"body": "b"}, "c": null}'),
            {},
            ["no field 'text'", "choose with --text-field among: d.body, c"],
        ),
        "field of a field": (
            write(tmp_path / "fl.jsonl", '{"doc": {"title": 5, "body": "b"}}'),
            {"text_field": "doc.title"},
            ["line 1", "'doc.title' is a number", "among: doc.body"],
        ),
        "field kind": (
            write(tmp_path / "k.jsonl", '\n{"text": 5}'),
            {},
            ["line 2", "'text' is a number"],
        ),
        "column of csv": (
            write(tmp_path / "p.csv", "id,body\n1,a\n"),
            {},
            ["p.csv", "no column 'text'", "id, body"],
        ),
        "fields of csv": (
            write(tmp_path / "s.csv", "id,text\n1,a\n2,b,c\n"),
            {},
            ["s.csv", "line 3", "3 fields", "2"],
        ),
        "quote of csv": (
            write(tmp_path / "t.csv", 'text\n"a" b\n'),
            {},
            ["t.csv", "line 2", "not valid csv"],
        ),
        "only a header": (
            write(tmp_path / "v.csv", "text\n"),
            {},
            ["v.csv", "no row below the header"],
        ),
        "empty csv": (write(tmp_path / "w.csv", ""), {}, ["w.csv", "empty"]),
        "no parquet": (
            write(tmp_path / "x.parquet", "plain text"),
            {},
            ["x.parquet", "not a valid Parquet"],
        ),
        "cut parquet": (
            write(tmp_path / "y.parquet", good[: len(good) // 2]),
            {},
            ["y.parquet", "not a valid Parquet"],
        ),
        "empty parquet": (write(tmp_path / "z.parquet", b""), {}, ["z.parquet", "empty"]),
        "no rows": (table(tmp_path / "r.parquet", strings[:0]), {}, ["r.parquet", "empty"]),
        "column": (
            table(tmp_path / "q.parquet", strings, "body"),
            {},
            ["q.parquet", "no column 'text'", "among: body"],
        ),
        "column kind": (
            table(tmp_path / "o.parquet", pyarrow.array([1, 2])),
            {},
            ["o.parquet", "'text' holds int64, not strings; there is no other"],
        ),
        "bad string": (
            table(tmp_path / "b.parquet", bad_string),
            {},
            ["b.parquet", "row 2", "UTF-8"],
        ),
        "packed parquet": (
            write(tmp_path / "g.parquet.gz", gzip.compress(good)),
            {},
            ["g.parquet.gz", "unpack"],
        ),
        "suffix": (write(tmp_path / "a.doc", "x"), {}, ["a.doc", "--format"]),
        "json suffix": (write(tmp_path / "a.json", "{}"), {}, ["a.json", "line 1", "no field"]),
        "format": (
            write(tmp_path / "a.txt", "x"),
            {"text_format": "pdf"},
            ["pdf", "txt, lines, file, jsonl, csv, tsv, parquet"],
        ),
        "folder": (folder, {}, ["folder", ".jsonl", ".parquet"]),
        "device": (Path(os.devnull), {"text_format": "txt"}, [os.devnull, "not a regular file"]),
        "stdin": (Path("-"), {}, ["-: no such file", "standard input cannot be read"]),
    }


def test_broken_input(tmp_path: Path) -> None:
    for name, (path, options, words) in broken(tmp_path).items():
        with pytest.raises(InputError) as raised:
            list(read_documents([path], **options))
        message = str(raised.value)
        assert all(word in message for word in words), f"{name}: {message}"
        assert "\n" not in message, name


BAD_RECORDS = {
    "a.txt": (b"one\n\ntw\xff\xe9o\n\nthree", ["not UTF-8: 'tw\\udcff\\udce9o'"]),
    "lines.txt": (b"one\n\xe9\nthree\n", ["not UTF-8"]),
    "a.jsonl": (
        b'{"text": "one"}\n{"text": \n[1]\n{"txt": ""}\n{"text": 5}\n{"text": "\xff"}\n'
        b'{"text": "three", "x": "y"}\n',
        [
            "line 2: not JSON",
            "line 3: a JSON list",
            "line 4: no field",
            "line 5",
            "line 6: not UTF-8",
        ],
    ),
    "a.csv": (
        b'id,text\n1,one\n2\n3,a,b\n4,"x"y\n5,\xe9\n\xe9,three\n',
        ["line 3: 1 fields", "line 4: 3 fields", "line 5: not valid csv", "line 6: not UTF-8"],
    ),
    "a.tsv": (b"text\tid\none\t1\nx\n\xff\t2\nthree\t4\n", ["line 3: 1 fields", "line 4"]),
}


@pytest.mark.parametrize("name", [*BAD_RECORDS, "a.parquet"])
def test_bad_records_can_be_left_out(tmp_path: Path, name: str) -> None:
    """A record that cannot be read is an error by default, or skipped and counted."""
    data, problems = BAD_RECORDS.get(name, (b"", ["row 2: byte 0 of the string is not UTF-8"]))
    path = tmp_path / name
    if data:
        write(path, data)
    else:
        offsets = pyarrow.array([0, 3, 4, 9], pyarrow.int32()).buffers()[1]
        table(
            path, pyarrow.StringArray.from_buffers(3, offsets, pyarrow.py_buffer(b"one\xffthree"))
        )
    text_format = "lines" if name == "lines.txt" else None
    sources, _ = find_sources([path], text_format)
    skipped = list[BadRecord]()
    chunks = read_chunks(sources, skip_bad=True)
    assert [text for chunk in chunks for text in parse(chunk, "text", skipped)] == ["one", "three"]
    assert len(skipped) == len(problems)
    shown = list(map(str, skipped))
    assert all(word in text and name in text for text, word in zip(shown, problems, strict=True))
    with pytest.raises(BadRecord, match=name):
        list(read_documents([path], text_format))


def test_a_file_without_end_is_no_bad_record(tmp_path: Path) -> None:
    """An unclosed quote would take the rest of the file with it."""
    path = write(tmp_path / "a.csv", 'text\none\n"two\nthree\n')
    with pytest.raises(InputError, match="line 4: not valid csv: unexpected end") as raised:
        list(read_chunks(find_sources([path])[0], skip_bad=True))
    assert not isinstance(raised.value, BadRecord)


def test_nothing_named() -> None:
    with pytest.raises(InputError, match="no SOURCE"):
        find_sources([])


def test_a_document_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "LONGEST_TEXT_BYTES", 3 << 20)
    path = write(tmp_path / "a.txt", b"Short.\n\n" + b"A line.\n" * (1 << 20))
    with pytest.raises(InputError, match=r"line 3 is longer than 3 MiB.*--format lines"):
        list(read_documents([path]))
    assert sum(1 for _ in read_documents([path], "lines")) == (1 << 20) + 2


rubbish = settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize(
    "suffix", [".txt", ".jsonl", ".csv", ".tsv", ".parquet", ".txt.gz", ".jsonl.zst"]
)
@rubbish
@given(
    data=st.one_of(
        st.binary(max_size=200),
        st.lists(
            st.sampled_from(
                [b"{", b"}", b'"', b"text", b":", b"\n", b"\xff", b"\xc3", b"1", b"\\ud8"]
            )
        ).map(b"".join),
    )
)
def test_rubbish(tmp_path: Path, suffix: str, data: bytes) -> None:
    path = write(tmp_path / f"a{suffix}", data)
    try:
        found = list(read_documents([path]))
    except InputError as error:
        assert str(path) in str(error) and "\n" not in str(error)
    else:
        assert all(
            isinstance(document, str) and document.encode() is not None for document in found
        )


@pytest.mark.parametrize("suffix", [".parquet", ".txt.gz", ".jsonl.zst"])
@rubbish
@given(place=st.integers(0, 10_000), value=st.integers(0, 255), cut=st.booleans())
def test_damage(tmp_path: Path, suffix: str, place: int, value: int, cut: bool) -> None:
    """Change one byte of a valid file, or cut off its end."""
    path = tmp_path / f"a{suffix}"
    valid = tmp_path / f"valid{suffix}"
    if not valid.exists():
        if suffix == ".parquet":
            table(valid, pyarrow.array(DOCUMENTS))
        else:
            write(
                valid,
                PACK[suffix[-4:] if suffix.endswith(".zst") else ".gz"](json_lines(DOCUMENTS)),
            )
    data = bytearray(valid.read_bytes())
    place %= len(data)
    data[place] = value
    write(path, bytes(data[:place] if cut else data))
    try:
        found = list(read_documents([path]))
    except InputError as error:
        assert str(path) in str(error) and "\n" not in str(error)
    else:
        assert all(isinstance(document, str) for document in found)


@pytest.mark.parametrize("bit", typical((0, 4, 7), 0))
def test_every_byte_of_a_parquet_file_may_be_damaged(tmp_path: Path, bit: int) -> None:
    """pyarrow aborts the process when it is asked for the encodings of some of these files."""
    path, valid = tmp_path / "a.parquet", tmp_path / "valid.parquet"
    table(valid, pyarrow.array(DOCUMENTS))
    data = valid.read_bytes()
    for place in range(len(data)):
        write(path, data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :])
        try:
            found = list(read_documents([path]))
        except InputError as error:
            assert str(path) in str(error) and "\n" not in str(error)
        else:
            assert all(isinstance(document, str) for document in found)
