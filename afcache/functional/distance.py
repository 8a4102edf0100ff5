"""Distances between feature tensors, per sample, in float32."""

from collections.abc import Callable

import torch
from einops import reduce
from torch import Tensor

from afcache._typing import AttentionMap, PerSample, Tokens, Velocity, typed

# Sums a `[count, batch]` tensor of partial sums over the ranks that share a decision.
Reduction = Callable[[Tensor], Tensor]


def no_reduction(partial_sums: Tensor) -> Tensor:
    """One process holds everything: the default `Reduction`."""
    return partial_sums


@typed
def relative_l2(estimate: Velocity, exact: Velocity, *, reduction: Reduction = no_reduction) -> PerSample:
    """||estimate - exact|| / ||exact|| of each sample, over all axes but that of samples.

    Numerator and denominator are summed over ranks before they are divided: ranks that compared first could branch apart.

    Args:
        estimate: forecast.
        exact: computed values.
        reduction: sums partial sums over ranks.

    Returns:
        float32; 0 where both vanish; infinite where `exact` alone does, NaN where anything is not finite.

    """
    exact = exact.to(torch.float32)
    difference = estimate.to(torch.float32) - exact
    sums = torch.stack([_sum_of_squares(difference), _sum_of_squares(exact)])
    numerator, denominator = reduction(sums)
    return torch.where(numerator == 0, numerator, numerator / denominator).sqrt()


@typed
def relative_l1(x: Tokens, reference: Tokens, *, reduction: Reduction = no_reduction) -> PerSample:
    """Sum |x - reference| / sum |reference| of each sample; float32; NaN or infinite where `reference` vanishes."""
    reference = reference.to(torch.float32)
    difference = (x.to(torch.float32) - reference).abs()
    numerator, denominator = reduction(torch.stack([difference.sum((1, 2)), reference.abs().sum((1, 2))]))
    return numerator / denominator


@typed
def cosine_dissimilarity(x: Tokens, reference: Tokens, *, reduction: Reduction = no_reduction) -> PerSample:
    """1 - <x, reference> / (||x|| ||reference||) of each sample, at least 0; float32; NaN where one of them vanishes."""
    x, reference = x.to(torch.float32), reference.to(torch.float32)
    sums = torch.stack([(x * reference).sum((1, 2)), _sum_of_squares(x), _sum_of_squares(reference)])
    product, square, reference_square = reduction(sums)
    return (1 - product / (square * reference_square).sqrt()).clamp(min=0)


@typed
def total_variation(p: AttentionMap, q: AttentionMap, *, reduction: Reduction = no_reduction) -> PerSample:
    """1/2 sum |p - q|, averaged over the rows of two attention maps `[batch, query, key]`; in [0, 1]; float32."""
    difference = (p.to(torch.float32) - q.to(torch.float32)).abs().sum((1, 2)) / 2
    rows = torch.full_like(difference, p.shape[1])
    numerator, denominator = reduction(torch.stack([difference, rows]))
    return numerator / denominator


def _sum_of_squares(x: Tensor) -> Tensor:
    return reduce(x.square(), "batch ... -> batch", "sum")
