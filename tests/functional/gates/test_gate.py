import dataclasses
import math
from typing import Any

import pytest
import torch

from afcache.functional.gates.gate import GATES, Observation, is_changed, observe, remember
from afcache.functional.gates.teacache import TEACACHE_POLYNOMIAL
from afcache.functional.model import Architecture, Embedded, Model, Parts, Sizes, scaled_dot_product_attention
from afcache.functional.state import GateState
from afcache.settings.config import CacheConfig
from afcache.settings.rules import RULES

FBCACHE = CacheConfig(policy="dbcache", first_blocks=1, threshold=0.1, order=0)
TEACACHE = CacheConfig(policy="teacache", threshold=0.6, order=0)
NOT_FORCED = torch.tensor(False)
ONES = torch.ones(2, 3, 4)


def gate(accumulated: float = 0.0, num_cached: int = 0) -> GateState:
    return GateState(ONES.clone(), torch.full((2,), accumulated), torch.full((2,), num_cached))


def change(state: GateState, features: torch.Tensor, *, config: CacheConfig) -> torch.Tensor:
    """The statistic of a step whose features are given: image tokens that the first blocks, or the modulation, made."""
    zeros = torch.zeros_like(features)
    parts = Parts(
        *[unused] * 3, observe=lambda transformer, hidden_states, temb: features, modulate=unused, attention_map=unused
    )
    architecture = Architecture(*[unused] * 6, parts=parts)
    model = Model(None, architecture, scaled_dot_product_attention, Sizes(1, 4, 1, 4))
    seen = observe(model, state, Embedded(zeros, zeros), features, config=config)
    assert seen is not None
    return seen.change


def unused(*_: Any) -> Any:
    raise AssertionError("a gate asks the model for what it compares, and for nothing else")


def test_dbcache_compares_the_relative_change_itself():
    seen = torch.stack([ONES[0] * 1.05, ONES[1] * 0.8])
    changed = change(gate(), seen, config=FBCACHE)
    torch.testing.assert_close(changed, torch.tensor([0.05, 0.2]))
    assert is_changed(gate(), changed, NOT_FORCED, config=FBCACHE).tolist() == [False, True]


def test_a_noise_floor_is_taken_off_the_change():
    seen = torch.stack([ONES[0] * 1.05, ONES[1] * 1.02])
    changed = change(gate(), seen, config=dataclasses.replace(FBCACHE, noise_floor=0.03))
    torch.testing.assert_close(changed, torch.tensor([0.04, 0.0]), rtol=1e-4, atol=1e-6)


def test_teacache_adds_up_the_polynomial_of_the_change():
    distance = 0.05
    expected = 0.3 + sum(c * distance ** (4 - i) for i, c in enumerate(TEACACHE_POLYNOMIAL))
    changed = change(gate(accumulated=0.3), ONES * (1 + distance), config=TEACACHE)
    torch.testing.assert_close(changed, torch.full((2,), expected), rtol=1e-4, atol=1e-5)


def test_teacaches_polynomial_is_never_under_018():
    """So a threshold caches the same number of steps in a row whatever the number of steps is."""
    distances = torch.linspace(0, 0.5, 501, dtype=torch.float64)
    powers = torch.stack([distances**i for i in (4, 3, 2, 1, 0)])
    values = torch.tensor(TEACACHE_POLYNOMIAL, dtype=torch.float64) @ powers
    assert 0.18 < float(values.min()) < 0.181


@pytest.mark.parametrize("config", [FBCACHE, TEACACHE])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_computes(config: CacheConfig, value: float):
    seen = ONES.clone()
    seen[0, 0, 0] = value
    changed = change(gate(), seen, config=config)
    assert is_changed(gate(), changed, NOT_FORCED, config=config).tolist() == [True, False]


def test_a_reference_of_zeros_computes():
    empty = gate()._replace(reference=torch.zeros(2, 3, 4))
    assert is_changed(empty, change(empty, ONES, config=FBCACHE), NOT_FORCED, config=FBCACHE).all()


def test_threshold_zero_a_forced_step_and_the_longest_run_compute():
    same = change(gate(), ONES, config=FBCACHE)
    assert not is_changed(gate(), same, NOT_FORCED, config=FBCACHE).any()
    assert is_changed(gate(), same, torch.tensor(True), config=FBCACHE).all()
    zero = CacheConfig(policy="dbcache", first_blocks=1, threshold=0.0, order=0)
    assert is_changed(gate(), same, NOT_FORCED, config=zero).all()
    short = CacheConfig(policy="dbcache", first_blocks=1, threshold=0.1, order=0, max_cached_steps=3)
    assert not is_changed(gate(num_cached=2), same, NOT_FORCED, config=short).any()
    assert is_changed(gate(num_cached=3), same, NOT_FORCED, config=short).all()


def test_dbcache_remembers_the_last_refresh_and_teacache_the_step_before():
    seen, refresh, changed = ONES * 2, torch.tensor([True, False]), torch.tensor([0.7, 0.4])
    after = remember(gate(num_cached=1), Observation(seen, changed), refresh, config=FBCACHE)
    assert after is not None
    assert after.reference[:, 0, 0].tolist() == [2.0, 1.0]
    after = remember(gate(num_cached=1), Observation(seen, changed), refresh, config=TEACACHE)
    assert after is not None
    assert after.reference[:, 0, 0].tolist() == [2.0, 2.0]
    torch.testing.assert_close(after.accumulated, torch.tensor([0.0, 0.4]))
    assert after.num_cached.tolist() == [0, 2]


def test_every_policy_with_a_gate_has_one():
    assert set(GATES) == {name for name, rule in RULES.items() if rule.is_gated}
