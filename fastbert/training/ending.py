"""How a run ended: its exit code, the reason as a sentence, and what the user may do next."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from fastbert.checkpoints.saver import Saved
from fastbert.training.run import Run
from fastbert.training.setup import Setup

# Exit codes. 75 is EX_TEMPFAIL, which tells a scheduler that it may start the run again.
DONE, FAILED, INTERRUPTED = 0, 1, 75
LOWER = 10  # divides the learning rate in the advice to resume a run that diverged


@dataclass(frozen=True)
class Ending:
    """How a run ended.

    Attributes:
        exit_code: 0 when a stop condition was reached, 1 when the run failed, 75 when it was
            interrupted and can be resumed.
        reason: why it ended, in words.
    """

    exit_code: int
    reason: str


def conclude(run: Run, reason: str | None, last: Saved | None) -> Ending:
    """Report why the run ended and what the user may do.

    Args:
        run: the run.
        reason: the stop condition that was reached; None where a signal or diverged weights ended
            the run.
        last: the result of the last save; None where there was nothing to save.
    """
    config, state = run.setup.config, run.state
    code, advice = DONE, ""
    if run.diverged:
        code, advice = FAILED, _after_divergence(run)
        if state.skipped_in_a_row > config.stop.skipped:
            reason = (
                f"stop.skipped = {config.stop.skipped}: "
                f"{state.skipped_in_a_row} steps in a row were not finite"
            )
        else:
            reason = f"{reason or _signal(run)}, but the weights give no finite loss any more"
    elif reason is None:
        code, advice, reason = INTERRUPTED, how_to_resume(run.setup), _signal(run)
    elif state.heldout_loss is None:
        code = FAILED
        advice = (
            f"the training losses of the newest checkpoint, {run.newest}, are finite; "
            "resume from an earlier one with a lower optimizer.lr"
        )
        reason = f"{reason}, but the held-out loss is not finite"
    if last and last.problem and not run.diverged:
        code, advice = FAILED, f"fix this, then {how_to_resume(run.setup)}"
        reason = f"{reason}, but it could not be saved: {last.problem}"
    run.monitor.stop(state.step, reason, advice)
    return Ending(code, reason)


def how_to_resume(setup: Setup) -> str:
    """The advice to resume, with the command."""
    return f"resume with: {_command(setup)}"


def _command(setup: Setup) -> str:
    return f"fastbert pretrain {shlex.quote(f'{setup.start.place}/config.toml')} --resume"


def _signal(run: Run) -> str:
    return f"interrupted by {run.consensus.stop_request.asked or 'another rank'}"


def _after_divergence(run: Run) -> str:
    """The advice for a run whose weights give no finite loss any more."""
    command, newest = _command(run.setup), run.newest
    lower = f"{command} optimizer.lr={run.setup.config.optimizer.lr / LOWER:g}"
    if run.learned and newest is not None:
        return (
            f"the newest checkpoint with finite losses is {newest}; "
            f"resume from it with a lower rate: {lower}"
        )
    if run.learned:
        return f"there is no checkpoint yet; start from the beginning with a lower rate: {lower}"
    if newest is not None:
        return (
            f"no step was finite since {newest}; "
            f"move that away, and --resume takes the checkpoint before it: {command}"
        )
    return "no step was finite since the start; look at init, model.initializer_range and the text"
