"""The default policy at a tolerance, and three names for tolerances."""

import dataclasses
import math
from typing import Any, Literal, get_args

from afcache._checks import check_choice, check_number
from afcache.settings.config import CacheConfig, Target

Preset = Literal["quality", "balanced", "fast"]
# What the presets forecast.
DEFAULT_TARGET: Target = "noise"
# Set so that the model that ships, in 28 steps, comes out at about 50, 45 and 40 dB, with guidance and without
# (python -m bench.preset_quality --first-seed 0; the tables are of seeds that were kept aside).
_FOR_OUTPUTS: dict[Preset, float] = {"quality": 0.003, "balanced": 0.01, "fast": 0.02}
_TOLERANCES: dict[Target, dict[Preset, float]] = {
    "residual": {"quality": 0.008, "balanced": 0.016, "fast": 0.032},
    "velocity": _FOR_OUTPUTS,
    "noise": _FOR_OUTPUTS,
}


def tuned(tolerance: float, *, target: Target = DEFAULT_TARGET) -> CacheConfig:
    """The policy that was found best on trained models, at a tolerance.

    For residuals bench/search_policy.py searched on the model that ships (seeds 0 to 63). On trained features the linear error
    law beats the power of the remainder's order, which trusts long gaps too much. Gaps that grow slowly are worth 2 dB at 45 dB
    and above; where more error is allowed they may grow faster: from a limit of 1.5 at a tolerance of 0.016 to 2.5 at 0.064.

    For outputs bench/search_grid.py searched on two models of different data: errors grow by the power 1.5, steps count by the
    square root of sigma, and the limit of gaps goes on rising, by 1 for each doubling of the tolerance above 0.016. That steps
    count by the square root of 1 - sigma as well, inversely, is what videos asked for (`bench.compare_videos`), whose schedules
    begin with many steps of almost no signal; on these models it neither gains nor loses. Videos wander where images go
    straight: damping is learnt from each refresh. Pipelines that draw videos differ in two more settings (`for_videos`).

    Args:
        tolerance: error budget between refreshes; finite, >= 0.
        target: what is forecast; "velocity" has the settings of "noise".

    """
    check_number("tolerance", tolerance, 0.0, math.inf, cure="0 computes every step, 0.01 is careful")
    rise = max(0.0, math.log2(max(tolerance, 1e-9) / 0.016) / 2)
    boldness = min(1.0, rise)
    common: dict[str, Any] = {
        "target": target,
        "tolerance": tolerance,
        "warmup_steps": 2,
        "damping": 0.2 + 0.15 * boldness,
    }
    if target == "residual":
        return CacheConfig(**common, error_exponent=1.0, max_growth=1.5 + boldness)
    for_outputs: dict[str, Any] = {"error_exponent": 1.5, "error_weight": 0.5, "early_weight": 0.5, "learns_damping": True}
    return CacheConfig(**common, **for_outputs, max_growth=1.5 + 2 * rise)


def for_videos(config: CacheConfig) -> CacheConfig:
    """A preset, or the policy at a tolerance, for a pipeline that draws videos: a third step is computed, and late ones count.

    Under guidance the first steps choose what is behind everything that moves, and the worst of many clips is one whose third
    step was forecast badly. What late steps add is small, and flickers: sigma weighs it no longer. At equal mean quality clips
    mostly take fewer blocks than with the presets of images, by up to an eighth, and the worst of them are mostly better
    (`bench.compare_videos`). Images are slower with either, in the mean of three settings (`bench.search_changes`).
    """
    return dataclasses.replace(config, warmup_steps=max(config.warmup_steps, 3), error_weight=0.0)


def preset_config(name: Preset, *, target: Target = DEFAULT_TARGET) -> CacheConfig:
    """The settings of a preset, for whatever is forecast."""
    return tuned(_TOLERANCES[target][name], target=target)


PRESETS: dict[Preset, CacheConfig] = {name: preset_config(name) for name in get_args(Preset)}


def resolve_config(
    config: CacheConfig | None = None,
    *,
    tolerance: float | None = None,
    preset: str | None = None,
    draws_videos: bool = False,
) -> CacheConfig:
    """Make one config out of the ways in which it can be given.

    Args:
        config: complete settings; excludes the other two.
        tolerance: overrides that of the preset; `max_growth` and `damping` follow it (see `tuned`).
        preset: "quality", "balanced" (the default) or "fast".
        draws_videos: whether a pipeline does that these are for; complete settings stay what they are.

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
    found = PRESETS[name] if tolerance is None else tuned(tolerance)  # pyright: ignore[reportArgumentType]
    return for_videos(found) if draws_videos else found
