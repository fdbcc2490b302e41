"""Labelled texts: every layout is read unmodified, and bad rows are listed by line."""

from __future__ import annotations

import csv
import gzip
import io
import json
import shutil
import subprocess
from datetime import date
from decimal import Decimal
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from fastbert.data.documents import read_documents
from fastbert.errors import InputError
from fastbert.tasks.labelled import Columns, read_examples


def write(path: Path, data: str | bytes) -> Path:
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def test_csv_with_quotes_newlines_and_a_byte_order_mark(tmp_path):
    found = read_examples(
        write(tmp_path / "x.csv", '\ufefftext,label\n"a, ""b""\nsecond line",x\n\nplain,y\n')
    )
    assert (
        found.first == ['a, "b"\nsecond line', "plain"]
        and found.labels == ["x", "y"]
        and found.second == []
    )
    assert found.lines == [2, 5]


# The first lines of GLUE's files, shortened.
GLUE = {
    "CoLA": (
        "gj04\t1\t\tOur friends won't buy this.\ngj04\t0\t*\tThey \"drank the pub.\n",
        "Our friends won't buy this.",
        "",
        "1",
    ),
    "SST-2": ("sentence\tlabel\nhide new secretions \t0\n", "hide new secretions ", "", "0"),
    "MRPC": (
        'Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t702\t703\tAmrozi "a\tReferring\n',
        'Amrozi "a',
        "Referring",
        "1",
    ),
    "QQP": (
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n1\t2\t3\tHow?\tWhy?\t0\n",
        "How?",
        "Why?",
        "0",
    ),
    "STS-B": (
        "index\tgenre\tsentence1\tsentence2\tscore\n0\tmain\tA plane.\tAn air plane.\t5.000\n",
        "A plane.",
        "An air plane.",
        "5.000",
    ),
    "MNLI": (
        "index\tsentence1\tsentence2\tlabel1\tgold_label\n0\tOne.\tTwo.\tneutral\tentailment\n",
        "One.",
        "Two.",
        "entailment",
    ),
    "QNLI": (
        "index\tquestion\tsentence\tlabel\n0\tWhen?\tThen.\tnot_entailment\n",
        "When?",
        "Then.",
        "not_entailment",
    ),
    "RTE": (
        "index\tsentence1\tsentence2\tlabel\n0\tNo.\tYes.\tentailment\n",
        "No.",
        "Yes.",
        "entailment",
    ),
}


@pytest.mark.parametrize("task", GLUE)
def test_files_of_glue_are_read_as_they_come(tmp_path, task):
    text, first, second, label = GLUE[task]
    found = read_examples(write(tmp_path / "train.tsv", text))
    assert (found.first[0], found.second[:1], found.labels[0]) == (
        first,
        [second] if second else [],
        label,
    )
    assert found.lines[0] == (1 if task == "CoLA" else 2)


def test_json_lines_and_named_columns(tmp_path):
    rows = [
        {"title": "a", "body": "b", "stars": 4},
        {"title": "c", "body": "d\u2028", "stars": 1.5},
    ]
    file = write(tmp_path / "x.jsonl", "".join(json.dumps(row) + "\n\n" for row in rows))
    found = read_examples(file, "title", "body", "stars")
    assert (found.columns, found.first, found.second) == (
        Columns("title", "body", "stars"),
        ["a", "c"],
        ["b", "d\u2028"],
    )
    assert found.numbers() == [4.0, 1.5] and found.lines == [1, 3]
    assert read_examples(file, "body", None, "stars").second == []
    assert read_examples(
        write(tmp_path / "y.csv", "text,title,label\na,b,x\n"), second="title"
    ).second == ["b"]
    assert found.take([1]).first == ["c"] and len(found.take([1, 0])) == 2


TABLE = [["text", "label"], ["a", "x"], ['b, "c"', "y"], ["d", "4"]]


@pytest.mark.parametrize("packing", ["", ".gz", ".zst"])
@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "ndjson", "parquet"])
def test_every_file_that_prepare_reads(tmp_path, kind, packing):
    """The same rows are read in every format and compression that prepare reads."""
    file, (header, *rows) = tmp_path / f"x.{kind}{packing}", TABLE
    if kind == "parquet":
        columns = dict(zip(header, map(list, zip(*rows, strict=True)), strict=True))
        pyarrow.parquet.write_table(pyarrow.table({"id": [1, 2, 3], **columns}), file)
    else:
        out = io.StringIO()
        if kind == "csv":
            csv.writer(out).writerows(TABLE)
        elif kind == "tsv":
            out.write("".join("\t".join(row) + "\n" for row in TABLE))
        else:
            for row in rows:
                out.write(json.dumps(dict(zip(header, row, strict=True))) + "\n")
        pack = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}
        write(file, pack[packing](out.getvalue().encode()))
    if kind == "parquet" and packing:
        with pytest.raises(InputError, match=r"Parquet compresses its own columns.*unpack"):
            read_examples(file)
        return
    found = read_examples(file)
    assert [found.first, found.labels] == [["a", 'b, "c"', "d"], ["x", "y", "4"]]
    texts = list(read_documents([file]))
    assert texts == found.first
    with pytest.raises(InputError, match=f"{found.unit} {found.lines[0]}: label 'x' is not"):
        found.numbers()


def test_bad_rows_of_parquet(tmp_path):
    table = pyarrow.table({"text": ["a", None, " "], "label": [1.5, 2, None]})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(InputError, match="2 bad rows: row 2: text is empty; row 3: text is empty"):
        read_examples(tmp_path / "x.parquet")
    (tmp_path / "x.parquet").rename(tmp_path / "x.PARQUET")
    with pytest.raises(InputError, match="row 2: text is empty"):
        read_examples(tmp_path / "x.PARQUET")
    pyarrow.parquet.write_table(table[:1], tmp_path / "x.parquet")
    assert read_examples(tmp_path / "x.parquet").numbers() == [1.5]


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("x.csv", b"", "the file is empty"),
        ("x.csv", b"text,label\n", "no examples"),
        (
            "x.csv",
            b"body,label\na,b\n",
            "the columns do not say which is the text.*there are body, label.*"
            "--text, --pair and --label",
        ),
        ("x.csv", b"text,label\na,x\nb\n", "1 bad row: line 3: 1 fields, and the header has 2"),
        (
            "x.csv",
            b"text,label\na,x\nb, and c,y\n",
            "line 3: 3 fields, and the header has 2.*quotes",
        ),
        (
            "x.csv",
            b"text,label\na,x\n ,y\n,z\n",
            "2 bad rows: line 3: text is empty; line 4: text is empty; fix or remove them",
        ),
        ("x.csv", b"text,label\na,x\nb,\n", "line 3: label is empty"),
        (
            "x.csv",
            b"text,label\na,x\n\xef\xbb\xbftext,label\nb,y\ntext,label\n",
            "2 bad rows: line 3: the header again, as where files were joined; .*; line 5: the hea",
        ),
        ("x.jsonl", b'{"text": "a", "label": 0, "label": 1}', "the field 'label' is given twice"),
        ("x.csv", b'text,label\n"a,x\n', "line 2: not valid csv"),
        ("x.csv", b'text,label\n"a"b,x\n', "line 2: not valid csv"),
        (
            "x.csv",
            b"text,label\ncaf\xe9,x\n",
            "line 2, byte 14: 0xe9 is not UTF-8; .*: iconv -f WINDOWS-1252 -t UTF-8 .*/x.csv > ",
        ),
        ("x.csv", b"text,label\n" + b",x\n" * 9, "9 bad rows: .* and 4 more; fix"),
        ("x.tsv", b"text\tlabel\na\tx\nb\n", "line 3: 1 fields, and the header has 2;"),
        (
            "x.jsonl",
            b'{"text": "a", "label": "x"}\n{"text": "b"}\n[1]\n{\n',
            "3 bad rows: line 2: label is empty; line 3: a JSON list, not an object .*; "
            "line 4: not JSON",
        ),
        ("x.jsonl", b"[" * 100_000, "line 1: not JSON"),
        # As pandas writes an index.
        ("x.csv", b",body,stars\n0,a,b\n", "the columns do not say which is the text and which"),
        ("x.tsv", b"\tbody\tstars\n0\ta\tb\n", "the columns do not say which is the text and"),
        ("x.jsonl", b'{"": "a", "label": "x"}', "the columns do not say which is the text and"),
        ("x.csv", b"text,label,text\na,x,b\n", "2 columns are named 'text'; rename all but one"),
        ("x.tsv", b"text\tlabel\tlabel\na\tx\tb\n", "2 columns are named 'label'"),
        ("x.doc", b"a", "must end in .csv, .tsv, .jsonl, .ndjson, .parquet"),
    ],
)
def test_a_wrong_file_is_one_line_that_names_its_bad_rows(tmp_path, name, data, words):
    with pytest.raises(InputError, match=words) as caught:
        read_examples(write(tmp_path / name, data))
    assert "\n" not in str(caught.value) and str(caught.value).startswith(str(tmp_path / name))


@pytest.mark.skipif(shutil.which("iconv") is None, reason="no iconv on this machine")
@pytest.mark.parametrize("encoding", ["windows-1252", "utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("name", ["a b.csv", "a b.jsonl"])
def test_the_command_that_is_advised_converts_the_file(tmp_path, name, encoding):
    text = "text,label\ncafé,x\n" if name == "a b.csv" else '{"text": "café", "label": "x"}\n'
    file = write(tmp_path / name, text.encode(encoding))
    with pytest.raises(InputError, match="convert it: iconv ") as caught:
        read_examples(file)
    subprocess.run(str(caught.value).partition("convert it: ")[2], shell=True, check=True)
    assert read_examples(tmp_path / f"utf8-{name}").first == ["café"]


def test_a_name_that_columns_share(tmp_path):
    """It is refused where it is to be read, in a csv file as in Parquet."""
    names = ["text", "note", "note", "label"]
    rows = [["a b", "p", "q", "x"], ["c d", "r", "s", "y"]]
    table = pyarrow.Table.from_arrays([pyarrow.array(c) for c in zip(*rows, strict=True)], names)
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    with open(tmp_path / "x.csv", "w", newline="") as file:
        csv.writer(file).writerows([names, *rows])
    for name in ("x.parquet", "x.csv"):
        file = tmp_path / name
        assert read_examples(file).first == list(read_documents([file])) == ["a b", "c d"]
        for wrong in (
            lambda file=file: read_examples(file, "note", None, "label"),
            lambda file=file: list(read_documents([file], text_field="note")),
        ):
            with pytest.raises(InputError, match=r"2 columns are named 'note'; rename all but one"):
                wrong()


def test_a_separator_that_the_first_line_names(tmp_path):
    """Excel writes and reads such a line."""
    for begin in ("sep=;\r\n", "SEP=;\n", '"sep=;"\n'):
        file = write(tmp_path / "x.csv", f'\ufeff{begin}label;text\nx;"a, b"\ny;c\n')
        found = read_examples(file)
        assert (found.first, found.labels, found.lines) == (["a, b", "c"], ["x", "y"], [3, 4])
        assert list(read_documents([file])) == found.first


def test_blanks_around_a_label_make_no_other_class(tmp_path):
    file = write(tmp_path / "x.csv", "text,label\n a ,1\nb, 1\nc,1 \nd,\t0\r\n")
    assert read_examples(file).labels == ["1", "1", "1", "0"]
    assert read_examples(file).first == [" a ", "b", "c", "d"]


def test_labels_that_are_no_numbers(tmp_path):
    found = read_examples(write(tmp_path / "x.csv", "text,label\na,1\nb,two\nc,inf\n"))
    with pytest.raises(
        InputError,
        match=r"x\.csv: 2 bad rows: line 3: label 'two' is not a plain decimal number such as 3 or "
        r"-0\.25; line 4: label 'inf' is not a plain",
    ):
        found.numbers()


PLAIN = {"0": 0.0, "-1": -1.0, "+2.50": 2.5, ".5": 0.5, "3.": 3.0, "1e3": 1000.0, "2E-1": 0.2}
# float() takes the first two rows of these without a word.
NOT_PLAIN = (
    *("1_0", "nan", "NaN", "-inf", "Infinity", "１０", "٣", "1e1_0"),
    *("0x10", "1,5", "1 000", "1e", "e5", ".", "--1", "½", "5%", "1.2.3"),
)


def test_labels_are_plain_decimal_numbers(tmp_path):
    rows = [("a", label) for label in PLAIN]
    file = tmp_path / "x.tsv"
    write(file, "text\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in rows))
    assert read_examples(file).numbers() == list(PLAIN.values())
    for label in NOT_PLAIN:
        write(file, f"text\tscore\na\t1\nb\t{label}\n")
        with pytest.raises(InputError) as caught:
            read_examples(file, "text", None, "score").numbers()
        assert str(caught.value).startswith(
            f"{file}: 1 bad row: line 3: score {label!r} is not a plain decimal number"
        )
    write(file, "text\tlabel\na\t1e16\n")
    with pytest.raises(InputError, match="label '1e16' is beyond 1e\\+15"):
        read_examples(file).numbers()


def test_a_missing_value_is_no_class(tmp_path):
    """Exports write NaN for a missing value, in JSON as a word that json.loads takes."""
    write(tmp_path / "x.jsonl", '{"text": "a", "label": 1}\n{"text": "b", "label": NaN}\n')
    table = pyarrow.table({"text": ["a", "b"], "label": [1.0, float("nan")]})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    for name, unit in (("x.jsonl", "line"), ("x.parquet", "row")):
        with pytest.raises(InputError, match=f"1 bad row: {unit} 2: label is empty"):
            read_examples(tmp_path / name)


@pytest.mark.parametrize(
    ("column", "value", "kind"),
    [
        ("label", [0, 3], "a list"),
        ("label", [], "a list"),
        ("label", {"name": "x"}, "an object"),
        ("text", ["a", "b"], "a list"),
    ],
)
def test_several_values_are_no_class_and_no_text(tmp_path, column, value, kind):
    """As where a text has any number of labels: each set of them would become a class."""
    rows = [{"text": "a", "label": 1}, {"text": "b", "label": 0, column: value}]
    write(tmp_path / "x.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError, match=f"x.jsonl: 1 bad row: line 2: {column} is {kind}; give "):
        read_examples(tmp_path / "x.jsonl")
    table = pyarrow.Table.from_pylist([rows[1], {**rows[1], column: None}])
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(InputError, match=f"x.parquet: 2 bad rows: row 1: {column} is {kind}; give"):
        read_examples(tmp_path / "x.parquet")


def test_columns_of_parquet_that_are_no_strings(tmp_path):
    """Decimals and dates are read as they are shown, and bytes as text where they are UTF-8."""
    columns = {
        "text": ["a"],
        "price": [Decimal("1.50")],
        "day": [date(2024, 5, 1)],
        "raw": [b"caf\xc3\xa9"],
        "image": [b"\x89PNG"],
        "hash": pyarrow.array([b"1234"], pyarrow.binary(4)),
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "x.parquet")
    assert read_examples(tmp_path / "x.parquet", "text", None, "price").numbers() == [1.5]
    assert read_examples(tmp_path / "x.parquet", "day", None, "price").first == ["2024-05-01"]
    assert read_examples(tmp_path / "x.parquet", "raw", None, "price").first == ["café"]
    with pytest.raises(InputError, match=r"row 1: byte 0 of a string is not UTF-8"):
        read_examples(tmp_path / "x.parquet", "image", None, "price")
    with pytest.raises(InputError, match="the column 'hash' holds fixed_size_binary"):
        read_examples(tmp_path / "x.parquet", "hash", None, "price")


@settings(max_examples=300)
@given(
    st.sampled_from([".csv", ".tsv", ".jsonl"]),
    st.binary(max_size=60)
    | st.text('text_blabe,"\t\r\n\x00 é{}:', max_size=60).map(
        lambda rows: b"text,label\n" + rows.encode()
    ),
)
def test_rubbish_is_read_or_refused(tmp_path_factory, suffix, data):
    file = write(tmp_path_factory.getbasetemp() / f"rubbish{suffix}", data)
    try:
        found = read_examples(file)
    except InputError as error:
        assert str(error).startswith(str(file)) and len(str(error).splitlines()) == 1
    else:
        assert len(found.first) == len(found.labels) == len(found.lines) > 0 and all(found.labels)


NAMES = ["world", "sports", "business"]
FEATURES = {
    "text": {"dtype": "string", "_type": "Value"},
    "label": {"names": NAMES, "_type": "ClassLabel"},
}


def write_table(file: Path, rows: list[dict], metadata: bytes | None) -> Path:
    table = pyarrow.Table.from_pylist(rows)
    if metadata is not None:
        table = table.replace_schema_metadata({b"huggingface": metadata})
    if file.suffix == ".parquet":
        pyarrow.parquet.write_table(table, file)
    elif file.name == "stream.arrow":
        with pyarrow.ipc.new_stream(file, table.schema) as out:
            out.write_table(table)
    else:
        with pyarrow.ipc.new_file(file, table.schema) as out:
            out.write_table(table)
    return file


def features(found: object) -> bytes:
    return json.dumps({"info": {"features": found}}).encode()


@pytest.mark.parametrize("name", ["x.parquet", "stream.arrow", "file.arrow"])
def test_classes_that_hugging_face_numbers_have_their_names(tmp_path, name):
    rows = [{"text": "a", "label": 2}, {"text": "b", "label": 0}, {"text": "c", "label": 2}]
    file = write_table(tmp_path / name, rows, features(FEATURES))
    found = read_examples(file)
    assert (found.labels, found.classes) == (["2", "0", "2"], NAMES)
    assert found.named(found).labels == ["business", "world", "business"]
    assert found.take([1]).named(found).labels == ["world"]
    assert found.numbers() == [2, 0, 2]  # of a regression
    nested = [{"row": row} for row in rows]
    file = write_table(tmp_path / name, nested, features({"row": FEATURES}))
    found = read_examples(file, "row.text", None, "row.label")
    assert found.named(found).labels == ["business", "world", "business"]


def test_numbers_that_no_class_has(tmp_path):
    rows = [{"text": "a", "label": label} for label in (0, -1, 3, None)]
    file = write_table(tmp_path / "x.parquet", rows, features(FEATURES))
    with pytest.raises(
        InputError,
        match=r"3 bad rows: row 2: label is -1, which stands for no label; the file names the "
        r"classes 0 to 2; row 3: label is 3; the file names the classes 0 to 2; row 4: label is em",
    ):
        read_examples(file)


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        b"",
        b"\xff",
        b"[" * 100_000,
        b"[]",
        b'{"info": null}',
        features([{"name": "label", "dtype": {"class_label": {"names": {"0": "a"}}}}]),
        features({"label": {"dtype": "int64", "_type": "Value"}}),
        features({"label": [FEATURES["label"]]}),
        features({"label": {"feature": FEATURES["label"], "_type": "Sequence"}}),
        features({"label": {"num_classes": 3, "_type": "ClassLabel"}}),
        *(
            features({"label": {"names": names, "_type": "ClassLabel"}})
            for names in (None, 3, "ab", {"0": "a"}, [0, 1], ["a", None], ["a", "a "], ["", "b"])
        ),
        features({"text": FEATURES["text"]}),
    ],
)
def test_other_metadata_leaves_the_numbers(tmp_path, metadata):
    rows = [{"text": "a", "label": 1}, {"text": "b", "label": -1}]
    found = read_examples(write_table(tmp_path / "x.parquet", rows, metadata))
    assert (found.labels, found.classes) == (["1", "-1"], []) and found.named(found) is found


def test_names_of_classes_beside_strings(tmp_path):
    file = write_table(tmp_path / "x.parquet", [{"text": "a", "label": "0"}], features(FEATURES))
    found = read_examples(file)
    assert found.named(found).labels == ["0"]
