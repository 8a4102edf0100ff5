"""How stable each group of blocks is, in which class that puts it, and thresholds that tune themselves."""

import torch
from einops import reduce
from torch import Tensor

from afcache._typing import Flags, GroupCounts, GroupFlags, GroupHistory, PerGroup, PerSample, Setting, typed
from afcache.functional.distance import Reduction, no_reduction

# The distance in sigma for which similarities are stated: one of 20 equal steps.
REFERENCE_GAP = 0.05
_GAIN_RISE, _GAIN_FALL = 1.05, 0.7
_GAIN_MIN, _GAIN_MAX = 0.25, 4.0


@typed
def corrected_similarity(
    newest: GroupHistory, before: GroupHistory, gap: PerGroup, *, reduction: Reduction = no_reduction
) -> PerGroup:
    """Cosine similarity of two successive residuals, as it would be at the reference gap.

    cos(min(pi, theta * h_ref / h)),  theta = angle between the residuals, h = |sigma_n - sigma_{n-1}|

    Residuals turn further in longer gaps; taking the angle as proportional to the gap makes gaps comparable.

    Args:
        newest: residuals `[groups, batch, img_seq, dim]`, image tokens.
        before: those of the refresh before.
        gap: distance in sigma between the two.
        reduction: sums partial sums over ranks.

    Returns:
        float32 in [-1, 1]; NaN where a residual vanishes.

    """
    newest, before = newest.to(torch.float32), before.to(torch.float32)
    sums = torch.stack([_inner(newest, before), _inner(newest, newest), _inner(before, before)])
    product, square, square_before = reduction(sums)
    cosine = product / (square * square_before).sqrt()
    angle = cosine.clamp(-1, 1).acos() * REFERENCE_GAP / gap
    return angle.clamp(max=torch.pi).cos()


def _inner(x: Tensor, y: Tensor) -> Tensor:
    return reduce(x * y, "groups batch seq dim -> groups batch", "sum")


@typed
def track(
    stability: PerGroup, similarity: PerGroup, *, is_measured: GroupFlags, is_first: GroupFlags, decay: float
) -> PerGroup:
    """Exponential moving average; the first measurement is taken as it is, one that is not finite counts as 0.

    Args:
        stability: so far.
        similarity: of this step.
        is_measured: where there is a similarity.
        is_first: where it is the first one.
        decay: weight of the past; static.

    """
    similarity = torch.where(torch.isfinite(similarity), similarity, torch.zeros_like(similarity))
    averaged = torch.where(is_first, similarity, torch.lerp(similarity, stability, decay))
    return torch.where(is_measured, averaged, stability)


@typed
def classify(
    stability: PerGroup,
    previous: GroupCounts,
    *,
    is_first: GroupFlags,
    bounds: tuple[float, float, float],
    margin: float,
) -> GroupCounts:
    """Classes 0 (most stable) to 3, which change only where stability is beyond a bound by the margin.

    Args:
        stability: in [-1, 1].
        previous: classes before.
        is_first: where there is none before, so that the bounds alone decide.
        bounds: where classes meet, falling; static.
        margin: width of the hysteresis; static.

    """
    lowest, plain, highest = (_count_below(stability, bounds, shift) for shift in (-margin, 0.0, margin))
    return torch.where(is_first, plain, torch.minimum(torch.maximum(previous, lowest), highest))


def _count_below(stability: PerGroup, bounds: tuple[float, float, float], shift: float) -> GroupCounts:
    return torch.stack([stability < bound + shift for bound in bounds]).sum(dim=0)


@typed
def adapt_gain(gain: PerSample, incurred: PerSample, *, tolerance: Setting, is_measured: Flags) -> PerSample:
    """Let thresholds tune themselves: rise slowly while errors stay under the tolerance, fall quickly when they do not.

    Args:
        gain: factor of the thresholds so far; stays in [1/4, 4].
        incurred: what the steps since the last refresh really added, in units of the tolerance; NaN lowers the gain.
        tolerance: what they were allowed to.
        is_measured: where there is such a measurement.

    """
    adapted = torch.where(incurred <= tolerance, gain * _GAIN_RISE, gain * _GAIN_FALL).clamp(_GAIN_MIN, _GAIN_MAX)
    return torch.where(is_measured, adapted, gain)
