"""Is my loss normal? Rules that compare measured losses with what a healthy run shows.

Each rule is a pure function. It returns one line (what, likely causes, what to try) or None. What
to try depends on the recipe: nothing is advised that is set already.

A masked language model first learns how frequent tokens are. It stays on that plateau, the loss of
the unigram, until its attention has found the neighbouring tokens. The loss over all selected
positions hides the plateau, since a tenth of them are left unchanged and can be copied. The loss
on [MASK] positions alone shows it. So that loss is compared with the corpus's own baselines.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from statistics import median

from fastbert.config import BertConfig, RunConfig

# As a fraction of the expected loss. Wide models start higher, by half the variance of their first
# logits.
FIRST_LOSS_TOLERANCE = 0.06
PLATEAU_SHARE = 0.3  # fraction of the run by which the plateau should be passed
PLATEAU_MARGIN = 0.2  # nats below the unigram that count as having left the plateau
EARLY = 200  # steps before which a model has learned too little for a verdict
DIVERGED = 2.0  # multiple of the loss of an untrained model
NSP_SHARE = 0.5  # fraction of the run by which NSP should have started
NSP_MARGIN = 0.02  # nats below ln 2 that count as better than chance
NORM_WINDOW = 100  # steps
NORM_FACTOR = 10.0  # multiple of the window's median
STEPS_IN_A_ROW = 3  # since a single bad batch is not divergence


def expected_first_loss(vocab_size: int, pairs: bool) -> float:
    """The loss of an untrained model, ln V + ln 2 nats (ln V without pairs).

    Such a model gives every token and every class the same probability.
    """
    return math.log(vocab_size) + (math.log(2) if pairs else 0.0)


def first_loss(loss: float, vocab_size: int, recipe: RunConfig) -> str | None:
    """Check the loss of the first batch, in nats, before any update."""
    pairs = recipe.objective.pairs
    expected = expected_first_loss(vocab_size, pairs)
    if abs(loss - expected) <= FIRST_LOSS_TOLERANCE * expected:
        return None
    formula = f"ln {vocab_size}{' + ln 2' if pairs else ''}"
    what = f"the first loss is {loss:.2f}, expected is {expected:.2f} ({formula})"
    if loss > expected:
        scale = recipe.model.initializer_range
        advice = "= 0.02" if scale > 0.02 else f"below the present {scale:g}"
        return f"{what}: the initial weights are too large; try model.initializer_range {advice}"
    return (
        f"{what}: labels may be visible in the input; "
        "check objective.mask_token and that the text does not repeat one sentence"
    )


def diverged(
    loss: float, vocab_size: int, recipe: RunConfig, what: str = "the held-out loss"
) -> str | None:
    """Check a loss against that of an untrained model, in nats.

    Where this rule returns a line, the rules below have nothing to add.

    Args:
        loss: the held-out loss, or that of a training batch.
        vocab_size: V.
        recipe: the run's.
        what: what the loss is called in the line.
    """
    expected = expected_first_loss(vocab_size, recipe.objective.pairs)
    if loss <= DIVERGED * expected:
        return None
    value = f"{loss:.3g}" if math.isfinite(loss) else "not finite"
    untrained = f"an untrained model has {expected:.2f}"
    return f"{what} is {value}, {untrained}: training has diverged; {_calmer(recipe)}"


def _calmer(recipe: RunConfig) -> str:
    """What to try where the training diverges."""
    clip = recipe.optimizer.max_grad_norm
    lower = "optimizer.max_grad_norm = 1.0" if not 0 < clip <= 1 else ""
    longer = f"a longer schedule.warmup than {recipe.schedule.warmup:g}"
    parts = [f"a lower optimizer.lr than {recipe.optimizer.lr:g}", longer, lower]
    return "try " + ", or ".join(part for part in parts if part)


def plateau(
    share: float, loss_on_mask: float, baselines: Mapping[str, float], recipe: RunConfig
) -> str | None:
    """Check the held-out loss on [MASK] positions, in nats, against the unigram.

    Args:
        share: how much of the run is done, 0 to 1.
        loss_on_mask: mean over the positions that show [MASK].
        baselines: the corpus's baselines by name, in nats.
        recipe: the run's.
    """
    unigram = baselines["unigram"]
    if (
        share < PLATEAU_SHARE
        or not math.isfinite(loss_on_mask)
        or loss_on_mask < unigram - PLATEAU_MARGIN
    ):
        return None
    advice = [
        "a longer run",
        f"another optimizer.lr than {recipe.optimizer.lr:g} (half, then double)",
        f"a longer schedule.warmup than {recipe.schedule.warmup:g}",
        'model.initial_attention = "adjacent"',
        "fewer layers",
        "a smaller batch (more steps)",
    ]
    model = recipe.model
    uniform = isinstance(model, BertConfig) and model.initial_attention == "uniform"
    if not uniform or recipe.init is not None:
        del advice[3]
    if model.num_hidden_layers <= 2:
        advice.remove("fewer layers")
    return (
        f"after {share:.0%} of the run the held-out loss on [MASK] is {loss_on_mask:.2f}, "
        f"{_beside_frequencies(loss_on_mask, unigram)}: "
        f"the model has not found its neighbours yet; try {', '.join(advice[:-1])}, or {advice[-1]}"
    )


def _beside_frequencies(loss_on_mask: float, unigram: float) -> str:
    """Where a loss is beside that of the unigram: below it only by a clear margin."""
    if abs(loss_on_mask - unigram) < PLATEAU_MARGIN:
        word = "near"
    else:
        word = "below" if loss_on_mask < unigram else "above"
    return f"{word} {NAMES['unigram']} ({unigram:.2f})"


def stuck_pairs(share: float, loss_nsp: float | None, accuracy_nsp: float | None) -> str | None:
    """Check the held-out NSP loss against chance (ln 2 nats).

    Args:
        share: how much of the run is done, 0 to 1.
        loss_nsp, accuracy_nsp: None where the objective has no pairs.
    """
    if (
        loss_nsp is None
        or accuracy_nsp is None
        or not math.isfinite(loss_nsp)
        or share < NSP_SHARE
        or loss_nsp < math.log(2) - NSP_MARGIN
    ):
        return None
    what = f"after {share:.0%} of the run the held-out NSP loss is {loss_nsp:.3f}"
    if loss_nsp > math.log(2) + NSP_MARGIN:
        return (
            f"{what}, worse than chance (ln 2 = 0.693), accuracy {accuracy_nsp:.0%}: "
            "the head is sure of answers that do not hold for other documents, or there are few "
            "held-out pairs; try more text, or a larger evaluate.sequences, "
            'or train without pairs: objective.kind = "mlm"'
        )
    return (
        f"{what}, no better than chance (ln 2 = 0.693), accuracy {accuracy_nsp:.0%}: "
        "NSP starts late, once words are learned; a longer run may do, "
        "else see the data report for documents of a single sentence, "
        'or train without pairs: objective.kind = "mlm"'
    )


def compare(loss_on_mask: float, baselines: Mapping[str, float]) -> str:
    """Place a held-out loss on [MASK] between the nearest two of the corpus's baselines."""
    order = sorted(
        ((value, name) for name, value in baselines.items() if name in NAMES), reverse=True
    )
    unigram = baselines.get("unigram", math.inf)
    if abs(loss_on_mask - unigram) < PLATEAU_MARGIN:
        return _beside_frequencies(loss_on_mask, unigram)
    above = [(value, name) for value, name in order if loss_on_mask < value]
    below = [(value, name) for value, name in order if loss_on_mask >= value]
    parts = []
    if above:
        parts.append(f"below {NAMES[above[-1][1]]} ({above[-1][0]:.2f})")
    if below:
        parts.append(f"above {NAMES[below[0][1]]} ({below[0][0]:.2f})")
    return ", ".join(parts)


NAMES = {
    "unigram": "word frequencies",
    "left_bigram": "the left neighbour",
    "two_sided_bigram": "both neighbours",
    "two_sided_trigram": "two neighbours a side",
}


class TrainingLoss:
    """Compares the losses of training batches with that of an untrained model.

    The first evaluation may be thousands of steps away.

    Args:
        vocab_size: V.
        recipe: the run's.
    """

    def __init__(self, vocab_size: int, recipe: RunConfig) -> None:
        self._vocab_size, self._recipe = vocab_size, recipe
        self._above, self._lowest = 0, math.inf

    def add(self, step: int, loss: float) -> str | None:
        """Add the loss of the next step.

        Returns:
            A line when STEPS_IN_A_ROW losses in a row are those of a model that has diverged, and
            did not start so (see `first_loss`).
        """
        self._lowest = min(self._lowest, loss)
        line = None
        if loss > DIVERGED * self._lowest:
            what = f"the loss of step {step:,}"
            line = diverged(loss, self._vocab_size, self._recipe, what)
        self._above = 0 if line is None else self._above + 1
        return line if self._above >= STEPS_IN_A_ROW else None


class GradientNorm:
    """Compares the norm of the gradient with its running median.

    Args:
        recipe: the run's, for advice.
    """

    def __init__(self, recipe: RunConfig) -> None:
        self._recipe = recipe
        self._window: deque[float] = deque(maxlen=NORM_WINDOW)
        self._above = 0

    def add(self, step: int, norm: float) -> str | None:
        """Add the next step's norm.

        Returns:
            A line when STEPS_IN_A_ROW norms in a row are far above the median of those before.
        """
        usual = median(self._window) if len(self._window) == NORM_WINDOW else math.inf
        if norm <= NORM_FACTOR * usual:
            self._window.append(norm)
            self._above = 0
            return None
        self._above += 1
        if self._above < STEPS_IN_A_ROW:
            return None
        return (
            f"the gradient norm is {norm:.3g} at step {step}, "
            f"{norm / usual:.0f} times its running median: training is diverging; "
            f"{_calmer(self._recipe)}"
        )
