"""Layerwise: what groups of blocks are told to do, checked when it is made."""

import dataclasses
import math
from typing import Literal, get_args

from afcache._checks import check_choice, check_flag, check_integer, check_number, check_numbers, show

Strategy = Literal["by_stability", "taylor", "similarity", "attention", "difference"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layerwise:
    """What the block stack does on a step that is not refreshed as a whole, group by group. Frozen.

    Attributes:
        groups: contiguous parts into which the stack is divided; 1 to the number of blocks.
        strategy: "taylor" (forecast the group's residual), "similarity", "attention" or "difference" (reuse while the named
            statistic has changed less than its threshold since the group was last computed, else compute the group), or
            "by_stability" (each group follows the strategy of its stability class, most stable first, in this order).
        stability_bounds: where the four classes meet, falling, in (-1, 1).
        stability_margin: how far beyond a bound the stability must be to change the class; >= 0.
        stability_decay: weight of the past in the moving average; in [0, 1).
        similarity_threshold: largest 1 - cosine similarity of a group's input; >= 0.
        attention_threshold: largest total variation distance of a group's coarse attention map; >= 0.
        difference_threshold: largest relative change of a group's modulated input; >= 0.
        adapt_thresholds: scale the three thresholds by a gain that rises slowly while the measured error stays under what the
            tolerance allows, and falls quickly when it does not.

    Raises:
        ValueError: a value is out of its range or not one of its names.
        TypeError: a value is of the wrong kind.

    """

    groups: int = 4
    strategy: Strategy = "by_stability"
    stability_bounds: tuple[float, float, float] = (0.98, 0.95, 0.9)
    stability_margin: float = 0.005
    stability_decay: float = 0.5
    similarity_threshold: float = 0.05
    attention_threshold: float = 0.1
    difference_threshold: float = 0.2
    adapt_thresholds: bool = True

    def __post_init__(self) -> None:
        check_integer("groups", self.groups, 1, None)
        check_choice("strategy", self.strategy, get_args(Strategy))
        check_numbers("stability_bounds", self.stability_bounds, -1.0, 1.0)
        if len(self.stability_bounds) != 3 or list(self.stability_bounds) != sorted(set(self.stability_bounds), reverse=True):
            raise ValueError(f"stability_bounds must be three falling numbers, got {show(self.stability_bounds)}.")
        check_number("stability_margin", self.stability_margin, 0.0, 1.0)
        check_number("stability_decay", self.stability_decay, 0.0, 0.999)
        for name in ("similarity_threshold", "attention_threshold", "difference_threshold"):
            check_number(name, getattr(self, name), 0.0, math.inf, cure="0 computes every step")
        check_flag("adapt_thresholds", self.adapt_thresholds)

    def uses(self, strategy: str) -> bool:
        """Whether any group may follow the strategy."""
        return self.strategy in (strategy, "by_stability")
