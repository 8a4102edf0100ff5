"""Computational noise: jitter is told from smooth change, and does not count as change."""

import math

import pytest
import torch
from torch import Tensor

from afcache.functional.rounding import above_floor, computational_noise
from tests.support.toy import LATENTS, SIGMAS, Run, polynomial_in_sigma, run

POINTS = torch.linspace(-2, 2, 5) / 32


def values(function, jitter: float = 0.0) -> list[Tensor]:
    shape = (2, 64, 32)
    direction = torch.randn(shape)
    return [function(1 + x * direction) + jitter * torch.randn(shape) for x in POINTS]


def test_computational_noise_of_a_cubic_is_zero():
    assert computational_noise(values(lambda x: 2 - x + 3 * x**3)).max() < 1e-5


@pytest.mark.parametrize("function", [lambda x: x, torch.exp, lambda x: torch.sin(3 * x)], ids=["line", "exp", "sine"])
@pytest.mark.parametrize("jitter", [0.003, 0.03])
def test_computational_noise_is_the_relative_standard_deviation_of_the_jitter(function, jitter: float):
    scale = float(function(torch.ones(1)).abs())
    noise = computational_noise(values(function, jitter))
    assert torch.allclose(noise, torch.full((2,), jitter / scale), rtol=0.1)


def test_computational_noise_takes_latents_of_any_rank():
    velocities = values(lambda x: x**5, 1e-3)
    reshaped = [velocity.reshape(2, 4, 16, 32) for velocity in velocities]
    torch.testing.assert_close(computational_noise(reshaped), computational_noise(velocities))


def test_above_floor_takes_independent_noise_off():
    floor = torch.tensor(0.03)
    measured = torch.tensor([0.05, 0.03, 0.01, 0.0, math.inf, math.nan])
    assert torch.allclose(above_floor(measured, floor)[:5], torch.tensor([0.04, 0.0, 0.0, 0.0, math.inf]))
    assert above_floor(measured, floor)[5].isnan()


def test_above_floor_of_zero_changes_nothing():
    measured = torch.tensor([0.05, 1e-30, 0.0, math.inf])
    assert torch.equal(above_floor(measured, torch.tensor(0.0)), measured)


def noisy_run(noise_floor: float, tolerance: float = 0.002) -> Run:
    """A velocity that never changes but for jitter of 2 %."""
    exact, generator = polynomial_in_sigma(1.0), torch.Generator().manual_seed(0)

    def field(x: Tensor, sigma: Tensor) -> Tensor:
        velocity = exact(x, sigma)
        return velocity * (1 + 0.02 * torch.randn(velocity.shape, generator=generator))

    latents = LATENTS[:1].repeat(1, 16, 8)
    return run(
        field,
        latents=latents,
        sigmas=SIGMAS,
        tolerance=tolerance,
        warmup_steps=2,
        order=0,
        damping=0.0,
        noise_floor=noise_floor,
    )


def test_noise_below_the_floor_asks_for_no_refresh():
    """Without a floor, jitter is taken for change; with it, refreshes are those of the velocity without jitter."""
    quiet = run(polynomial_in_sigma(1.0), latents=LATENTS[:1], tolerance=0.002, warmup_steps=2, order=0).pattern()
    assert noisy_run(0.0).pattern().count("F") > quiet.count("F")
    assert noisy_run(0.03).pattern() == quiet


def test_a_floor_refreshes_every_step_at_tolerance_zero():
    assert noisy_run(0.5, tolerance=0.0).pattern() == "F" * 28
