"""Numbers of a step, one for each sample, as one number."""

import math


def worst(values: tuple[float, ...]) -> float:
    """The largest finite value; NaN if there is none."""
    return max((value for value in values if math.isfinite(value)), default=math.nan)
