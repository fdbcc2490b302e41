"""`embedding_layer_norm`: the input of BERT."""

import torch

from fastbert_kernels._checks import check_dropout, check_implementation, check_tensor
from fastbert_kernels.embedding.cpu import cpu
from fastbert_kernels.embedding.reference import reference

_IMPLEMENTATIONS = {"cpu": cpu, "reference": reference}


def embedding_layer_norm(
    ids: torch.Tensor,
    positions: torch.Tensor,
    segments: torch.Tensor,
    words: torch.Tensor,
    position_table: torch.Tensor,
    segment_table: torch.Tensor,
    weight: torch.Tensor,
    shift: torch.Tensor,
    *,
    eps: float = 1e-12,
    dropout_p: float = 0.0,
    keys: torch.Tensor | None = None,
    site: int = 0,
    impl: str = "reference",
) -> torch.Tensor:
    """dropout(LayerNorm(words[ids] + position_table[positions] + segment_table[segments])).

    Args:
        ids, positions, segments: int64 [T].
        words: [V, D], fp32, fp16 or bf16. position_table: [P, D]. segment_table: [S, D]. All as words.
        weight, shift: [D], LayerNorm's gamma and beta, as words.
        eps: added to the variance.
        dropout_p: probability to drop an element, rounded to a multiple of 2**-16.
        keys: int64 [T], one key a row (`row_keys`). site: which operation of the model this is.
        impl: "cpu" or "reference".

    Returns:
        [T, D], as words; the gradients of the tables are summed in a fixed order.

    Raises:
        ValueError: a shape that does not fit, dropout without keys, an unknown `impl`.
        TypeError: a dtype that does not fit.
        IndexError: an id outside its table (on a CPU).

    Source: Devlin et al., 2019, section 3 and figure 2.
    """
    name = "embedding_layer_norm"
    check_tensor(name, "ids", ids, ("T",), torch.int64)
    for label, rows in (("positions", positions), ("segments", segments)):
        check_tensor(name, label, rows, (ids.shape[0],), torch.int64)
    check_tensor(name, "words", words, ("V", "D"), (torch.float32, torch.float16, torch.bfloat16, torch.float64))
    for label, table in (("position_table", position_table), ("segment_table", segment_table)):
        check_tensor(name, label, table, ("rows", words.shape[1]), words.dtype)
    for label, row in (("weight", weight), ("shift", shift)):
        check_tensor(name, label, row, (words.shape[1],), words.dtype)
    check_dropout(name, dropout_p, keys, ids.shape[0])
    check_implementation(name, impl, tuple(_IMPLEMENTATIONS))
    arguments = (ids, positions, segments, words, position_table, segment_table, weight, shift, eps, dropout_p, keys, site)
    return _IMPLEMENTATIONS[impl](*arguments)
