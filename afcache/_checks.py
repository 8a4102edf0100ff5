"""Checks of settings: every message names the setting, the value, the rule and, where there is one, the way out."""

import math

# Beyond this a Python integer meets no tensor any more.
LARGEST = 10**18
_SHOWN = 120


def show(value: object) -> str:
    """A value for a message: one line, cut where it is long."""
    try:
        text = " ".join(repr(value).split())
    except ValueError:
        # Python writes no integer of more than 4300 digits.
        text = f"a huge {type(value).__name__}"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise unless `value` is one of `choices`."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {show(value)}.")


def check_number(name: str, value: object, low: float, high: float, *, infinite: bool = False, cure: str = "") -> None:
    """Raise unless `value` is a number in its range."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _wrong_kind(name, "a number", value)
    if infinite and value == math.inf:
        return
    if not low <= value <= min(high, LARGEST):
        limits = _limits(low, high, value) if math.isinf(high) else f"between {low:g} and {high:g}"
        finite = "" if infinite else "finite and "
        raise ValueError(f"{name} must be {finite}{limits}, got {show(value)}" + (f"; {cure}." if cure else "."))


def check_integer(name: str, value: object, low: int, high: int | None) -> None:
    """Raise unless `value` is an integer in its range."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise _wrong_kind(name, "an integer", value)
    if not low <= value <= (LARGEST if high is None else high):
        limits = _limits(low, math.inf, value) if high is None else f"between {low} and {high}"
        raise ValueError(f"{name} must be {limits}, got {show(value)}.")


def check_numbers(name: str, values: object, low: float, high: float) -> None:
    """Raise unless `values` is a tuple of numbers in their range."""
    if not isinstance(values, tuple):
        raise TypeError(f"{name} must be a tuple of numbers, got {show(values)}; a list becomes one with tuple(...).")
    for value in values:
        check_number(name, value, low, high)


def check_flag(name: str, value: object) -> None:
    """Raise unless `value` is True or False."""
    if not isinstance(value, bool):
        raise _wrong_kind(name, "True or False", value)


def _wrong_kind(name: str, kind: str, value: object) -> TypeError:
    cure = "; value.item() is a plain one" if hasattr(value, "item") else ""
    return TypeError(f"{name} must be {kind}, got {show(value)}{cure}.")


def _limits(low: float, high: float, value: float) -> str:
    """The rule, as far as the value breaks it: the upper limit is for those who meet it."""
    return f">= {low:g}" + (f" and at most {LARGEST:.0e}" if LARGEST < value < high else "")
