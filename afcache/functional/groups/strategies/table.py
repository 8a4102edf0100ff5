"""All strategies, in the order of the stability classes, most stable first."""

from collections.abc import Callable
from typing import NamedTuple

from afcache._typing import PerSample
from afcache.functional.distance import Reduction
from afcache.functional.groups.proposal import Memory, Proposal
from afcache.functional.groups.strategies.attention import attention
from afcache.functional.groups.strategies.difference import difference
from afcache.functional.groups.strategies.similarity import similarity


class Strategy(NamedTuple):
    """What a group may do instead of computing.

    Attributes:
        name: as settings and reports call it.
        mark: its letter in a report.
        propose: `(memory, summaries of the present input, threshold, reduction) -> Proposal`; None for a forecast, which needs
            no look at the input.

    """

    name: str
    mark: str
    propose: Callable[[Memory, Memory, PerSample, Reduction], Proposal] | None = None


STRATEGIES = (
    Strategy("taylor", "t"),
    Strategy(
        "similarity", "s", lambda memory, now, limit, sums: similarity(memory, now.inputs, threshold=limit, reduction=sums)
    ),
    # Every rank has the whole map, so that there is nothing to sum.
    Strategy("attention", "a", lambda memory, now, limit, sums: attention(memory, now.attention_map, threshold=limit)),
    Strategy(
        "difference", "d", lambda memory, now, limit, sums: difference(memory, now.modulated, threshold=limit, reduction=sums)
    ),
)
# A choice is 0 (compute) or 1 + the index of a strategy.
CODES = {strategy.name: code for code, strategy in enumerate(STRATEGIES, start=1)}
# Of every choice, in the order of their codes.
MARKS = {"computed": "F", **{strategy.name: strategy.mark for strategy in STRATEGIES}}
