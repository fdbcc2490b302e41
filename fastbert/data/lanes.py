"""Lanes: where many ranks share a step, each draws only a part of its examples.

A step's examples are cut into equal runs by position, one for each lane, and the ranks of a lane
share its run. Which examples a step has does not change, so a resume may have other lanes.

The losses are means over the whole step, and all ranks compute the same number of packs. So ranks
need three facts of the other lanes: `Facts`. The ranks sum a few numbers at each step anyway; there
each lane has three places of its own, which its first rank fills.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# A rank draws the examples of at most this many ranks, at about 2 us an example.
MOST_RANKS = 64


@dataclass(frozen=True)
class Facts:
    """What the packs of one rank depend on besides its own examples."""

    masked: int  # masked tokens of the step
    pairs: int  # examples of the step that are pairs
    packs: int  # of each rank


def lanes_for(world: int, sequences: int) -> int:
    """Return the number of lanes: the smallest that has at most MOST_RANKS ranks in each.

    There is one where the ranks cannot have the same number of sequences.
    """
    if sequences % world:
        return 1
    return next(n for n in range(1, world + 1) if world % n == 0 and world // n <= MOST_RANKS)


def to_sum(facts: Facts, rank: int, world: int, lanes: int) -> list[float]:
    """Return what this rank adds to the sum over all ranks, 3 numbers for each lane."""
    lane, place = divmod(rank, world // lanes)
    found = [0.0] * (3 * lanes)
    if place == 0:
        found[3 * lane : 3 * lane + 3] = facts.masked, facts.pairs, facts.packs
    return found


def from_sum(total: Sequence[float]) -> Facts:
    """Return the facts of the whole step from the sum over all ranks."""
    return Facts(int(sum(total[0::3])), int(sum(total[1::3])), int(max(total[2::3])))
