import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

from afcache._typing import HostModule
from afcache.schedule import check_scheduler, check_sigmas, correction_holds, read_step


def make_scheduler(steps: int = 10) -> HostModule:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(steps)
    return scheduler


def timestep(scheduler: HostModule, index: int, dtype=torch.float32) -> torch.Tensor:
    return (scheduler.timesteps[index] / 1000).to(dtype).expand(2)


def test_read_step_prefers_step_index_then_begin_index_then_the_timestep():
    scheduler = make_scheduler()
    found = read_step(scheduler, timestep(scheduler, 4), verify=True)
    assert found is not None
    assert found.index == 4
    scheduler.set_begin_index(3)
    assert read_step(scheduler, timestep(scheduler, 4), verify=True) is None
    found = read_step(scheduler, timestep(scheduler, 3), verify=True)
    assert found is not None
    assert found.index == 3
    scheduler._step_index = 6
    found = read_step(scheduler, timestep(scheduler, 6), verify=True)
    assert found is not None
    assert found.index == 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("steps", [4, 28, 50])
def test_read_step_returns_float32_sigmas_whatever_the_timesteps_dtype(dtype: torch.dtype, steps: int):
    scheduler = make_scheduler(steps)
    for index in range(steps):
        scheduler._step_index = index
        found = read_step(scheduler, timestep(scheduler, index, dtype), verify=True)
        assert found is not None
        assert found.sigmas.dtype == torch.float32
        assert float(found.sigmas[found.index]) == float(scheduler.sigmas[index])


def test_read_step_at_the_end_of_a_schedule_is_none():
    scheduler = make_scheduler()
    scheduler._step_index = 10
    assert read_step(scheduler, timestep(scheduler, 9), verify=True) is None


def test_check_sigmas_names_the_repetition():
    check_sigmas(torch.tensor([1.0, 0.5, 0.0]))
    with pytest.raises(ValueError, match=r"scheduler\.sigmas repeats 0\.5 at steps 1 and 2"):
        check_sigmas(torch.tensor([1.0, 0.5, 0.5, 0.0]))


@pytest.mark.parametrize(
    ("scheduler", "holds"),
    [
        (FlowMatchEulerDiscreteScheduler(), True),
        (FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), False),
        (DPMSolverMultistepScheduler(use_flow_sigmas=True), False),
        (UniPCMultistepScheduler(use_flow_sigmas=True), False),
    ],
    ids=["euler", "stochastic", "dpm", "unipc"],
)
def test_correction_holds_for_deterministic_euler_only(scheduler, holds: bool):
    check_scheduler(scheduler)
    assert correction_holds(scheduler) == holds


def test_check_scheduler_refuses_multistep_without_flow_sigmas():
    with pytest.raises(NotImplementedError, match="scheduler DPMSolverMultistepScheduler is not supported; caching knows"):
        check_scheduler(DPMSolverMultistepScheduler())
