import dataclasses
import itertools
import math

import pytest
import torch

from afcache import POLICIES, CacheConfig, policy
from afcache.functional.plans import (
    forced_steps,
    growing_plan,
    magnitude_plan,
    resample_ratios,
    schedule_steps,
    tolerance_scale,
)


def pattern(config: CacheConfig, steps: int = 28) -> str:
    return "".join("F" if forced else "." for forced in forced_steps(config, steps))


def test_magcache_with_its_authors_ratios_gives_its_authors_schedule():
    """The official code at 28 steps, K = 5, threshold 0.24 computes these 9."""
    assert pattern(POLICIES["magcache"]) == "FFF..F...F.F.....F.....F..F."


@pytest.mark.parametrize(("steps", "first"), [(1, 1), (2, 2), (3, 3), (4, 3), (5, 3), (10, 3), (11, 2), (28, 2)])
def test_few_steps_start_with_three_computed_ones(steps: int, first: int):
    assert pattern(policy("adaptive", warmup_steps=2), steps) == "F" * first + "." * (steps - first)
    assert pattern(policy("adaptive", warmup_steps=4), steps) == ("FFFF" + "." * steps)[:steps]
    assert pattern(policy("fixed", interval=100, warmup_steps=2), steps) == ("FF" + "." * steps)[:steps]


@pytest.mark.parametrize(("steps", "scale"), [(1, 16), (4, 4), (5, 3.2), (8, 2), (10, 1.6), (15, 16 / 15)])
def test_few_steps_may_add_more_each(steps: int, scale: float):
    sigmas = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    assert float(tolerance_scale(sigmas)) == pytest.approx(scale)
    each = (CacheConfig(tolerance=0.01), CacheConfig(tolerance=0.0))
    for step in schedule_steps(sigmas, each[0], each=each):
        assert step.tolerance.tolist() == pytest.approx([0.01 * scale, 0.0])
    assert float(schedule_steps(sigmas, CacheConfig(policy="fixed", tolerance=0.01))[0].tolerance) == pytest.approx(0.01)


@pytest.mark.parametrize("steps", [16, 17, 20, 28, 50, 1000])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_many_steps_have_the_tolerance_that_was_set_to_the_bit(steps: int, shift: float):
    sigmas = torch.linspace(1, 0, steps + 1)
    sigmas = shift * sigmas / (1 + (shift - 1) * sigmas)
    for step in schedule_steps(sigmas, CacheConfig(tolerance=0.01)):
        assert torch.equal(step.tolerance, torch.tensor(0.01))


def test_the_last_steps_of_a_long_schedule_are_as_short_as_all():
    """Image to image with a strength of 0.3 walks 8 of 28 steps."""
    assert float(tolerance_scale(torch.linspace(1, 0, 29)[20:])) == 1.0


def test_magcache_re_computed_by_hand():
    ratios = [1.0, 1.0, 0.9, 0.9, 0.9, 1.0, 1.2, 1.0, 1.0, 1.0]
    # From step 1 on: products 1, .9, .81 give errors 0, .1, .29; .24 is passed at step 3. Step 4 (of 10: 11 / 28) is forced.
    # Then 1: 0; 1.2: .2; 1.2: .4 at step 7. Then two cached steps are the limit.
    assert magnitude_plan(10, ratios, threshold=0.24, max_cached_steps=2) == [0, 3, 4, 7]


def test_magcache_at_threshold_zero_computes_every_step():
    assert magnitude_plan(10, [1.0] * 10, threshold=0.0) == list(range(10))


def test_ratios_are_resampled_to_the_nearest_step():
    assert resample_ratios([1.0, 2.0, 3.0, 4.0], 7) == [1.0, 1.0, 2.0, 3.0, 3.0, 3.0, 4.0]
    assert resample_ratios([1.0, 2.0, 3.0], 3) == [1.0, 2.0, 3.0]
    assert resample_ratios([1.0, 2.0, 3.0], 1) == [3.0]


@pytest.mark.parametrize(("growth", "computed"), [(0.75, 14), (3.0, 10)])
def test_spectrum_computes_as_many_of_50_steps_as_its_authors(growth: float, computed: int):
    assert pattern(policy("spectrum", interval_growth=growth), 50).count("F") == computed


def test_growing_plan_re_computed_by_hand():
    # Distances floor(2), floor(2.75), floor(3.5), floor(4.25), ...
    assert growing_plan(20, first=4, interval=2, growth=0.75) == [4, 6, 8, 11, 15]


def test_planned_steps_come_on_top_of_the_warmup_and_later_ones_are_left_out():
    config = CacheConfig(policy="planned", refresh_steps=(4, 6, 90), warmup_steps=2)
    assert pattern(config, 9) == "FF..F.F.."
    assert pattern(dataclasses.replace(config, refresh_last_step=True), 9) == "FF..F.F.F"


def test_a_schedule_carries_the_plan_as_tensors():
    config = CacheConfig(policy="fixed", interval=3, warmup_steps=1)
    steps = schedule_steps(torch.linspace(1, 0, 8), config)
    assert [bool(step.is_forced) for step in steps] == [True, False, False, True, False, False, True]
    assert [int(step.step_index) for step in steps] == list(range(7))
    assert all(a.sigma_next == b.sigma for a, b in itertools.pairwise(steps))


def test_a_schedule_carries_settings_for_all_samples_or_for_each():
    config, sigmas = CacheConfig(tolerance=0.03, max_growth=math.inf, damping=0.3), torch.linspace(1, 0, 17)
    for step in schedule_steps(sigmas, config):
        assert [float(step.tolerance), float(step.max_growth)] == [pytest.approx(0.03), math.inf]
        assert float(step.damping) == pytest.approx(0.3)
        assert step.tolerance.shape == step.max_growth.shape == step.damping.shape == ()
    each = (config, dataclasses.replace(config, tolerance=0.5, max_growth=2.0, damping=0.0))
    for step in schedule_steps(sigmas, config, each=each):
        assert step.tolerance.tolist() == pytest.approx([0.03, 0.5])
        assert step.max_growth.tolist() == [math.inf, 2.0]
        assert step.damping.tolist() == pytest.approx([0.3, 0.0])
        assert step.noise_floor.ndim == 0
