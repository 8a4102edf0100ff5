"""Distances between feature tensors, per sample, in float32."""

from collections.abc import Callable

import torch
from einops import reduce
from torch import Tensor

from afcache._typing import PerSample, Velocity, typed

# Sums a `[count, batch]` tensor of partial sums over the ranks that share a decision.
Reduction = Callable[[Tensor], Tensor]


def no_reduction(partial_sums: Tensor) -> Tensor:
    """One process holds everything: the default `Reduction`."""
    return partial_sums


@typed
def relative_l2(estimate: Velocity, exact: Velocity, *, reduction: Reduction = no_reduction) -> PerSample:
    """||estimate - exact|| / ||exact|| of each sample, over tokens and channels.

    Numerator and denominator are summed over ranks before they are divided: ranks that compared first could branch apart.

    Args:
        estimate: forecast.
        exact: computed values.
        reduction: sums partial sums over ranks.

    Returns:
        float32; infinite or NaN where `exact` vanishes or anything is not finite.

    """
    exact = exact.to(torch.float32)
    difference = estimate.to(torch.float32) - exact
    sums = torch.stack([_sum_of_squares(difference), _sum_of_squares(exact)])
    numerator, denominator = reduction(sums)
    return (numerator / denominator).sqrt()


def _sum_of_squares(x: Tensor) -> Tensor:
    return reduce(x.square(), "batch seq channels -> batch", "sum")
