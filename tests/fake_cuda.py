"""Run the path of a training step on CUDA tensors that hold no data.

Run it as `python -m tests.fake_cuda [--short]`, in a process that does not interpret kernels. What
takes the time is that kernels are compiled; `--short` takes the model in bf16 with dropout in one
tile, which launches the kernels of its layers in both passes, and the launchers of the loss.

torch's fake tensors know their device, dtype and shape. An operation that mixes devices fails. So
does an operation that needs a value on the host (`.item()`, `.tolist()`, a mask as an index), which
would wait for the device on a GPU. Launches go through `no_launch`, so kernels are compiled for
them. Fake tensors need a device guard that torch without CUDA lacks, so it gets one that does
nothing. The autograd engine of such a torch does not support CUDA at all, so the backward launchers
of the kernels are called directly.
"""

from __future__ import annotations

import ctypes
import dataclasses
import importlib
import inspect
import itertools
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from benchmarks.compiled.launches import HALF_A_TILE, MANY_TILES
from benchmarks.compiled.no_launch import no_launch
from benchmarks.kernels.cases import Case, arguments
from fastbert.config import BertConfig
from fastbert.data.packing import PackedBatch
from fastbert.data.padding import pad
from fastbert.models import fused_layer
from fastbert.models.bert import BertForPreTraining, Layer
from fastbert.models.fused_layer import Call
from fastbert.models.heads import losses, select
from fastbert.training.heldout import heldout_sums
from fastbert_kernels.specs import SPECS
from tests.random_batch import VOCAB, make_batch

CUDA = torch.device("cuda", 0)
# What the forward launcher of each operation returns, by the names that its backward launcher uses.
RESULTS = {
    "attention": ("out", "statistics"),
    "mlm_loss": ("losses", "correct", "lse"),
    "norm": ("y", "mean", "rstd"),
    "gelu": ("y",),
    "embedding": ("y", "mean", "rstd"),
    "geglu": ("y",),
    "rotary": ("q", "k"),
    "add_norm": ("y", "total", "mean", "rstd"),
}


GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
static c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> guard;
static c10::impl::DeviceGuardImplRegistrar registrar(c10::DeviceType::CUDA, &guard);
"""


def load_guard() -> None:
    torch_folder = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "guard.cpp", Path(folder) / "guard.so"
        source.write_text(GUARD, encoding="utf-8")
        flags = [
            "-std=c++20",
            "-shared",
            "-fPIC",
            f"-I{torch_folder / 'include'}",
            f"-L{torch_folder / 'lib'}",
            "-lc10",
        ]
        subprocess.run(["g++", str(source), *flags, "-o", str(library)], check=True)
        ctypes.CDLL(str(library))


def on_cuda(x: Any) -> Any:
    """Return a fake CUDA tensor with x's strides, whose address is aligned as by an allocator."""
    return (
        torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device=CUDA)
        if torch.is_tensor(x)
        else x
    )


def launchers(operation: str, shape: dict, dtype: torch.dtype, p: float) -> None:
    """Call both launchers of an operation, as its operators do."""
    kernel = importlib.import_module(f"fastbert_kernels.{operation}.kernel")
    real = arguments(Case(operation, "", shape, p), dtype, torch.device("cpu"))
    given = {"eps": 1e-12, "scale": 0.125, "dropout_stream": 0, "query_indices": None}
    given |= {"window": None, **real}
    with FakeTensorMode(), torch.no_grad():
        given = {name: on_cuda(value) for name, value in given.items()}
        results = call(kernel.forward, given)
        named = dict(
            zip(
                RESULTS[operation],
                results if isinstance(results, tuple) else (results,),
                strict=True,
            )
        )
        upstream = next(iter(inspect.signature(kernel.backward).parameters))
        first = (
            torch.empty((), device=CUDA)
            if operation == "mlm_loss"
            else torch.empty_like(named[RESULTS[operation][0]])
        )
        known = {**given, **named, upstream: first}
        # Other upstream gradients, such as that of k beside that of q.
        wanted = inspect.signature(kernel.backward).parameters
        known |= {name: torch.empty_like(first) for name in wanted if name not in known}
        gradients = call(kernel.backward, known)
        gradients = gradients if isinstance(gradients, tuple) else (gradients,)
    for value in (*named.values(), *gradients):
        assert value.device == CUDA, (operation, value.device)


def call(launcher: Callable, given: dict[str, Any]) -> Any:
    return launcher(**{name: given[name] for name in inspect.signature(launcher).parameters})


def model(lengths: list[int], dtype: torch.dtype) -> None:
    """Run the forward pass of a training step and of an evaluation, and the sums kept of each."""
    config = BertConfig(
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=512,
        max_position_embeddings=512,
    )
    batch = make_batch(lengths)
    with FakeTensorMode(), torch.no_grad():
        with torch.device(CUDA):
            torch.set_default_dtype(dtype)
            encoder = BertForPreTraining(config, VOCAB, "triton", "cuda")
            torch.set_default_dtype(torch.float32)
        batch: PackedBatch = dataclasses.replace(
            batch,
            **{
                field.name: on_cuda(getattr(batch, field.name))
                for field in dataclasses.fields(batch)
            },
        )
        found = losses(encoder(batch))
        assert found.loss.device == CUDA
        assert heldout_sums(losses(encoder.eval()(batch)), batch, 4).device == CUDA
        for state in encoder.hidden_states(batch):
            assert state.device == CUDA
            assert state.dtype == dtype


class Context:
    """The context of an autograd function, so that its two passes can be called directly."""

    saved_tensors: tuple = ()

    def save_for_backward(self, *tensors: Any) -> None:
        self.saved_tensors = tensors


def captured(lengths: list[int], dtype: torch.dtype) -> None:
    """Run what a CUDA graph captures (fastbert/training/graphs.py), and what surrounds a replay.

    The input is a padded pack that is copied into buffers of its shape.

    A capture fails where the host waits, so nothing in it may wait. The backward pass here is that
    of the layers. The backward passes of the other kernels are in `launchers`, and the rest is
    torch's.
    """
    config = BertConfig(
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=512,
        max_position_embeddings=512,
    )
    real = pad(make_batch(lengths), 0.5, max(lengths)).pinned(page_locked=False)
    with FakeTensorMode() as mode, torch.no_grad():
        inputs = real.buffer(device=CUDA)
        # The source is still on the CPU.
        inputs.take_over(
            dataclasses.replace(
                real, **{name: mode.from_tensor(x) for name, x in real._tensors().items()}
            )
        )
        with torch.device(CUDA):
            torch.set_default_dtype(dtype)
            encoder = BertForPreTraining(config, VOCAB, "triton", "cuda")
            torch.set_default_dtype(torch.float32)
        found = losses(encoder(inputs))
        assert (found.loss.clone() / real.masked_total).device == CUDA
        call_mode = encoder._mode()
        pack = encoder._tables(inputs, call_mode)
        rows = torch.cat((inputs.masked_positions, inputs.cu_seqlens[:-1].long())).sort().values
        for asked in (None, rows):
            layer, context = cast(Layer, encoder.layers[0]), Context()
            parameters = layer.fused_parameters()
            seeds = select(pack.token_seeds, asked)
            call = Call(
                2,
                *pack[:2],
                pack.tile_schedule,
                pack.sequence_seeds,
                seeds,
                asked,
                call_mode.attention_dropout,
                call_mode.hidden_dropout,
                1,
                1e-12,
            )
            x = torch.empty(len(inputs.input_ids), config.hidden_size, dtype=dtype, device=CUDA)
            y = fused_layer._Layer.forward(context, x, call, *parameters)
            dx, _, *gradients = fused_layer._Layer.backward(context, torch.empty_like(y))
            assert dx.shape == x.shape
            for gradient, copy, parameter in zip(
                gradients, torch._foreach_mul(gradients, 1.0), parameters, strict=True
            ):
                assert (gradient.shape, gradient.device) == (parameter.shape, CUDA)
                assert copy.device == CUDA


def main() -> int:
    load_guard()
    # Triton asks whether it is aligned.
    FakeTensor.data_ptr = lambda self: (
        0 if self.numel() == 0 else 4096 + self.storage_offset() * self.element_size()
    )
    short = "--short" in sys.argv[1:]
    packs = (HALF_A_TILE,) if short else (HALF_A_TILE, MANY_TILES)
    cut_and_whole = [
        {"lengths": lengths, "H": 2, "K": 64, "R": R} for lengths in packs for R in (0, 9)
    ]
    with no_launch("sm_90") as seen:
        for operation in ("mlm_loss",) if short else SPECS:
            spec = SPECS[operation]
            shapes = cut_and_whole if operation == "attention" else spec.shapes[-len(packs) :]
            dropout = (0.0, 0.1) if spec.dropout else (0.0,)
            for shape, p in itertools.product(shapes, dropout):
                launchers(operation, shape, torch.bfloat16, p)
    assert seen.launches
    for lengths in packs:
        model(lengths, torch.bfloat16)
        captured(lengths, torch.bfloat16)
    print(f"{len(seen.launches)} launches on fake CUDA tensors")
    return 0


if __name__ == "__main__":
    sys.exit(main())
