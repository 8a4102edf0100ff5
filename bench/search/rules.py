"""How growth limit and damping follow the tolerance: rules, and what each comes to on grids that were drawn before."""

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from bench.search.curves import Point, speed_at
from bench.search.grid import Found

QUALITIES = (45, 40, 36)
# The tolerance from which on they rise.
_ANCHOR = 0.016
# Two doublings later the damping has risen in full.
_DOUBLINGS = 2.0
# model, steps, CFG
Place = tuple[str, int, float]


class Rule(NamedTuple):
    """Growth limit and damping at any tolerance.

    Attributes:
        max_growth: up to a tolerance of 0.016.
        growth_rise: of the limit, for each doubling above.
        damping: up to 0.016.
        damping_rise: for each of the first two doublings above.
        most: the limit rises no further.

    """

    max_growth: float
    growth_rise: float
    damping: float
    damping_rise: float = 0.075
    most: float = math.inf

    def at(self, tolerance: float) -> tuple[float, float]:
        """Growth limit and damping."""
        doublings = max(0.0, math.log2(tolerance / _ANCHOR))
        limit = min(self.most, self.max_growth + self.growth_rise * doublings)
        return limit, self.damping + self.damping_rise * min(_DOUBLINGS, doublings)


# What `afcache.settings.presets.tuned` does for residuals, and for outputs.
FOR_RESIDUALS = Rule(1.5, 0.5, 0.2, most=2.5)
FOR_OUTPUTS = Rule(1.5, 1.0, 0.2)


def candidates() -> list[Rule]:
    """The rules that are tried."""
    choices = (1.25, 1.4, 1.5, 1.6, 1.75), (0.0, 0.25, 0.5, 0.75, 1.0, 1.5), (0.1, 0.15, 0.2, 0.25)
    return [FOR_RESIDUALS, *itertools.starmap(Rule, itertools.product(*choices))]


class Curves:
    """Speed against quality at any rule, between the cells of a grid.

    Args:
        found: of one kind at one place, every cell.

    """

    def __init__(self, found: Sequence[Found]) -> None:
        self._axes = [sorted({getattr(each, name) for each in found}) for name in ("tolerance", "max_growth", "damping")]
        shape = tuple(map(len, self._axes))
        if len(found) != math.prod(shape):
            raise ValueError(f"found must hold every cell of a grid of {shape}, got {len(found)} cells.")
        cells = sorted(found, key=lambda each: (each.tolerance, each.max_growth, each.damping))
        self._values = np.array([(each.speed, each.psnr) for each in cells]).reshape(*shape, 2)

    def at(self, rule: Rule) -> list[Point]:
        """A point for each tolerance; growth limit and damping linear between cells, and the nearest outside of them."""
        _, limits, dampings = self._axes
        points = []
        for tolerance, plane in zip(self._axes[0], self._values, strict=True):
            limit, damping = rule.at(tolerance)
            rows = [[np.interp(limit, limits, plane[:, j, k]) for j in range(len(dampings))] for k in range(2)]
            speed, psnr = (float(np.interp(damping, dampings, row)) for row in rows)
            points.append(Point(speed, (psnr,)))
        return sorted(points)


def curves_of(found: Sequence[Found], kind: str) -> dict[Place, Curves]:
    """The curves of a kind, at every place where it was drawn."""
    places: dict[Place, list[Found]] = {}
    for each in found:
        if each.kind == kind:
            places.setdefault((each.model, each.steps, each.cfg), []).append(each)
    return {place: Curves(cells) for place, cells in places.items()}


def speeds_of(curves: Mapping[Place, Curves], rule: Rule) -> dict[Place, list[float]]:
    """At each of the qualities."""
    return {place: [speed_at(each.at(rule), quality) for quality in QUALITIES] for place, each in curves.items()}


def compare(speeds: Mapping[Place, list[float]], base: Mapping[Place, list[float]]) -> dict[str, float]:
    """Geometric means of the ratios of speeds, over all places and by quality, and the least of all."""
    ratios = np.array([np.divide(own, base[place]) for place, own in speeds.items()])
    means = {f"at {quality} dB": statistics.geometric_mean(ratios[:, i]) for i, quality in enumerate(QUALITIES)}
    return {"ratio to the old default": statistics.geometric_mean(ratios.flatten()), "least": float(ratios.min()), **means}
