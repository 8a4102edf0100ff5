from typing import Any

import pytest
import torch
from diffusers import (
    CogVideoXDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    LMSDiscreteScheduler,
    UniPCMultistepScheduler,
)

from afcache._typing import HostModule
from afcache.models.family import Clock
from afcache.runtime.scheduler import check_scheduler, check_sigmas, is_eulers, read_step


def make_scheduler(steps: int = 10) -> HostModule:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(steps)
    return scheduler


def timestep(scheduler: HostModule, index: int, dtype=torch.float32) -> torch.Tensor:
    return (scheduler.timesteps[index] / 1000).to(dtype).expand(2)


def test_read_step_prefers_step_index_then_begin_index_then_the_timestep():
    scheduler = make_scheduler()
    found = read_step(scheduler, timestep(scheduler, 4), Clock(), verify=True)
    assert found is not None
    assert found.index == 4
    scheduler.set_begin_index(3)
    assert read_step(scheduler, timestep(scheduler, 4), Clock(), verify=True) is None
    found = read_step(scheduler, timestep(scheduler, 3), Clock(), verify=True)
    assert found is not None
    assert found.index == 3
    scheduler._step_index = 6
    found = read_step(scheduler, timestep(scheduler, 6), Clock(), verify=True)
    assert found is not None
    assert found.index == 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("steps", [4, 28, 50])
def test_read_step_returns_float32_sigmas_whatever_the_timesteps_dtype(dtype: torch.dtype, steps: int):
    scheduler = make_scheduler(steps)
    for index in range(steps):
        scheduler._step_index = index
        found = read_step(scheduler, timestep(scheduler, index, dtype), Clock(), verify=True)
        assert found is not None
        assert found.sigmas.dtype == torch.float32
        assert float(found.sigmas[found.index]) == float(scheduler.sigmas[index])


def test_read_step_at_the_end_of_a_schedule_is_none():
    scheduler = make_scheduler()
    scheduler._step_index = 10
    assert read_step(scheduler, timestep(scheduler, 9), Clock(), verify=True) is None


def test_check_sigmas_names_the_repetition():
    check_sigmas(torch.tensor([1.0, 0.5, 0.0]))
    with pytest.raises(ValueError, match=r"scheduler\.sigmas repeats 0\.5 at steps 1 and 2"):
        check_sigmas(torch.tensor([1.0, 0.5, 0.5, 0.0]))


FLOW: dict[str, Any] = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchEulerDiscreteScheduler(),
        FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
        FlowMatchLCMScheduler(),
        DPMSolverMultistepScheduler(**FLOW),
        UniPCMultistepScheduler(**FLOW),
    ],
    ids=["euler", "stochastic", "lcm", "dpm", "unipc"],
)
def test_a_step_is_known_to_be_eulers_exactly_where_it_is(scheduler):
    scheduler.set_timesteps(6)
    x, is_euler = torch.randn(1, 4, 3), []
    for index, step in enumerate(scheduler.timesteps):
        velocity = torch.randn(1, 4, 3)
        after = scheduler.step(velocity, step, x).prev_sample
        length = scheduler.sigmas[index + 1] - scheduler.sigmas[index]
        is_euler.append(torch.allclose(after, x + length * velocity, atol=1e-5))
        x = after
    assert all(is_euler) == is_eulers(scheduler)


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
        FlowMatchLCMScheduler(),
        DPMSolverMultistepScheduler(**FLOW, algorithm_type="sde-dpmsolver++"),
        CogVideoXDPMScheduler(),
    ],
    ids=["stochastic", "lcm", "sde", "cogvideox"],
)
def test_new_noise_at_every_step_is_refused_unless_every_step_is_computed(scheduler):
    with pytest.raises(NotImplementedError, match=f"scheduler {type(scheduler).__name__} as configured draws new noise"):
        check_scheduler(scheduler)
    check_scheduler(scheduler, forecasts=False)


@pytest.mark.parametrize("setting", ["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas"])
def test_sigmas_of_another_process_are_refused(setting: str):
    scheduler: Any = DPMSolverMultistepScheduler.from_config(FLOW, **{setting: True})
    scheduler.set_timesteps(10)
    with pytest.raises(ValueError, match=r"scheduler\.sigmas must lie in \[0, 1\], .* got 0 to .*karras"):
        check_sigmas(scheduler.sigmas)


def test_sigmas_below_zero_are_blamed_on_no_setting():
    scheduler: Any = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[1.0, 0.5, -0.25])
    with pytest.raises(ValueError, match=r"got -0\.25 to 1\. If you passed sigmas= .* between 0 and 1, or none\.$") as caught:
        check_sigmas(scheduler.sigmas)
    assert "karras" not in str(caught.value)


def test_solvers_without_flow_sigmas_are_those_of_models_that_are_no_flow():
    check_scheduler(DPMSolverMultistepScheduler())
    with pytest.raises(NotImplementedError, match="scheduler DPMSolverMultistepScheduler is not supported; caching knows"):
        check_scheduler(DPMSolverMultistepScheduler(prediction_type="flow_prediction"))


def test_schedulers_of_the_other_kind_of_models_are_refused():
    flows, others = FlowMatchEulerDiscreteScheduler(), DPMSolverMultistepScheduler()
    check_scheduler(flows, is_flow=True)
    check_scheduler(others, is_flow=False)
    check_scheduler(DPMSolverMultistepScheduler(**FLOW), is_flow=True)
    message = (
        r"DPMSolverMultistepScheduler has prediction_type='epsilon', and the transformer is a flow, .*use_flow_sigmas=True"
    )
    with pytest.raises(NotImplementedError, match=message):
        check_scheduler(others, is_flow=True)
    with pytest.raises(NotImplementedError, match=r"the transformer predicts noise or v\. Assign the scheduler that"):
        check_scheduler(flows, is_flow=False)


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchHeunDiscreteScheduler(),
        DEISMultistepScheduler(**FLOW),
        LMSDiscreteScheduler(),
        EDMEulerScheduler(),
        EDMDPMSolverMultistepScheduler(),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_schedulers_that_repeat_levels_or_know_no_flow_are_refused(scheduler):
    with pytest.raises(NotImplementedError, match=f"scheduler {type(scheduler).__name__} is not supported; caching knows"):
        check_scheduler(scheduler)


@pytest.mark.parametrize(
    ("clock", "argument", "dtype"),
    [
        (Clock(), 0.9375, torch.bfloat16),
        (Clock(scale=1.0), 937.5, torch.float32),
        # Solvers that count in integers cut off.
        (Clock(scale=1.0), 937, torch.int64),
        (Clock(scale=-1000.0, offset=1000.0), 0.0625, torch.float32),
        (Clock(scale=1.0, offset=1.0), 936.5, torch.float32),
    ],
)
def test_clocks_read_what_families_count(clock: Clock, argument: float, dtype: torch.dtype):
    given = torch.full((2,), argument, dtype=dtype)
    assert (clock.read(given) - 937.5).abs().max() <= clock.rounding(given)
    if dtype.is_floating_point:
        torch.testing.assert_close(clock.show(torch.tensor(0.9375)).to(dtype), given[0])


def test_the_noisiest_token_tells_the_step():
    given = torch.tensor([[0.0, 0.0, 800.0, 800.0]])
    assert Clock(scale=1.0).read(given).tolist() == [800.0]
