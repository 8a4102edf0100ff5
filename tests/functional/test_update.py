"""Starting again in the middle of a trajectory: nothing of the field before counts."""

import dataclasses
from typing import Any

import pytest
import torch

import afcache
from afcache import CacheConfig
from afcache.functional.initial import uncoupled
from afcache.functional.model import scaled_dot_product_attention
from afcache.functional.plans import schedule_steps
from afcache.functional.state import CacheState
from afcache.functional.update import restart
from afcache.sampling.primitives import cached_forward, init_state
from tests.support.toy import LATENTS, SIGMAS, TOY, Toy, ToyInputs, mixture_flow, tensors_of

CONFIGS = {
    "adaptive": CacheConfig(tolerance=0.05, correction=True),
    "taylorseer": dataclasses.replace(afcache.policy("taylorseer", interval=3), correction=True),
    "spectrum": afcache.policy("spectrum"),
}


def walk(state: CacheState, config: CacheConfig, start: int, stop: int) -> tuple[torch.Tensor, CacheState, str]:
    """Some steps of one trajectory, all from the same latents: the last latents, the state, and what was computed."""
    latents, pattern = LATENTS, ""
    for schedule in schedule_steps(SIGMAS, config)[start:stop]:
        inputs = ToyInputs(latents, schedule.sigma.expand(len(latents)))
        parts: dict[str, Any] = {"architecture": TOY, "kernel": scaled_dot_product_attention, "config": config}
        toy: Any = Toy(mixture_flow)
        velocity, state, record = cached_forward(toy, inputs, state, schedule, uncoupled(len(latents)), **parts)
        latents = latents + (schedule.sigma_next - schedule.sigma) * velocity
        pattern += "F" if bool(record.is_computed) else "."
    return latents, state, pattern


@pytest.mark.parametrize("name", CONFIGS)
def test_a_restarted_state_takes_the_steps_of_an_empty_one(name: str):
    config = CONFIGS[name]
    empty = init_state(*LATENTS.shape, config=config)
    _, used, pattern = walk(empty, config, 0, 12)
    assert {"F", "."} <= set(pattern)
    before = [tensor.clone() for tensor in tensors_of(used)]
    latents, _, pattern = walk(restart(used, torch.tensor(True)), config, 12, 28)
    expected, _, expected_pattern = walk(empty, config, 12, 28)
    assert pattern == expected_pattern
    assert pattern.startswith("F")
    torch.testing.assert_close(latents, expected, rtol=0, atol=0)
    assert all(map(torch.equal, before, tensors_of(used)))


def test_a_state_that_is_not_restarted_is_as_it_was():
    config = CONFIGS["adaptive"]
    _, used, _ = walk(init_state(*LATENTS.shape, config=config), config, 0, 12)
    assert all(map(torch.equal, tensors_of(restart(used, torch.tensor(False))), tensors_of(used)))


def test_groups_start_again_too():
    config = afcache.policy("layerwise", groups=2)
    state = init_state(1, 4, 8, config=config, txt_seq=3, num_blocks=2)
    groups: Any = state.groups
    used = state._replace(groups=groups._replace(num_nodes=torch.full_like(groups.num_nodes, 2)))
    again: Any = restart(used, torch.tensor(True)).groups
    assert again.num_nodes.eq(0).all()
