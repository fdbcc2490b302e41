"""Computes several packs at once, each in a process of its own: the model's two passes on a CPU.

torch divides each operation over its OpenMP threads, which meet at a barrier after each one and
spin there. A step of a small model has some hundreds of operations. Beside other busy programs each
barrier may have to wait for a thread that the system has suspended. Here processes meet twice in a
step: after the forward and after the backward pass. Python threads would meet as rarely, but each
of the thousands of calls in a step takes Python's lock, so two such threads are no faster than one.

The first pack is computed in this process, each other one in a child that holds the same model. The
weights and each child's gradients lie in memory that both see; packs and losses go through a pipe.
A child ends when its parent does, however that ends.

Losses are sums over sequences that are divided by counts of the whole step, so those of packs add
up, and so do gradients. They are added in the order of the packs, so a run with the same number of
processes gives the same bits.

On two cores of an AMD EPYC, 2,500 tokens of the demo take 78 ms, with OpenMP's two threads 69.
Beside a busy program on each core they take 161 and 7,269 (benchmarks/step/bench_threads.py).
"""

from __future__ import annotations

import mmap
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Sequence
from multiprocessing.connection import Connection, Pipe
from typing import Any

import torch
from torch import Tensor, nn

from fastbert import child
from fastbert.config import LOSSES
from fastbert.contention import watch_contention
from fastbert.data.packing import PackedBatch
from fastbert.heap import keep_heap
from fastbert.models.build import Model, build_model

END_S = 5.0  # for a child to end when its pipe is closed, before it is killed


class ParallelModel(nn.Module):
    """A model that computes packs in processes. It is differentiable as the model itself is.

    Args:
        model: on the CPU in fp32, with kernels other than Triton's, if there are several processes.
        processes: how many packs are computed at once. Each gets an equal share of torch's threads.
    """

    def __init__(self, model: Model, processes: int):
        super().__init__()
        self.model = model
        self._threads = torch.get_num_threads()
        torch.set_num_threads(max(1, self._threads // processes))
        # The model's weights, where the children see them.
        self._weights, self._children = list[Tensor](), list[_Child]()
        self._memory: int | None = None
        if processes > 1:
            self._memory = memory = _shared_memory(processes * _size(model))
            self._weights = _views(memory, 0, model)
            self._show_weights()
            for parameter, view in zip(model.parameters(), self._weights, strict=True):
                parameter.data = view
            self._children = [_Child(self, memory, index + 1) for index in range(processes - 1)]

    def wait_until_ready(self) -> None:
        """Wait for the children, which need some seconds to start."""
        for own in self._children:
            own.receive()

    def forward(self, packs: Sequence[PackedBatch]) -> list[tuple[Tensor, ...]]:
        """Return what the model's `forward` returns, for each pack."""
        if not torch.is_grad_enabled():
            return self._forward(packs, train=False)
        parameters = tuple(self.model.parameters())
        outputs: tuple[Tensor, ...] = _Passes.apply(self, packs, *parameters)  # type: ignore
        size = len(outputs) // len(packs)
        return [outputs[i : i + size] for i in range(0, len(outputs), size)]

    def _forward(self, packs: Sequence[PackedBatch], train: bool) -> list[tuple[Tensor, ...]]:
        """Compute each pack; the first one's losses have a graph where gradients are enabled."""
        at_work = self._children[: len(packs) - 1]
        if at_work:
            self._show_weights()
        for own, pack in zip(at_work, packs[1:], strict=True):
            own.send((_FORWARD, pack.as_numpy(), self.model.training, train))
        return [self.model(packs[0]), *(_tensors(own.receive()) for own in at_work)]

    def _show_weights(self) -> None:
        """Copy the weights to where the children see them, but for those that lie there.

        DeepSpeed moves them into a buffer of its own at stages 1 and 2.
        """
        pairs = [
            (view, parameter.detach())
            for view, parameter in zip(self._weights, self.model.parameters(), strict=True)
            if view.data_ptr() != parameter.data_ptr()
        ]
        if pairs:
            views, parameters = map(list, zip(*pairs, strict=True))
            torch._foreach_copy_(views, parameters)

    def close(self) -> None:
        """End the children, and return what they had to torch."""
        for own in self._children:
            own.end()
        if self._memory is not None:
            os.close(self._memory)
            self._memory = None
        torch.set_num_threads(self._threads)


class _Passes(torch.autograd.Function):
    """Both passes in all processes, as one function of the parameters."""

    @staticmethod
    def forward(ctx, parallel: ParallelModel, packs: Sequence[PackedBatch], *parameters: Tensor):
        with torch.enable_grad():
            found = parallel._forward(packs, train=True)
        ctx.parallel, ctx.parameters, ctx.count = parallel, parameters, len(packs)
        # The outputs of a pack are its losses, and others that have no gradient.
        count = len(LOSSES)
        ctx.losses, ctx.size = found[0][:count], len(found[0])
        ctx.mark_non_differentiable(*(x for outputs in found for x in outputs[count:]))
        return tuple(
            x.detach() if i < count else x for outputs in found for i, x in enumerate(outputs)
        )

    @staticmethod
    def backward(ctx, *upstream: Tensor):  # type: ignore[override]
        count = len(ctx.losses)
        factors = [upstream[i : i + count] for i in range(0, len(upstream), ctx.size)]
        at_work = ctx.parallel._children[: ctx.count - 1]
        for own, of_pack in zip(at_work, factors[1:], strict=True):
            own.send((_BACKWARD, [float(x) for x in of_pack]))
        total = _gradients(ctx.losses, ctx.parameters, factors[0])
        for own in at_work:
            own.receive()
            torch._foreach_add_(total, own.gradients)
        return None, None, *total


def _gradients(
    losses: Sequence[Tensor], parameters: Sequence[Tensor], factors: Sequence[Tensor]
) -> list[Tensor]:
    """Return d(sum of losses times factors) of each parameter; zeros where it has no part in it.

    A loss that the model does not have is a constant.
    """
    pairs = [(x, f) for x, f in zip(losses, factors, strict=True) if x.requires_grad]
    outputs, upstream = zip(*pairs, strict=True)
    found = torch.autograd.grad(outputs, parameters, upstream, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


# The first entry of a request. Its answer is (True, result) or (False, exception).
_FORWARD, _BACKWARD = "forward", "backward"


class _Child:
    """A child process and what it shares with this one.

    Attributes:
        gradients: of its last pack, in the order of the model's parameters.
    """

    def __init__(self, parallel: ParallelModel, memory: int, index: int):
        model = parallel.model
        self.gradients = _views(memory, index, model)
        self._pipe, theirs = Pipe()
        environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
        code = "from fastbert.training.parallel_model import work; work()"
        facts = (model.config, model.vocab_size, model.impl, _is_tied(model))
        facts += (model.operands, model.recompute)
        self._process = subprocess.Popen(
            child.command(code, str(theirs.fileno()), str(memory), str(index)),
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            pass_fds=(theirs.fileno(), memory),
            start_new_session=True,  # Ctrl-C in a terminal reaches the parent alone
        )
        theirs.close()
        self._pipe.send_bytes(pickle.dumps(facts, pickle.HIGHEST_PROTOCOL))
        self._asked = True  # to say when it is ready

    def send(self, request: Any) -> None:
        try:
            if self._asked:  # nobody took the last answer
                self._asked = False
                self._pipe.recv_bytes()
            self._pipe.send_bytes(pickle.dumps(request, pickle.HIGHEST_PROTOCOL))
        except (EOFError, OSError):
            raise self._lost() from None
        self._asked = True

    def receive(self) -> Any:
        """Return the answer to the last request.

        Raises:
            ChildProcessError: the child has ended.
            Exception: what it raised.
        """
        try:
            done, result = pickle.loads(self._pipe.recv_bytes())
        except (EOFError, OSError):
            raise self._lost() from None
        self._asked = False
        if not done:
            raise result
        return result

    def _lost(self) -> ChildProcessError:
        try:
            code = self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            code = None
        how = f"exit code {code}"
        if code is not None and code < 0:
            how = signal.Signals(-code).name
            if code == -signal.SIGKILL:
                how += ", as the system sends it where memory is short"
        return ChildProcessError(
            f"process {self._process.pid}, which computed a pack, ended: {how}"
        )

    def end(self) -> None:
        self._pipe.close()
        if self._process.stdin:
            self._process.stdin.close()
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def work() -> None:
    """Compute packs until the parent ends; this is what a child runs."""
    pipe, memory, index = Connection(int(sys.argv[1])), int(sys.argv[2]), int(sys.argv[3])
    # A signal to all processes of a name may reach this one. The parent decides when a run ends.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    # It holds the other end of stdin as long as it lives, also while a pack is computed here.
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    keep_heap()
    watch_contention()
    config, vocab_size, impl, tied, operands, recompute = pickle.loads(pipe.recv_bytes())
    with torch.device("meta"):
        model = build_model(config, vocab_size, impl, tied=tied)
    model.operands, model.recompute = operands, recompute
    _give(model, _views(memory, 0, model))
    gradients, losses = _views(memory, index, model), ()
    pipe.send_bytes(pickle.dumps((True, None)))
    while True:
        try:
            request, *arguments = pickle.loads(pipe.recv_bytes())
        except (EOFError, OSError):
            return
        try:
            if request == _FORWARD:
                values, training, train = arguments
                model.train(training)
                with torch.set_grad_enabled(train):
                    outputs = model(PackedBatch.from_numpy(values))
                losses = outputs[: len(LOSSES)]
                answer = [x.detach().numpy() for x in outputs]
            else:
                (factors,) = arguments
                with torch.no_grad():
                    both = [torch.tensor(x) for x in factors]
                    found = _gradients(losses, list(model.parameters()), both)
                    torch._foreach_copy_(gradients, found)
                losses, answer = (), None
            text = pickle.dumps((True, answer), pickle.HIGHEST_PROTOCOL)
        except Exception as error:
            text = pickle.dumps((False, error), pickle.HIGHEST_PROTOCOL)
        pipe.send_bytes(text)


def _end_with_the_parent() -> None:
    os.read(0, 1)
    os._exit(0)


def _is_tied(model: Model) -> bool:
    return model.mlm_head.decoder is None


def _tensors(arrays: Iterable[Any]) -> tuple[Tensor, ...]:
    return tuple(torch.from_numpy(x) if x.ndim else torch.tensor(x) for x in arrays)


def _give(model: nn.Module, views: Sequence[Tensor]) -> None:
    """Let the parameters of a model without memory lie in these tensors."""
    for (name, _), view in zip(list(model.named_parameters()), views, strict=True):
        path, _, attribute = name.rpartition(".")
        model.get_submodule(path).register_parameter(attribute, nn.Parameter(view))


def _size(model: nn.Module) -> int:
    """Return the bytes of all parameters, to a multiple of the page size, as mmap needs it."""
    size = sum(4 * p.numel() for p in model.parameters())
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE


def _shared_memory(size: int) -> int:
    """Return a file of this size, in memory where the system has such files."""
    if hasattr(os, "memfd_create"):
        file = os.memfd_create("fastbert")
    else:
        with tempfile.TemporaryFile() as temporary:
            file = os.dup(temporary.fileno())
    os.truncate(file, size)
    return file


def _views(file: int, index: int, model: nn.Module) -> list[Tensor]:
    """Return the tensors of a copy of the parameters in shared memory."""
    size = _size(model)
    flat = torch.frombuffer(mmap.mmap(file, size, offset=index * size), dtype=torch.float32)
    parameters = list(model.parameters())
    pieces = flat[: sum(p.numel() for p in parameters)].split([p.numel() for p in parameters])
    return [piece.view(p.shape) for piece, p in zip(pieces, parameters, strict=True)]
