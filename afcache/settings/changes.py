"""What may change from image to image: the settings that enter a step as tensors, so that its graph stays what it is."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from afcache._checks import check_choice, check_number, show
from afcache.settings.config import CacheConfig
from afcache.settings.presets import PRESETS, preset_config, tuned

# In the order of `StepSchedule`.
OPEN = ("tolerance", "max_growth", "damping")


def at_tolerance(config: CacheConfig, tolerance: float) -> CacheConfig:
    """Settings at another tolerance.

    If `max_growth` and `damping` are those that `tuned` gives for the config's own tolerance, they follow; otherwise they were
    chosen by hand, and stay. What a calibration measured belongs to its own tolerance.
    """
    if tolerance == config.tolerance:
        return config
    own, there = (tuned(value, target=config.target) for value in (config.tolerance, tolerance))
    follows = (config.max_growth, config.damping) == (own.max_growth, own.damping)
    chosen = there if follows else config
    return dataclasses.replace(
        config, tolerance=tolerance, max_growth=chosen.max_growth, damping=chosen.damping, calibration=None
    )


def change(
    bound: CacheConfig,
    config: CacheConfig | None = None,
    *,
    tolerance: float | Sequence[float] | None = None,
    preset: str | None = None,
) -> CacheConfig | tuple[CacheConfig, ...]:
    """The settings that `afcache.using` asks for: one for all images, or one for each of a batch.

    Args:
        bound: settings that the graph was made for.
        config, tolerance, preset: as `afcache.using` takes them.

    Raises:
        ValueError, TypeError: as `afcache.using` says.

    """
    if not bound.rule.is_error_controlled:
        raise ValueError(
            f"pipe draws under policy {bound.policy!r}, which has no tolerance, and afcache.using changes nothing else. Call "
            "afcache.compile_pipeline(pipe, ...) with other settings, or with policy 'adaptive' first."
        )
    given = [
        f"{name}={show(value)}"
        for name, value in (("config", config), ("tolerance", tolerance), ("preset", preset))
        if value is not None
    ]
    if len(given) != 1:
        raise ValueError(
            f"exactly one of config, tolerance and preset must be given, got {' and '.join(given) or 'none'}: a preset is the "
            "name of a tolerance, and a config has one."
        )
    if config is not None:
        _check_graph(bound, config)
        return config
    if preset is not None:
        check_choice("preset", preset, tuple(PRESETS))
        return at_tolerance(bound, preset_config(preset, target=bound.target).tolerance)  # pyright: ignore[reportArgumentType]
    if isinstance(tolerance, int | float):
        return at_tolerance(bound, _checked("tolerance", tolerance))
    if not isinstance(tolerance, Sequence) or isinstance(tolerance, str | bytes):
        cure = "; value.tolist() is a plain one" if hasattr(tolerance, "tolist") else ""
        raise TypeError(f"tolerance must be a number, or a list of one for each image, got {show(tolerance)}{cure}.")
    if not tolerance:
        raise ValueError(f"tolerance must be a number, or a list of one for each image, got {show(tolerance)}: it has none.")
    return tuple(at_tolerance(bound, _checked(f"tolerance[{index}]", value)) for index, value in enumerate(tolerance))


def for_each(settings: CacheConfig | tuple[CacheConfig, ...], batch: int) -> tuple[CacheConfig, ...]:
    """The settings of each image of a batch.

    Raises:
        ValueError: there are settings for another number of images.

    """
    if isinstance(settings, CacheConfig):
        return (settings,) * batch
    if len(settings) != batch:
        raise ValueError(
            "tolerance must be a number, or have one for each image of the batch (not for each guidance branch), which is "
            f"{batch}, got {len(settings)}: {show([one.tolerance for one in settings])}. Pass {batch} to afcache.using."
        )
    return settings


def summarize(settings: tuple[CacheConfig, ...]) -> dict[str, Any]:
    """The settings of a batch as plain values, for reports; where images differ, a tuple of one value for each."""
    plain = settings[0].to_dict()
    for name in OPEN:
        values = tuple(getattr(one, name) for one in settings)
        plain[name] = values if len(set(values)) > 1 else values[0]
    return plain


def _checked(name: str, value: object) -> Any:
    check_number(name, value, 0.0, float("inf"), cure="0 computes every step, 0.01 is careful")
    return value


def _check_graph(bound: CacheConfig, config: object) -> None:
    """Raise unless a config can be drawn with by the graph of another."""
    if not isinstance(config, CacheConfig):
        raise TypeError(f"config must be an afcache.CacheConfig, got {show(config)}.")
    compared = (field.name for field in dataclasses.fields(CacheConfig) if field.compare and field.name not in OPEN)
    others = [
        f"{name}={show(getattr(config, name))} (compiled: {show(getattr(bound, name))})"
        for name in compared
        if getattr(config, name) != getattr(bound, name)
    ]
    if others:
        raise ValueError(
            f"config may differ from what pipe was compiled with in {', '.join(OPEN)} alone, got {', '.join(others)}. Call "
            "afcache.compile_pipeline(pipe, config), or change the tolerance alone, which max_growth and damping follow: "
            f"afcache.using(pipe, tolerance={show(config.tolerance)})."
        )
