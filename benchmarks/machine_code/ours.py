"""Our kernels in the terms of the model: their main loops, and their launches in training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from benchmarks.compiled.signatures import AotSignature, aot_signatures, short, source
from benchmarks.kernels.cases import TOKENS, VOCABULARY
from benchmarks.machine_code.duration import Launch
from benchmarks.machine_code.examine import Case
from benchmarks.machine_code.h100 import MULTIPROCESSORS
from benchmarks.machine_code.multiprocessor import DRAM, L2
from fastbert_kernels._tile_schedule import ITEM
from fastbert_kernels._tiles import tile

LENGTHS = (512, 4096)  # sequence lengths at which attention loops over tiles
MASKED = TOKENS // 2  # per micro-batch, as in the benchmarks
_SLAB = 4096  # words in a launch of the MLM loss' backward pass

# By table: the block that a program owns, the block that it loops over, and products per score.
WALKS = {
    "attention_forward": ("BLOCK_Q", "BLOCK_K", 2),
    "attention_dq": ("BLOCK_Q", "BLOCK_K", 3),
    "attention_dkdv": ("BLOCK_K", "BLOCK_Q", 4),
}
SHORT = ("attention_forward_short", "attention_backward_short")
ROWS = ("norm_forward", "norm_backward", "embedding_forward", "embedding_backward")
GELU = ("gelu_forward", "gelu_backward")
MLM = ("mlm_loss_forward", "mlm_loss_backward")
# Not judged: `embedding_table` and `mlm_loss_combine`. Their work depends on the data or is tiny.
# Nor attention with a window, which `launches` would take for attention to all keys.
JUDGED = (*WALKS, *SHORT, "attention_prepare", *ROWS, *GELU, *MLM)


def kernels(words: list[str] | None = None) -> dict[str, tuple[AotSignature, dict[str, Any]]]:
    """The bf16 kernels of `aot_signatures()` that the model can judge, with their tiles for sm_90.

    Args:
        words: if given, only kernels whose names contain one of these words.
    """
    found = {}
    for name, signature in aot_signatures().items():
        if (
            short(signature) == "bf16"
            and signature.table in JUDGED
            and signature.arguments.get("WINDOW") is None
            and (not words or any(word in name for word in words))
        ):
            found[name] = (
                signature,
                tile(signature.table, "sm_90", signature.dtype, signature.size),
            )
    return found


def case(name: str, signature: AotSignature, options: dict[str, Any]) -> Case:
    """The case of a kernel; its tile may differ from the table's."""
    table, elements, loop, memory = signature.table, 0.0, "products", L2
    if table in WALKS:
        elements = options["BLOCK_Q"] * options["BLOCK_K"]
    elif table in SHORT:
        elements, memory = tokens_of_tile(signature, options) ** 2, DRAM
    elif table in MLM:
        elements = options["BLOCK_M"] * options["BLOCK_V"]
    elif table == "attention_prepare":
        elements, memory = options["BLOCK_Q"] * signature.arguments["K"], DRAM
    else:
        loop, memory = "longest", DRAM
        elements = options["BLOCK_T"] * options.get("BLOCK_F", signature.size)
    return Case(name, source(signature, options), options, elements, loop, memory)


def launches(
    signature: AotSignature, options: dict[str, Any], lengths: Sequence[int] = LENGTHS
) -> list[Launch]:
    """The launches for one micro-batch of BERT-base or -large in training.

    Args:
        signature: the kernel.
        options: its tile.
        lengths: sequence lengths, for attention that loops over tiles.
    """
    table, size = signature.table, signature.size
    if table in WALKS:
        own, walk, _ = WALKS[table]
        return [
            Launch(f"n={n}", _heads(signature) * TOKENS / options[own], n / options[walk])
            for n in lengths
        ]
    if table in SHORT:
        block = tokens_of_tile(signature, options)
        return [Launch(f"n={block}", _heads(signature) * TOKENS / block, 1, DRAM)]
    if table == "attention_prepare":
        return [Launch("", _heads(signature) * TOKENS / options["BLOCK_Q"], 1, DRAM)]
    if table in ROWS:
        programs = options["programs"] * MULTIPROCESSORS
        shares = {"norm_backward": 3, "embedding_backward": 2}.get(table, 0)
        return [
            Launch(
                "",
                programs,
                TOKENS / (programs * options["BLOCK_T"]),
                DRAM,
                sums=programs * shares * size * 4,
            )
        ]
    if table in GELU:
        blocks = math.ceil(size / options["BLOCK_F"])
        shares = math.ceil(options["programs"] * MULTIPROCESSORS / blocks)
        sums = shares * size * 4 if table == "gelu_backward" else 0
        return [
            Launch("", blocks * shares, TOKENS / (shares * options["BLOCK_T"]), DRAM, sums=sums)
        ]
    # The MLM loss.
    steps = math.ceil(size / options["BLOCK_D"])
    row_tiles = math.ceil(MASKED / options["BLOCK_M"])
    word_tiles = math.ceil(VOCABULARY / options["BLOCK_V"])
    if table == "mlm_loss_backward":
        return [Launch("", row_tiles * word_tiles, steps)]
    from fastbert_kernels.mlm_loss.kernel import _run

    run = _run(row_tiles, word_tiles, MULTIPROCESSORS)
    return [Launch("", row_tiles * math.ceil(word_tiles / run), run * steps, inner=steps)]


def _heads(signature: AotSignature) -> float:
    """Number of heads of BERT-base; for another head size, that with the same hidden size."""
    return 768 / signature.arguments["K"]


def tokens_of_tile(signature: AotSignature, options: dict[str, Any]) -> int:
    """Tokens of a tile that contains a whole sequence."""
    return options.get("BLOCK") or signature.arguments.get("BLOCK") or ITEM
