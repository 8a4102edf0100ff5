"""Named policies: ours, and those of other caches with their authors' constants, as configurations of one machinery."""

import dataclasses
from typing import Any, get_args

from afcache._checks import check_choice
from afcache.settings.config import CacheConfig, Layerwise, Target
from afcache.settings.presets import PRESETS, preset_config, tuned

# MagCache's calibration of FLUX.1-dev at 28 steps.
FLUX_MAGNITUDE_RATIOS = (
    1.0, 1.21094, 1.11719, 1.07812, 1.0625, 1.03906, 1.03125, 1.03906, 1.02344, 1.03125, 1.02344, 0.98047, 1.01562, 1.00781,
    1.0, 1.00781, 1.0, 1.00781, 1.0, 1.0, 0.99609, 0.99609, 0.98047, 0.98828, 0.96484, 0.95703, 0.93359, 0.89062,
)  # fmt: skip


def _groups_alone(strategy: Any) -> CacheConfig:
    """No refresh of the whole stack after the warmup: one group, which gates itself."""
    layerwise = Layerwise(groups=1, strategy=strategy, adapt_thresholds=False)
    return CacheConfig(policy="planned", warmup_steps=3, order=0, correction=False, layerwise=layerwise)


_REUSE = {"order": 0, "correction": False}
POLICIES: dict[str, CacheConfig] = {
    "adaptive": PRESETS["balanced"],
    **{target: preset_config("balanced", target=target) for target in get_args(Target)},
    "layerwise": dataclasses.replace(preset_config("balanced", target="residual"), layerwise=Layerwise()),
    "taylorseer": CacheConfig(policy="fixed", forecast="taylorseer", interval=6, correction=False),
    "fbcache": CacheConfig(policy="dbcache", first_blocks=1, threshold=0.08, warmup_steps=1, **_REUSE),
    "dbcache": CacheConfig(policy="dbcache", first_blocks=8, threshold=0.08, warmup_steps=8, **_REUSE),
    "teacache": CacheConfig(policy="teacache", threshold=0.6, warmup_steps=1, refresh_last_step=True, **_REUSE),
    "magcache": CacheConfig(
        policy="magcache",
        threshold=0.24,
        max_cached_steps=5,
        warmup_steps=1,
        magnitude_ratios=FLUX_MAGNITUDE_RATIOS,
        **_REUSE,
    ),
    "spectrum": CacheConfig(
        policy="growing",
        forecast="chebyshev",
        order=4,
        warmup_steps=5,
        interval=2,
        interval_growth=0.75,
        correction=False,
    ),
    "similarity": _groups_alone("similarity"),
    "attention": _groups_alone("attention"),
    "difference": _groups_alone("difference"),
    "fixed": CacheConfig(policy="fixed", correction=False),
    "none": CacheConfig(policy="none"),
}


def policy(name: str, **changes: Any) -> CacheConfig:
    """Make the settings of a named policy.

    import afcache

    pipe = afcache.compile_pipeline(pipe, afcache.policy("teacache", threshold=0.4))
    pipe = afcache.compile_pipeline(pipe, afcache.policy("taylorseer", interval=4, correction=True))

    | name | refreshes | cached steps | paper |
    |---|---|---|---|
    | adaptive | error control | the output, forecast in sigma, corrected: the default of images | ours |
    | residual, velocity, noise | error control | the same, of what is named (`CacheConfig.target`) | ours |
    | layerwise | error control | each group by the strategy of its stability | ours |
    | taylorseer | every 6 steps | Taylor in step index, order 1 | arXiv 2503.06923 |
    | fbcache | change of what block 0 adds, 0.08 | reuse | ParaAttention |
    | dbcache | change of what 8 blocks add, 0.08 | reuse | cache-dit |
    | teacache | accumulated change of the input, 0.6 | reuse | arXiv 2411.19108 |
    | magcache | calibrated residual norms, 0.24 | reuse | arXiv 2506.09045 |
    | spectrum | at intervals growing by 0.75 | Chebyshev regression | arXiv 2603.01623 |
    | similarity, attention, difference | the group's own statistic | reuse | see `functional/groups/strategies` |
    | fixed | every 4 steps | forecast in sigma | |
    | none | every step | | |

    They differ from their authors' code where that has a known fault: statistics are float32 and per sample, NaN computes,
    guidance branches decide together, steps are those of the schedule and not counted calls. All but "adaptive", "velocity"
    and "noise" act on the residual of the whole stack (of a group); TaylorSeer's authors forecast every module, Spectrum's
    the last output, over all refreshes (here the newest 16).

    Args:
        name: one of `POLICIES`.
        changes: fields of `CacheConfig`, or of its `Layerwise`, to set otherwise, e.g. `correction=True`, which is ours.

    Raises:
        ValueError: an unknown name, or a value that `CacheConfig` refuses.
        TypeError: an unknown field.

    """
    check_choice("name", name, tuple(POLICIES))
    base = POLICIES[name]
    if base.rule.is_error_controlled and "tolerance" in changes:
        base = dataclasses.replace(tuned(changes["tolerance"], target=base.target), layerwise=base.layerwise)
    inner = {field.name for field in dataclasses.fields(Layerwise)}
    outer = {field.name for field in dataclasses.fields(CacheConfig)}
    unknown = sorted(set(changes) - inner - outer)
    if unknown:
        raise TypeError(f"policy() got unknown settings {unknown}; CacheConfig has {sorted(outer)}, Layerwise {sorted(inner)}.")
    for_groups = {key: value for key, value in changes.items() if key in inner}
    if for_groups and base.layerwise is None:
        raise ValueError(
            f"policy {name!r} has no groups, so {sorted(for_groups)} cannot be set. Use 'layerwise', 'similarity', 'attention' "
            "or 'difference', or policy('residual', layerwise=afcache.Layerwise(...))."
        )
    rest = {key: value for key, value in changes.items() if key in outer}
    if for_groups:
        rest["layerwise"] = dataclasses.replace(base.layerwise, **for_groups)  # pyright: ignore[reportArgumentType]
    return dataclasses.replace(base, **rest)
