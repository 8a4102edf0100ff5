import math

import pytest
import torch

from afcache.functional.distance import cosine_dissimilarity, no_reduction, relative_l1, relative_l2, total_variation


def test_relative_l2_by_hand():
    exact = torch.tensor([[[3.0, 4.0]], [[0.0, 2.0]]])
    estimate = torch.tensor([[[3.0, 5.0]], [[0.0, 1.0]]])
    torch.testing.assert_close(relative_l2(estimate, exact), torch.tensor([0.2, 0.5]))


def test_relative_l2_accumulates_in_float32():
    exact = torch.ones(1, 4096, 16, dtype=torch.bfloat16)
    estimate = exact * 1.0078125
    assert float(relative_l2(estimate, exact)) == pytest.approx(0.0078125, rel=1e-4)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_relative_l2_of_bad_values_is_not_finite(bad: float):
    values = torch.ones(1, 2, 2)
    values[0, 0, 0] = bad
    assert not torch.isfinite(relative_l2(values, torch.ones(1, 2, 2))).any()
    assert not torch.isfinite(relative_l2(torch.ones(1, 2, 2), values)).any()


def test_relative_l2_against_zero_is_not_finite():
    zeros = torch.zeros(1, 2, 2)
    assert not torch.isfinite(relative_l2(torch.ones(1, 2, 2), zeros)).any()
    # Nothing of nothing is left out.
    assert relative_l2(zeros, zeros).tolist() == [0.0]


def test_relative_l2_reduces_before_it_divides():
    exact, estimate = torch.randn(1, 8, 4), torch.randn(1, 8, 4)
    halves = [slice(0, 4), slice(4, 8)]
    shares: list[torch.Tensor] = []

    def remember(partial: torch.Tensor) -> torch.Tensor:
        shares.append(partial)
        return partial

    for half in halves:
        relative_l2(estimate[:, half], exact[:, half], reduction=remember)
    total = sum(shares)
    on_two_ranks = relative_l2(estimate[:, halves[0]], exact[:, halves[0]], reduction=lambda _: total)  # pyright: ignore
    torch.testing.assert_close(on_two_ranks, relative_l2(estimate, exact, reduction=no_reduction))


X = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[1.0, 0.0], [0.0, 0.0]]])


def test_relative_l1_is_the_sum_of_differences_over_the_sum_of_the_reference():
    torch.testing.assert_close(relative_l1(X + 0.5, X), torch.tensor([2.0 / 10, 2.0]))


def test_cosine_dissimilarity_sees_direction_alone():
    orthogonal = torch.tensor([[[2.0, -1.0], [4.0, -3.0]], [[0.0, 1.0], [0.0, 0.0]]])
    torch.testing.assert_close(cosine_dissimilarity(3 * X, X), torch.zeros(2), atol=1e-6, rtol=0)
    torch.testing.assert_close(cosine_dissimilarity(orthogonal, X), torch.ones(2))
    assert (cosine_dissimilarity(3 * X, X) >= 0).all()
    assert cosine_dissimilarity(torch.zeros_like(X), X).isnan().all()


def test_total_variation_is_the_mass_that_moved_averaged_over_rows():
    p = torch.tensor([[[1.0, 0.0], [0.5, 0.5]]])
    q = torch.tensor([[[0.0, 1.0], [0.5, 0.5]]])
    assert float(total_variation(p, q)) == pytest.approx(0.5)
    assert float(total_variation(p, p)) == 0.0


@pytest.mark.parametrize("distance", [relative_l1, cosine_dissimilarity, total_variation])
def test_partial_sums_of_two_ranks_add_up(distance):
    reference = X + torch.tensor([0.3, -0.2])
    whole = distance(X, reference)
    sums: list[torch.Tensor] = []

    def collect(partial: torch.Tensor) -> torch.Tensor:
        sums.append(partial)
        return partial

    for half in (slice(0, 1), slice(1, 2)):
        distance(X[:, half], reference[:, half], reduction=collect)
    torch.testing.assert_close(distance(X, reference, reduction=lambda _: sums[0] + sums[1]), whole)
