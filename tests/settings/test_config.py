import dataclasses
import math
from typing import Any

import pytest

from afcache.settings.changes import at_tolerance
from afcache.settings.config import CacheConfig, Layerwise
from afcache.settings.presets import DEFAULT_TARGET, PRESETS, for_videos, preset_config, resolve_config, tuned


@pytest.mark.parametrize(
    ("field", "value", "error", "message"),
    [
        ("tolerance", -0.1, ValueError, r"tolerance must be finite and >= 0, got -0\.1; 0 computes every step"),
        ("tolerance", math.nan, ValueError, "tolerance must be finite and >= 0, got nan"),
        ("tolerance", math.inf, ValueError, "tolerance must be finite and >= 0, got inf"),
        ("noise_floor", -0.1, ValueError, r"noise_floor must be finite and >= 0, got -0\.1; None measures it"),
        ("noise_floor", "0.1", TypeError, "noise_floor must be a number, got '0.1'"),
        ("tolerance", "0.1", TypeError, "tolerance must be a number, got '0.1'"),
        ("tolerance", True, TypeError, "tolerance must be a number, got True"),
        ("warmup_steps", 0, ValueError, "warmup_steps must be >= 1, got 0"),
        ("warmup_steps", 1.5, TypeError, r"warmup_steps must be an integer, got 1\.5"),
        ("max_growth", 0.5, ValueError, r"max_growth must be >= 1, got 0\.5; float\('inf'\) means no limit"),
        ("order", 5, ValueError, "order must be between 0 and 4, got 5"),
        ("order", -1, ValueError, "order must be between 0 and 4, got -1"),
        ("damping", 1.1, ValueError, r"damping must be finite and between 0 and 1, got 1\.1"),
        ("error_exponent", 0.0, ValueError, r"error_exponent must be finite and between 0\.001 and 10, got 0\.0"),
        ("policy", "fast", ValueError, "policy must be one of 'adaptive', 'fixed', .*, 'none', got 'fast'"),
        ("error_law", None, ValueError, "error_law must be one of 'power', 'remainder', got None"),
        ("batch_decisions", "each", ValueError, "batch_decisions must be one of 'independent', 'shared', got 'each'"),
        ("correction", 1, TypeError, "correction must be True or False, got 1"),
        ("interval", 0, ValueError, "interval must be >= 1, got 0"),
        ("interval", 2.5, TypeError, "interval must be an integer, got 2.5"),
        ("forecast", "taylor", ValueError, "forecast must be one of 'polynomial', 'taylorseer', 'chebyshev', got 'taylor'"),
        ("refresh_last_step", "yes", TypeError, "refresh_last_step must be True or False, got 'yes'"),
    ],
)
def test_bad_values_name_field_value_and_rule(field: str, value: object, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        CacheConfig(**{field: value})  # pyright: ignore[reportArgumentType]


def test_config_is_frozen_and_keyword_only():
    config = CacheConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.tolerance = 1.0  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(TypeError, match="positional"):
        CacheConfig("adaptive")  # pyright: ignore[reportCallIssue]


def test_infinite_growth_is_allowed():
    assert CacheConfig(max_growth=math.inf).max_growth == math.inf


@pytest.mark.parametrize(("order", "exponent", "expected"), [(0, None, 1.0), (1, None, 2.0), (1, 1, 1.0), (2, 2.5, 2.5)])
def test_growth_exponent_defaults_to_order_plus_one(order: int, exponent: float | None, expected: float):
    assert CacheConfig(order=order, error_exponent=exponent).growth_exponent == expected


def test_resolve_config_uses_balanced_by_default():
    assert resolve_config() == PRESETS["balanced"]
    assert resolve_config(preset="fast") == PRESETS["fast"]


def test_resolve_config_lets_tolerance_override_the_presets():
    resolved = resolve_config(tolerance=0.5, preset="quality")
    assert resolved == tuned(0.5)
    quality = PRESETS["quality"]
    assert dataclasses.replace(resolved, tolerance=quality.tolerance, max_growth=1.5, damping=0.2) == quality


def test_presets_compute_a_third_step_of_videos_and_complete_settings_do_not():
    for preset, tolerance in (("fast", None), (None, 0.05)):
        of_images, of_videos = (resolve_config(tolerance=tolerance, preset=preset, draws_videos=each) for each in (False, True))
        assert (of_images.warmup_steps, of_videos.warmup_steps) == (2, 3)
        assert dataclasses.replace(of_videos, warmup_steps=2, error_weight=0.5) == of_images
        # Whatever is asked for later follows, and the third step stays.
        assert at_tolerance(of_videos, 0.1) == for_videos(tuned(0.1))
    assert resolve_config(PRESETS["fast"], draws_videos=True) == PRESETS["fast"]


def test_resolve_config_passes_a_config_through():
    config = CacheConfig(order=2)
    assert resolve_config(config) is config


def test_resolve_config_refuses_other_objects_and_unknown_presets():
    with pytest.raises(TypeError, match=r"config must be an afcache\.CacheConfig, got dict"):
        resolve_config({"tolerance": 1})  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="preset must be one of 'quality', 'balanced', 'fast', got 'best'"):
        resolve_config(preset="best")


@pytest.mark.parametrize("target", ["residual", "velocity", "noise"])
def test_presets_get_faster_by_a_larger_tolerance(target: Any):
    assert {name: preset_config(name, target=DEFAULT_TARGET) for name in ("quality", "balanced", "fast")} == PRESETS
    tolerances = [preset_config(name, target=target).tolerance for name in ("quality", "balanced", "fast")]
    assert tolerances == sorted(tolerances)
    assert len(set(tolerances)) == 3


def test_gaps_may_grow_faster_where_more_error_is_allowed():
    """Up to a limit where residuals are forecast, without one where outputs are."""
    limits = [tuned(t, target="residual").max_growth for t in (0.0, 0.016, 0.032, 0.064, 1.024)]
    assert limits == pytest.approx([1.5, 1.5, 2.0, 2.5, 2.5])
    limits = [tuned(t, target="noise").max_growth for t in (0.0, 0.016, 0.032, 0.064, 1.024)]
    assert limits == pytest.approx([1.5, 1.5, 2.5, 3.5, 7.5])
    for target in ("residual", "noise"):
        assert [tuned(t, target=target).damping for t in (0.0, 0.016, 0.064, 1.0)] == pytest.approx([0.2, 0.2, 0.35, 0.35])


@pytest.mark.parametrize(
    ("field", "value", "error", "message"),
    [
        ("threshold", -1, ValueError, "threshold must be finite and >= 0, got -1; 0 computes every step"),
        ("interval_growth", -0.5, ValueError, r"interval_growth must be finite and >= 0, got -0\.5"),
        ("refresh_steps", [1], ValueError, r"refresh_steps must be a tuple of step indices from 0, got \[1\]"),
        ("refresh_steps", (1, -2), ValueError, r"refresh_steps must be a tuple of step indices from 0, got \(1, -2\)"),
        ("magnitude_ratios", [1.0], TypeError, r"magnitude_ratios must be a tuple of numbers, got \[1\.0\]; a list becomes"),
        ("magnitude_ratios", (1.0, -1.0), ValueError, r"magnitude_ratios must be finite and >= 0, got -1\.0"),
        ("max_cached_steps", 1.5, TypeError, r"max_cached_steps must be an integer, got 1\.5"),
        ("first_blocks", -1, ValueError, "first_blocks must be >= 0, got -1"),
        ("max_nodes", 1, ValueError, "max_nodes must be between 2 and 1000, got 1"),
        ("layerwise", 4, TypeError, r"layerwise must be an afcache\.Layerwise or None, got 4"),
    ],
)
def test_bad_values_of_other_policies(field: str, value: object, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        CacheConfig(**{field: value})  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"policy": "magcache"}, r"magnitude_ratios must not be empty under policy 'magcache': measure them with afcache\.cal"),
        ({"policy": "dbcache"}, "first_blocks must be at least 1 under policy 'dbcache', got 0"),
        ({"policy": "teacache", "layerwise": Layerwise()}, "layerwise cannot be combined with policy 'teacache'"),
        ({"first_blocks": 2, "layerwise": Layerwise()}, "layerwise cannot be combined with .* first_blocks=2"),
        ({"forecast": "chebyshev", "layerwise": Layerwise()}, "layerwise cannot be combined with forecast 'chebyshev'"),
    ],
)
def test_settings_that_exclude_each_other(settings: dict, message: str):
    with pytest.raises(ValueError, match=message):
        CacheConfig(**settings)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("groups", 0, "groups must be >= 1, got 0"),
        ("strategy", "taylorseer", "strategy must be one of 'by_stability', 'taylor', .*, got 'taylorseer'"),
        ("stability_bounds", (0.9, 0.95, 0.98), "stability_bounds must be three falling numbers"),
        ("stability_bounds", (0.9, 0.8), "stability_bounds must be three falling numbers"),
        ("stability_decay", 1.0, r"stability_decay must be finite and between 0 and 0\.999, got 1\.0"),
        ("attention_threshold", -0.1, "attention_threshold must be finite and >= 0, got -0.1; 0 computes every step"),
    ],
)
def test_bad_values_of_groups(field: str, value: object, message: str):
    with pytest.raises(ValueError, match=message):
        Layerwise(**{field: value})  # pyright: ignore[reportArgumentType]
