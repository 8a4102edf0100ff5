"""Error control, as in an adaptive ODE solver: when to refresh, and how to catch up.

Symbols: sigma_i the noise level of the present step, sigma_n that of the last refresh, e = ||v_hat - v|| / ||v|| the error
measured at a refresh, g the growth law, c = e / g the error rate.

Reference:
    Step-size control: Hairer, Norsett, Wanner, 1993, "Solving Ordinary Differential Equations I", section II.4. The
    measurement is free because the forecast is still at hand at a refresh.
"""

import torch

from afcache._typing import Counts, Flags, Forced, Level, Nodes, PerSample, Setting, Velocity, typed
from afcache.functional.shapes import per_sample

# A share of signal below this counts as much: where there is next to none, nothing can be forecast wrongly for long.
_LEAST_SIGNAL = 2.0**-10


@typed
def power_growth(nodes: Nodes, orders: Counts, sigma: Level, *, exponent: float) -> PerSample:
    """G = |sigma - sigma_n|^p, p = min(exponent, order + 1).

    Args:
        nodes: sigma of the last refreshes, newest first.
        orders: order of the row whose error grows, per sample.
        sigma: noise level of the step.
        exponent: highest power; static.

    """
    power = (orders + 1).to(torch.float32).clamp(max=exponent)
    return (sigma - nodes[0]).abs() ** power


@typed
def remainder_growth(nodes: Nodes, orders: Counts, sigma: Level) -> PerSample:
    """G = prod_{k <= order} |sigma - sigma_k|: the remainder of polynomial interpolation on unequal nodes.

    Reference:
        Cauchy's remainder: v - v_hat = v^(order + 1)(xi) / (order + 1)! * prod_k (sigma - sigma_k).
    """
    growth = torch.ones_like(nodes[0])
    for k in range(nodes.shape[0]):
        growth = torch.where(orders >= k, growth * (sigma - nodes[k]).abs(), growth)
    return growth


@typed
def error_rate(measured_error: PerSample, growth: PerSample) -> PerSample:
    """C = e / g. Not finite (and so: refresh) when e is not, or when g is zero."""
    return measured_error / growth


@typed
def predicted_error(rate: PerSample, growth: PerSample) -> PerSample:
    """The relative velocity error c * g that a forecast step is expected to have."""
    return rate * growth


@typed
def contribution(
    predicted: PerSample, sigma: Level, sigma_next: Level, *, weight: float, early_weight: float = 0.0
) -> PerSample:
    """What a forecast step adds to the trajectory's error: predicted * |sigma_{i+1} - sigma_i| sigma_i^w (4 - 4 sigma_i)^-u.

    The latents hold a share 1 - sigma of the image. While it is small, an error moves what the model will see in them by more:
    there it is settled what the image will show, all the more with guidance.

    Args:
        predicted: relative velocity error of the step.
        sigma, sigma_next: noise levels; 0-d, or `[batch]`.
        weight: w, power of the noise level; 0 counts all steps alike, more counts late steps less; static.
        early_weight: u, power of the share of signal, in units of a quarter; more counts early steps more; static.

    """
    added = predicted * (sigma_next - sigma).abs()
    if weight:
        added = added * sigma**weight
    if early_weight:
        added = added / (4.0 * (1.0 - sigma).clamp(min=_LEAST_SIGNAL)) ** early_weight
    return added


@typed
def should_refresh(
    accumulated: PerSample,
    *,
    tolerance: Setting,
    gap: PerSample,
    last_gap: PerSample,
    max_growth: Setting,
    is_forced: Forced,
) -> Flags:
    """Decide, per sample, whether this step is computed in full.

    A step is forecast only if  accumulated < tolerance  and  gap <= max_growth * last_gap  and it is not forced. Every
    comparison is written so that NaN means refresh, and tolerance 0 always refreshes.

    Args:
        accumulated: contributions since the last refresh, this step's included.
        tolerance: limit of `accumulated`; in units of relative velocity error times sigma (and its weight).
        gap: distance in sigma from the last refresh to this step.
        last_gap: distance in sigma between the last two refreshes; 0 until there are two.
        max_growth: largest ratio of the two; infinity switches the limit off, and times no distance at all it is NaN.
        is_forced: warmup, or a last step that must be computed.

    """
    is_within = (accumulated < tolerance) & torch.isfinite(accumulated)
    is_gradual = gap <= max_growth * last_gap
    return ~(is_within & is_gradual & ~is_forced)


@typed
def extend_lag(lag: PerSample, growth: PerSample, sigma: Level, sigma_next: Level) -> PerSample:
    """Add a forecast step to lag = sum_j (sigma_{j+1} - sigma_j) g(sigma_j), signed differences."""
    return lag + (sigma_next - sigma) * growth


@typed
def catch_up(
    velocity: Velocity,
    forecast: Velocity,
    *,
    lag: PerSample,
    growth: PerSample,
    sigma: Level,
    sigma_next: Level,
) -> Velocity:
    """Give back, at a refresh, what the forecast steps before it left out.

    d = v - v_hat is known now. If the velocity's error grew with g since the last refresh, the forecast Euler steps left
    the trajectory short by s d, s = lag / g(sigma_i); the present step makes up for it:

        v + s / (sigma_{i+1} - sigma_i) d

    Args:
        velocity: computed velocity v.
        forecast: forecast v_hat of the same step.
        lag: from `extend_lag`; 0 after a refresh, which leaves v as it is.
        growth: g(sigma_i) by the law that `lag` was summed with.
        sigma, sigma_next: this step's noise levels.

    Returns:
        the velocity to step with, in the dtype of `velocity`; the uncorrected one belongs in the history.

    """
    factor = per_sample(lag / growth / (sigma_next - sigma), velocity)
    difference = velocity.to(torch.float32) - forecast.to(torch.float32)
    corrected = (velocity.to(torch.float32) + factor * difference).to(velocity.dtype)
    return torch.where(per_sample(lag != 0, velocity) & torch.isfinite(corrected), corrected, velocity)
