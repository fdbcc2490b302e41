"""Read the records of csv, tsv, JSON lines and Parquet: the rules that every command shares.

`prepare` and `embed` read one text column, in chunks (documents.py); `finetune` reads whole rows.
"""

from __future__ import annotations

import codecs
import csv
import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from io import BufferedReader
from typing import TYPE_CHECKING, Any

from fastbert.data.quoting import has_quoted_fields
from fastbert.data.sources import Source, open_source
from fastbert.data.unpack import LONGEST_TEXT_BYTES, is_broken, is_empty, lines
from fastbert.errors import InputError

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.parquet

COLA = ("source", "label", "mark", "sentence")  # the columns of CoLA's tsv, which has no header

# Takes the names of the columns that are there and returns those to read.
Choose = Callable[[list[str]], Sequence[str]]
# The values of a record by column as strings, or what is wrong with it.
Row = dict[str, str] | str

# The value of a key that a JSON object has several times: which one is meant cannot be known.
TWICE = object()

_SPACE = re.compile(r"[ \t\r\n]*")
_SURROGATE = re.compile("[\ud800-\udfff]")


def read_rows(source: Source, choose: Choose) -> Iterator[tuple[int, Row]]:
    """Yield the records of `read_values` as strings.

    A number or a boolean is given as JSON, and null as "". A list or an object makes a record a bad
    one: no text and no label has several values.
    """
    for line, values in read_values(source, choose):
        yield line, values if isinstance(values, str) else _strings(values)


def read_values(
    source: Source, choose: Choose | None
) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Yield each record of a file with the number of its first line, or of its row in a table.

    Both count from 1. Values are those of JSON or of Parquet; a bad record is a string that says
    what is wrong with it.

    Args:
        source: a file in one of the formats TABLES.
        choose: called once with the columns of the file, or the fields of its first JSON object;
            None reads all of every record.

    Raises:
        InputError: a file that is empty or cannot be read, or what `choose` raises.
    """
    with open_source(source) as file:
        if source.format == "jsonl":
            yield from _json_rows(source, file, choose)
        elif source.format in ("parquet", "arrow"):
            yield from _column_rows(source, file, choose or list)
        else:
            yield from delimited_rows(source, file, choose or list)


def delimited_rows(
    source: Source, file: BufferedReader, choose: Choose, strict: bool = True
) -> Iterator[tuple[int, Row]]:
    """Yield the rows of a csv file or a tsv file; fields of a tsv file may be quoted or not.

    Without `strict`, bytes that are not UTF-8 make their row a bad one, and raise nothing.
    """
    csv.field_size_limit(LONGEST_TEXT_BYTES)
    is_csv = source.format == "csv"
    quoted = is_csv or has_quoted_fields(source)
    text = lines(source, file, strict)
    header = next(text, "")
    delimiter = "\t"
    if is_csv:
        # Spreadsheets write semicolons where numbers have decimal commas, and some say so first.
        named = _SEPARATOR.fullmatch(header)
        header = "\n" if named else header
        delimiter = named[1] if named else next((m for m in ",;\t|" if m in header), ",")
    text = itertools.chain([header], text)
    if quoted:
        reader = csv.reader(text, delimiter=delimiter, strict=True)
    else:
        reader = csv.reader(text, delimiter="\t", quoting=csv.QUOTE_NONE)
    columns: list[str] = []
    chosen: list[tuple[str, int]] = []
    line = 1
    while True:
        try:
            row = next(reader, None)
        except csv.Error as error:
            problem = f"not valid {source.format}: {error}"
            if _ENDLESS.search(str(error)):
                raise InputError(f"{source.path}: line {reader.line_num}: {problem}") from None
            yield reader.line_num, problem
            line = reader.line_num + 1
            continue
        if row is None:
            break
        at, line = line, reader.line_num + 1
        if not row:
            continue
        if not columns:
            # CoLA's tsv has no header, but it is recognised by its first row.
            is_cola = not quoted and len(row) == len(COLA) and row[1] in ("0", "1")
            columns = list(COLA) if is_cola else row
            chosen = [(name, columns.index(name)) for name in choose(columns)]
            _check_names(source, columns, [name for name, _ in chosen])
            if not is_cola:
                continue
        if len(row) != len(columns):
            hint = "; put texts with commas in quotes" if is_csv and len(row) > len(columns) else ""
            yield at, f"{len(row)} fields, and the header has {len(columns)}{hint}"
        elif row[0].removeprefix("\ufeff") == columns[0] and row[1:] == columns[1:]:
            yield at, "the header again, as where files were joined; remove this line"
        elif not strict and any(is_broken(row[i]) for _, i in chosen):
            yield at, "not UTF-8"
        else:
            yield at, {name: row[i] for name, i in chosen}
    if not columns:
        raise is_empty(source)


def _check_names(source: Source, there: Sequence[str], chosen: Iterable[str]) -> None:
    """Raise InputError where several columns have a name that is to be read."""
    for name in chosen:
        if there.count(name) > 1:
            raise InputError(
                f"{source.path}: {there.count(name)} columns are named {name!r}; rename all but one"
            )


def json_object(text: str) -> dict[str, Any] | str:
    """Return the JSON object in a line, or what is wrong with it.

    A byte order mark, as where files were joined, is left out. The value of a key that an object
    has several times is TWICE.
    """
    try:
        value = _JSON.decode(text.removeprefix("\ufeff"))
    except (ValueError, RecursionError) as error:
        hint = _JQ.get(text.strip(), "")
        return f"not JSON ({error}){hint}"
    if not isinstance(value, dict):
        hint = _JQ["["] if isinstance(value, list) else ""
        return f"a JSON {JSON_NAMES[type(value)]}, not an object{hint}"
    return value


def array_items(source: Source, pieces: Iterable[bytes]) -> Iterator[str]:
    """Yield the text of each item of a JSON array, of which only some is in memory.

    Args:
        source: the file, for messages.
        pieces: its bytes.

    Raises:
        InputError: it is not an array, is cut short, or has an item that is too long.
    """
    decoder, scanner = codecs.getincrementaldecoder("utf-8-sig")(), json.JSONDecoder()
    text, at, number = "", 0, 1
    opened = False

    def wrong(what: str) -> InputError:
        return InputError(
            f"{source.path}: object {number}: {what}; write an object per line (jq -c '.[]')"
        )

    for piece in itertools.chain(pieces, [b""]):
        ended = not piece
        try:
            text = text[at:] + decoder.decode(piece, final=ended)
        except UnicodeDecodeError as error:
            raise wrong(f"not UTF-8 ({error.reason})") from None
        at = 0
        while True:
            at = _SPACE.match(text, at).end()  # pyright: ignore[reportOptionalMemberAccess]
            if at == len(text):
                break
            if not opened:  # the caller has seen the bracket
                at, opened = at + 1, True
                continue
            if text[at] in ",]":
                if text[at] == "]":
                    return
                at += 1
                continue
            try:
                _, end = scanner.raw_decode(text, at)
            except (ValueError, RecursionError) as error:
                if ended or isinstance(error, RecursionError):
                    raise wrong(f"not JSON ({error})") from None
                if len(text) - at > LONGEST_TEXT_BYTES:
                    raise wrong(f"no end within {LONGEST_TEXT_BYTES >> 20} MiB ({error})") from None
                break
            # A number at the end of a piece may go on in the next one.
            if end == len(text) and not ended:
                break
            yield text[at:end]
            at, number = end, number + 1
    raise wrong("the array has no end: the file is cut short")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        value |= {name: TWICE for name, count in counts.items() if count > 1}
    return value


_JSON = json.JSONDecoder(object_pairs_hook=_object)
_SEPARATOR = re.compile(r'"?sep=(.)"?\s*', re.IGNORECASE)  # Excel's first line
# Errors of the csv module after which the next row is not the next line.
_ENDLESS = re.compile("unexpected end of data|larger than field limit")
# Lines that begin a value of several lines, and how to get one line per object.
_JQ = {
    "[": " (--format json reads an array, or jq -c '.[]' makes an object per line of it)",
    "{": " (of objects over several lines jq -c . makes one each)",
}


def as_text(value: Any) -> str:
    """Return a value of JSON or Parquet as a string.

    Null is "", and so is NaN, which exports write where a value is missing. Numbers, lists and
    objects are given as JSON; decimals and dates as Python shows them.
    """
    if isinstance(value, str):
        # JSON can write half of a surrogate pair as an escape. This is not a character, and no
        # encoder accepts it.
        return value if value.isascii() else _SURROGATE.sub("\ufffd", value)
    if value is None or value != value:
        return ""
    return json.dumps(value, default=str) if type(value) in JSON_NAMES else str(value)


JSON_NAMES = {
    dict: "object",
    list: "list",
    str: "string",
    int: "number",
    float: "number",
    bool: "boolean",
    type(None): "null",
}


def shown(names: Iterable[str]) -> str:
    """Return names of columns for a message."""
    short = [repr(name)[1:-1][:40] for name in names]
    more = f" and {len(short) - 20} more" if len(short) > 20 else ""
    return f"{', '.join(short[:20])}{more}"


def _strings(values: dict[str, Any]) -> Row:
    """Return the values of a record as strings, or which of them has several values."""
    for name, value in values.items():
        if isinstance(value, (list, dict)):
            kind = JSON_NAMES[type(value)]
            article = "an" if kind == "object" else "a"
            return f"{name} is {article} {kind}; give one value, a string or a number"
    return {name: as_text(value) for name, value in values.items()}


def _json_rows(
    source: Source, file: BufferedReader, choose: Choose | None
) -> Iterator[tuple[int, dict[str, Any] | str]]:
    chosen: Sequence[str] | None = None
    line = 0
    for line, text in enumerate(lines(source, file), 1):
        if text.isspace():
            continue
        value = json_object(text)
        if isinstance(value, str):
            yield line, value
            continue
        values = value
        if choose is not None:
            if chosen is None:
                chosen = choose(list(json_names(value)))
            values = {name: _field_or_none(value, name) for name in chosen}
        twice = next((name for name, found in values.items() if found is TWICE), None)
        if twice is None:
            yield line, values
        else:
            yield line, f"the field {twice!r} is given twice; keep one"
    if not line:
        raise is_empty(source)


def _column_rows(
    source: Source, file: BufferedReader, choose: Choose
) -> Iterator[tuple[int, dict[str, Any] | str]]:
    row = 0
    chosen: list[str] = []

    def names_of(schema: pyarrow.Schema) -> list[str]:
        chosen[:] = choose(parquet_names(schema))
        for name in chosen:
            if "binary" in str(kind := field_type(schema, name)) and not is_binary(kind):
                raise InputError(
                    f"{source.path}: the column {name!r} holds {kind}, not text; "
                    "write it as strings"
                )
        return chosen

    if source.format == "parquet":
        batches = (batch for batch, _ in parquet_batches(source, file, names_of))
    else:
        batches = arrow_batches(source, file, names_of)
    for batch in batches:
        columns = {name: column_of(batch, name) for name in chosen}
        for i in range(batch.num_rows):
            row += 1
            values = {name: column[i] for name, column in columns.items()}
            try:
                yield row, {name: value.as_py() for name, value in values.items()}
            except UnicodeDecodeError as error:
                yield row, f"byte {error.start} of a string is not UTF-8; write the table again"


def parquet_batches(
    source: Source,
    file: BufferedReader,
    choose: Callable[[pyarrow.Schema], Sequence[str]],
    batch_bytes: int = 1 << 20,
    only_groups: range | None = None,
) -> Iterator[tuple[pyarrow.RecordBatch, int]]:
    """Yield the chosen columns of a Parquet file, some rows at a time, with the rows in all.

    Strings are given as dictionaries and indices where pyarrow can. So a file whose rows repeat a
    large value takes no more memory than the value, as long as nobody expands them. `only_groups`
    are the numbers of the groups of rows to read.

    Raises:
        InputError: a file that is empty or not Parquet, or what `choose` raises.
    """
    import pyarrow
    import pyarrow.parquet

    if source.compression:
        raise InputError(
            f"{source.path}: Parquet compresses its own columns and is not read through "
            f"{source.compression}; unpack the file first"
        )
    if file.seek(0, os.SEEK_END) == 0:
        raise is_empty(source)
    try:
        table = pyarrow.parquet.ParquetFile(file)
        metadata = table.metadata
        chosen = list(choose(table.schema_arrow))
        # "doc.text" is a column of this name, or a field of the column "doc".
        there = table.schema_arrow.names
        tops = {name if name in there else name.partition(".")[0] for name in chosen}
        _check_names(source, there, sorted(tops))
        if metadata.num_rows == 0:
            raise is_empty(source)
        groups = range(metadata.num_row_groups)
        total_bytes = sum(metadata.row_group(i).total_byte_size for i in groups)
        row_bytes = total_bytes // metadata.num_rows
        rows = min(max(batch_bytes // (row_bytes + 1), 1), 1 << 16)
        # pyarrow knows lists and structures by other names; it reads them without dictionaries.
        schema = table.schema_arrow
        flat = [n for n in chosen if not pyarrow.types.is_nested(field_type(schema, n))]
        tables = pyarrow.parquet.ParquetFile(file, read_dictionary=flat), table
        for group in groups if only_groups is None else only_groups:
            for batch in _batches_of_group(*tables, group, chosen, rows):
                _check_indices(batch)
                yield batch, metadata.num_rows
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"{source.path}: not a valid Parquet file ({reason}); copy or download it again"
        ) from None


def class_names(source: Source, name: str) -> list[str]:
    """Return the names of the classes whose numbers a column of a Parquet or Arrow file holds.

    Hugging Face's datasets write them beside the schema, where the column is a ClassLabel. The list
    is empty for every other file.
    """
    import pyarrow
    import pyarrow.parquet

    if source.format not in ("parquet", "arrow"):
        return []
    with open_source(source) as file:
        if source.format == "parquet":
            schema = pyarrow.parquet.read_schema(file)
        elif file.peek(8).startswith(b"ARROW1"):
            schema = pyarrow.ipc.open_file(file).schema
        else:
            schema = pyarrow.ipc.open_stream(file).schema
    if not pyarrow.types.is_integer(field_type(schema, name)):
        return []
    try:
        found = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        for field in [name] if name in schema.names else name.split("."):
            found = found[field]
        kind, names = found["_type"], found["names"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return []
    if kind != "ClassLabel" or not isinstance(names, list):
        return []
    known = {each.strip() for each in names if isinstance(each, str)} - {""}
    return [each.strip() for each in names] if len(known) == len(names) else []


def rows_before(file: BufferedReader, group: int) -> int:
    """Return the number of rows of a Parquet file before a group of rows."""
    import pyarrow.parquet

    metadata = pyarrow.parquet.ParquetFile(file).metadata
    return sum(metadata.row_group(i).num_rows for i in range(group))


def arrow_batches(
    source: Source, file: BufferedReader, choose: Callable[[pyarrow.Schema], Sequence[str]]
) -> Iterator[pyarrow.RecordBatch]:
    """Yield the batches of an Arrow file: a stream, as of save_to_disk, or one with random access.

    Raises:
        InputError: a file that is empty or not Arrow, or what `choose` raises.
    """
    import pyarrow

    if source.compression:
        raise InputError(
            f"{source.path}: Arrow compresses its own columns and is not read through "
            f"{source.compression}; unpack the file first"
        )
    if not (head := file.peek(8)):
        raise is_empty(source)
    rows = 0
    try:
        if head.startswith(b"ARROW1"):
            table = pyarrow.ipc.open_file(file)
            schema = table.schema
            batches = (table.get_batch(i) for i in range(table.num_record_batches))
        else:
            batches = pyarrow.ipc.open_stream(file)
            schema = batches.schema
        chosen = list(choose(schema))
        tops = {n if n in schema.names else n.partition(".")[0] for n in chosen}
        _check_names(source, schema.names, sorted(tops))
        for batch in batches:
            rows += batch.num_rows
            some = batch.select(sorted(tops))
            some.validate(full=True)  # or a damaged file would make pyarrow read anywhere
            _check_indices(some)
            yield some
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"{source.path}: not a valid Arrow file ({reason}); copy or download it again"
        ) from None
    if not rows:
        raise is_empty(source)


def _batches_of_group(
    dictionaries: pyarrow.parquet.ParquetFile,
    plain: pyarrow.parquet.ParquetFile,
    group: int,
    chosen: list[str],
    rows: int,
) -> Iterator[pyarrow.RecordBatch]:
    """Yield the chosen columns of one group of rows, as dictionaries where pyarrow can.

    It cannot where a string is encoded as its difference from the one before. The metadata would
    tell the encodings, but for a damaged file pyarrow aborts the process when they are read.
    """
    import pyarrow

    options = {"row_groups": [group], "columns": chosen, "use_threads": False}
    done = 0
    try:
        for batch in dictionaries.iter_batches(rows, **options):
            done += batch.num_rows
            yield batch
        return
    except (pyarrow.ArrowNotImplementedError, OSError) as error:
        if "Not yet implemented" not in str(error):
            raise
    # Each value may repeat the beginning of the one before, so the strings of a few rows can be
    # much larger than they are in the file.
    for batch in plain.iter_batches(min(rows, 128), **options):
        again = min(done, batch.num_rows)
        done -= again
        if again < batch.num_rows:
            yield batch.slice(again)


def _check_indices(batch: pyarrow.RecordBatch) -> None:
    """Raise ArrowInvalid where a damaged file points outside a dictionary, which pyarrow allows."""
    import pyarrow
    from pyarrow.compute import call_function

    for column in batch.columns:
        if pyarrow.types.is_dictionary(column.type):
            ends = call_function("min_max", [column.indices]).as_py()
            size = len(column.dictionary)
            if ends["max"] is not None and (ends["min"] < 0 or ends["max"] >= size):
                raise pyarrow.ArrowInvalid("a value that is not in its dictionary")


def parquet_names(schema: pyarrow.Schema) -> list[str]:
    """Return the names of the columns; a field of a structure is "column.field"."""
    import pyarrow

    def names(fields: Iterable[pyarrow.Field], prefix: str) -> Iterator[str]:
        for field in fields:
            name = prefix + field.name
            yield name
            if pyarrow.types.is_struct(field.type):
                yield from names(field.type.fields, f"{name}.")

    return list(names(schema, ""))


def field_type(schema: pyarrow.Schema, name: str) -> pyarrow.DataType:
    """Return the type of a column that `parquet_names` names."""
    first, *rest = [name] if name in schema.names else name.split(".")
    kind = schema.field(schema.names.index(first)).type  # by index: a name may be there twice
    for field in rest:
        kind = kind.field(field).type
    return kind


def column_of(batch: pyarrow.RecordBatch, name: str) -> pyarrow.Array:
    """Return a column that `parquet_names` names, with bytes as strings.

    Impala, Hive and early releases of Spark do not mark text as such, so other programs see bytes.
    Whether they are UTF-8 is not checked here.
    """
    import pyarrow

    first, *rest = [name] if name in batch.schema.names else name.split(".")
    column = batch.column(first)
    for field in rest:
        # flatten, because `column.field` forgets which rows of the structure are null.
        column = column.flatten()[column.type.get_field_index(field)]
    if not is_binary(column.type):
        return column
    if not pyarrow.types.is_dictionary(column.type):
        return column.cast(pyarrow.string(), safe=False)
    values = column.dictionary.cast(pyarrow.string(), safe=False)
    return pyarrow.DictionaryArray.from_arrays(column.indices, values)


def is_binary(kind: pyarrow.DataType) -> bool:
    """Whether a column of this type holds bytes."""
    # Not is_binary_view, which older releases lack.
    return value_type(kind) in ("binary", "large_binary", "binary_view")


def value_type(kind: pyarrow.DataType) -> str:
    """Return the name of a type; of a dictionary-coded one, that of its values."""
    import pyarrow

    return str(kind.value_type if pyarrow.types.is_dictionary(kind) else kind)


def field_of(value: Any, name: str) -> Any:
    """Return a field of a JSON object; "doc.text" is also the field "text" of the object "doc".

    Raises:
        KeyError: there is none.
    """
    if isinstance(value, dict):
        if name in value:
            return value[name]
        first, dot, rest = name.partition(".")
        if dot and first in value:
            return field_of(value[first], rest)
    raise KeyError(name)


def _field_or_none(value: dict[str, Any], name: str) -> Any:
    try:
        return field_of(value, name)
    except KeyError:
        return None


def json_names(value: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield the names of the fields of an object, with those of objects in it: "doc.text"."""
    for name, inner in value.items():
        yield prefix + name
        if isinstance(inner, dict):
            yield from json_names(inner, f"{prefix}{name}.")
