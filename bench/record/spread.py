"""The one definition of a quantile, and how tables show a value with its spread.

Quantiles lie linearly between order statistics, the smallest value at 0 and the largest at 1 (Hyndman and Fan's type 7,
numpy's default, "inclusive" in Python's statistics). Quartiles of fewer than five values would be made up of extremes
anyway, so those are what is told.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# From here on a spread is quartiles.
_ENOUGH = 5


class Spread(NamedTuple):
    """A median between its quartiles; of fewer than five values, between the lowest and the highest."""

    low: float
    median: float
    high: float


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which a share of the values lies, linearly between them."""
    return float(np.quantile(values, share))


def spread_of(values: Sequence[float]) -> Spread:
    """Median and quartiles; of fewer than five values median and extremes.

    Raises:
        ValueError: there are no values.

    """
    if not len(values):
        raise ValueError("values must hold at least one, got none: leave the row out, or say that it was not measured")
    low, high = (0.25, 0.75) if len(values) >= _ENOUGH else (0.0, 1.0)
    return Spread(*(quantile(values, share) for share in (low, 0.5, high)))


def shown_spread(values: Sequence[float], *, scale: float = 1.0) -> str:
    """The spread as tables show it, `1.66 (1.61 to 1.71)`; `-` where there are no values.

    Args:
        values: in one unit.
        scale: into the unit of the table; 1e3 for seconds in milliseconds.

    """
    if not len(values):
        return "-"
    low, median, high = (_shown(scale * value) for value in spread_of(values))
    return f"{median} ({low} to {high})"


def _shown(value: float) -> str:
    """Three digits, and those before the point all."""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
