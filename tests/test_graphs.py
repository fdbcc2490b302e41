"""Micro-batches that are captured and replayed train as others do.

A stand-in replaces `torch.cuda.graph`; everything else is the code that runs on a GPU.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastbert.cluster.group import join
from fastbert.config import OptimizerConfig, RunConfig, RuntimeConfig
from fastbert.data.batches import Batches, heldout_batches
from fastbert.data.dataset import TokenDataset, open_dataset
from fastbert.data.packing import PackedBatch
from fastbert.data.padding import pad
from fastbert.errors import InputError
from fastbert.models.bert import BertForPreTraining
from fastbert.models.build import build_model
from fastbert.models.heads import losses
from fastbert.training import graphs
from fastbert.training.engine import Engine, StepResult
from fastbert.training.graphs import GraphedModel, check_cuda_graphs
from tests.modern_bert import CONFIGS
from tests.random_batch import VOCAB, make_batch
from tests.test_engine import CONFIG, MODEL, settings, state_of
from tests.test_kernels import GPU, watched
from tests.tiers import slow
from tests.toy_ranks import Toys
from tests.trials import Laboratory

STEPS = 10
DEVICE = "cuda" if GPU else "cpu"


class StandIn:
    """Replay by calling the function again.

    It reads the same buffers, and its results are copied to where the first results are.
    """

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def warm_up(self, function: Callable[[], Any]) -> None:
        function()

    def record(
        self, function: Callable[[], Sequence[Tensor]]
    ) -> tuple[Sequence[Tensor], Callable[[], None]]:
        results = function()
        self.recorded += 1

        def replay() -> None:
            self.replayed += 1
            with torch.enable_grad():
                again = function()
            for to, source in zip(results, again, strict=True):
                to.copy_(source)

        return results, replay


def with_graphs(config: RunConfig) -> RunConfig:
    return dataclasses.replace(config, runtime=RuntimeConfig(cuda_graphs=True))


@contextmanager
def engine(dataset: TokenDataset, config: RunConfig, stage: int, impl: str) -> Iterator[Engine]:
    torch.manual_seed(0)
    model = BertForPreTraining(config.model, dataset.vocab_size, impl)
    with join(60.0) as group, Engine(model, config, settings(stage), "fp32", group) as built:
        yield built


def train(
    dataset: TokenDataset, config: RunConfig, steps: list[list[PackedBatch]], stage: int, impl: str
) -> tuple[list[StepResult], dict[str, Tensor]]:
    with engine(dataset, config, stage, impl) as built:
        results = [built.step(packs, lr=config.optimizer.lr) for packs in steps]
        return results, state_of(built)["weight"]


@pytest.fixture
def recorders(monkeypatch) -> list[StandIn]:
    """The stand-ins that replace `CudaGraphs`."""
    made: list[StandIn] = []
    monkeypatch.setattr(graphs, "CudaGraphs", lambda: made.append(StandIn()) or made[-1])
    return made


def shape(pack: PackedBatch) -> tuple[int, ...]:
    return len(pack.input_ids), len(pack.examples), len(pack.labels)


@pytest.mark.parametrize("stage", [slow(0), 1])
def test_ten_steps_are_those_without_graphs(small_dataset, stage, recorders, monkeypatch):
    """The steps are equal to the last digit where packs are padded in both runs.

    The steps include dropout, several packs per step, DeepSpeed's hooks, clipping and AdamW.
    """
    batches = Batches(small_dataset, with_graphs(CONFIG))
    steps = [batches.step(i) for i in range(STEPS)]
    assert min(map(len, steps)) > 1
    expected, weights = train(small_dataset, CONFIG, steps, stage, "reference")
    assert not recorders

    # A replay copies the pack into its buffers and creates no tensor on the device.
    monkeypatch.setattr(PackedBatch, "to", None)
    found, found_weights = train(small_dataset, with_graphs(CONFIG), steps, stage, "reference")
    assert found == expected
    for name, weight in weights.items():
        assert found_weights[name].equal(weight), name
    (recorder,) = recorders
    packs = [pack for packs in steps for pack in packs]
    # There is one graph for the forward pass and one for the backward pass.
    assert recorder.recorded == 2 * len({shape(pack) for pack in packs}) < len(packs)
    assert recorder.replayed == 2 * len(packs)


@pytest.mark.slow
def test_two_ranks_replay_too(small_dataset, tmp_path):
    """Sums over ranks are outside the graphs, so the steps equal those without graphs exactly."""
    with Toys(rank_of_two, (small_dataset.path,), tmp_path, 2) as toys:
        assert toys.wait() == [0, 0], (toys.err(0), toys.err(1))
        assert toys.out(0) == toys.out(1) != ""


def rank_of_two(path: Path) -> int:
    graphs.CudaGraphs = StandIn  # type: ignore[misc]  # this process ends with the test
    dataset, runs = open_dataset(path), []
    with join(60.0) as group:
        batches = Batches(dataset, with_graphs(CONFIG))
        steps = [batches.step(i, group.rank, group.world) for i in range(5)]
        for config in (CONFIG, with_graphs(CONFIG)):
            torch.manual_seed(0)
            with Engine(
                BertForPreTraining(MODEL, dataset.vocab_size, "reference"),
                config,
                settings(1),
                "fp32",
                group,
            ) as built:
                runs.append([built.step(packs, lr=1e-2) for packs in steps])
    print([result.loss for result in runs[1]])
    return int(runs[0] != runs[1])


@pytest.mark.parametrize("impl", ["cpu", slow("reference")])
def test_ten_steps_are_those_of_packs_without_padding(small_dataset, impl, recorders):
    """The steps are equal to rounding, and their counts exactly.

    This uses plain gradient descent, because AdamW turns rounding into a step where a gradient is
    near zero.
    """
    config = dataclasses.replace(
        CONFIG, optimizer=OptimizerConfig(name="sgd", lr=0.1, weight_decay=0.0)
    )
    runs = [
        train(
            small_dataset,
            changed,
            [Batches(small_dataset, changed).step(i) for i in range(STEPS)],
            0,
            impl,
        )
        for changed in (config, with_graphs(config))
    ]
    (expected, weights), (found, found_weights) = runs
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.tokens, ours.masked, ours.sequences) == (
            theirs.tokens,
            theirs.masked,
            theirs.sequences,
        )
        assert (ours.accuracy_mlm, ours.accuracy_nsp) == (theirs.accuracy_mlm, theirs.accuracy_nsp)
        assert ours.loss == pytest.approx(
            theirs.loss, rel=1e-5
        ) and ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-4)
    torch.testing.assert_close(found_weights, weights, rtol=1e-4, atol=1e-6)
    assert expected[-1].loss != expected[0].loss


def packs() -> list[PackedBatch]:
    """Three packs of two shapes, with totals of their own."""
    lengths = [9, 5, 20], [7, 8, 19], [6, 30, 5, 4]
    made = [pad(make_batch(of, seed), 0.5, 64) for seed, of in enumerate(lengths)]
    return [
        dataclasses.replace(pack, masked_total=pack.masked_total + 3 * i).pinned(page_locked=GPU)
        for i, pack in enumerate(made)
    ]


def computed(model: Any, pack: PackedBatch) -> list[Tensor]:
    found = losses(model(pack))
    gradients = torch.autograd.grad(found.loss, list(model.parameters()))
    return [
        found.mlm.detach(),
        found.nsp.detach(),
        found.token_losses,
        found.token_correct,
        found.pair_losses,
        found.pair_correct,
        *gradients,
    ]


MODERN = dataclasses.replace(
    CONFIGS["modernbert"], embedding_dropout=0.1, attention_dropout=0.1, mlp_dropout=0.1
)


@pytest.mark.parametrize(
    ("impl", "dtype", "config"),
    [
        slow("triton", torch.bfloat16, MODEL),
        ("triton" if GPU else "reference", torch.float32, MODEL),
        ("triton" if GPU else "reference", torch.float32, MODERN),
    ],
)
def test_a_replay_gives_what_the_model_gives(impl, dtype, config):
    """The results are equal to the last digit, since the same operation divides the losses outside.

    Buffers stay where they are. On a GPU this records CUDA graphs. The interpreter would take two
    minutes for fp32, so there the reference takes its place.
    """
    torch.manual_seed(0)
    model = build_model(config, VOCAB, impl, DEVICE).to(DEVICE, dtype).train()
    graphed = GraphedModel(model, None if GPU else StandIn())
    first, second, third = packs()
    assert shape(first) == shape(second) != shape(third)
    places: dict[tuple[int, ...], list[list[int]]] = {}
    for pack in (first, second, third):
        with watched(impl):
            both = computed(graphed, pack), computed(model, pack.to(DEVICE))
        for ours, expected in zip(*both, strict=True):
            assert ours.equal(expected) and ours.dtype == expected.dtype
        places |= {key: [] for key in graphed.captured if key not in places}
        for key, captured in graphed.captured.items():
            places[key].append([x.data_ptr() for x in captured.inputs._tensors().values()])
    assert len(places) == 2
    for found in places.values():
        assert all(place == found[0] for place in found)


def test_new_keys_draw_new_masks_in_a_replay():
    model = BertForPreTraining(MODEL, VOCAB, "cpu").train()
    graphed = GraphedModel(model, StandIn())
    pack = packs()[0]
    other = dataclasses.replace(pack, dropout_seeds=pack.dropout_seeds + 1)
    first, second, again = (losses(graphed(batch)).token_losses for batch in (pack, other, pack))
    assert first.equal(again) and not first.equal(second)
    assert second.equal(losses(model(other)).token_losses)


def test_evaluation_replays_nothing(small_dataset, recorders):
    heldout = heldout_batches(small_dataset, CONFIG, 8)
    with engine(small_dataset, CONFIG, 0, "cpu") as built:
        expected = built.evaluate(heldout, small_dataset.special.mask)
    with engine(small_dataset, with_graphs(CONFIG), 0, "cpu") as built:
        assert built.evaluate(heldout, small_dataset.special.mask) == expected
    assert recorders[0].recorded == 0


def test_gradients_outlive_the_next_replay():
    """Gradients add up over the packs of a step, so they may not be in a graph's buffers."""
    model = BertForPreTraining(MODEL, VOCAB, "cpu").train()
    graphed = GraphedModel(model, StandIn())
    for parameter in model.parameters():
        parameter.grad = None
    expected = [torch.zeros_like(parameter) for parameter in model.parameters()]
    for pack in packs():
        losses(graphed(pack)).loss.backward()
        expected = [
            total + part for total, part in zip(expected, computed(graphed, pack)[6:], strict=True)
        ]
    for parameter, total in zip(model.parameters(), expected, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, total)


def test_a_backward_pass_belongs_to_the_last_forward_pass():
    graphed = GraphedModel(BertForPreTraining(MODEL, VOCAB, "cpu").train(), StandIn())
    first, _, other = packs()
    found = losses(graphed(first))
    losses(graphed(other))  # of another shape, but in the same memory
    with pytest.raises(AssertionError, match="overwritten"):
        found.loss.backward()


@pytest.mark.parametrize(
    ("device", "impl", "stage", "words"),
    [
        ("cpu", "triton", 0, "needs a GPU, and this run is on cpu; set it to false"),
        (
            "cuda",
            "reference",
            0,
            'needs the Triton kernels, and runtime.kernels means "reference"; set it to "triton"',
        ),
        (
            "cuda",
            "triton",
            3,
            "does not go with zero_optimization.stage = 3, whose weights move; use stage 0, 1 or 2",
        ),
    ],
)
def test_what_cannot_be_captured_is_refused(device, impl, stage, words):
    with pytest.raises(InputError) as error:
        check_cuda_graphs("recipe.toml", device, impl, stage)
    assert str(error.value).startswith("recipe.toml: runtime.cuda_graphs = true ") and words in str(
        error.value
    )


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_what_can_be_captured_is_not(stage):
    check_cuda_graphs("recipe.toml", "cuda", "triton", stage)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU takes it")
def test_a_run_without_a_gpu_ends_before_it_writes(small_dataset, tmp_path: Path):
    trial = Laboratory(tmp_path, small_dataset.path).trial("runtime.cuda_graphs=true")
    with trial.start() as ranks:
        assert ranks.wait() == [2]
        (said,) = ranks[0].err.read_text().splitlines()
    assert "runtime.cuda_graphs = true needs a GPU, and this run is on cpu; set it to false" in said
    assert not trial.run.exists()


def test_torch_takes_what_the_recorder_gives_it():
    """The recorder for GPUs has never run, so at least the names of its arguments are checked."""
    inspect.signature(torch.cuda.graph.__init__).bind(
        None, None, pool=None, stream=None, capture_error_mode="thread_local"
    )
    assert callable(torch.cuda.CUDAGraph.replay) and callable(torch.cuda.graph_pool_handle)
