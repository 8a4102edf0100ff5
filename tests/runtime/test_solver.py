"""The dry run that finds a scheduler's response: it tells what the scheduler does, and touches nothing."""

import copy
import threading
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from torch import Tensor

from afcache.functional.solver_response import WINDOW
from afcache.runtime import solver
from afcache.runtime.scheduler import ScheduledStep
from afcache.runtime.solver import response_of

FLOW: dict[str, Any] = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}


def at(scheduler: Any, index: int = 0) -> ScheduledStep:
    return ScheduledStep(scheduler.timesteps, scheduler.sigmas, index)


def started(scheduler: Any, steps: int = 9) -> Any:
    scheduler.set_timesteps(steps)
    return scheduler


def outputs(steps: int, seed: int = 0) -> Tensor:
    return torch.randn(steps, 1, 2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def walk(scheduler: Any, x: Tensor, given: Tensor, begin: int = 0) -> list[Tensor]:
    found = []
    for timestep, output in zip(scheduler.timesteps[begin:], given, strict=True):
        x = scheduler.step(output, timestep, x, return_dict=False)[0]
        found.append(x)
    return found


@pytest.mark.parametrize("kind", [DPMSolverMultistepScheduler, UniPCMultistepScheduler])
@pytest.mark.parametrize("begin", [0, 3])
def test_rows_are_what_outputs_weigh(kind: Any, begin: int):
    scheduler = started(kind(**FLOW))
    scheduler.set_begin_index(begin)
    response = response_of(scheduler, at(scheduler, begin))
    assert response is not None
    assert response.shape == (9, WINDOW)
    assert not response[:begin].any()
    # Without a sample, outputs alone make the latents.
    given = outputs(9 - begin)
    for index, x in enumerate(walk(scheduler, torch.zeros_like(given[0]), given, begin)):
        weighed = sum(float(response[begin + index, back]) * given[index - back] for back in range(index + 1))
        assert torch.allclose(x, torch.as_tensor(weighed), atol=1e-5)


def test_eulers_response_is_the_way_in_sigma():
    scheduler = started(FlowMatchEulerDiscreteScheduler(shift=3.0))
    response = response_of(scheduler, at(scheduler))
    assert response is not None
    lengths = scheduler.sigmas.diff()
    for index in range(9):
        assert torch.allclose(response[index, : index + 1], lengths[: index + 1].flip(0), atol=1e-6)
        assert not response[index, index + 1 :].any()


def test_neither_the_scheduler_nor_any_generator_is_touched():
    scheduler = started(UniPCMultistepScheduler(**FLOW))
    before, state = copy.deepcopy(vars(scheduler)), torch.get_rng_state()
    stepped = []
    scheduler.step = lambda *args, **kwargs: stepped.append(args)
    assert response_of(scheduler, at(scheduler)) is not None
    del scheduler.step
    assert not stepped
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in vars(scheduler).items():
        same = torch.equal(value, before[name]) if isinstance(value, Tensor) else value == before[name]
        assert same, name


def test_it_is_measured_once_for_each_schedule(monkeypatch):
    measured = []
    measure = solver._measure
    monkeypatch.setattr(solver, "_measure", lambda *given: measured.append(given) or measure(*given))
    scheduler = started(UniPCMultistepScheduler(**FLOW))
    first = response_of(scheduler, at(scheduler))
    walk(scheduler, torch.zeros(1, 2, 3, 3), outputs(9))
    # In the middle, too: of another expert, or after a restart.
    assert response_of(scheduler, at(scheduler, 4)) is first
    assert len(measured) == 1
    # The next image's schedule is another tensor of the same numbers.
    assert response_of(started(scheduler), at(scheduler)) is first
    assert len(measured) == 1
    for steps in (10, 9):
        assert response_of(started(scheduler, steps), at(scheduler)) is not first
    scheduler.register_to_config(solver_order=3)
    assert response_of(started(scheduler), at(scheduler)) is not None
    assert len(measured) == 4


def test_where_a_walk_begins_counts():
    scheduler = started(DPMSolverMultistepScheduler(**FLOW))
    whole = response_of(scheduler, at(scheduler))
    scheduler.set_begin_index(4)
    part = response_of(scheduler, at(scheduler, 4))
    assert whole is not None
    assert part is not None
    # Its first step has nothing to remember.
    assert whole[4, 1] != 0
    assert part[4, 1] == 0
    scheduler.set_begin_index(0)
    assert torch.equal(torch.as_tensor(response_of(scheduler, at(scheduler))), whole)


def test_what_a_scheduler_remembers_or_carries_is_not_walked_with():
    scheduler = started(UniPCMultistepScheduler(**FLOW))
    expected = response_of(scheduler, at(scheduler))
    walk(scheduler, torch.zeros(1, 2, 3, 3), outputs(9))
    again = started(UniPCMultistepScheduler(**FLOW))
    again.lock = threading.Lock()
    again.model_outputs, again.last_sample, again.lower_order_nums = scheduler.model_outputs, scheduler.last_sample, 2
    assert torch.equal(torch.as_tensor(response_of(again, at(again))), torch.as_tensor(expected))


def test_a_solver_whose_answers_grow_has_no_response():
    scheduler = started(UniPCMultistepScheduler(solver_order=4, **FLOW), 400)
    assert response_of(scheduler, at(scheduler)) is None


def test_it_is_found_on_the_cpu_whatever_the_default_device_is():
    scheduler = started(UniPCMultistepScheduler(**FLOW))
    with torch.device("meta"):
        response = response_of(scheduler, at(scheduler))
    assert response is not None
    assert response.device.type == "cpu"


def test_a_schedule_that_had_begun_is_not_guessed_at():
    scheduler = started(UniPCMultistepScheduler(**FLOW))
    scheduler.step(outputs(1)[0], scheduler.timesteps[0], torch.zeros(1, 2, 3, 3))
    assert response_of(scheduler, at(scheduler, 1)) is None


def test_what_is_not_linear_has_no_response():
    scheduler = started(UniPCMultistepScheduler(**FLOW, thresholding=True))
    assert response_of(scheduler, at(scheduler)) is None
