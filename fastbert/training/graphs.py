"""Captures the two passes of a micro-batch as CUDA graphs, once per shape, and replays them.

It has never run on a GPU.

A graph is launched as one operation, so the CPU's work for a micro-batch no longer grows with the
number of kernels. No Python runs in a replay, and every address is the same as at the capture. This
determines the design:

- Inputs are in buffers that are allocated once per shape. A replay copies the next pack into them.
  Packs are padded, so that there are few shapes (data/padding.py). Dropout masks are functions of
  the seeds in the pack, so each replay draws new masks.
- The totals that the losses are divided by are Python numbers and change from step to step. So the
  captured losses are sums. They are divided outside of the graph, by the same operation as without
  graphs.
- The backward graph is captured with `torch.autograd.grad`, which accumulates nothing and runs no
  hook of a parameter. `_Replay` returns copies of its results to autograd, so gradients add up in
  `.grad`, and DeepSpeed's hooks at ZeRO stages 1 and 2 run as usual.
- All graphs share one memory pool, so activations of one shape may use the memory of another. This
  is valid for two reasons: a backward replay follows its forward replay before any other replay,
  and results are copied before the next replay.

ZeRO stage 3 gathers weights by hooks of modules, into memory that it frees again. A replay would
neither gather the weights nor find them.

Source: PyTorch, "CUDA semantics", section "CUDA Graphs", and `torch.cuda.make_graphed_callables`.
The latter works the same way, but it takes no dataclass, and the next replay overwrites the
gradients that it returns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fastbert.data.packing import PackedBatch
from fastbert.errors import InputError
from fastbert.models.build import Model

# Passes before a capture, which compile kernels and allocate workspaces. The number is that of
# PyTorch's documentation.
WARM_UP = 3


def check_cuda_graphs(recipe: str, device: str, impl: str, stage: int) -> None:
    """Check that a step can be captured.

    Args:
        recipe: its path, for messages.
        device: "cpu" or "cuda", where the model will run.
        impl: what runtime.kernels means there.
        stage: the ZeRO stage.

    Raises:
        InputError: it cannot.
    """
    key = f"{recipe}: runtime.cuda_graphs = true"
    if device != "cuda":
        raise InputError(f"{key} needs a GPU, and this run is on {device}; set it to false")
    if impl != "triton":
        raise InputError(
            f'{key} needs the Triton kernels, and runtime.kernels means "{impl}"; '
            'set it to "triton", or runtime.cuda_graphs to false'
        )
    if stage == 3:
        raise InputError(
            f"{key} does not go with zero_optimization.stage = 3, whose weights move; "
            "use stage 0, 1 or 2, or set runtime.cuda_graphs to false"
        )


class CudaGraphs:
    """Records functions as CUDA graphs on the current GPU."""

    def __init__(self) -> None:
        self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()

    def warm_up(self, function: Callable[[], Any]) -> None:
        """Call the function until a further call compiles and allocates nothing new."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for _ in range(WARM_UP):
                function()
        torch.cuda.current_stream().wait_stream(self._stream)

    def record(
        self, function: Callable[[], Sequence[Tensor]]
    ) -> tuple[Sequence[Tensor], Callable[[], None]]:
        """Run the function once, recording it.

        Returns:
            The tensors that the function returned, and a call that computes their values again, in
            place.
        """
        graph = torch.cuda.CUDAGraph()
        # "thread_local", since other threads pin batches, write checkpoints and monitor NCCL.
        with torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        ):
            results = function()
        return results, graph.replay


class GraphedModel(nn.Module):
    """A model whose two training passes are replayed; evaluation calls the model itself.

    Args:
        model: in training mode, on the device.
        recorder: by default a new one; tests have a stand-in where there is no GPU.

    Attributes:
        captured: the passes that have been captured, by the shape of their packs.
        replays: how many forward passes have been replayed.
    """

    def __init__(self, model: Model, recorder: CudaGraphs | None = None):
        super().__init__()
        self.model = model
        self.captured: dict[tuple[int, ...], Captured] = {}
        self.replays = 0
        self._recorder = recorder or CudaGraphs()

    def forward(self, batch: PackedBatch) -> tuple[Tensor, ...]:
        """Do what the model's `forward` does.

        In training the batch may be on the CPU, preferably in pinned memory.
        """
        if not torch.is_grad_enabled():
            return self.model(batch)
        shape = (len(batch.input_ids), len(batch.examples), len(batch.labels), batch.max_seqlen)
        if shape not in self.captured:
            self.captured[shape] = Captured(self.model, batch, self._recorder)
        mlm, nsp, *rest = _Replay.apply(
            self, self.captured[shape], batch, *self.captured[shape].parameters
        )  # type: ignore[misc]
        return mlm / max(batch.masked_total, 1), nsp / max(batch.pairs_total, 1), *rest


class Captured:
    """Both passes of the model for packs of one shape.

    Args:
        model: on the device.
        batch: a pack of that shape, used for the capture.
        recorder: captures the passes.

    Attributes:
        inputs: the buffer that a replay reads its pack from.
        parameters: the model's parameters, in the order of the gradients.
    """

    def __init__(self, model: Model, batch: PackedBatch, recorder: CudaGraphs):
        self.parameters = tuple(model.parameters())
        self._model, device = model, self.parameters[0].device
        self._places = self._parameter_places()
        # With totals of 1 the losses are sums, since the next step's totals are others.
        self.inputs = replace(batch.buffer(device=device), masked_total=1, pairs_total=1)
        self.inputs.take_over(batch)
        self._upstream = tuple(torch.ones((), device=device) for _ in range(2))
        self._losses: tuple[Tensor, ...] = ()

        def both() -> None:
            self._forward()
            self._backward()

        recorder.warm_up(both)
        self._losses = ()  # so that nothing of the warm-up is freed during the capture
        self._outputs, self._replay_forward = recorder.record(self._forward)
        self._gradients, self._replay_backward = recorder.record(self._backward)
        self._losses = ()  # their autograd graph is not needed any more

    def _forward(self) -> list[Tensor]:
        mlm, nsp, *rest = self._model(self.inputs)
        assert not any(x.requires_grad for x in rest), "a loss that a replay does not differentiate"
        self._losses = mlm, nsp
        return [mlm.detach(), nsp.detach(), *rest]

    def _backward(self) -> tuple[Tensor, ...]:
        # A loss that the model does not have is a constant.
        both = zip(self._losses, self._upstream, strict=True)
        losses, upstream = zip(*(pair for pair in both if pair[0].requires_grad), strict=True)
        return torch.autograd.grad(losses, self.parameters, upstream)

    def _parameter_places(self) -> list[int]:
        return [parameter.data_ptr() for parameter in self.parameters]

    def forward(self, batch: PackedBatch) -> tuple[Tensor, ...]:
        """Return the model's outputs for the batch, with sums in place of mean losses."""
        assert self._parameter_places() == self._places, "a parameter has moved since the capture"
        self.inputs.take_over(batch)
        self._replay_forward()
        return tuple(x.clone() for x in self._outputs)

    def backward(self, *upstream: Tensor) -> Sequence[Tensor]:
        """Return the parameters' gradients for the last batch.

        Args:
            upstream: the gradients of the two loss sums, scalars.
        """
        for to, source in zip(self._upstream, upstream, strict=True):
            to.copy_(source)
        self._replay_backward()
        # Multiplying by 1 copies all gradients in a few launches.
        return torch._foreach_mul(list(self._gradients), 1.0)


class _Replay(torch.autograd.Function):
    """Connects the two replays to autograd."""

    @staticmethod
    def forward(
        ctx, graphed: GraphedModel, captured: Captured, batch: PackedBatch, *parameters: Tensor
    ):
        outputs = captured.forward(batch)
        graphed.replays += 1
        ctx.graphed, ctx.captured, ctx.number = graphed, captured, graphed.replays
        ctx.mark_non_differentiable(*outputs[2:])
        return outputs

    @staticmethod
    def backward(ctx, dmlm: Tensor, dnsp: Tensor, *_: Tensor):  # type: ignore[override]
        assert ctx.number == ctx.graphed.replays, (
            "another forward pass has overwritten the activations"
        )
        return None, None, None, *ctx.captured.backward(dmlm, dnsp)
