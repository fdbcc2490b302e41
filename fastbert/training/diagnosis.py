"""Is my loss normal? Rules on what was measured, each a pure function that gives one line (what, likely causes, what to try) or None.

A masked-language model first learns how frequent tokens are and sits there, on the plateau of the unigram, until its attention has found
the neighbouring tokens. The loss over all selected positions hides that, since a tenth of them are left in place and can be copied;
the loss on [MASK] positions alone does not. Hence the second is what is compared with the corpus's own baselines.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from statistics import median

FIRST_LOSS_TOLERANCE = 0.06  # of the expected loss; wide models start higher, by half the variance of their first logits
PLATEAU_SHARE = 0.3  # of the run: by then the plateau should be behind
PLATEAU_MARGIN = 0.2  # nats below the unigram that count as having left it
DIVERGED = 2.0  # times the loss of a model that knows nothing
NSP_SHARE = 0.5
NSP_MARGIN = 0.02  # nats below ln 2
NORM_WINDOW = 100  # steps
NORM_FACTOR = 10.0  # times the median of the window
NORM_STEPS = 3  # in a row: a single bad batch is no explosion


def expected_first_loss(vocab_size: int, pairs: bool) -> float:
    """ln V + ln 2 nats: a model that knows nothing gives every token and every class the same probability."""
    return math.log(vocab_size) + (math.log(2) if pairs else 0.0)


def first_loss(loss: float, vocab_size: int, pairs: bool) -> str | None:
    """The loss of the first batch, before any update."""
    expected = expected_first_loss(vocab_size, pairs)
    if abs(loss - expected) <= FIRST_LOSS_TOLERANCE * expected:
        return None
    what = f"the first loss is {loss:.2f}, expected is {expected:.2f} (ln {vocab_size}{' + ln 2' if pairs else ''})"
    if loss > expected:
        return f"{what}: the start is too wild; try model.initializer_range = 0.02, or less for a wide model"
    return f"{what}: labels may be visible in the input; check objective.mask_token and that the text does not repeat one sentence"


def diverged(loss: float, vocab_size: int, pairs: bool) -> str | None:
    """The held-out loss against that of a model that knows nothing. Where this is_main, the rules below have nothing to add."""
    expected = expected_first_loss(vocab_size, pairs)
    if loss <= DIVERGED * expected:
        return None
    what = (
        f"the held-out loss is {loss:.3g}"
        if math.isfinite(loss)
        else "the held-out loss is not finite"
    )
    return (
        f"{what}, a model that knows nothing has {expected:.2f}: training has diverged; "
        "try a lower optimizer.lr, a longer schedule.warmup, or optimizer.max_grad_norm = 1.0 where it is 0"
    )


def plateau(share: float, loss_on_mask: float, baselines: Mapping[str, float]) -> str | None:
    """Held-out loss on [MASK] positions against the unigram, after a share of the run."""
    unigram = baselines["unigram"]
    if (
        share < PLATEAU_SHARE
        or not math.isfinite(loss_on_mask)
        or loss_on_mask < unigram - PLATEAU_MARGIN
    ):
        return None
    return (
        f"after {share:.0%} of the run the held-out loss on [MASK] is {loss_on_mask:.2f}, no better than word frequencies ({unigram:.2f}): "
        "the model has not found its neighbours yet; try a longer run, a longer warm-up or another optimizer.lr (half, then double), "
        'model.initial_attention = "adjacent", fewer layers, or a smaller batch (more steps)'
    )


def stuck_pairs(share: float, loss_nsp: float | None, accuracy_nsp: float | None) -> str | None:
    """Held-out NSP loss against a coin, after a share of the run."""
    if (
        loss_nsp is None
        or accuracy_nsp is None
        or not math.isfinite(loss_nsp)
        or share < NSP_SHARE
        or loss_nsp < math.log(2) - NSP_MARGIN
    ):
        return None
    return (
        f"after {share:.0%} of the run the held-out NSP loss is {loss_nsp:.3f}, that of a coin (ln 2 = 0.693), accuracy {accuracy_nsp:.0%}: "
        "NSP starts late, once words are learned; a longer run may do, else see the data report for documents of a single sentence, "
        'or train without pairs: objective.kind = "mlm"'
    )


def compare(loss_on_mask: float, baselines: Mapping[str, float]) -> str:
    """Where a held-out loss on [MASK] stands among the corpus's baselines: the lowest that it is below, and the next."""
    order = sorted(
        ((value, name) for name, value in baselines.items() if name in NAMES), reverse=True
    )
    beaten = [(value, name) for value, name in order if loss_on_mask < value]
    ahead = [(value, name) for value, name in order if loss_on_mask >= value]
    parts = []
    if beaten:
        parts.append(f"below {NAMES[beaten[-1][1]]} ({beaten[-1][0]:.2f})")
    if ahead:
        parts.append(f"above {NAMES[ahead[0][1]]} ({ahead[0][0]:.2f})")
    return ", ".join(parts)


NAMES = {
    "unigram": "word frequencies",
    "left_bigram": "the left neighbour",
    "two_sided_bigram": "both neighbours",
    "two_sided_trigram": "two neighbours a side",
}


class GradientNorm:
    """Watches the norm of the gradient against its running median."""

    def __init__(self) -> None:
        self._window: deque[float] = deque(maxlen=NORM_WINDOW)
        self._above = 0

    def add(self, step: int, norm: float) -> str | None:
        """Take the next step's norm; a line when NORM_STEPS in a row are far above what was usual before them."""
        usual = median(self._window) if len(self._window) == NORM_WINDOW else math.inf
        if norm <= NORM_FACTOR * usual:
            self._window.append(norm)
            self._above = 0
            return None
        self._above += 1
        if self._above < NORM_STEPS:
            return None
        return (
            f"the gradient norm is {norm:.3g} at step {step}, {norm / usual:.0f} times its running median: training is coming apart; "
            "try a lower optimizer.lr, a longer schedule.warmup, or optimizer.max_grad_norm = 1.0 where it is 0"
        )
