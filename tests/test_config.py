import dataclasses
import math

import pytest

from afcache.config import PRESETS, CacheConfig, resolve_config


@pytest.mark.parametrize(
    ("field", "value", "error", "message"),
    [
        ("tolerance", -0.1, ValueError, r"tolerance must be finite and >= 0, got -0\.1; 0 computes every step"),
        ("tolerance", math.nan, ValueError, "tolerance must be finite and >= 0, got nan"),
        ("tolerance", math.inf, ValueError, "tolerance must be finite and >= 0, got inf"),
        ("tolerance", "0.1", TypeError, "tolerance must be a number, got '0.1'"),
        ("tolerance", True, TypeError, "tolerance must be a number, got True"),
        ("warmup_steps", 0, ValueError, "warmup_steps must be >= 1, got 0"),
        ("warmup_steps", 1.5, TypeError, r"warmup_steps must be an integer, got 1\.5"),
        ("max_growth", 0.5, ValueError, r"max_growth must be >= 1, got 0\.5; float\('inf'\) means no limit"),
        ("order", 5, ValueError, "order must be between 0 and 4, got 5"),
        ("order", -1, ValueError, "order must be between 0 and 4, got -1"),
        ("damping", 1.1, ValueError, r"damping must be finite and between 0 and 1, got 1\.1"),
        ("error_exponent", 0.0, ValueError, r"error_exponent must be finite and between 0\.001 and 10, got 0\.0"),
        ("policy", "fast", ValueError, "policy must be one of 'adaptive', 'fixed', 'none', got 'fast'"),
        ("error_law", None, ValueError, "error_law must be one of 'power', 'remainder', got None"),
        ("batch_decisions", "each", ValueError, "batch_decisions must be one of 'independent', 'shared', got 'each'"),
        ("correction", 1, TypeError, "correction must be True or False, got 1"),
        ("interval", 0, ValueError, "interval must be >= 1, got 0"),
        ("interval", 2.5, TypeError, "interval must be an integer, got 2.5"),
        ("forecast", "taylor", ValueError, "forecast must be one of 'polynomial', 'taylorseer', got 'taylor'"),
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
    assert resolved == dataclasses.replace(PRESETS["quality"], tolerance=0.5)


def test_resolve_config_passes_a_config_through():
    config = CacheConfig(order=2)
    assert resolve_config(config) is config


def test_resolve_config_refuses_other_objects_and_unknown_presets():
    with pytest.raises(TypeError, match=r"config must be an afcache\.CacheConfig, got dict"):
        resolve_config({"tolerance": 1})  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="preset must be one of 'quality', 'balanced', 'fast', got 'best'"):
        resolve_config(preset="best")


def test_presets_get_faster_by_a_larger_tolerance():
    tolerances = [PRESETS[name].tolerance for name in ("quality", "balanced", "fast")]
    assert tolerances == sorted(tolerances)
    assert len(set(tolerances)) == 3
