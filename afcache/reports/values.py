"""Numbers of several samples as one."""

import math


def worst(values: tuple[float, ...]) -> float:
    """The largest finite value; NaN if there is none."""
    return max((value for value in values if math.isfinite(value)), default=math.nan)


def spread(setting: float | tuple[float, ...]) -> str:
    """A setting in words, where images may have one each."""
    values = setting if isinstance(setting, tuple) else (setting,)
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"
