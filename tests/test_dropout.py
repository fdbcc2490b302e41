"""Dropout masks: kernels draw exactly the defined bits, and the definition looks random.

The bits are compared in the forward and the backward pass. The inputs are chosen so that masks can
be read from results and gradients.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert.config import BatchConfig, ObjectiveConfig, RunConfig
from fastbert.data.batches import Batches
from fastbert.data.examples import Examples
from fastbert_kernels import _triton as device_functions
from fastbert_kernels import dropout_add_layer_norm, embedding_layer_norm, varlen_attention
from fastbert_kernels._dropout import keep_mask, keep_scale, row_seeds, stream_keys, threshold
from fastbert_kernels.specs import SPECS
from tests.test_kernels import GPU, place, watched
from tests.tiers import slow
from tests.tiny_dataset import tiny_dataset, tiny_split

DEVICE = "cuda" if GPU else "cpu"
HARD_SEEDS = [0, -1, 2**63 - 1, -(2**63), 1, 2]  # the ends of int64, and neighbours
DOCUMENTS = [[5, 9, 4], [12, 15, 9, 20, 11, 8], [30, 31, 2, 29], [6, 6, 6, 6], [1, 1]] * 6


def draw(*size: int, seed: int = 1) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def bounds(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def run(
    impl: str,
    function: Callable[..., Tensor],
    leaves: dict[str, Tensor],
    upstream: Tensor,
    **others,
) -> dict[str, Tensor]:
    """Return the result and the gradients of `leaves`, on the CPU."""
    device = DEVICE if impl == "triton" else "cpu"
    leaves = {name: leaf.detach().to(device).requires_grad_() for name, leaf in leaves.items()}
    with watched(impl):
        result = function(**leaves, **place(others, device), impl=impl)
        result.backward(upstream.to(result))
    return {
        "result": result.detach().cpu(),
        **{f"d{name}": leaf.grad.cpu() for name, leaf in leaves.items() if leaf.grad is not None},
    }


# Attention. Where q or k is zero, all weights of a sequence of n tokens are 1 / n. Where row i of a
# matrix is zero except for 2^(i // K) in column i % K, a sum of its rows shows which rows are in
# it.


def coded(lengths: list[int], heads: int, size: int, dtype: torch.dtype) -> Tensor:
    """[sum of lengths, heads, size], rows numbered within each sequence."""
    index = torch.cat([torch.arange(length) for length in lengths])
    code = torch.zeros(len(index), size).scatter_(
        1, (index % size)[:, None], 2.0 ** (index // size)[:, None]
    )
    return code[:, None].expand(-1, heads, -1).to(dtype).contiguous()


def decoded(sums: Tensor, count: int) -> Tensor:
    """bool [..., count]: which of `count` rows are in each sum of coded rows [..., size]."""
    whole = sums.round()
    assert ((sums - whole).abs() < 0.1).all()  # bf16 rounds sums of up to 15 by less
    index = torch.arange(count)
    return (whole.long()[..., index % sums.shape[-1]] >> index // sums.shape[-1] & 1).bool()


def seen_in_attention(
    impl, lengths, size, dtype, query_indices, heads, p, seeds, stream
) -> dict[str, list[Tensor]]:
    """Read the masks [heads, rows, tokens] of each sequence.

    They come from the result, and from the gradients of v, q and k.
    """
    cu, scale = bounds(lengths), keep_scale(p)
    first_rows = cu if query_indices is None else torch.searchsorted(query_indices, cu.long())
    rows = first_rows.diff().tolist()
    tokens_code, rows_code = coded(lengths, heads, size, dtype), coded(rows, heads, size, dtype)
    no_tokens, no_rows = torch.zeros_like(tokens_code), torch.zeros_like(rows_code)
    first_of_tokens, first_of_rows = (
        coded([1] * sum(lengths), heads, size, dtype),
        coded([1] * sum(rows), heads, size, dtype),
    )
    others = {
        "cu_seqlens": cu,
        "max_seqlen": max(lengths),
        "dropout_p": p,
        "dropout_seeds": seeds,
        "dropout_stream": stream,
        "query_indices": query_indices,
        "scale": 1.0,
    }

    def attention(q, k, v, dout):
        outcome = run(impl, varlen_attention, {"q": q, "k": k, "v": v}, dout, **others)
        return {name: value.double() / scale for name, value in outcome.items()}

    values = attention(
        no_rows, no_tokens, tokens_code, rows_code
    )  # out_i sums v_j over kept j, dv_j sums dout_i over kept i
    # With dout_i . v_j = 1, dq_i sums (keep - share kept) k_j, dk_j sums (keep - share kept) q_i,
    # and out is the share kept.
    by_query = attention(no_rows, tokens_code, first_of_tokens, first_of_rows)
    by_key = attention(rows_code, no_tokens, first_of_tokens, first_of_rows)
    found = {"result": [], "dv": [], "dq": [], "dk": []}
    for b, (n, r) in enumerate(zip(lengths, rows, strict=True)):
        mine, own = (
            slice(int(first_rows[b]), int(first_rows[b + 1])),
            slice(int(cu[b]), int(cu[b + 1])),
        )
        share = by_query["result"][mine, :, :1] * n
        sums = {
            "result": values["result"][mine] * n,
            "dv": values["dv"][own] * n,
            "dq": by_query["dq"][mine] * n + share * tokens_code[own].double().sum(0) / n,
            "dk": by_key["dk"][own] * n + (share / n * rows_code[mine].double()).sum(0),
        }
        for name, of in sums.items():
            masks = decoded(of, r if name in ("dv", "dk") else n).transpose(0, 1)
            found[name].append(masks.transpose(1, 2) if name in ("dv", "dk") else masks)
    return found


@pytest.mark.parametrize("impl", ["triton", "cpu"])
@pytest.mark.parametrize("cut", [False, True], ids=["all", "cut"])
@pytest.mark.parametrize(
    ("dtype", "lengths", "size", "p"),
    [
        slow(torch.bfloat16, [1, 17, 64, 128, 2], 64, 0.5, id="one tile"),
        pytest.param(torch.bfloat16, [90, 3, 31], 48, 0.1, id="one tile, K=48"),
        pytest.param(torch.bfloat16, [130, 5], 64, 0.3, id="bf16"),
        slow(torch.float32, [7, 70], 32, 0.1, id="fp32"),
    ],
)
def test_attention_draws_the_defined_masks(impl, cut, dtype, lengths, size, p):
    heads, stream, total = 3, 40, sum(lengths)
    seeds = torch.tensor(HARD_SEEDS[: len(lengths)])
    query_indices = (
        torch.randperm(total, generator=torch.Generator().manual_seed(3))[: total // 3]
        .sort()
        .values
        if cut
        else None
    )
    found = seen_in_attention(impl, lengths, size, dtype, query_indices, heads, p, seeds, stream)

    rows = row_seeds(seeds, bounds(lengths), total)
    lo, hi = stream_keys(rows, stream, heads)
    for b, (start, end) in enumerate(itertools.pairwise(bounds(lengths).tolist())):
        mine = (
            torch.arange(start, end)
            if query_indices is None
            else query_indices[(query_indices >= start) & (query_indices < end)]
        )
        truth = keep_mask(lo[mine].T, hi[mine].T, end - start, p)
        for name, masks in found.items():
            assert torch.equal(masks[b], truth), f"{name}, sequence {b} of {end - start} tokens"


@pytest.mark.parametrize("impl", ["triton", "cpu"])
@pytest.mark.parametrize("size", [16, 255, 768])
def test_norm_draws_the_defined_masks(impl, size):
    """Kept elements of x = 1 on a residual of 0 exceed the mean; dropped ones have gradient 0."""
    rows, p, stream = 37, 0.5, 7
    seeds = torch.randint(-(2**63), 2**63 - 1, (rows,), generator=torch.Generator().manual_seed(2))
    leaves = {
        "x": torch.ones(rows, size),
        "bias": torch.zeros(size),
        "residual": torch.zeros(rows, size),
    }
    vectors = {"norm_weight": torch.ones(size), "norm_bias": torch.zeros(size)}
    seen = run(
        impl,
        dropout_add_layer_norm,
        leaves | vectors,
        draw(rows, size),
        dropout_p=p,
        dropout_seeds=seeds,
        dropout_stream=stream,
    )
    lo, hi = stream_keys(seeds, stream)
    truth = keep_mask(lo[:, 0], hi[:, 0], size, p)
    assert torch.equal(seen["result"] > 0, truth)
    assert torch.equal(seen["dx"] != 0, truth)
    assert (seen["dresidual"] != 0).all()


@pytest.mark.parametrize(
    "impl", [impl for impl in SPECS["embedding"].implementations if impl != "reference"]
)
@pytest.mark.parametrize("size", [16, 255, 768])
def test_embedding_draws_the_defined_masks(impl, size):
    """A norm_bias keeps every result away from 0, except for the dropped ones.

    In its gradient, dy = 2^row makes the rows readable.
    """
    rows, p, stream = 20, 0.5, 7  # sums below 2^24 are exact in fp32
    seeds = torch.randint(-(2**63), 2**63 - 1, (rows,), generator=torch.Generator().manual_seed(2))
    leaves = {
        "word_embeddings": draw(9, size),
        "position_embeddings": draw(5, size),
        "token_type_embeddings": draw(2, size),
        "norm_weight": torch.ones(size),
    }
    index = {
        "input_ids": torch.arange(rows) % 9,
        "position_ids": torch.arange(rows) % 5,
        "token_type_ids": torch.arange(rows) % 2,
    }
    upstream = (2.0 ** torch.arange(rows))[:, None].expand(rows, size)
    leaves["norm_bias"] = torch.full((size,), 50.0)
    seen = run(
        impl,
        embedding_layer_norm,
        leaves,
        upstream,
        **index,
        dropout_p=p,
        dropout_seeds=seeds,
        dropout_stream=stream,
    )
    lo, hi = stream_keys(seeds, stream)
    truth = keep_mask(lo[:, 0], hi[:, 0], size, p)
    assert torch.equal(seen["result"] != 0, truth)
    sums = (seen["dnorm_bias"].double() / keep_scale(p)).long()
    assert torch.equal((sums >> torch.arange(rows)[:, None] & 1).bool(), truth)


@triton.jit(do_not_specialize=["stream", "head", "first_column", "threshold"])
def masks_kernel(
    dropout_seeds_ptr,
    positions_ptr,
    mask_ptr,
    transposed_ptr,
    stream,
    head,
    first_column,
    threshold,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    seed = device_functions.row_seed(tl.load(dropout_seeds_ptr + row), tl.load(positions_ptr + row))
    lo, hi = device_functions.stream_keys(seed, stream, head)
    mask = device_functions.keep_mask(lo, hi, first_column, COLUMNS, threshold)
    tl.store(mask_ptr + row[:, None] * COLUMNS + column[None, :], mask.to(tl.int8))
    mask = device_functions.keep_mask_transposed(lo, hi, first_column, COLUMNS, threshold)
    tl.store(transposed_ptr + column[:, None] * ROWS + row[None, :], mask.to(tl.int8))


@pytest.mark.parametrize("first_column", [0, 64, 192, 8128])
@pytest.mark.parametrize("p", [2**-16, 0.1, 0.5, 1 - 2**-16])
def test_device_functions_are_the_definition(first_column, p):
    rows, columns, stream, head = 16, 64, 37, 15
    seeds = torch.tensor((HARD_SEEDS * 3)[:rows])
    lengths = [1, 2, 3, 128, 129, 8192, 50, 7] * 2  # the rows are the last tokens of sequences
    positions = torch.tensor(lengths, dtype=torch.int32) - 1
    mask, transposed = (
        torch.empty(shape, dtype=torch.int8, device=DEVICE)
        for shape in ((rows, columns), (columns, rows))
    )
    with watched("triton"):
        masks_kernel[(1,)](
            *(
                seeds.to(DEVICE),
                positions.to(DEVICE),
                mask,
                transposed,
                stream,
                head,
                first_column,
                threshold(p),
            ),
            ROWS=rows,
            COLUMNS=columns,
        )

    last = bounds(lengths)[1:].long() - 1
    lo, hi = stream_keys(row_seeds(seeds, bounds(lengths), sum(lengths))[last], stream, head + 1)
    truth = keep_mask(lo[:, head], hi[:, head], first_column + columns, p)[:, first_column:]
    assert torch.equal(mask.cpu().bool(), truth)
    assert torch.equal(transposed.T, mask)


# The masks of an example do not depend on its place


@pytest.mark.slow
def test_attention_does_not_depend_on_the_place_in_the_pack():
    """The longest sequence stays first in the tile schedule, and the others move."""
    lengths, seeds, heads, size = [12, 150, 7, 33], torch.tensor([5, 6, 7, 8]), 2, 32
    parts = [draw(n, 3, heads, size, seed=n) for n in lengths]
    found = []
    for order in ([0, 1, 2, 3], [3, 0, 2, 1]):
        q, k, v = torch.cat([parts[i] for i in order]).unbind(1)
        own = [lengths[i] for i in order]
        others = {
            "cu_seqlens": bounds(own),
            "max_seqlen": 150,
            "dropout_p": 0.3,
            "dropout_seeds": seeds[order],
            "dropout_stream": 2,
        }
        outcome = run("triton", varlen_attention, {"q": q, "k": k, "v": v}, q, **others)
        found.append(
            {
                (name, i): part
                for name, x in outcome.items()
                for i, part in zip(order, x.split(own), strict=True)
            }
        )
    assert all(torch.equal(part, found[1][name]) for name, part in found[0].items())


def test_padding_of_a_pack_leaves_the_keys_of_its_tokens_as_they_are():
    """Padding is tokens after the last sequence and empty sequences at the end.

    These tokens have seeds of their own.
    """
    seeds, cu = torch.tensor(HARD_SEEDS[1:4]), bounds([5, 1, 7])
    bare = row_seeds(seeds, cu, 13)
    assert torch.equal(row_seeds(seeds, cu, 20)[:13], bare)
    more = torch.cat((seeds, torch.tensor([8, 9])))
    assert torch.equal(row_seeds(more, bounds([5, 1, 7, 0, 0]), 20)[:13], bare)
    assert len(row_seeds(seeds, cu, 20).unique()) == 20
    assert len(row_seeds(seeds[:0], bounds([]), 4).unique()) == 4


@pytest.mark.parametrize("world", [2, 4])
def test_masks_do_not_depend_on_the_number_of_ranks(tmp_path, world):
    config = RunConfig(
        data="dataset", seed=1, batch=BatchConfig(16, 32, 128), objective=ObjectiveConfig()
    )
    batches = Batches(tiny_dataset(tmp_path / "dataset", DOCUMENTS), config)

    def drawn(step: int, world: int) -> dict[int, list[int]]:
        """Return row seeds by example."""
        found = {}
        for pack in (pack for rank in range(world) for pack in batches.step(step, rank, world)):
            rows = row_seeds(pack.dropout_seeds, pack.cu_seqlens, pack.tokens).split(
                pack.cu_seqlens.diff().tolist()
            )
            found |= {
                int(example): seeds.tolist()
                for example, seeds in zip(pack.examples, rows, strict=True)
            }
        return found

    for step in (0, 9):
        alone = drawn(step, 1)
        assert len(alone) == 16
        assert drawn(step, world) == alone


# The definition looks random. Masks are scaled to mean 0 and variance 1. A sum of n products of
# independent ones is then within 5 sqrt(n).

AXES = ("example", "position", "stream", "head", "column")
RATES = (0.01, 0.1, 0.25, 0.5, 0.75, 0.9)
SIGMAS = 5


def scaled(kept: Tensor, p: float) -> Tensor:
    mean = 1 / keep_scale(p)
    return (kept.float() - mean) / (mean * (1 - mean)) ** 0.5


def masks_of(
    seeds: Tensor,
    p: float,
    positions: int = 32,
    streams: int = 3,
    heads: int = 4,
    columns: int = 512,
) -> Tensor:
    """Scaled masks [example, position, stream, head, column] of sequences of one length."""
    rows = row_seeds(seeds, bounds([positions] * len(seeds)), positions * len(seeds))
    words = [stream_keys(rows, stream, heads) for stream in range(streams)]
    kept = torch.stack([keep_mask(lo, hi, columns, p) for lo, hi in words], 1)
    return scaled(kept.view(len(seeds), positions, streams, heads, columns), p)


def moved(x: Tensor, lags: dict[str, int]) -> tuple[Tensor, Tensor]:
    """Return the elements that have a partner `lags` further, and those partners."""
    here, there = [slice(None)] * 5, [slice(None)] * 5
    for axis, lag in lags.items():
        here[AXES.index(axis)] = slice(max(-lag, 0), -lag if lag > 0 else None)
        there[AXES.index(axis)] = slice(max(lag, 0), lag if lag < 0 else None)
    return x[tuple(here)], x[tuple(there)]


def deviations(x: Tensor) -> dict[str, float]:
    """Return deviations from a random mask, in standard deviations.

    They cover the share kept, the spread of counts of rows and columns, and products of pairs and
    triples of elements.
    """
    found = {"share": float(x.mean()) * x.numel() ** 0.5}
    for what, counts in (("row", x.sum(-1).flatten()), ("column", x.flatten(0, 3).sum(0))):
        terms = x.numel() // len(counts)
        excess = (
            float((x.square() - 1).square().mean()) - 2
        )  # of x's fourth moment over that of a normal distribution
        found[f"spread of counts in a {what}"] = (
            float((counts.square() / terms).mean() - 1)
            * (len(counts) / (2 + excess / terms)) ** 0.5
        )
    pairs: list[dict[str, int]] = [{"column": 2**i} for i in range(int(math.log2(x.shape[-1])))] + [
        {"column": 3}
    ]
    for axis in AXES[:-1]:
        pairs += [
            {axis: lag, "column": column} for lag in (1, 2) for column in (-8, -2, -1, 0, 1, 2, 8)
        ]
    for lags in pairs:
        a, b = moved(x, lags)
        found[f"pairs {lags} apart"] = float((a * b).mean()) * a.numel() ** 0.5
    for lag in (1, 2, 4):
        product = x[..., : -2 * lag] * x[..., lag:-lag] * x[..., 2 * lag :]
        found[f"triples of columns {lag} apart"] = float(product.mean()) * product.numel() ** 0.5
    halves = x.unflatten(-1, (-1, 2, 8))  # columns c and c + 8 of 16 share a word
    for what, other in (
        ("mirrored columns", x.flip(-1)),
        ("halves of a word swapped", halves.flip(-2).flatten(-3)),
    ):
        found[f"next position, {what}"] = (
            float((x[:, 1:] * other[:, :-1]).mean()) * x[:, 1:].numel() ** 0.5
        )
    both = halves.prod(-2)
    found["halves of a word"] = float(both.mean()) * both.numel() ** 0.5
    shares = x.flatten(0, 3).mean(0) * x[..., 0].numel() ** 0.5
    found["share of the worst column"] = float(shares[shares.abs().argmax()])
    return found


def assert_random(x: Tensor) -> None:
    far = {what: round(z, 1) for what, z in deviations(x).items() if not abs(z) < SIGMAS}
    assert not far


@pytest.mark.parametrize("p", RATES)
def test_masks_of_consecutive_keys_are_random_in_every_direction(p):
    assert_random(masks_of(torch.arange(16), p))


def test_keys_that_differ_in_high_bits_alone_are_as_good():
    assert_random(masks_of(torch.arange(16) << 48, 0.1))


@pytest.mark.parametrize("p", [2**-16, 1 - 2**-16])
def test_share_kept_at_the_ends(p):
    """Measure it on four million elements, two of each row."""
    x = masks_of(torch.arange(2_000), p, positions=1000, streams=1, heads=1, columns=2)
    assert abs(float(x.double().mean())) < SIGMAS / x.numel() ** 0.5


def test_masks_of_epochs_and_seeds_are_random(tmp_path):
    """Masks of the same examples, with the seeds that training uses.

    The axis "stream" holds the epochs, and "head" holds the seeds.
    """
    split = tiny_split(tmp_path / "train", DOCUMENTS)
    indices, epochs, seeds = np.arange(16), range(4), range(4)
    seeds = torch.tensor(
        np.stack(
            [
                [
                    Examples(split, ObjectiveConfig(), 32, seed, "test").draw(epoch, indices).keys
                    for seed in seeds
                ]
                for epoch in epochs
            ]
        )
    )
    assert len(seeds.unique()) == seeds.numel()
    x = (
        masks_of(seeds.flatten(), 0.1, streams=1, heads=1)
        .view(4, 4, 16, 32, 512)
        .permute(2, 3, 0, 1, 4)
    )
    assert_random(x)


def rows_of(words: Callable[[Tensor, Tensor], Tensor], p: float) -> Tensor:
    """Return scaled masks as in `masks_of`, from random 32-bit words by row and column pair."""
    x = (words(torch.arange(16 * 32 * 3 * 4)[:, None], torch.arange(256)) & 0xFFFFFFFF).unflatten(
        -1, (-1, 8)
    )
    return scaled(
        (torch.stack((x & 0xFFFF, x >> 16), -2) >= threshold(p)).view(16, 32, 3, 4, 512), p
    )


def mixed(x: Tensor) -> Tensor:
    x = x & 0xFFFFFFFF
    return (x ^ x >> 15) * 0x735A2D97


def random_words(row: Tensor) -> tuple[Tensor, Tensor]:
    lo, hi = stream_keys(row[:, 0], 0)
    return lo, hi


def same_half_twice(row: Tensor, pair: Tensor) -> Tensor:
    half = mixed((random_words(row)[0] | 1) * pair + random_words(row)[1]) & 0xFFFF
    return half | half << 16


BAD_GENERATORS = {
    "the same half for both columns of a word": (same_half_twice, "halves of a word"),
    "one key a row: neighbours are shifted": (
        lambda row, pair: mixed(pair + row),
        "pairs {'head': 1, 'column': -1} apart",
    ),
    "a factor without an addend: the first word is 0": (
        lambda row, pair: mixed((random_words(row)[0] | 1) * pair),
        "spread of counts in a column",
    ),
    "a progression that nothing breaks up": (
        lambda row, pair: (random_words(row)[0] | 1) * pair + random_words(row)[1],
        "triples of columns 1 apart",
    ),
    "seed XOR index: rows are each other's permutations": (
        lambda row, pair: random_words((row ^ pair).view(-1, 1))[0].view(len(row), -1),
        "pairs {'head': 1, 'column': 1} apart",
    ),
}


@pytest.mark.parametrize("name", BAD_GENERATORS)
def test_bad_generators_are_found(name):
    words, statistic = BAD_GENERATORS[name]
    found = deviations(rows_of(words, 0.1))
    assert abs(found[statistic]) > 2 * SIGMAS, {what: round(z, 1) for what, z in found.items()}


def test_a_good_generator_in_place_of_the_bad_ones_passes():
    assert_random(
        rows_of(
            lambda row, pair: mixed((random_words(row)[0] | 1) * pair + random_words(row)[1]), 0.1
        )
    )


@pytest.mark.parametrize("p", [0.1, 1 / 3, 1e-4])
def test_the_scale_makes_up_for_what_is_really_dropped(p):
    """That is a whole number of the 65,536 values, not p itself."""
    assert keep_scale(p) * (65536 - threshold(p)) == pytest.approx(65536, rel=1e-12)
