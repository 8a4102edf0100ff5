"""With guidance and an output target, the error that decides is that of the velocity that is integrated."""

import dataclasses

import pytest
import torch

from afcache import CacheConfig, FluxInputs, denoise, denoising_step
from afcache.functional.guidance import guide
from afcache.functional.initial import uncoupled, unled
from afcache.functional.model import model_of, scaled_dot_product_attention
from afcache.functional.outputs import full_forward, prepare_output
from afcache.functional.plans import schedule_steps
from afcache.functional.ranks.exchange import ALONE
from afcache.functional.step import take
from afcache.functional.update import Branch
from afcache.models.flux1.architecture import FLUX
from afcache.models.flux1.inputs import place
from tests.support.tiny import tiny_flux
from tests.support.toy import SIGMAS

CONFIG = CacheConfig(target="noise", tolerance=0.05, warmup_steps=2)
SCALE = 3.0


def inputs_of(seed: int, batch: int = 2) -> FluxInputs:
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(batch, 9, 4, generator=torch.Generator().manual_seed(0))
    return FluxInputs(
        hidden_states=latents,
        encoder_hidden_states=torch.randn(batch, 3, 4, generator=generator),
        pooled_projections=torch.randn(batch, 4, generator=generator),
        timestep=torch.ones(batch),
        img_ids=torch.cartesian_prod(torch.zeros(1), torch.arange(3.0), torch.arange(3.0)),
        txt_ids=torch.zeros(3, 3),
        guidance=None,
    )


@pytest.fixture
def case():
    torch.manual_seed(0)
    transformer = tiny_flux()
    return transformer, inputs_of(1), inputs_of(2)


@torch.no_grad()
def test_the_last_branch_measures_the_guided_velocity(case):
    """At every refresh after the first: ||guided v_hat - guided v|| / ||guided v||, computed by hand from the states."""
    transformer, prompt, negative = case
    model = model_of(transformer, FLUX, scaled_dot_product_attention)
    config = dataclasses.replace(CONFIG, policy="planned", refresh_steps=(5, 9), correction=False)
    start = denoise(transformer, prompt, SIGMAS, negative=negative, guidance_scale=SCALE, config=config, stop=5)
    schedule = schedule_steps(SIGMAS, config)[5]
    placed = [place(each, start.latents, schedule.sigma) for each in (prompt, negative)]
    scale = torch.full((2,), SCALE)
    exact = guide(tuple(full_forward(model, each) for each in placed), scale)
    prepared = [
        prepare_output(model, Branch(each, state), schedule, config=config)
        for each, state in zip(placed, start.states, strict=True)
    ]
    estimate = guide(tuple(each.velocity for each in prepared), scale)
    expected = (estimate - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
    after = denoise(transformer, prompt, SIGMAS, negative=negative, guidance_scale=SCALE, config=config, start=start, stop=6)
    first, last = after.records[-1]
    torch.testing.assert_close(last.measured_error, expected, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(first.measured_error, expected, rtol=1e-2)


@torch.no_grad()
def test_the_leader_decides_by_it(case):
    """Its estimate is the sum of what the last branch expects, without |s| and |1 - s|."""
    transformer, prompt, negative = case
    result = denoise(transformer, prompt, SIGMAS, negative=negative, guidance_scale=SCALE, config=CONFIG)
    total, checked = torch.zeros(2), 0
    for index, (first, last) in enumerate(result.records):
        assert torch.equal(first.refresh, last.refresh)
        total = total + last.predicted_error * (SIGMAS[index + 1] - SIGMAS[index]).abs()
        total = torch.where(first.refresh, torch.zeros(2), total)
        if not bool(first.refresh.any()):
            torch.testing.assert_close(first.accumulated_error, total, rtol=1e-4, atol=1e-6)
            checked += 1
    assert checked > 5


@torch.no_grad()
def test_branches_called_one_after_the_other_measure_the_same(case):
    """As pipelines call them: the leader's finding is handed on, and both measure what one call of both would."""
    transformer, prompt, negative = case
    model = model_of(transformer, FLUX, scaled_dot_product_attention)
    joint = denoise(transformer, prompt, SIGMAS, negative=negative, guidance_scale=SCALE, config=CONFIG, stop=6)
    schedule = schedule_steps(SIGMAS, CONFIG)[6]._replace(is_forced=torch.tensor(True))
    placed = [place(each, joint.latents, schedule.sigma) for each in (prompt, negative)]
    scale = torch.full((2,), SCALE)
    coupling = unled(uncoupled(2), joint.latents)._replace(guidance_scale=scale)
    (leader,) = take(model, (Branch(placed[0], joint.states[0]),), schedule, coupling, config=CONFIG)
    assert leader.lead is not None
    following = coupling._replace(is_follower=torch.tensor(True), leader_refresh=leader.record.refresh, lead=leader.lead)
    (follower,) = take(model, (Branch(placed[1], joint.states[1]),), schedule, following, config=CONFIG)
    _, states, records = denoising_step(
        transformer,
        (prompt, negative),
        joint.latents,
        joint.states,
        schedule,
        scale,
        architecture=FLUX,
        kernel=scaled_dot_product_attention,
        config=CONFIG,
    )
    torch.testing.assert_close(follower.record.measured_error, records[1].measured_error)
    torch.testing.assert_close(follower.state.error_rate, states[1].error_rate)
    torch.testing.assert_close(leader.record.measured_error, records[0].measured_error)


@torch.no_grad()
def test_where_the_scale_is_unknown_each_measures_its_own(case):
    transformer, prompt, negative = case
    model = model_of(transformer, FLUX, scaled_dot_product_attention)
    joint = denoise(transformer, prompt, SIGMAS, negative=negative, guidance_scale=SCALE, config=CONFIG, stop=6)
    schedule = schedule_steps(SIGMAS, CONFIG)[6]._replace(is_forced=torch.tensor(True))
    placed = [place(each, joint.latents, schedule.sigma) for each in (prompt, negative)]
    coupling = unled(uncoupled(2), joint.latents)
    half = torch.tensor([SCALE, float("nan")])
    (leader,) = take(model, (Branch(placed[0], joint.states[0]),), schedule, coupling, config=CONFIG)
    measured = []
    for scale in (half, torch.full((2,), float("nan")), torch.full((2,), SCALE)):
        following = coupling._replace(
            is_follower=torch.tensor(True), leader_refresh=leader.record.refresh, lead=leader.lead, guidance_scale=scale
        )
        (follower,) = take(model, (Branch(placed[1], joint.states[1]),), schedule, following, config=CONFIG)
        measured.append(follower.record.measured_error)
    mixed, own, guided = measured
    assert float(mixed[0]) == float(guided[0]) != float(own[0])
    assert float(mixed[1]) == float(own[1]) != float(guided[1])


@torch.no_grad()
def test_what_ranks_adopt_in_place_of_an_error_is_what_they_go_by(case):
    transformer, prompt, _ = case
    model = model_of(transformer, FLUX, scaled_dot_product_attention)
    before = denoise(transformer, prompt, SIGMAS, config=CONFIG, stop=6)
    schedule = schedule_steps(SIGMAS, CONFIG)[6]._replace(is_forced=torch.tensor(True))
    adopted = torch.tensor([0.25, 0.5])
    told = model._replace(exchange=ALONE._replace(adopt_error=lambda error: adopted.expand_as(error)))
    branches = (Branch(place(prompt, before.latents, schedule.sigma), before.states[0]),)
    (own,), (taken,) = (take(each, branches, schedule, uncoupled(2), config=CONFIG) for each in (model, told))
    assert torch.equal(taken.record.measured_error, adopted)
    torch.testing.assert_close(taken.state.error_rate, own.state.error_rate * adopted / own.record.measured_error)
    assert torch.equal(taken.velocity, own.velocity)
