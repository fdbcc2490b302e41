"""Tables as tsv: quoted by pandas' rules or not at all, read back as they were, or refused."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastbert.data.documents import read_documents
from fastbert.errors import InputError
from fastbert.tasks.labelled import Examples, read_examples

TEXTS = [
    "plain",
    'She said "no".',
    '"Yes" is an answer',
    '"All of it"',
    "a\ttab",
    "two\nlines",
    'two\nlines, and a "quote"',
    "a, comma",
    '"',
    '""',
    'ends with "',
]


def quoted(rows: list[list[str]], quoting: int = csv.QUOTE_MINIMAL, end: str = "\n") -> str:
    """Return the rows as `DataFrame.to_csv(sep="\\t", index=False)` writes them."""
    out = io.StringIO()
    csv.writer(out, delimiter="\t", lineterminator=end, quoting=quoting).writerows(rows)
    return out.getvalue()


def raw(rows: list[list[str]]) -> str:
    """Return the rows as GLUE has them: quotes are text, and nothing is escaped."""
    return "".join("\t".join(row) + "\n" for row in rows)


def read(folder: Path, text: str) -> Examples:
    file = folder / "x.tsv"
    file.write_bytes(text.encode())
    found = read_examples(file)
    # The commands agree.
    assert list(read_documents([file])) == found.first
    return found


def table(texts: list[str], label_first: bool) -> list[list[str]]:
    rows = [["text", "label"], *([text, str(i % 2)] for i, text in enumerate(texts))]
    return [row[::-1] for row in rows] if label_first else rows


@pytest.mark.parametrize("label_first", [False, True])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
def test_what_pandas_writes_is_read_back(tmp_path, quoting, label_first, end):
    found = read(tmp_path, quoted(table(TEXTS, label_first), quoting, end))
    assert found.first == TEXTS
    assert found.labels == [str(i % 2) for i in range(len(TEXTS))]
    for text in TEXTS:
        again = quoted(table([text, "b"], label_first), quoting, end)
        assert read(tmp_path, again).first == [text, "b"]


@pytest.mark.parametrize("label_first", [False, True])
def test_quotes_of_a_raw_file_are_text(tmp_path, label_first):
    texts = [text for text in TEXTS if not set("\t\n") & set(text)]
    assert read(tmp_path, raw(table(texts, label_first))).first == texts
    assert read(tmp_path, 'text\tlabel\n"a\tb"\n').labels == ['b"']
    for text in ('She said "no".', '"Yes" is an answer', 'ends with "', '"begins', "5' 10\""):
        assert read(tmp_path, raw(table([text, "b"], label_first))).first == [text, "b"]


def test_what_cannot_be_known_is_refused(tmp_path):
    """Excel quotes a field for its comma; the same file may hold a text in quotes."""
    file = tmp_path / "x.tsv"
    for rows in (['"Yes, please"\t1'], ['"a\t0', 'b"\t1'], ['""\t1']):
        file.write_text("\n".join(["text\tlabel", "plain\t0", *rows]) + "\n")
        for reader in (read_examples, lambda path: list(read_documents([path]))):
            with pytest.raises(InputError, match=re.escape(f"{file}: line 3: a field is in quot")):
                reader(file)
    # One sign anywhere in the file decides, also for the fields before it.
    file.write_text('text\tlabel\n"Yes, please"\t1\n"a ""b"""\t0\n')
    assert read_examples(file).first == ["Yes, please", 'a "b"']
    file.write_text('text\tlabel\n"Yes, please"\t1\na "b"\t0\n')
    assert read_examples(file).first == ['"Yes, please"', 'a "b"']
    # What the message advises: the same file as csv.
    file.write_text('text\tlabel\n"Yes, please"\t1\n')
    assert read_examples(file.rename(tmp_path / "x.csv")).first == ["Yes, please"]


ANY = st.text('ab" \t\n,', min_size=1, max_size=8).filter(str.strip)


@settings(max_examples=400)
@given(st.lists(ANY, min_size=1, max_size=4), st.booleans(), st.booleans())
def test_no_table_is_read_wrongly(tmp_path_factory, texts, is_quoted, label_first):
    """Whatever the texts: what was written is read back, or the file is refused."""
    if not is_quoted:
        texts = [re.sub("[\t\n]", " ", text) for text in texts]
    rows = table([f"x{text}" if text.isspace() else text for text in texts], label_first)
    folder = tmp_path_factory.getbasetemp()
    try:
        found = read(folder, quoted(rows) if is_quoted else raw(rows))
    except InputError as error:
        assert '"' in "".join(texts) or "\n" in "".join(texts), error
        return
    column = int(label_first)
    assert found.first == [row[column] for row in rows[1:]]
