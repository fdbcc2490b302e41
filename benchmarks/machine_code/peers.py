"""Kernels of common packages, compiled for the same device with the same Triton.

The packages are fla, Liger and Cut Cross-Entropy; missing ones are left out. Kernels that do not
tune use the tiles that their authors chose for an H100. Kernels that no package for today's Triton
contains (the attention of Triton's tutorial and that of Dao-AILab) are in `recorded.json`.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from triton.compiler import ASTSource

from benchmarks.machine_code.examine import Case
from benchmarks.machine_code.multiprocessor import DRAM

_TYPE = re.compile(r"\*\w+|[iu]\d+|fp\d+|bf16")


class Peer(NamedTuple):
    name: str
    package: str
    module: str
    function: str
    arguments: dict[str, Any]  # name to Triton type, or to the value of a compile-time argument
    options: dict[str, Any]
    elements: float  # as in Case
    aligned: tuple[str, ...] = ()  # integers that are multiples of 16; pointers always are
    rows: bool = False  # whether it works on rows from memory, not on matrix products


def cases(report: Callable[[str], None] = print) -> Iterator[tuple[Case, str]]:
    """The installed kernels, each with its package's name and version; others go to `report`."""
    for peer in _PEERS:
        try:
            function = getattr(importlib.import_module(peer.module), peer.function)
            case = Case(peer.name, _source(function, peer), peer.options, peer.elements)
            version = f"{peer.package} {importlib.metadata.version(peer.package)}"
        # Not installed, or another version with another kernel.
        except (ImportError, AttributeError, KeyError) as failure:
            report(
                f"{peer.name}: left out ({type(failure).__name__}: {failure}); "
                f"run `pip install {peer.package}`"
            )
            continue
        yield (case._replace(loop="longest", memory=DRAM) if peer.rows else case), version


def _source(function: Any, peer: Peer) -> ASTSource:
    while not hasattr(function, "params"):  # autotune and heuristics wrap it
        function = function.fn
    signature, constants, divisible = {}, {}, {}
    for index, parameter in enumerate(function.params):
        value = peer.arguments[parameter.name]
        if isinstance(value, str) and _TYPE.fullmatch(value):
            signature[parameter.name] = value
            if value.startswith("*") or parameter.name in peer.aligned:
                divisible[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
    return ASTSource(function, signature, constants, divisible)


def _named(kind: Any, *names: str) -> dict[str, Any]:
    return dict.fromkeys(names, kind)


# fla: varlen attention, causal, without dropout; K = 64, the tile that it takes on Hopper.
_FLA_SIZES = {
    "B": 1,
    "H": 12,
    "HQ": 12,
    "G": 1,
    "K": 64,
    "V": 64,
    "BK": 64,
    "BV": 64,
    "BT": 128,
    "BS": 64,
    "T": "i32",
    "scale": "fp32",
}
_FLA = {
    **_FLA_SIZES,
    **_named("*bf16", "q", "k", "v"),
    **_named("*i32", "cu_seqlens", "chunk_indices"),
    **_named(None, "g_cumsum", "W", "dg_cumsum", "sink_bias"),
    **_named(False, "USE_G", "USE_WINDOW", "USE_SINK_BIAS"),
    **_named("*fp32", "lse", "delta"),
    **_named("*bf16", "o", "do", "dq", "dk", "dv"),
    "IS_VARLEN": True,
}
# Liger: one row per program forward, a share of the rows backward; D = 768. It has GEGLU with tanh
# instead of GELU.
_LIGER_STRIDES = (
    "Y_row_stride",
    "X_row_stride",
    "stride_x",
    "stride_dx",
    "stride_dw",
    "stride_db",
    "stride_dy",
    "n_cols",
)
_LIGER = {
    **_named("i32", *_LIGER_STRIDES, "n_rows"),
    **_named(
        1,
        "W_row_stride",
        "B_row_stride",
        "Mean_row_stride",
        "RSTD_row_stride",
        "stride_mean",
        "stride_rstd",
    ),
    **_named("*bf16", "Y_ptr", "X_ptr", "W_ptr", "B_ptr", "DX_ptr", "DY_ptr"),
    **_named("*fp32", "Mean_ptr", "RSTD_ptr", "DW_ptr", "DB_ptr"),
    **_named(True, "COMPUTE_DW", "COMPUTE_DB"),
    "eps": "fp32",
    "BLOCK_SIZE": 1024,
    "rows_per_program": 125,
}
_GEGLU = {
    **_named("*bf16", "a", "b", "c", "dc"),
    "stride": "i32",
    "n_cols": 3072,
    "BLOCK_SIZE": 4096,
}
# Cut Cross-Entropy: D = 768. Of the backward pass, this is the loop that recomputes the logits; its
# other two loops add to memory under locks.
_CCE_FORWARD = {
    **_named("*bf16", "E", "C"),
    **_named(None, "LA", "Valids", "softcap", "VocabOrdering"),
    **_named("i32", "B", "V", "D", "stride_eb", "stride_cv", "num_locks", "B_BIN"),
    **_named(1, "stride_ed", "stride_cd", "stride_lse_b", "stride_vb"),
    **_named(False, "HAS_VALIDS", "HAS_SOFTCAP", "HAS_LA"),
    "LSE": "*fp32",
    "Locks": "*u32",
    "GROUP_B": 8,
    "EVEN_D": True,
    "DOT_PRECISION": "ieee",
    "BLOCK_D": 32,
}
_CCE_BACKWARD = {
    **_CCE_FORWARD,
    **_named("*bf16", "dE", "dC"),
    **_named("*i32", "dELocks", "dCLocks"),
    **_named("i32", "n_de_locks_0", "n_de_locks_1", "n_dc_locks_0", "n_dc_locks_1"),
    **_named(True, "MM_BACK_EVEN_D", "ITEM_DO", "FILTER_GRAD", "HAS_TARGETS", "REQUIRES_GRAD"),
    **_named(False, "HAS_VOCAB_ORDERING", "SHIFT"),
    **_named("fp32", "grad_scale", "filter_eps"),
    "dOut": "*fp32",
    "Targets": "*i64",
    "MM_BACK_BLOCK_D": 64,
    "BLOCK_B": 128,
    "BLOCK_V": 128,
}
_CCE_ALIGNED = ("D", "stride_eb", "stride_cv", "B")
_FLA_OPTIONS, _FLA_PLACE = {"num_warps": 8, "num_stages": 2}, ("fla-core", "fla.ops.attn.parallel")

_PEERS = (
    Peer(
        "fla varlen attention, forward",
        *_FLA_PLACE,
        "parallel_attn_fwd_kernel",
        _FLA,
        _FLA_OPTIONS,
        128 * 64,
    ),
    Peer(
        "fla varlen attention, dK and dV",
        *_FLA_PLACE,
        "parallel_attn_bwd_kernel_dkv",
        _FLA,
        _FLA_OPTIONS,
        128 * 64,
    ),
    Peer(
        "fla varlen attention, dQ",
        *_FLA_PLACE,
        "parallel_attn_bwd_kernel_dq",
        _FLA,
        _FLA_OPTIONS,
        128 * 64,
    ),
    Peer(
        *(
            "Liger layer norm, forward, D = 768",
            "liger-kernel",
            "liger_kernel.ops.layer_norm",
            "_layer_norm_forward_kernel",
        ),
        *(_LIGER, {"num_warps": 4}, 768, _LIGER_STRIDES, True),
    ),
    Peer(
        *(
            "Liger layer norm, backward, D = 768",
            "liger-kernel",
            "liger_kernel.ops.layer_norm",
            "_layer_norm_backward_kernel",
        ),
        *(_LIGER, {"num_warps": 4}, 768, _LIGER_STRIDES, True),
    ),
    Peer(
        *(
            "Liger GEGLU, forward, F = 3072",
            "liger-kernel",
            "liger_kernel.ops.geglu",
            "_geglu_tanh_forward_kernel",
        ),
        *(_GEGLU, {"num_warps": 8}, 3072, ("stride",), True),
    ),
    Peer(
        *(
            "Liger GEGLU, backward, F = 3072",
            "liger-kernel",
            "liger_kernel.ops.geglu",
            "_geglu_tanh_backward_kernel",
        ),
        *(_GEGLU, {"num_warps": 8}, 3072, ("stride",), True),
    ),
    Peer(
        *(
            "CCE logits and log-sum-exp",
            "cut-cross-entropy",
            "cut_cross_entropy.cce_lse_forward",
            "_cce_lse_forward_kernel",
        ),
        *(
            {**_CCE_FORWARD, "BLOCK_B": 256, "BLOCK_V": 128},
            {"num_warps": 8, "num_stages": 3},
            256 * 128,
            _CCE_ALIGNED,
        ),
    ),
    Peer(
        *(
            "CCE logits again, backward",
            "cut-cross-entropy",
            "cut_cross_entropy.cce_backward",
            "_cce_backward_kernel",
        ),
        *(_CCE_BACKWARD, {"num_warps": 4, "num_stages": 4}, 128 * 128, _CCE_ALIGNED),
    ),
)
