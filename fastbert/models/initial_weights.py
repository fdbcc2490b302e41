"""Initial weights: those of BERT's own code, or with heads that attend to neighbouring tokens.

For its first thousands of steps, a small BERT predicts no better than the unigram frequencies,
until some head has found the previous and the next token (docs/demo.md). With
`initial_attention = "adjacent"` training starts past that plateau. The position embeddings are
sinusoids, and head h of the first layer compares positions only: its queries are shifted by
d = -1, 1, -2, 2, ..., so that its attention peaks at the token d places away. With frequencies w,
and two rows of a head for each w,

    q(i) = g [sin w(i + d), cos w(i + d)]      k(j) = g [sin wj, cos wj]
    q(i) k(j) = g^2 sum over w of cos w(i + d - j)

Since sin w(i + d) = cos wd sin wi + sin wd cos wi, q is a rotation of the sinusoids in the
embedding of i. The values and the output matrix of the layer start with a larger spread: with the
ordinary one, training lost these heads before later layers had learned to use them. All of these
are ordinary weights, and training changes them like any others.

Source: Vaswani et al., 2017, section 3.5, which chose sinusoids because a shift of them is linear.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from fastbert.config import BertConfig

# The sinusoids are six times as strong as the word embeddings. These double within 120 steps, and
# at a ratio of three their share of q and k drowned the peak before later layers had learned to
# use it. Training evens out the ratio.
_POSITIONS_OVER_WORDS = 6.0
_GAIN = 2.5
# The other heads of the first layer stay free for distant tokens, which next-sentence prediction
# needs.
_SHIFTED_HEADS = 2


@torch.no_grad()
def initialise(parameters: Mapping[str, Tensor], config: BertConfig) -> None:
    """Initialise all parameters of a BertForPreTraining in place.

    Matrices and tables are drawn from Normal(0, initializer_range), biases are zero, and LayerNorm
    is the identity. With `initial_attention = "adjacent"` the weights named in the module's
    docstring are then replaced.

    Args:
        parameters: every parameter by its name in the model.

    Source: Devlin et al., 2019, their code.
    """
    for name, parameter in parameters.items():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=config.initializer_range)
        else:
            torch.nn.init.constant_(parameter, 1.0 if name.endswith("norm_weight") else 0.0)
    if config.initial_attention == "adjacent":
        # A matrix with this standard deviation preserves the scale of its input.
        full = config.hidden_size**-0.5
        table = parameters["embeddings.position"]
        # sqrt(2) makes the root mean square of a sinusoid 1.
        amplitude = math.sqrt(2) * _POSITIONS_OVER_WORDS * config.initializer_range
        table.copy_(sinusoids(*table.shape) * amplitude)
        qkv = parameters["layers.0.attention.qkv_weight"].view(
            3, config.num_attention_heads, config.head_size, config.hidden_size
        )
        for head in range(min(_SHIFTED_HEADS, config.num_attention_heads)):
            shift = (head // 2 + 1) * (1 if head % 2 else -1)
            qkv[0, head] = _GAIN * shifted_sinusoids(config.head_size, config.hidden_size, shift)
            qkv[1, head] = _GAIN * shifted_sinusoids(config.head_size, config.hidden_size, 0)
        # This covers all heads of the layer: the values of the shifted heads feed MLM, those of
        # the others feed NSP.
        torch.nn.init.normal_(qkv[2], std=full)
        torch.nn.init.normal_(parameters["layers.0.attention.output.weight"], std=full)
        # Next to such strong positions, the token types must be as strong to be distinguishable.
        torch.nn.init.normal_(
            parameters["embeddings.token_type"],
            std=_POSITIONS_OVER_WORDS * config.initializer_range,
        )
        for name in ("nsp_head.pooler.weight", "nsp_head.classifier.weight"):
            torch.nn.init.normal_(parameters[name], std=full)


def frequencies(size: int) -> Tensor:
    """float32 [size / 2]: radians per token, falling from 1 to about 1 / 10,000."""
    return torch.exp(torch.arange(0, size, 2) * (-math.log(10_000) / size))


def sinusoids(positions: int, size: int) -> Tensor:
    """float32 [positions, size]: sines in the first half of the columns, cosines in the second."""
    angles = torch.arange(positions)[:, None] * frequencies(size)
    return torch.cat((angles.sin(), angles.cos()), dim=1)[:, :size]


def shifted_sinusoids(rows: int, size: int, shift: int) -> Tensor:
    """Return the matrix [rows, size] that maps the sinusoids of position i to those of i + shift.

    It does so for the rows / 2 highest frequencies.
    """
    w = frequencies(size)[: rows // 2] * shift
    matrix = torch.zeros(rows, size)
    even, sine = torch.arange(0, rows, 2), torch.arange(len(w))
    cosine = sine + size // 2
    matrix[even, sine] = w.cos()
    matrix[even, cosine] = w.sin()
    matrix[even + 1, sine] = -w.sin()
    matrix[even + 1, cosine] = w.cos()
    return matrix
