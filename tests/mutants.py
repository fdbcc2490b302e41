"""Plant one fault at a time, and report which of them the tests notice: `make mutants`.

A fault is a small, plausible mistake in what fastbert exists for: the objective, the examples, the
masks, the packs, the references of the kernels, checkpoints and the engine. It is noticed if a test
of the default tier fails. The tests that are most likely to fail run first, and the first failure
ends them, so a fault that is noticed costs seconds.

    python -m tests.mutants [--only TEXT] [--workers N]

Each worker plants its faults in a copy of the tracked files. The exit code is 1 if fewer than GOAL
of the faults were noticed.
"""

from __future__ import annotations

import argparse
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
GOAL = 0.95
TIMEOUT_S = 600.0  # a fault that makes a test hang counts as noticed after this time


class Fault(NamedTuple):
    """`before`, which occurs once in `file`, becomes `after`."""

    file: str
    before: str
    after: str


MASKING, EXAMPLES = "fastbert/data/masking.py", "fastbert/data/examples.py"
COUNTS = "fastbert/data/example_counts.py"
PACKING, BATCHES, PERMUTATION = (
    "fastbert/data/packing.py",
    "fastbert/data/batches.py",
    "fastbert/data/permutation.py",
)
BERT, MODERNBERT, HEADS = (
    "fastbert/models/bert.py",
    "fastbert/models/modernbert.py",
    "fastbert/models/heads.py",
)
ENGINE, HELDOUT = "fastbert/training/engine.py", "fastbert/training/heldout.py"
STATE, SCHEDULE, RUN = (
    "fastbert/training/train_state.py",
    "fastbert/training/schedule.py",
    "fastbert/training/run.py",
)
CHECKPOINT, NAMES, MODERN_NAMES = (
    "fastbert/checkpoints/checkpoint.py",
    "fastbert/checkpoints/bert_names.py",
    "fastbert/checkpoints/modernbert_names.py",
)
KERNELS = "kernels/fastbert_kernels"
ATTENTION, NORM = f"{KERNELS}/attention/reference.py", f"{KERNELS}/norm/reference.py"
EMBEDDING, MLM_LOSS = f"{KERNELS}/embedding/reference.py", f"{KERNELS}/mlm_loss/reference.py"
GELU, DROPOUT = f"{KERNELS}/gelu/reference.py", f"{KERNELS}/_dropout.py"
ADD_NORM = f"{KERNELS}/add_norm/reference.py"
GEGLU, ROTARY = f"{KERNELS}/geglu/reference.py", f"{KERNELS}/rotary/reference.py"

# The tests that are most likely to notice a fault in a file.
TESTS = {
    MASKING: ["test_masking"],
    EXAMPLES: ["test_examples"],
    COUNTS: ["test_examples"],
    PACKING: ["test_batches", "test_model"],
    BATCHES: ["test_batches"],
    PERMUTATION: ["test_permutation", "test_examples"],
    BERT: ["test_model", "test_engine"],
    MODERNBERT: ["test_modernbert"],
    HEADS: ["test_model", "test_modernbert"],
    ENGINE: ["test_engine", "test_loop", "test_many_ranks"],
    HELDOUT: ["test_evaluate", "test_engine", "test_loop"],
    STATE: ["test_train_state", "test_loop"],
    SCHEDULE: ["test_schedule"],
    RUN: ["test_loop", "test_not_finite"],
    CHECKPOINT: ["test_checkpoint", "test_saver"],
    NAMES: ["test_weight_names", "test_load", "test_export"],
    MODERN_NAMES: ["test_modernbert", "test_modernbert_folder"],
    ATTENTION: ["test_kernels", "test_model"],
    NORM: ["test_kernels", "test_model"],
    EMBEDDING: ["test_kernels", "test_model"],
    MLM_LOSS: ["test_kernels", "test_model"],
    GELU: ["test_kernels", "test_model"],
    ADD_NORM: ["test_modern_kernels"],
    GEGLU: ["test_modern_kernels"],
    ROTARY: ["test_modern_kernels"],
    DROPOUT: ["test_dropout"],
}

FAULTS = [
    # Which tokens are masked, and what the model sees there
    Fault(MASKING, "objective.mask_rate * lengths + 0.5", "objective.mask_rate * lengths + 0.4"),
    Fault(MASKING, ".astype(np.int64), 1)\n", ".astype(np.int64), 0)\n"),
    Fault(MASKING, "objective.mask_token * selected + 0.5", "objective.mask_token * selected"),
    Fault(MASKING, "seen[chosen[rank < masked]]", "seen[chosen[rank <= masked]]"),
    Fault(MASKING, "(rank < masked + other)", "(rank < masked + other - 1)"),
    Fault(MASKING, "drawn + (drawn >= place)", "drawn"),
    Fault(MASKING, "np.sort(chosen)", "chosen"),
    Fault(MASKING, "2 * block_starts[example] + place", "place"),
    Fault(MASKING, "(place == 0) | begins_word", "begins_word"),
    # Which text an example is made of
    Fault(COUNTS, "(3 if pairs else 2)", "2"),
    Fault(EXAMPLES, "words[0] >> np.uint64(31)).astype", "words[0] >> np.uint64(30)).astype"),
    Fault(EXAMPLES, "shift = self._most + (", "shift = ("),
    Fault(EXAMPLES, "np.where(labels == 1, join[count:], join[:count])", "join[:count]"),
    Fault(
        EXAMPLES, "np.where(labels == 1, highest[count:]", "np.where(labels == 0, highest[count:]"
    ),
    Fault(EXAMPLES, "np.maximum(a_budget, target - b_need)", "a_budget"),
    Fault(EXAMPLES, "return join[:count] - a_length, a_length", "return join[:count], a_length"),
    Fault(EXAMPLES, "np.full_like(start, -100)", "np.zeros_like(start)"),
    Fault(EXAMPLES, "len(self), self.seed, epoch, window)", "len(self), self.seed, 0, window)"),
    # The order of examples
    Fault(PERMUTATION, "while len(outside :=", "if len(outside :="),
    Fault(PERMUTATION, "ROUNDS = 8", "ROUNDS = 2"),
    Fault(PERMUTATION, "np.arange(ROUNDS), epoch)", "np.arange(ROUNDS), 0)"),
    # Packs
    Fault(PACKING, "(starts + a_length + 1, special.sep)", "(starts + a_length, special.sep)"),
    Fault(
        PACKING,
        "position_ids > np.repeat(a_length + 1, lengths)",
        "position_ids > np.repeat(a_length, lengths)",
    ),
    Fault(PACKING, "np.arange(total) - np.repeat(starts, lengths)", "np.arange(total)"),
    Fault(BATCHES, "torch.from_numpy(slots[chosen])", "torch.from_numpy(chosen)"),
    Fault(BATCHES, "(step - stretch.first) * stretch.sequences", "(step - stretch.first)"),
    Fault(BATCHES, "bins[rank::ranks]", "bins[::ranks]"),
    Fault(BATCHES, "(spans.labels >= 0).sum()", "(spans.labels > 0).sum()"),
    Fault(BATCHES, "if max(loads)[0] <= limit:", "if True:"),
    Fault(
        BATCHES, "labels=torch.from_numpy(tokens[chosen])", "labels=torch.from_numpy(seen[chosen])"
    ),
    # The model and its losses
    Fault(HEADS, "return self.mlm + self.nsp", "return self.mlm"),
    Fault(BERT, "max(batch.masked_total, 1)", "max(len(batch.labels), 1)"),
    Fault(BERT, "torch.tanh(self.pooler(hidden))", "self.pooler(hidden)"),
    Fault(BERT, "last = index == len(self.layers) - 1", "last = index == 0"),
    Fault(MODERNBERT, "last = index == len(self.layers) - 1", "last = index == 0"),
    Fault(MODERNBERT, "SublayerNorm(config) if index else None", "SublayerNorm(config)"),
    Fault(MODERNBERT, "window=self.window,", "window=None,"),
    Fault(MODERNBERT, "if self.window is None else positions", "if self.window else positions"),
    Fault(MODERNBERT, "stream + 2, mode), total", "stream + 1, mode), total"),
    Fault(MODERNBERT, "math.sqrt(2 * config", "math.sqrt(config"),
    # The references that define the kernels
    Fault(ATTENTION, "scores.softmax(-1)", "scores.softmax(-2)"),
    Fault(ATTENTION, "distance > window", "distance >= window"),
    Fault(ATTENTION, "weights * kept * keep_scale(dropout_p)", "weights * kept"),
    Fault(NORM, ".square().mean(-1, keepdim=True) + eps)", ".square().mean(-1, keepdim=True))"),
    Fault(NORM, "z = z + residual.to(wide)", "z = z + 2 * residual.to(wide)"),
    Fault(NORM, "(z - mean) * rstd * norm_weight", "z * rstd * norm_weight"),
    Fault(EMBEDDING, "position_embeddings[position_ids]", "position_embeddings[token_type_ids]"),
    Fault(MLM_LOSS, "losses.sum() / total", "losses.mean()"),
    Fault(MLM_LOSS, "ignore_index=IGNORED", "ignore_index=0"),
    Fault(GELU, "gelu(z)", 'gelu(z, approximate="tanh")'),
    Fault(ADD_NORM, "(residual.to(wide) + z)", "(residual.to(wide) - z)"),
    Fault(GEGLU, "gelu(a) * b", "a * gelu(b)"),
    Fault(ROTARY, "b * cos + a * sin", "b * cos - a * sin"),
    Fault(
        DROPOUT,
        "dropout_seeds[sequence] + (tokens - cu_seqlens[sequence] + 1)",
        "dropout_seeds[sequence] + (tokens + 1)",
    ),
    Fault(DROPOUT, "return 65536 / (65536 - threshold(p))", "return 1 / (1 - p)"),
    Fault(DROPOUT, "((x ^ x >> 15) * 0x735A2D97) & _WORD", "(x * 0x735A2D97) & _WORD"),
    # Training
    Fault(ENGINE, "loss * (self.group.world + ", "loss * (1 + "),
    Fault(ENGINE, "(index == len(rounds) - 1)", "(True)"),
    Fault(ENGINE, "if math.isfinite(norm):", "if True:"),
    Fault(ENGINE, "token_correct / max(masked, 1)", "token_correct / max(tokens, 1)"),
    Fault(ENGINE, "self.model.eval()", "self.model.train()"),
    Fault(HELDOUT, "== mask_id", "!= mask_id"),
    Fault(STATE, "self.step - self.skipped\n", "self.step\n"),
    Fault(STATE, "self.best_loss - heldout_loss >= min_delta", "True"),
    Fault(SCHEDULE, "return share / schedule.warmup", "return share"),
    Fault(RUN, "if self._due and not self.state.skipped_in_a_row:", "if self._due:"),
    # Checkpoints
    Fault(CHECKPOINT, "held.index(min(held))", "0"),
    Fault(CHECKPOINT, "len(older) - (keep - 1)", "len(older) - keep"),
    Fault(CHECKPOINT, "for path in reversed(_folders(", "for path in (_folders("),
    Fault(CHECKPOINT, '!= entry["size"]', "== -1"),
    Fault(NAMES, "word_embeddings.weight", "token_embeddings.weight"),
    Fault(MODERN_NAMES, '("mlp_norm.weight", "D", None)', '("attn_norm.weight", "D", None)'),
]


class Outcome(NamedTuple):
    fault: Fault
    noticed: bool
    seconds: float
    by: str  # the test that failed


def main() -> int:
    parser = argparse.ArgumentParser(description="Plant faults, and see whether tests notice them.")
    parser.add_argument("--only", default="", help="faults in files whose path has this text")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    given = parser.parse_args()
    faults = [fault for fault in FAULTS if given.only in fault.file]
    with tempfile.TemporaryDirectory() as folder:
        outcomes = plant_all(faults, Path(folder), given.workers)
    missed = [outcome for outcome in outcomes if not outcome.noticed]
    share = 1 - len(missed) / len(outcomes)
    print(f"{len(outcomes) - len(missed)} of {len(outcomes)} faults were noticed ({share:.0%})")
    return share < GOAL


def plant_all(faults: Sequence[Fault], folder: Path, workers: int) -> list[Outcome]:
    """Plant each fault in a copy of the checkout, and print a line on each."""
    copies: queue.SimpleQueue[Path] = queue.SimpleQueue()
    for number in range(workers):
        copies.put(copy_of_the_checkout(folder / str(number)))

    def plant_one(fault: Fault) -> Outcome:
        copy = copies.get()
        try:
            outcome = plant(fault, copy)
        finally:
            copies.put(copy)
        verdict = f"noticed by {outcome.by}" if outcome.noticed else "NOT NOTICED"
        change = f"{fault.before.strip()!r} -> {fault.after.strip()!r}"
        print(f"{outcome.seconds:6.0f} s  {fault.file}: {change}: {verdict}", flush=True)
        return outcome

    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(plant_one, faults))


def copy_of_the_checkout(to: Path) -> Path:
    """Copy the tracked files as they are now."""
    names = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in names.stdout.splitlines():
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, to / name)
    return to


def plant(fault: Fault, copy: Path) -> Outcome:
    """Run the tests of one fault in a copy, which is restored afterwards."""
    path = copy / fault.file
    text = path.read_text(encoding="utf-8")
    assert text.count(fault.before) == 1, fault
    path.write_text(text.replace(fault.before, fault.after), encoding="utf-8")
    files = [f"tests/{name}.py" for name in TESTS[fault.file]]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not slow", "--tb=no", *files]
    paths = os.pathsep.join([str(copy), str(copy / "kernels")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    began = time.monotonic()
    try:
        ended = subprocess.run(
            [*command, "-p", "no:cacheprovider"],
            cwd=copy,
            env=environment,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )
        failed = [
            line for line in ended.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))
        ]
        noticed, by = ended.returncode == 1 or bool(failed), failed[0].split()[1] if failed else ""
    except subprocess.TimeoutExpired:
        noticed, by = True, "the time limit"
    finally:
        path.write_text(text, encoding="utf-8")
    return Outcome(fault, noticed, time.monotonic() - began, by)


if __name__ == "__main__":
    sys.exit(main())
