"""Samples of one batch, put together and chosen from."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import afcache
from afcache import CacheConfig, Layerwise
from afcache.functional.plans import schedule_steps
from afcache.functional.process import Process, direction, moved
from afcache.functional.samples import move_samples, stack_samples, stack_schedules, take_samples
from afcache.functional.solver_response import respond
from afcache.functional.state import CacheState, SolverState, Trail
from afcache.functional.target import keep_output, release_output
from afcache.models.flux1.inputs import FluxInputs

SIGMAS = torch.linspace(1, 0, 5)
CONFIGS = {
    "outputs": CacheConfig(),
    "residuals": CacheConfig(target="residual"),
    "gate": afcache.policy("teacache"),
    "groups": CacheConfig(target="residual", layerwise=Layerwise(groups=2)),
}


def filled(config: CacheConfig, batch: int, seed: int) -> CacheState:
    """A state whose every number is another."""
    torch.manual_seed(seed)
    state = afcache.init_state(batch, 6, 8, config=config, txt_seq=3, num_blocks=4, channels=4)
    return pytree.tree_map(
        lambda value: torch.randint(0, 9999, value.shape).to(value.dtype) if value is not None else None, state
    )


def tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def same(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(tensors(a), tensors(b), strict=True))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_states_come_apart_as_they_were_put_together(config: CacheConfig):
    one, two = filled(config, 1, seed=0), filled(config, 2, seed=1)
    stacked = stack_samples([one, two])
    afcache.check_state(
        stacked._replace(num_nodes=torch.ones(3, dtype=torch.int64)),
        batch=3,
        img_seq=6,
        dim=8,
        config=config,
        txt_seq=3,
        num_blocks=4,
        channels=4,
    )
    assert same(take_samples(stacked, [0]), one)
    assert same(take_samples(stacked, [1, 2]), two)
    # Permuted, and back.
    assert same(take_samples(take_samples(stacked, [2, 0, 1]), [1, 2, 0]), stacked)
    assert same(take_samples(stacked, [0, 0]), stack_samples([one, one]))


def test_what_is_made_is_fresh():
    state = filled(CONFIGS["outputs"], 2, seed=0)
    for made in (stack_samples([state]), take_samples(state, [0, 1])):
        owners = [{leaf.untyped_storage().data_ptr() for leaf in tensors(value) if leaf.numel()} for value in (state, made)]
        assert same(made, state)
        assert not owners[0] & owners[1]


def test_states_go_to_another_place_and_back():
    state = filled(CONFIGS["groups"], 2, seed=0)
    away = pytree.tree_map_only(Tensor, lambda value: value.to("meta"), state)
    assert isinstance(away, CacheState)
    assert all(tensor.is_meta for tensor in tensors(stack_samples([away, away])))


def inputs(batch: int, **changes: Any) -> FluxInputs:
    given: dict[str, Any] = {
        "hidden_states": torch.randn(batch, 6, 4),
        "encoder_hidden_states": torch.randn(batch, 3, 8),
        "pooled_projections": torch.randn(batch, 8),
        "timestep": torch.ones(batch),
        "img_ids": torch.zeros(6, 3),
        "txt_ids": torch.zeros(3, 3),
        "guidance": None,
        "controlnet_block_samples": (torch.randn(batch, 6, 8), torch.randn(batch, 6, 8)),
    }
    return FluxInputs(**given | changes)


def test_inputs_share_what_has_no_batch():
    one, two = inputs(1), inputs(2)
    stacked = stack_samples([one, two])
    assert stacked.hidden_states.shape[0] == 3
    assert stacked.img_ids.shape == (6, 3)
    assert [each.shape[0] for each in stacked.controlnet_block_samples] == [3, 3]
    assert same(take_samples(stacked, [1, 2]), two)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"img_ids": torch.ones(6, 3)},
            "FluxInputs.img_ids is shared by all samples, and is another in values[1] than in values[0]",
        ),
        (
            {"encoder_hidden_states": torch.randn(1, 4, 8)},
            "FluxInputs.encoder_hidden_states is (1, 3, 8), torch.float32, cpu in",
        ),
        (
            {"pooled_projections": torch.randn(1, 8).double()},
            "and (1, 8), torch.float64, cpu in values[1]: one batch has one size",
        ),
        ({"guidance": torch.ones(1)}, "FluxInputs.guidance differs in kind: NoneType, Tensor"),
        ({"controlnet_block_samples": ()}, "FluxInputs.controlnet_block_samples differs in kind"),
        (
            {"controlnet_blocks_repeat": True},
            "FluxInputs.controlnet_blocks_repeat is shared by all samples, and is False for one",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_its_name(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        stack_samples([inputs(1), inputs(1, **changes)])


def test_states_of_other_settings_are_refused():
    gated = filled(CONFIGS["gate"], 1, 0)
    with pytest.raises(ValueError, match=r"CacheState\.gate differs in kind: GateState, NoneType"):
        stack_samples([gated, gated._replace(gate=None)])
    with pytest.raises(ValueError, match=r"CacheState\.history is \(1, 1, 6, 8\), .* and \(2, 1, 6, 8\), .* in values\[1\]"):
        stack_samples([gated, filled(CONFIGS["residuals"], 1, 0)])
    with pytest.raises(ValueError, match="values must hold at least one batch, got none"):
        stack_samples([])


@pytest.mark.parametrize("wrong", [[2], [0, -1]])
def test_a_sample_that_is_not_there_is_refused(wrong: list[int]):
    with pytest.raises(
        ValueError, match=re.escape(f"samples must be places from 0 to 1 in CacheState.history, got {wrong[-1]}.")
    ):
        take_samples(filled(CONFIGS["outputs"], 2, 0), wrong)
    with pytest.raises(ValueError, match="samples must name at least one place in the batch, got none"):
        take_samples(filled(CONFIGS["outputs"], 2, 0), [])


def test_schedules_of_samples_are_one_of_their_batch():
    early, late = schedule_steps(SIGMAS, CacheConfig())[0], schedule_steps(SIGMAS / 2, CacheConfig(tolerance=0.5))[3]
    both = stack_schedules([early, late])
    assert both.sigma.tolist() == [1.0, 0.125]
    assert both.step_index.tolist() == [0, 3]
    assert both.is_forced.tolist() == [True, False]
    assert both.tolerance[1] > both.tolerance[0]
    assert both.response is None


def test_responses_and_processes_are_of_each_sample():
    step = schedule_steps(SIGMAS, CacheConfig())[0]
    one, two = (Process(*torch.full((6,), value).unbind()) for value in (1.0, 2.0))
    rich = [
        step._replace(response=torch.full((64,), 3.0), process=one),
        step._replace(response=torch.full((64,), 4.0), process=two),
    ]
    both = stack_schedules(rich)
    assert both.response is not None
    assert both.process is not None
    assert both.response.shape == (64, 2)
    assert both.response[5].tolist() == [3.0, 4.0]
    assert both.process.drift.tolist() == [1.0, 2.0]


def test_schedules_that_do_not_fit_are_refused():
    step = schedule_steps(SIGMAS, CacheConfig())[0]
    with pytest.raises(ValueError, match=r"steps\[0\] has no response, and others have one"):
        stack_schedules([step, step._replace(response=torch.ones(64))])
    with pytest.raises(ValueError, match=r"steps\[1\]\.tolerance must be of one sample, got shape \(2,\)"):
        stack_schedules([step, step._replace(tolerance=torch.ones(2))])
    with pytest.raises(ValueError, match="steps must hold the schedule of at least one sample, got none"):
        stack_schedules([])


def test_a_solver_answers_each_sample_by_its_own_response():
    """Rows of two schedules side by side give what each gives alone."""
    torch.manual_seed(0)
    window = 64

    def solver() -> SolverState:
        return SolverState(torch.rand(window - 1, 1), torch.rand(window - 1, 1), torch.randn(1, 6, 4))

    states, responses = [solver(), solver()], [torch.rand(window) + 0.1, torch.rand(window) + 0.1]
    velocities, forecasts = torch.randn(2, 6, 4), torch.randn(2, 6, 4)
    growth, refresh = torch.tensor([0.3, 0.7]), torch.tensor([True, False])
    alone = [
        respond(state, v[None], f[None], row, growth=g[None], refresh=r[None])
        for state, v, f, row, g, r in zip(states, velocities, forecasts, responses, growth, refresh, strict=True)
    ]
    rows = torch.stack(responses, dim=1)
    velocity, after = respond(stack_samples(states), velocities, forecasts, rows, growth=growth, refresh=refresh)
    assert torch.equal(velocity, torch.cat([each for each, _ in alone]))
    assert same(after, stack_samples([each for _, each in alone]))


def test_a_process_moves_each_sample_by_its_own_numbers():
    torch.manual_seed(0)
    numbers = [Process(*torch.rand(6).unbind()) for _ in range(2)]
    together = Process(*(torch.stack(values) for values in zip(*numbers, strict=True)))
    latents, output, sigma = torch.randn(2, 6, 4), torch.randn(2, 6, 4), torch.tensor([0.4, 0.8])

    def each(function: Any) -> Tensor:
        return torch.cat([function(latents[i : i + 1], output[i : i + 1], sigma[i], numbers[i]) for i in range(2)])

    def kept(x: Tensor, m: Tensor, level: Tensor, process: Process) -> Tensor:
        return keep_output(m, x, level, target="noise", process=process)

    def released(x: Tensor, m: Tensor, level: Tensor, process: Process) -> Tensor:
        return release_output(m, x, level, target="noise", process=process)

    def gone(x: Tensor, m: Tensor, level: Tensor, process: Process) -> Tensor:
        return moved(x, m, level, process=process) + direction(m, x, process=process)

    for function in (kept, released, gone):
        assert torch.equal(function(latents, output, sigma, together), each(function))


def test_parts_of_states_are_values_too():
    trail = Trail(torch.randn(2, 6, 4), torch.ones(2), torch.ones(2))
    assert same(take_samples(trail, [1, 0]).latents, trail.latents.flip(0))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_states_go_elsewhere(config: CacheConfig):
    """Meta stands for a device that is not here: what goes there has its shapes, and nothing stays behind."""
    state = filled(config, 2, seed=0)
    away = move_samples(state, "meta")
    assert type(away) is CacheState
    assert [(leaf.shape, leaf.dtype, leaf.device.type) for leaf in tensors(away)] == [
        (leaf.shape, leaf.dtype, "meta") for leaf in tensors(state)
    ]
    stayed = move_samples(state, torch.device("cpu"))
    assert all(mine is its for mine, its in zip(tensors(stayed), tensors(state), strict=True))
