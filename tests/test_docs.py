"""Every code block of the README and of the site's pages is run, or checked with a stated reason.

The blocks of a page run in order in one folder. It holds what readers have beforehand: `text.txt`,
`bert-base-uncased/` (a BERT folder, tiny here) and `tiny.toml`. A block with a title, such as
```toml title="my.toml"```, is written to that file. fastbert commands run in this process, and
others in a shell. A comment before a block, which may be at the end of the previous line, says what
is different here:

    <!-- test: 10_000 -> 4; new folder -->       shortens the block by replacing text; new folder
    <!-- test: not run, it needs two GPUs -->    only checks that commands, options, recipe keys
                                                 and files of the block exist
    <!-- test of the page: not run, REASON -->   the same for all blocks of a page
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import pkgutil
import re
import shlex
import subprocess
import sys
import typing
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer.main
from tiny_bert import make_hugging_face_folder

from fastbert import cli
from fastbert.config import RunConfig, SourceConfig, settings_of
from fastbert.recipe import load_config, parse_config
from tests.tiers import slow

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")),
    ROOT / "kernels/README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
PAGE_NAMES = [path.relative_to(ROOT).as_posix() for path in PAGES]
BLOCK = re.compile(
    r"(?:<!-- test: (?P<test>(?:(?!-->).)*) -->\n{1,2})?"
    r"^(?P<fence>```+)(?P<language>[\w-]*)(?P<rest>[^\n`]*)\n(?P<text>.*?)^(?P=fence)$",
    re.MULTILINE | re.DOTALL,
)
OF_THE_PAGE = re.compile(r"<!-- test of the page: (.*?) -->")
NOT_RUN = re.compile(r"not run, (.+)", re.DOTALL)
SHELL, SHOWN = ("sh", "bash"), ("", "text", "json")
COMMAND = re.compile(r"^(\$ |fastbert |make |python|torchrun |pip |PYTHONPATH)")

TINY = """
data = "data/my"
run = "runs/my"
[model]
num_hidden_layers = 1
hidden_size = 32
num_attention_heads = 2
intermediate_size = 48
max_position_embeddings = 64
[batch]
sequences = 8
max_length = 64
[evaluate]
sequences = 16
"""


@dataclass(frozen=True)
class Block:
    """A block of a page.

    Attributes:
        where: page and line, for messages.
        text: with the replacements of its comment.
        title: the file to write, or "".
        fresh: run in a new folder.
        reason: why it is not run; else None.
    """

    where: str
    language: str
    text: str
    title: str
    fresh: bool
    reason: str | None


def blocks(name: str) -> list[Block]:
    page = (ROOT / name).read_text(encoding="utf-8")
    whole = OF_THE_PAGE.search(page)
    found = []
    for match in BLOCK.finditer(page):
        where = f"{name}:{page.count(chr(10), 0, match.start('fence')) + 1}"
        text, fresh, reason = match["text"], False, None
        directive = match["test"] or (whole[1] if whole else "")
        if not_run := NOT_RUN.fullmatch(directive):
            reason = not_run[1]
        else:
            for item in filter(None, re.split(r";\s+", directive)):
                if item == "new folder":
                    fresh = True
                    continue
                old, arrow, new = item.partition(" -> ")
                assert arrow and old in text, f"{where}: test: {item}: nothing to replace"
                text = text.replace(old, new)
        title = re.search(r'title="([^"]+)"', match["rest"])
        found.append(
            Block(where, match["language"], text, title[1] if title else "", fresh, reason)
        )
    return found


ALL_BLOCKS = [block for name in PAGE_NAMES for block in blocks(name)]


def test_no_block_is_unaccounted_for():
    """Every fence belongs to a block, and every block is run, written, checked or shown."""
    for name in PAGE_NAMES:
        page = (ROOT / name).read_text(encoding="utf-8")
        assert len(re.findall(r"^\s*```", page, re.MULTILINE)) == 2 * len(blocks(name)), name
        assert len(re.findall(r"(?<!`)<!-- test: ", page)) == len(
            [match for match in BLOCK.finditer(page) if match["test"]]
        ), f"{name}: a comment to the tests is not right before a block"
    for block in ALL_BLOCKS:
        assert block.language in (*SHELL, *SHOWN, "python", "toml"), block.where
        if block.language in SHOWN:
            hidden = [line for line in block.text.splitlines() if COMMAND.match(line)]
            assert not hidden, f"{block.where}: commands in a block without a language: {hidden}"


@pytest.mark.parametrize("name", [n for n in PAGE_NAMES if any(b.reason for b in blocks(n))])
def test_what_is_not_run_names_only_what_exists(name):
    for block in blocks(name):
        if block.reason is not None:
            assert len(block.reason.split()) > 2, f"{block.where}: give a reason"
            tests = re.findall(r"tests/\w+\.py", block.reason)
            assert all((ROOT / test).is_file() for test in tests), block.where
            assert block.language in SHELL, f"{block.where}: only commands can be left out"
            for line in commands(block.text):
                check_command(line, block.where)


# Pages with runs of their own. README.md goes the way from a text to a model, too. Other tests do
# what these pages show: test_initial.py, test_modernbert_tasks.py and test_checker.py.
LONG_PAGES = (
    "docs/index.md",
    "docs/reference/run-folder.md",
    "docs/how-to/continue-from-hugging-face.md",
    "docs/how-to/cooldown.md",
    "docs/how-to/modernbert.md",
    "docs/checker.md",
    "docs/how-to/mixtures-and-phases.md",
    "docs/tutorial/your-own-text.md",
)
RUN_PAGES = [
    name
    for name in PAGE_NAMES
    if any(block.reason is None and block.language not in SHOWN for block in blocks(name))
]


@pytest.mark.parametrize("name", [slow(n) if n in LONG_PAGES else n for n in RUN_PAGES])
def test_blocks_run(name, folder, monkeypatch, tmp_path):
    namespace = {"__name__": "__main__"}
    monkeypatch.chdir(folder())
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    monkeypatch.setenv(
        "PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "kernels")]))
    modules = set(sys.modules)
    for block in blocks(name):
        if block.reason is not None or block.language in SHOWN:
            continue
        if block.fresh:
            monkeypatch.chdir(folder())
            namespace = {"__name__": "__main__"}
        if block.language == "toml":
            parse_config(block.text, block.where)
        if block.title:
            Path(block.title).parent.mkdir(parents=True, exist_ok=True)
            Path(block.title).write_text(block.text, encoding="utf-8")
        elif block.language == "python":
            # A file, since Triton reads the source of its kernels.
            file = tmp_path / re.sub(r"\W", "_", block.where)
            file.write_text(block.text, encoding="utf-8")
            exec(compile(block.text, file, "exec"), namespace)
        elif block.language in SHELL:
            for line in commands(block.text):
                run_command(line, block.where)
    written = {Path(b.title).parts[0].removesuffix(".py") for b in blocks(name) if b.title}
    for module in set(sys.modules) - modules:
        if module.partition(".")[0] in written:
            del sys.modules[module]


@pytest.fixture
def folder(tmp_path, english_documents, small_dataset):
    """Make a folder with what a reader has beforehand."""
    numbers = iter(range(99))

    def make() -> Path:
        place = tmp_path / f"folder-{next(numbers)}"
        place.mkdir()
        (place / "text.txt").write_text("\n\n".join(english_documents), encoding="utf-8")
        (place / "tiny.toml").write_text(TINY, encoding="utf-8")
        make_hugging_face_folder(place / "bert-base-uncased", small_dataset.tokenizer_dir)
        return place

    return make


def commands(text: str) -> list[str]:
    """Return the commands of a block, one per line, without comments."""
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [line for line in lines if line.strip() and not line.lstrip().startswith("#")]


def run_command(line: str, where: str) -> None:
    """Run a line: in this process if it is one command of fastbert, else by a shell."""
    words = shlex.split(line, comments=True)
    plain = not {"|", "&&", "||", ">", ";"} & set(words)
    if words[0] == "fastbert" and plain:
        check_command(line, where)
        assert cli.run(words[1:]) == 0, f"{where}: {line}"
        return
    done = subprocess.run(
        ["bash", "-ec", line], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, f"{where}: {line}\n{done.stdout}{done.stderr}"


def check_command(line: str, where: str) -> None:
    """Assert that the command exists, with its options, recipe keys, modules and make targets."""
    words = shlex.split(line, comments=True)
    for i, word in enumerate(words):
        following = words[i + 1 :]
        if word == "fastbert" and following and words[:i][-1:] != ["--rdzv-backend"]:
            check_fastbert(following, f"{where}: {line}")
        if word == "-m" and following and following[0].partition(".")[0] in ("tests", "benchmarks"):
            found = importlib.util.find_spec(following[0])
            assert found is not None and found.origin, f"{where}: no module {following[0]}"
            check_options(Path(found.origin), following[1:], where)
        if word == "make" and i == 0:
            check_targets(following, where)
        if word == "install" and Path(words[i - 1]).name == "pip":
            for requirement in following:
                if not requirement.startswith("-"):
                    check_package(requirement, where)


def check_fastbert(words: list[str], where: str) -> None:
    group = typer.main.get_command(cli.app)
    command = group.commands.get(words[0])  # type: ignore[attr-defined]
    if words[0] == "generic":  # the name of a Secret, in a command of kubectl
        return
    if command is None:
        assert words[0].startswith("--"), f"{where}: no command {words[0]}"
        return
    known = {
        option
        for parameter in command.params
        for option in parameter.opts + parameter.secondary_opts
    }
    options = {word.partition("=")[0] for word in words[1:] if word.startswith("-")}
    assert options <= known | {"--help", "-h"}, f"{where}: no option {options - known}"
    if words[0] in ("pretrain", "plan"):
        overrides = [word for word in words[2:] if re.match(r"[\w.]+=", word)]
        load_config(words[1], overrides)


def check_options(file: Path, words: list[str], where: str) -> None:
    files = [file] if file.name != "__init__.py" else list(file.parent.glob("*.py"))
    text = "".join(path.read_text(encoding="utf-8") for path in files)
    for word in words:
        if word.startswith("--"):
            quoted = f'"{word}"' in text or f'"{word[2:]}"' in text
            assert quoted, f"{where}: {file} has no option {word}"


def check_targets(words: list[str], where: str) -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([\w./-]+):", text, re.MULTILINE))
    for word in words:
        assert "=" in word or word in targets, f"{where}: no target {word}"


def check_package(requirement: str, where: str) -> None:
    """Assert that it is one of our two distributions, by name or by folder."""
    ours = {}
    for folder in (".", "./kernels"):
        text = (ROOT / folder / "pyproject.toml").read_text(encoding="utf-8")
        project = tomllib.loads(text)["project"]
        ours[folder] = ours[project["name"]] = project["optional-dependencies"]
    name, _, extra = requirement.rstrip("]").partition("[")
    assert name in ours, f"{where}: {requirement}"
    assert not extra or extra in ours[name], f"{where}: {requirement}"


def test_examples_in_the_help_name_only_what_exists():
    """The command reference shows these examples."""
    for command in typer.main.get_command(cli.app).commands.values():  # type: ignore[attr-defined]
        example = command.epilog.partition("Example: ")[2]
        assert example.startswith(f"fastbert {command.name}"), command.name
        check_command(example, f"fastbert {command.name} --help")


@pytest.mark.parametrize("name", PAGE_NAMES)
def test_links_and_documented_names_exist(name):
    page = re.sub(r"^```.*?^```", "", (ROOT / name).read_text(encoding="utf-8"), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page):
        if "://" not in target:
            assert ((ROOT / name).parent / target).exists(), f"{name}: no {target}"
    for documented in re.findall(r"^::: ([\w.]+)", page, re.MULTILINE):
        pkgutil.resolve_name(documented)


def keys_of(section: typing.Any) -> typing.Iterator[str]:
    """The keys of a section, also of the sections in it, such as "batch.sequences" of a phase."""
    hints = typing.get_type_hints(section)
    for item in settings_of(section):
        kinds = (hints[item.name], *typing.get_args(hints[item.name]))
        inner = [kind for kind in kinds if dataclasses.is_dataclass(kind)]
        names = [f"{item.name}.{key}" for kind in inner for key in keys_of(kind)]
        yield from names or [item.name]


def flat(table: dict[str, typing.Any]) -> set[str]:
    """The dotted keys of a table and of the tables in it."""
    return {
        f"{name}.{key}" if key else name
        for name, of in table.items()
        for key in (flat(of) if isinstance(of, dict) else [""])
    }


def test_every_recipe_key_has_a_meaning():
    """The page of recipe keys has a sentence on each key of config.py, and on no other."""
    path = ROOT / "docs/reference/keys.toml"
    meanings = tomllib.loads(path.read_text(encoding="utf-8"))
    hints = typing.get_type_hints(RunConfig)
    known: dict[str, set[str]] = {"": set(), "source": set(keys_of(SourceConfig))}
    for item in settings_of(RunConfig):
        classes = [hints[item.name], *typing.get_args(hints[item.name])]
        if sections := [cls for cls in classes if dataclasses.is_dataclass(cls)]:
            known[item.name] = {key for cls in sections for key in keys_of(cls)}
        else:
            known[""].add(item.name)
    described = {name: flat(of) for name, of in meanings.items() if isinstance(of, dict)}
    described[""] = set(meanings) - set(described)
    assert described == known
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs/hooks.py")
    assert spec is not None and spec.loader is not None
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    page = hooks.recipe_keys()
    for name in set().union(*known.values()):
        assert f"| `{name}` | " in page
    assert "| `hidden_size` | whole number, at least 16 | `768` | Width" in page
    assert "| `max_grad_norm` | number, at least 0 | `1.0` |" in page
