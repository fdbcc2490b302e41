"""Imports of the project go in one direction, and each heavy library has one file that loads it."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = [*sorted((ROOT / "fastbert").rglob("*.py")), *sorted((ROOT / "kernels").rglob("*.py"))]

# A module or a package (all modules below that name), and what of this project it may import. A
# module may always import itself. The longest name that matches a module counts. The same table
# applies to imports inside functions.
MAY_IMPORT = {
    "fastbert_kernels": set(),
    # A product of its own, which knows none of our kernels.
    "fastbert_kernels.checker": set(),
    "fastbert.errors": set(),
    "fastbert.heap": set(),
    "fastbert.child": set(),
    "fastbert.contention": set(),
    "fastbert.strict_json": set(),
    "fastbert.out_of_memory": set(),
    "fastbert.torch_defaults": set(),
    "fastbert.durable": set(),
    "fastbert.terminal": set(),
    "fastbert.progress": {"fastbert.terminal"},
    "fastbert.printing": {"fastbert.strict_json", "fastbert.terminal"},
    "fastbert.command_line": {
        "fastbert.errors",
        "fastbert.heap",
        "fastbert.out_of_memory",
        "fastbert.terminal",
    },
    "fastbert.presence": {"fastbert.errors"},
    "fastbert.regular_file": set(),
    "fastbert.nesting": set(),
    "fastbert.storage": {"fastbert.errors", "fastbert.presence", "fastbert.regular_file"},
    "fastbert.cache": {"fastbert.errors"},
    "fastbert.config": set(),
    "fastbert.recipe": {
        "fastbert.config",
        "fastbert.errors",
        "fastbert.nesting",
        "fastbert.recipe_checks",
        "fastbert.regular_file",
        "fastbert.storage",
    },
    "fastbert.recipe_checks": {"fastbert.config", "fastbert.errors"},
    "fastbert.machine": {"fastbert.child", "fastbert.errors", "fastbert_kernels"},
    "fastbert.doctor": {"fastbert.contention", "fastbert.machine"},
    # The processes of a run, independent of what they compute.
    "fastbert.cluster": {"fastbert.errors"},
    # Data modules know neither the model nor the run. Modules that read a dataset during training
    # know nothing of how it is made.
    "fastbert.data": {
        "fastbert.cache",
        "fastbert.storage",
        "fastbert.child",
        "fastbert.config",
        "fastbert.durable",
        "fastbert.errors",
        "fastbert.machine",
        "fastbert.presence",
        "fastbert.progress",
        "fastbert.regular_file",
        "fastbert.terminal",
    },
    # The format of a model on disk.
    "fastbert.checkpoints": {
        "fastbert.cache",
        "fastbert.storage",
        "fastbert.cluster",
        "fastbert.config",
        "fastbert.recipe",
        "fastbert.data",
        "fastbert.durable",
        "fastbert.errors",
        "fastbert.presence",
        "fastbert.regular_file",
    },
    "fastbert.models": {"fastbert.config", "fastbert.data", "fastbert.errors", "fastbert_kernels"},
    "fastbert.training": {
        "fastbert.cache",
        "fastbert.storage",
        "fastbert.checkpoints",
        "fastbert.child",
        "fastbert.cluster",
        "fastbert.config",
        "fastbert.contention",
        "fastbert.recipe",
        "fastbert.data",
        "fastbert.durable",
        "fastbert.errors",
        "fastbert.heap",
        "fastbert.machine",
        "fastbert.models",
        "fastbert.nesting",
        "fastbert.out_of_memory",
        "fastbert.planning.flops",
        "fastbert.presence",
        "fastbert.regular_file",
        "fastbert.terminal",
        "fastbert.strict_json",
        "fastbert_kernels",
    },
    "fastbert.planning": {
        "fastbert.storage",
        "fastbert.config",
        "fastbert.recipe",
        "fastbert.data",
        "fastbert.errors",
        "fastbert.durable",
        "fastbert.machine",
        "fastbert.presence",
        "fastbert.training.ds_config",
        "fastbert_kernels",
    },
    "fastbert.planning.flops": {"fastbert.config"},
    # `fastbert init` times real steps of candidate models.
    "fastbert.planning.advise": {
        "fastbert.config",
        "fastbert.recipe",
        "fastbert.errors",
        "fastbert.planning.flops",
        "fastbert.planning.parameters",
    },
    "fastbert.planning.step_speed": {
        "fastbert.config",
        "fastbert.contention",
        "fastbert.data",
        "fastbert.models",
        "fastbert.machine",
        "fastbert.planning.advise",
        "fastbert.training.optimizer",
        "fastbert.training.parallel_model",
    },
    "fastbert.tasks": {
        "fastbert.cache",
        "fastbert.storage",
        "fastbert.checkpoints",
        "fastbert.cluster.group",
        "fastbert.config",
        "fastbert.contention",
        "fastbert.recipe",
        "fastbert.data",
        "fastbert.durable",
        "fastbert.errors",
        "fastbert.machine",
        "fastbert.models",
        "fastbert.presence",
        "fastbert.progress",
        "fastbert.regular_file",
        "fastbert.training.heldout",
        "fastbert.training.history",
        "fastbert.training.initial",
        "fastbert.training.metrics",
        "fastbert.training.picture",
        "fastbert.training.verified_dataset",
        "fastbert.torch_defaults",
    },
    "fastbert.cli": {"fastbert"},
    "fastbert.__main__": {"fastbert.cli"},
    "fastbert.api": {"fastbert"},
    # fastbert/__init__.py itself: the Python interface, at its first use.
    "fastbert": {"fastbert.api", "fastbert.errors"},
}

# A library and the only modules that may import it. A name that ends in a dot stands for a package,
# and `*` for one part of a name.
ONLY_IN = {
    "triton": [
        "fastbert_kernels._triton",
        "fastbert_kernels._rows",
        "fastbert_kernels.*.kernel",
        "fastbert_kernels.checker.arithmetic",
        "fastbert_kernels.checker.builder",
        "fastbert_kernels.checker.compiled",
        "fastbert_kernels.checker.libdevice",
        "fastbert_kernels.checker.machine_code",
        "fastbert_kernels.checker.overflow",
        "fastbert_kernels.checker.sanitizer",
        "fastbert_kernels.checker.template",
    ],
    "deepspeed": ["fastbert.training.engine"],
    "transformers": ["fastbert.tasks.export"],
    "sentence_transformers": [],
}

BLOCKED = ["triton", "deepspeed", "transformers"]
NEED_TRITON = ["fastbert_kernels._launch"]  # it launches for kernel.py files, which alone import it
NEED_THE_ENGINE = [
    "fastbert.training.ending",
    "fastbert.training.run",
    "fastbert.training.engine",
    "fastbert.training.run_folder",
    "fastbert.training.setup",
    "fastbert.training.monitor",
    "fastbert.training.loop",
]
HEAVY = [
    "torch",
    "numpy",
    "deepspeed",
    "transformers",
    "triton",
    "tokenizers",
    "pyarrow",
    "matplotlib",
    "tensorboard",
    "wandb",
    "mlflow",
    "trackio",
]


def module_name(path: Path) -> str:
    """Return the dotted name under which a source file is imported."""
    root = ROOT / "kernels" if path.is_relative_to(ROOT / "kernels") else ROOT
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in SOURCES}


@functools.cache
def imports(path: Path) -> tuple[tuple[int, str], ...]:
    """The line and the full name of everything a file imports, also inside functions.

    `from a import b` gives a.b where that is a module.
    """
    return tuple(_imports(path))


def _imports(path: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module_name(path).split(".")
                package = package if path.name == "__init__.py" else package[:-1]
                base = ".".join(
                    [*package[: len(package) - node.level + 1], *([base] if base else [])]
                )
            for alias in node.names:
                yield (
                    node.lineno,
                    f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base,
                )


def below(name: str, room: str) -> bool:
    return name == room or name.startswith(room + ".")


def matches(name: str, pattern: str) -> bool:
    parts, wanted = name.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(
        w in ("*", p) for p, w in zip(parts, wanted, strict=True)
    )


def test_every_module_has_a_place_in_the_table():
    rooms = set(MAY_IMPORT) - {"fastbert"}
    homeless = [
        name
        for name in MODULES
        if name != "fastbert" and not any(below(name, room) for room in rooms)
    ]
    assert not homeless, (
        f"say in MAY_IMPORT of tests/test_imports.py what these may import: {homeless}"
    )
    gone = [room for room in MAY_IMPORT if room not in MODULES]
    assert not gone, f"MAY_IMPORT of tests/test_imports.py names modules that are not there: {gone}"


def test_imports_point_one_way():
    wrong = []
    for name, path in MODULES.items():
        room = max((room for room in MAY_IMPORT if below(name, room)), key=len)
        for line, target in imports(path):
            ours = target.partition(".")[0] in ("fastbert", "fastbert_kernels")
            allowed = [room, *MAY_IMPORT[room]] if room != "fastbert" else MAY_IMPORT[room]
            if ours and not any(below(target, place) for place in allowed):
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {target}")
    assert not wrong, "against the direction of imports (ARCHITECTURE.md):\n" + "\n".join(wrong)


def test_the_harness_of_the_benchmarks_knows_no_benchmark():
    """It is what all of them share, so it must not depend on one."""
    files = sorted((ROOT / "benchmarks/harness").glob("*.py"))
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {target}"
        for path in files
        for line, target in imports(path)
        if below(target, "benchmarks") and not below(target, "benchmarks.harness")
    ]
    assert files and not wrong, "\n".join(wrong)


def test_a_name_is_imported_from_the_module_that_defines_it():
    """One import path for each name of the data, so that a search for it finds every use."""
    passed_on = {
        module: {
            alias.asname or alias.name
            for node in ast.parse(path.read_text(encoding="utf-8")).body
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }
        for module, path in MODULES.items()
        if below(module, "fastbert.data")
    }
    line = re.compile(r"from (fastbert\.data\.\w+) import (\([^)]*\)|.*)")
    sources = [*SOURCES, *sorted((ROOT / "tests").glob("*.py"))]
    sources += sorted((ROOT / "benchmarks").rglob("*.py"))
    wrong = [
        f"{path.relative_to(ROOT)} imports {name} from {module}"
        for path in sources
        for module, names in line.findall(path.read_text(encoding="utf-8"))
        for name in sorted(passed_on.get(module, set()) & set(re.findall(r"\w+", names)))
    ]
    assert not wrong, "\n".join(wrong)


def test_no_operation_imports_another():
    """Code that two operations share is in modules beside their folders."""
    folders = {
        name for name in MODULES if matches(name, "fastbert_kernels.*") and name + ".op" in MODULES
    }
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {target}"
        for name, path in MODULES.items()
        for own in folders
        if below(name, own)
        for line, target in imports(path)
        if any(below(target, other) for other in folders - {own})
    ]
    assert len(folders) == 8 and not wrong, "\n".join(wrong)


def test_what_reads_a_dataset_does_not_know_how_it_is_made():
    makers = {
        f"fastbert.data.{name}"
        for name in (
            "prepare",
            "sources",
            "unpack",
            "quoting",
            "rows",
            "documents",
            "sentences",
            "vocabulary",
            "encoder",
            "text_encoder",
            "byte_level",
            "encode",
            "segments",
            "corpus_plan",
            "results",
            "job",
            "vocabulary_task",
            "decontaminate",
            "pieces",
            "settle",
            "assemble",
            "block_writer",
            "seal",
            "engine_ray",
            "workers",
            "report",
            "baselines",
            "copies",
            "damage",
        )
    }
    readers = [name for name in MODULES if below(name, "fastbert.data") and name not in makers]
    wrong = [
        f"{MODULES[name].relative_to(ROOT)}:{line} imports {t}"
        for name in readers
        for line, t in imports(MODULES[name])
        if t in makers
    ]
    assert makers < set(MODULES) and not wrong, "\n".join(wrong)


@pytest.mark.parametrize("library", ONLY_IN)
def test_heavy_library_only_where_it_belongs(library):
    wrong = [
        f"{path.relative_to(ROOT)}:{line}"
        for name, path in MODULES.items()
        for line, target in imports(path)
        if below(target, library)
        and not any(matches(name, pattern) for pattern in ONLY_IN[library])
    ]
    assert not wrong, (
        f"{library} may be imported only in {ONLY_IN[library]}, but is in:\n" + "\n".join(wrong)
    )


def fresh(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a Python that has loaded nothing yet."""
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
    )


def test_modules_do_without_triton_deepspeed_and_transformers():
    exempt = [
        "fastbert.__main__",
        *NEED_TRITON,
        *NEED_THE_ENGINE,
        *(pattern for library in BLOCKED for pattern in ONLY_IN[library]),
    ]
    names = [name for name in MODULES if not any(matches(name, pattern) for pattern in exempt)]
    # None in sys.modules makes `import triton` raise ModuleNotFoundError, and makes
    # importlib.util.find_spec report that it is absent.
    code = f"""
import importlib, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "kernels")!r}]
sys.modules.update(dict.fromkeys({BLOCKED}))
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except ImportError as error:
        print(f"{{name}}: {{error}}")
"""
    result = fresh(code, *names)
    assert (result.returncode, result.stdout) == (0, ""), result.stdout + result.stderr


@pytest.mark.parametrize(
    "action",
    [
        "import fastbert, fastbert.config, fastbert.cli",
        "sys.argv = ['fastbert', '--help']; runpy.run_module('fastbert', run_name='__main__')",
    ],
)
def test_help_and_plain_import_load_nothing_heavy(action):
    code = f"""
import runpy, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "kernels")!r}]
try:
    {action}
except SystemExit as end:
    assert not end.code, end.code
print("loaded:", *sorted(set({HEAVY}) & set(sys.modules)))
"""
    result = fresh(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "loaded:", result.stdout
