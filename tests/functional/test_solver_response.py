"""What forecasts leave out is returned to a solver that mixes several outputs: exact where errors grow by their law."""

import itertools
from typing import Any

import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from afcache.functional import error_control
from afcache.functional.solver_response import WINDOW, respond
from afcache.functional.state import SolverState
from afcache.runtime.scheduler import ScheduledStep, noise_levels
from afcache.runtime.solver import response_of

FLOW: dict[str, Any] = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
SCHEDULERS = {
    "euler": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
    **{f"dpm++ {n}": lambda n=n: DPMSolverMultistepScheduler(solver_order=n, **FLOW) for n in (1, 2, 3)},
    "dpm++ 2, heun": lambda: DPMSolverMultistepScheduler(solver_type="heun", **FLOW),
    "dpm++ 2, Euler at the end": lambda: DPMSolverMultistepScheduler(**FLOW, euler_at_final=True),
    **{f"singlestep {n}": lambda n=n: DPMSolverSinglestepScheduler(solver_order=n, **FLOW) for n in (1, 2, 3)},
    **{f"unipc {n}": lambda n=n: UniPCMultistepScheduler(solver_order=n, **FLOW) for n in (1, 2, 3)},
    "ddim, v": lambda: DDIMScheduler(clip_sample=False, prediction_type="v_prediction"),
    "dpm++ 2, v": lambda: DPMSolverMultistepScheduler(prediction_type="v_prediction"),
    "cogvideox": lambda: CogVideoXDDIMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction"),
    "unipc, few corrections": lambda: UniPCMultistepScheduler(disable_corrector=[0, 1, 2], **FLOW),
}
STEPS = 14
BATCH = torch.arange(2)
# Where each of two samples computes: neighbours, long runs, and the last step.
PATTERNS = {
    "every third": ("FF..F..F..F..F", "FF..F..F..F..F"),
    "growing": ("FF.F...F.....F", "FFF....F.F...F"),
    "one run": ("FF...........F", "FFFFFFFFFFFFFF"),
    "each its own": ("FF.F.F.F.F.F.F", "FF....F......F"),
}


def velocity_at(sigma: Tensor, degree: int) -> Tensor:
    """`[batch, 4]`, the same for all latents."""
    generator = torch.Generator().manual_seed(degree)
    first, *others = torch.randn(degree + 1, 2, 4, generator=generator, dtype=torch.float64)
    return first + sum(slope * sigma**power for power, slope in enumerate(others, 1))


def sample(scheduler: Any, pattern: tuple[str, str] | None, *, corrects: bool = True, steps: int = STEPS) -> Tensor:
    """Latents at the end, where forecasts reuse the last computed velocity, and errors grow as |sigma - sigma_n|."""
    scheduler.set_timesteps(steps)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    sigmas = noise_levels(scheduler)
    responses = response_of(scheduler, ScheduledStep(scheduler.timesteps, sigmas, 0))
    assert responses is not None
    x = torch.ones(2, 4, 1, 1, dtype=torch.float64)
    kept, nodes = torch.zeros(2, 4), torch.zeros(2)
    solver = SolverState(torch.zeros(WINDOW - 1, 2), torch.zeros(WINDOW - 1, 2), torch.zeros(2, 4))
    for index, timestep in enumerate(scheduler.timesteps):
        sigma = sigmas[index].to(torch.float32)
        computed = velocity_at(sigma.double(), 1).float()
        refresh = torch.tensor([pattern is None or pattern[i][index] == "F" for i in BATCH])
        velocity = torch.where(refresh[:, None], computed, kept)
        growth = (sigma - nodes).abs()
        if corrects and pattern is not None:
            velocity, solver = respond(solver, velocity, kept, responses[index], growth=growth, refresh=refresh)
        kept, nodes = torch.where(refresh[:, None], computed, kept), torch.where(refresh, sigma, nodes)
        x = scheduler.step(velocity.double()[..., None, None], timestep, x, return_dict=False)[0]
    return x


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_velocity_that_is_linear_in_sigma_ends_where_it_would(name: str, pattern: str):
    expected = sample(SCHEDULERS[name](), None)
    corrected = sample(SCHEDULERS[name](), PATTERNS[pattern])
    plain = sample(SCHEDULERS[name](), PATTERNS[pattern], corrects=False)
    assert (corrected - expected).abs().max() < 1e-5
    assert (plain - expected).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["euler", "dpm++ 2", "dpm++ 3", "unipc 2", "unipc 3", "singlestep 2"])
def test_schedules_longer_than_the_window_are_no_exception(name: str):
    steps = 150
    sparse = "".join("F" if index < 2 or index % 24 == 0 or index == steps - 1 else "." for index in range(steps))
    dense = "".join("F" if index in (0, 1, 40) or index > 70 else "." for index in range(steps))
    expected = sample(SCHEDULERS[name](), None, steps=steps)
    corrected = sample(SCHEDULERS[name](), (sparse, dense), steps=steps)
    plain = sample(SCHEDULERS[name](), (sparse, dense), corrects=False, steps=steps)
    assert (corrected - expected).abs().max() < 5e-5
    assert (plain - expected).abs().max() > 1e-2


def test_under_eulers_step_it_is_the_correction_at_refreshes():
    scheduler = SCHEDULERS["euler"]()
    scheduler.set_timesteps(STEPS)
    responses = response_of(scheduler, ScheduledStep(scheduler.timesteps, scheduler.sigmas, 0))
    assert responses is not None
    sigmas = scheduler.sigmas.to(torch.float32)
    generator = torch.Generator().manual_seed(0)
    solver = SolverState(torch.zeros(WINDOW - 1, 1), torch.zeros(WINDOW - 1, 1), torch.zeros(1, 4))
    lag = torch.zeros(1)
    for index, (sigma, after) in enumerate(itertools.pairwise(sigmas)):
        growth = torch.rand(1, generator=generator) + 0.1
        forecast, computed = torch.randn(2, 1, 4, generator=generator)
        refresh = torch.tensor([index % 4 == 1])
        velocity = computed if bool(refresh) else forecast
        returned, solver = respond(solver, velocity, forecast, responses[index], growth=growth, refresh=refresh)
        expected = velocity
        if bool(refresh):
            expected = error_control.catch_up(velocity, forecast, lag=lag, growth=growth, sigma=sigma, sigma_next=after)
        lag = torch.zeros(1) if bool(refresh) else error_control.extend_lag(lag, growth, sigma, after)
        assert torch.allclose(returned, expected, atol=1e-5)


def test_what_is_not_finite_is_left_out():
    solver = SolverState(torch.ones(WINDOW - 1, 1), torch.zeros(WINDOW - 1, 1), torch.zeros(1, 4))
    velocity = torch.ones(1, 4)
    response = torch.ones(WINDOW)
    returned, after = respond(
        solver, velocity, 0 * velocity, response, growth=torch.zeros(1), refresh=torch.ones(1, dtype=torch.bool)
    )
    assert torch.equal(returned, velocity)
    assert not after.settled.any()
