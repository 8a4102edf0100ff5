"""Checks of settings: every message names the setting, the value, the rule and, where there is one, the way out."""

import math


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}.")


def check_number(name: str, value: object, low: float, high: float, *, infinite: bool = False, cure: str = "") -> None:
    """Raise unless `value` is a number in its range."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {value!r}.")
    if math.isnan(value) or value < low or value > high or (math.isinf(value) and not infinite):
        limits = f">= {low:g}" if math.isinf(high) else f"between {low:g} and {high:g}"
        finite = "" if infinite else "finite and "
        raise ValueError(f"{name} must be {finite}{limits}, got {value!r}" + (f"; {cure}." if cure else "."))


def check_integer(name: str, value: object, low: int, high: int | None) -> None:
    """Raise unless `value` is an integer in its range."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r}.")
    if value < low or (high is not None and value > high):
        limits = f">= {low}" if high is None else f"between {low} and {high}"
        raise ValueError(f"{name} must be {limits}, got {value!r}.")


def check_numbers(name: str, values: object, low: float, high: float) -> None:
    """Raise unless `values` is a tuple of numbers in their range."""
    if not isinstance(values, tuple):
        raise TypeError(f"{name} must be a tuple of numbers, got {values!r}; a list becomes one with tuple(...).")
    for value in values:
        check_number(name, value, low, high)


def check_flag(name: str, value: object) -> None:
    """Raise unless `value` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}.")
