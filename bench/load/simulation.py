"""Three batchers by their own clock: no cache, a cache that sits in the model, and a state for each request.

A request is the pattern of its steps, F or ., as it would be alone. A computed call takes its samples times the cost of one
(GPUs at work on images of a million pixels are that linear: docs/results.md), a forecast one next to nothing.
"""

import heapq
from collections.abc import Callable, Sequence
from typing import NamedTuple


class Costs(NamedTuple):
    """Seconds.

    Attributes:
        computed: of a sample's step that is computed.
        cached: of a call in which all steps are forecast, however many.

    """

    computed: float
    cached: float


class Arrival(NamedTuple):
    """A request.

    Attributes:
        time: when it comes.
        pattern: of its steps.

    """

    time: float
    pattern: str


# (arrivals in the order of their times, costs, samples of a call at most) -> latencies in the same order.
Batching = Callable[[Sequence[Arrival], Costs, int], list[float]]


def uncached(arrivals: Sequence[Arrival], costs: Costs, max_batch: int) -> list[float]:
    """Continuous batching: every step of every request is computed, up to `max_batch` of them at a time."""
    return own_states([each._replace(pattern="F" * len(each.pattern)) for each in arrivals], costs, max_batch)


def one_state(arrivals: Sequence[Arrival], costs: Costs, max_batch: int) -> list[float]:
    """A cache that sits in the model: a batch begins together, and what one of it must compute, all compute."""
    latencies, now, index = [], 0.0, 0
    while index < len(arrivals):
        now = max(now, arrivals[index].time)
        batch = [each for each in arrivals[index : index + max_batch] if each.time <= now]
        for step in range(max(len(each.pattern) for each in batch)):
            left = [each for each in batch if step < len(each.pattern)]
            is_computed = any(each.pattern[step] == "F" for each in left)
            now += costs.computed * len(left) if is_computed else costs.cached
            latencies += [now - each.time for each in left if step == len(each.pattern) - 1]
        index += len(batch)
    return latencies


def own_states(arrivals: Sequence[Arrival], costs: Costs, max_batch: int) -> list[float]:
    """A state for each: calls are filled with those that are due, the longest waiting first; all others are forecast."""
    # (due since, number, step that is due).
    due: list[tuple[float, int, int]] = []
    latencies = [0.0] * len(arrivals)
    now, index = 0.0, 0
    while due or index < len(arrivals):
        if not due:
            now = max(now, arrivals[index].time)
        while index < len(arrivals) and arrivals[index].time <= now:
            heapq.heappush(due, (arrivals[index].time, index, 0))
            index += 1
        chosen = [heapq.heappop(due) for _ in range(min(max_batch, len(due)))]
        now += costs.computed * len(chosen)
        # As many calls as the longest run of forecasts has steps.
        runs = [_run(arrivals[number].pattern, step) for _, number, step in chosen]
        now += costs.cached * max(runs)
        for (_, number, step), run in zip(chosen, runs, strict=True):
            following = step + 1 + run
            if following < len(arrivals[number].pattern):
                heapq.heappush(due, (now, number, following))
            else:
                latencies[number] = now - arrivals[number].time
    return latencies


def _run(pattern: str, step: int) -> int:
    """Forecast steps between a computed one and the next, or the end."""
    rest = pattern[step + 1 :]
    return rest.index("F") if "F" in rest else len(rest)


BATCHERS: dict[str, Batching] = {"no cache": uncached, "one state for a batch": one_state, "AFCache": own_states}
