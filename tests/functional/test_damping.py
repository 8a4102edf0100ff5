"""Damping that is learnt: what a refresh finds, and what becomes of it."""

import math

import pytest
import torch
from torch import Tensor

from afcache import CacheConfig, Layerwise
from afcache.functional.decision import damping_of
from afcache.functional.plans import schedule_steps
from tests.support.toy import LATENTS, SIGMAS, mixture_flow, polynomial_in_sigma, run, sample_toy

# Refreshes at steps 0, 1, 4, 7, ...
FIXED = {"policy": "fixed", "interval": 3, "warmup_steps": 2, "learns_damping": True, "correction": False}


def learnt(field, **settings) -> list[float]:
    """The damping after each step, of the first sample."""
    result = run(field, **{**FIXED, **settings})
    return [round(float(state.damping[0]), 5) for state in result.states[1:] if state.damping is not None]


def test_along_a_straight_line_nothing_is_damped():
    """Found is 0 at every refresh, and what is used goes half of the way there each time."""
    found = learnt(polynomial_in_sigma(0.3, 1.1), damping=0.4)
    assert all(math.isnan(value) for value in found[:4])
    assert found[4:11] == pytest.approx([0.2, 0.2, 0.2, 0.1, 0.1, 0.1, 0.05], abs=1e-4)


def test_where_a_path_goes_back_it_is_reused():
    """Values go up and down: 0.6 of 4/3 after gaps of 1 and 3 steps, then 1.2 after equal ones, of which 1 is reuse."""

    def zigzag(x: Tensor, sigma: Tensor) -> Tensor:
        index = (SIGMAS[None] - sigma[:, None]).abs().argmin(1)
        refresh = (index + 2) // 3
        return ((-1.0) ** refresh)[:, None, None].expand_as(x).contiguous()

    assert learnt(zigzag, damping=0.0)[4:8] == pytest.approx([0.4, 0.4, 0.4, 0.7], abs=0.01)


def test_half_of_a_step_is_half_of_an_extrapolation():
    """By hand: z moves by 1, then over twice the distance by 1 again, which is half of what a line would have.

    0.6 of that half are believed.
    """
    levels = torch.tensor([1.0, 0.9, 0.8, 0.7, 0.6])
    values = {1.0: 0.0, 0.9: 1.0, 0.8: 9.0, 0.7: 2.0, 0.6: 0.0}

    def field(x: Tensor, sigma: Tensor) -> Tensor:
        value = torch.tensor([values[round(float(level), 3)] for level in sigma])
        return value[:, None, None].expand_as(x).contiguous()

    config = CacheConfig(**{**FIXED, "interval": 2, "damping": 0.1})  # pyright: ignore[reportArgumentType]
    result = sample_toy(field, levels, config, latents=LATENTS)
    assert result.pattern() == "FF.F"
    assert result.state.damping is not None
    assert result.state.damping.tolist() == pytest.approx([(0.1 + 0.6 * 0.5) / 2] * 2, abs=1e-5)


def test_what_does_not_move_says_nothing():
    assert all(math.isnan(value) for value in learnt(polynomial_in_sigma(0.7)))


def test_what_is_learnt_damps_the_forecast():
    settings = {**FIXED, "damping": 0.2}
    apart = run(mixture_flow, **settings)
    fixed = run(mixture_flow, **{**settings, "learns_damping": False})
    # Until the first refresh with two nodes behind it, they are the same.
    assert torch.equal(apart.path[5], fixed.path[5])
    assert not torch.equal(apart.path[6], fixed.path[6])
    assert fixed.state.damping is None


def test_samples_learn_by_themselves():
    config = CacheConfig(tolerance=0.01, warmup_steps=2, damping=0.2, learns_damping=True)
    latents = LATENTS * torch.tensor([1.0, 0.3])[:, None, None]
    both = sample_toy(mixture_flow, SIGMAS, config, latents=latents)
    assert both.state.damping is not None
    assert both.state.damping[0] != both.state.damping[1]
    for sample in range(2):
        alone = sample_toy(mixture_flow, SIGMAS, config, latents=latents[sample : sample + 1])
        assert alone.pattern() == both.pattern(sample)
        assert torch.equal(alone.latents[0], both.latents[sample])


def test_until_something_is_learnt_the_setting_holds():
    config = CacheConfig(damping=0.3, learns_damping=True)
    (schedule, *_) = schedule_steps(SIGMAS, config)
    state = sample_toy(mixture_flow, SIGMAS, config, latents=LATENTS).states[0]
    assert damping_of(state, schedule).tolist() == pytest.approx([0.3, 0.3])
    some = state._replace(damping=torch.tensor([0.7, math.nan]))
    assert damping_of(some, schedule).tolist() == pytest.approx([0.7, 0.3])


def test_groups_learn_nothing():
    with pytest.raises(ValueError, match="learns_damping cannot be combined with layerwise"):
        CacheConfig(learns_damping=True, layerwise=Layerwise())
