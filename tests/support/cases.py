"""Random cases of the property tests: how many, and of what.

`AFCACHE_CASES` sets how many cases each property is tried on; 50 without it. They are the same in every run.
"""

import functools
import math
import os
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from afcache import CacheConfig, CacheState
from afcache.sampling.primitives import init_state
from tests.support.toy import VelocityField, mixture_flow, polynomial_in_sigma

CASES = int(os.environ.get("AFCACHE_CASES", "50"))
RAN: Counter[str] = Counter()
_CHECKS: Any = list(HealthCheck)


def property_test(*strategies: Any, **named: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Try a test on `CASES` cases, and count in `RAN` those that it was really tried on."""

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(test)
        def counted(*args: Any, **kwargs: Any) -> None:
            RAN[test.__name__] += 1
            test(*args, **kwargs)

        # The same cases everywhere, no clock, nothing written to disk.
        how = settings(max_examples=CASES, derandomize=True, deadline=None, database=None, suppress_health_check=_CHECKS)
        return how(given(*strategies, **named)(counted))

    return decorate


def numbers(low: float, high: float) -> st.SearchStrategy[float]:
    """Floats that float32 holds exactly."""
    return st.floats(low, high, width=32, allow_subnormal=False)


@st.composite
def schedules(draw: st.DrawFn, most: int = 9) -> Tensor:
    """Falling noise levels in [0, 1], unequally spaced; `[steps + 1]`."""
    gaps = torch.tensor(draw(st.lists(st.integers(1, 20), min_size=1, max_size=most)), dtype=torch.float64)
    levels = torch.cat([torch.zeros(1, dtype=torch.float64), gaps.cumsum(0)]).flip(0)
    top = draw(st.sampled_from([1.0, 0.875, 0.25]))
    end = draw(st.sampled_from([0.0, 0.0, 0.015625]))
    return (end + (top - end) * levels / levels[0]).to(torch.float32)


@st.composite
def latents(draw: st.DrawFn) -> Tensor:
    """Noise to start from, `[batch, img_seq, channels]`."""
    shape = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 5))
    return torch.randn(*shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 2**16))))


@st.composite
def fields(draw: st.DrawFn) -> VelocityField:
    """A velocity that depends on the latents, on sigma alone, or on both and every sample in its own way."""
    kind = draw(st.sampled_from(["mixture", "polynomial", "oscillating"]))
    if kind == "mixture":
        return mixture_flow
    if kind == "polynomial":
        return polynomial_in_sigma(*draw(st.lists(numbers(-2, 2), min_size=1, max_size=5)))
    frequency = draw(numbers(0.5, 40))
    return lambda x, sigma: 0.5 * x + torch.sin(frequency * sigma[:, None, None] * (1 + x[:, :1, :1].abs()))


TOLERANCES = st.one_of(st.just(0.0), numbers(2**-12, 0.125), numbers(0.125, 8))


@st.composite
def configs(draw: st.DrawFn, **fixed: Any) -> CacheConfig:
    """Settings that work on every architecture: no gates, no groups, no blocks that run at every step."""
    order = draw(st.integers(0, 4))
    chosen = {
        "policy": draw(st.sampled_from(["adaptive", "adaptive", "fixed", "growing", "planned", "magcache", "none"])),
        "tolerance": draw(TOLERANCES),
        "warmup_steps": draw(st.integers(1, 5)),
        "max_growth": draw(st.sampled_from([1.0, 1.5, 2.0, 4.0, math.inf])),
        "interval": draw(st.integers(1, 6)),
        "interval_growth": draw(numbers(0, 2)),
        "refresh_steps": tuple(draw(st.lists(st.integers(0, 14), max_size=4))),
        "threshold": draw(numbers(0, 1)),
        "max_cached_steps": draw(st.none() | st.integers(0, 4)),
        "magnitude_ratios": tuple(draw(st.lists(numbers(0.5, 1.5), min_size=1, max_size=15))),
        "forecast": draw(st.sampled_from(["polynomial", "polynomial", "taylorseer", "chebyshev"])),
        "order": order,
        "max_nodes": draw(st.none() | st.integers(order + 1, order + 3)),
        "damping": draw(st.sampled_from([0.0, 0.0, 0.25, 1.0])),
        "learns_damping": "layerwise" not in fixed and draw(st.booleans()),
        "error_law": draw(st.sampled_from(["power", "remainder"])),
        "error_exponent": draw(st.none() | numbers(0.25, 4)),
        "noise_floor": draw(st.none() | numbers(0, 0.0625)),
        "correction": draw(st.booleans()),
        "refresh_last_step": draw(st.booleans()),
        "batch_decisions": draw(st.sampled_from(["independent", "shared"])),
    }
    return CacheConfig(**{**chosen, **fixed})


@st.composite
def node_rows(draw: st.DrawFn, *, order: int | None = None) -> tuple[Tensor, Tensor, int]:
    """Distinct nodes `[nodes, batch]` newest (smallest) first, how many are filled, and an order."""
    order = draw(st.integers(0, 4)) if order is None else order
    count, batch = draw(st.integers(order + 1, order + 3)), draw(st.integers(1, 3))
    gaps = draw(st.lists(st.integers(1, 8), min_size=count * batch, max_size=count * batch))
    nodes = torch.tensor(gaps, dtype=torch.float32).reshape(count, batch).cumsum(0) / 64
    filled = torch.tensor(draw(st.lists(st.integers(0, count), min_size=batch, max_size=batch)))
    return nodes, filled, order


@st.composite
def known_states(draw: st.DrawFn, config: CacheConfig) -> CacheState:
    """A state in the middle of some trajectory: all nodes filled, an error measured."""
    batch = draw(st.integers(1, 3))
    state = init_state(batch, 2, 3, config=config)
    count = config.num_nodes

    def values(low: float, high: float) -> Tensor:
        return torch.tensor(draw(st.lists(numbers(low, high), min_size=batch, max_size=batch)))

    gaps = draw(st.lists(st.integers(1, 8), min_size=count, max_size=count))
    nodes = 0.5 + torch.tensor(gaps, dtype=torch.float32).cumsum(0)[:, None].expand(count, batch) / 1024
    return state._replace(
        nodes=nodes.clone(),
        steps=torch.arange(count, 0, -1.0)[:, None].expand(count, batch).clone(),
        num_nodes=torch.full((batch,), count),
        error_rate=values(0, 64),
        error_order=torch.full((batch,), config.order),
        accumulated_error=values(0, 0.25),
        last_gap=values(0, 0.25),
    )
