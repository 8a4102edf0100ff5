"""Numbers of several samples as one."""

import math
from typing import Any


def worst(values: tuple[float, ...]) -> float:
    """The largest finite value; NaN if there is none."""
    return max((value for value in values if math.isfinite(value)), default=math.nan)


def spread(setting: float | tuple[float, ...]) -> str:
    """A setting in words, where images may have one each."""
    values = setting if isinstance(setting, tuple) else (setting,)
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def allowed(report: Any) -> str:
    """The tolerance of a report in words, and what it comes to on a schedule of few steps."""
    setting, scale = report.config["tolerance"], report.tolerance_scale
    if scale == 1.0:
        return spread(setting)
    values = setting if isinstance(setting, tuple) else (setting,)
    there = spread(tuple(float(f"{value * scale:.3g}") for value in values))
    return f"{spread(setting)}, with {report.num_steps} steps {there}"
