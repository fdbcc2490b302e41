"""Where the weights start: as in BERT's own code, or with heads that already look at the neighbouring tokens.

A small BERT sits on the unigram for its first thousands of steps, until some head has found the previous and the next token
(docs/demo.md). `initial_attention = "adjacent"` starts it behind that plateau: the position embeddings are sinusoids, and head h
of the first layer compares positions only, turned by a shift d = -1, 1, -2, 2, ... so that it peaks at the token d places on. With
frequencies w, and a pair of rows of a head for each w,

    q(i) = g [sin w(i + d), cos w(i + d)]      k(j) = g [sin wj, cos wj]      q(i) k(j) = g^2 sum over w of cos w(i + d - j)

and as sin w(i + d) = cos wd sin wi + sin wd cos wi, q is a rotation of the sinusoids that the embedding of i holds. Values and output
of the layer start strong enough to be heard: with ordinary ones these heads were lost before anything behind them had learned to use
them. Nothing is fixed: these are weights like any others, and training goes on from them.

Source: Vaswani et al., 2017, section 3.5, which chose sinusoids because a shift of them is linear.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from fastbert.config import ModelConfig

# Sinusoids six times as strong as the words: words double within 120 steps, and at three times their share of q and k drowned
# the peak before the rest of the model had learned to use it. Training evens it out.
_POSITIONS_OVER_WORDS = 6.0
_GAIN = 2.5
_SHIFTED_HEADS = 2  # the rest of the first layer is free for what is further away: next-sentence prediction needs it


@torch.no_grad()
def initialise(parameters: Mapping[str, Tensor], config: ModelConfig) -> None:
    """Fill all parameters of a BertForPreTraining, by name, in place.

    Matrices and tables are Normal(0, initializer_range), biases zero, LayerNorm the identity (Devlin et al., 2019, their code).
    """
    for name, parameter in parameters.items():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=config.initializer_range)
        else:
            torch.nn.init.constant_(parameter, 1.0 if name.endswith("norm_weight") else 0.0)
    if config.initial_attention == "adjacent":
        full = config.hidden_size**-0.5  # what goes through a matrix of this spread keeps its size
        table = parameters["embeddings.position"]
        table.copy_(
            sinusoids(*table.shape)
            * (math.sqrt(2) * _POSITIONS_OVER_WORDS * config.initializer_range)
        )
        qkv = parameters["layers.0.attention.qkv_weight"].view(
            3, config.num_attention_heads, config.head_size, config.hidden_size
        )
        for head in range(min(_SHIFTED_HEADS, config.num_attention_heads)):
            shift = (head // 2 + 1) * (1 if head % 2 else -1)
            qkv[0, head] = _GAIN * shifted_sinusoids(config.head_size, config.hidden_size, shift)
            qkv[1, head] = _GAIN * shifted_sinusoids(config.head_size, config.hidden_size, 0)
        # All heads of this layer: what the shifted ones pass on feeds MLM, what the others do feeds NSP.
        torch.nn.init.normal_(qkv[2], std=full)
        torch.nn.init.normal_(parameters["layers.0.attention.output.weight"], std=full)
        # Next to such positions the segments must be as strong to be told apart.
        torch.nn.init.normal_(
            parameters["embeddings.token_type"],
            std=_POSITIONS_OVER_WORDS * config.initializer_range,
        )
        for name in ("nsp_head.pooler.weight", "nsp_head.classifier.weight"):
            torch.nn.init.normal_(parameters[name], std=full)


def frequencies(size: int) -> Tensor:
    """[size / 2], radians a token, falling from 1 to about 1 / 10,000."""
    return torch.exp(torch.arange(0, size, 2) * (-math.log(10_000) / size))


def sinusoids(positions: int, size: int) -> Tensor:
    """[positions, size] in [-1, 1]: sines in the first half of the columns, cosines in the second."""
    angles = torch.arange(positions)[:, None] * frequencies(size)
    return torch.cat((angles.sin(), angles.cos()), dim=1)[:, :size]


def shifted_sinusoids(rows: int, size: int, shift: int) -> Tensor:
    """[rows, size]: the matrix that takes the sinusoids of position i to those of i + shift, for the rows / 2 highest frequencies."""
    w = frequencies(size)[: rows // 2] * shift
    matrix = torch.zeros(rows, size)
    even, sine = torch.arange(0, rows, 2), torch.arange(len(w))
    cosine = sine + size // 2
    matrix[even, sine] = w.cos()
    matrix[even, cosine] = w.sin()
    matrix[even + 1, sine] = -w.sin()
    matrix[even + 1, cosine] = w.cos()
    return matrix
