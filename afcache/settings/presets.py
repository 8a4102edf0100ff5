"""The default policy at a tolerance, and three names for tolerances."""

import math
from typing import Literal

from afcache._checks import check_choice, check_number
from afcache.settings.config import CacheConfig, Target

Preset = Literal["quality", "balanced", "fast"]


def tuned(tolerance: float, *, target: Target = "residual") -> CacheConfig:
    """The policy that bench/search_policy.py found best on the model that ships (seeds 0 to 63), at a tolerance.

    On trained features the linear error law beats the power of the remainder's order, which trusts long gaps too much. Gaps
    that grow slowly are worth 2 dB at 45 dB and above; where more error is allowed they may grow faster: from a limit of 1.5 at
    a tolerance of 0.016 to 2.5 at 0.064.

    For outputs bench/search_grid.py searched on two models of different data: errors grow by the power 1.5, steps count by the
    square root of sigma, and the limit of gaps goes on rising, by 1 for each doubling of the tolerance above 0.016.

    Args:
        tolerance: error budget between refreshes; finite, >= 0.
        target: what is forecast; "velocity" has the settings of "noise".

    """
    check_number("tolerance", tolerance, 0.0, math.inf, cure="0 computes every step, 0.016 is balanced")
    rise = max(0.0, math.log2(max(tolerance, 1e-9) / 0.016) / 2)
    boldness = min(1.0, rise)
    if target != "residual":
        return CacheConfig(
            target=target,
            tolerance=tolerance,
            warmup_steps=2,
            error_exponent=1.5,
            error_weight=0.5,
            damping=0.2 + 0.15 * boldness,
            max_growth=1.5 + 2 * rise,
        )
    return CacheConfig(
        tolerance=tolerance,
        warmup_steps=2,
        error_exponent=1.0,
        damping=0.2 + 0.15 * boldness,
        max_growth=1.5 + boldness,
    )


PRESETS: dict[Preset, CacheConfig] = {"quality": tuned(0.008), "balanced": tuned(0.016), "fast": tuned(0.032)}


def resolve_config(
    config: CacheConfig | None = None, *, tolerance: float | None = None, preset: str | None = None
) -> CacheConfig:
    """Make one config out of the ways in which it can be given.

    Args:
        config: complete settings; excludes the other two.
        tolerance: overrides that of the preset; `max_growth` and `damping` follow it (see `tuned`).
        preset: "quality", "balanced" (the default) or "fast".

    Raises:
        ValueError: `config` together with `tolerance` or `preset`, or an unknown preset.
        TypeError: `config` is not a CacheConfig.

    """
    if config is not None:
        if not isinstance(config, CacheConfig):
            raise TypeError(f"config must be an afcache.CacheConfig, got {type(config).__name__}.")
        given = [f"{name}={value!r}" for name, value in (("tolerance", tolerance), ("preset", preset)) if value is not None]
        if given:
            raise ValueError(
                f"config and {' and '.join(given)} were both given, but config already holds every setting. "
                "Pass one or the other, or use dataclasses.replace(config, ...)."
            )
        return config
    name = "balanced" if preset is None else preset
    check_choice("preset", name, tuple(PRESETS))
    return PRESETS[name] if tolerance is None else tuned(tolerance)  # pyright: ignore[reportArgumentType]
