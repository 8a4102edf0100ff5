"""Every policy with the values of its knob that `compare_strategies` tries."""

import dataclasses
import random
from collections.abc import Sequence
from typing import Any, NamedTuple

from afcache import CacheConfig, policy
from afcache.settings.presets import preset_config, tuned


class Family(NamedTuple):
    """A policy and the values of its knob.

    Attributes:
        name: as tables show it.
        kind: "ours", "single" (one strategy), "corrected" (one strategy with our correction), or "control".
        configs: one for each value, from careful to bold.

    """

    name: str
    kind: str
    configs: tuple[CacheConfig, ...]


def _knobs(steps: int) -> dict[str, list[dict[str, Any]]]:
    """Each single-strategy policy's settings, from careful to bold. Those of a fixed schedule know the number of steps."""
    ratios = MINI_FLUX_RATIOS
    intervals = [
        {"interval": n, "warmup_steps": w} for w in (2, 3) for n in (range(2, 9) if steps < 40 else (3, 4, 5, 6, 7, 8, 10, 12))
    ]
    return {
        "taylorseer": intervals,
        "fixed": intervals,
        "fbcache": [{"threshold": t} for t in (0.05, 0.1, 0.2, 0.3, 0.45)],
        "dbcache": [
            {"threshold": t, "first_blocks": f, "warmup_steps": 4, "order": 1, "forecast": "taylorseer"}
            for f, t in ((1, 0.08), (1, 0.16), (1, 0.3), (1, 0.6), (4, 0.1), (4, 0.2), (4, 0.4))
        ],
        "teacache": [{"threshold": t} for t in (0.25, 0.4, 0.6, 0.8, 1.2)],
        "magcache": [
            {"threshold": t, "max_cached_steps": k, "magnitude_ratios": ratios}
            for t, k in ((0.03, 2), (0.06, 3), (0.12, 4), (0.24, 5), (0.4, 8))
        ],
        "spectrum": [{"interval_growth": a} for a in (0.5, 0.75, 1.5, 3.0)],
        "similarity": [{"similarity_threshold": t} for t in (0.001, 0.003, 0.01, 0.03)],
        "attention": [{"attention_threshold": t} for t in (0.01, 0.03, 0.06, 0.1)],
        "difference": [{"difference_threshold": t} for t in (0.05, 0.1, 0.2, 0.3)],
    }


# afcache.calibrate_magnitudes(pipe, ten prompts, num_inference_steps=28), by `python -m bench.compare_strategies --calibrate`.
MINI_FLUX_RATIOS = (
    1.0, 0.9788, 0.9811, 0.9851, 0.9892, 0.99, 0.9868, 0.9827, 0.9794, 0.9769, 0.9745, 0.9728, 0.9724, 0.973,
    0.9731, 0.9724, 0.9716, 0.9712, 0.9706, 0.9699, 0.9702, 0.9698, 0.9668, 0.9647, 0.9617, 0.9549, 0.9447, 0.9345,
)  # fmt: skip


def families(steps: int) -> list[Family]:
    """All policies that are compared."""
    adaptive = tuple(tuned(t, target="residual") for t in (0.002, 0.004, 0.008, 0.016, 0.03, 0.06, 0.12))
    grouped = tuple(policy("layerwise", tolerance=t, groups=g) for g in (4,) for t in (0.002, 0.004, 0.008, 0.016, 0.03))
    result = [Family("AFCache, default", "ours", adaptive), Family("AFCache, 4 groups by stability", "ours", grouped)]
    for name, values in _knobs(steps).items():
        plain = tuple(policy(name, **value) for value in values)
        result.append(Family(name, "single", plain))
        result.append(Family(f"{name} + correction", "corrected", tuple(_corrected(config) for config in plain)))
    return [*result, Family("random steps", "control", _random(steps)), Family("first steps", "control", _front(steps))]


def _corrected(config: CacheConfig) -> CacheConfig:
    return dataclasses.replace(config, correction=True)


def _random(steps: int) -> tuple[CacheConfig, ...]:
    """The default's forecast and correction, refreshed at random steps after the warmup."""
    draw = random.Random(0)
    return tuple(_planned(sorted(draw.sample(range(2, steps), round(steps / speed) - 2))) for speed in (2.0, 2.5, 3.0, 4.0))


def _front(steps: int) -> tuple[CacheConfig, ...]:
    """The same, with all refreshes at the start."""
    return tuple(_planned(range(2, round(steps / speed))) for speed in (1.3, 1.6, 2.0, 3.0))


def _planned(steps: Sequence[int]) -> CacheConfig:
    base = preset_config("balanced", target="residual")
    return dataclasses.replace(base, policy="planned", refresh_steps=tuple(steps), max_growth=2.0)
