"""Where a step leads, and what counts as elsewhere: per sample, whatever the guidance scale."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor

import afcache
from afcache import CacheConfig
from afcache.functional.continuity import is_elsewhere, trail_of
from afcache.functional.initial import empty_trail, uncoupled
from afcache.functional.model import scaled_dot_product_attention
from afcache.functional.plans import schedule_steps
from afcache.functional.state import StepSchedule, Trail
from afcache.sampling.primitives import cached_forward, init_state
from tests.support.toy import LATENTS, SIGMAS, TOY, Toy, ToyInputs, mixture_flow

BATCH, SHAPE = 3, (3, 16, 4)


def drawn(seed: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def step_at(index: int = 5) -> StepSchedule:
    return schedule_steps(torch.linspace(1, 0, 21), CacheConfig())[index]


def after(latents: Tensor, *velocities: Tensor, scale: float = 1.0, step: StepSchedule | None = None) -> Tensor:
    """What Euler's step makes of one or two branches."""
    step = step_at() if step is None else step
    first, *others = velocities
    velocity = others[0] + scale * (first - others[0]) if others else first
    return latents + (step.sigma_next - step.sigma) * velocity


def unit(seed: int) -> Tensor:
    noise = drawn(seed)
    return noise / noise.flatten(1).norm(dim=1)[:, None, None]


X, V, W = drawn(0), drawn(1), drawn(2)
TRAIL, OTHER = trail_of(X, V, step_at()), trail_of(X, W, step_at())


def test_a_trail_is_eulers_step_and_its_length():
    assert torch.equal(TRAIL.latents, after(X, V))
    torch.testing.assert_close(TRAIL.length, (V / 20).flatten(1).norm(dim=1))
    torch.testing.assert_close(TRAIL.sigma, torch.full((BATCH,), 0.7))


@pytest.mark.parametrize("lengths", [0.0, 0.5, 1.9, 2.1, 5.0, math.nan])
def test_two_lengths_of_the_step_are_the_limit(lengths: float):
    there = after(X, V) + lengths * TRAIL.length[:, None, None] * unit(3)
    assert is_elsewhere(there, (TRAIL,), step_at(6).sigma).tolist() == [not lengths <= 2] * BATCH


@pytest.mark.parametrize("scale", [-3.0, 0.0, 0.5, 1.0, 4.0, 50.0])
def test_guidance_leads_along_the_line_of_both_branches(scale: float):
    there, sigma = after(X, V, W, scale=scale), step_at(6).sigma
    assert not bool(is_elsewhere(there, (TRAIL, OTHER), sigma).any())
    away = there + 3 * torch.maximum(TRAIL.length, OTHER.length)[:, None, None] * unit(3)
    assert bool(is_elsewhere(away, (TRAIL, OTHER), sigma).all())


def test_a_branch_that_was_not_called_at_the_last_step_draws_no_line():
    there, sigma = after(X, V, W, scale=50.0), step_at(6).sigma
    for stale in (empty_trail(SHAPE), trail_of(X, W, step_at(4))):
        assert bool(is_elsewhere(there, (TRAIL, stale), sigma).all())
        assert not bool(is_elsewhere(after(X, V), (TRAIL, stale), sigma).any())


def test_branches_that_agree_draw_no_line():
    assert not bool(is_elsewhere(after(X, V), (TRAIL, TRAIL), step_at(6).sigma).any())


def test_samples_are_judged_by_themselves():
    there = after(X, V)
    there[1] = drawn(7)[1]
    assert is_elsewhere(there, (TRAIL,), step_at(6).sigma).tolist() == [False, True, False]


def test_another_noise_level_is_elsewhere_and_before_the_first_step_nothing_is():
    there = after(X, V)
    assert bool(is_elsewhere(there, (TRAIL,), step_at(7).sigma).all())
    assert bool(is_elsewhere(there, (TRAIL,), step_at(5).sigma).all())
    assert not bool(is_elsewhere(drawn(9), (empty_trail(SHAPE),), step_at(6).sigma).any())


@pytest.mark.parametrize(("first", "second"), [(0.0, 0.0), (3.0, -2.0), (5.0, 40.0)])
def test_three_branches_lead_into_their_plane(first: float, second: float):
    third = trail_of(X, drawn(4), step_at())
    there = TRAIL.latents + first * (TRAIL.latents - OTHER.latents) + second * (TRAIL.latents - third.latents)
    sigma, trails = step_at(6).sigma, (TRAIL, OTHER, third)
    assert not bool(is_elsewhere(there, trails, sigma).any())
    length = torch.stack([trail.length for trail in trails]).amax(0)[:, None, None]
    assert bool(is_elsewhere(there + 4 * length * unit(5), trails, sigma).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_is_no_jump(dtype: torch.dtype):
    """A velocity of nearly nothing: what is left of the step is rounding."""
    latents = (100 * X).to(dtype)
    there = after(latents.float(), 1e-6 * V).to(dtype)
    trail = trail_of(latents, 1e-6 * V.to(dtype), step_at())
    assert not bool(is_elsewhere(there, (trail,), step_at(6).sigma).any())


def walk(
    config: CacheConfig, *, leap_at: int, channels: int = LATENTS.shape[2]
) -> tuple[str, list[list[bool] | None], Trail | None]:
    """A trajectory by hand whose first sample leaves it before one step: what was computed, and who began anew."""
    state = init_state(*LATENTS.shape, config=config, channels=channels)
    latents, pattern, restarted = LATENTS, "", []
    toy: Toy = Toy(mixture_flow)
    for index, schedule in enumerate(schedule_steps(SIGMAS, config)):
        if index == leap_at:
            latents = torch.cat([latents[:1].flip(1) + 1, latents[1:]])
        inputs = ToyInputs(latents, schedule.sigma.expand(len(latents)))
        velocity, state, record = cached_forward(
            toy,
            inputs,
            state,
            schedule,
            uncoupled(len(latents)),
            architecture=TOY,
            kernel=scaled_dot_product_attention,
            config=config,
        )
        pattern += "F" if bool(record.refresh[0]) else "."
        restarted.append(None if record.restarted is None else record.restarted.tolist())
        latents = latents + (schedule.sigma_next - schedule.sigma) * velocity
    return pattern, restarted, state.trail


CONFIGS = {
    "noise": CacheConfig(target="noise", tolerance=0.05),
    "velocity": CacheConfig(target="velocity", tolerance=0.05),
    "residual": CacheConfig(tolerance=0.05),
    "taylorseer": dataclasses.replace(afcache.policy("taylorseer", interval=9)),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_sample_that_leaps_is_computed_and_its_neighbours_go_on(name: str):
    calm, _, _ = walk(CONFIGS[name], leap_at=-1)
    leap = next(index for index in range(8, len(calm)) if calm[index] == ".")
    pattern, restarted, _ = walk(CONFIGS[name], leap_at=leap)
    assert pattern[leap] == "F"
    others = [False] * (len(LATENTS) - 1)
    assert restarted == [[index == leap, *others] for index in range(len(pattern))]


def test_a_state_of_residuals_without_channels_does_not_look():
    _, restarted, trail = walk(CONFIGS["residual"], leap_at=8, channels=0)
    assert trail is None
    assert set(restarted) == {None}
