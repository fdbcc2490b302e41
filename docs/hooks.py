"""What the site has that is in no page: generated references, and the files that pages link to.

Links. The pages are read on the site and in the repository, so they link to files outside docs/ by
relative paths, such as `../SECURITY.md`. Every such file becomes a page under project/, Markdown as
it is and any other text as one code block. Pictures are copied. A link to a folder becomes text.

References. `<!-- generated: NAME -->` in a page is replaced by what the function of that name in
GENERATED returns. It comes from the code: recipe keys from config.py, commands from their help.
"""

from __future__ import annotations

import dataclasses
import math
import posixpath
import re
import subprocess
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from types import NoneType
from typing import Any

from fastbert import config as recipe
from fastbert.recipe import toml_value

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if typing.TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

DOCS = Path(__file__).parent
ROOT = DOCS.parent
LANGUAGES = {".py": "python", ".sh": "sh", ".toml": "toml", ".yaml": "yaml"}
LINK = re.compile(r"\[(?P<text>[^\]]*)\]\((?P<target>[^)#\s]+)(?P<anchor>#[^)\s]*)?\)")
TEST = re.compile(r"(?<!`)<!-- test.*? -->\n?", re.DOTALL)  # directives of tests/test_docs.py
WHERE = re.compile(r"<!-- generated: ([\w ]+) -->")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add every file outside docs/ that a page links to, also from pages that are added so."""
    from mkdocs.structure.files import File

    named = re.findall(r"project/([\w./-]+)", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    waiting = [(ROOT, name) for name in named]
    waiting += [(file.abs_src_path, "") for file in files.documentation_pages()]
    seen: set[Path] = set()
    while waiting:
        base, target = waiting.pop()
        path = Path(posixpath.normpath(Path(base) / target))
        if path in seen or not path.is_file() or not path.is_relative_to(ROOT):
            continue
        seen.add(path)
        place = site_place(path)
        if path.is_relative_to(DOCS):
            pass
        elif path.suffix in (".md", ".png"):
            files.append(File.generated(config, place, abs_src_path=str(path)))
        else:
            files.append(File.generated(config, place, content=as_page(path)))
        if path.suffix == ".md":
            text = path.read_text(encoding="utf-8")
            waiting += [(path.parent, link["target"]) for link in LINK.finditer(text)]
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Fill in what is generated, leave out comments to the tests, and turn links to the site's."""
    markdown = WHERE.sub(lambda found: GENERATED[found[1]](), TEST.sub("", markdown))
    source = page.file.abs_src_path
    if source is None or Path(source).suffix != ".md":  # generated, without links
        return markdown
    origin, here = Path(source).parent, posixpath.dirname(page.file.src_uri)

    def turned(link: re.Match[str]) -> str:
        path = Path(posixpath.normpath(origin / link["target"]))
        if path.is_dir():
            return link["text"]
        if not path.is_file() or not path.is_relative_to(ROOT):
            return link[0]
        target = posixpath.relpath(site_place(path), here or ".")
        return f"[{link['text']}]({target}{link['anchor'] or ''})"

    return LINK.sub(turned, markdown)


def site_place(path: Path) -> str:
    """Where a file of the repository is on the site."""
    if path.is_relative_to(DOCS):
        return path.relative_to(DOCS).as_posix()
    name = path.relative_to(ROOT).as_posix()
    return f"project/{name}" + ("" if path.suffix in (".md", ".png") else ".md")


def as_page(path: Path) -> str:
    """A text file as a page with one code block."""
    name = path.relative_to(ROOT).as_posix()
    text = path.read_text(encoding="utf-8").rstrip("\n")
    return f"# {name}\n\n````{LANGUAGES.get(path.suffix, 'text')}\n{text}\n````\n"


def recipe_keys() -> str:
    """Every key of a recipe as a table for each section, from the dataclasses of config.py."""
    meanings = tomllib.loads((DOCS / "reference/keys.toml").read_text(encoding="utf-8"))
    parts = ["## Top level\n", _table(recipe.RunConfig, meanings, SECTIONS)]
    for name in SECTIONS:
        for title, section in SECTIONS[name].items():
            description = (section.__doc__ or "").strip()
            if description.startswith(f"{section.__name__}("):  # written by dataclass itself
                description = ""
            parts += [f"## {title}\n", *([_paragraphs(description)] if description else [])]
            parts.append(_table(section, meanings[name]))
    return "\n".join(parts)


def sections() -> dict[str, dict[str, Any]]:
    """The classes of each section of a recipe by their titles; [model] has two.

    The tables of a list of sources are under the name "source".
    """
    found = {
        name: {f"[{name}]": hint}
        for name, hint in typing.get_type_hints(recipe.RunConfig).items()
        if dataclasses.is_dataclass(hint)
    }
    models = {f'[model] with type = "{kind}"': cls for kind, cls in recipe.MODELS.items()}
    lists = {
        "phase": {"[[phase]]": recipe.PhaseConfig},
        "source": {"data as a list of tables, [[data]]": recipe.SourceConfig},
    }
    return {"model": models, **found, **lists}


SECTIONS = sections()


def _paragraphs(text: str) -> str:
    return "\n".join(line.strip() for line in text.splitlines()) + "\n"


def _table(section: Any, meanings: dict[str, Any], leave_out: typing.Collection[str] = ()) -> str:
    rows = ["| key | value | default | meaning |", "|---|---|---|---|"]
    return "\n".join([*rows, *_rows(section, meanings, leave_out, "")]) + "\n"


def _rows(
    section: Any, meanings: dict[str, Any], leave_out: typing.Collection[str], prefix: str
) -> list[str]:
    hints, rows = typing.get_type_hints(section), list[str]()
    for item in recipe.settings_of(section):
        if item.name in leave_out:
            continue
        hint, key = hints[item.name], f"{prefix}{item.name}"
        inner = [kind for kind in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(kind)]
        if inner:
            rows += _rows(inner[0], meanings[item.name], (), f"{key}.")
        else:
            value = _value(item, hint)
            rows.append(f"| `{key}` | {value} | {_default(item.default)} | {meanings[item.name]} |")
    return rows


def _default(value: Any) -> str:
    if value is dataclasses.MISSING:
        return "required"
    if value is None:
        return "none"
    return f"`{toml_value(value)}`"


def _value(item: dataclasses.Field[Any], hint: Any) -> str:
    """What a key may be: its words, or its type with range and unit."""
    if options := item.metadata.get("options"):
        return ", ".join(f'`"{word}"`' for word in options)
    kinds = [kind for kind in typing.get_args(hint) or (hint,) if kind is not NoneType]
    names = {int: "whole number", float: "number", str: "text", bool: "`true` or `false`"}
    if item.name == "weights":
        return '`"size^E"` with E from 0 to 1, or a number of at least 0 for each source'
    if item.name == "data":
        return "text, or a list of tables"
    if typing.get_origin(hint) is tuple:
        return "two numbers of at least 0 and below 1"
    text = names[kinds[0]]
    if "low" in item.metadata:
        low, high = item.metadata["low"], item.metadata["high"]
        text += f", above {low:g}" if item.metadata["above"] else f", at least {low:g}"
        text += "" if high == math.inf else f", at most {_bound(high)}"
        text += f" ({item.metadata['unit']})" if item.metadata["unit"] else ""
    return text


def _bound(high: float) -> str:
    return "2^63 - 1" if high == 2**63 - 1 else f"{high:,g}"


def commands() -> str:
    """The help of every command, by typer's own generator."""
    command = [sys.executable, "-m", "typer", "fastbert.cli", "utils", "docs", "--name", "fastbert"]
    text = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    text = text.partition("\n")[
        2
    ]  # without the title, and the list of commands, which are headings
    text = re.sub(r"\*\*Commands\*\*:\n.*?(?=^## )", "", text, flags=re.M | re.S)
    text = text.replace("```console\n$ ", "```text\n")
    return re.sub(r"^(?:Example|Start): (.*)$", r"Example:\n\n```sh\n\1\n```", text, flags=re.M)


def presets() -> str:
    """The sizes that `model.preset` stands for."""
    sizes = list(recipe.PRESETS["base"])
    rows = [f"| type | preset | {' | '.join(f'`{size}`' for size in sizes)} |", "|---" * 6 + "|"]
    for kind, cls in recipe.MODELS.items():
        for name, values in cls.presets.items():
            numbers = " | ".join(f"{values[size]:,}" for size in sizes)
            rows.append(f"| `{kind}` | `{name}` | {numbers} |")
    return "\n".join(rows) + "\n"


GENERATED: dict[str, Callable[[], str]] = {
    "recipe keys": recipe_keys,
    "presets": presets,
    "commands": commands,
}
