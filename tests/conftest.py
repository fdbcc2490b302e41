"""Real English text that every Python installation has, and a dataset made from it."""

from __future__ import annotations

import dataclasses
import fcntl
import gc
import os

# Set before numpy and torch are imported: inputs are small, and the cores are shared.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if not torch.cuda.is_available():
    # Set before Triton is imported: kernels run on the CPU, in its interpreter.
    os.environ.setdefault("TRITON_INTERPRET", "1")

import json
import secrets
import signal
from pathlib import Path
from pydoc_data.topics import topics
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest

if TYPE_CHECKING:
    from fastbert.data.dataset import TokenDataset
    from fastbert.machine import Bf16Probe

# Otherwise the tests would create a file in the home directory.
os.environ.setdefault("FASTBERT_RENDEZVOUS_KEY", secrets.token_hex(32))

# A shell ignores Ctrl-C and Ctrl-\ for its background processes.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGQUIT) is signal.SIG_IGN:
    signal.signal(signal.SIGQUIT, signal.SIG_DFL)

# The same examples in every run, so that a run passes or fails for what was changed.
hypothesis.settings.register_profile("same-examples", derandomize=True, deadline=None)
hypothesis.settings.load_profile("same-examples")

PARAGRAPHS = 4  # a document


# Until then, collections would look at all that is imported, again and again.
gc.disable()


def pytest_collection_finish() -> None:
    """Exempt all that is imported by now from garbage collection.

    An engine collects garbage when it closes, which takes half a second with these objects.
    """
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def english_documents() -> list[str]:
    """The Python language reference, in about 700 documents of a few paragraphs, a line each."""
    documents = []
    for name in sorted(topics):
        paragraphs = [
            " ".join(paragraph.split())
            for paragraph in topics[name].split("\n\n")
            if paragraph.strip()
        ]
        documents += [
            "\n".join(paragraphs[i : i + PARAGRAPHS]) for i in range(0, len(paragraphs), PARAGRAPHS)
        ]
    return documents


@pytest.fixture(scope="session")
def english_jsonl(english_documents: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same documents as JSON lines."""
    path = tmp_path_factory.mktemp("english") / "english.jsonl"
    path.write_text(
        "".join(json.dumps({"text": document}) + "\n" for document in english_documents),
        encoding="utf-8",
    )
    return path


@pytest.fixture(scope="session")
def small_dataset(english_jsonl: Path, tmp_path_factory: pytest.TempPathFactory) -> TokenDataset:
    """A dataset of that text: a vocabulary of 1,000, and a twentieth of the documents held out."""
    from fastbert.data.dataset import open_dataset

    # Imported here, so that the tests of the kernels need only torch.
    from fastbert.data.prepare import prepare

    out = tmp_path_factory.mktemp("small") / "dataset"
    prepare([english_jsonl], out, vocab_size=1000, workers=1, heldout=0.05, progress=False)
    return open_dataset(out, verify=True)


@pytest.fixture(scope="session")
def old_dataset(
    small_dataset: TokenDataset, tmp_path_factory: pytest.TempPathFactory
) -> TokenDataset:
    """The same in format 2, which is read but no longer written."""
    from tests.old_dataset import in_format_2

    return in_format_2(small_dataset, tmp_path_factory.mktemp("old") / "dataset")


@pytest.fixture(scope="session")
def two_sources(
    english_documents: list[str], tmp_path_factory: pytest.TempPathFactory
) -> list[TokenDataset]:
    """Two datasets of one tokenizer: the first third of the text, and the rest."""
    from fastbert.data.dataset import open_dataset
    from fastbert.data.prepare import prepare

    folder = tmp_path_factory.mktemp("sources")
    cut, made = len(english_documents) // 3, []
    for name, documents in (("a", english_documents[:cut]), ("b", english_documents[cut:])):
        text = folder / f"{name}.jsonl"
        text.write_text("".join(json.dumps({"text": one}) + "\n" for one in documents))
        options: dict[str, Any] = (
            {"tokenizer": made[0].tokenizer_dir} if made else {"vocab_size": 800}
        )
        prepare([text], folder / name, workers=1, heldout=0.1, progress=False, **options)
        made.append(open_dataset(folder / name))
    return made


@pytest.fixture(scope="session")
def bf16_products(tmp_path_factory: pytest.TempPathFactory) -> Bf16Probe:
    """Skip a test that multiplies in bf16 where that kills the process; see `probe_bf16`.

    The first worker of pytest-xdist that needs the answer shares it with the others.
    """
    from fastbert.machine import Bf16Probe, probe_bf16

    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    with open(folder / "bf16.json", "a+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        known = file.read()
        probe = Bf16Probe(**json.loads(known)) if known else probe_bf16()
        if not known:
            json.dump(dataclasses.asdict(probe), file)
    if not probe.right:
        pytest.skip(probe.why)
    return probe
