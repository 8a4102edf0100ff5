"""Schedules of models that are no flow's: what is read of them is what their schedulers do."""

from typing import Any

import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    UniPCMultistepScheduler,
)

from afcache.functional.process import moved
from afcache.runtime.diffusion import is_diffusion, levels_of, processes_of
from afcache.runtime.scheduler import ScheduledStep, check_scheduler, check_sigmas, is_eulers, is_solver, noise_levels
from afcache.runtime.solver import response_of

COG: dict[str, Any] = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
MAKERS: dict[str, Any] = {
    "DDIM": lambda: DDIMScheduler(clip_sample=False),
    "DDIM, v": lambda: DDIMScheduler(clip_sample=False, prediction_type="v_prediction"),
    "DDIM, from 1": lambda: DDIMScheduler(clip_sample=False, steps_offset=1, set_alpha_to_one=False),
    "CogVideoX": lambda: CogVideoXDDIMScheduler(snr_shift_scale=3.0, **COG),
    "DPM++": lambda: DPMSolverMultistepScheduler(beta_start=0.0001),
    "DPM++, v": lambda: DPMSolverMultistepScheduler(prediction_type="v_prediction", use_karras_sigmas=True),
    "DPM++, single": lambda: DPMSolverSinglestepScheduler(),
    "UniPC": lambda: UniPCMultistepScheduler(),
}
CPU = torch.device("cpu")


@pytest.fixture(params=MAKERS, name="scheduler")
def _scheduler(request: pytest.FixtureRequest) -> Any:
    scheduler = MAKERS[request.param]()
    scheduler.set_timesteps(20)
    return scheduler


def test_noise_levels_fall_from_1_to_0(scheduler: Any):
    check_scheduler(scheduler)
    assert is_diffusion(scheduler)
    assert is_solver(scheduler)
    assert not is_eulers(scheduler)
    levels = levels_of(scheduler)
    check_sigmas(levels)
    assert levels.shape == (21,)
    assert bool((levels.diff() < 0).all())
    assert 0.9 < float(levels[0]) <= 1
    assert 0 <= float(levels[-1]) < 0.1


def test_a_first_step_is_what_is_said_of_it(scheduler: Any):
    x, output = (torch.randn(1, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(n)) for n in range(2))
    after = scheduler.step(output, scheduler.timesteps[0], x, return_dict=False)[0]
    process = processes_of(scheduler, 0, CPU)[0]
    torch.testing.assert_close(x.float() + moved(x.float(), output.float(), torch.tensor(0.0), process=process), after.float())


@pytest.mark.parametrize("name", ["DDIM", "DDIM, v", "DDIM, from 1", "CogVideoX"])
@pytest.mark.parametrize("steps", [20, 28])
def test_every_step_of_one_step_solvers_is_what_is_said_of_it(name: str, steps: int):
    """Of 28, they leave their own schedule by rounding."""
    scheduler = MAKERS[name]()
    scheduler.set_timesteps(steps)
    x = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    processes = processes_of(scheduler, 0, CPU)
    for index, (timestep, process) in enumerate(zip(scheduler.timesteps, processes, strict=True)):
        output = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(index + 1))
        after = scheduler.step(output, timestep, x, return_dict=False)[0]
        expected = x + moved(x, output, torch.tensor(0.0), process=process)
        torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-4 * float(x.abs().max()))
        x = after


def test_part_of_a_schedule_is_the_end_of_it(scheduler: Any):
    whole, part = processes_of(scheduler, 0, CPU), processes_of(scheduler, 12, CPU)
    assert [tuple(map(float, each)) for each in part] == [tuple(map(float, each)) for each in whole[12:]]


def test_levels_are_the_same_tensor_until_the_schedule_is_another(scheduler: Any):
    first = noise_levels(scheduler)
    assert noise_levels(scheduler) is first
    scheduler.set_timesteps(20)
    assert noise_levels(scheduler) is not first
    assert torch.equal(noise_levels(scheduler), first)
    if hasattr(scheduler, "sigmas"):
        before = noise_levels(scheduler)
        scheduler.sigmas[3] = (scheduler.sigmas[2] + scheduler.sigmas[3]) / 2
        assert not torch.equal(noise_levels(scheduler), before)


def test_their_response_is_found(scheduler: Any):
    step = ScheduledStep(scheduler.timesteps, noise_levels(scheduler), 0)
    response = response_of(scheduler, step)
    assert response is not None
    added = [float(process.added) for process in processes_of(scheduler, 0, CPU)]
    # The newest output's weight is a first-order step's where nothing is remembered.
    assert float(response[0, 0]) == pytest.approx(added[0], rel=1e-4)


@pytest.mark.parametrize("name", ["DDIM", "CogVideoX"])
def test_the_response_is_that_of_betas_that_were_put_in(name: str):
    scheduler = MAKERS[name]()
    scheduler.alphas_cumprod = DDIMScheduler(beta_schedule="squaredcos_cap_v2").alphas_cumprod.clamp(min=1e-3)
    scheduler.set_timesteps(20)
    response = response_of(scheduler, ScheduledStep(scheduler.timesteps, noise_levels(scheduler), 0))
    assert response is not None
    added = torch.stack([process.added for process in processes_of(scheduler, 0, CPU)])
    torch.testing.assert_close(response[:, 0], added, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("change", [{"clip_sample": True}, {"thresholding": True, "clip_sample": False}])
def test_what_cuts_images_off_is_not_linear(change: dict[str, Any]):
    scheduler = DDIMScheduler(**change)
    scheduler.set_timesteps(20)
    check_scheduler(scheduler)
    assert response_of(scheduler, ScheduledStep(scheduler.timesteps, noise_levels(scheduler), 0)) is None


@pytest.mark.parametrize(
    "scheduler",
    [DDIMScheduler(set_alpha_to_one=False), DPMSolverMultistepScheduler(use_karras_sigmas=True, final_sigmas_type="sigma_min")],
    ids=["DDIM", "DPM++"],
)
def test_a_last_level_that_repeats_is_no_sigma_of_the_scheduler(scheduler: Any):
    scheduler.set_timesteps(20)
    with pytest.raises(
        ValueError, match=r"the noise level of scheduler, .*, repeats 0\.0\d+ at steps 19 and 20; .*steps_offset=1"
    ):
        check_sigmas(levels_of(scheduler), is_flow=False)


def test_predictions_of_clean_images_are_refused():
    for scheduler in (DDIMScheduler(prediction_type="sample"), DPMSolverMultistepScheduler(prediction_type="sample")):
        with pytest.raises(NotImplementedError, match="is not supported; caching knows"):
            check_scheduler(scheduler)
