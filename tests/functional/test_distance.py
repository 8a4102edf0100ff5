import math

import pytest
import torch

from afcache.functional.distance import no_reduction, relative_l2


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
    assert not torch.isfinite(relative_l2(zeros, zeros)).any()


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
