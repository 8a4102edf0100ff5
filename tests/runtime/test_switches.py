"""What counts as steered otherwise; nothing of it waits for the device."""

from typing import Any

import pytest
import torch

from afcache.models.flux1.call import read_call
from afcache.models.flux1.inputs import FluxInputs
from afcache.runtime.controls import Controls
from afcache.runtime.switches import Steering, is_switched, steering_of
from tests.models.test_flux import make_inputs

RESIDUAL = torch.ones(1, 64, 8)
INPUTS = make_inputs(guidance=True)._replace(
    controlnet_block_samples=(RESIDUAL,), image_prompts=(torch.ones(1, 1, 4),), image_prompt_scales=torch.ones(2, 1)
)
CHANGES: dict[str, tuple[Any, bool]] = {
    "hidden_states": (torch.zeros_like(INPUTS.hidden_states), False),
    "timestep": (torch.zeros(1), False),
    "encoder_hidden_states": (INPUTS.encoder_hidden_states + 1, True),
    "pooled_projections": (INPUTS.pooled_projections.clone(), False),
    "guidance": (torch.full((1,), 2.0), True),
    "controlnet_block_samples": ((2 * RESIDUAL,), False),
    "controlnet_single_block_samples": ((RESIDUAL,), True),
    "controlnet_blocks_repeat": (True, True),
    "image_prompts": ((torch.zeros(1, 1, 4),), True),
    "image_prompt_scales": (torch.zeros(2, 1), True),
}


def steering(inputs: FluxInputs) -> Steering:
    call = read_call(inputs)
    return steering_of(call.structure, call.conditions, call.is_controlled, Controls())


@pytest.mark.parametrize("name", CHANGES)
def test_other_conditions_are_switches_and_other_points_of_the_trajectory_are_none(name: str):
    value, expected = CHANGES[name]
    switched = is_switched(steering(INPUTS), steering(INPUTS._replace(**{name: value})))
    assert switched is not None
    assert bool(switched) == expected


@pytest.mark.parametrize("silent", [(), (0 * RESIDUAL,)])
def test_a_controlnet_that_falls_silent_is_a_switch_there_and_back(silent: tuple[torch.Tensor, ...]):
    loud, quiet = steering(INPUTS), steering(INPUTS._replace(controlnet_block_samples=silent))
    for before, now in ((loud, quiet), (quiet, loud)):
        switched = is_switched(before, now)
        assert switched is not None
        assert bool(switched)
    assert not is_switched(quiet, quiet)


def test_the_same_conditions_ask_the_device_for_nothing():
    plain = steering(make_inputs())
    assert is_switched(plain, plain) is None
