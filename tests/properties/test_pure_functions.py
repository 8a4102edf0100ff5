"""What holds for the pure functions, whatever they are given."""

import itertools
import math

import torch
from hypothesis import strategies as st
from torch import Tensor

from afcache.functional import distance, error_control, forecast, guidance
from afcache.functional.groups import stability
from afcache.functional.groups.group import divide
from afcache.functional.groups.pooling import pool_tokens
from afcache.functional.plans import forced_steps, growing_plan, magnitude_plan, resample_ratios
from afcache.functional.rounding import above_floor, computational_noise
from afcache.functional.shapes import coarse_length
from tests.support import cases
from tests.support.cases import numbers, property_test

SEEDS = st.integers(0, 2**16)


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@st.composite
def rows(draw: st.DrawFn):
    """A forecaster's row at some point, its nodes, and what it was made of."""
    nodes, filled, order = draw(cases.node_rows())
    at = torch.tensor(draw(st.integers(-32, 0)) / 64)
    if draw(st.booleans()):
        return forecast.polynomial_row(nodes, filled, at, order=order), nodes, filled, order, at, "polynomial"
    return forecast.taylorseer_row(nodes, filled, at, order=order), nodes, filled, order, at, "taylorseer"


@property_test(rows(), numbers(0, 1))
def test_weights_sum_to_one_and_leave_empty_nodes_out(case, damping):
    row, nodes, filled, order, _, _ = case
    largest, is_known = row.abs().amax(dim=0).clamp(min=1), filled > 0
    for weights in (row, forecast.damp_row(row, damping=torch.tensor(damping))):
        assert bool(((weights.sum(dim=0) - 1).abs() < 1e-4 * largest)[is_known].all())
    used = forecast.row_order(filled, order=order)
    beyond = torch.arange(nodes.shape[0])[:, None] > used
    assert bool((row[beyond] == 0).all())
    assert bool((row[:, filled == 0] == 0).all())


@property_test(cases.node_rows(), st.integers(-32, 0), st.lists(st.integers(-4, 4), min_size=5, max_size=5))
def test_polynomials_of_the_order_that_is_known_are_reproduced(case, at, coefficients):
    nodes, filled, order = case
    sigma = torch.tensor(at / 64)
    row = forecast.polynomial_row(nodes, filled, sigma, order=order)
    for sample in range(nodes.shape[1]):
        if filled[sample] == 0:
            continue
        degree = min(order, int(filled[sample]) - 1)

        def polynomial(x: Tensor, degree: int = degree) -> Tensor:
            return sum((c * x.double() ** i for i, c in enumerate(coefficients[: degree + 1])), torch.zeros_like(x.double()))

        found = (row[:, sample].double() * polynomial(nodes[:, sample])).sum()
        allowed = 1e-5 * float((row[:, sample].double().abs() * (polynomial(nodes[:, sample]).abs() + 1)).sum() + 1)
        assert abs(float(found - polynomial(sigma))) < allowed


@property_test(cases.node_rows(order=1), st.integers(-32, 0))
def test_taylorseer_of_order_one_is_the_polynomial_of_order_one(case, at):
    nodes, filled, _ = case
    sigma = torch.tensor(at / 64)
    taylor, newton = (row(nodes, filled, sigma, order=1) for row in (forecast.taylorseer_row, forecast.polynomial_row))
    torch.testing.assert_close(taylor, newton, rtol=1e-4, atol=1e-4)


@property_test(cases.node_rows(), st.integers(0, 50))
def test_chebyshev_weights_are_finite_and_leave_empty_nodes_out(case, at):
    nodes, filled, order = case
    row = forecast.chebyshev_row(nodes * 64, filled, torch.tensor(float(at)), order=order)
    assert bool(row.isfinite().all())
    assert bool((row[torch.arange(nodes.shape[0])[:, None] >= filled] == 0).all())


@property_test(rows(), SEEDS, numbers(-4, 4))
def test_a_row_acts_linearly_and_leaves_out_what_it_does_not_weigh(case, seed, factor):
    row, nodes, *_ = case
    first, second = (noise(seed + i, *nodes.shape, 2, 3) for i in range(2))
    together = forecast.apply_row(row, first + factor * second)
    apart = forecast.apply_row(row, first) + factor * forecast.apply_row(row, second)
    scale = float(row.abs().amax()) + 1
    assert float((together - apart).abs().max()) < 1e-4 * scale
    spoiled = torch.where((row == 0)[..., None, None], torch.full_like(first, math.nan), first)
    assert torch.equal(forecast.apply_row(row, spoiled), forecast.apply_row(row, first))


@property_test(st.integers(1, 5), st.lists(st.booleans(), min_size=1, max_size=4), SEEDS)
def test_pushing_shifts_the_samples_that_refresh(nodes, flags, seed):
    refresh = torch.tensor(flags)
    history, newest = noise(seed, nodes, len(flags), 2, 3), noise(seed + 1, len(flags), 2, 3)
    before = history.clone()
    pushed = forecast.push(history, newest, refresh)
    assert torch.equal(history, before)
    assert torch.equal(pushed[:, ~refresh], history[:, ~refresh])
    assert torch.equal(pushed[0, refresh], newest[refresh])
    assert torch.equal(pushed[1:, refresh], history[:-1, refresh])


@property_test(cases.node_rows(), st.integers(0, 64), numbers(0.25, 4))
def test_errors_grow_with_the_distance(case, distance, exponent):
    nodes, filled, order = case
    orders = forecast.row_order(filled, order=order)
    near, far = (torch.tensor(-d / 64) for d in (distance, distance + 1))
    for law in (
        lambda sigma: error_control.power_growth(nodes, orders, sigma, exponent=exponent),
        lambda sigma: error_control.remainder_growth(nodes, orders, sigma),
    ):
        assert bool((law(far) > law(near)).all())
        assert bool((law(near) >= 0).all())


POSITIVE = st.one_of(numbers(0, 4), st.just(math.inf), st.just(math.nan))


@property_test(*[POSITIVE] * 4, numbers(1, 8), st.booleans(), numbers(0, 1))
def test_decisions_are_monotone_and_nan_refreshes(error, tolerance, gap, last_gap, max_growth, is_forced, more):
    def refreshes(error: float, tolerance: float, gap: float, last_gap: float, max_growth: float, is_forced: bool) -> bool:
        return bool(
            error_control.should_refresh(
                torch.tensor([error]),
                tolerance=torch.tensor(tolerance),
                gap=torch.tensor([gap]),
                last_gap=torch.tensor([last_gap]),
                max_growth=torch.tensor(max_growth),
                is_forced=torch.tensor(is_forced),
            )
        )

    decision = refreshes(error, tolerance, gap, last_gap, max_growth, is_forced)
    if any(map(math.isnan, (error, tolerance, gap, last_gap))) or math.isinf(error) or tolerance == 0 or is_forced:
        assert decision
    # One can only be added to a refresh by a larger error or gap, and only be taken away by larger limits.
    assert decision <= refreshes(error + more, tolerance, gap + more, last_gap, max_growth, is_forced)
    assert decision >= refreshes(error, tolerance + more, gap, last_gap + more, max_growth + more, False)


@property_test(SEEDS, numbers(-4, 4), numbers(0.015625, 1), st.booleans())
def test_catching_up_is_nothing_without_a_lag_and_a_multiple_of_what_was_missed(seed, lag, growth, is_exact):
    velocity, guess = noise(seed, 2, 3, 4), noise(seed + 1, 2, 3, 4)
    guess = velocity.clone() if is_exact else guess
    lags = torch.tensor([0.0, lag])
    where = {"sigma": torch.tensor(0.5), "sigma_next": torch.tensor(0.375)}
    caught = error_control.catch_up(velocity, guess, lag=lags, growth=torch.full((2,), growth), **where)
    assert torch.equal(caught[0], velocity[0])
    expected = velocity[1] + lag / growth / -0.125 * (velocity[1] - guess[1])
    torch.testing.assert_close(caught[1], expected, rtol=1e-4, atol=1e-4)


@property_test(SEEDS, numbers(-8, 8))
def test_the_guidance_scale_is_found_again_and_noise_is_no_scale(seed, scale):
    first, second, other = (noise(seed + i, 1, 8, 8) for i in range(3))
    rounding = torch.zeros(1)
    step = second + scale * (first - second)
    assert abs(float(guidance.infer_guidance(step, first, second, rounding=rounding)) - scale) < 1e-3
    other = 2 * step.norm() / other.norm() * other
    assert bool(guidance.infer_guidance(step + other, first, second, rounding=rounding).isnan())


@property_test(SEEDS, numbers(0.0625, 16), st.integers(1, 4))
def test_distances_are_zero_to_oneself_and_know_no_units(seed, factor, batch):
    x, y = noise(seed, batch, 3, 4), noise(seed + 1, batch, 3, 4)
    for measure in (distance.relative_l2, distance.relative_l1, distance.cosine_dissimilarity):
        assert bool((measure(x, x) < 1e-6).all())
        assert bool((measure(x, y) > 0).all())
        torch.testing.assert_close(measure(factor * x, factor * y), measure(x, y), rtol=1e-4, atol=1e-6)
        assert bool(measure(x, y.index_fill(1, torch.tensor([0]), math.nan)).isnan().all())
    assert bool((distance.cosine_dissimilarity(x, y) <= 2).all())
    p, q = x.softmax(-1), y.softmax(-1)
    assert bool((distance.total_variation(p, q) <= 1).all())
    torch.testing.assert_close(distance.total_variation(p, q), distance.total_variation(q, p))


@property_test(numbers(0, 4), numbers(0, 4), SEEDS, numbers(0.0625, 16))
def test_a_floor_takes_off_what_rounding_made_and_no_more(measured, floor, seed, factor):
    above = float(above_floor(torch.tensor([measured]), torch.tensor(floor)))
    assert 0 <= above <= measured
    assert above == measured if floor == 0 else above**2 <= max(0.0, measured**2 - floor**2) + 1e-4
    line = [noise(seed, 1, 4, 4) + k * noise(seed + 1, 1, 4, 4) for k in range(5)]
    # A straight line has no jitter, and units do not matter.
    assert float(computational_noise(line)) < 1e-5
    jittered = [v + 0.01 * noise(seed + 2 + k, 1, 4, 4) for k, v in enumerate(line)]
    scaled = [factor * v for v in jittered]
    torch.testing.assert_close(computational_noise(scaled), computational_noise(jittered), rtol=1e-3, atol=1e-7)


@property_test(SEEDS, st.integers(1, 3), st.integers(1, 3), numbers(0, 0.875), numbers(0, 0.0625), numbers(0.0078125, 0.5))
def test_stability_stays_in_its_range_and_classes_follow_it(seed, groups, batch, decay, margin, gap):
    newest, before = noise(seed, groups, batch, 2, 3), noise(seed + 1, groups, batch, 2, 3)
    similarity = stability.corrected_similarity(newest, before, torch.full((groups, batch), gap))
    assert bool((similarity.abs() <= 1).all())
    assert bool((stability.corrected_similarity(newest, 2 * newest, torch.full((groups, batch), gap)) > 0.99).all())
    everywhere, nowhere = (torch.full((groups, batch), flag) for flag in (True, False))
    previous = stability.corrected_similarity(before, newest + before, torch.full((groups, batch), gap))
    tracked = stability.track(previous, similarity, is_measured=everywhere, is_first=nowhere, decay=decay)
    assert bool((tracked.abs() <= 1 + 1e-6).all())
    assert torch.equal(stability.track(previous, similarity, is_measured=nowhere, is_first=nowhere, decay=decay), previous)
    bounds = (0.9, 0.5, 0.0)
    plain, lower = (
        stability.classify(values, torch.zeros_like(tracked, dtype=torch.int64), is_first=everywhere, bounds=bounds, margin=0.0)
        for values in (tracked, tracked - 0.25)
    )
    assert bool((lower >= plain).all())
    again = stability.classify(tracked, plain, is_first=nowhere, bounds=bounds, margin=margin)
    assert torch.equal(again, plain)


@property_test(st.lists(st.one_of(numbers(0, 4), st.just(math.nan)), min_size=1, max_size=40), numbers(0.0625, 4))
def test_the_gain_stays_between_its_bounds_and_falls_when_errors_are_too_large(incurred, tolerance):
    gain = torch.ones(1)
    for value in incurred:
        before = gain
        gain = stability.adapt_gain(
            gain, torch.tensor([value]), tolerance=torch.tensor(tolerance), is_measured=torch.ones(1, dtype=torch.bool)
        )
        assert 0.25 <= float(gain) <= 4
        assert bool(gain >= before) if value <= tolerance else bool(gain <= before)


@property_test(st.integers(1, 60), st.integers(1, 60))
def test_groups_are_contiguous_and_of_equal_size(blocks, groups):
    groups = min(blocks, groups)
    parts = divide(blocks, groups)
    assert [index for part in parts for index in range(part.start, part.stop)] == list(range(blocks))
    sizes = [part.stop - part.start for part in parts]
    assert max(sizes) - min(sizes) <= 1
    assert len(parts) == groups


@property_test(st.integers(1, 100), st.integers(0, 9), st.integers(1, 12), numbers(0, 4))
def test_growing_intervals_never_shrink(steps, first, interval, growth):
    plan = growing_plan(steps, first=first, interval=interval, growth=growth)
    gaps = [later - earlier for earlier, later in itertools.pairwise(plan)]
    assert gaps == sorted(gaps)
    assert all(gap >= interval for gap in gaps)
    assert all(step < steps for step in plan)
    assert (not plan) == (first >= steps)


RATIOS = st.lists(numbers(0.5, 1.5), min_size=1, max_size=30)


@property_test(st.integers(1, 60), RATIOS, numbers(0, 1), st.none() | st.integers(0, 5))
def test_a_calibrated_plan_starts_with_a_refresh_and_keeps_its_longest_run(steps, ratios, threshold, most):
    plan = magnitude_plan(steps, ratios, threshold=threshold, max_cached_steps=most)
    assert plan[0] == 0
    assert plan == sorted(set(plan))
    runs = [later - earlier - 1 for earlier, later in itertools.pairwise([*plan, steps])]
    assert most is None or max(runs) <= most
    assert set(resample_ratios(ratios, steps)) <= set(ratios)
    assert threshold > 0 or plan == list(range(steps))


@property_test(cases.configs(), st.integers(1, 60))
def test_plans_cover_the_warmup_and_policy_none_everything(config, steps):
    forced = forced_steps(config, steps)
    assert len(forced) == steps
    assert all(forced[: config.warmup_steps])
    assert forced[-1] or not config.refresh_last_step
    assert all(forced) or config.policy != "none"


@property_test(SEEDS, st.integers(0, 5), st.integers(1, 200), st.integers(1, 3))
def test_summaries_keep_the_text_and_the_mean_of_constants(seed, text, image, batch):
    tokens = torch.cat([noise(seed, batch, text, 4), noise(seed + 1, batch, 1, 4).expand(batch, image, 4)], dim=1)
    pooled = pool_tokens(tokens, txt_seq=text)
    assert pooled.shape == (batch, text + coarse_length(image), 4)
    assert torch.equal(pooled[:, :text], tokens[:, :text])
    torch.testing.assert_close(pooled[:, text:], tokens[:, -1:].expand(-1, coarse_length(image), -1), rtol=1e-5, atol=1e-6)
