"""What holds for every trajectory of the cached step: random schedules, settings, batches and velocity fields."""

import itertools
import math
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from afcache import CacheConfig, check_state
from afcache.functional.decision import decide, foresee
from afcache.functional.initial import uncoupled
from afcache.functional.model import scaled_dot_product_attention
from afcache.functional.plans import forced_steps, schedule_steps, stack_steps, tolerance_scale
from afcache.functional.state import StepSchedule
from afcache.sampling.primitives import cached_forward, init_state
from tests.support import cases
from tests.support.cases import property_test
from tests.support.toy import TOY, Run, Toy, ToyInputs, VelocityField, euler, sample_toy, tensors_of


def draw(field: VelocityField, sigmas: Tensor, config: CacheConfig, latents: Tensor) -> Run:
    return sample_toy(field, sigmas, config, latents=latents)


def runs(config: st.SearchStrategy[CacheConfig]) -> dict[str, st.SearchStrategy]:
    return {"field": cases.fields(), "sigmas": cases.schedules(), "config": config, "latents": cases.latents()}


def refreshes(run: Run) -> Tensor:
    """Decisions `[steps, batch]`."""
    return torch.stack([record.refresh for record in run.records])


@property_test(**runs(st.one_of(cases.configs(policy="adaptive", tolerance=0.0), cases.configs(policy="none"))))
def test_tolerance_zero_and_policy_none_are_the_uncached_trajectory(field, sigmas, config, latents):
    run = draw(field, sigmas, config, latents)
    assert bool(refreshes(run).all())
    assert torch.equal(run.latents, euler(field, latents, sigmas))


@property_test(**runs(cases.configs(batch_decisions="independent")))
def test_a_sample_is_the_same_alone_and_in_a_batch(field, sigmas, config, latents):
    together = draw(field, sigmas, config, latents)
    for index in range(latents.shape[0]):
        alone = draw(field, sigmas, config, latents[index : index + 1])
        assert alone.pattern() == together.pattern(index)
        torch.testing.assert_close(alone.latents[0], together.latents[index], rtol=0, atol=0, equal_nan=True)


@property_test(**runs(cases.configs(batch_decisions="shared")))
def test_shared_decisions_are_the_same_for_all_samples(field, sigmas, config, latents):
    decisions = refreshes(draw(field, sigmas, config, latents))
    assert bool((decisions == decisions[:, :1]).all())


@property_test(**runs(cases.configs(batch_decisions="independent")), spoiled=st.integers(0, 11))
def test_a_sample_that_is_not_finite_computes_and_leaves_its_neighbours_alone(field, sigmas, config, latents, spoiled):
    level = sigmas[min(spoiled, len(sigmas) - 2)]

    def broken(x: Tensor, sigma: Tensor) -> Tensor:
        is_hit = (torch.arange(x.shape[0]) == 0) & (sigma == level)
        # As networks do, and a field that ignores its latents does not.
        return torch.where(is_hit[:, None, None] | x.isnan(), torch.full_like(x, math.nan), field(x, sigma))

    latents = torch.cat([latents[:1], latents])
    run, healthy = draw(broken, sigmas, config, latents), draw(field, sigmas, config, latents)
    assert torch.equal(run.latents[1:].nan_to_num(), healthy.latents[1:].nan_to_num())
    assert torch.equal(refreshes(run)[:, 1:], refreshes(healthy)[:, 1:])
    has_broken = bool(run.latents[0].isnan().any())
    if config.policy == "adaptive" and has_broken and not bool(healthy.latents[0].isnan().any()):
        first = next(i for i, latents in enumerate(run.path) if bool(latents[0].isnan().any())) - 1
        assert "." not in run.pattern()[first + 1 :]


@property_test(**runs(cases.configs()))
def test_warmup_plans_and_the_last_step_are_honoured(field, sigmas, config, latents):
    run = draw(field, sigmas, config, latents)
    forced = torch.tensor(forced_steps(config, len(run.records)))
    decisions = refreshes(run)
    assert bool(decisions[forced].all())
    assert bool(decisions[: config.warmup_steps].all())
    if config.refresh_last_step:
        assert bool(decisions[-1].all())
    if config.policy != "adaptive":
        assert torch.equal(decisions, forced[:, None].expand_as(decisions) | (torch.arange(len(forced)) == 0)[:, None])
    if config.policy == "fixed":
        cached = "".join("." if not flag else "F" for flag in decisions[:, 0]).split("F")
        assert max(map(len, cached)) < config.interval


@property_test(**runs(cases.configs(policy="adaptive")))
def test_what_error_control_forecasts_is_within_its_limits(field, sigmas, config, latents):
    run, tolerance = draw(field, sigmas, config, latents), config.tolerance * tolerance_scale(sigmas)
    for index, (record, before) in enumerate(zip(run.records, run.states, strict=False)):
        cached = ~record.refresh
        assert bool((record.accumulated_error[cached] < tolerance).all())
        gap = (before.nodes[0] - sigmas[index]).abs()
        assert bool((gap <= config.max_growth * before.last_gap)[cached & (before.last_gap > 0)].all())
        # Two refreshes at least.
        assert bool((before.last_gap[cached] > 0).all())


@property_test(**runs(cases.configs()))
def test_records_and_states_tell_what_happened(field, sigmas, config, latents):
    toy_runs = []

    def counted(x: Tensor, sigma: Tensor) -> Tensor:
        toy_runs.append(float(sigma[0]))
        return field(x, sigma)

    run = draw(counted, sigmas, config, latents)
    computed = [float(sigmas[i]) for i, record in enumerate(run.records) if bool(record.is_computed)]
    assert toy_runs == computed
    decisions = refreshes(run)
    assert [bool(record.is_computed) for record in run.records] == decisions.any(dim=1).tolist()
    for index, (record, state) in enumerate(zip(run.records, run.states[1:], strict=True)):
        assert torch.equal(record.accumulated_error.isnan() | (record.accumulated_error != 0), state.accumulated_error != 0)
        assert bool((state.accumulated_error[record.refresh] == 0).all())
        assert bool(record.measured_error[~record.refresh].isnan().all())
        for sample in range(latents.shape[0]):
            done = [i for i in range(index + 1) if decisions[i, sample]][::-1][: config.num_nodes]
            assert int(state.num_nodes[sample]) == len(done)
            assert state.steps[: len(done), sample].tolist() == done
            assert torch.equal(state.nodes[: len(done), sample], sigmas[done])


@property_test(**runs(cases.configs()))
def test_states_keep_their_shape_and_nothing_is_changed_in_place(field, sigmas, config, latents):
    batch, img_seq, channels = latents.shape
    state, toy = init_state(batch, img_seq, channels, config=config), Toy(field)
    for schedule in schedule_steps(sigmas, config):
        inputs, coupling = ToyInputs(latents, schedule.sigma.expand(batch)), uncoupled(batch)
        before = tensors_of((inputs, state, schedule, coupling))
        copies = [tensor.clone() for tensor in before]
        velocity, state, record = cached_forward(
            toy, inputs, state, schedule, coupling, architecture=TOY, kernel=scaled_dot_product_attention, config=config
        )
        assert all(torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in zip(before, copies, strict=True))
        check_state(state, batch=batch, img_seq=img_seq, dim=channels, config=config)
        memory = {tensor.untyped_storage().data_ptr() for tensor in before}
        after = tensors_of((velocity, state, record))
        assert memory.isdisjoint(tensor.untyped_storage().data_ptr() for tensor in after)
        latents = latents + (schedule.sigma_next - schedule.sigma) * velocity


@property_test(**runs(cases.configs(policy="adaptive")))
def test_what_is_foreseen_is_what_is_decided(field, sigmas, config, latents):
    run = draw(field, sigmas, config, latents)
    decisions, steps, ones = refreshes(run), schedule_steps(sigmas, config), torch.ones(latents.shape[0])
    for index in range(len(steps)):
        foreseen = foresee(run.states[index], (), stack_steps(steps[index:]), ones, ones, config=config)
        for sample in range(latents.shape[0]):
            actual = decisions[index:, sample].tolist()
            until = actual.index(True) + 1 if True in actual else len(actual)
            assert foreseen[:until, sample].tolist() == actual[:until]


@st.composite
def decisions(draw: st.DrawFn):
    config = draw(cases.configs(policy="adaptive", batch_decisions="independent"))
    state = draw(cases.known_states(config))
    low, high = sorted((draw(cases.numbers(0, 1)), draw(cases.numbers(0, 1))))
    sigma = 0.5 - draw(st.integers(1, 256)) / 1024
    return config, state, low, high, sigma, sigma - draw(st.integers(1, 64)) / 1024


@property_test(decisions())
def test_a_larger_tolerance_refreshes_no_sample_more(case):
    config, state, low, high, sigma, sigma_next = case

    def refreshed(tolerance: float) -> Tensor:
        values = (sigma, sigma_next, 9, False, tolerance, config.max_growth, config.damping, 0.0)
        kinds = (torch.float32, torch.float32, torch.int64, torch.bool, *[torch.float32] * 4)
        fields: Any = (torch.tensor(v, dtype=kind) for v, kind in zip(values, kinds, strict=True))
        schedule = StepSchedule(*fields)
        return decide(state, schedule, uncoupled(state.last_gap.shape[0]), config=config)[0]

    assert bool((refreshed(high) <= refreshed(low)).all())
    assert bool(refreshed(0.0).all())


@property_test(schedule=cases.schedules(), config=cases.configs())
def test_a_schedule_is_taken_apart_without_loss(schedule, config):
    steps = schedule_steps(schedule, config)
    assert torch.equal(torch.stack([step.sigma for step in steps]), schedule[:-1])
    assert all(torch.equal(a.sigma_next, b.sigma) for a, b in itertools.pairwise(steps))
    assert [int(step.step_index) for step in steps] == list(range(len(steps)))
    assert [bool(step.is_forced) for step in steps] == forced_steps(config, len(steps))
