"""What may refresh the whole stack: one value for each policy, and what follows from it elsewhere."""

from typing import Literal, NamedTuple

PolicyName = Literal["adaptive", "fixed", "growing", "magcache", "planned", "teacache", "dbcache", "none"]


class Rule(NamedTuple):
    """A policy's kind.

    Attributes:
        summary: one line for reports, a format string over the fields of `CacheConfig`, the tolerance as words.
        is_error_controlled: a step is computed when the predicted error would reach the tolerance.
        is_gated: a step is decided by what is seen of its input; the gate of that name is in `functional/gates`.
        is_cached: some steps are forecast; if not, our forward computes all of them.

    All others are plans, known before the first step: `functional/plans` makes them.

    """

    summary: str
    is_error_controlled: bool = False
    is_gated: bool = False
    is_cached: bool = True


_THRESHOLD = "policy {policy}, threshold {threshold:g}"
RULES: dict[PolicyName, Rule] = {
    "adaptive": Rule("tolerance {tolerance}, order {order}, {batch_decisions} decisions", is_error_controlled=True),
    "fixed": Rule("a refresh every {interval} steps, {forecast} forecast of order {order}"),
    "growing": Rule("policy {policy}"),
    "magcache": Rule(_THRESHOLD),
    "planned": Rule("policy {policy}"),
    "teacache": Rule(_THRESHOLD, is_gated=True),
    "dbcache": Rule(_THRESHOLD, is_gated=True),
    "none": Rule("policy {policy}", is_cached=False),
}
