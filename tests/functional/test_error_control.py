import math

import pytest
import torch

from afcache.functional.error_control import (
    catch_up,
    contribution,
    error_rate,
    extend_lag,
    power_growth,
    predicted_error,
    remainder_growth,
    should_refresh,
)
from afcache.functional.guidance import infer_guidance

NODES = torch.tensor([[0.5], [0.8], [0.9]])


def decide(
    accumulated: float,
    *,
    tolerance: float = 0.1,
    gap: float = 0.1,
    last_gap: float = 0.1,
    max_growth: float = 2.0,
    **options,
) -> bool:
    arguments = {"max_growth": torch.tensor(max_growth), "is_forced": torch.tensor(False), **options}
    refresh = should_refresh(
        torch.tensor([accumulated]),
        tolerance=torch.tensor(tolerance),
        gap=torch.tensor([gap]),
        last_gap=torch.tensor([last_gap]),
        **arguments,
    )
    return bool(refresh)


@pytest.mark.parametrize(("order", "exponent", "power"), [(0, 2.0, 1), (1, 2.0, 2), (2, 2.0, 2), (2, 3.0, 3), (1, 1.0, 1)])
def test_power_growth_follows_the_order_up_to_its_exponent(order: int, exponent: float, power: int):
    growth = power_growth(NODES, torch.tensor([order]), torch.tensor(0.3), exponent=exponent)
    assert float(growth) == pytest.approx(0.2**power, rel=1e-6)


@pytest.mark.parametrize(("order", "expected"), [(0, 0.2), (1, 0.2 * 0.5), (2, 0.2 * 0.5 * 0.6)])
def test_remainder_growth_is_the_product_of_distances_to_the_rows_nodes(order: int, expected: float):
    growth = remainder_growth(NODES, torch.tensor([order]), torch.tensor(0.3))
    assert float(growth) == pytest.approx(expected, rel=1e-6)


def test_predicted_error_inverts_error_rate():
    growth = torch.tensor([0.04, 0.25])
    error = torch.tensor([0.01, 0.5])
    torch.testing.assert_close(predicted_error(error_rate(error, growth), growth), error)


def test_error_rate_without_growth_is_not_finite():
    assert not torch.isfinite(error_rate(torch.tensor([0.0, 0.1]), torch.zeros(2))).any()


def test_contribution_is_weighted_by_the_length_of_the_step():
    value = contribution(torch.tensor([0.1]), torch.tensor(0.5), torch.tensor(0.3), weight=0.0)
    assert float(value) == pytest.approx(0.02)


def test_contribution_may_count_late_steps_less():
    value = contribution(torch.tensor([0.1]), torch.tensor(0.25), torch.tensor(0.05), weight=0.5)
    assert float(value) == pytest.approx(0.1 * 0.2 * 0.5)


def test_contribution_may_count_early_steps_more():
    def value(sigma: float, early_weight: float = 0.5) -> float:
        sigmas = torch.tensor(sigma), torch.tensor(sigma - 0.1)
        return float(contribution(torch.tensor([0.1]), *sigmas, weight=0.0, early_weight=early_weight))

    assert value(0.75) == pytest.approx(0.01)
    assert value(0.9375) == pytest.approx(0.02)
    assert value(0.75, 2.0) == pytest.approx(0.01)
    assert value(0.5, 1.0) == pytest.approx(0.005)
    # Pure noise counts for much, and not for everything.
    assert value(1.0) == pytest.approx(0.01 * 16)


def test_should_refresh_when_the_tolerance_would_be_reached():
    assert not decide(0.0999)
    assert decide(0.1)
    assert decide(0.2)


def test_should_refresh_always_with_tolerance_zero():
    assert decide(0.0, tolerance=0.0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_should_refresh_when_the_estimate_is_not_finite(value: float):
    assert decide(value)
    assert decide(value, tolerance=math.inf)


@pytest.mark.parametrize(("gap", "last_gap"), [(math.nan, 0.1), (0.1, math.nan), (0.21, 0.1), (0.1, 0.0)])
def test_should_refresh_when_the_gap_outgrows_its_limit(gap: float, last_gap: float):
    assert decide(0.0, gap=gap, last_gap=last_gap)


def test_should_refresh_without_growth_limit_needs_two_refreshes_only():
    assert not decide(0.0, gap=5.0, last_gap=0.1, max_growth=math.inf)
    assert decide(0.0, gap=5.0, last_gap=0.0, max_growth=math.inf)
    assert decide(0.0, gap=0.0, last_gap=0.0, max_growth=math.inf)
    assert decide(0.0, gap=math.nan, max_growth=math.inf)


def test_should_refresh_when_forced():
    assert decide(0.0, is_forced=torch.tensor(True))


def test_should_refresh_decides_per_sample():
    refresh = should_refresh(
        torch.tensor([0.05, 0.15]),
        tolerance=torch.tensor(0.1),
        gap=torch.full((2,), 0.1),
        last_gap=torch.full((2,), 0.1),
        max_growth=torch.tensor(2.0),
        is_forced=torch.tensor(False),
    )
    assert refresh.tolist() == [False, True]


def test_should_refresh_by_limits_of_each_sample():
    refresh = should_refresh(
        torch.full((4,), 0.05),
        tolerance=torch.tensor([0.1, 0.01, 0.1, 0.0]),
        gap=torch.full((4,), 0.3),
        last_gap=torch.full((4,), 0.1),
        max_growth=torch.tensor([4.0, 4.0, 2.0, math.inf]),
        is_forced=torch.tensor(False),
    )
    assert refresh.tolist() == [False, True, True, True]


def test_extend_lag_keeps_the_sign_of_the_step():
    lag = extend_lag(torch.tensor([0.0]), torch.tensor([0.2]), torch.tensor(0.5), torch.tensor(0.4))
    assert float(lag) == pytest.approx(-0.02)


def test_catch_up_has_the_right_sign():
    # One forecast step of length -0.1 used 1.0 where 3.0 was right; the error was as large at the refresh.
    velocity, forecast = torch.full((1, 1, 1), 3.0), torch.full((1, 1, 1), 1.0)
    growth = torch.tensor([1.0])
    sigma, sigma_next = torch.tensor(0.4), torch.tensor(0.3)
    lag = extend_lag(torch.zeros(1), growth, torch.tensor(0.5), sigma)
    corrected = catch_up(velocity, forecast, lag=lag, growth=growth, sigma=sigma, sigma_next=sigma_next)
    # The refresh steps twice as far for the difference: 3 + (3 - 1) = 5.
    assert float(corrected) == pytest.approx(5.0, rel=1e-5)


def test_catch_up_without_lag_is_the_velocity_itself_even_against_a_broken_forecast():
    velocity = torch.randn(1, 2, 2)
    options = {"growth": torch.zeros(1), "sigma": torch.tensor(0.4), "sigma_next": torch.tensor(0.3)}
    corrected = catch_up(velocity, torch.full_like(velocity, float("nan")), lag=torch.zeros(1), **options)
    assert torch.equal(corrected, velocity)


EXACT = torch.zeros(2)


@pytest.mark.parametrize("scale", [1.0, 2.0, 4.0, 7.5])
def test_infer_guidance_finds_the_scale_of_each_sample(scale: float):
    first, second = torch.randn(2, 8, 4), torch.randn(2, 8, 4)
    step = second + scale * (first - second)
    torch.testing.assert_close(
        infer_guidance(step, first, second, rounding=EXACT), torch.full((2,), scale), rtol=1e-5, atol=1e-5
    )


def test_infer_guidance_survives_bfloat16_latents():
    # x is rounded before and after the step: relative error of the step of about 10 %.
    first, second = torch.randn(1, 512, 16), torch.randn(1, 512, 16)
    latents, length = torch.randn(1, 512, 16).to(torch.bfloat16), 0.02
    moved = (latents.float() + length * (second + 3.5 * (first - second))).to(torch.bfloat16)
    rounding = torch.finfo(torch.bfloat16).eps * latents.float().norm()[None] / length
    scale = infer_guidance((moved.float() - latents.float()) / length, first, second, rounding=rounding)
    assert float(scale) == pytest.approx(3.5, rel=0.02)


def test_infer_guidance_is_unknown_where_no_scale_explains_the_step():
    first, second = torch.randn(2, 8, 4), torch.randn(2, 8, 4)
    step = second + 2.0 * (first - second)
    step[1] += 2 * torch.randn(8, 4)
    scale = infer_guidance(step, first, second, rounding=EXACT)
    assert float(scale[0]) == pytest.approx(2.0, rel=1e-4)
    assert math.isnan(float(scale[1]))


@pytest.mark.parametrize("scale", [0.5, 2.0, 4.0, 7.5])
@pytest.mark.parametrize("axes", [(1, 2), (2,)])
def test_infer_guidance_sees_through_rescaled_norms(scale: float, axes: tuple[int, ...]):
    """Of the whole exactly; of single tokens, as Qwen-Image does it, nearly."""
    generator = torch.Generator().manual_seed(1)
    first = torch.randn(2, 64, 16, generator=generator)
    second = first + 0.5 * torch.randn(2, 64, 16, generator=generator)
    guided = second + scale * (first - second)
    step = guided * first.norm(dim=axes, keepdim=True) / guided.norm(dim=axes, keepdim=True)
    found = infer_guidance(step, first, second, rounding=EXACT)
    torch.testing.assert_close(found, torch.full((2,), scale), rtol=0.02 if len(axes) == 2 else 0.1, atol=1e-3)


def test_infer_guidance_is_unknown_where_half_of_the_latents_were_replaced():
    generator = torch.Generator().manual_seed(1)
    first, second, other = (torch.randn(2, 64, 16, generator=generator) for _ in range(3))
    step = torch.where(torch.arange(64)[:, None] < 32, second + 4 * (first - second), other)
    assert torch.isnan(infer_guidance(step, first, second, rounding=EXACT)).all()


def test_infer_guidance_is_unknown_where_the_branches_agree():
    velocity = torch.randn(2, 8, 4)
    assert torch.isnan(infer_guidance(torch.randn(2, 8, 4), velocity, velocity, rounding=EXACT)).all()
