"""Computes several packs at once, each on a thread of its own: the model's two passes on a CPU.

torch divides each operation over its OpenMP threads, which meet at a barrier after each one and
spin there. A step of a small model has some hundreds of operations. Beside other busy processes
each barrier may have to wait for a thread that the system has suspended. Here threads meet twice in
a step: after the forward and after the backward pass.

Losses are sums over sequences that are divided by counts of the whole step, so those of packs add
up, and so do gradients. They are added in the order of the packs, so a run on the same number of
threads gives the same bits.

A busy process on each of two cores makes a step of the demo 1.4 times as long, and with OpenMP's
threads 4.6 times (`python -m benchmarks.step.bench_threads`, on an AMD EPYC).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

import torch
from torch import Tensor, nn

from fastbert.data.packing import PackedBatch
from fastbert.models.bert import BertForPreTraining

# A thread takes at least this many sequences of a step. With fewer, the fixed time of each
# operation outweighs what the thread gains.
SEQUENCES_PER_THREAD = 8

Item = TypeVar("Item")
Result = TypeVar("Result")


def threads_for(sequences: int, cores: int) -> int:
    """Return how many packs a process should compute at once.

    Args:
        sequences: of this process in a step.
        cores: that this process may use.
    """
    return max(1, min(cores, sequences // SEQUENCES_PER_THREAD))


class ThreadedModel(nn.Module):
    """A model that computes packs on threads. It is differentiable as the model itself is.

    Args:
        model: on the CPU, with kernels that are safe on several threads ("cpu" or "reference").
        threads: how many packs are computed at once. Each gets an equal share of torch's threads.
    """

    def __init__(self, model: BertForPreTraining, threads: int):
        super().__init__()
        self.model = model
        self._before = torch.get_num_threads()
        # Each thread has a setting of its own.
        torch.set_num_threads(share := max(1, self._before // threads))
        self._pool = ThreadPoolExecutor(
            threads, "packs", initializer=torch.set_num_threads, initargs=(share,)
        )

    def forward(self, packs: Sequence[PackedBatch]) -> list[tuple[Tensor, ...]]:
        """Return what `BertForPreTraining.forward` returns, for each pack."""
        if not torch.is_grad_enabled():
            return self.each(self._evaluated, packs)
        parameters = tuple(self.model.parameters())
        outputs: tuple[Tensor, ...] = _Passes.apply(self, packs, *parameters)  # type: ignore
        size = len(outputs) // len(packs)
        return [outputs[i : i + size] for i in range(0, len(outputs), size)]

    @torch.no_grad()
    def _evaluated(self, pack: PackedBatch) -> tuple[Tensor, ...]:
        return self.model(pack)

    @torch.enable_grad()
    def _trained(self, pack: PackedBatch) -> tuple[Tensor, ...]:
        return self.model(pack)

    def each(self, work: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        """Call `work` for each item on the threads, and return the results in order.

        Raises:
            Exception: the first item's that failed, when no thread is at work any more.
        """
        futures = [self._pool.submit(work, item) for item in items]
        wait(futures)
        return [future.result() for future in futures]

    def close(self) -> None:
        """End the threads, and return what they had to torch."""
        self._pool.shutdown()
        torch.set_num_threads(self._before)


class _Passes(torch.autograd.Function):
    """Both passes on the threads, as one function of the parameters."""

    @staticmethod
    def forward(ctx, threaded: ThreadedModel, packs: Sequence[PackedBatch], *parameters: Tensor):
        found = threaded.each(threaded._trained, packs)
        ctx.threaded, ctx.parameters = threaded, parameters
        # The outputs of a pack are its two losses, and others that have no gradient.
        ctx.losses, ctx.size = [outputs[:2] for outputs in found], len(found[0])
        ctx.mark_non_differentiable(*(x for outputs in found for x in outputs[2:]))
        return tuple(x.detach() if i < 2 else x for outputs in found for i, x in enumerate(outputs))

    @staticmethod
    def backward(ctx, *upstream: Tensor):  # type: ignore[override]
        def gradients(index: int) -> tuple[Tensor, ...]:
            first = index * ctx.size
            return torch.autograd.grad(
                ctx.losses[index], ctx.parameters, upstream[first : first + 2]
            )

        total, *others = ctx.threaded.each(gradients, range(len(ctx.losses)))
        ctx.losses = None  # with all activations
        for more in others:
            total = torch._foreach_add(total, more)
        return None, None, *total
