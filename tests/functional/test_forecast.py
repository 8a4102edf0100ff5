import math

import numpy as np
import pytest
import torch

from afcache.functional.forecast import (
    apply_row,
    chebyshev_row,
    damp_row,
    gap_to,
    polynomial_row,
    push,
    reuse_row,
    row_order,
    taylorseer_row,
)

# Newest first, unequal distances.
NODES = [0.55, 0.7, 0.92, 1.0, 1.3]


def column(values: list[float]) -> torch.Tensor:
    return torch.tensor(values)[:, None]


def filled(count: int) -> torch.Tensor:
    return torch.tensor([count])


@pytest.mark.parametrize("order", [0, 1, 2, 3, 4])
def test_polynomial_row_is_exact_for_polynomials_of_its_order(order: int):
    nodes = column(NODES[: order + 1])
    coefficients = torch.tensor([0.7, -1.3, 0.9, 0.4, -0.6])[: order + 1]

    def polynomial(sigma: torch.Tensor) -> torch.Tensor:
        return sum(c * sigma**i for i, c in enumerate(coefficients))  # pyright: ignore[reportReturnType]

    history = polynomial(nodes)[:, :, None, None].expand(-1, 1, 3, 2).contiguous()
    sigma = torch.tensor(0.31)
    row = polynomial_row(nodes, filled(order + 1), sigma, order=order)
    # float32 weights of up to about 30 cancel to order one.
    torch.testing.assert_close(apply_row(row, history), polynomial(sigma).expand(1, 3, 2), rtol=2e-5, atol=2e-5)


def test_polynomial_row_is_not_exact_beyond_its_order():
    nodes = column(NODES[:2])
    row = polynomial_row(nodes, filled(2), torch.tensor(0.31), order=1)
    forecast = (row * nodes**2).sum()
    assert abs(float(forecast) - 0.31**2) > 0.05


def test_polynomial_row_of_order_one_is_newtons_divided_difference():
    sigma = 0.31
    row = polynomial_row(column(NODES[:2]), filled(2), torch.tensor(sigma), order=1)
    slope = (sigma - NODES[0]) / (NODES[0] - NODES[1])
    torch.testing.assert_close(row[:, 0], torch.tensor([1 + slope, -slope]))


@pytest.mark.parametrize(("known", "expected"), [(0, [0.0, 0.0, 0.0]), (1, [1.0, 0.0, 0.0])])
def test_polynomial_row_falls_back_to_the_known_nodes(known: int, expected: list[float]):
    nodes = column([0.8, 0.0, 0.0])
    row = polynomial_row(nodes, filled(known), torch.tensor(0.5), order=2)
    assert row[:, 0].tolist() == expected


def test_polynomial_row_decides_per_sample():
    nodes = torch.tensor([[0.5, 0.5], [0.7, 0.0]])
    row = polynomial_row(nodes, torch.tensor([2, 1]), torch.tensor(0.4), order=1)
    torch.testing.assert_close(row, torch.tensor([[1.5, 1.0], [-0.5, 0.0]]))


def test_polynomial_row_with_equal_nodes_is_not_finite():
    row = polynomial_row(column([0.5, 0.5]), filled(2), torch.tensor(0.4), order=1)
    assert not torch.isfinite(row).any()


def test_row_order_is_limited_by_the_history():
    assert row_order(torch.tensor([0, 1, 2, 3]), order=1).tolist() == [0, 0, 1, 1]


def test_taylorseer_row_of_order_one():
    # Refreshes at steps 4 and 7, forecast of step 9: k = 2, N = 3.
    row = taylorseer_row(column([7.0, 4.0]), filled(2), torch.tensor(9.0), order=1)
    torch.testing.assert_close(row[:, 0], torch.tensor([1 + 2 / 3, -2 / 3]))


def test_taylorseer_row_of_order_two_is_the_authors_and_not_exact_on_quadratics():
    # s^2 + 2 s + 10 at steps 0, 1, 2: d1 = 5, d2 = 5 - 3 = 2, so the forecast is 18 + 5 k + k^2.
    steps, values = column([2.0, 1.0, 0.0]), torch.tensor([18.0, 13.0, 10.0])
    forecasts, truth = [], []
    for k in (1.0, 2.0):
        row = taylorseer_row(steps, filled(3), torch.tensor(2.0 + k), order=2)
        forecasts.append(float((row[:, 0] * values).sum()))
        truth.append((2 + k) ** 2 + 2 * (2 + k) + 10)
    assert forecasts == [24.0, 32.0]
    assert truth == [25.0, 34.0]


def test_taylorseer_row_divides_each_difference_by_the_last_distance():
    steps = column([9.0, 5.0, 3.0])
    values = torch.tensor([2.0, -1.0, 0.5])
    row = taylorseer_row(steps, filled(3), torch.tensor(11.0), order=2)
    first, earlier = (2.0 + 1.0) / 4, (-1.0 - 0.5) / 2
    second = (first - earlier) / 4
    expected = 2.0 + first * 2 + second * 2**2 / 2
    assert float((row[:, 0] * values).sum()) == pytest.approx(expected, rel=1e-6)


def test_taylorseer_row_equals_polynomial_row_for_order_one_at_equal_sigma_steps():
    sigmas = torch.linspace(1, 0, 11)
    by_step = taylorseer_row(column([4.0, 1.0]), filled(2), torch.tensor(6.0), order=1)
    by_sigma = polynomial_row(sigmas[[4, 1]][:, None], filled(2), sigmas[6], order=1)
    torch.testing.assert_close(by_step, by_sigma)


@pytest.mark.parametrize("known", [0, 1])
def test_taylorseer_row_with_too_few_nodes_reuses_or_is_empty(known: int):
    row = taylorseer_row(column([3.0, 0.0]), filled(known), torch.tensor(4.0), order=1)
    assert row[:, 0].tolist() == [float(known), 0.0]


def test_damp_row_mixes_with_reuse():
    row = torch.tensor([[1.6], [-0.6]])
    torch.testing.assert_close(damp_row(row, damping=torch.tensor(0.5)), torch.tensor([[1.3], [-0.3]]))
    torch.testing.assert_close(damp_row(row, damping=torch.tensor(1.0)), reuse_row(row))


@pytest.mark.parametrize("zero", [torch.tensor(0.0), torch.zeros(5)])
def test_damp_row_by_nothing_keeps_every_bit(zero: torch.Tensor):
    row = torch.tensor([[0.1, math.inf, math.nan, -math.inf, -0.0], [1e30, 1.0, -0.0, 1e-45, 0.3]])
    assert torch.equal(damp_row(row, damping=zero).view(torch.int32), row.view(torch.int32))


def test_damp_row_by_as_much_as_each_sample_asks_for():
    row, damping = torch.randn(3, 4), torch.tensor([0.0, 0.2, 0.35, 1.0])
    alone = [damp_row(row[:, [i]], damping=damping[i]) for i in range(4)]
    assert torch.equal(damp_row(row, damping=damping), torch.cat(alone, dim=1))
    # As with a number that is known beforehand.
    assert torch.equal(damp_row(row, damping=torch.tensor(0.2)), torch.lerp(row, reuse_row(row), 0.2))


def test_apply_row_leaves_out_nodes_of_weight_zero_even_if_not_finite():
    history = torch.stack([torch.ones(1, 2, 2), torch.full((1, 2, 2), float("nan"))])
    assert apply_row(torch.tensor([[2.0], [0.0]]), history).tolist() == [[[2.0, 2.0], [2.0, 2.0]]]


def test_apply_row_accumulates_in_float32():
    # In bfloat16 2 * 1.0078125 - 1 * 1.0 would lose the last bit of the difference.
    newest, older = torch.tensor(1.0078125), torch.tensor(1.0)
    history = torch.stack([newest, older])[:, None, None, None].to(torch.bfloat16)
    forecast = apply_row(torch.tensor([[2.0], [-1.0]]), history)
    assert forecast.dtype == torch.bfloat16
    assert float(forecast) == 1.015625


def test_push_shifts_only_the_samples_that_refresh_and_leaves_the_input_unchanged():
    history = torch.arange(4.0).reshape(2, 2, 1, 1)
    before = history.clone()
    pushed = push(history, torch.full((2, 1, 1), 9.0), torch.tensor([True, False]))
    assert pushed[:, :, 0, 0].tolist() == [[9.0, 1.0], [0.0, 3.0]]
    assert torch.equal(history, before)


def test_gap_to_is_the_distance_from_the_last_refresh():
    torch.testing.assert_close(gap_to(column([0.5, 0.9]), torch.tensor(0.2)), torch.tensor([0.3]))


def chebyshev_by_hand(steps: list[float], values: list[float], at: float, order: int) -> float:
    """Ridge regression in float64 with numpy's own Chebyshev polynomials."""
    nodes = 2 * np.array(steps) / 50 - 1
    design = np.polynomial.chebyshev.chebvander(nodes, order)
    gram = design.T @ design + 0.1 * np.eye(order + 1)
    coefficients = np.linalg.solve(gram, design.T @ np.array(values))
    return float(np.polynomial.chebyshev.chebval(2 * at / 50 - 1, coefficients))


@pytest.mark.parametrize("order", [0, 1, 4])
@pytest.mark.parametrize("known", [1, 3, 6])
def test_chebyshev_row_is_ridge_regression_over_the_known_refreshes(order: int, known: int):
    steps, values = [11.0, 9.0, 6.0, 4.0, 3.0, 1.0], [0.4, 0.1, -0.5, 0.9, 1.0, 0.2]
    row = chebyshev_row(column(steps), filled(known), torch.tensor(13.0), order=order)
    forecast = float((row[:, 0] * torch.tensor(values)).sum())
    assert forecast == pytest.approx(chebyshev_by_hand(steps[:known], values[:known], 13.0, order), abs=1e-4)
    assert not row[known:].any()
