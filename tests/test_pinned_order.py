"""The order of examples, their masks and their packs are those of every release so far.

A run that is resumed, or repeated elsewhere, must draw the same batches as before. The other tests
compare the code with itself or with the definition, and would not notice another order that is as
good. So the digests below may change only where every run is meant to change; then say so in
CHANGELOG.md. The text is made of numbers alone, so nothing else that changes can change them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
import pytest

from fastbert.config import BatchConfig, ObjectiveConfig, OrderConfig, RunConfig
from fastbert.data.batches import Batches, heldout_batches
from fastbert.data.blocks import BLOCK_BYTES
from fastbert.data.dataset import TokenDataset
from fastbert.data.packing import PackedBatch
from tests.block_dataset import in_blocks
from tests.tiny_dataset import tiny_dataset

VOCAB_SIZE = 500
# An epoch ends within one of steps 12, 19 and 24, whatever the objective.
STEPS = 0, 1, 12, 19, 24, 1000
FIELDS = (
    "input_ids",
    "token_type_ids",
    "position_ids",
    "cu_seqlens",
    "masked_positions",
    "labels",
    "next_sentence_labels",
    "dropout_seeds",
    "examples",
)
DIGESTS = {
    ObjectiveConfig(): "36844096d15d747ac7ca001369f1f3fc",
    ObjectiveConfig(segments="single"): "48cb8b10c5a0412b58737315c41d15f4",
    ObjectiveConfig(kind="mlm"): "8439d54a97ff17b9051efc8d41027cff",
    ObjectiveConfig(
        kind="mlm", segments="single", mask_rate=0.3
    ): "98802c809e6985cef67b18d71251f95f",
    ObjectiveConfig(kind="mlm", segments="windows"): "013093e85145c6bbb15b8df18ae28128",
    ObjectiveConfig(whole_word=True): "86073f65225c0fa468901fbffaf17ef2",
}


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> list[TokenDataset]:
    """One text in format 2, in several shards, and in format 3, in blocks of two parts."""
    folder = tmp_path_factory.mktemp("pinned")
    text = [[1 + (7 * i * i + 3 * j) % 23 for j in range(1 + 5 * i % 9)] for i in range(60)]
    words = [f"w{i}" if i % 3 else f"##w{i}" for i in range(VOCAB_SIZE - 5)]
    old = tiny_dataset(folder / "2", text, text[::4], VOCAB_SIZE, words)
    for name in ("tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json", "report.md"):
        (old.path / name).touch()
    (old.path / "report.json").write_text("{}")
    (old.path / "baselines.json").write_text('{"unigram": 5.0}')
    return [old, in_blocks(old, folder / "3", block_documents=7, parts=2)]


def digest(packs: Iterable[PackedBatch]) -> str:
    found = hashlib.sha256()
    for pack in packs:
        found.update(np.array([pack.masked_total, pack.pairs_total], "<i8").tobytes())
        for name in FIELDS:
            values = np.asarray(getattr(pack, name), "<i8")
            found.update(np.array([len(values)], "<i8").tobytes() + values.tobytes())
    return found.hexdigest()[:32]


@pytest.mark.parametrize("objective", DIGESTS, ids=str)
def test_the_batches_are_those_of_every_release(datasets: list[TokenDataset], objective):
    for dataset in datasets:
        assert drawn(dataset, objective) == DIGESTS[objective], dataset.path


def test_the_batches_of_several_windows_are_those_of_every_release(datasets: list[TokenDataset]):
    assert (
        drawn(datasets[1], ObjectiveConfig(), 3 * BLOCK_BYTES) == "01c1f4f9052e87206f5cbf70e233fc22"
    )


def drawn(dataset: TokenDataset, objective: ObjectiveConfig, window: int = 1 << 32) -> str:
    config = RunConfig(
        data="unused",
        seed=3,
        objective=objective,
        batch=BatchConfig(sequences=12, max_length=32, micro_batch_tokens=100),
        order=OrderConfig(window),
    )
    batches = Batches(dataset, config)
    packs = [pack for step in STEPS for pack in batches.step(step)]
    packs += [pack for rank in (0, 1) for pack in batches.step(2, rank, 2)]
    return digest(packs + heldout_batches(dataset, config, 20))
