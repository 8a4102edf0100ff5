import math

import pytest
import torch
from torch import Tensor

from afcache.functional.decision import predict_error
from afcache.functional.initial import uncoupled
from afcache.functional.model import scaled_dot_product_attention
from afcache.functional.plans import schedule_steps
from afcache.functional.state import CacheState
from afcache.sampling.primitives import cached_forward, init_state
from afcache.settings.config import CacheConfig
from tests.support.toy import (
    LATENTS,
    SIGMAS,
    TOY,
    Run,
    Toy,
    ToyInputs,
    VelocityField,
    euler,
    mixture_flow,
    polynomial_in_sigma,
    run,
    sample_toy,
    tensors_of,
    uneven_sigmas,
)


def test_tolerance_zero_refreshes_always_and_equals_the_uncached_run():
    result = run(mixture_flow, tolerance=0.0)
    assert result.pattern() == "F" * 28
    assert torch.equal(result.latents, euler(mixture_flow, LATENTS))


def test_adaptive_run_skips_steps_and_stays_close():
    result = run(mixture_flow, tolerance=0.01, warmup_steps=2)
    assert "." in result.pattern()
    assert "F" in result.pattern()[2:]
    difference = (result.latents - euler(mixture_flow, LATENTS)).abs().max()
    assert 0 < difference < 0.05


def test_error_grows_with_the_tolerance():
    exact = euler(mixture_flow, LATENTS)
    results = [run(mixture_flow, tolerance=t, warmup_steps=2, correction=False) for t in (0.003, 0.03, 0.3)]
    errors = [float((result.latents - exact).norm()) for result in results]
    computed = [result.pattern().count("F") for result in results]
    assert errors == sorted(errors)
    assert computed == sorted(computed, reverse=True)
    assert errors[2] > 3 * errors[0]


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_forecast_is_exact_for_polynomials_of_its_order(order: int):
    field = polynomial_in_sigma(0.3, 1.1, -0.7, 0.5, 0.2)
    exact_field = polynomial_in_sigma(*(0.3, 1.1, -0.7, 0.5)[: order + 1])
    settings = {"order": order, "warmup_steps": order + 2, "tolerance": 1e9, "max_growth": math.inf, "correction": False}
    # Eleven steps only: float32 rounding of the history is amplified by the power of the distance.
    sigmas = uneven_sigmas(11)
    result = run(exact_field, sigmas=sigmas, **settings)
    assert result.pattern() == "F" * (order + 2) + "." * (9 - order)
    torch.testing.assert_close(result.latents, euler(exact_field, LATENTS, sigmas), rtol=0, atol=5e-5)
    inexact = run(field, sigmas=sigmas, **settings)
    assert float((inexact.latents - euler(field, LATENTS, sigmas)).abs().max()) > 1e-3


def last_refresh_difference(result: Run, field: VelocityField) -> float:
    """Distance from the uncached path right after the last refresh: later steps are not corrected."""
    last = result.pattern().rindex("F")
    assert "." in result.pattern()[:last]
    exact = euler(field, LATENTS, SIGMAS[: last + 2])
    return float((result.path[last + 1] - exact).abs().max())


@pytest.mark.parametrize(
    ("coefficients", "order", "law"),
    [((0.3, 1.7), 0, "power"), ((0.3, 1.7), 0, "remainder"), ((0.3, 1.7, -2.5), 1, "remainder")],
    ids=["linear error, linear law", "linear error, remainder of order 0", "quadratic velocity, remainder of order 1"],
)
def test_correction_is_exact_where_its_law_holds(coefficients: tuple[float, ...], order: int, law: str):
    field = polynomial_in_sigma(*coefficients)
    settings = {"order": order, "error_law": law, "tolerance": 0.05, "warmup_steps": 3}
    corrected = run(field, **settings)
    uncorrected = run(field, **settings, correction=False)
    assert corrected.pattern() == uncorrected.pattern()
    assert last_refresh_difference(corrected, field) < 2e-5
    assert last_refresh_difference(uncorrected, field) > 1e-3


def test_correction_by_the_power_law_is_nearly_exact_for_a_quadratic_velocity():
    field = polynomial_in_sigma(0.3, 1.7, -2.5)
    settings = {"order": 1, "error_law": "power", "tolerance": 0.05}
    corrected, uncorrected = run(field, **settings), run(field, **settings, correction=False)
    assert last_refresh_difference(corrected, field) < 0.5 * last_refresh_difference(uncorrected, field)


def test_history_holds_the_uncorrected_residual():
    field = polynomial_in_sigma(0.3, 1.7, -2.5)
    result = run(field, order=1, tolerance=0.05)
    newest = result.state.history[0]
    expected = field(LATENTS, result.state.nodes[0])
    torch.testing.assert_close(newest, expected)


def test_first_two_steps_are_always_computed():
    assert run(polynomial_in_sigma(1.0), tolerance=1e9, warmup_steps=1, max_growth=math.inf).pattern().startswith("FF.")


def test_warmup_steps_are_computed():
    assert run(polynomial_in_sigma(1.0, 0.1), tolerance=1e9, warmup_steps=7).pattern().startswith("F" * 7 + ".")


@pytest.mark.parametrize("max_growth", [1.0, 2.0, 3.0])
def test_gaps_grow_by_no_more_than_the_limit(max_growth: float):
    result = run(polynomial_in_sigma(1.0, 0.1), tolerance=1e9, max_growth=max_growth, warmup_steps=2)
    last, previous_gap, forecasts = 0, 0.0, 0
    for index, letter in enumerate(result.pattern()):
        gap = float(SIGMAS[last] - SIGMAS[index])
        if letter == "F":
            previous_gap, last = gap, index
        else:
            forecasts += 1
            assert gap <= max_growth * previous_gap + 1e-6
    assert (forecasts > 0) == (max_growth > 1)


def test_order_tag_makes_the_law_follow_the_measured_row():
    # After two refreshes the error belongs to the order-0 row: it grows linearly, though the row in use is of order 1.
    result = run(polynomial_in_sigma(0.3, 1.7), sigmas=SIGMAS[:3], tolerance=0.0, order=1)
    assert result.state.error_order.tolist() == [0, 0]
    config = CacheConfig(order=1)
    near, far = (schedule_steps(SIGMAS, config)[i] for i in (2, 6))
    ratio = predict_error(result.state, far, config=config) / predict_error(result.state, near, config=config)
    gaps = (SIGMAS[1] - SIGMAS[6]) / (SIGMAS[1] - SIGMAS[2])
    torch.testing.assert_close(ratio, gaps.expand(2))

    longer = run(polynomial_in_sigma(0.3, 1.7, 0.4), sigmas=SIGMAS[:4], tolerance=0.0, order=1)
    assert longer.state.error_order.tolist() == [1, 1]
    near, far = (schedule_steps(SIGMAS, config)[i] for i in (3, 7))
    ratio = predict_error(longer.state, far, config=config) / predict_error(longer.state, near, config=config)
    gaps = (SIGMAS[2] - SIGMAS[7]) / (SIGMAS[2] - SIGMAS[3])
    torch.testing.assert_close(ratio, (gaps**2).expand(2))


def test_estimate_is_the_sum_of_rate_times_growth_times_step():
    result = run(polynomial_in_sigma(0.3, 1.7, -2.5), tolerance=0.05, warmup_steps=3)
    assert result.pattern().startswith("FFF.")
    e = float(result.records[2].measured_error[0])
    sigma = SIGMAS.tolist()
    rate = e / (sigma[1] - sigma[2]) ** 2
    expected = rate * (sigma[2] - sigma[3]) ** 2 * (sigma[3] - sigma[4])
    assert float(result.records[3].accumulated_error[0]) == pytest.approx(expected, rel=1e-4)
    refreshed = [bool(record.refresh[0]) for record in result.records]
    assert all(float(r.accumulated_error[0]) == 0 for r, done in zip(result.records, refreshed, strict=True) if done)


def test_measured_error_is_relative_in_velocity_space():
    field = polynomial_in_sigma(0.3, 1.7)
    result = run(field, tolerance=0.0, order=0)
    ones = torch.ones(1)
    before, now = (float(field(LATENTS[:1], SIGMAS[i] * ones)[0, 0, 0]) for i in (4, 5))
    assert float(result.records[5].measured_error[0]) == pytest.approx(abs(before - now) / abs(now), rel=1e-4)
    assert math.isnan(float(result.records[0].measured_error[0]))


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0], ids=["nan", "infinity", "zero norm"])
def test_a_broken_velocity_forces_refreshes_until_an_error_is_measured_again(bad: float):
    smooth = polynomial_in_sigma(1.0, 0.1)

    def field(x: Tensor, sigma: Tensor) -> Tensor:
        is_bad = (sigma == SIGMAS[5])[:, None, None]
        return torch.where(is_bad, torch.full_like(x, bad), smooth(x, sigma))

    settings = {"tolerance": 1e9, "max_growth": math.inf, "correction": False}
    pattern = run(field, **settings, warmup_steps=6).pattern()
    # Step 5 is broken; 6 forecasts from it and cannot be trusted; a zero norm is measured properly at 6.
    assert pattern[:7] == "F" * 7
    assert run(smooth, **settings, warmup_steps=6).pattern() == "F" * 6 + "." * 22


def batch_of(*fields: VelocityField) -> VelocityField:
    def field(x: Tensor, sigma: Tensor) -> Tensor:
        return torch.cat([f(x[i : i + 1], sigma[i : i + 1]) for i, f in enumerate(fields)])

    return field


def test_independent_samples_do_not_depend_on_their_neighbours():
    restless, calm = mixture_flow, polynomial_in_sigma(0.3, 0.5, 0.01)
    together = run(batch_of(restless, calm), tolerance=0.004, warmup_steps=2)
    assert together.pattern(0) != together.pattern(1)
    for i, field in enumerate((restless, calm)):
        alone = run(field, latents=LATENTS[i : i + 1], tolerance=0.004, warmup_steps=2)
        assert alone.pattern() == together.pattern(i)
        assert torch.equal(alone.latents[0], together.latents[i])


def test_shared_decisions_refresh_all_samples_together():
    fields = batch_of(mixture_flow, polynomial_in_sigma(0.3, 0.5, 0.01))
    together = run(fields, tolerance=0.004, warmup_steps=2, batch_decisions="shared")
    assert together.pattern(0) == together.pattern(1)
    assert "." in together.pattern()


def test_the_stack_runs_exactly_when_a_sample_refreshes():
    toy, config = Toy(batch_of(mixture_flow, polynomial_in_sigma(0.3, 0.5, 0.01))), CacheConfig(tolerance=0.004, warmup_steps=2)
    state, latents, computed = init_state(2, 3, 4, config=config), LATENTS, 0
    for index in range(28):
        schedule = schedule_steps(SIGMAS, config)[index]
        inputs = ToyInputs(latents, schedule.sigma.expand(2))
        before = toy.evaluations
        velocity, state, record = step_once(toy, inputs, state, schedule, config=config)
        assert toy.evaluations - before == int(record.refresh.any()) == int(record.is_computed)
        computed += int(record.is_computed)
        latents = latents + (schedule.sigma_next - schedule.sigma) * velocity
    assert 2 < computed < 28


def step_once(toy: Toy, inputs: ToyInputs, state: CacheState, schedule, *, config: CacheConfig, coupling=None):
    return cached_forward(
        toy,
        inputs,
        state,
        schedule,
        coupling or uncoupled(inputs.hidden_states.shape[0]),
        architecture=TOY,
        kernel=scaled_dot_product_attention,
        config=config,
    )


@pytest.mark.parametrize("index", [2, 3], ids=["refresh", "forecast"])
def test_cached_forward_leaves_its_inputs_unchanged_and_returns_fresh_tensors(index: int):
    result = run(mixture_flow, sigmas=SIGMAS[: index + 1], tolerance=1e9, warmup_steps=3)
    state, toy = result.state, Toy(mixture_flow)
    before = [field.clone() for field in tensors_of(state)]
    config = CacheConfig(tolerance=1e9, warmup_steps=3)
    schedule = schedule_steps(SIGMAS, config)[index]
    inputs = ToyInputs(result.latents, schedule.sigma.expand(2))
    _, after, record = step_once(toy, inputs, state, schedule, config=config)
    assert bool(record.is_computed) == (index == 2)
    assert all(torch.equal(x, y) for x, y in zip(before, tensors_of(state), strict=True))
    pointers = {field.data_ptr() for field in tensors_of(state)}
    assert after.history.data_ptr() not in pointers


def test_both_branches_return_the_same_metadata():
    config = CacheConfig(tolerance=1e9, warmup_steps=3)
    metadata = []
    for index in (2, 3):
        result = run(mixture_flow, sigmas=SIGMAS[: index + 1], tolerance=1e9, warmup_steps=3)
        schedule = schedule_steps(SIGMAS, config)[index]
        inputs = ToyInputs(result.latents, schedule.sigma.expand(2))
        velocity, state, record = step_once(Toy(mixture_flow), inputs, result.state, schedule, config=config)
        metadata.append([(x.shape, x.dtype, x.stride()) for x in tensors_of((velocity, state, record))])
    assert metadata[0] == metadata[1]


@pytest.mark.parametrize("is_for_each", [False, True])
def test_cached_forward_compiles_to_one_graph_that_equals_eager(is_for_each: bool):
    config = CacheConfig(tolerance=0.01, warmup_steps=2)
    each = (config, config) if is_for_each else None
    eager = sample_toy(mixture_flow, SIGMAS, config, latents=LATENTS)
    toy = Toy(mixture_flow)

    def step(inputs, state, schedule, coupling):
        embedded_only = TOY._replace(stack=lambda _, inputs, embedded: mixture_flow(inputs.hidden_states, embedded.temb[:, 0]))
        return cached_forward(
            toy,
            inputs,
            state,
            schedule,
            coupling,
            architecture=embedded_only,
            kernel=scaled_dot_product_attention,
            config=config,
        )

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    state, latents, pattern = init_state(2, 3, 4, config=config), LATENTS, ""
    for steps in (28, 20):
        sigmas = SIGMAS if steps == 28 else uneven_sigmas(20)
        state, latents, pattern = init_state(2, 3, 4, config=config), LATENTS, ""
        for index in range(steps):
            schedule = schedule_steps(sigmas, config, each=each)[index]
            velocity, state, record = compiled(ToyInputs(latents, schedule.sigma.expand(2)), state, schedule, uncoupled(2))
            latents = latents + (schedule.sigma_next - schedule.sigma) * velocity
            pattern += "F" if bool(record.refresh[0]) else "."
        if steps == 28:
            assert pattern == eager.pattern()
            torch.testing.assert_close(latents, eager.latents, rtol=0, atol=1e-5)
    assert set(pattern) == {"F", "."}
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]
